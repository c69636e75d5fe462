import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from selma_ray.images import rendering
from selma_ray.images.config import ImageChoiceConfig, ImagesConfig
from selma_ray.images.in_flight import take_lost
from selma_ray.images.plan import PLAN_SCHEMA
from selma_ray.images.rendering import RENDERED_SCHEMA, RenderPrompts, encoded
from selma_ray.images.shards import existing_ids, image_summary
from selma_ray.images.writing import WriteImages
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.storage import RunFolder

CONFIG = ImagesConfig(sampling=SamplingConfig(steps=2, guidance_scale=2.0, width_px=64, height_px=64), max_attempts=3)

SIZE = {"width": 64, "height": 64}


@pytest.fixture(scope="module")
def loaded(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> RenderPrompts:
    folder = RunFolder(str(tmp_path_factory.mktemp("run")))
    return RenderPrompts(CONFIG, ModelConfig(name=str(tiny_pipeline_dir)), folder)


@pytest.fixture
def render(loaded: RenderPrompts) -> RenderPrompts:
    """Return a renderer that knows of nothing in flight."""
    loaded._folder.delete("in_flight")
    return loaded


def planned(*prompts: str) -> pa.Table:
    rows = [
        {"id": prompt, "skill": "one", "prompt": prompt, "split": "train", "image_index": 0, "seed": seed, **SIZE}
        for seed, prompt in enumerate(prompts)
    ]
    return pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)


def pixels(rendered: pa.Table) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in rendered["image"].to_pylist()]


def content(rendered: pa.Table) -> list[bytes]:
    return [image["bytes"] for image in rendered["image"].to_pylist()]


def fail_on(render: RenderPrompts, monkeypatch: pytest.MonkeyPatch, word: str, times: int) -> list[int]:
    """Let the pipeline fail when a prompt has `word`, so many times; returns the sizes of all calls, filled as they come."""
    original, calls = render._engine.render, []
    failures: list[Any] = []

    def flaky(prompts: Any, seeds: Any, **size: Any) -> Any:
        calls.append(len(prompts))
        if any(word in prompt for prompt in prompts) and len(failures) < times:
            failures.append(1)
            raise ValueError(f"cannot draw {word}\nsecond line")
        return original(prompts, seeds, **size)

    monkeypatch.setattr(render._engine, "render", flaky)
    return calls


def test_rows_carry_their_image_and_where_it_comes_from(render: RenderPrompts) -> None:
    rendered = render(planned("a cat", "a dog"))
    assert rendered.schema == RENDERED_SCHEMA
    assert [image.shape for image in pixels(rendered)] == [(64, 64, 3)] * 2
    row = rendered.to_pylist()[0]
    assert (row["id"], row["prompt"], row["seed"], row["error"]) == ("a cat", "a cat", 0, None)
    assert (row["scheduler"], row["steps"], row["width"]) == ("DDIMScheduler", 2, 64)
    assert row["seconds"] > 0


def test_an_image_depends_on_its_row_to_the_byte_whatever_batch_it_is_in(render: RenderPrompts) -> None:
    prompts = planned("a cat", "a dog", "a cow", "a hen", "a fox", "a bee")
    together = content(render(prompts))
    alone = [content(render(prompts.slice(index, 1)))[0] for index in range(6)]
    by_two = [image for start in (4, 2, 0) for image in reversed(content(render(prompts.slice(start, 2))))]
    backwards = content(render(prompts.take([5, 4, 3, 2, 1, 0])))
    assert alone == together
    assert by_two == backwards == together[::-1]
    assert len(set(together)) == 6


def test_calls_from_several_threads_give_each_its_own_rows(render: RenderPrompts) -> None:
    tables = [planned(f"a cat {number}") for number in range(4)]
    expected = [pixels(render(table))[0] for table in tables]
    with ThreadPoolExecutor(4) as threads:
        results = [pixels(result)[0] for result in threads.map(render, tables)]
    assert all(np.array_equal(result, image) for result, image in zip(results, expected, strict=True))


