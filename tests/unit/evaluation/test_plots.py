import pytest

from selma_ray.evaluation.plots import dev_curve, reliability


def test_a_reliability_diagram_is_placed_in_its_square() -> None:
    bins = [
        {"p_yes": 0.0, "share": 0.0, "interval": [0.0, 0.1], "count": 100},
        {"p_yes": 0.5, "share": 0.25, "interval": [0.2, 0.4], "count": 25},
    ]
    first, second = reliability(bins, side=200)
    assert (first.x, first.y, first.y_high) == (0, 200, 180)
    assert (second.x, second.y, second.y_low, second.y_high) == (100, 150, 160, 120)
    assert first.radius - 2.5 == pytest.approx(2 * (second.radius - 2.5)), "areas go with counts"
    assert reliability([], side=200) == []


def test_dev_scores_lie_on_the_steps_of_the_loss_curve() -> None:
    points = [{"step": 100, "dsg": 0.8}, {"step": 50, "dsg": 0.6}]
    assert dev_curve(points, width=240, height=90, last_step=200, low=0.6, high=0.8) == [(60.0, 90.0), (120.0, 0.0)]
