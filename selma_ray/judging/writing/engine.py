"""The language model that writes questions: vLLM, run by Ray Data; the shared examples of all requests are prefilled once."""

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.data import TaskPoolStrategy

from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.placement import role_options
from selma_ray.errors import first_line
from selma_ray.judging.writing.config import QuestionLLMConfig, QuestionsConfig
from selma_ray.judging.writing.rounds import Ask, Reply, Request
from selma_ray.models.locate import locate_llm
from selma_ray.models.vllm_engine import engine_bundle, engine_environment, engine_options

__all__ = ["vllm_replies"]

_ERROR_CHARS = 200


def vllm_replies(config: QuestionsConfig, cluster: ClusterConfig) -> Ask:
    """Return a function that answers requests with vLLM; each call of it is one Ray Data execution."""

    def ask(requests: Sequence[Request]) -> Mapping[str, Reply]:
        processor = _processor(config, cluster)
        rows = [vars(request) | {"schema": request.schema or ""} for request in requests]
        dataset = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // config.batch_size))
        return {row["key"]: _reply(row) for row in processor(dataset).iter_rows()}

    return ask


def _processor(config: QuestionsConfig, cluster: ClusterConfig) -> Any:
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    llm = config.llm
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=locate_llm(llm.name, llm.revision).path,
            engine_kwargs=_engine_options(llm),
            batch_size=config.batch_size,
            concurrency=(1, llm.replicas),
            placement_group_config={"bundle_per_worker": engine_bundle(llm)},
            runtime_env={"env_vars": engine_environment(llm)},
            should_continue_on_error=True,
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
            log_engine_metrics=False,
        ),
        preprocess=_Preprocess(llm.max_tokens),
        postprocess=_postprocess,
        # With these options they run inside the stages beside them: the source and the stage that decides.
        preprocess_map_kwargs={"num_cpus": 0, "compute": TaskPoolStrategy(size=1)},
        postprocess_map_kwargs={"num_cpus": 0},
    )
    for name in processor.list_stage_names():
        processor.get_stage_by_name(name).map_batches_kwargs.update(role_options("llm", cluster))
    return processor


class _Preprocess:
    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        sampling: dict[str, Any] = {"temperature": row["temperature"], "max_tokens": self._max_tokens}
        if row["temperature"]:
            sampling["seed"] = row["seed"]
        if row["schema"]:
            sampling["structured_outputs"] = {"json": row["schema"]}
        else:
            # A model that only completes text would go on with another example to its token limit.
            sampling["stop"] = [row["stop"]]
        return {"prompt": row["text"], "sampling_params": sampling}


def _postprocess(row: dict[str, Any]) -> dict[str, Any]:
    return {"key": row["key"], "answer": row["generated_text"]}


def _reply(row: Mapping[str, Any]) -> Reply:
    error = row.get("__inference_error__")
    if error:
        return Reply("", first_line(str(error))[:_ERROR_CHARS])
    return Reply(row["answer"] or "")


def _engine_options(llm: QuestionLLMConfig) -> dict[str, Any]:
    options = engine_options(llm, seeded=True) | {
        "enable_prefix_caching": True,
        # Between JSON's brackets a weak model would write white space to its token limit.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    return options if llm.num_gpus else options | {"max_num_batched_tokens": llm.max_model_len}
