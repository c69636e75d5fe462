"""Rounds of a whole run: which merge draws which round, when they end, and which round is kept; the stages themselves are not run."""

from pathlib import Path
from typing import Any

import pytest

from selma_ray.errors import ConfigError
from selma_ray.run import rounds
from selma_ray.run.opening import Run, open_run
from selma_ray.run.recipe import Recipe


@pytest.fixture
def run(tmp_path: Path) -> Run:
    opened = open_run(Recipe.model_validate({"run_dir": str(tmp_path), "skills": ["miniature/counting"], "rounds": 4}))
    make_pipeline(opened)
    opened.folder.write_json({}, "prompts", "counting", "decided.json")
    return opened


def make_pipeline(run: Run) -> None:
    run.folder.write_json(
        {"_class_name": "StableDiffusionPipeline"}, "merged", "merged", "pipeline", "model_index.json"
    )


@pytest.fixture
def go(run: Run, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes the rounds with given dev scores; it hands back the summary and the runs that were made."""

    def with_scores(*scores: float) -> Any:
        made: list[Run] = []

        def stage(of_round: Run, name: str, report: Any) -> None:
            if name == "merge":
                make_pipeline(of_round)
                made.append(of_round)

        monkeypatch.setattr("selma_ray.run.stages.run_stage", stage)
        monkeypatch.setattr(rounds, "_dev_score", lambda run, of_round, number: scores[number - 1])
        return rounds.go_rounds(run, lambda progress: None), made

    return with_scores


def test_each_merge_draws_the_next_round_until_the_dev_split_no_longer_gains(run: Run, go: Any) -> None:
    summary, made = go(0.5, 0.6, 0.55, 0.9)
    assert summary["kept_round"] == 2
    assert [each["round"] for each in summary["rounds"]] == [1, 2, 3]  # the fourth is not made
    drawn_by = [each.recipe.data.model.name for each in made]
    assert drawn_by == [
        run.folder.path("merged", "merged", "pipeline"),
        run.folder.path("rounds", "2", "merged", "merged", "pipeline"),
    ]
    assert all(each.recipe.model == run.recipe.model for each in made)  # experts are fitted to the same base
    assert all(each.folder.exists("prompts", "counting", "decided.json") for each in made)


def test_every_round_stands_alone_and_the_kept_one_is_the_run_s_merge(run: Run, go: Any) -> None:
    summary, _ = go(0.5, 0.6, 0.6)
    run.folder.mark_done("merge", summary)
    assert run.merged_parts == ("rounds", "2", "merged", "merged")
    alone = open_run(run.folder.path("rounds", "2"))
    assert alone.recipe.rounds == 1
    assert list(rounds.rounds_made(run)) == [1, 2, 3]


def test_a_merge_that_was_deleted_is_said_with_the_remedy(run: Run, go: Any) -> None:
    run.folder.delete("merged", "merged", "pipeline")
    with pytest.raises(
        ConfigError, match=r"round 2 is drawn by the merge of round 1, and .* is gone; delete .*merge.json"
    ):
        go(0.5, 0.6)


def test_new_prompts_have_a_seed_of_their_own(run: Run) -> None:
    changed = run.recipe.model_copy(update={"data": run.recipe.data.model_copy(update={"prompts_each_round": "new"})})
    first, second = (rounds.round_recipe(Run(changed, run.folder), run, number).seed for number in (2, 3))
    assert len({first, second, run.recipe.seed}) == 3
    assert rounds.round_recipe(run, run, 2).seed == run.recipe.seed


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"experts": {"nft": {}}}, "rounds must be 1 with experts.nft"),
        ({"data": {"images": "ground_truth"}}, "rounds must be 1 with data.images=ground_truth"),
        ({"prompts": {"dev_fraction": 0}}, "rounds needs prompts.dev_fraction above 0"),
    ],
)
def test_rounds_that_cannot_be_made_are_refused(settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Recipe.model_validate({"run_dir": "runs/x", "skills": ["miniature/counting"], "rounds": 2, **settings})
