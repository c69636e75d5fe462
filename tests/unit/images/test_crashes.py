"""A run that is killed at any one of its writes, and started again, ends as one that is not."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from selma_ray.images.config import ImagesConfig
from selma_ray.images.in_flight import take_lost
from selma_ray.images.plan import PlanImages
from selma_ray.images.rendering import RenderPrompts
from selma_ray.images.shards import existing_ids, forget_failures, read_images
from selma_ray.images.writing import WriteImages
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.records import PROMPT_SCHEMA
from selma_ray.storage import RunFolder

CONFIG = ImagesConfig(engine="free", batch_size=4, per_prompt=2, sampling=SamplingConfig(width_px=8, height_px=8))
PROMPTS = pa.Table.from_pylist(
    [
        {"id": str(index), "skill": f"skill{index % 2}", "index": index, "prompt": f"cat {index}", "split": "train"}
        for index in range(7)
    ],
    schema=PROMPT_SCHEMA,
)


class KilledError(BaseException):
    """Like kill -9: nothing that runs afterwards may tidy up."""


class MortalFolder(RunFolder):
    """Kills its process at a change of what it holds: before it is made, or when it is made."""

    def __init__(self, uri: str, kill_at: float) -> None:
        super().__init__(uri)
        self.changes = 0
        self._kill_at = kill_at

    def write_bytes(self, content: Any, *parts: str) -> None:
        self._change(lambda: super(MortalFolder, self).write_bytes(content, *parts))

    def delete(self, *parts: str) -> None:
        self._change(lambda: super(MortalFolder, self).delete(*parts))

    def _change(self, make: Any) -> None:
        self.changes += 1
        if self.changes - 0.5 == self._kill_at:
            raise KilledError
        make()
        if self.changes == self._kill_at:
            raise KilledError


def run(folder: RunFolder, model: ModelConfig, batch: int = CONFIG.batch_size) -> int:
    """Render what is missing, one batch after another; returns how many images an earlier start had lost in flight."""
    forget_failures(folder)
    finished = existing_ids(folder)
    lost = take_lost(folder, finished)
    planned = PlanImages(CONFIG, model, 0, finished)(PROMPTS)
    render, write = RenderPrompts(CONFIG, model, folder), WriteImages(folder)
    for start in range(0, planned.num_rows, batch):
        write(render(planned.slice(start, batch)))
    return lost


def ids(folder: RunFolder) -> list[str]:
    return [id_ for skill in ("skill0", "skill1") for id_ in read_images(folder, skill)["id"].to_pylist()]


@pytest.fixture
def model(tiny_pipeline_dir: Path) -> ModelConfig:
    return ModelConfig(name=str(tiny_pipeline_dir))


def test_a_kill_at_any_write_costs_at_most_the_batch_in_flight(tmp_path: Path, model: ModelConfig) -> None:
    undisturbed = MortalFolder(str(tmp_path / "undisturbed"), kill_at=-1)
    run(undisturbed, model)
    expected = ids(undisturbed)
    assert len(expected) == len(set(expected)) == 2 * PROMPTS.num_rows
    for half in range(1, 2 * undisturbed.changes + 1):
        uri = str(tmp_path / str(half))
        with pytest.raises(KilledError):
            run(MortalFolder(uri, kill_at=half / 2), model)
        lost = run(RunFolder(uri), model, batch=3)  # the next start batches otherwise
        assert ids(RunFolder(uri)) == expected, half
        assert lost <= CONFIG.batch_size
        assert RunFolder(uri).files("in_flight") == []
