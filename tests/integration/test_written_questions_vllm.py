"""Questions written by a real language model in vLLM through Ray Data, which is held to the schema of each answer."""

import pytest

from selma_ray.cluster.config import ClusterConfig
from selma_ray.judging.questions import load_suite
from selma_ray.judging.writing.config import QuestionLLMConfig, QuestionsConfig
from selma_ray.judging.writing.engine import vllm_replies
from selma_ray.judging.writing.files import PromptToAsk, write_questions
from selma_ray.judging.writing.rounds import Request

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("ray_cluster")]  # an engine starts for every round of calls

CONFIG = QuestionsConfig(
    max_examples=2, attempts=1, batch_size=8, llm=QuestionLLMConfig(max_model_len=2048, max_tokens=200)
)
PROMPTS = [PromptToAsk("a", "common", "two red cups on a table"), PromptToAsk("b", "common", "a blue dog, sketch")]


def test_questions_become_a_suite_and_ids_match_by_schema(tmp_path):
    """SmolLM2-135M writes poor questions; their form is what is tested."""
    path = tmp_path / "questions.jsonl"
    written = write_questions(PROMPTS, CONFIG, path, vllm_replies(CONFIG, ClusterConfig()))
    assert written.prompts + written.failed == len(PROMPTS)
    assert written.prompts > 0
    for prompt in load_suite(str(path)):
        assert prompt.questions
        assert all(each.question.strip() for each in prompt.questions)
    assert "question call with other ids" not in written.repaired or written.failed


def test_a_request_that_cannot_be_answered_has_its_own_error():
    requests = [
        Request("fits", "output format: id | tuple\n\ninput: a dog\noutput: ", 0.0, 1, "\ninput:"),
        Request("too long", "word " * 4000, 0.0, 1, "\ninput:"),
    ]
    replies = vllm_replies(CONFIG, ClusterConfig())(requests)
    assert replies.keys() == {"fits", "too long"}
    assert replies["fits"].error is None
    assert replies["too long"].error
    assert "\n" not in replies["too long"].error
