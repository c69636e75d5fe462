"""Rounds of calls with a scripted language model, and the files that come out."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selma_ray.errors import JudgeError
from selma_ray.judging.suites import open_suite
from selma_ray.judging.writing.config import WriterConfig
from selma_ray.judging.writing.files import PromptToAsk, draft_lines, generator_name, read_prompts, write_questions
from selma_ray.judging.writing.rounds import Reply, draft_questions

TUPLES = ["entity - whole (cup)", "attribute - color (cup, red)", "global - style (sketch)"]
GOOD = {
    "text": {
        "tuple": "\n".join(f"{number} | {text}" for number, text in enumerate(TUPLES, start=1)),
        "question": "1 | Is there a cup?\n2 | Is it red?\n3 | Is it a sketch?",
        "dependency": "1 | 0\n2 | 1\n3 | 0",
    },
    "json": {
        "tuple": json.dumps(TUPLES),
        "question": json.dumps({"1": "Is there a cup?", "2": "Is it red?", "3": "Is it a sketch?"}),
        "dependency": json.dumps({"1": [], "2": [1], "3": []}),
    },
}
TIFA = {
    "json": json.dumps(
        [{"element": "cup", "type": "object", "question": "is there?", "choices": ["yes", "no"], "answer": "yes"}]
    ),
    "text": "About cup (object):\nQ: is there?\nChoices: yes, no\nA: yes",
}


class Script:
    """A language model that answers by call and attempt, and remembers what it was asked."""

    def __init__(self, config: Any, **answers: Any) -> None:
        self._answers = {**GOOD[config.format], "tifa": TIFA[config.format], **answers}
        self.rounds: list[Any] = []

    def __call__(self, requests: Any) -> Any:
        self.rounds.append(list(requests))
        replies = {}
        for request in requests:
            _, call, attempt = request.key.split(":")
            answer = self._answers[call]
            answer = answer[min(int(attempt), len(answer) - 1)] if isinstance(answer, list) else answer
            replies[request.key] = answer if isinstance(answer, Reply) else Reply(answer)
        return replies


@pytest.fixture(params=["json", "text"])
def config(request: pytest.FixtureRequest) -> WriterConfig:
    return WriterConfig(format=request.param)


def test_three_calls_in_two_rounds(config: WriterConfig) -> None:
    script = Script(config)
    first, second = draft_questions(["a red cup, sketch", "another"], config, script)
    assert [(each.id, each.category, each.question, each.parents) for each in first.questions] == [
        (1, "whole", "Is there a cup?", (0,)), (2, "color", "Is it red?", (1,)), (3, "style", "Is it a sketch?", (0,)),
    ]  # fmt: skip
    assert first.questions == second.questions
    assert (first.failure, dict(first.repaired)) == (None, {})
    assert [[request.key for request in requests] for requests in script.rounds] == [
        ["0:tuple:0", "1:tuple:0"], ["0:question:0", "0:dependency:0", "1:question:0", "1:dependency:0"],
    ]  # fmt: skip
    assert all(request.temperature == 0 for requests in script.rounds for request in requests)
    assert all((request.schema is not None) == (config.format == "json") for request in script.rounds[1])


def test_ids_that_do_not_match_are_asked_again_with_another_seed(config: WriterConfig) -> None:
    script = Script(config, question=[GOOD[config.format]["dependency"][:4], GOOD[config.format]["question"]])
    (draft,) = draft_questions(["a"], config, script)
    assert len(draft.questions) == 3
    assert [request.key for request in script.rounds[2]] == ["0:question:1"]
    assert script.rounds[2][0].temperature > 0
    assert script.rounds[2][0].seed != script.rounds[1][0].seed
    assert draft.repaired["question call with other ids"] == 1


def test_dependencies_that_never_fit_are_done_without(config: WriterConfig) -> None:
    script = Script(config, dependency='{"1": [], "9": [1]}' if config.format == "json" else "1 | 0\n9 | 1")
    (draft,) = draft_questions(["a"], config, script)
    assert [each.parents for each in draft.questions] == [(0,)] * 3
    assert draft.repaired == {"dependency call with other ids": 2, "no usable dependencies": 1}
    assert draft.failure is None


def test_tuples_without_a_question_are_left_out_and_counted(config: WriterConfig) -> None:
    script = Script(
        config, question='{"1": "Is there?", "2": "Red?"}' if config.format == "json" else "1 | Is there?\n2 | Red?"
    )
    (draft,) = draft_questions(["a"], config, script)
    assert [each.id for each in draft.questions] == [1, 2]
    assert draft.questions[1].parents == (1,)
    assert draft.repaired["tuple without a question"] == 1


def test_failures_are_named_and_spare_the_others(config: WriterConfig) -> None:
    class Partly(Script):
        def __call__(self, requests: Any) -> Any:
            replies = super().__call__(requests)
            return {
                key: Reply("", "prompt too long") if key.startswith("1:") else reply for key, reply in replies.items()
            }

    drafts = draft_questions(["a", "b", " "], config, Partly(config))
    assert [draft.failure for draft in drafts] == [None, "prompt too long", "the prompt is empty"]
    assert drafts[1].attempts["tuple"] == config.attempts
    (lost,) = draft_questions(["a"], config, lambda requests: {})
    assert lost.failure == "no reply came"
    (vague,) = draft_questions(["a"], config, Script(config, tuple="I do not know."))
    assert vague.failure == "no answer could be read"
    assert sum(vague.repaired.values()) == 2


def test_tifa_in_one_call(config: WriterConfig) -> None:
    config = config.model_copy(update={"style": "tifa"})
    (draft,) = draft_questions(["a cup"], config, Script(config, tifa=["nothing", TIFA[config.format]]))
    assert [(each.question, each.choices, each.answer) for each in draft.questions] == [
        ("is there?", ("yes", "no"), "yes")
    ]
    assert draft.attempts["tifa"] == 2


@given(st.lists(st.text(alphabet='0123|.,:{}[]"\nabc -', max_size=40), min_size=3, max_size=3), st.booleans())
@settings(max_examples=100, deadline=None)
def test_no_prompt_is_ever_lost(answers: Any, is_json: bool) -> None:
    config = WriterConfig(format="json" if is_json else "text")
    script = Script(config, tuple=answers[0], question=answers[1], dependency=answers[2])
    (draft,) = draft_questions(["a"], config, script)
    assert bool(draft.questions) != bool(draft.failure)
    ids = {each.id for each in draft.questions}
    assert all(set(each.parents) <= ids | {0} for each in draft.questions)


PROMPTS = [PromptToAsk("a", "common", "a red cup"), PromptToAsk("b", "common", "two cups")]


def write(prompts: Any, config: Any, path: Any, ask: Any, answerer: Any = None) -> Any:
    """Write a file of questions with a scripted language model."""
    return write_questions(prompts, config, path, lambda texts: draft_lines(texts, config, ask, answerer))


def test_a_written_file_is_a_suite_and_is_not_written_twice(config: WriterConfig, tmp_path: Path) -> None:
    path, script = tmp_path / "questions.jsonl", Script(config)
    written = write(PROMPTS, config, path, script)
    assert (written.prompts, written.reused, written.failed) == (2, 0, 0)
    suite = open_suite(str(path))
    assert [(prompt.id, prompt.prompt, len(prompt.questions)) for prompt in suite] == [
        ("a", "a red cup", 3),
        ("b", "two cups", 3),
    ]
    content = path.read_text()
    script.rounds.clear()
    again = write(PROMPTS, config, path, script)
    assert (again.reused, script.rounds, path.read_text()) == (2, [], content)

    path.write_text(content.replace("Is it red?", "Is the cup red?"))  # a person corrects the file
    longer = [PROMPTS[0], PromptToAsk("b", "common", "three cups"), PromptToAsk("c", "common", "a dog")]
    assert write(longer, config, path, script).reused == 1
    assert {request.key for request in script.rounds[0]} == {"0:tuple:0", "1:tuple:0"}
    by_id = {prompt.id: prompt for prompt in open_suite(str(path))}
    assert by_id["a"].questions[1].question == "Is the cup red?"
    assert by_id["b"].prompt == "three cups"


@pytest.mark.parametrize("awkward", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\ufeff", '"', "\\", "\n", "🐈"])
def test_a_file_about_any_prompt_is_read_again(config: WriterConfig, tmp_path: Path, awkward: str) -> None:
    prompts = [PromptToAsk("a", "s", f"a{awkward}cup"), PromptToAsk("b", "s", f"{awkward} b cup")]
    path = tmp_path / "questions.jsonl"
    assert write(prompts, config, path, Script(config)).prompts == 2
    again = write(prompts, config, path, Script(config))
    assert (again.prompts, again.reused, again.failed) == (2, 2, 0)
    assert [each.prompt for each in open_suite(str(path))] == [each.prompt for each in prompts]


def test_tifa_files_keep_choices_and_answers(tmp_path: Path) -> None:
    config = WriterConfig(style="tifa")
    write(PROMPTS[:1], config, tmp_path / "questions.jsonl", Script(config))
    (prompt,) = open_suite(str(tmp_path / "questions.jsonl"))
    assert (prompt.questions[0].choices, prompt.questions[0].answer) == (("yes", "no"), "yes")


class Reader:
    """Answers from a caption: yes if the question's last word is in it."""

    def choose(self, question: Any, caption: Any, choices: Any) -> Any:
        return "yes" if question.strip("?").split()[-1] in caption else "no"

    def answer(self, question: Any, caption: Any) -> Any:
        return caption


