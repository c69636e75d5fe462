"""From a recipe's judge to a loaded one."""

import json
from pathlib import Path

from selma_ray.errors import JudgeError
from selma_ray.evaluation.config import JudgeConfig
from selma_ray.evaluation.judges.interface import Judge
from selma_ray.models.locate import LocatedModel, locate_judge

__all__ = ["open_judge"]

_MINIATURE = "selma_miniature_judge"


def open_judge(config: JudgeConfig) -> Judge:
    """Load the judge that `config` names; raises ModelNotFoundError or JudgeError where it cannot be."""
    located = locate_judge(config.name)
    if _model_type(located) == _MINIATURE:
        from selma_ray.evaluation.judges.miniature import MiniatureImageJudge

        return MiniatureImageJudge(located, config.batch_size)
    from selma_ray.evaluation.judges.transformers_vqa import TransformersJudge

    return TransformersJudge(located, config.batch_size)


def _model_type(located: LocatedModel) -> str | None:
    """Return the class of model that a local folder says it holds."""
    path = Path(located.path, "config.json")
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text()).get("model_type")
    except (ValueError, AttributeError):
        raise JudgeError(f"{path} must be a model's JSON configuration; save the judge again") from None
