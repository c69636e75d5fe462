import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from selma_ray.images.config import ImagesConfig
from selma_ray.images.plan import PLAN_SCHEMA
from selma_ray.images.rendering import RENDERED_SCHEMA, RenderPrompts
from selma_ray.models.config import ModelConfig, SamplingConfig

CONFIG = ImagesConfig(sampling=SamplingConfig(steps=2, guidance_scale=2.0, width_px=64, height_px=64), max_attempts=3)


@pytest.fixture(scope="module")
def render(tiny_pipeline_dir) -> RenderPrompts:
    return RenderPrompts(CONFIG, ModelConfig(name=str(tiny_pipeline_dir)))


def planned(*prompts: str) -> pa.Table:
    rows = [
        {"id": prompt, "skill": "one", "prompt": prompt, "split": "train", "image_index": 0, "seed": seed}
        for seed, prompt in enumerate(prompts)
    ]
    return pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)


def pixels(rendered: pa.Table) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in rendered["image"].to_pylist()]


def fail_on(render: RenderPrompts, monkeypatch: pytest.MonkeyPatch, word: str, times: int) -> list[int]:
    """Let the pipeline fail when a prompt has `word`, so many times; returns the sizes of all calls, filled as they come."""
    original, calls, failures = render._renderer.render, [], []

    def flaky(prompts, seeds):
        calls.append(len(prompts))
        if any(word in prompt for prompt in prompts) and len(failures) < times:
            failures.append(1)
            raise ValueError(f"cannot draw {word}\nsecond line")
        return original(prompts, seeds)

    monkeypatch.setattr(render._renderer, "render", flaky)
    return calls


def test_rows_carry_their_image_and_where_it_comes_from(render):
    rendered = render(planned("a cat", "a dog"))
    assert rendered.schema == RENDERED_SCHEMA
    assert [image.shape for image in pixels(rendered)] == [(64, 64, 3)] * 2
    row = rendered.to_pylist()[0]
    assert (row["id"], row["prompt"], row["seed"], row["error"]) == ("a cat", "a cat", 0, None)
    assert (row["scheduler"], row["steps"], row["width"]) == ("DDIMScheduler", 2, 64)
    assert row["seconds"] > 0


def test_an_image_depends_on_its_row_and_not_on_its_batch(render):
    """Equal up to one step of 255: the CPU's kernels round differently for other batch sizes."""
    together = pixels(render(planned("a cat", "a dog", "a cow")))
    alone = pixels(render(planned("a cat", "a dog", "a cow").slice(2)))[0]
    assert np.abs(together[2].astype(int) - alone.astype(int)).max() <= 1
    assert np.abs(together[0].astype(int) - alone.astype(int)).max() > 1


def test_calls_from_several_threads_give_each_its_own_rows(render):
    tables = [planned(f"a cat {number}") for number in range(4)]
    expected = [pixels(render(table))[0] for table in tables]
    with ThreadPoolExecutor(4) as threads:
        results = [pixels(result)[0] for result in threads.map(render, tables)]
    assert all(np.array_equal(result, image) for result, image in zip(results, expected, strict=True))


def test_one_bad_row_does_not_take_its_batch_with_it(render, monkeypatch):
    calls = fail_on(render, monkeypatch, "ghost", times=100)
    rendered = render(planned("a cat", "a ghost", "a dog"))
    assert rendered["error"].to_pylist() == [None, "ValueError: cannot draw ghost", None]
    assert [image is None for image in rendered["image"].to_pylist()] == [False, True, False]
    assert calls == [3, 1, 1, 1, 1, 1]  # the batch, then the ghost three times and the others once


def test_a_row_that_fails_twice_is_rendered_the_third_time(render, monkeypatch):
    fail_on(render, monkeypatch, "ghost", times=3)  # with the batch and twice alone
    assert render(planned("a cat", "a ghost"))["error"].to_pylist() == [None, None]


def test_an_empty_block_stays_empty(render):
    assert render(planned()).num_rows == 0
