"""Results of other runs, set beside this run's: the same prompts and questions, and the same judge unless told otherwise."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selma_ray.errors import ConfigError, JudgeError
from selma_ray.evaluation.config import EvaluationConfig, OtherResult
from selma_ray.judging.questions import PromptWithQuestions
from selma_ray.storage import RunFolder

__all__ = ["OtherAnswers", "read_others", "refuse_other_judges"]


@dataclass(frozen=True)
class OtherAnswers:
    """The answer rows of another run's model that are about prompts of this run's suite."""

    answers: list[dict[str, Any]]
    judges: frozenset[str]


def read_others(
    config: EvaluationConfig, suite: Sequence[PromptWithQuestions], taken: Collection[str]
) -> dict[str, OtherAnswers]:
    """Read `compare_with`; raises ConfigError for a name that is `taken` or a run that is not there, JudgeError for other questions."""
    for name in config.compare_with:
        if name in taken:
            raise ConfigError(f"evaluation.compare_with.{name} is the name of a model of this run; choose another")
    return {name: _read(name, other, suite) for name, other in config.compare_with.items()}


def refuse_other_judges(judge: str, others: Mapping[str, OtherAnswers], config: EvaluationConfig) -> dict[str, str]:
    """Return {name: judge} of the other results; raises JudgeError where one is not `judge`, unless the recipe allows it."""
    judges = {name: ", ".join(sorted(other.judges)) for name, other in others.items()}
    for name, other in judges.items():
        if other != judge and not config.allow_other_judge:
            raise JudgeError(
                f"evaluation.compare_with.{name} was judged by {other}, this run by {judge}: figures of different judges cannot be "
                "compared; evaluate it with this judge, or set evaluation.allow_other_judge=true"
            )
    return judges


def _read(name: str, other: OtherResult, suite: Sequence[PromptWithQuestions]) -> OtherAnswers:
    key = f"evaluation.compare_with.{name}"
    folder = RunFolder(other.run_dir)
    files = (folder.done("evaluate") or {}).get("files", {})
    if not files:
        raise ConfigError(
            f"{key}.run_dir {other.run_dir} holds no finished evaluation; run `selma evaluate` there first"
        )
    if other.model not in files:
        raise ConfigError(f"{key}.model must be one of {', '.join(files)}, got {other.model!r}")
    asked = {prompt.id: {question.id: question.question for question in prompt.questions} for prompt in suite}
    rows = folder.read_table(files[other.model]["answers"]).to_pylist()
    shared = [row for row in rows if row["prompt_id"] in asked]
    if not shared:
        raise JudgeError(f"{key} shares no prompt with this run's suite; evaluate it on the same suite")
    by_image: dict[tuple[str, int], dict[int, str]] = {}
    for row in shared:
        by_image.setdefault((row["prompt_id"], row["seed"]), {})[row["question_id"]] = row["question"]
    for (prompt_id, _), questions in by_image.items():
        if questions != asked[prompt_id]:
            raise JudgeError(
                f"{key} was asked other questions about prompt {prompt_id} than this suite asks; evaluate it on this suite"
            )
    return OtherAnswers(shared, frozenset(row["judge"] for row in shared))
