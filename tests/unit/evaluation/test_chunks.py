import numpy as np
import pytest

from selma_ray.evaluation.chunks import EvaluateChunk, ModelUnderTest, plan_chunks
from selma_ray.evaluation.config import EvaluationConfig, JudgeConfig
from selma_ray.evaluation.questions import PromptWithQuestions, Question
from selma_ray.evaluation.run import EvaluateBatch
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.rendering import Renderer
from selma_ray.storage import RunFolder
from tests.unit.evaluation.tiny_judges import save_tiny_miniature_judge

SUITE = [
    PromptWithQuestions(f"p{n}", "common", f"{n} cups", (Question(1, "whole", "is there a cup?"),)) for n in range(5)
]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> EvaluationConfig:
    judge_dir = save_tiny_miniature_judge(tmp_path_factory.mktemp("judges") / "judge")
    sampling = SamplingConfig(steps=1, guidance_scale=1.0, width_px=64, height_px=64)
    return EvaluationConfig(seeds=(0, 1), batch_size=4, sampling=sampling, judge=JudgeConfig(name=str(judge_dir)))


def test_models_get_the_same_seeds_and_other_files(config):
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
def test_what_changes_the_images_changes_their_keys(config, change):
    before = {chunk.key for chunk in plan_chunks("base", "r0", SUITE, config, 7)}
    after = {chunk.key for chunk in plan_chunks("base", "r0", SUITE, config.model_copy(update=change), 7)}
    assert before != after


def test_a_prompt_that_fails_is_recorded_and_spares_its_batch(config, tiny_pipeline_dir, tmp_path, monkeypatch):
    rendered = Renderer.render

    def refusing(self, prompts, seeds):
        if "2 cups" in prompts:
            raise ValueError("no such number")
        return rendered(self, prompts, seeds)

    monkeypatch.setattr(Renderer, "render", refusing)
    folder = RunFolder(str(tmp_path))
    models = {"base": ModelUnderTest(ModelConfig(name=str(tiny_pipeline_dir)))}
    chunk = plan_chunks("base", "r0", SUITE, config, 7)[0]
    EvaluateChunk(folder, models, config, "judge")(chunk)
    images = folder.read_table(["/".join(chunk.images_path)]).to_pylist()
    answers = folder.read_table(["/".join(chunk.answers_path("judge"))]).to_pylist()
    assert [row["error"] for row in images] == [None, None, "ValueError: no such number", None]
    assert [row["image"] is None for row in images] == [False, False, True, False]
    assert [row["answer"] is None for row in answers] == [False, False, True, False]
    assert answers[2]["reason"] == "ValueError: no such number"


def test_an_error_of_ours_travels_as_a_row(config, tiny_pipeline_dir, tmp_path):
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text('{"model_type": "bert"}')
    broken = config.model_copy(update={"judge": JudgeConfig(name=str(tmp_path / "judge"))})
    models = {"base": ModelUnderTest(ModelConfig(name=str(tiny_pipeline_dir)))}
    chunks = plan_chunks("base", "r0", SUITE[:1], broken, 7)
    rows = EvaluateBatch(RunFolder(str(tmp_path)), models, chunks, broken, "judge")({"chunk": np.array([0])})
    assert (rows["chunk"], rows["error_class"]) == ([0], ["JudgeError"])
    assert "visual question answering" in rows["error"][0]
