"""Sentence embeddings: a transformers encoder, mean pooling, unit length, as sentence-transformers' models are used.

Shapes: N sentences, T tokens, D features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from selma_ray.errors import JudgeError, first_line
from selma_ray.models.locate import locate_judge

__all__ = ["SentenceEmbedder"]


class SentenceEmbedder:
    """An encoder such as `sentence-transformers/all-mpnet-base-v2`, from a folder or by hub name."""

    def __init__(self, name: str) -> None:
        located = locate_judge(name)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(located.path)
            self._model: Any = AutoModel.from_pretrained(located.path, use_safetensors=True, dtype=torch.float32).eval()
        except (OSError, ValueError, KeyError) as error:
            raise JudgeError(
                f"sentence embedding model {name} cannot be opened ({first_line(error)}); name a folder or hub name of a "
                "sentence-transformers model with safetensors weights, such as sentence-transformers/all-mpnet-base-v2"
            ) from None
        self.name = f"{name}@{located.revision}"

    @torch.inference_mode()
    def embed(self, sentences: Sequence[str]) -> torch.Tensor:
        """Return embeddings [N, D] of unit length."""
        encoded = self._tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
        states_NTD = self._model(**encoded).last_hidden_state
        keep_NT1 = encoded["attention_mask"][..., None].to(states_NTD.dtype)
        mean_ND = (states_NTD * keep_NT1).sum(1) / keep_NT1.sum(1).clamp(min=1e-9)
        return functional.normalize(mean_ND, dim=1)

    def nearest(self, text: str, candidates: Sequence[str]) -> str:
        """Return the candidate whose embedding has the largest cosine with that of `text`; the first of equals."""
        text_D, *candidates_D = self.embed([text, *candidates])
        return candidates[int((torch.stack(candidates_D) @ text_D).argmax())]
