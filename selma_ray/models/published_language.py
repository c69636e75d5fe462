"""Configurations of the language models that the shipped recipes name, with eyes or without, so that a plan of them needs no network.

Only what their size depends on is here, as their authors published it.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["PUBLISHED_LANGUAGE", "published_language_config"]

_QWEN3_TEXT = {
    "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN3_VISION = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096,
    "deepstack_visual_indexes": [8, 16, 24],
}  # fmt: skip

# transformers' class of the configuration and of the model, and what the configuration says.
PUBLISHED_LANGUAGE: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen/Qwen3-8B": ("Qwen3Config", "Qwen3ForCausalLM", _QWEN3_TEXT),
    "Qwen/Qwen3-4B": (
        "Qwen3Config",
        "Qwen3ForCausalLM",
        _QWEN3_TEXT | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    ),
    "Qwen/Qwen3-VL-8B-Instruct": (
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        {"text_config": _QWEN3_TEXT, "vision_config": _QWEN3_VISION, "tie_word_embeddings": False},
    ),
    "Qwen/Qwen3-VL-2B-Instruct": (
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": _QWEN3_TEXT
            | {
                "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144,
                "tie_word_embeddings": True,
            },
            "vision_config": _QWEN3_VISION
            | {
                "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2048,
                "deepstack_visual_indexes": [5, 11, 17],
            },
            "tie_word_embeddings": True,
        },
    ),
    "meta-llama/Meta-Llama-3-8B-Instruct": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip


def published_language_config(name: str) -> Any:
    """Return transformers' configuration of a model of PUBLISHED_LANGUAGE."""
    import transformers

    config_class, model_class, settings = PUBLISHED_LANGUAGE[name]
    return getattr(transformers, config_class)(**settings, architectures=[model_class])
