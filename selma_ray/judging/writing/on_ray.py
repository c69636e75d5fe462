"""Questions written by a pool of language models on Ray, one pass over all prompts; a pass that was stopped goes on."""

from collections.abc import Sequence
from typing import Any

from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.errors import reason_of
from selma_ray.cluster.placement import role_options
from selma_ray.errors import LLMError
from selma_ray.judging.writing.config import WriterConfig
from selma_ray.judging.writing.files import draft_lines, question_llm
from selma_ray.judging.writing.written import WrittenQuestions
from selma_ray.progress import Progress, Report

__all__ = ["WriteBatches", "write_missing"]

_MAX_RESTARTS = 3  # of an engine that dies; a batch that kills it every time ends the pass


def write_missing(
    prompts: Sequence[str],
    config: WriterConfig,
    written: WrittenQuestions,
    cluster: ClusterConfig,
    report: Report | None = None,
) -> None:
    """Write questions about every prompt that was not asked about yet, in batches of `config.batch_size` in the order given.

    Raises LLMError where the engines cannot start or keep dying.
    """
    import ray.data

    done = written.lines()
    pending = [prompt for prompt in dict.fromkeys(prompts) if prompt not in done]
    count = len(pending)
    if not pending:
        return
    llm = question_llm(config)
    batches = [pending[start : start + config.batch_size] for start in range(0, count, config.batch_size)]
    engine_cpus = llm.num_cpus * llm.tensor_parallel_size
    stream = ray.data.from_items(
        [{"batch": number} for number in range(len(batches))], override_num_blocks=len(batches)
    )
    stream = stream.map_batches(
        WriteBatches,
        fn_constructor_args=(config, written, batches),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(llm.replicas, len(batches))),
        num_cpus=engine_cpus,
        num_gpus=llm.num_gpus * llm.tensor_parallel_size or None,
        max_restarts=_MAX_RESTARTS,
        max_task_retries=_MAX_RESTARTS,
        **role_options("llm", cluster),
    )
    asked = 0
    try:
        for row in stream.iter_rows():
            asked += int(row["prompts"])
            if report:
                report(Progress("questions", asked, count, f"prompts asked about by {llm.name}"))
    except Exception as error:
        raise LLMError(
            f"questions could not be written by {llm.name} ({reason_of(error)}); fix questions.writer.llm and run the same command again"
        ) from error


class WriteBatches:
    """A stage as Ray Data calls it: numbers of batches in, each batch's number of prompts out once its questions are kept."""

    def __init__(self, config: WriterConfig, written: WrittenQuestions, batches: Sequence[Sequence[str]]) -> None:
        from selma_ray.judging.writing.engine import VllmWriter

        self._config = config
        self._written = written
        self._batches = batches
        self._ask = VllmWriter(question_llm(config))
        self._answerer = None
        if config.caption_model is not None:
            from selma_ray.judging.caption_answerer import Seq2SeqAnswerer

            self._answerer = Seq2SeqAnswerer(config.caption_model)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write the questions of the batches with these numbers."""
        counts = []
        for number in batch["batch"]:
            prompts = self._batches[int(number)]
            self._written.add(draft_lines(prompts, self._config, self._ask, self._answerer))
            counts.append(len(prompts))
        return {"prompts": counts}
