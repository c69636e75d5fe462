"""The judge asked about images whose truth is known: drawn scenes of the miniature."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from selma_ray.judging.judges.interface import Judge
from selma_ray.judging.questions import PromptWithQuestions
from selma_ray.miniature import world

__all__ = ["KnownScene", "ask_known_scenes", "draw_known_scenes"]


@dataclass(frozen=True)
class KnownScene:
    """An image, the prompt whose questions it is asked, and their true answers."""

    prompt: PromptWithQuestions
    image: Image.Image
    truths: tuple[bool, ...]


def draw_known_scenes(suite: Sequence[PromptWithQuestions], count: int, seed: int) -> list[KnownScene]:
    """Draw `count` scenes for the miniature's prompts in turn, every second one with one thing wrong."""
    captions, names = [prompt.prompt for prompt in suite], [prompt.id for prompt in suite]
    drawn = world.draw_known_scenes(captions, names, count, seed)
    return [KnownScene(suite[scene.caption_index], scene.image, scene.truths) for scene in drawn]


def ask_known_scenes(judge: Judge, scenes: Sequence[KnownScene]) -> list[dict[str, Any]]:
    """Return a row for each question: category, the judge's answer and P(yes), and the truth."""
    texts = [[question.question for question in scene.prompt.questions] for scene in scenes]
    given = judge.answer([scene.image for scene in scenes], texts)
    return [
        {"category": question.category, "answer": answer.text, "p_yes": answer.p_yes, "truth": truth}
        for scene, answers in zip(scenes, given, strict=True)
        for question, answer, truth in zip(scene.prompt.questions, answers, scene.truths, strict=True)
    ]
