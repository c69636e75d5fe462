"""Requests for questions: the reference's text format letter by letter, and JSON with its schema."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from selma_ray.errors import JudgeError
from selma_ray.judging.writing.config import WriterConfig
from selma_ray.judging.writing.examples import load_dsg_examples, load_tifa_examples
from selma_ray.judging.writing.parsing import parse_json, parse_lines, parse_tifa_json, parse_tifa_text
from selma_ray.judging.writing.requests import (
    DSG_CALLS,
    dsg_json,
    dsg_schema,
    dsg_text,
    tifa_json,
    tifa_schema,
    tifa_text,
)


@pytest.fixture(scope="module")
def oracle(shared_eval: Path) -> Any:
    return json.loads((shared_eval / "oracles" / "dsg_prompts.json").read_text())["cases"]


@pytest.fixture(scope="module")
def examples_file(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The reference's 23 in-context examples, taken out of its own prompts."""
    case = oracle["A blue rabbit and a red plane."]
    columns = {}
    for call in DSG_CALLS:
        blocks = case[call]["prompt"].split("\n\ninput: ")[1:-1]
        columns[call] = [block.partition("\noutput: ")[::2] for block in blocks]
    path = tmp_path_factory.mktemp("examples") / "examples.jsonl"
    with path.open("w") as stream:
        for tuples, questions, dependencies in zip(*columns.values(), strict=True):
            texts = [
                [line.partition("|")[2].strip() for line in output.split("\n")]
                for _, output in (tuples, questions, dependencies)
            ]
            prompt = questions[0].partition("\n")[0]  # with the white space at its end
            row = {"prompt": prompt, "tuples": texts[0], "questions": texts[1], "dependencies": texts[2]}
            stream.write(json.dumps(row) + "\n")
    return path


def test_text_requests_are_the_references(oracle: Any, examples_file: Any) -> None:
    """Every prompt of the oracle, by its hash."""
    examples = load_dsg_examples(WriterConfig(examples=str(examples_file)))
    assert len(examples) == 23
    for prompt, calls in oracle.items():
        for call, expected in calls.items():
            listed = (
                expected["prompt"].rpartition("\n\ninput: ")[2].removesuffix("\noutput: ").removeprefix(f"{prompt}\n")
            )
            tuples = {} if call == "tuple" else parse_lines(listed).texts
            text = dsg_text(call, prompt, tuples, examples)
            assert len(text) == expected["chars"]
            assert hashlib.sha256(text.encode()).hexdigest() == expected["sha256"], (prompt, call)


def test_examples_are_read_from_dsgs_own_annotations(shared_eval: Path) -> None:
    path = shared_eval / "dsg" / "dsg-1k-anns.csv"
    examples = load_dsg_examples(WriterConfig(examples=str(path), max_examples=3))
    assert examples[0].prompt == "A rubix cube with ten squares of purple"
    assert examples[0].tuples[1] == "attribute - color (rubix cube, purple)"
    assert examples[0].dependencies == ("0", "1", "1")


def test_requests_of_one_call_share_all_but_their_end() -> None:
    """What prefix caching lives on."""
    for compose, examples in ((dsg_text, load_dsg_examples), (dsg_json, load_dsg_examples)):
        shown = examples(WriterConfig())
        first, second = (compose("tuple", prompt, {}, shown) for prompt in ("a red cup", "two dogs"))
        shared = first[: -len("a red cup\noutput: ")]
        assert second.startswith(shared)
        assert len(shared) > 0.9 * len(first)


def test_our_examples_answer_in_the_formats_they_teach() -> None:
    for example in load_dsg_examples(WriterConfig()):
        text = dsg_text("tuple", "x", {}, [example])
        lines = parse_lines(text.split("\noutput: ")[1].partition("\n\ninput")[0])
        assert tuple(lines.texts.values()) == example.tuples
        for call in DSG_CALLS:
            answer = (
                dsg_json(call, "x", {1: "entity - whole (x)"}, [example])
                .split("\noutput: ")[1]
                .partition("\n\ninput")[0]
            )
            jsonschema.validate(json.loads(answer), dsg_schema(call, range(1, len(example.tuples) + 1)))
            assert parse_json(answer).texts.keys() == dict(enumerate(example.tuples, start=1)).keys()
    for tifa_example in load_tifa_examples(WriterConfig(style="tifa")):
        jsonschema.validate(list(tifa_example.questions), tifa_schema())
        text = tifa_text("x", [tifa_example]).partition("are below:")[2].rpartition("\n\nDescription")[0]
        in_text, in_json = parse_tifa_text(text), parse_tifa_json(json.dumps(tifa_example.questions))
        assert in_text == in_json
        assert len(in_text[0]) == len(tifa_example.questions)
        assert not in_text[1]
        assert json.dumps(tifa_example.questions) in tifa_json("x", [tifa_example])


def test_schemas_allow_exactly_the_ids_of_the_tuples() -> None:
    schema = dsg_schema("question", [1, 3])
    jsonschema.validate({"1": "Is it?", "3": "Is it?"}, schema)
    for wrong in ({"1": "Is it?"}, {"1": "a", "2": "b", "3": "c"}, {"1": "", "3": "b"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"1": [2], "3": []}, dsg_schema("dependency", [1, 3]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "at least one example"),
        ("{", "cannot be read as JSON Lines"),
        ('{"prompt": "x"}', "lacks 'tuples'"),
        (
            '{"prompt": "x", "tuples": ["a"], "questions": [], "dependencies": ["0"]}',
            "as many questions and dependencies",
        ),
    ],
)
def test_bad_example_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(content)
    with pytest.raises(JudgeError, match=message) as caught:
        load_dsg_examples(WriterConfig(examples=str(path)))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(JudgeError, match="cannot be read"):
        load_tifa_examples(WriterConfig(examples=str(tmp_path / "absent.jsonl")))
