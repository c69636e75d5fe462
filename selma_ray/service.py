"""The merged model of a run as an HTTP service: the generator beside an evaluator that holds the run's judge."""

from functools import partial

from selma_ray.evaluation.scoring import ImageScorer
from selma_ray.loop import Run
from selma_ray.serving.run import Service, start_service

__all__ = ["open_scorer", "start_merged"]


def open_scorer(judge: str) -> ImageScorer:
    """Load a judge by name for the evaluator; called on the replica that holds it."""
    from selma_ray.evaluation.config import JudgeConfig
    from selma_ray.evaluation.judges.opening import open_judge

    return ImageScorer(open_judge(JudgeConfig(name=judge)))


def start_merged(run: Run) -> Service:
    """Serve the merged model of a run and return once it answers; the caller stops it."""
    recipe = run.recipe
    return start_service(
        run.merged_model,
        recipe.merging.name,
        recipe.serving,
        recipe.cluster,
        partial(open_scorer, recipe.serving.judge),
    )
