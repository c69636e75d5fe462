"""A vision-language model in vLLM as judge: P(yes) and P(no) are read from the first token, the image stands before the question."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from selma_ray.errors import JudgeError, first_line
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.judges.interface import YES_OR_NO, Answer, Choices, regroup
from selma_ray.judging.judges.words import AnswerTokens, p_yes, spoken
from selma_ray.models.locate import LocatedModel
from selma_ray.models.thinking import NO_THINKING
from selma_ray.models.vllm_engine import engine_options, in_process_environment

__all__ = ["PROMPT_VERSION", "VllmJudge", "compose_question"]

PROMPT_VERSION = "v1"
"""Changes with the words around a question; result rows carry it in the judge's name."""

_YES_NO = "Please answer yes or no."
_MAX_CHOICE_TOKENS = 16
# A judge that leaves yes and no less than this together says something else.
_LEAST_CHANCE = 0.01


def compose_question(question: str, choices: Sequence[str] = ()) -> str:
    """Return the words after the image: the question, and how to answer it."""
    if choices:
        return f"{question} Choose one of: {', '.join(choices)}. Answer with the choice alone."
    return question if question.endswith(_YES_NO) else f"{question} {_YES_NO}"


class VllmJudge:
    """Any vision-language model that vLLM runs, in this process; all questions of a call are one batch, image by image.

    Questions about an image follow one another and share its prefix, so vLLM's caches encode and prefill the image once.
    """

    def __init__(self, located: LocatedModel, config: JudgeConfig) -> None:
        os.environ.update(in_process_environment(config))
        from vllm import LLM, SamplingParams

        self._params: Any = SamplingParams
        try:
            self._llm = LLM(model=located.path, **_engine_options(config))
        except (OSError, ValueError, RuntimeError) as error:
            raise JudgeError(
                f"evaluation.judge.name {located.path} cannot be run by vLLM ({_reason(error)}); name a vision-language model that vLLM "
                "supports, or set evaluation.judge.engine to transformers for ViLT and BLIP"
            ) from None
        tokenizer = self._llm.get_tokenizer()
        self._tokens = AnswerTokens(tokenizer)
        if not all(map(self._tokens.of, YES_OR_NO)):
            raise JudgeError(
                f"evaluation.judge.name {located.path} must have a token for yes and one for no, has not; name another model"
            )
        self.name = f"{located.path}@{located.revision}#{PROMPT_VERSION}"

    def answer(
        self, images: Sequence[Image.Image], questions: Sequence[Sequence[str]], choices: Choices | None = None
    ) -> list[list[Answer]]:
        """Return one answer per question of each image, in order."""
        choices = [[()] * len(asked) for asked in questions] if choices is None else choices
        offered = [of_question for of_image in choices for of_question in of_image]
        conversations = [
            _conversation(image, compose_question(question, of_question))
            for image, asked, of_image in zip(map(_in_rgb, images), questions, choices, strict=True)
            for question, of_question in zip(asked, of_image, strict=True)
        ]
        outputs = []
        if offered:
            # A thought would stand where the answer's first token is read.
            outputs = self._llm.chat(
                conversations, list(map(self._sampling, offered)), use_tqdm=False, chat_template_kwargs=NO_THINKING
            )
        return regroup(list(map(self._answer, outputs, offered)), questions)

    def _sampling(self, choices: Sequence[str]) -> Any:
        return self._params(
            temperature=0,
            max_tokens=_MAX_CHOICE_TOKENS if choices else 1,
            logprob_token_ids=self._tokens.of_all(choices) or self._tokens.of_all(()),
        )

    def _answer(self, output: Any, choices: Sequence[str]) -> Answer:
        (completion,) = output.outputs
        first = {token: each.logprob for token, each in completion.logprobs[0].items()}
        probabilities = self._tokens.probabilities(choices, first)
        return spoken(completion.text, probabilities) if choices else _yes_or_no(completion.text, probabilities)


def _reason(error: Exception) -> str:
    """Return the line of a validation error that says what is wrong; vLLM's first line only counts them."""
    lines = map(str.strip, str(error).splitlines())
    return next((line for line in lines if line.startswith("Value error")), first_line(error))[:200]


def _yes_or_no(text: str, probabilities: Mapping[str, float]) -> Answer:
    chance = p_yes(probabilities)
    if chance is None or sum(probabilities.values()) < _LEAST_CHANCE:
        return Answer(None, None, f"the judge answered {text!r}, neither yes nor no", dict(probabilities))
    return Answer("yes" if chance > 0.5 else "no", chance, None, dict(probabilities))


def _in_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def _conversation(image: Image.Image, text: str) -> list[dict[str, Any]]:
    content = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def _engine_options(config: JudgeConfig) -> dict[str, Any]:
    return (
        engine_options(config, seeded=False)
        | {
            "max_num_seqs": config.batch_size,
            "limit_mm_per_prompt": {"image": 1},
            "enable_prefix_caching": True,
            "seed": 0,
        }
        | ({"gpu_memory_utilization": config.gpu_memory_fraction} if config.gpu_memory_fraction else {})
    )