def test_one_bad_row_does_not_take_its_batch_with_it(render: RenderPrompts, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fail_on(render, monkeypatch, "ghost", times=100)
    rendered = render(planned("a cat", "a ghost", "a dog"))
    assert rendered["error"].to_pylist() == [None, "ValueError: cannot draw ghost", None]
    assert [image is None for image in rendered["image"].to_pylist()] == [False, True, False]
    assert calls == [3, 1, 1, 1, 1, 1]  # the batch, then the ghost three times and the others once


def test_a_row_that_fails_twice_is_rendered_the_third_time(
    render: RenderPrompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_on(render, monkeypatch, "ghost", times=3)  # with the batch and twice alone
    assert render(planned("a cat", "a ghost"))["error"].to_pylist() == [None, None]


def test_an_empty_block_stays_empty(render: RenderPrompts) -> None:
    assert render(planned()).num_rows == 0


class BlockingEngine:
    """Lets its second batch begin only while the first is encoded, which waits for that in turn."""

    scheduler = "none"

    def __init__(self) -> None:
        self.calls = 0
        self.second_began = threading.Event()

    def render(self, prompts: Any, seeds: Any, size_px: Any = None) -> Any:
        self.calls += 1
        if self.calls == 2:
            self.second_began.set()
        return [Image.new("RGB", (8, 8))] * len(prompts)


def test_a_batch_is_encoded_while_the_next_is_denoised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_pipeline_dir: Path
) -> None:
    engine, first = BlockingEngine(), threading.Event()

    def encode_slowly(image: Any, format_: Any) -> Any:
        if not first.is_set():
            first.set()
            assert engine.second_began.wait(30), "the denoiser stood still while a batch was encoded"
        return b"png"

    monkeypatch.setattr(rendering, "encoded", encode_slowly)
    one_by_one = CONFIG.model_copy(update={"batch_size": 1})
    render = RenderPrompts(
        one_by_one, ModelConfig(name=str(tiny_pipeline_dir)), RunFolder(str(tmp_path)), open_engine=lambda *_: engine
    )
    with ThreadPoolExecutor(2) as threads:
        assert [table.num_rows for table in threads.map(render, [planned("a cat"), planned("a dog")])] == [1, 1]


@pytest.mark.parametrize("format_", ["png", "webp"])
def test_images_are_encoded_without_loss(format_: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    decoded = Image.open(io.BytesIO(encoded(image, format_)))
    assert decoded.format == format_.upper()
    assert np.array_equal(np.asarray(decoded), np.asarray(image))


class EndingEngine:
    """Ends its process, which here is an exception that no one catches, at a prompt with the word ghost."""

    scheduler = "none"

    def render(self, prompts: Any, seeds: Any, size_px: Any = None) -> Any:
        if any("ghost" in prompt for prompt in prompts):
            raise SystemExit
        return [Image.new("RGB", (8, 8), (seed, 0, 0)) for seed in seeds]


def test_a_row_that_ends_the_process_three_times_is_given_up(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    """Every call is a new process with the same folder, as Ray starts an actor anew and repeats its task."""
    folder = RunFolder(str(tmp_path))

    def attempt() -> Any:
        engine = EndingEngine()
        render = RenderPrompts(CONFIG, ModelConfig(name=str(tiny_pipeline_dir)), folder, open_engine=lambda *_: engine)
        return render(planned("a cat", "a ghost", "a dog"))

    for _ in range(1 + CONFIG.max_attempts):  # with its batch, then alone
        with pytest.raises(SystemExit):
            attempt()
    rendered = attempt()
    assert rendered["error"].to_pylist()[::2] == [None, None]
    assert "process ended 3 times" in rendered["error"][1].as_py()
    assert rendered["again"].to_pylist() == [True] * 3
    WriteImages(folder)(rendered)
    assert take_lost(folder, []) == 0
    assert image_summary(folder, ["one"])["failed"] == 1
    assert folder.files("in_flight") == []


def test_what_was_in_flight_when_a_run_ended_is_counted_once(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    folder = RunFolder(str(tmp_path))
    render = RenderPrompts(
        CONFIG, ModelConfig(name=str(tiny_pipeline_dir)), folder, open_engine=lambda *_: EndingEngine()
    )
    WriteImages(folder)(render(planned("a cat")))
    render(planned("a dog", "a cow"))  # rendered, and never written
    assert take_lost(folder, existing_ids(folder)) == 2
    assert take_lost(folder, existing_ids(folder)) == 0


def test_the_best_images_of_each_prompt_are_chosen_and_all_scores_kept(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    config = CONFIG.model_copy(update={"per_prompt": 3, "selection": ImageChoiceConfig(keep_best=1, min_score=0.5)})
    scores = {0: 0.6, 1: 0.9, 2: 0.9, 3: 0.1, 4: None, 5: 0.2}
    rows = [
        {
            "id": str(seed),
            "skill": "one",
            "prompt": prompt,
            "split": "train",
            "image_index": seed % 3,
            "seed": seed,
            **SIZE,
        }
        for seed, prompt in enumerate(["a cat"] * 3 + ["a dog"] * 3)
    ]
    render = RenderPrompts(
        config, ModelConfig(name=str(tiny_pipeline_dir)), RunFolder(str(tmp_path)),
        open_scorer=lambda: lambda images, prompts: [scores[image.getpixel((0, 0))[0]] for image in images],  # type: ignore[index]
        open_engine=lambda *_: EndingEngine(),
    )  # fmt: skip
    rendered = render(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA))
    assert rendered["split"].to_pylist() == ["rejected", "train", *["rejected"] * 4]
    assert rendered["score"].to_pylist() == pytest.approx([0.6, 0.9, 0.9, 0.1, None, 0.2])


def test_each_size_has_batches_of_its_own(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    model = ModelConfig(name=str(tiny_pipeline_dir))
    render = RenderPrompts(CONFIG.model_copy(update={"batch_size": 2}), model, RunFolder(str(tmp_path)))
    rows = planned("a cat", "a dog", "a hen").to_pylist()
    for row, (width, height) in zip(rows, [(64, 64), (80, 48), (64, 64)], strict=True):
        row |= {"width": width, "height": height}
    rendered = render(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA))
    assert [image.shape for image in pixels(rendered)] == [(64, 64, 3), (48, 80, 3), (64, 64, 3)]
    assert rendered["width"].to_pylist() == [64, 80, 64]
    alone = render(pa.Table.from_pylist(rows[1:2], schema=PLAN_SCHEMA))
    assert content(alone) == content(rendered)[1:2]
    WriteImages(RunFolder(str(tmp_path)))(rendered)
    shards = [RunFolder(str(tmp_path)).read_table([path]) for path in RunFolder(str(tmp_path)).files("images")]
    assert sorted(table["width"].to_pylist() for table in shards) == [[64, 64], [80]]
