"""How much of a prompt a model reads: tokens beyond its text encoder's length are cut, in silence, by every pipeline."""

import json
import logging
from collections.abc import Sequence
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
_MOST_TOKENS_OF = {"StableDiffusion3Pipeline": 256}
_BATCH = 1000


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
    tokenizer, limit = _longest(tokenizers, type(pipeline).__name__, getattr(pipeline, "text_chunks", 1))
    return _lengths(tokenizer, [text])[0], limit


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
    lengths = [length for start in starts for length in _lengths(tokenizer, prompts[start : start + _BATCH])]
    return PromptLengths(len(lengths), sum(length > limit for length in lengths), limit, max(lengths, default=0))


def tokens_seen(limit: int, chunks: int) -> int:
    """Return how many tokens of a text an encoder of `limit` tokens sees in chunks, each of which has a mark at either end."""
    return chunks * (limit - 2) + 2


def _longest(tokenizers: Sequence[Any], pipeline_class: str, chunks: int) -> tuple[Any, int]:
    most = _MOST_TOKENS_OF.get(pipeline_class, _MOST_TOKENS)
    tokenizer = max(tokenizers, key=lambda each: min(each.model_max_length, most))
    return tokenizer, tokens_seen(min(tokenizer.model_max_length, most), chunks)


def _lengths(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    return list(map(len, tokenizer(list(texts), truncation=False, verbose=False).input_ids)) if texts else []


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