def test_tifa_questions_that_the_prompt_does_not_answer_are_dropped_and_counted(tmp_path: Path) -> None:
    config = WriterConfig(style="tifa", caption_model="some/model")
    assert generator_name(config) != generator_name(WriterConfig(style="tifa"))
    asked = [
        {
            "element": "cup",
            "type": "object",
            "question": f"is there a {word}?",
            "choices": ["yes", "no"],
            "answer": "yes",
        }
        for word in ("cup", "moon")
    ]
    path = tmp_path / "questions.jsonl"
    prompts = [PROMPTS[0], PromptToAsk("d", "common", "a dog")]
    written = write(prompts, config, path, Script(config, tifa=json.dumps(asked)), Reader())
    (prompt,) = open_suite(str(path))
    assert [each.question for each in prompt.questions] == ["is there a cup?"]
    assert (written.failed, written.repaired) == (1, {"question that the prompt does not answer": 3})
    assert "answers none of its questions" in path.with_suffix(".failed.jsonl").read_text()


def test_failures_stand_beside_the_file_and_are_tried_again(config: WriterConfig, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    written = write([*PROMPTS, PromptToAsk("c", "common", "")], config, path, Script(config))
    assert (written.prompts, written.failed) == (2, 1)
    (failed,) = map(json.loads, (tmp_path / "questions.failed.jsonl").read_text().splitlines())
    assert (failed["id"], failed["failure"]) == ("c", "the prompt is empty")
    corrected = write([*PROMPTS, PromptToAsk("c", "common", "a dog")], config, path, Script(config))
    assert (corrected.prompts, corrected.reused, corrected.failed) == (3, 2, 0)
    assert (tmp_path / "questions.failed.jsonl").read_text() == ""


def test_files_of_another_generator_and_of_another_kind_are_refused(config: WriterConfig, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    write(PROMPTS, config, path, Script(config))
    other = config.model_copy(update={"seed": 7})
    assert generator_name(other) != generator_name(config)
    with pytest.raises(JudgeError, match=re.escape(f"was written by {generator_name(config)}, not by")):
        write(PROMPTS, other, path, Script(config))
    path.write_text("{}")
    with pytest.raises(JudgeError, match="no file of written questions"):
        write(PROMPTS, config, path, Script(config))
    with pytest.raises(JudgeError, match="different ids, 1 are used again, first 'a'"):
        write([PROMPTS[0], PROMPTS[0]], config, tmp_path / "new.jsonl", Script(config))


def test_prompts_are_read_from_text_and_from_lines(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a red cup\n\n two cups \n")
    read = read_prompts(tmp_path / "mine.txt")
    assert [(each.prompt, each.skill) for each in read] == [("a red cup", "mine"), ("two cups", "mine")]
    (tmp_path / "mine.jsonl").write_text('{"prompt": "x", "id": 3, "skill": "s"}\n{"prompt": "y"}\n')
    assert read_prompts(tmp_path / "mine.jsonl")[0] == PromptToAsk("3", "s", "x")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"text": "y"}\n')
    with pytest.raises(JudgeError, match="line 2 must be a JSON object with a prompt"):
        read_prompts(tmp_path / "bad.jsonl")
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(JudgeError, match="at least one prompt"):
        read_prompts(tmp_path / "none.txt")


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_bytes("\ufeffa cat\r\n\r\na dog\u2028of two lines\n".encode())
    assert [each.prompt for each in read_prompts(tmp_path / "mine.txt")] == ["a cat", "a dog\u2028of two lines"]
    (tmp_path / "mine.jsonl").write_bytes('\ufeff{"prompt": "a cat", "id": null, "skill": null}\n'.encode())
    (prompt,) = read_prompts(tmp_path / "mine.jsonl")
    assert (prompt.prompt, prompt.skill) == ("a cat", "mine")
    assert prompt.id not in ("None", "")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"prompt": null}', "prompt must be a text, got null"),
        ('{"prompt": 5}', "prompt must be a text, got 5"),
        ('{"prompt": " - "}', 'prompt must be a text, got " - "'),
        ('{"prompt": ["a"]}', r'prompt must be a text, got \["a"\]'),
        ('{"prompt": "a", "id": 1.5}', "id must be a text, got 1.5"),
        ('{"prompt": "a", "id": true}', "id must be a text, got true"),
        ('{"prompt": "a", "skill": 3}', "skill must be a text, got 3"),
        ('{"prompt": "a", "weight": NaN}', "NaN is no JSON"),
        (r'{"prompt": "\ud83d"}', "half of a surrogate pair"),
        ("null", "must be a JSON object with a prompt"),
        ('["a"]', "must be a JSON object with a prompt"),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_line(tmp_path: Path, line: str, fault: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a cat"}\n\n' + line + "\n")
    with pytest.raises(JudgeError, match=f"mine.jsonl line 3.*{fault}") as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)
