"""Stage: every model renders the same prompts from the same seeds, a judge answers their questions, figures come out.

One Ray Data execution streams the batches of all models through a pool of actors; each writes a batch's images, then its answers.
What is written already is not done again.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from selma_ray import errors
from selma_ray.cluster import ClusterConfig, cpu_count, role_options
from selma_ray.errors import RenderError
from selma_ray.evaluation.chunks import Chunk, EvaluateChunk, ModelUnderTest, plan_chunks
from selma_ray.evaluation.config import EvaluationConfig
from selma_ray.evaluation.questions import PromptWithQuestions
from selma_ray.evaluation.summary import EvaluationSummary, ModelScores, model_scores, summarise
from selma_ray.models.locate import locate_judge, locate_text_to_image
from selma_ray.records import content_id
from selma_ray.storage import RunFolder

__all__ = ["EvaluationProgress", "ModelUnderTest", "evaluate_models"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationProgress:
    """How far an evaluation has come, in images."""

    done: int
    total: int
    detail: str


def evaluate_models(
    folder: RunFolder,
    models: Mapping[str, ModelUnderTest],
    suite: Sequence[PromptWithQuestions],
    config: EvaluationConfig,
    seed: int,
    cluster: ClusterConfig,
    on_progress: Callable[[EvaluationProgress], None] | None = None,
) -> EvaluationSummary:
    """Evaluate `models` on `suite` and return their figures; writes `evaluation/<model>/images` and `answers`.

    Raises RenderError where none of a model's images could be rendered and judged.
    """
    judge_key = content_id(name=config.judge.name, revision=locate_judge(config.judge.name).revision)
    chunks = {name: plan_chunks(name, _revision(tested), suite, config, seed) for name, tested in models.items()}
    planned = [chunk for of_model in chunks.values() for chunk in of_model]
    pending = [chunk for chunk in planned if not folder.exists(*chunk.answers_path(judge_key))]
    total = sum(len(chunk.prompts) for chunk in planned)
    done = total - sum(len(chunk.prompts) for chunk in pending)
    if pending:
        for chunk in _stream(folder, models, pending, config, judge_key, cluster):
            done += len(chunk.prompts)
            if on_progress:
                on_progress(EvaluationProgress(done, total, chunk.model))
    return summarise(
        {name: _scores(folder, name, of_model, judge_key, suite, config) for name, of_model in chunks.items()},
        suite,
        config,
        seed,
        _details(folder, chunks, judge_key, config),
    )


def _scores(
    folder: RunFolder,
    name: str,
    chunks: Sequence[Chunk],
    judge_key: str,
    suite: Sequence[PromptWithQuestions],
    config: EvaluationConfig,
) -> ModelScores:
    answers = folder.read_table(["/".join(chunk.answers_path(judge_key)) for chunk in chunks]).to_pylist()
    scores = model_scores(answers, config.dsg_scorer)
    if not scores.any_scored:
        reason = answers[0]["reason"]
        raise RenderError(
            f"evaluation: no image of {name} could be scored, first reason: {reason}; mend it, delete evaluation/{name}, run again"
        )
    return scores


def _details(
    folder: RunFolder, chunks: Mapping[str, Sequence[Chunk]], judge_key: str, config: EvaluationConfig
) -> dict[str, Any]:
    """Return what the figures depend on, and the files they come from."""
    files = {
        name: {
            "images": ["/".join(chunk.images_path) for chunk in of_model],
            "answers": ["/".join(chunk.answers_path(judge_key)) for chunk in of_model],
        }
        for name, of_model in chunks.items()
    }
    any_answers = next(iter(files.values()))["answers"][:1]
    return {
        "scorer": config.dsg_scorer,
        "judge": folder.read_table(any_answers, columns=["judge"])["judge"][0].as_py(),
        "suite": config.suite,
        "seeds": list(config.seeds),
        "sampling": config.sampling.model_dump(),
        "resamples": config.bootstrap_resamples,
        "files": files,
    }


def _stream(
    folder: RunFolder,
    models: Mapping[str, ModelUnderTest],
    pending: Sequence[Chunk],
    config: EvaluationConfig,
    judge_key: str,
    cluster: ClusterConfig,
) -> Iterator[Chunk]:
    """Yield each pending chunk when its images and answers are written."""
    num_cpus = max(config.num_cpus, config.judge.num_cpus)
    num_gpus = config.num_gpus + config.judge.num_gpus
    most = min(config.renderers * len(models), len(pending))
    fitting = max(1, min(most, int(cpu_count() // num_cpus)))
    dataset = ray.data.from_items([{"chunk": index} for index in range(len(pending))], override_num_blocks=len(pending))
    finished = dataset.map_batches(
        EvaluateBatch,
        fn_constructor_args=(folder, dict(models), tuple(pending), config, judge_key),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=fitting, max_size=most),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        **role_options("render", cluster),
    )
    for row in finished.iter_rows():
        if row["error"]:
            raise getattr(errors, row["error_class"])(row["error"])
        yield pending[row["chunk"]]


class EvaluateBatch:
    """The stage as Ray Data calls it: indices of chunks in, the same indices out when they are done."""

    def __init__(
        self,
        folder: RunFolder,
        models: Mapping[str, ModelUnderTest],
        chunks: Sequence[Chunk],
        config: EvaluationConfig,
        judge_key: str,
    ) -> None:
        import torch

        torch.set_num_threads(max(1, int(config.num_cpus)))
        self._chunks = chunks
        self._evaluate = EvaluateChunk(folder, models, config, judge_key)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Errors of ours travel as rows: Ray would hand on their traceback alone."""
        rows: dict[str, list[Any]] = {"chunk": [], "error_class": [], "error": []}
        for index in batch["chunk"]:
            failure = None
            try:
                self._evaluate(self._chunks[int(index)])
            except errors.SelmaError as error:
                failure = error
            rows["chunk"].append(int(index))
            rows["error_class"].append(type(failure).__name__ if failure else "")
            rows["error"].append(str(failure or ""))
        return rows


def _revision(tested: ModelUnderTest) -> str:
    """Return a name for the exact content of a model and its adapter."""
    revision = locate_text_to_image(tested.model.name, tested.model.revision).revision
    if tested.adapter_dir is None:
        return content_id(model=revision, dtype=tested.model.dtype)
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        digest.update(Path(tested.adapter_dir, name).read_bytes())
    return content_id(model=revision, dtype=tested.model.dtype, adapter=digest.hexdigest())
