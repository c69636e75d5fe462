"""Evaluation through Ray Data with real engines: a small random pipeline, a small random judge."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from selma_ray.cluster.config import ClusterConfig
from selma_ray.errors import ConfigError
from selma_ray.evaluation.config import EvaluationConfig
from selma_ray.evaluation.image_metrics import ScoreImagesConfig, score_run
from selma_ray.evaluation.run import ModelUnderTest, evaluate_models
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.judges.opening import open_judge
from selma_ray.judging.preferences.convert import clip_from_open_clip
from selma_ray.judging.questions import PromptWithQuestions, Question
from selma_ray.judging.scoring import score_images
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.records import seed_of
from selma_ray.storage import RunFolder
from tests.unit.adapters.adapters_on_disk import save_random_adapter
from tests.unit.judging import tiny_preferences as tiny
from tests.unit.judging.tiny_judges import save_tiny_vilt

SEED = 5
SUITE = [
    PromptWithQuestions(
        f"p{number}", ("common", "counting")[number % 2], f"a red cup and {number} apples",
        (Question(1, "whole", "is there a cup?"), Question(2, "color", "is the cup red?", (1,))),
    )
    for number in range(5)
]  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EvaluationConfig:
    judge_dir = save_tiny_vilt(tmp_path_factory.mktemp("judges") / "vilt")
    return EvaluationConfig(
        suite="in memory", seeds=(0, 1), batch_size=4, bootstrap_resamples=100, judge=JudgeConfig(name=str(judge_dir)),
        sampling=SamplingConfig(steps=2, guidance_scale=2.0, width_px=64, height_px=64),
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelUnderTest]:
    adapter_dir = save_random_adapter(tiny_pipeline_dir, tmp_path_factory.mktemp("adapters") / "merged", seed=1)
    base = ModelConfig(name=str(tiny_pipeline_dir))
    return {"base": ModelUnderTest(base), "merged": ModelUnderTest(base, adapter_dir=str(adapter_dir))}


@pytest.fixture(scope="module")
def evaluated(
    ray_cluster: Any,
    config: EvaluationConfig,
    models: dict[str, ModelUnderTest],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    folder = RunFolder(str(tmp_path_factory.mktemp("run")))
    events: list[Any] = []
    summary = evaluate_models(folder, models, SUITE, config, SEED, ClusterConfig(), events.append).as_dict()
    return folder, summary, events


def rounded(value: Any) -> Any:
    """Return nested values with their numbers to six digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return round(value, 6) if isinstance(value, float) else value


def rows_of(folder: RunFolder, summary: dict, model: str, kind: str) -> list[dict]:
    return folder.read_table(summary["files"][model][kind]).to_pylist()


def test_every_model_renders_every_prompt_from_the_same_seeds(evaluated: Any) -> None:
    folder, summary, events = evaluated
    expected = {
        (prompt.prompt, seed_of(SEED, prompt=prompt.prompt, sampling_seed=seed)) for prompt in SUITE for seed in (0, 1)
    }
    for model in ("base", "merged"):
        images = rows_of(folder, summary, model, "images")
        assert len(images) == len(expected) == len({row["id"] for row in images})
        assert {(row["prompt"], row["seed"]) for row in images} == expected
        assert all(row["error"] is None for row in images)
        assert len(rows_of(folder, summary, model, "answers")) == 2 * len(expected)
    assert (events[-1].done, events[-1].total) == (20, 20)
    first = {row["seed"]: row["image"]["bytes"] for row in rows_of(folder, summary, "base", "images")}
    assert all(first[row["seed"]] != row["image"]["bytes"] for row in rows_of(folder, summary, "merged", "images"))


def test_summary_has_figures_and_a_paired_difference(evaluated: Any) -> None:
    _, summary, _ = evaluated
    assert summary["prompts"] == 5
    for scores in summary["models"].values():
        assert 0 <= scores["interval"][0] <= scores["dsg"] <= scores["interval"][1] <= 1
        assert set(scores["skills"]) == {"common", "counting"}
        assert (scores["images"], scores["unreadable_answers"]) == (10, 0)
    difference = summary["difference"]
    gain = summary["models"]["merged"]["dsg"] - summary["models"]["base"]["dsg"]
    assert difference["mean"] == pytest.approx(gain)
    assert difference["wins"] + difference["losses"] + difference["ties"] == 5


