"""What the evaluator of a service scores with: a judge, and models of other scores."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.judges.asking import ask_images
from selma_ray.judging.judges.interface import Judge
from selma_ray.judging.metrics import ANSWER_METRICS, ImageMetric, metrics_of_answers, open_metric
from selma_ray.judging.questions import Question, check_questions
from selma_ray.judging.scoring import score_answers
from selma_ray.judging.sources import QuestionSource
from selma_ray.models.locate import locate_judge
from selma_ray.serving.config import JUDGE_METRICS, ModelMetric, ServingConfig
from selma_ray.serving.evaluator import Asked, Judged

__all__ = ["ServiceScorer", "open_scorer", "scorer_of"]


class ServiceScorer:
    """A judge, and models of other scores, asked as offline evaluation asks them.

    Everything that `metrics_of_answers` computes comes from one pass of a prompt's questions; `vqascore` and the scores with models
    of their own need no questions.
    """

    metrics_of_questions = frozenset(ANSWER_METRICS)

    def __init__(self, judge: Judge | None, models: Mapping[str, ImageMetric], source: QuestionSource) -> None:
        self._judge = judge
        self._source = source
        self._single: dict[str, ImageMetric] = dict(models)
        if judge is not None:
            self._single["vqascore"] = open_metric("vqascore", judge)
        self.judge = None if judge is None else _shown(judge.name)
        self.metrics = (*(JUDGE_METRICS if judge else ()), *models)

    def questions(self, prompt: str, given: Sequence[Mapping[str, Any]] | None = None) -> tuple[Question, ...]:
        """Return the questions about a prompt, those that are given where there are any.

        Raises NoQuestionsError for a prompt that has none, JudgeError for given ones that cannot be asked.
        """
        if given is None:
            return self._source.questions(prompt)
        questions = tuple(
            Question(each["id"], each["category"], each["question"], tuple(each["parents"])) for each in given
        )
        check_questions(questions)
        return questions

    def score(self, asked: Sequence[Asked]) -> list[Judged]:
        """Score each image by the metrics that are wanted of it."""
        judged = self._judged(asked)
        for name, metric in self._single.items():
            rows = [row for row, each in enumerate(asked) if name in each.metrics]
            scores = (
                metric.score([asked[row].image for row in rows], [asked[row].prompt for row in rows]) if rows else []
            )
            for row, score in zip(rows, scores, strict=True):
                judged[row].scores[name] = score.value
                if score.reason is not None:
                    judged[row].reasons[name] = score.reason
        return judged

    def _judged(self, asked: Sequence[Asked]) -> list[Judged]:
        """Return every score that comes from the answers to questions; nothing about an image without any."""
        judged = [Judged({}) for _ in asked]
        rows = [row for row, each in enumerate(asked) if each.questions]
        if self._judge is None or not rows:
            return judged
        questions = [[each.question for each in asked[row].questions] for row in rows]
        answers = ask_images(self._judge, [asked[row].image for row in rows], questions)
        for row, given in zip(rows, answers, strict=True):
            scored = score_answers(self._judge.name, asked[row].questions, given)
            judged[row] = Judged(metrics_of_answers(asked[row].questions, given), scored.questions)
        return judged


def _shown(name: str) -> str:
    """Return the name of a judge as strangers may see it: without the folders it lies in."""
    return name.rpartition("/")[2] if name.startswith("/") else name


def open_scorer(
    judge: JudgeConfig | None, score_models: Mapping[ModelMetric, str], source: QuestionSource, num_gpus: float = 0
) -> ServiceScorer:
    """Load a judge, and models of other scores by name, for the evaluator; called on the replica that holds them and its GPUs."""
    from selma_ray.judging.judges.opening import open_judge

    models: dict[str, ImageMetric] = {
        name: open_metric(name, model=model, num_gpus=num_gpus) for name, model in score_models.items()
    }
    return ServiceScorer(
        None if judge is None else open_judge(judge.model_copy(update={"num_gpus": num_gpus})), models, source
    )


def scorer_of(config: ServingConfig, source: QuestionSource) -> Callable[[], ServiceScorer]:
    """Return what loads the scorer of a service, that asks a source's questions about prompts that come without any.

    Raises ModelNotFoundError here, before replicas are started, for what is missing.
    """
    if config.evaluator_replicas:
        for name in (*((config.judge.name,) if config.judge else ()), *config.score_models.values()):
            locate_judge(name)
    return partial(open_scorer, config.judge, config.score_models, source, config.evaluator_num_gpus)
