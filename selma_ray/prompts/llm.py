"""The language model of the stream: the engine that the recipe chooses, and what its failures mean."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ray.data import Dataset

from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.errors import actor_failure, causes_of, known_error
from selma_ray.errors import ConfigError, LLMError
from selma_ray.models.locate import locate_llm
from selma_ray.prompts.config import LLMConfig, PromptsConfig
from selma_ray.prompts.free import free_stage
from selma_ray.prompts.remote import remote_stage
from selma_ray.prompts.vllm_engine import chat_template_of, release_engines, vllm_stage
from selma_ray.skills import Skill

__all__ = ["LLMStage", "answer_stage", "check_llm", "llm_errors"]

# From requests (skill, request, seed, text, first_number) to answers (skill, request, answer, truncated).
LLMStage = Callable[[Dataset], Dataset]

_ENGINE_STAGES = ("vLLMEngineStage", "HttpRequest", "AnswerAtNoCost")


def check_llm(llm: LLMConfig) -> None:
    """Raise a ConfigError where the recipe's language model cannot be used."""
    if llm.engine == "vllm":
        locate_llm(llm.name, llm.revision)
        chat_template_of(llm)
    key_env = llm.remote.api_key_env
    if llm.engine == "remote" and key_env and not os.environ.get(key_env):
        raise ConfigError(f"prompts.llm.remote.api_key_env names {key_env}, which is not set; export it")


def answer_stage(skills: Sequence[Skill], config: PromptsConfig, cluster: ClusterConfig, batch_size: int) -> LLMStage:
    """Return the stage that answers requests, `batch_size` a task, with the engine that the recipe chooses."""
    stages = {"vllm": vllm_stage, "remote": remote_stage, "free": free_stage}
    return stages[config.llm.engine](skills, config, cluster, batch_size)


@contextmanager
def llm_errors(llm: LLMConfig) -> Iterator[None]:
    """Raise LLMError where a stream ends because its engines died too often, or its server refuses or cannot be reached.

    When the stream has ended, whatever its engines reserved is given back.
    """
    try:
        yield
    except Exception as error:
        known = known_error(error)
        if isinstance(known, LLMError):
            raise known from error
        explanation = _explained(llm, error)
        if explanation is None:
            raise
        raise LLMError(explanation) from error
    finally:
        release_engines()


def _explained(llm: LLMConfig, error: Exception) -> str | None:
    """Return one line for people, or None where the failure is another's."""
    if any("Reached maximum retries" in str(link) for link in causes_of(error)):
        return (
            f"prompts.llm.remote.url {llm.remote.url} did not answer a request that was tried {llm.remote.max_retries + 1} times; "
            "start the server or fix the address, then run the same command again"
        )
    failure = actor_failure(error, *_ENGINE_STAGES)
    if failure is None:
        return None
    if failure.could_not_start:
        return f"an engine of the language model {llm.name} cannot start: {failure.reason}; fix the settings of prompts.llm"
    return (
        f"an engine of the language model {llm.name} died again after prompts.llm.max_restarts={llm.max_restarts} restarts; "
        "give it more memory or a smaller max_model_len, or raise max_restarts, then run the same command again"
    )
