"""Stage: every model renders the same prompts from the same seeds, a judge answers their questions, figures come out.

One Ray Data execution streams the batches of all models from renderers to judges; each batch's images are written, then its
answers. What is written already is not done again.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from selma_ray import errors
from selma_ray.adapters.files import adapter_digest
from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.connection import cpu_count
from selma_ray.cluster.metrics import count
from selma_ray.cluster.placement import Demand, check_fit, role_options, shared_resources
from selma_ray.errors import RenderError
from selma_ray.evaluation.chunks import Chunk, JudgeChunk, ModelUnderTest, RenderChunk, plan_chunks
from selma_ray.evaluation.config import SECOND_ANSWERS, EvaluationConfig
from selma_ray.evaluation.judge_error import judge_error_summary
from selma_ray.evaluation.others import read_others, refuse_other_judges
from selma_ray.evaluation.scores import question_scores
from selma_ray.evaluation.second_judge import is_answered, judge_key, second_judge_figures
from selma_ray.evaluation.summary import BASE, EvaluationSummary, ModelScores, model_scores, score_table, summarise
from selma_ray.judging.dsg import mean_score
from selma_ray.judging.questions import PromptWithQuestions
from selma_ray.models.device import see_own_gpus, task_options
from selma_ray.models.identity import model_identity
from selma_ray.progress import Progress, Report
from selma_ray.records import content_id
from selma_ray.storage import RunFolder

__all__ = ["ModelUnderTest", "WorkOnChunks", "evaluate_models"]

logger = logging.getLogger(__name__)

MINIATURE = "miniature"
_JUDGE_ERROR_DRAWS = 400


def evaluate_models(
    folder: RunFolder,
    models: Mapping[str, ModelUnderTest],
    suite: Sequence[PromptWithQuestions],
    config: EvaluationConfig,
    seed: int,
    cluster: ClusterConfig,
    report: Report | None = None,
) -> EvaluationSummary:
    """Evaluate `models` on `suite` and return their figures; writes `evaluation/<model>/images`, `answers` and scores.parquet.

    Raises RenderError where too many of a model's images could not be scored, JudgeError where results of another judge are to be
    compared.
    """
    others = read_others(config, suite, taken=models)
    key = judge_key(config.judge)
    chunks = {name: plan_chunks(name, _revision(tested), suite, config, seed) for name, tested in models.items()}
    planned = [chunk for of_model in chunks.values() for chunk in of_model]
    pending = [chunk for chunk in planned if not is_answered(folder, chunk, config, key)]
    total = sum(len(chunk.prompts) for chunk in planned)
    done = total - sum(len(chunk.prompts) for chunk in pending)
    if pending:
        for number, chunk in enumerate(_stream(folder, models, pending, config, cluster)):
            if number == 0:  # the judge's name is known, and little work lost
                refuse_other_judges(_judge_name(folder, chunk, key), others, config)
            done += len(chunk.prompts)
            count("selma_images_scored", len(chunk.prompts), folder.uri, "evaluate")
            asked = sum(len(prompt.questions) for prompt in chunk.prompts)
            count("selma_questions_answered", asked, folder.uri, "evaluate")
            if report:
                report(Progress("evaluate", done, total, chunk.model))
    scores = {name: _scores(folder, name, of_model, key, config) for name, of_model in chunks.items()}
    details = _details(folder, chunks, key, config)
    details["judges"] = refuse_other_judges(details["judge"], others, config)
    details["judge_error"] = _judge_error(folder, chunks, suite, config, seed)
    details["second_judge"] = second_judge_figures(folder, chunks, suite, config, seed)
    scores |= {name: model_scores(other.answers, config.dsg_scorer) for name, other in others.items()}
    return summarise(scores, suite, config, seed, details)


def _scores(folder: RunFolder, name: str, chunks: Sequence[Chunk], key: str, config: EvaluationConfig) -> ModelScores:
    """Score a model's answers and write the score of each image; failures beyond bounds are forgotten, to be tried again."""
    answers = folder.read_table(["/".join(chunk.answers_path(key)) for chunk in chunks]).to_pylist()
    scores = model_scores(answers, config.dsg_scorer)
    failed = len(scores.unscored)
    if not scores.any_scored or failed > config.max_failed_fraction * len(scores.images):
        _forget_failures(folder, chunks, key, scores, config)
        reason, count = Counter(scores.unscored.values()).most_common(1)[0]
        raise RenderError(
            f"evaluation.max_failed_fraction allows {config.max_failed_fraction:g}, {failed} of {len(scores.images)} images of {name} "
            f"have no score ({count} x {reason}); fix the cause and run the same command again: they are tried again"
        )
    folder.write_table(score_table(name, scores, answers), "evaluation", name, "scores.parquet")
    return scores


