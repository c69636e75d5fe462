"""The language model that writes questions: vLLM in this process; the examples that all requests share are prefilled once."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from selma_ray.errors import LLMError, first_line
from selma_ray.judging.writing.config import QuestionLLMConfig
from selma_ray.judging.writing.rounds import Reply, Request
from selma_ray.models.locate import locate_llm
from selma_ray.models.vllm_engine import engine_options, in_process_environment

__all__ = ["VllmWriter"]


class VllmWriter:
    """Answers requests with a language model held in memory; raises LLMError where vLLM cannot run it."""

    def __init__(self, llm: QuestionLLMConfig) -> None:
        os.environ.update(in_process_environment(llm))
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        self._params: Any = SamplingParams
        self._structured: Any = StructuredOutputsParams
        self._settings = llm
        path = locate_llm(llm.name, llm.revision).path
        try:
            self._llm: Any = LLM(model=path, **_engine_options(llm))
        except (OSError, ValueError, RuntimeError) as error:
            raise LLMError(
                f"questions.writer.llm {llm.name} cannot be run by vLLM ({first_line(error)}); name another model or give it more memory"
            ) from None
        self._tokenizer: Any = self._llm.get_tokenizer()

    def __call__(self, requests: Sequence[Request]) -> Mapping[str, Reply]:
        """Return the reply to each request by its key; one that is too long for the model has an error and spares the others."""
        lengths = [len(self._tokenizer.encode(request.text)) for request in requests]
        most = self._settings.max_model_len
        fitting = [request for request, length in zip(requests, lengths, strict=True) if length < most]
        replies = {
            request.key: Reply(
                "", f"the request has {length} tokens, questions.writer.llm.max_model_len={most} are too few"
            )
            for request, length in zip(requests, lengths, strict=True)
            if length >= most
        }
        if fitting:
            outputs = self._llm.generate(
                [request.text for request in fitting], [self._sampling(request) for request in fitting], use_tqdm=False
            )
            replies |= {
                request.key: Reply(output.outputs[0].text) for request, output in zip(fitting, outputs, strict=True)
            }
        return replies

    def _sampling(self, request: Request) -> Any:
        return self._params(**_sampling_options(request, self._settings.max_tokens, self._structured))


def _sampling_options(request: Request, max_tokens: int, structured: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"temperature": request.temperature, "max_tokens": max_tokens}
    if request.temperature:
        options["seed"] = request.seed
    if request.schema:
        options["structured_outputs"] = structured(json=request.schema)
    else:
        # A model that only completes text would go on with another example to its token limit.
        options["stop"] = [request.stop]
    return options


def _engine_options(llm: QuestionLLMConfig) -> dict[str, Any]:
    options = engine_options(llm, seeded=True) | {
        "enable_prefix_caching": True,
        # Between JSON's brackets a weak model would write white space to its token limit.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    return options if llm.num_gpus else options | {"max_num_batched_tokens": llm.max_model_len}
