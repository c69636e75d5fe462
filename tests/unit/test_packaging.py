"""What a wheel of this project puts into site-packages."""

from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def files() -> set[str]:
    return {each.distribution_path for each in WheelBuilder(str(ROOT)).recurse_included_files()}


def test_the_wheel_claims_no_name_but_its_own(files: set[str]) -> None:
    assert {name.partition("/")[0] for name in files} == {"selma_ray"}


@pytest.mark.parametrize(
    "name",
    [
        "py.typed",
        "skills/coco.yaml",
        "serving/page/page.html",
        "evaluation/report.html.j2",
        "judging/writing/examples.jsonl",
        "miniature/weights/judge/model.safetensors",
    ],
)
def test_the_wheel_has_what_the_package_reads(files: set[str], name: str) -> None:
    assert f"selma_ray/{name}" in files
