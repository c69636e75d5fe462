from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from selma_ray.errors import JudgeError
from selma_ray.evaluation.chunks import JudgeChunk, ModelUnderTest, RenderChunk, plan_chunks
from selma_ray.evaluation.config import EvaluationConfig
from selma_ray.evaluation.run import WorkOnChunks
from selma_ray.evaluation.summary import model_scores
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.questions import PromptWithQuestions, Question
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.rendering import Renderer
from selma_ray.records import IMAGE_SCHEMA
from selma_ray.storage import RunFolder
from tests.unit.judging.tiny_judges import save_tiny_miniature_judge

SUITE = [
    PromptWithQuestions(f"p{n}", "common", f"{n} cups", (Question(1, "whole", "is there a cup?"),)) for n in range(5)
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EvaluationConfig:
    judge_dir = save_tiny_miniature_judge(tmp_path_factory.mktemp("judges") / "judge")
    sampling = SamplingConfig(steps=1, guidance_scale=1.0, width_px=64, height_px=64)
    return EvaluationConfig(seeds=(0, 1), batch_size=4, sampling=sampling, judge=JudgeConfig(name=str(judge_dir)))


def test_models_get_the_same_seeds_and_other_files(config: EvaluationConfig) -> None:
    base, merged = (
        plan_chunks(name, revision, SUITE, config, 7) for name, revision in (("base", "r0"), ("merged", "r1"))
    )
    assert [len(chunk.prompts) for chunk in base] == [4, 4, 2]
    assert [chunk.seeds for chunk in base] == [chunk.seeds for chunk in merged]
    seeds = [seed for chunk in base for seed in chunk.seeds]
    assert len(set(seeds)) == 10
    assert {chunk.key for chunk in base}.isdisjoint(chunk.key for chunk in merged)
    assert [chunk.key for chunk in base] == [chunk.key for chunk in plan_chunks("base", "r0", SUITE, config, 7)]


@pytest.mark.parametrize(
    "change", [{"seeds": (0, 2)}, {"sampling": SamplingConfig(steps=2, width_px=64, height_px=64)}]
)
def test_what_changes_the_images_changes_their_keys(config: EvaluationConfig, change: Any) -> None:
    before = {chunk.key for chunk in plan_chunks("base", "r0", SUITE, config, 7)}
    after = {chunk.key for chunk in plan_chunks("base", "r0", SUITE, config.model_copy(update=change), 7)}
    assert before != after


def test_a_prompt_that_fails_is_recorded_and_spares_its_batch(
    config: EvaluationConfig, tiny_pipeline_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = Renderer.render

    def refusing(self: Any, prompts: Any, seeds: Any) -> Any:
        if "2 cups" in prompts:
            raise ValueError("no such number")
        return rendered(self, prompts, seeds)

    monkeypatch.setattr(Renderer, "render", refusing)
    folder = RunFolder(str(tmp_path))
    models = {"base": ModelUnderTest(ModelConfig(name=str(tiny_pipeline_dir)))}
    chunk = plan_chunks("base", "r0", SUITE, config, 7)[0]
    RenderChunk(folder, models, config)(chunk)
    JudgeChunk(folder, config, "judge")(chunk)
    images = folder.read_table(["/".join(chunk.images_path)]).to_pylist()
    answers = folder.read_table(["/".join(chunk.answers_path("judge"))]).to_pylist()
    assert [row["error"] for row in images] == [None, None, "ValueError: no such number", None]
    assert [row["image"] is None for row in images] == [False, False, True, False]
    assert [row["answer"] is None for row in answers] == [False, False, True, False]
    assert answers[2]["reason"] == "ValueError: no such number"


def test_a_corrupt_image_is_null_with_its_reason_and_spares_the_others(
    config: EvaluationConfig, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    folder = RunFolder(str(tmp_path))
    models = {"base": ModelUnderTest(ModelConfig(name=str(tiny_pipeline_dir)))}
    chunk = plan_chunks("base", "r0", SUITE, config, 7)[0]
    RenderChunk(folder, models, config)(chunk)
    rows = folder.read_table(["/".join(chunk.images_path)]).to_pylist()
    rows[1]["image"]["bytes"] = rows[1]["image"]["bytes"][:80]
    rows[3]["image"]["bytes"] = b"no picture at all"
    folder.write_table(pa.Table.from_pylist(rows, IMAGE_SCHEMA), *chunk.images_path)
    JudgeChunk(folder, config, "judge")(chunk)
    answers = folder.read_table(["/".join(chunk.answers_path("judge"))]).to_pylist()
    assert [row["answer"] is None for row in answers] == [False, True, False, True]
    assert answers[1]["reason"].startswith("the image cannot be read: ")
    scores = model_scores(answers, "official")
    assert set(scores.unscored) == {("p1", chunk.seeds[1]), ("p3", chunk.seeds[3])}
    assert {prompt_id for (prompt_id, _), parts in scores.images.items() if parts} == {"p0", "p2"}


def test_images_that_are_there_are_not_rendered_again(
    config: EvaluationConfig, tiny_pipeline_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(str(tmp_path))
    models = {"base": ModelUnderTest(ModelConfig(name=str(tiny_pipeline_dir)))}
    chunk = plan_chunks("base", "r0", SUITE, config, 7)[0]
    RenderChunk(folder, models, config)(chunk)
    monkeypatch.setattr(Renderer, "render", pytest.fail)
    RenderChunk(folder, models, config)(chunk)


def make_failing() -> None:
    raise JudgeError("no such judge")


def test_an_error_of_ours_travels_as_a_row_past_later_stages() -> None:
    first, second = (WorkOnChunks(("chunk",), (make,), 1) for make in (make_failing, lambda: pytest.fail))  # type: ignore[arg-type]
    rows = first({"chunk": np.array([0])})
    assert rows == {"chunk": [0], "error_class": ["JudgeError"], "error": ["no such judge"]}
    assert second({key: np.array(values) for key, values in rows.items()}) == rows


def test_steps_are_made_once_and_done_in_order() -> None:
    done = []
    work = WorkOnChunks(("a", "b"), (lambda: done.append("made") or (lambda chunk: done.append(chunk)),), 1)  # type: ignore[arg-type, func-returns-value]
    assert work({"chunk": np.array([1, 0])})["error"] == ["", ""]
    assert done == ["made", "b", "a"]
