"""What Tab offers, asked for as a shell does: the line in the environment, the answer on file descriptor 8."""

import os
import subprocess
import sys
from argparse import Action, Namespace
from pathlib import Path
from typing import Any

import pytest

from selma_ray.cli.completion import complete_key, complete_override, complete_published, complete_recipe
from selma_ray.cli.keys import choices_of, next_keys

# What a completion must not wait for; keys of a recipe are read from its configs, which take pydantic.
HEAVY = ("torch", "ray", "vllm", "diffusers", "transformers", "deepspeed", "pyarrow", "numpy")
LIGHT = (*HEAVY, "pydantic", "yaml", "rich")
_SHELL = (
    "import sys; from selma_ray.cli import main; import atexit, os; end = os._exit\n"
    "os._exit = lambda code: (print(*sys.modules), sys.stdout.flush(), end(code))\n"
    "main()"
)


def asked(line: str, folder: Path, wordbreaks: str = "") -> tuple[list[str], set[str]]:
    """Return what a shell is offered at the end of a line, and the modules that were loaded for it."""
    answer = folder / "answer"
    environment = {
        **os.environ,
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\013",
        "_ARGCOMPLETE_COMP_WORDBREAKS": wordbreaks,
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    finished = subprocess.run(
        [sys.executable, "-c", _SHELL], env=environment, cwd=folder, capture_output=True, text=True, check=True
    )
    return [word for word in answer.read_text().split("\013") if word], set(finished.stdout.split())


@pytest.mark.parametrize(
    ("line", "offered", "not_offered", "unloaded"),
    [
        ("selma ", ["run", "serve", "doctor", "merge-adapters"], ["--version"], LIGHT),
        ("selma expl", ["explain "], ["export"], LIGHT),
        ("selma plan demo --g", ["--gpu-memory "], [], LIGHT),
        ("selma skills ", ["list", "check"], [], LIGHT),
        ("selma push runs/x --what ", ["adapter", "pipeline", "dataset"], [], LIGHT),
        ("selma run wor", ["workstation "], [], LIGHT),
        ("selma run ", ["demo", "sdxl", "mine.yaml"], ["beyond", "notes.txt"], LIGHT),
        ("selma study ", ["beyond", "miniature_study"], ["demo"], LIGHT),
        ("selma init foxes --extends zi", ["zimage "], [], LIGHT),
        ("selma recipes de", ["demo "], [], LIGHT),
        ("selma skills check miniature/cou", ["miniature/counting "], [], HEAVY),
        ("selma run demo exp", ["experts.steps=", "experts.lora."], ["images."], HEAVY),
        ("selma run demo experts.steps=9 merging.meth", ["merging.method="], [], HEAVY),
        ("selma explain experts.lora.ra", ["experts.lora.rank "], [], HEAVY),
    ],
)
def test_a_shell_is_offered_what_can_come_next(
    line: str, offered: list[str], not_offered: list[str], unloaded: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "notes.txt").touch()
    words, modules = asked(line, tmp_path)
    assert set(offered) <= set(words)
    assert not set(not_offered) & set(words)
    assert not set(unloaded) & modules


def test_values_follow_the_equals_sign_of_bash(tmp_path: Path) -> None:
    """Bash takes what follows `=` for a word of its own, and puts it back."""
    words, _ = asked("selma run demo merging.method=average_", tmp_path, wordbreaks=" \t\n\"'><=;|&(:")
    assert words == ["average_deltas", "average_factors"]


def test_recipes_go_with_the_command() -> None:
    assert "beyond" in complete_recipe("", Namespace(command="plan"))
    assert "beyond" in complete_recipe("", Namespace(command="study"))
    assert "beyond" not in complete_recipe("", Namespace(command="serve"))
    name: Any = Action([], dest="name")
    assert "beyond" in complete_published("", Namespace(command="recipes"), name)
    assert complete_published("", Namespace(command="init"), name) == []


def test_keys_open_level_by_level() -> None:
    assert {"run_dir", "experts.", "prompts."} <= set(next_keys(""))
    assert next_keys("experts.lo") == next_keys("experts.lora.")  # the only one is opened at once
    assert "experts.lora.rank" in next_keys("experts.lora.")
    assert next_keys("nothing.at") == []
    assert next_keys("seed.more") == []
    assert complete_key("experts.lora.ran") == ["experts.lora.rank"]
    assert complete_override("experts.lora.ran") == ["experts.lora.rank="]


def test_values_that_can_be_counted_are_offered() -> None:
    assert complete_override("cluster.use_labels=t") == ["cluster.use_labels=true", "cluster.use_labels=false"]
    assert {"vllm", "remote", "free"} <= set(choices_of("prompts.llm.engine"))
    assert choices_of("seed") == choices_of("skills") == choices_of("no.key") == []
