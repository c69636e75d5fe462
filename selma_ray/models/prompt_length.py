"""How much of a prompt a model reads: tokens beyond its text encoder's length are cut, in silence, by every pipeline."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selma_ray.errors import first_line
from selma_ray.models.config import ModelConfig
from selma_ray.models.hub import hub_file
from selma_ray.models.locate import locate_text_to_image

__all__ = ["PromptLengths", "count_tokens", "prompt_lengths", "tokens_seen"]

logger = logging.getLogger(__name__)

_TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
_MOST_TOKENS = 512
# What diffusers' pipelines cut a text to where the tokenizer allows more, or says nothing.
_MOST_TOKENS_OF = {"StableDiffusion3Pipeline": 256, "SanaPipeline": 300}
_BATCH = 1000


def _as_user(tokenizer: Any, text: str, **thinking: bool) -> str:
    messages = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **thinking))


# What pipelines put around a prompt, whose tokens count too; they cut at _MOST_TOKENS whatever the tokenizer allows.
_WRAPPED: Mapping[str, Callable[[Any, str], str]] = {
    "ZImagePipeline": lambda tokenizer, text: _as_user(tokenizer, text, enable_thinking=True),
    "Flux2KleinPipeline": lambda tokenizer, text: _as_user(tokenizer, text, enable_thinking=False),
    "QwenImagePipeline": lambda _, text: f"{text}<|im_end|>\n<|im_start|>assistant\n",
}


@dataclass(frozen=True)
class PromptLengths:
    """How many of some prompts are longer than what a model sees of them."""

    prompts: int
    cut: int
    """Prompts of which the model does not see the end."""
    limit: int
    """Tokens that the model sees, marks included: those of its longest encoder."""
    longest: int
    """Tokens of the longest prompt."""


def count_tokens(pipeline: Any, text: str) -> tuple[int, int]:
    """Return how many tokens a text has for a loaded pipeline, marks included, and how many of them it sees: its longest encoder's."""
    tokenizers = [each for name in _TOKENIZERS if (each := getattr(pipeline, name, None)) is not None]
    pipeline_class = type(pipeline).__name__
    tokenizer, limit = _longest(tokenizers, pipeline_class, getattr(pipeline, "text_chunks", 1))
    return _lengths(tokenizer, [text], pipeline_class)[0], limit


def prompt_lengths(model: ModelConfig, prompts: Sequence[str]) -> PromptLengths | None:
    """Return how a model's own tokenizers count prompts; of the model nothing else is read. None, with a warning, without them."""
    try:
        tokenizers, pipeline_class = _tokenizers(model)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("prompts of %s are not counted in tokens: %s", model.name, first_line(error))
        return None
    if not tokenizers:
        return None
    tokenizer, limit = _longest(tokenizers, pipeline_class, model.text_chunks)
    starts = range(0, len(prompts), _BATCH)
    batches = (prompts[start : start + _BATCH] for start in starts)
    lengths = [length for batch in batches for length in _lengths(tokenizer, batch, pipeline_class)]
    return PromptLengths(len(lengths), sum(length > limit for length in lengths), limit, max(lengths, default=0))


def tokens_seen(limit: int, chunks: int) -> int:
    """Return how many tokens of a text an encoder of `limit` tokens sees in chunks, each of which has a mark at either end."""
    return chunks * (limit - 2) + 2


def _longest(tokenizers: Sequence[Any], pipeline_class: str, chunks: int) -> tuple[Any, int]:
    if pipeline_class in _WRAPPED:
        return tokenizers[0], _MOST_TOKENS
    most = _MOST_TOKENS_OF.get(pipeline_class, _MOST_TOKENS)
    tokenizer = max(tokenizers, key=lambda each: min(each.model_max_length, most))
    return tokenizer, tokens_seen(min(tokenizer.model_max_length, most), chunks)


def _lengths(tokenizer: Any, texts: Sequence[str], pipeline_class: str) -> list[int]:
    if not texts:
        return []
    wrap = _WRAPPED.get(pipeline_class, lambda _, text: text)
    read = [wrap(tokenizer, text) for text in texts]
    return list(map(len, tokenizer(read, truncation=False, verbose=False).input_ids))


def _tokenizers(model: ModelConfig) -> tuple[list[Any], str]:
    from transformers import AutoTokenizer

    located = locate_text_to_image(model.name, model.revision)
    index = Path(located.path) / "model_index.json"
    if not index.is_file():
        index = hub_file("model.name", located.path, "model_index.json", model.revision)
    parts = json.loads(index.read_text())
    names = [name for name in _TOKENIZERS if (parts.get(name) or [None])[0] is not None]
    loaded = [AutoTokenizer.from_pretrained(located.path, subfolder=name, revision=model.revision) for name in names]
    return loaded, parts["_class_name"]
