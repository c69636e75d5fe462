"""From a recipe's judge to a loaded one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from selma_ray.errors import JudgeError
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.judges.interface import Answer, Choices, Judge
from selma_ray.judging.tifa import ChoiceFinder, choose
from selma_ray.models.device import device_of
from selma_ray.models.locate import LocatedModel, locate_judge

__all__ = ["ChoosingJudge", "judge_engine", "judge_identity", "open_judge"]

_MINIATURE = "selma_miniature_judge"
_DETECTOR = "selma_miniature_detector"
_VQA = ("vilt", "blip")


def open_judge(config: JudgeConfig) -> Judge:
    """Load the judge that `config` names; raises ModelNotFoundError or JudgeError where it cannot be, ConfigError where its
    GPUs are not there.
    """
    judge = _open(config)
    if config.embedder is None:
        return judge
    from selma_ray.judging.embedding import SentenceEmbedder

    return ChoosingJudge(judge, SentenceEmbedder(config.embedder))


def judge_identity(config: JudgeConfig) -> dict[str, str | None]:
    """Return what a judge's answers depend on, without loading it: the exact models, the engine and the words it is asked in."""
    located = locate_judge(config.name, config.revision)
    engine = _engine(config, located)
    identity = {"name": config.name, "revision": located.revision}
    if engine == "vllm":
        from selma_ray.judging.judges.vllm_vlm import PROMPT_VERSION

        identity |= {"engine": engine, "dtype": config.dtype, "prompt": PROMPT_VERSION}
    if config.embedder is not None:
        identity["embedder"] = f"{config.embedder}@{locate_judge(config.embedder).revision}"
    return dict(identity)


def judge_engine(config: JudgeConfig) -> str:
    """Return what runs the judge that `config` names: miniature, miniature_detector, transformers or vllm."""
    return _engine(config, locate_judge(config.name, config.revision))


class ChoosingJudge:
    """A judge whose free-form answers become the nearest of a question's choices, as TIFA has it."""

    def __init__(self, judge: Judge, finder: ChoiceFinder) -> None:
        self._judge = judge
        self._finder = finder
        self.name = f"{judge.name}+{getattr(finder, 'name', type(finder).__name__)}"

    def answer(
        self, images: Sequence[Image.Image], questions: Sequence[Sequence[str]], choices: Choices | None = None
    ) -> list[list[Answer]]:
        """Return one answer per question of each image, in order."""
        if choices is None:
            return self._judge.answer(images, questions)
        answered = self._judge.answer(images, questions, choices)
        return [
            [self._chosen(answer, offered) for answer, offered in zip(of_image, offered_of_image, strict=True)]
            for of_image, offered_of_image in zip(answered, choices, strict=True)
        ]

    def _chosen(self, answer: Answer, choices: Sequence[str]) -> Answer:
        if not choices:
            return answer
        return Answer(choose(answer.text, choices, self._finder), answer.p_yes, answer.reason, answer.probabilities)


def _open(config: JudgeConfig) -> Judge:
    located = locate_judge(config.name, config.revision)
    device = device_of(config.num_gpus, "judge.num_gpus")
    match _engine(config, located):
        case "miniature":
            from selma_ray.judging.judges.miniature import MiniatureImageJudge

            return MiniatureImageJudge(located, config.batch_size, device)
        case "miniature_detector":
            from selma_ray.judging.judges.miniature_detector import MiniatureDetectorJudge

            return MiniatureDetectorJudge(located, config.batch_size, device)
        case "vllm":
            from selma_ray.judging.judges.vllm_vlm import VllmJudge

            return VllmJudge(located, config)
        case _:
            from selma_ray.judging.judges.transformers_vqa import TransformersJudge

            return TransformersJudge(located, config.batch_size, device)


def _engine(config: JudgeConfig, located: LocatedModel) -> str:
    """Return the engine that is set, else the one that the folder's class of model is for; hub names are asked the hub."""
    if config.engine != "auto":
        return config.engine
    config_of_model = _config_of(located)
    miniature = {_MINIATURE: "miniature", _DETECTOR: "miniature_detector"}.get(str(config_of_model.get("model_type")))
    if miniature:
        return miniature
    sees_and_speaks = "vision_config" in config_of_model and config_of_model.get("model_type") not in _VQA
    return "vllm" if sees_and_speaks else "transformers"


def _config_of(located: LocatedModel) -> dict[str, Any]:
    """Return the configuration that a local folder, or the hub, holds for a model; empty where the hub has none or is away."""
    path = Path(located.path, "config.json")
    if not path.is_file():
        from transformers import PretrainedConfig

        try:
            return PretrainedConfig.get_config_dict(located.path, revision=located.revision)[0]
        except (OSError, ValueError):
            return {}
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise JudgeError(f"{path} must be a model's JSON configuration; save the judge again")
    return content