def _judge_error(
    folder: RunFolder,
    chunks: Mapping[str, Sequence[Chunk]],
    suite: Sequence[PromptWithQuestions],
    config: EvaluationConfig,
    seed: int,
) -> dict[str, Any] | None:
    """Ask the judge about scenes with known truth and carry its errors into the figures; None where no truth is known."""
    if config.suite != MINIATURE or config.calibration_scenes == 0 or config.dsg_scorer == "selma":
        return None
    first_key = judge_key(config.judge)
    key = content_id(
        judge=first_key,
        prompts=[prompt.id for prompt in suite],
        scenes=config.calibration_scenes,
        seed=seed,
    )
    path = ("calibration", f"{key}.parquet")
    if not folder.exists(*path):
        ask = ray.remote(num_cpus=config.judge.num_cpus, **task_options(config.judge.num_gpus))(_known_answers)
        folder.write_table(pa.Table.from_pylist(ray.get(ask.remote(config, suite, seed))), *path)
    known = folder.read_table(["/".join(path)]).to_pylist()
    answers = {
        name: folder.read_table(["/".join(chunk.answers_path(first_key)) for chunk in of_model]).to_pylist()
        for name, of_model in chunks.items()
    }
    return judge_error_summary(answers, known, partial(_score_of, config.dsg_scorer), BASE, _JUDGE_ERROR_DRAWS, seed)


def _known_answers(config: EvaluationConfig, suite: Sequence[PromptWithQuestions], seed: int) -> list[dict[str, Any]]:
    from selma_ray.evaluation.calibration import ask_known_scenes, draw_known_scenes
    from selma_ray.judging.judges.opening import open_judge

    see_own_gpus(config.judge.num_gpus)
    scenes = draw_known_scenes(suite, config.calibration_scenes, seed)
    return ask_known_scenes(open_judge(config.judge), scenes)


