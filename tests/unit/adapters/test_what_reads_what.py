"""The table of docs/adapters.md names a test in each of its cells, or says that another cell's reader is the same."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "adapters.md"
_TEST = re.compile(r'\]\(\.\./(?P<path>tests/[\w/]+\.py) "(?P<name>test_\w+)"\)')
_UNTESTED = {"by the same reader", "left out, with a warning"}

ROWS = [
    [cell.strip() for cell in line.strip("|\n").split(" | ")]
    for line in PAGE.read_text().splitlines()
    if line.startswith("| ") and not line.startswith(("| file or folder", "| what is written"))
]
NAMED = sorted({(found["path"], found["name"]) for found in _TEST.finditer(PAGE.read_text())})


def test_the_page_has_both_tables() -> None:
    assert len(ROWS) >= 14
    assert all(len(row) == 3 for row in ROWS)


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_a_named_test_is_there(path: str, name: str) -> None:
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("`")[:40])
def test_every_cell_names_its_test(row: list[str]) -> None:
    reads_in = "served" if "by the same reader" in row or "warning" in row[2] or "serving" in row[2] else "out"
    cells = row[1:] if reads_in == "served" else row[-1:]
    for cell in cells:
        assert _TEST.search(cell) or cell in _UNTESTED, cell
