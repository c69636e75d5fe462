"""What is counted, and the dashboard that shows it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from selma_ray.cluster import metrics

ROOT = Path(__file__).parents[3]
DASHBOARD = json.loads((ROOT / "docs" / "grafana" / "selma_ray.json").read_text())


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_the_dashboard_shows_every_counter_and_no_other() -> None:
    shown = set(re.findall(r"ray_(selma_\w+)_total", " ".join(expressions())))
    assert shown == set(metrics.COUNTERS)


def test_the_dashboard_groups_by_tags_that_there_are() -> None:
    for expression in expressions():
        name = re.search(r"ray_(selma_\w+)_total", expression)
        if name:
            (tag,) = re.findall(r"sum by \((\w+)\)", expression)
            assert tag in ("run", "stage", *metrics.COUNTERS[name[1]][1])


def test_panels_have_places_of_their_own_and_the_parts_that_grafana_reads() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)
    assert {"title", "uid", "schemaVersion", "templating", "time"} <= DASHBOARD.keys()
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD["panels"]))) <= variables


def test_nothing_is_counted_outside_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics.count("selma_images_rendered", 1, "run", "generate")
    assert metrics._made == {}


def test_an_amount_goes_to_its_run_and_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    import ray.util.metrics

    added: list[Any] = []

    class Counter:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name, self.tag_keys = name, tag_keys

        def inc(self, amount: float, tags: dict[str, str]) -> None:
            assert set(tags) == set(self.tag_keys)
            added.append((self.name, amount, tags))

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray.util.metrics, "Counter", Counter)
    monkeypatch.setattr(metrics, "_made", {})
    metrics.count("selma_training_steps", 2, "runs/a", "train", expert="counting")
    metrics.count("selma_training_steps", 0, "runs/a", "train", expert="counting")
    assert added == [("selma_training_steps", 2, {"run": "runs/a", "stage": "train", "expert": "counting"})]
