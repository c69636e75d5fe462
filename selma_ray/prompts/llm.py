"""The language model of the stream: vLLM, run by Ray Data, or what the recipe puts in its place."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from ray.data import Dataset, TaskPoolStrategy

from selma_ray.cluster import ClusterConfig, role_options, thread_env
from selma_ray.models.locate import locate_llm
from selma_ray.prompts.config import LLMConfig, PromptsConfig
from selma_ray.prompts.free import free_stage
from selma_ray.prompts.requests import compose_grammar
from selma_ray.skills import Skill

__all__ = ["LLMStage", "answer_stage", "check_llm"]

# From requests (skill, request, seed, text, first_number) to answers (skill, request, answer, truncated).
LLMStage = Callable[[Dataset], Dataset]


def check_llm(llm: LLMConfig) -> None:
    """Raise a ConfigError where the recipe's language model cannot be used."""
    if llm.engine == "vllm":
        locate_llm(llm.name, llm.revision)


def answer_stage(skills: Sequence[Skill], config: PromptsConfig, cluster: ClusterConfig, batch_size: int) -> LLMStage:
    """Return the stage that answers requests, `batch_size` a task, with the engine that the recipe chooses."""
    stages = {"vllm": vllm_stage, "free": free_stage}
    return stages[config.llm.engine](skills, config, cluster, batch_size)


def vllm_stage(skills: Sequence[Skill], config: PromptsConfig, cluster: ClusterConfig, batch_size: int) -> LLMStage:
    """Return a stage that answers requests with vLLM, `batch_size` a task and as many tasks as the windows allow."""
    from ray.data.llm import vLLMEngineProcessorConfig

    llm = config.llm
    tasks_in_flight = max(1, -(-config.requests_in_flight * len(skills) // batch_size))
    processor_config = vLLMEngineProcessorConfig(
        model_source=locate_llm(llm.name, llm.revision).path,
        engine_kwargs=_engine_options(llm),
        batch_size=batch_size,
        max_concurrent_batches=tasks_in_flight,
        max_tasks_in_flight_per_actor=tasks_in_flight,
        concurrency=(llm.min_replicas, llm.max_replicas),
        placement_group_config={"bundle_per_worker": _bundle(llm)},
        runtime_env={"env_vars": _environment(llm)},
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        log_engine_metrics=False,
    )
    processor = _build_quietly(
        processor_config,
        preprocess=_Preprocess(skills, config),
        postprocess=_Postprocess(llm.max_tokens),
        # With these options they run inside the stages beside them: the source and the stage that decides.
        preprocess_map_kwargs={"num_cpus": 0, "compute": TaskPoolStrategy(size=1)},
        postprocess_map_kwargs={"num_cpus": 0},
    )
    for name in processor.list_stage_names():
        processor.get_stage_by_name(name).map_batches_kwargs.update(role_options("llm", cluster))
    return processor


def _build_quietly(config: Any, **options: Any) -> Any:
    """Build a processor without its remarks, and undo that it sets Ray's log level."""
    from ray.data.llm import build_processor

    level = logging.getLogger("ray").level
    logging.disable(logging.INFO)
    try:
        return build_processor(config, **options)
    finally:
        logging.disable(logging.NOTSET)
        logging.getLogger("ray").setLevel(level)


class _Preprocess:
    def __init__(self, skills: Sequence[Skill], config: PromptsConfig) -> None:
        self._sampling = {
            "temperature": config.llm.temperature,
            "top_p": config.llm.top_p,
            "max_tokens": config.llm.max_tokens,
        }
        self._grammars = {skill.name: skill.grammar for skill in skills if skill.grammar}
        self._num_prompts = config.per_request

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        sampling = {**self._sampling, "seed": row["seed"]}
        grammar = self._grammars.get(row["skill"])
        if grammar:
            answer_grammar = compose_grammar(grammar, row["first_number"], self._num_prompts)
            sampling["structured_outputs"] = {"grammar": answer_grammar}
        else:
            # A model that only completes text would go on with the list to its token limit.
            sampling["stop"] = [f"\n{row['first_number'] + self._num_prompts}."]
        return {"prompt": row["text"], "sampling_params": sampling}


class _Postprocess:
    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {
            "skill": row["skill"],
            "request": row["request"],
            "answer": row["generated_text"],
            "truncated": row["num_generated_tokens"] >= self._max_tokens,
        }


def _engine_options(llm: LLMConfig) -> dict[str, Any]:
    options: dict[str, Any] = {
        "dtype": llm.dtype,
        "max_model_len": llm.max_model_len,
        "tensor_parallel_size": llm.tensor_parallel_size,
        "disable_log_stats": True,
    }
    if llm.revision:
        options["revision"] = llm.revision
    if not llm.num_gpus:
        options["enforce_eager"] = True  # Compiling costs more time than it saves on the CPU.
        # vLLM steps a seeded request's generator back after a partial prefill, which a CPU generator cannot do: the engine dies.
        options["enable_chunked_prefill"] = False
    return options


def _bundle(llm: LLMConfig) -> dict[str, float]:
    return {"CPU": llm.num_cpus} | ({"GPU": llm.num_gpus} if llm.num_gpus else {})


def _environment(llm: LLMConfig) -> dict[str, str]:
    if llm.num_gpus:
        return {}
    return {"VLLM_CPU_KVCACHE_SPACE": str(llm.kv_cache_gb), **thread_env(max(1, int(llm.num_cpus)))}
