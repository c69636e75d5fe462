import csv
import re
from pathlib import Path
from typing import Any

import pytest

from selma_ray.errors import JudgeError
from selma_ray.evaluation.pairs import export_pairs, read_ratings
from tests.unit.evaluation.finished_runs import write_finished_run

COUNT = 20


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_finished_run(tmp_path_factory.mktemp("run"), max_prompts=40)
    assert export_pairs(folder, folder.done("evaluate"), COUNT, seed=0) == folder.path("pairs", "index.html")
    return folder


@pytest.fixture(scope="module")
def key(run: Any) -> Any:
    return run.read_json("pairs", "key.json")


@pytest.fixture
def rate(run: Any, key: Any, tmp_path: Path) -> Any:
    """Return a function that writes a rater's file, one wanted winner a pair, and reads all files written so far."""
    files: list[Any] = []

    def write(winners: Any, rater: str = "ann", **replaced: Any) -> Any:
        file = tmp_path / f"{len(files)}.csv"
        with file.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["export", "pair", "rater", "choice"])
            for pair, winner in zip(sorted(key["pairs"]), winners, strict=False):
                sides = {key["pairs"][pair][side]: side for side in ("left", "right")}
                row = {
                    "export": key["export"],
                    "pair": pair,
                    "rater": rater,
                    "choice": sides.get(winner, "tie"),
                } | replaced
                writer.writerow(row.values())
        files.append(file)
        return read_ratings(run, files)

    return write


def test_page_does_not_tell_which_model_made_an_image(run: Any, key: Any) -> None:
    html = run.read_bytes("pairs", "index.html").decode()
    text = re.sub(r'src="data:[^"]*"', "", html)
    assert not re.search(r"merged|base|gain|expert", text)
    assert html.count('src="data:image/png') == 2 * COUNT
    assert not re.search(r"https?://|@import|<link[^>]*stylesheet", text)
    lefts = [pair["left"] for pair in key["pairs"].values()]
    assert 3 < lefts.count("base") < COUNT - 3


def test_pairs_are_drawn_evenly_and_repeatably(run: Any, key: Any) -> None:
    skills = [pair["skill"] for pair in key["pairs"].values()]
    assert {skills.count(skill) for skill in set(skills)} == {COUNT // 5}
    export_pairs(run, run.done("evaluate"), COUNT, seed=0)
    assert run.read_json("pairs", "key.json") == key


def test_choices_become_wins_ties_and_losses_with_an_exact_interval(run: Any, rate: Any) -> None:
    result = rate(["merged"] * 9 + ["base"] * 3 + ["tie"] * 4)
    assert (result["wins"], result["ties"], result["losses"], result["unrated"]) == (9, 4, 3, 4)
    assert result["share"]["mean"] == 0.75
    # Clopper and Pearson's interval of 9 in 12, from tables.
    assert result["share"]["interval"] == pytest.approx([0.4281, 0.9451], abs=1e-4)
    assert result["p"] == pytest.approx(2 * (1 + 12 + 66 + 220) / 4096)
    assert run.read_json("pairs", "result.json") == result


def test_the_majority_of_raters_decides_a_pair(rate: Any) -> None:
    rate(["merged", "merged", "base"], rater="ann")
    rate(["merged", "base", "tie"], rater="bob")
    result = rate(["base", "tie", "tie"], rater="eve")
    assert (result["wins"], result["ties"], result["losses"], result["raters"]) == (1, 2, 0, 3)


def test_ties_alone_have_no_share(rate: Any) -> None:
    result = rate(["tie"] * 3)
    assert (result["share"], result["p"]) == (None, 1.0)


@pytest.mark.parametrize(
    ("replaced", "expected"),
    [
        ({"export": "x"}, "choices of export 'x'"),
        ({"pair": "999"}, "got '999'"),
        ({"choice": "both"}, "choice must be left, right, tie, got 'both'"),
        ({"pair": "001"}, "rates pair 001 a second time"),
    ],
)
def test_wrong_files_are_one_line(rate: Any, replaced: Any, expected: str) -> None:
    with pytest.raises(JudgeError, match=expected) as caught:
        rate(["merged"] * 2, **replaced)
    assert re.search(r"\.csv line [23]: ", str(caught.value))


def test_files_that_are_no_choices_are_named(run: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("empty.csv", "binary.csv", "nowhere.csv"):
        with pytest.raises(JudgeError, match=name):
            read_ratings(run, [tmp_path / name])


def test_ratings_need_an_export(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match="--export-pairs"):
        read_ratings(write_finished_run(tmp_path, max_prompts=5), [])
