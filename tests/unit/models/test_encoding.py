from pathlib import Path

import numpy as np
import pytest
import torch

from selma_ray.models.config import ModelConfig
from selma_ray.models.family import open_family


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_latents_are_encoded_in_full_precision_whatever_the_model_renders_in(
    tiny_pipeline_dir: Path, dtype: str
) -> None:
    encoders = open_family(ModelConfig.model_validate({"name": str(tiny_pipeline_dir), "dtype": dtype})).load_encoders(
        "cpu"
    )
    seen = []
    encoders._pipeline.vae.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))  # type: ignore[attr-defined]
    encoded = encoders.encode_images(np.full((1, 64, 64, 3), 128, np.uint8))
    assert seen == [torch.float32]
    assert encoded["latent_mean"].dtype == torch.float32
