"""The miniature itself: its adapters rendered and judged on its dev prompts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from selma_ray.adapters.config import LoraSettings
from selma_ray.adapters.training import add_adapter, export_adapter, trainable_parameters
from selma_ray.errors import ConfigError
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.dev_scores import DevScorer
from selma_ray.judging.sources import WHOLE
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.family import open_family
from selma_ray.run.dev_scorer import dev_prompts
from tests.unit.run.miniature_runs import run_with_captions

SKILLS = ["common", "counting"]
SAMPLING = SamplingConfig(steps=4, guidance_scale=2.0, width_px=64, height_px=64)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_with_captions(tmp_path_factory.mktemp("run"), SKILLS, per_skill=20, dev_fraction=0.1)


@pytest.fixture(scope="module")
def folder(run: Any) -> Any:
    return run.folder


@pytest.fixture(scope="module")
def adapters(folder: Any) -> Any:
    """Return the folders of an adapter that changes nothing and of one that breaks the model."""
    paths = []
    for name, spread in (("nothing", 0.0), ("broken", 3.0)):
        adapted = add_adapter(open_family(ModelConfig()).load_denoiser(), LoraSettings(rank=4, alpha=4), "miniature", 0)
        for key, parameter in trainable_parameters(adapted).items():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=spread)
        export_adapter(adapted, trainable_parameters(adapted), folder, name)
        paths.append(folder.path(name))
    return paths


def test_each_skill_has_its_dev_prompts_with_questions(run: Any) -> None:
    prompts = dev_prompts(run, None, "experts.selection")
    assert {skill: len(each) for skill, each in prompts.items()} == {"common": 2, "counting": 2}
    assert all(prompt.skill == skill and prompt.questions for skill, each in prompts.items() for prompt in each)


def test_a_broken_adapter_scores_less_and_scores_repeat(run: Any, adapters: Any) -> None:
    prompts = dev_prompts(run, None, "experts.selection")
    score = DevScorer(ModelConfig(), SAMPLING, JudgeConfig(), "official", prompts, None, seed=0, batch_size=2)
    nothing, broken = (score(adapter, SKILLS) for adapter in adapters)
    assert nothing["images"] == broken["images"] == 4
    assert 0.0 <= broken["dsg"] < nothing["dsg"] <= 1.0
    assert score(adapters[0], SKILLS) == nothing


def test_prompts_are_taken_from_the_skills_in_turn(run: Any) -> None:
    prompts = dev_prompts(run, None, "experts.selection")
    score = DevScorer(ModelConfig(), SAMPLING, JudgeConfig(), "official", prompts, max_prompts=3, seed=0)
    assert [prompt.skill for prompt in score._prompts_of(SKILLS)] == ["common", "counting", "common"]


def test_dev_prompts_may_come_from_a_file(tmp_path: Path) -> None:
    run = run_with_captions(tmp_path / "run", ["common"], per_skill=4, dev_fraction=0.25)
    suite = tmp_path / "dev.jsonl"
    question = {"id": 1, "category": "whole", "question": "is there a cat?", "parents": []}
    suite.write_text(json.dumps({"id": "a", "skill": "common", "prompt": "a cat", "questions": [question]}) + "\n")
    prompts = dev_prompts(run, str(suite), "experts.selection")
    assert [prompt.prompt for prompt in prompts["common"]] == ["a cat"]
    run = run_with_captions(tmp_path / "both", SKILLS, per_skill=4, dev_fraction=0.25)
    with pytest.raises(ConfigError, match=r"counting has none; add some to experts\.selection\.suite"):
        dev_prompts(run, str(suite), "experts.selection")


def test_a_skill_without_dev_prompts_is_named(tmp_path: Path) -> None:
    run = run_with_captions(tmp_path, ["common"], per_skill=4, dev_fraction=0)
    with pytest.raises(ConfigError, match=r"dev prompts of every skill, common has none; raise prompts\.dev_fraction"):
        dev_prompts(run, None, "experts.selection")


def test_a_dev_prompt_outside_the_grammar_is_asked_about_as_a_whole(tmp_path: Path) -> None:
    run = run_with_captions(tmp_path, ["common"], per_skill=4, dev_fraction=0)
    candidate = {"text": "a zeppelin over Lisbon", "index": 4, "split": "dev"}
    run.folder.write_json(
        {"skill": "common", "request": 1, "candidates": [candidate]}, "prompts/common/request-000001.json"
    )
    (prompt,) = dev_prompts(run, None, "merging.search")["common"]
    assert [each.category for each in prompt.questions] == [WHOLE]
