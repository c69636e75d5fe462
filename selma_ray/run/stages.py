"""The stages of a run in order, every one skipped where the run's folder says that it is finished."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from selma_ray.cluster.connection import connect
from selma_ray.cluster.sharing import check_shared
from selma_ray.errors import ConfigError
from selma_ray.progress import Report
from selma_ray.run.demands import SERVE, check_stages_fit, waits_announced
from selma_ray.run.evaluate import evaluate
from selma_ray.run.generate import generate
from selma_ray.run.lease import held
from selma_ray.run.memory import check_cards
from selma_ray.run.merge import merge
from selma_ray.run.opening import Run
from selma_ray.run.train import train

__all__ = ["STAGES", "check_before", "finished", "run_stage"]

logger = logging.getLogger(__name__)

STAGES: Mapping[str, Callable[[Run, Report], dict[str, Any]]] = {
    "generate": generate,
    "train": train,
    "merge": merge,
    "evaluate": evaluate,
}


def finished(run: Run, name: str) -> dict[str, Any] | None:
    """Return the summary of a finished stage, or None; an evaluation is unfinished where it lacks other results or a second judge."""
    done = run.folder.done(name)
    if done is not None and name == "evaluate":
        wanted = {key: other.model_dump() for key, other in run.recipe.evaluation.compare_with.items()}
        if done.get("compare_with", {}) != wanted or _lacks_second_judge(run, done):
            return None
    return done


def _lacks_second_judge(run: Run, done: Mapping[str, Any]) -> bool:
    from selma_ray.judging.judges.opening import judge_identity

    second = run.recipe.evaluation.second_judge
    if second is None:
        return False
    identity = judge_identity(second)
    return str(identity["revision"]) not in ((done.get("second_judge") or {}).get("judge") or "")


def run_stage(run: Run, name: str, report: Report) -> dict[str, Any]:
    """Run one stage unless it is finished; returns its summary either way. Raises ConfigError where an earlier one is missing."""
    done = finished(run, name)
    if done is not None:
        logger.info("%s is finished in %s", name, run.folder.uri)
        return done
    names = list(STAGES)
    for earlier in names[: names.index(name)]:
        if run.folder.done(earlier) is None:
            raise ConfigError(
                f"{name} needs the finished stage {earlier} in {run.folder.uri}; run `selma {earlier}` first"
            )
    with held(run.folder):
        connect(run.recipe.cluster)
        check_before(run, names[names.index(name) :])
        with waits_announced(run.recipe, name, report):
            summary = STAGES[name](run, report)
        run.folder.mark_done(name, summary)
    return summary


def check_before(run: Run, stages: Sequence[str]) -> None:
    """Raise an error of one line where what is left of `stages` cannot work on the connected cluster, before any of it is paid for."""
    ahead = [stage for stage in stages if stage == SERVE or finished(run, stage) is None]
    check_stages_fit(run.recipe, ahead)
    check_cards(run.recipe, ahead)
    check_shared(run.folder)
