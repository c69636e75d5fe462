"""Files of lines as people have them."""

import codecs
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selma_ray.json_lines import json_lines, numbered_lines, parse_json

AWKWARD = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from('\n\r\x0b\x0c\x1c\x85\u2028\u2029\ufeff\x00"\\')
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | AWKWARD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(AWKWARD, inner, max_size=3),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(VALUES, max_size=4), st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_what_is_written_is_read_back(tmp_path: Path, values: list[Any], has_mark: bool, end: str) -> None:
    path = tmp_path / "lines.jsonl"
    content = json_lines(values)
    path.write_bytes((codecs.BOM_UTF8 if has_mark else b"") + content.replace(b"\n", end.encode()))
    assert [parse_json(line) for _, line in numbered_lines(path)] == values
    assert len(content.decode().splitlines()) == len(values)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(VALUES, max_size=4))
def test_raw_separators_of_other_programs_do_not_break_a_line(tmp_path: Path, values: list[Any]) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(
        "".join(json.dumps(each, ensure_ascii=False) + "\n\n" for each in values), encoding="utf-8", newline=""
    )
    assert [parse_json(line) for _, line in numbered_lines(path)] == values


def test_lines_have_their_own_numbers(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes(codecs.BOM_UTF8 + "one\n\n  two\u2028and\x85more \r\n".encode() + codecs.BOM_UTF8 + b"three")
    assert numbered_lines(path) == [(1, "one"), (3, "two\u2028and\x85more"), (4, "three")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("NaN", "NaN is no JSON"),
        ('{"a": [Infinity]}', "Infinity is no JSON"),
        ("-Infinity", "-Infinity is no JSON"),
        ("1e999", "1e999 is no finite number"),
        (r'"\ud83d"', r"half of a surrogate pair, \\ud83d, stands alone"),
        (r'{"a\udc00": 1}', "half of a surrogate pair"),
        ("{", "Expecting property name"),
    ],
)
def test_what_is_no_json_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_whole_surrogate_pairs_are_a_character() -> None:
    assert parse_json(r'"\ud83d\ude00"') == "😀"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud83d"])
def test_what_could_not_be_read_again_is_not_written(value: Any) -> None:
    with pytest.raises(ValueError):
        json_lines([value])
