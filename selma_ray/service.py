"""The merged model of a run as an HTTP service: the generator beside an evaluator that holds the run's judge."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath

from PIL import Image

from selma_ray.evaluation.dsg import SCORERS, Answered, mean_score
from selma_ray.evaluation.judges.interface import Judge
from selma_ray.evaluation.questions import Question, questions_for_prompt
from selma_ray.evaluation.scoring import ImageScore, score_images
from selma_ray.evaluation.soft import soft_dsg, soft_tifa_am
from selma_ray.loop import Run
from selma_ray.serving.evaluator import Judged
from selma_ray.serving.experts import Expert, LowRank
from selma_ray.serving.run import Service, start_service
from selma_ray.serving.served import ServedModels

__all__ = ["ServiceScorer", "open_experts", "open_scorer", "served_models", "start_merged"]

_DEPTH_OF_EXPERTS = 3  # experts/NAME/adapter_config.json; checkpoints lie deeper
_DSG = {"dsg": "official", "dsg_dpg": "dpg", "dsg_selma": "selma"}


class ServiceScorer:
    """A judge asked as offline evaluation asks it; every metric is computed from the same answers.

    `dsg`, `dsg_dpg` and `dsg_selma` are evaluation's three scorers, `soft_dsg` and `soft_tifa_am` its means of P(yes).
    """

    metrics = (*_DSG, "soft_dsg", "soft_tifa_am")

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.judge = judge.name

    def questions(self, prompt: str) -> tuple[Question, ...]:
        """Return the questions about a prompt; raises CaptionError for a prompt that has none."""
        return questions_for_prompt(prompt)

    def score(self, images: Sequence[Image.Image], questions: Sequence[Sequence[Question]]) -> list[Judged]:
        """Judge each image by its own questions."""
        return [Judged(_metrics(score), score.questions) for score in score_images(self._judge, images, questions)]


def _metrics(score: ImageScore) -> dict[str, float | None]:
    answered = [Answered(each.id, each.answer, each.parents) for each in score.questions]
    p_yes = [each.p_yes for each in score.questions]
    hard = {metric: mean_score(SCORERS[scorer](answered)) for metric, scorer in _DSG.items()}
    return hard | {"soft_dsg": soft_dsg(p_yes), "soft_tifa_am": soft_tifa_am(p_yes)}


def open_scorer(judge: str) -> ServiceScorer:
    """Load a judge by name for the evaluator; called on the replica that holds it."""
    from selma_ray.evaluation.config import JudgeConfig
    from selma_ray.evaluation.judges.opening import open_judge

    return ServiceScorer(open_judge(JudgeConfig(name=judge)))


def open_experts(folders: Mapping[str, str]) -> dict[str, Expert]:
    """Read experts from adapter folders, by name; called on the replica that mixes them. Raises AdapterError."""
    from selma_ray.merging.adapters import open_adapter

    return {
        name: {factors.module: LowRank(factors.A_RI, factors.scale * factors.B_OR) for factors in open_adapter(folder)}
        for name, folder in folders.items()
    }


def served_models(run: Run, experts: bool) -> ServedModels:
    """Return the merged model of a run and, where `experts` are wanted, its base model and every expert that is there."""
    if not experts:
        return ServedModels(run.recipe.merging.name, run.merged_model)
    paths = map(PurePosixPath, run.folder.files("experts", suffix="adapter_config.json"))
    names = sorted(path.parts[-2] for path in paths if len(path.parts) == _DEPTH_OF_EXPERTS)
    folders = {name: run.folder.path("experts", name) for name in names}
    return ServedModels(run.recipe.merging.name, run.merged_model, run.recipe.model, folders)


def start_merged(run: Run) -> Service:
    """Serve the merged model of a run and return once it answers; the caller stops it."""
    recipe = run.recipe
    return start_service(
        served_models(run, recipe.serving.experts),
        recipe.serving,
        recipe.cluster,
        partial(open_scorer, recipe.serving.judge),
        open_experts,
    )
