"""How the answer to a request is sampled: the skill's own settings over the recipe's, and its grammar."""

from collections.abc import Mapping, Sequence
from typing import Any

from selma_ray.prompts.config import LLMConfig, PromptsConfig
from selma_ray.prompts.requests import compose_grammar
from selma_ray.skills import Skill

__all__ = ["RequestSampling", "sampling_settings"]

# What a setting is where nobody sets it: rows of one block share their keys, so all skills get what one of them sets.
_NEUTRAL = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def sampling_settings(skill: Skill, llm: LLMConfig) -> dict[str, Any]:
    """Return a skill's sampling settings, in the words that vLLM and OpenAI's API share."""
    settings = {"temperature": llm.temperature, "top_p": llm.top_p, "max_tokens": llm.max_tokens}
    return settings | skill.sampling.model_dump(exclude_none=True)


class RequestSampling:
    """The sampling parameters of requests (rows of the feed's REQUEST_SCHEMA)."""

    def __init__(self, skills: Sequence[Skill], config: PromptsConfig, chat: bool, grammars: bool = True) -> None:
        settings = {skill.name: sampling_settings(skill, config.llm) for skill in skills}
        neutral = {key: _NEUTRAL[key] for own in settings.values() for key in own if key in _NEUTRAL}
        self._settings = {name: neutral | own for name, own in settings.items()}
        self._grammars = {skill.name: skill.grammar for skill in skills if skill.grammar and grammars}
        self._num_prompts = config.per_request
        self._chat = chat

    def of(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters of one request; its seed makes a repeated request sample the same answer."""
        skill, first_number = request["skill"], request["first_number"]
        sampling = {**self._settings[skill], "seed": request["seed"]}
        if skill in self._grammars:
            grammar = compose_grammar(self._grammars[skill], first_number, self._num_prompts, self._chat)
            sampling["structured_outputs"] = {"grammar": grammar}
        else:
            # A model that only completes text would go on with the list to its token limit.
            sampling["stop"] = [f"\n{first_number + self._num_prompts}."]
        return sampling

    def max_tokens(self, skill: str) -> int:
        """Return the longest answer of a skill, in tokens."""
        return self._settings[skill]["max_tokens"]
