"""GenEval's and T2I-CompBench's rules against outputs of the unmodified references."""

import json
from pathlib import Path
from typing import Any

import pytest

from selma_ray.errors import JudgeError
from selma_ray.judging import geneval, t2i_compbench
from selma_ray.judging.geneval import Detection


def lines(path: Any) -> Any:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_relative_positions_are_the_references(shared_eval: Path) -> None:
    cases = lines(shared_eval / "oracles" / "geneval_relative_position.jsonl")
    assert len(cases) > 1000
    for case in cases:
        assert geneval.relative_position(case["a"], case["b"]) == set(case["relations"]), case
        assert geneval.iou(case["a"], case["b"]) == pytest.approx(case["iou"], abs=1e-12)


def test_verdicts_are_the_references(shared_eval: Path) -> None:
    cases = lines(shared_eval / "oracles" / "geneval_rules.jsonl")
    assert {case["metadata"]["tag"] for case in cases} == set(geneval.TASKS)
    for case in cases:
        found = {
            name: [
                Detection(tuple(box[:4]), box[4], colour)
                for box, colour in zip(boxes, case["colors"][name], strict=False)  # some name more colours
            ]
            for name, boxes in case["detections"].items()
        }
        verdict = geneval.judge(case["metadata"], found)
        assert (verdict.correct, len(verdict.reasons)) == (case["correct"], case["n_reasons"]), case


def test_what_counts_depends_on_the_task() -> None:
    found = [Detection((0, 0, 10, 10), 0.5), Detection((0, 0, 10, 10), 0.95), Detection((50, 50, 60, 60), 0.2)]
    assert [each.confidence for each in geneval.keep_detections(found, "colors")] == [0.95, 0.5]
    assert [each.confidence for each in geneval.keep_detections(found, "counting")] == [0.95]
    assert [each.confidence for each in geneval.keep_detections(found, "colors", max_overlap=0.9)] == [0.95]
    assert len(geneval.keep_detections([Detection((0, 0, 1, 1), 0.9)] * 20, "colors")) == 16


def test_overall_is_the_mean_of_the_tasks_not_of_the_images() -> None:
    figures = geneval.overall([("position", True), ("position", False), ("colors", True)])
    assert figures == {"position": 0.5, "colors": 1.0, "overall": 0.75}
    assert geneval.overall([]) == {}


def test_a_position_relative_to_a_later_clause_is_an_error() -> None:
    metadata = {"include": [{"class": "dog", "count": 1, "position": ["left of", 1]}]}
    with pytest.raises(JudgeError, match="earlier clause, got 1"):
        geneval.judge(metadata, {"dog": [Detection((0, 0, 1, 1), 0.9)]})


def test_2d_positions_are_the_references(shared_eval: Path) -> None:
    cases = lines(shared_eval / "oracles" / "t2icompbench_2d_position.jsonl")
    assert len(cases) > 1000
    for case in cases:
        score = t2i_compbench.position_score(case["locality"], case["box1"], case["box2"])
        assert score == pytest.approx(case["score"], abs=1e-12), case


def test_2d_spatial_adds_confidence_and_position_and_is_0_under_a_half() -> None:
    left, right = t2i_compbench.Found((0, 0, 10, 10), 0.8), t2i_compbench.Found((100, 0, 110, 10), 0.6)
    assert t2i_compbench.spatial_2d("on the left of", left, right) == pytest.approx(0.25 * 1.4 + 0.5)
    assert t2i_compbench.spatial_2d("on the right of", left, right) == 0.0
    assert t2i_compbench.spatial_2d("near", left, None) == 0.0
    with pytest.raises(JudgeError, match="must have an area"):
        t2i_compbench.position_score("near", (1, 1, 1, 1), (2, 2, 2, 2))


def test_numeracy_gives_half_for_presence_and_half_for_the_count() -> None:
    assert t2i_compbench.numeracy({"dog": 2, "cat": 3}, {"dog": 2, "cat": 1}) == 0.75
    assert t2i_compbench.numeracy({"dog": 2}, {}) == 0.0
    with pytest.raises(JudgeError, match="at least one expected object"):
        t2i_compbench.numeracy({}, {})


def test_attributes_multiply_and_are_null_where_one_cannot_be_read() -> None:
    assert t2i_compbench.attribute_binding([0.5, 0.8]) == pytest.approx(0.4)
    assert t2i_compbench.attribute_binding([0.5, None]) is None
    with pytest.raises(JudgeError, match="at least one noun phrase"):
        t2i_compbench.attribute_binding([])
