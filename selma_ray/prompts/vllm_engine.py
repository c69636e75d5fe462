"""vLLM as the language model of the stream, run by Ray Data."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.data import Dataset, TaskPoolStrategy
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.placement import role_options
from selma_ray.errors import ConfigError, ModelNotFoundError, first_line
from selma_ray.json_lines import ENCODING
from selma_ray.models.locate import locate_llm
from selma_ray.models.thinking import NO_THINKING
from selma_ray.models.vllm_engine import engine_bundle, engine_environment, engine_options
from selma_ray.prompts.config import LLMConfig, PromptsConfig
from selma_ray.prompts.requests import chat_message
from selma_ray.prompts.sampling import RequestSampling
from selma_ray.skills import Skill

__all__ = ["build_quietly", "chat_template_of", "release_engines", "speaks_chat", "vllm_stage"]

_groups: list[PlacementGroup] = []  # of the stream that runs in this process


def vllm_stage(
    skills: Sequence[Skill], config: PromptsConfig, cluster: ClusterConfig, batch_size: int
) -> Callable[[Dataset], Dataset]:
    """Return a stage that answers requests with vLLM, `batch_size` a task and as many tasks as the windows allow."""
    from ray.data.llm import vLLMEngineProcessorConfig

    llm = config.llm
    path = locate_llm(llm.name, llm.revision).path
    chat = speaks_chat(llm, path)
    tasks_in_flight = config.blocks_per_engine(len(skills))
    processor_config = vLLMEngineProcessorConfig(
        model_source=path,
        engine_kwargs=engine_options(llm, seeded=True) | llm.engine_options,
        batch_size=batch_size,
        max_concurrent_batches=tasks_in_flight,
        max_tasks_in_flight_per_actor=tasks_in_flight,
        concurrency=(llm.min_replicas, llm.max_replicas),
        placement_group_config={"bundle_per_worker": engine_bundle(llm)},
        runtime_env={"env_vars": engine_environment(llm)},
        chat_template_stage=_template_stage(llm) if chat else False,
        tokenize_stage=False,
        detokenize_stage=False,
        log_engine_metrics=False,
    )
    processor = build_quietly(
        processor_config,
        preprocess=_Preprocess(skills, config, chat),
        postprocess=_Postprocess(skills, config, chat),
        # Requests are prepared inside the source; answers in one task at a time, as each task more would start a process.
        preprocess_map_kwargs={"num_cpus": 0, "compute": TaskPoolStrategy(size=1)},
        postprocess_map_kwargs={"num_cpus": 0, "compute": TaskPoolStrategy(size=1)},
    )
    for name, stage in list(processor.stages.items()):
        if (
            "model" in stage.fn_constructor_kwargs
        ):  # a copy: assigning to a stage computes its resources anew, with a GPU
            found = _finding_its_model(stage.fn, llm.name, llm.revision)
            processor.stages[name] = stage.model_copy(update={"fn": found})
    engine = processor.get_stage_by_name("vLLMEngineStage").map_batches_kwargs
    # Ray Data starts dead actors anew for ever.
    engine["max_restarts"] = llm.max_restarts
    pipeline_size = llm.engine_options.get("pipeline_parallel_size", 1)
    num_workers = llm.tensor_parallel_size * pipeline_size
    if num_workers > 1:
        bundles = [engine_bundle(llm)] * num_workers
        # Tensors that are split over nodes wait for the network in every layer; layers may be on several nodes.
        strategy = "STRICT_PACK" if pipeline_size == 1 else "PACK"
        engine["ray_remote_args_fn"] = partial(_place_workers, bundles, role_options("llm", cluster), strategy)
    else:
        engine.update(role_options("llm", cluster))
    return processor


def release_engines() -> None:
    """Give back what split engines reserved: Ray keeps a placement group until the driver ends, whoever stood in it."""
    while _groups:
        ray.util.remove_placement_group(_groups.pop())


def _place_workers(bundles: list[dict[str, float]], role: dict[str, Any], strategy: str) -> dict[str, Any]:
    """Return the Ray options of an engine whose workers stand in a placement group of its own, on nodes of the role alone."""
    selector = role.get("label_selector")
    group = ray.util.placement_group(
        bundles, strategy=strategy, bundle_label_selector=[selector] * len(bundles) if selector else None
    )
    _groups.append(group)
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)}


def speaks_chat(llm: LLMConfig, path: str) -> bool:
    """Tell whether requests are made in the chat form; raises ConfigError where the model at `path` knows none."""
    if llm.chat is False or llm.chat_template:
        return llm.chat is not False
    from transformers import AutoTokenizer

    try:
        has_template = AutoTokenizer.from_pretrained(path, revision=llm.revision).chat_template is not None
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"the tokenizer of prompts.llm.name {llm.name} cannot be loaded ({first_line(error)}); fix the name, log in to the hub, "
            "or give a folder"
        ) from None
    if llm.chat and not has_template:
        raise ConfigError(
            f"prompts.llm.chat is true, but the tokenizer of {llm.name} has no chat template; "
            "set prompts.llm.chat_template to a file, or chat=false"
        )
    return has_template


def chat_template_of(llm: LLMConfig) -> str | None:
    """Return the recipe's own chat template; raises ConfigError where its file cannot be read."""
    if llm.chat_template is None:
        return None
    try:
        return Path(llm.chat_template).expanduser().read_text(encoding=ENCODING)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"prompts.llm.chat_template {llm.chat_template} cannot be read ({error}); name a text file"
        ) from None


def _finding_its_model(stage: type, name: str, revision: str | None) -> type:
    """Return a stage of Ray Data that looks for its model on the node where it runs, whose folders may not be the driver's."""

    class FindingItsModel(stage):
        def __init__(self, *positional: Any, model: str, **options: Any) -> None:
            super().__init__(*positional, model=locate_llm(name, revision).path, **options)

    FindingItsModel.__name__ = FindingItsModel.__qualname__ = stage.__name__
    return FindingItsModel


def _template_stage(llm: LLMConfig) -> dict[str, Any]:
    return {
        "num_cpus": 0,
        "concurrency": (1, 1),
        "chat_template": chat_template_of(llm),
        "chat_template_kwargs": NO_THINKING,
    }


def build_quietly(config: Any, **options: Any) -> Any:
    """Build a processor without its log messages, and restore Ray's log level, which it changes."""
    from ray.data.llm import build_processor

    level = logging.getLogger("ray").level
    logging.disable(logging.INFO)
    try:
        return build_processor(config, **options)
    finally:
        logging.disable(logging.NOTSET)
        logging.getLogger("ray").setLevel(level)


class _Preprocess:
    def __init__(self, skills: Sequence[Skill], config: PromptsConfig, chat: bool) -> None:
        self._sampling = RequestSampling(skills, config, chat)
        self._num_prompts = config.per_request
        self._chat = chat

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        asked: dict[str, Any] = {"prompt": row["text"]}
        if self._chat:
            message = chat_message(row["text"], row["first_number"], self._num_prompts)
            asked = {"messages": [{"role": "user", "content": message}]}
        return {**asked, "sampling_params": self._sampling.of(row)}


class _Postprocess:
    def __init__(self, skills: Sequence[Skill], config: PromptsConfig, chat: bool) -> None:
        self._sampling = RequestSampling(skills, config, chat)
        self._chat = chat

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {
            "skill": row["skill"],
            "request": row["request"],
            # A chat's answer begins on a line of its own.
            "answer": "\n" + row["generated_text"] if self._chat else row["generated_text"],
            "truncated": row["num_generated_tokens"] >= self._sampling.max_tokens(row["skill"]),
        }