def _score_of(scorer: str, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Score the answer rows of one image."""
    return mean_score(question_scores(rows, scorer))


def _forget_failures(
    folder: RunFolder, chunks: Sequence[Chunk], key: str, scores: ModelScores, config: EvaluationConfig
) -> None:
    for chunk in chunks:
        keys = zip((prompt.id for prompt in chunk.prompts), chunk.seeds, strict=True)
        if any(key in scores.unscored for key in keys):
            folder.delete(*chunk.images_path)
            folder.delete(*chunk.answers_path(key))
            if config.second_judge:
                folder.delete(*chunk.answers_path(judge_key(config.second_judge), SECOND_ANSWERS))


def _details(
    folder: RunFolder, chunks: Mapping[str, Sequence[Chunk]], key: str, config: EvaluationConfig
) -> dict[str, Any]:
    """Return what the figures depend on, and the files they come from."""
    files = {
        name: {
            "images": ["/".join(chunk.images_path) for chunk in of_model],
            "answers": ["/".join(chunk.answers_path(key)) for chunk in of_model],
        }
        for name, of_model in chunks.items()
    }
    any_chunk = next(iter(chunks.values()))[0]
    return {
        "scorer": config.dsg_scorer,
        "judge": _judge_name(folder, any_chunk, key),
        "suite": config.suite,
        "seeds": list(config.seeds),
        "sampling": config.sampling.model_dump(),
        "resamples": config.bootstrap_resamples,
        "compare_with": {name: other.model_dump() for name, other in config.compare_with.items()},
        "files": files,
    }


def _judge_name(folder: RunFolder, chunk: Chunk, key: str) -> str:
    return folder.read_table(["/".join(chunk.answers_path(key))], columns=["judge"])["judge"][0].as_py()


def _stream(
    folder: RunFolder,
    models: Mapping[str, ModelUnderTest],
    pending: Sequence[Chunk],
    config: EvaluationConfig,
    cluster: ClusterConfig,
) -> Iterator[Chunk]:
    """Yield each pending chunk when its images and answers are written."""
    render = partial(RenderChunk, folder, dict(models), config)
    second = config.second_judge
    judges_asked = [partial(JudgeChunk, folder, config, judge_key(config.judge))]
    judges_asked += [partial(JudgeChunk, folder, config, judge_key(second), second=True)] if second else []
    renderers = min(config.renderers * len(models), len(pending))
    rendering = {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus}
    judging = shared_resources(
        *({"num_cpus": each.num_cpus, "num_gpus": each.num_gpus} for each in (config.judge, second) if each)
    )
    if config.judges == 0:
        pools = [
            _Pool("evaluation.renderers", (render, *judges_asked), renderers, shared_resources(rendering, judging))
        ]
    else:
        judges = min(config.judges, len(pending))
        pools = [
            _Pool("evaluation.renderers", (render,), renderers, rendering),
            _Pool("evaluation.judges", tuple(judges_asked), judges, judging),
        ]
    check_fit([pool.demand() for pool in pools], cluster, take_turns=False)
    dataset = ray.data.from_items([{"chunk": index} for index in range(len(pending))], override_num_blocks=len(pending))
    spare_cpus = cpu_count() - sum(pool.resources["num_cpus"] for pool in pools)
    for pool in pools:
        at_once = min(pool.most, 1 + max(0, int(spare_cpus // pool.resources["num_cpus"])))
        spare_cpus -= (at_once - 1) * pool.resources["num_cpus"]
        dataset = dataset.map_batches(
            WorkOnChunks,
            fn_constructor_args=(
                tuple(pending),
                pool.steps,
                max(1, int(pool.resources["num_cpus"])),
                pool.resources["num_gpus"],
            ),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=at_once, max_size=pool.most),
            **pool.resources,
            **role_options("render", cluster),
        )
    for row in dataset.iter_rows():
        if row["error"]:
            raise getattr(errors, row["error_class"])(row["error"])
        yield pending[row["chunk"]]


@dataclass(frozen=True)
class _Pool:
    """Actors that do the same steps on chunks: at most `most`, each with `resources`; `key` is the recipe's."""

    key: str
    steps: tuple[Callable[[], Callable[[Chunk], None]], ...]
    most: int
    resources: dict[str, float]

    def demand(self) -> Demand:
        """Return what one actor takes; each pool needs one, as they wait for one another."""
        return Demand(self.key, "render", {"CPU": self.resources["num_cpus"], "GPU": self.resources["num_gpus"]})


class WorkOnChunks:
    """A stage as Ray Data calls it: indices of chunks in, the same indices out when its steps are done."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        steps: Sequence[Callable[[], Callable[[Chunk], None]]],
        num_threads: int,
        num_gpus: float = 0,
    ) -> None:
        see_own_gpus(num_gpus)
        import torch

        torch.set_num_threads(num_threads)
        self._chunks = chunks
        self._factories = steps
        self._steps: list[Callable[[Chunk], None]] = []

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Our own errors travel as rows, because Ray passes on nothing but their traceback. A chunk with an error is passed on as it is."""
        rows: dict[str, list[Any]] = {"chunk": [], "error_class": [], "error": []}
        for place, index in enumerate(batch["chunk"]):
            failed = [str(batch[key][place]) if key in batch else "" for key in ("error_class", "error")]
            if not failed[1]:
                failed = self._failure_of(self._chunks[int(index)])
            rows["chunk"].append(int(index))
            rows["error_class"].append(failed[0])
            rows["error"].append(failed[1])
        return rows

    def _failure_of(self, chunk: Chunk) -> list[str]:
        try:
            if not self._steps:
                self._steps = [make() for make in self._factories]
            for step in self._steps:
                step(chunk)
        except errors.SelmaError as error:
            return [type(error).__name__, str(error)]
        return ["", ""]


def _revision(tested: ModelUnderTest) -> str:
    """Return a name for the exact content of a model and its adapter."""
    model = model_identity(tested.model)
    if tested.adapter_dir is None:
        return content_id(model=model)
    return content_id(model=model, adapter=adapter_digest(tested.adapter_dir))
