"""Bad input gets one clear line, exit code 2, and nothing written."""

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("prompts.per_skil=3", "prompts.per_skil is not a known key; did you mean 'per_skill'?"),
        ("prompts.per_skill=many", "prompts.per_skill should be a valid integer"),
        ("experts.steps=0", "experts.steps should be greater than or equal to 1, got 0"),
        ("skills=[miniature/comon]", "skill 'miniature/comon' is neither packaged"),
        ("model.name=./nowhere", "model folder ./nowhere does not exist"),
        ("prompts.llm.name=/nowhere", "model folder /nowhere does not exist"),
        ("evaluation.judge.name=/nowhere", "model folder /nowhere does not exist"),
        ("merging.weights={painting: 1.0}", "merging.weights names 'painting', which is no skill of the recipe"),
        ("merging.method=mean", "merging.method should be 'average_deltas', 'average_factors'"),
        ("serving.host=0.0.0.0", "api_keys_file"),
        ("run_dir=ftp7://x", "use a path"),
        ("seed", "an override must read key.path=value"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_writes_nothing(
    selma: Any, tmp_path: Path, override: str, expected: str
) -> None:
    run_dir = tmp_path / "run"
    finished = selma("run", f"run_dir={run_dir}", override)
    assert finished.returncode == (1 if "ftp7" in override else 2)
    assert expected in finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1
    assert not run_dir.exists()


def test_a_skill_file_that_breaks_its_own_cap_is_named(selma: Any, tmp_path: Path) -> None:
    skill = tmp_path / "skill.yaml"
    skill.write_text("name: s\ndescription: d\nmax_words: 3\nseeds: [one two three four]\n")
    finished = selma("generate", f"run_dir={tmp_path / 'run'}", f"skills=[{skill}]")
    assert finished.returncode == 2
    assert "seed 1 must have at most max_words=3 words, has 4; shorten it" in finished.stderr
    skill.write_text("name: s\ndescription: d\nmax_words: 3\nseeds: []\n")
    assert "seeds" in selma("generate", f"run_dir={tmp_path / 'run'}", f"skills=[{skill}]").stderr


def test_a_run_folder_of_another_recipe_is_refused(selma: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    run_dir = tmp_path / "run"
    first = selma("merge", f"run_dir={run_dir}")
    assert first.returncode == 2
    assert "merge needs the finished stage generate" in first.stderr
    before = (run_dir / "recipe.yaml").read_bytes()
    recipe.write_bytes(before.replace(b"rank: 16", b"rank: 8"))
    second = selma("merge", recipe=recipe)
    assert second.returncode == 2
    assert "experts.lora.rank=16, this recipe says 8; set run_dir to a new folder" in second.stderr
    assert (run_dir / "recipe.yaml").read_bytes() == before


def test_help_names_every_command(selma: Any) -> None:
    finished = selma("run", "--help")
    assert finished.returncode == 0
    assert "key.path=value" in finished.stdout
