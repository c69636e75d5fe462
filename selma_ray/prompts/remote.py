"""A server that speaks OpenAI's API as the language model of the stream, asked by ray.data.llm's HTTP processor."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy

from selma_ray.cluster.config import ClusterConfig
from selma_ray.errors import LLMError
from selma_ray.prompts.config import PromptsConfig
from selma_ray.prompts.requests import chat_message
from selma_ray.prompts.sampling import RequestSampling
from selma_ray.prompts.vllm_engine import build_quietly
from selma_ray.skills import Skill

__all__ = ["remote_stage"]


def remote_stage(
    skills: Sequence[Skill], config: PromptsConfig, cluster: ClusterConfig, batch_size: int
) -> Callable[[Dataset], Dataset]:
    """Return a stage that sends each request to the server of the recipe, as many at once as the windows allow."""
    from ray.data.llm import HttpRequestProcessorConfig

    remote, chat = config.llm.remote, config.llm.chat is not False
    tasks_in_flight = max(1, -(-config.requests_in_flight * len(skills) // batch_size))
    processor = build_quietly(
        HttpRequestProcessorConfig(
            url=f"{remote.url.rstrip('/')}/{'chat/completions' if chat else 'completions'}",
            # The processor sends the requests of a batch one after another, but batches at once.
            batch_size=1,
            max_retries=remote.max_retries,
            session_factory=_OpenSession(remote.api_key_env, remote.timeout_s),
            http_request_stage={"num_cpus": 0},
        ),
        preprocess=_Preprocess(skills, config, chat),
        postprocess=_Postprocess(remote.url, chat),
        preprocess_map_kwargs={"num_cpus": 0, "compute": TaskPoolStrategy(size=1)},
        postprocess_map_kwargs={"num_cpus": 0},
    )
    processor.get_stage_by_name("HttpRequestStage").map_batches_kwargs.update(
        compute=ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=tasks_in_flight),
        max_concurrency=tasks_in_flight,
        max_restarts=config.llm.max_restarts,
    )
    return processor


class _OpenSession:
    """Opens HTTP sessions that send the API key; the key is never written into a recipe, an address or a message."""

    def __init__(self, api_key_env: str | None, timeout_s: float) -> None:
        self._key = os.environ[api_key_env] if api_key_env else None
        self._timeout_s = timeout_s

    def __call__(self) -> Any:
        import aiohttp

        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=self._timeout_s))


class _Preprocess:
    def __init__(self, skills: Sequence[Skill], config: PromptsConfig, chat: bool) -> None:
        self._sampling = RequestSampling(skills, config, chat, grammars=config.llm.remote.grammars)
        self._model = config.llm.name
        self._template_kwargs = config.llm.remote.chat_template_kwargs
        self._num_prompts = config.per_request
        self._chat = chat

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        payload: dict[str, Any] = {"model": self._model, **self._sampling.of(row)}
        if self._chat:
            message = chat_message(row["text"], row["first_number"], self._num_prompts)
            payload["messages"] = [{"role": "user", "content": message}]
            if self._template_kwargs:
                payload["chat_template_kwargs"] = self._template_kwargs
        else:
            payload["prompt"] = row["text"]
        return {"skill": row["skill"], "request": row["request"], "payload": payload}


class _Postprocess:
    def __init__(self, url: str, chat: bool) -> None:
        self._url = url
        self._chat = chat

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Read the server's response; raises LLMError where it is an error, or no completion."""
        response = row["http_response"]
        choices = response.get("choices")
        if choices is None or not len(choices):
            error = response.get("error") or response
            message = error.get("message", error) if isinstance(error, dict) else error
            raise LLMError(
                f"prompts.llm.remote.url {self._url} refused a request: {' '.join(str(message).split())[:300]}; "
                "fix prompts.llm.name, the API key or the settings that it names"
            )
        choice = choices[0]
        text = (choice["message"]["content"] if self._chat else choice["text"]) or ""
        text = text.encode(errors="replace").decode()  # an emoji cut in half at the token limit cannot be written
        return {
            "skill": row["skill"],
            "request": row["request"],
            # A chat's answer begins on a line of its own.
            "answer": f"\n{text}" if self._chat else text,
            "truncated": choice["finish_reason"] == "length",
        }
