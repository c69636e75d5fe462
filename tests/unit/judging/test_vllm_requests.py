"""What the vLLM judge asks an engine and how it reads what comes back; the engine itself is in tests/integration."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from selma_ray.judging.judges.vllm_vlm import VllmJudge
from selma_ray.judging.judges.words import AnswerTokens

WORDS = ["<unk>", "yes", "no", "Yes", "No", "red", "two", "2", "cup"]
IDS = {word: number for number, word in enumerate(WORDS)}


class Engine:
    """Records conversations and sampling; answers with given chances of words."""

    def __init__(self, **chances: Any) -> None:
        self.chances = chances
        self.conversations: list[Any] = []
        self.sampling: list[Any] = []

    def chat(self, conversations: Any, sampling: Any, use_tqdm: Any, chat_template_kwargs: Any) -> Any:
        assert chat_template_kwargs["enable_thinking"] is False
        self.conversations, self.sampling = conversations, sampling
        return [self._output(each) for each in sampling]

    def _output(self, sampling: Any) -> SimpleNamespace:
        chances = {IDS[word]: chance for word, chance in self.chances.items()}
        logged = {
            number: SimpleNamespace(logprob=math.log(chances.get(number, 1e-9)))
            for number in sampling.logprob_token_ids
        }
        return SimpleNamespace(
            outputs=[SimpleNamespace(text=max(self.chances, key=self.chances.get), logprobs=[logged])]
        )


def judge_with(engine: Any) -> Any:
    inner = Tokenizer(WordLevel(IDS, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    judge = VllmJudge.__new__(VllmJudge)  # without starting an engine
    judge._llm, judge._params = engine, SimpleNamespace
    judge._tokens = AnswerTokens(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>"))
    return judge


def test_the_image_stands_before_the_question_and_its_questions_follow_one_another() -> None:
    engine = Engine(yes=0.5, no=0.2)
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    judge_with(engine).answer(images, [["a?", "b?"], ["c?"]])
    parts = [conversation[0]["content"] for conversation in engine.conversations]
    assert [[part["type"] for part in content] for content in parts] == [["image_pil", "text"]] * 3
    assert [content[0]["image_pil"].getpixel((0, 0)) for content in parts] == [(255, 0, 0), (255, 0, 0), (0, 0, 255)]
    assert [content[1]["text"] for content in parts] == [f"{each}? Please answer yes or no." for each in "abc"]
    assert all(each.max_tokens == 1 and each.temperature == 0 for each in engine.sampling)
    assert set(engine.sampling[0].logprob_token_ids) == {IDS[word] for word in ("yes", "no", "Yes", "No")}


def test_probabilities_add_up_over_the_ways_to_write_a_word() -> None:
    (answer,) = judge_with(Engine(yes=0.1, Yes=0.5, no=0.1, No=0.1)).answer([Image.new("RGB", (8, 8))], [["a?"]])[0]
    assert answer.probabilities == pytest.approx({"yes": 0.6, "no": 0.2})
    assert answer.p_yes == pytest.approx(0.75)
    assert answer.text == "yes"


def test_a_judge_that_says_something_else_is_null_with_its_words() -> None:
    (answer,) = judge_with(Engine(cup=0.99, yes=1e-4)).answer([Image.new("RGB", (8, 8))], [["a?"]])[0]
    assert (answer.text, answer.reason) == (None, "the judge answered 'cup', neither yes nor no")


def test_choices_have_the_probabilities_of_their_own_tokens() -> None:
    engine = Engine(two=0.3, **{"2": 0.2}, red=0.1)
    (answer,) = judge_with(engine).answer([Image.new("RGB", (8, 8))], [["how many?"]], [[("2", "red", "a red cup")]])[0]
    assert answer.probabilities == pytest.approx({"2": 0.5, "red": 0.1})  # a choice of several tokens has none
    assert answer.text == "two"
    assert engine.sampling[0].max_tokens > 1
    assert judge_with(engine).answer([], []) == []
