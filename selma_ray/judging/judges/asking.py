"""Asking a judge so that one bad image, or a batch too large, costs no other image its answers."""

import logging
from collections.abc import Sequence
from functools import partial

from PIL import Image

from selma_ray.errors import named_line
from selma_ray.judging.judges.interface import YES_OR_NO, Answer, Choices, Judge
from selma_ray.models.batches import spare_others

__all__ = ["as_yes_or_no", "ask_images", "image_fault"]

logger = logging.getLogger(__name__)

_REASON_CHARS = 200


def ask_images(
    judge: Judge,
    images: Sequence[Image.Image | None],
    questions: Sequence[Sequence[str]],
    choices: Choices | None = None,
) -> list[list[Answer]]:
    """Return the answers about each image; an image that is None or unreadable is null and spares the others.

    A batch that fails is halved until only the images that make it fail are null.
    """
    choices = [[()] * len(asked) for asked in questions] if choices is None else choices
    faults = [image_fault(image) for image in images]
    sound = [index for index, fault in enumerate(faults) if fault is None]
    rows = [(images[index], questions[index], choices[index]) for index in sound]
    given = dict(zip(sound, spare_others(partial(_answer_rows, judge), rows), strict=True))
    return [
        _readable(given[index], len(asked)) if fault is None else [Answer(None, reason=fault)] * len(asked)
        for index, (fault, asked) in enumerate(zip(faults, questions, strict=True))
    ]


def as_yes_or_no(answer: Answer) -> Answer:
    """Return the answer to a yes/no question as exactly "yes" or "no".

    Case and punctuation do not count. Other words give way to the likelier of yes and no where the judge tells, and are null,
    with a reason, where it does not.
    """
    if answer.text is None or answer.text in YES_OR_NO:
        return answer
    word = answer.text.strip().strip(".,!?\"'").lower()
    if word not in YES_OR_NO and answer.p_yes is not None:
        word = "yes" if answer.p_yes > 0.5 else "no"
    if word in YES_OR_NO:
        return Answer(word, answer.p_yes, None, answer.probabilities)
    return Answer(None, None, f"the judge answered {answer.text[:_REASON_CHARS]!r}, neither yes nor no")


def image_fault(image: Image.Image | None) -> str | None:
    """Return why an image cannot be shown to a model, None where it can; decodes it."""
    if image is None:
        return "there is no image"
    try:
        image.load()
    except Exception as error:  # PIL's decoders raise errors of many kinds
        return f"the image cannot be read: {named_line(error)}"[:_REASON_CHARS]
    return None


def _answer_rows(
    judge: Judge, rows: Sequence[tuple[Image.Image, Sequence[str], Sequence[Sequence[str]]]]
) -> list[list[Answer]]:
    images, questions, choices = zip(*rows, strict=True)
    if any(each for asked in choices for each in asked):
        return judge.answer(images, questions, choices)
    return judge.answer(images, questions)


def _readable(given: list[Answer] | Exception, count: int) -> list[Answer]:
    if not isinstance(given, Exception):
        return given
    logger.warning("the judge failed on an image: %s", given)
    return [Answer(None, reason=named_line(given))] * count
