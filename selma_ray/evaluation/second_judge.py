"""A second judge that was never a reward: asked the same questions about the same images, its figures stand beside the first's."""

from collections.abc import Mapping, Sequence
from typing import Any

from selma_ray.evaluation.chunks import Chunk
from selma_ray.evaluation.config import SECOND_ANSWERS, EvaluationConfig
from selma_ray.evaluation.summary import model_scores, summarise
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.judges.opening import judge_identity
from selma_ray.judging.questions import PromptWithQuestions
from selma_ray.records import content_id
from selma_ray.storage import RunFolder

__all__ = ["is_answered", "judge_key", "second_judge_figures"]


def judge_key(judge: JudgeConfig) -> str:
    """Return what names a judge's answers, by all that they depend on."""
    return content_id(**judge_identity(judge))


def is_answered(folder: RunFolder, chunk: Chunk, config: EvaluationConfig, first_key: str) -> bool:
    """Tell whether every judge of a recipe has answered about a chunk's images."""
    second = config.second_judge
    return folder.exists(*chunk.answers_path(first_key)) and (
        second is None or folder.exists(*chunk.answers_path(judge_key(second), SECOND_ANSWERS))
    )


def second_judge_figures(
    folder: RunFolder,
    chunks: Mapping[str, Sequence[Chunk]],
    suite: Sequence[PromptWithQuestions],
    config: EvaluationConfig,
    seed: int,
) -> dict[str, Any] | None:
    """Return the second judge's name, its figures of all models and their differences to base; None where there is no second judge."""
    if config.second_judge is None:
        return None
    key = judge_key(config.second_judge)
    scores, name = {}, ""
    for model, of_model in chunks.items():
        paths = ["/".join(chunk.answers_path(key, SECOND_ANSWERS)) for chunk in of_model]
        answers = folder.read_table(paths).to_pylist()
        scores[model], name = model_scores(answers, config.dsg_scorer), answers[0]["judge"]
    summary = summarise(scores, suite, config, seed, {})
    return {"judge": name, "models": summary.models, "differences": summary.differences}
