"""Files of other programs scored by published rules, through the job that users run."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from jobs.score_file import main
from selma_ray.judging import score_files
from selma_ray.judging.score_files import RULES
from tests.unit.judging.test_tifa import MINILM_DIR

Scored = Callable[..., dict[str, Any]]


@pytest.fixture
def scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Scored:
    """Return a function that writes rows, runs the job on them and returns its figures."""

    def run(rows: Iterable[object], *overrides: str) -> dict[str, Any]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main([str(path), *overrides]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return run


def test_geneval_scores_a_detectors_file_as_the_reference(shared_eval: Path, scored: Scored) -> None:
    lines = (shared_eval / "oracles" / "geneval_rules.jsonl").read_text().splitlines()
    cases = [json.loads(line) for line in lines]
    # The oracle judges detections that were let through: such are those above the threshold of their task.
    least = {case["metadata"]["tag"]: 0.9 if case["metadata"]["tag"] == "counting" else 0.3 for case in cases}
    kept = [
        case
        for case in cases
        if all(box[4] > least[case["metadata"]["tag"]] for boxes in case["detections"].values() for box in boxes)
    ]
    assert len(kept) > 100
    figures = scored(kept, "rules=geneval")
    assert figures["images"] == len(kept)
    assert [not reasons for reasons in figures["broken"]] == [case["correct"] for case in kept]
    tasks = {case["metadata"]["tag"] for case in kept}
    by_task = {tag: [case["correct"] for case in kept if case["metadata"]["tag"] == tag] for tag in tasks}
    means = {tag: sum(correct) / len(correct) for tag, correct in by_task.items()}
    assert figures["accuracy"] == pytest.approx(means | {"overall": sum(means.values()) / len(means)})


def test_geneval_drops_unsure_detections_and_tells_broken_rules(scored: Scored) -> None:
    metadata = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    boxes = {"dog": [[0, 0, 9, 9, 0.2], [0, 0, 9, 9, 0.8]]}
    row = {"metadata": metadata, "detections": boxes, "colors": {"dog": ["red", "blue"]}}
    figures = scored([row], "rules=geneval")
    assert figures["accuracy"] == {"colors": 0.0, "overall": 0.0}
    assert figures["broken"] == [["expected red dog>=1, found 0"]]


def test_t2i_compbenchs_rules(scored: Scored) -> None:
    left, right = [0, 0, 10, 10, 0.8], [100, 0, 110, 10, 0.6]
    rows = [
        {"locality": "on the left of", "first": left, "second": right},
        {"locality": "on the left of", "first": None, "second": right},
    ]
    assert scored(rows, "rules=t2i_spatial")["mean"] == pytest.approx((0.25 * 1.4 + 0.5) / 2)
    assert scored([{"expected": {"dog": 2, "cat": 3}, "counted": {"dog": 2, "cat": 1}}], "rules=t2i_numeracy") == {
        "rules": "t2i_numeracy", "images": 1, "unreadable": 0, "mean": 0.75,
    }  # fmt: skip
    figures = scored([{"p_yes": [0.5, 0.8]}, {"p_yes": [None, 1.0]}], "rules=t2i_attributes")
    assert figures["mean"] == pytest.approx(0.4)
    assert figures["unreadable"] == 1


def test_agreements_are_the_references(shared_eval: Path, scored: Scored) -> None:
    def cases(name: str) -> list[dict[str, Any]]:
        return json.loads((shared_eval / "oracles" / name).read_text())["cases"]

    case = cases("pickscore_acc.json")[0]
    rows = [
        {"label": label, "probabilities": pair} for label, pair in zip(case["labels_0"], case["probs"], strict=True)
    ]
    figures = scored(rows, "rules=pickscore", f"tie_threshold={case['threshold']}")
    assert figures == {"rules": "pickscore", "pairs": len(rows), "accuracy": pytest.approx(case["acc"], abs=1e-12)}
    rankings = cases("hpsv2_inversion.json")
    figures = scored([{"gold": each["gold"], "predicted": each["pred"]} for each in rankings], "rules=hpsv2")
    mean = sum(each["inversion_score"] for each in rankings) / len(rankings)
    assert figures["agreement"] == pytest.approx(mean, abs=1e-12)
    rows = [{"ranks": [1, 2, 3], "rewards": [3, 1, 2]}, {"ranks": [2, 1], "rewards": [0, 1]}]
    assert scored(rows, "rules=imagereward")["accuracy"] == 3 / 4


def test_tifas_released_sample(shared_eval: Path, scored: Scored) -> None:
    release = json.loads((shared_eval / "tifa" / "sample_evaluation_result.json").read_text())
    rows = [
        {
            "id": caption,
            **{key: row[key] for key in ("element_type", "question", "choices", "answer")},
            "given": row["free_form_vqa"],
        }
        for caption, rows in release["question_details"].items()
        for row in rows.values()
    ]
    figures = scored(rows, "rules=tifa", f"embedder={MINILM_DIR}")
    assert figures["average"] == release["tifa_average"]
    assert figures["by_caption"] == release["caption_scores"]


@pytest.mark.parametrize("scorer", ["official", "selma"])
def test_dsgs_released_answers(
    shared_eval: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], scorer: str
) -> None:
    annotations = shared_eval / "dsg" / "dsg-1k-anns.csv"
    words = [str(shared_eval / "dsg" / "mplug_dsg.csv"), "rules=dsg", f"annotations={annotations}", f"scorer={scorer}"]
    assert main(words) == 0
    figures = json.loads(capsys.readouterr().out)
    summary = json.loads((shared_eval / "dsg" / "dsg_reference_scores_mplug.json").read_text())["summary"]
    assert {f"mplug-large|{model}" for model in figures["models"]} == set(summary)
    for model, each in figures["models"].items():
        count, mean = summary[f"mplug-large|{model}"]["all"]
        assert each["items"] == count
        assert (each["mean"] == pytest.approx(mean, abs=1e-12)) == (scorer == "official")


@pytest.mark.parametrize(
    ("line", "overrides", "code", "message"),
    [
        ("{}", [], 2, "rules is required"),
        ("{}", ["rules=coco"], 2, "rules should be 'dsg', 'geneval'"),
        ("{}", ["rules=dsg"], 2, "needs annotations"),
        ("{}", ["rules=tifa"], 2, "needs embedder"),
        ("{}", ["rules=geneval"], 1, "rows.jsonl line 1: metadata: Field required; fix the file"),
        ("", ["rules=geneval"], 1, "must have at least one line"),
        ('{"label": 0.7, "probabilities": [1, 0]}', ["rules=pickscore"], 1, "line 1: label: "),
        ("no json", ["rules=hpsv2"], 1, "line 1: the whole: Invalid JSON"),
    ],
)
def test_what_is_wrong_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, overrides: list[str], code: int, message: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(line)
    assert main([str(tmp_path / "rows.jsonl"), *overrides]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_every_rule_is_documented() -> None:
    assert all(f"    {name} " in (score_files.__doc__ or "") for name in RULES)
