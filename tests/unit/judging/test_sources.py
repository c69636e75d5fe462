import pickle
from pathlib import Path
from typing import Any

import pytest

from selma_ray.config import validate
from selma_ray.errors import ConfigError, NoQuestionsError
from selma_ray.judging.config import JudgeConfig, QuestionsConfig
from selma_ray.judging.judges.interface import Answer
from selma_ray.judging.questions import PromptWithQuestions, Question
from selma_ray.judging.scoring import ImageScorer, score_answers
from selma_ray.judging.sources import (
    WHOLE,
    GrammarQuestions,
    OrWhole,
    WholeQuestion,
    questions_of_suite,
    without_questions,
)
from selma_ray.judging.writing.config import WriterConfig
from selma_ray.judging.writing.written import WrittenQuestions
from selma_ray.storage import RunFolder

FOREIGN = "a zeppelin over Paris at dawn, oil on canvas"
QUESTION = Question(1, "whole", "is there a zeppelin?", (0,))
SUITE = questions_of_suite([PromptWithQuestions("a", "style", FOREIGN, (QUESTION,))], "mine.jsonl")


def test_each_source_answers_for_its_own_prompts() -> None:
    assert GrammarQuestions().questions("a red apple")[0].question == "Is there an apple?"
    assert SUITE.questions(FOREIGN) == (QUESTION,)
    (whole,) = WholeQuestion().questions(FOREIGN)
    assert (whole.category, whole.question) == (WHOLE, f'Does this figure show "{FOREIGN}"? Please answer yes or no.')


@pytest.mark.parametrize("source", [GrammarQuestions(), SUITE])
def test_a_prompt_without_questions_falls_back_to_the_whole_and_is_counted(source: Any) -> None:
    unknown = "the spirit of history"
    with pytest.raises(NoQuestionsError):
        source.questions(unknown)
    assert OrWhole(source).questions(unknown) == WholeQuestion().questions(unknown)
    assert without_questions(source, [unknown, unknown]).total() == 2
    assert without_questions(OrWhole(source), [unknown]).total() == 0
    assert pickle.loads(pickle.dumps(OrWhole(source))).questions(unknown) == WholeQuestion().questions(unknown)


def test_an_image_that_is_asked_about_the_whole_prompt_alone_scores_the_chance_of_yes() -> None:
    asked = WholeQuestion().questions(FOREIGN)
    assert score_answers("judge", asked, [Answer("no", 0.4)]).score == 0.4
    assert score_answers("judge", [QUESTION], [Answer("no", 0.4)]).score == 0.0


def test_images_are_scored_by_the_questions_of_their_source() -> None:
    class Judge:
        name = "scripted"

        def answer(self, images: Any, questions: Any, choices: Any = None) -> Any:
            return [[Answer("yes" if "zeppelin?" in each else "no", 0.9) for each in asked] for asked in questions]

    from PIL import Image

    image = Image.new("RGB", (8, 8))
    assert ImageScorer(Judge(), OrWhole(SUITE))([image, image], [FOREIGN, "else"]) == [1.0, 0.9]


def test_written_questions_are_kept_in_batches_and_counted(tmp_path: Path) -> None:
    folder, config = RunFolder(str(tmp_path)), WriterConfig()
    written = WrittenQuestions(folder, config)
    assert written.lines() == {}
    question = {"id": 1, "category": "whole", "question": "a dog?", "parents": [0], "choices": [], "answer": "yes"}
    written.add([{"prompt": "a dog", "repaired": {"parent dropped": 2}, "questions": [question]}])
    written.add([{"prompt": "a cat", "repaired": {}, "failure": "no answer could be read", "attempts": {}}])
    assert written.source().questions("a dog") == (Question(1, "whole", "a dog?", (0,)),)
    with pytest.raises(NoQuestionsError, match="the language model miniature has no questions about 'a cat'"):
        written.source().questions("a cat")
    assert written.counts(["a dog", "a cat"]) == {
        "generator": written.generator, "written": 1, "failed": 1, "failures": {"no answer could be read": 1},
        "repaired": {"parent dropped": 2},
    }  # fmt: skip
    assert WrittenQuestions(folder, config.model_copy(update={"seed": 1})).lines() == {}, "of another generator"


def test_a_judge_may_be_named_alone() -> None:
    from selma_ray.images.config import ImageChoiceConfig

    assert validate(ImageChoiceConfig, {"judge": "blip"}, "test").judge == JudgeConfig(name="blip")
    assert validate(ImageChoiceConfig, {"judge": {"name": "blip", "num_gpus": 1}}, "test").judge.num_gpus == 1


def test_a_suite_as_source_must_be_named() -> None:
    with pytest.raises(ConfigError, match=r"source suite needs questions\.suite"):
        validate(QuestionsConfig, {"source": "suite"}, "test")
