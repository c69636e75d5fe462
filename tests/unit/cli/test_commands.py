from pathlib import Path
from typing import Any

import pytest

from selma_ray.cli import commands as cli
from selma_ray.errors import CaptionError, ConfigError, StorageError


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes every command raise an error."""

    def fail_with(error: Any) -> None:
        def raise_it(options: Any) -> None:
            raise error

        monkeypatch.setattr(cli, "_execute", raise_it)

    return fail_with


class WrappedByRayError(Exception):
    """Like Ray's task errors: the message is a stack of lines, the cause an attribute."""

    def __init__(self, cause: Any) -> None:
        super().__init__("Traceback\nmany lines")
        self.cause = cause


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("steps must be positive, got 0"), 2, "selma: steps must be positive, got 0"),
        (StorageError("no space left"), 1, "selma: no space left"),
        (WrappedByRayError(WrappedByRayError(CaptionError("unknown word"))), 1, "selma: unknown word"),
        (KeyError("x"), 1, "selma: unexpected KeyError: 'x'; --debug shows where"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    failing: Any, capsys: pytest.CaptureFixture[str], error: Any, code: int, line: str
) -> None:
    failing(error)
    assert cli.main(["run", "recipe.yaml"]) == code
    assert capsys.readouterr().err.strip() == line


def test_an_error_raised_because_of_another_is_explained_by_the_known_one(
    failing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = RuntimeError("user code failed")
    unknown.__cause__ = StorageError("the disk is gone")
    failing(unknown)
    assert cli.main(["run", "recipe.yaml"]) == 1
    assert "the disk is gone" in capsys.readouterr().err


def test_debug_shows_the_traceback(failing: Any) -> None:
    failing(StorageError("no space left"))
    with pytest.raises(StorageError):
        cli.main(["run", "recipe.yaml", "--debug"])


def test_an_interrupt_says_how_to_go_on(failing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    failing(KeyboardInterrupt())
    assert cli.main(["run", "recipe.yaml"]) == 130
    assert "goes on where this one stopped" in capsys.readouterr().err


def test_overrides_may_stand_on_both_sides_of_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(cli, "_execute", seen.append)
    assert cli.main(["run", "recipe.yaml", "a=1", "--debug", "b=2"]) == 0
    assert seen[0].overrides == ["a=1", "b=2"]
    with pytest.raises(SystemExit):
        cli.main(["run", "recipe.yaml", "--colour"])


@pytest.mark.parametrize("command", ["serve", "report"])
def test_a_mistyped_run_is_refused_and_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"run_dir: {tmp_path}/runs/dmeo\nskills: [miniature/common]\n")
    assert cli.main([command, str(recipe)]) == 2
    assert "runs/dmeo must be a run's folder, it has no recipe.yaml" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
