"""What tests of judges share: the judge of a module's `judge_dir`, and three images of noise."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.judges.opening import open_judge


@pytest.fixture(scope="module")
def judge(judge_dir: Path) -> Any:
    return open_judge(JudgeConfig(name=str(judge_dir), batch_size=4))


@pytest.fixture(scope="module")
def images() -> Any:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 64, 64, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(image.numpy()) for image in pixels]
