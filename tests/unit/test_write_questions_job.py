"""The job's bad input, before Ray or a language model starts."""

from pathlib import Path

import pytest

from jobs.write_questions import main


def test_what_is_wrong_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a red cup\n")
    prompts, questions = str(tmp_path / "prompts.txt"), str(tmp_path / "questions.jsonl")
    for arguments, code, message in (
        ([], 2, "python -m jobs.write_questions PROMPTS"),
        ([prompts, questions, "stile=tifa"], 2, "did you mean 'style'?"),
        ([prompts, questions, "attempts=0"], 2, "attempts should be greater than or equal to 1"),
        ([str(tmp_path / "absent.txt"), questions], 1, "cannot be read"),
    ):
        assert main(arguments) == code
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "questions.jsonl").exists()
