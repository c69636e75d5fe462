"""What one task of the merge search does, without Ray."""

from pathlib import Path
from typing import Any

import pytest

from selma_ray.config import validate
from selma_ray.errors import ConfigError
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.dev_scores import DevScorer
from selma_ray.merging.candidates import _score_candidate
from selma_ray.merging.config import MergingConfig
from selma_ray.merging.search import MergeCandidate
from selma_ray.merging.weights import ALL
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.run.dev_scorer import dev_prompts
from selma_ray.run.opening import Run
from tests.unit.adapters.adapters_on_disk import save_random_adapter
from tests.unit.run.miniature_runs import run_with_captions

SKILLS = ["common", "counting"]
SAMPLING = SamplingConfig(steps=1, guidance_scale=1.0, width_px=64, height_px=64)


@pytest.fixture(scope="module")
def run(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = run_with_captions(tmp_path_factory.mktemp("run"), SKILLS, per_skill=8, dev_fraction=0.25)
    for seed, skill in enumerate(SKILLS):
        save_random_adapter(tiny_pipeline_dir, run.folder.local_path("experts", skill), seed)
    return run


def test_a_candidates_score_is_that_of_its_adapter(run: Run, tiny_pipeline_dir: Path) -> None:
    prompts = dev_prompts(run, None, "merging.search")
    assert [len(of_skill) for of_skill in prompts.values()] == [2, 2]
    model = ModelConfig(name=str(tiny_pipeline_dir))
    scorer = DevScorer(model, SAMPLING, JudgeConfig(), "official", prompts, None, 0)
    alone = MergeCandidate(0, 0, {ALL: {"common": 0.0, "counting": 1.0}})
    expected = scorer(str(run.folder.local_path("experts", "counting")), SKILLS)
    assert expected["images"] == 4
    assert _score_candidate(alone, scorer, run.folder, 1.0, 0) == pytest.approx(expected["dsg"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": 1}, "search.candidates should be greater than or equal to 2"),
        ({"generation": 3}, "search.generation is not a known key; did you mean 'generations'"),
        ({"step": 0}, "search.step should be greater than 0"),
    ],
)
def test_settings_of_the_search_are_checked(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(MergingConfig, {"method": "search", "search": settings}, "recipe")
