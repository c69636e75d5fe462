"""Questions written by a real language model in vLLM on Ray, which is held to the schema of each answer."""

from pathlib import Path
from typing import Any

import pytest

from selma_ray.cluster.config import ClusterConfig
from selma_ray.judging.suites import open_suite
from selma_ray.judging.writing.config import QuestionLLMConfig, WriterConfig
from selma_ray.judging.writing.engine import VllmWriter
from selma_ray.judging.writing.files import PromptToAsk, write_questions
from selma_ray.judging.writing.on_ray import write_missing
from selma_ray.judging.writing.rounds import Request
from selma_ray.judging.writing.written import WrittenQuestions
from selma_ray.storage import RunFolder

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("ray_cluster")]

LLM = QuestionLLMConfig(max_model_len=2048, max_tokens=200)
CONFIG = WriterConfig(max_examples=2, attempts=1, batch_size=2, llm=LLM)
PROMPTS = [PromptToAsk("a", "common", "two red cups on a table"), PromptToAsk("b", "common", "a blue dog, sketch")]


def test_questions_become_a_suite_and_a_pass_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """SmolLM2-135M writes poor questions; their form is what is tested."""
    written = WrittenQuestions(RunFolder(str(tmp_path)), CONFIG)
    told: list[Any] = []
    prompts = [*(prompt.prompt for prompt in PROMPTS), "a cat under an umbrella"]
    write_missing(prompts, CONFIG, written, ClusterConfig(), told.append)
    assert (told[-1].done, told[-1].total) == (3, 3)
    lines = written.lines()
    assert set(lines) == set(prompts)
    write_missing(prompts, CONFIG, written, ClusterConfig(), lambda *_: pytest.fail("all are written"))
    counts = written.counts(prompts)
    assert counts["written"] + counts["failed"] == 3
    assert counts["written"] > 0

    path = tmp_path / "questions.jsonl"
    result = write_questions(PROMPTS, CONFIG, path, lambda texts: [lines[text] for text in texts])
    assert result.prompts + result.failed == len(PROMPTS)
    for prompt in open_suite(str(path)) if result.prompts else []:
        assert all(each.question.strip() for each in prompt.questions)
        assert written.source().questions(prompt.prompt) == prompt.questions


def test_a_request_that_cannot_be_answered_has_its_own_error() -> None:
    requests = [
        Request("fits", "output format: id | tuple\n\ninput: a dog\noutput: ", 0.0, 1, "\ninput:"),
        Request("too long", "word " * 4000, 0.0, 1, "\ninput:"),
    ]
    replies = VllmWriter(LLM)(requests)
    assert replies.keys() == {"fits", "too long"}
    assert replies["fits"].error is None
    assert "questions.writer.llm.max_model_len=2048 are too few" in replies["too long"].error
