"""What a wheel of this project puts into site-packages."""

import tomllib
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
        "recipes/demo.yaml",
        "skills/coco.yaml",
        "serving/page/page.html",
        "evaluation/report.html.j2",
        "judging/writing/examples.jsonl",
        "miniature/weights/judge/model.safetensors",
    ],
)
def test_the_wheel_has_what_the_package_reads(files: set[str], name: str) -> None:
    assert f"selma_ray/{name}" in files


@pytest.mark.parametrize(("lock", "extras"), [("cpu.txt", ["cpu", "dev", "docs"]), ("gpu.txt", ["gpu"])])
def test_the_locks_hold_the_versions_that_are_chosen(lock: str, extras: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chosen = [*project["dependencies"], *(each for extra in extras for each in project["optional-dependencies"][extra])]
    locked = {
        canonicalize_name(Requirement(line).name): Requirement(line)
        for line in (ROOT / "requirements" / lock).read_text().splitlines()
        if line and not line.startswith("#")
    }
    for requirement in map(Requirement, chosen):
        pinned = locked[canonicalize_name(requirement.name)]
        (version,) = (each.version for each in pinned.specifier)
        assert version.partition("+")[0] in requirement.specifier, f"{requirement} is {version}: run `make lock`"
