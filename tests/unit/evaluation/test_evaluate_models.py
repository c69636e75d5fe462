"""The evaluation from models to figures, its chunks worked on in this process instead of by Ray's actors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from selma_ray.cluster.config import ClusterConfig
from selma_ray.errors import JudgeError, RenderError
from selma_ray.evaluation import run
from selma_ray.evaluation.chunks import JudgeChunk, RenderChunk
from selma_ray.evaluation.config import EvaluationConfig, OtherResult
from selma_ray.evaluation.run import ModelUnderTest, evaluate_models
from selma_ray.evaluation.second_judge import judge_key
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.questions import PromptWithQuestions, Question
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.storage import RunFolder
from tests.unit.judging.tiny_judges import save_tiny_miniature_judge

SUITE = [
    PromptWithQuestions(
        f"p{number}", ("common", "counting")[number % 2], f"a red cup and {number} apples",
        (Question(1, "whole", "is there a cup?"), Question(2, "color", "is the cup red?", (1,))),
    )
    for number in range(4)
]  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EvaluationConfig:
    judge_dir = save_tiny_miniature_judge(tmp_path_factory.mktemp("judges") / "judge")
    return EvaluationConfig(
        suite="in memory", seeds=(0, 1), batch_size=3, bootstrap_resamples=100, judge=JudgeConfig(name=str(judge_dir)),
        sampling=SamplingConfig(steps=1, guidance_scale=1.0, width_px=64, height_px=64),
    )  # fmt: skip


@pytest.fixture
def evaluate(config: EvaluationConfig, tiny_pipeline_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that evaluates one pipeline under two names; it hands back the figures and the chunks worked on."""
    done = []

    def in_process(folder: Any, models: Any, pending: Any, config: Any, cluster: Any) -> Iterator[Any]:
        render, judges = RenderChunk(folder, models, config), [JudgeChunk(folder, config, judge_key(config.judge))]
        if config.second_judge:
            judges.append(JudgeChunk(folder, config, judge_key(config.second_judge), second=True))
        for chunk in pending:
            render(chunk)
            for judge in judges:
                judge(chunk)
            done.append(chunk)
            yield chunk

    monkeypatch.setattr(run, "_stream", in_process)
    model = ModelUnderTest(ModelConfig(name=str(tiny_pipeline_dir)))

    def call(folder: Any = tmp_path / "run", **changes: Any) -> Any:
        done.clear()
        changed = config.model_copy(update=changes)
        summary = evaluate_models(
            RunFolder(str(folder)), {"base": model, "merged": model}, SUITE, changed, 3, ClusterConfig()
        )
        return summary.as_dict(), list(done)

    return call


def tear_first_image(folder: RunFolder, summary: dict) -> None:
    """Cut off the first image of merged and forget what was answered about it."""
    images, answers = (summary["files"]["merged"][kind][0] for kind in ("images", "answers"))
    table = folder.read_table([images])
    torn = table["image"].to_pylist()
    torn[0]["bytes"] = torn[0]["bytes"][:60]
    place = table.schema.get_field_index("image")
    column = pa.array(torn, table["image"].type)
    folder.write_table(table.set_column(place, table.schema.field("image"), column), images)
    folder.delete(answers)


def test_the_same_pipeline_twice_does_not_differ(evaluate: Any) -> None:
    summary, done = evaluate()
    assert len(done) == 6
    assert summary["models"]["base"]["dsg"] == summary["models"]["merged"]["dsg"]
    assert (summary["difference"]["mean"], summary["difference"]["ties"], summary["difference"]["p_sign"]) == (0, 4, 1)
    again, done = evaluate()
    assert (again, done) == (summary, [])


def test_a_corrupt_image_is_counted_named_and_left_out(evaluate: Any, tmp_path: Path) -> None:
    summary, _ = evaluate()
    tear_first_image(RunFolder(str(tmp_path / "run")), summary)
    again, done = evaluate(max_failed_fraction=0.2)
    assert len(done) == 1
    (reason,) = again["models"]["merged"]["unscored"]["reasons"]
    assert reason.startswith("the image cannot be read")
    assert again["models"]["merged"]["unscored"]["first"][0]["prompt_id"] == "p0"
    assert again["models"]["merged"]["unreadable_answers"] == 2
    assert again["difference"]["mean"] == 0


def test_too_many_failures_stop_the_stage_and_are_tried_again(evaluate: Any, tmp_path: Path) -> None:
    summary, _ = evaluate()
    tear_first_image(RunFolder(str(tmp_path / "run")), summary)
    with pytest.raises(RenderError, match=r"1 of 8 images of merged have no score \(1 x the image cannot be read"):
        evaluate()
    again, done = evaluate()
    assert again == summary
    assert [chunk.model for chunk in done] == ["merged"]


def test_another_judge_asks_again_about_the_same_images(evaluate: Any, tmp_path: Path) -> None:
    first, _ = evaluate()
    other = save_tiny_miniature_judge(tmp_path / "other judge")
    (other / "note.txt").write_text("another revision")
    second, done = evaluate(judge=JudgeConfig(name=str(other)))
    assert len(done) == 6
    assert first["files"]["base"]["images"] == second["files"]["base"]["images"]
    assert set(first["files"]["base"]["answers"]).isdisjoint(second["files"]["base"]["answers"])
    assert first["judge"] != second["judge"]


def test_results_of_another_run_stand_beside_this_ones(evaluate: Any, tmp_path: Path) -> None:
    first, _ = evaluate(tmp_path / "first")
    RunFolder(str(tmp_path / "first")).mark_done("evaluate", first)
    compared = {"compare_with": {"before": OtherResult(run_dir=str(tmp_path / "first"))}}
    second, _ = evaluate(tmp_path / "second", **compared)
    assert second["models"]["before"]["dsg"] == first["models"]["merged"]["dsg"]
    assert second["differences"]["before"]["ties"] == 4
    assert second["judges"] == {"before": first["judge"]}
    other = save_tiny_miniature_judge(tmp_path / "other judge")
    (other / "note.txt").write_text("another revision")
    with pytest.raises(JudgeError, match="figures of different judges cannot be compared"):
        evaluate(tmp_path / "third", judge=JudgeConfig(name=str(other)), **compared)
    assert len(list((tmp_path / "third").rglob("images/*.parquet"))) == 1, "refused after the first batch, not the last"


def test_a_second_judge_is_asked_about_the_same_images_and_stands_beside_the_first(evaluate: Any) -> None:
    first, worked_on = evaluate()
    assert first["second_judge"] is None
    both, again = evaluate(second_judge=JudgeConfig())
    assert len(again) == len(worked_on)  # the images stay, answers of the second judge are added
    second = both["second_judge"]
    assert second["judge"].startswith("miniature@")
    assert second["judge"] != both["judge"]
    assert second["models"].keys() == both["models"].keys()
    assert both["models"] == first["models"]
    assert second["differences"]["merged"]["mean"] == 0
    assert evaluate(second_judge=JudgeConfig())[1] == []


def test_a_second_judge_must_be_another(config: EvaluationConfig) -> None:
    with pytest.raises(ValueError, match=r"second_judge must be another judge than evaluation\.judge"):
        EvaluationConfig(judge=JudgeConfig(), second_judge=JudgeConfig())