def test_a_finished_evaluation_does_nothing_and_a_killed_one_goes_on(
    evaluated: Any, config: EvaluationConfig, models: dict[str, ModelUnderTest]
) -> None:
    folder, summary, _ = evaluated
    paths = [path for model in models for kind in ("images", "answers") for path in summary["files"][model][kind]]
    before = {path: folder.local_path(path).stat().st_ino for path in paths}
    again, events = evaluated_again(folder, models, config)
    assert again == summary
    assert events == []
    assert before == {path: folder.local_path(path).stat().st_ino for path in paths}

    lost_answers = summary["files"]["base"]["answers"][0]
    lost_images, its_answers = (summary["files"]["merged"][kind][1] for kind in ("images", "answers"))
    for path in (lost_answers, lost_images, its_answers):
        folder.delete(path)
    again, events = evaluated_again(folder, models, config)
    assert rounded(again) == rounded(summary), "a batch of another size rounds P(yes) otherwise, in its last digits"
    assert sorted(event.detail for event in events) == ["base", "merged"]
    redone = {path for path in paths if folder.local_path(path).stat().st_ino != before[path]}
    assert redone <= {lost_answers, lost_images, its_answers}


def test_judges_in_actors_of_their_own_give_the_same_figures(
    evaluated: Any, config: EvaluationConfig, models: dict[str, ModelUnderTest], tmp_path: Path
) -> None:
    _, summary, _ = evaluated
    apart = config.model_copy(update={"judges": 1})
    again, events = evaluated_again(RunFolder(str(tmp_path)), models, apart)
    assert rounded(again) == rounded(summary)
    assert (events[-1].done, events[-1].total) == (20, 20)


def test_actors_that_cannot_all_start_are_refused(
    ray_cluster: Any, config: EvaluationConfig, models: dict[str, ModelUnderTest], tmp_path: Path
) -> None:
    apart = config.model_copy(update={"judges": 1, "num_cpus": 4})
    with pytest.raises(
        ConfigError, match=r"evaluation\.renderers needs 4 and evaluation\.judges needs 1, .* has 4 CPU"
    ):
        evaluated_again(RunFolder(str(tmp_path)), models, apart)


def test_every_image_has_its_scores_in_a_table(evaluated: Any) -> None:
    folder, summary, _ = evaluated
    for model, scores in summary["models"].items():
        table = folder.read_table([f"evaluation/{model}/scores.parquet"])
        assert table.num_rows == scores["images"]
        by_prompt: dict[Any, Any] = {}
        for row in table.to_pylist():
            by_prompt.setdefault(row["prompt_id"], []).append(row["official"])
        assert sum(sum(each) / len(each) for each in by_prompt.values()) / len(by_prompt) == pytest.approx(
            scores["dsg"]
        )


def evaluated_again(folder: Any, models: Any, config: Any) -> Any:
    events: list[Any] = []
    return evaluate_models(folder, models, SUITE, config, SEED, ClusterConfig(), events.append).as_dict(), events


def test_a_service_gives_the_scores_that_the_evaluation_gave(evaluated: Any, config: EvaluationConfig) -> None:
    folder, summary, _ = evaluated
    judge = open_judge(config.judge)
    answers: dict[Any, Any] = {}
    for row in rows_of(folder, summary, "base", "answers"):
        answers.setdefault((row["prompt"], row["seed"]), []).append((row["answer"], row["p_yes"]))
    questions = {prompt.prompt: prompt.questions for prompt in SUITE}
    for row in rows_of(folder, summary, "base", "images")[:3]:
        image = Image.open(io.BytesIO(row["image"]["bytes"]))
        (score,) = score_images(judge, [image], [questions[row["prompt"]]], config.dsg_scorer)
        offline = answers[row["prompt"], row["seed"]]
        assert [each.answer for each in score.questions] == [answer for answer, _ in offline]
        assert [each.p_yes for each in score.questions] == pytest.approx([p_yes for _, p_yes in offline], abs=1e-5)


def test_a_cluster_s_workers_score_images_as_this_process_does(evaluated: Any, tmp_path: Path) -> None:
    folder, summary, _ = evaluated
    letters = tiny.character_tokenizer(tmp_path / "letters")
    weights = clip_from_open_clip(tiny.open_clip_weights(len(letters)), tiny.clip_config(letters))
    weights.save_pretrained(tmp_path / "clip")
    letters.save_pretrained(tmp_path / "clip")
    folder.mark_done("evaluate", {"files": summary["files"]})
    results = []
    for address in (None, "auto"):
        config = ScoreImagesConfig(
            metric="pickscore", model=str(tmp_path / "clip"), bootstrap_resamples=100, num_cpus=0.5, workers=2,
            cluster=ClusterConfig(address=address),
        )  # fmt: skip
        results.append(score_run(folder, config))
        for model in summary["files"]:
            assert folder.files("evaluation", model, "metrics")
            folder.delete("evaluation", model, "metrics")
    for model, here in results[0]["models"].items():
        assert here["unscored"] == {}
        assert results[1]["models"][model]["mean"] == pytest.approx(here["mean"], abs=1e-5)
