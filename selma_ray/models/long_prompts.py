"""Prompts longer than CLIP's text encoder: read in chunks, whose states stand one behind the other.

Shapes: N texts, K chunks, T tokens of the encoder, D text width, P pooled width.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from selma_ray.errors import ConfigError

__all__ = ["read_in_chunks"]

_MARKS = 2  # each chunk begins and ends with a mark of its own


def read_in_chunks(pipeline: Any, chunks: int) -> Any:
    """Let a Stable Diffusion or SDXL pipeline read each text in as many chunks, and return it; one chunk changes nothing.

    Every text is encoded as K x T states, however short, so that an image depends on its own prompt alone; SDXL's pooled state is the
    first chunk's. Raises ConfigError for another family, whose encoders are longer.
    """
    if chunks == 1:
        return pipeline
    embed = {"StableDiffusionPipeline": _sd_arguments, "StableDiffusionXLPipeline": _sdxl_arguments}.get(
        type(pipeline).__name__
    )
    if embed is None:
        raise ConfigError(
            f"model.text_chunks must be 1 for {type(pipeline).__name__}, got {chunks}: only Stable Diffusion 1.x, 2.x and XL read a "
            "prompt through CLIP alone"
        )
    own = pipeline.encode_prompt
    signature = inspect.signature(own)

    def encode_prompt(*positional: Any, **named: Any) -> Any:
        bound = signature.bind(*positional, **named)
        bound.apply_defaults()
        asked = bound.arguments
        if asked["prompt_embeds"] is None:
            texts = [asked["prompt"]] if isinstance(asked["prompt"], str) else list(asked["prompt"])
            asked |= embed(pipeline, asked, texts, chunks)
        return own(*bound.args, **bound.kwargs)

    pipeline.encode_prompt = encode_prompt
    pipeline.text_chunks = chunks
    return pipeline


def _sd_arguments(pipeline: Any, asked: dict[str, Any], texts: list[str], chunks: int) -> dict[str, torch.Tensor]:
    """Return the embeddings that encode_prompt would make, in chunks."""

    def embedded(of: Sequence[str]) -> torch.Tensor:
        return _joined(_read(pipeline, "", of, chunks)[0], chunks)

    arguments = {"prompt_embeds": embedded(texts)}
    if asked["do_classifier_free_guidance"] and asked["negative_prompt_embeds"] is None:
        arguments["negative_prompt_embeds"] = embedded(_for_each(asked["negative_prompt"] or "", texts))
    return arguments


def _sdxl_arguments(pipeline: Any, asked: dict[str, Any], texts: list[str], chunks: int) -> dict[str, torch.Tensor]:
    """Return the embeddings that encode_prompt would make, in chunks; it makes those of no negative prompt itself where they are zeros."""

    def embedded(of: Sequence[str], of_second: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = (_read(pipeline, suffix, each, chunks) for suffix, each in (("", of), ("_2", of_second)))
        text_NTD = torch.cat([_joined(each.hidden_states[-2], chunks) for each in (first, second)], dim=-1)
        return text_NTD, second[0].view(len(of), chunks, -1)[:, 0]

    second = asked["prompt_2"] or texts
    text_NTD, pooled_NP = embedded(texts, _for_each(second, texts))
    arguments = {"prompt_embeds": text_NTD, "pooled_prompt_embeds": pooled_NP}
    zeros = asked["negative_prompt"] is None and pipeline.config.force_zeros_for_empty_prompt
    if asked["do_classifier_free_guidance"] and asked["negative_prompt_embeds"] is None and not zeros:
        negative = _for_each(asked["negative_prompt"] or "", texts)
        negatives = embedded(negative, _for_each(asked["negative_prompt_2"] or negative, texts))
        arguments |= dict(zip(("negative_prompt_embeds", "negative_pooled_prompt_embeds"), negatives, strict=True))
    return arguments


def _for_each(text: str | Sequence[str], texts: Sequence[str]) -> Sequence[str]:
    return [text] * len(texts) if isinstance(text, str) else text


def _read(pipeline: Any, suffix: str, texts: Sequence[str], chunks: int) -> Any:
    """Return what a text encoder makes of all chunks, those of one text after another (NK first)."""
    tokenizer, encoder = getattr(pipeline, f"tokenizer{suffix}"), getattr(pipeline, f"text_encoder{suffix}")
    body = tokenizer.model_max_length - _MARKS
    rows, masks = [], []
    for tokens in tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False).input_ids:
        for start in range(0, chunks * body, body):
            marked = [tokenizer.bos_token_id, *tokens[start : min(start + body, chunks * body)], tokenizer.eos_token_id]
            padding = tokenizer.model_max_length - len(marked)
            rows.append(marked + [tokenizer.pad_token_id] * padding)
            masks.append([1] * len(marked) + [0] * padding)
    device = pipeline._execution_device
    masked = torch.tensor(masks, device=device) if getattr(encoder.config, "use_attention_mask", False) else None
    return encoder(
        torch.tensor(rows, device=device), attention_mask=masked, output_hidden_states=bool(suffix) or _is_xl(pipeline)
    )


def _is_xl(pipeline: Any) -> bool:
    return getattr(pipeline, "text_encoder_2", None) is not None


def _joined(states_NKTD: torch.Tensor, chunks: int) -> torch.Tensor:
    """Return the states of a text's chunks one behind the other."""
    rows, tokens, width = states_NKTD.shape
    return states_NKTD.reshape(rows // chunks, chunks * tokens, width)
