"""Scores that are a function of the cosine of CLIP's image and text embeddings.

    clipscore   2.5 max(cos, 0), the text after "A photo depicts" (Hessel et al. 2021, section 3)
    pickscore   exp(logit_scale) cos (Kirstain et al. 2023, section 4)
    hpsv2       cos, images padded with black (Wu et al. 2023, section 4); hpsv2.1 is the same of other weights, quoted x100

Shapes: N images and as many prompts, D features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.nn import functional
from transformers import AutoTokenizer, CLIPModel

from selma_ray.errors import JudgeError, first_line
from selma_ray.judging.preferences.preprocessing import Preprocess, crop_evenly, crop_to_floor, pad_to_square, to_pixels
from selma_ray.models.batches import HalvingBatches
from selma_ray.models.locate import locate_judge

__all__ = ["FORMULAS", "ClipFormula", "ClipScorer"]

_VIT_H_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_MAX_TOKENS = 77


@dataclass(frozen=True)
class ClipFormula:
    """One of the scores: its public checkpoint, how text and images enter, and the function of the cosine."""

    checkpoint: str
    tokenizer: str | None
    """Where the tokenizer comes from, if not from the checkpoint's own folder."""
    preprocess: Preprocess
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """From cosines [N] and the logit scale to scores [N]."""
    prefix: str = ""


def _cosine(cosines_N: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return cosines_N


FORMULAS: Mapping[str, ClipFormula] = {
    "clipscore": ClipFormula(
        "openai/clip-vit-base-patch32", None, crop_evenly, lambda cosines_N, _: 2.5 * cosines_N.clamp(min=0), "A photo depicts "
    ),
    "pickscore": ClipFormula(
        "yuvalkirstain/PickScore_v1", _VIT_H_TOKENIZER, crop_to_floor, lambda cosines_N, scale: scale.exp() * cosines_N
    ),
    "hpsv2": ClipFormula("xswu/HPSv2", _VIT_H_TOKENIZER, pad_to_square, _cosine),
    "hpsv2.1": ClipFormula("xswu/HPSv2", _VIT_H_TOKENIZER, pad_to_square, _cosine),
}  # fmt: skip


class ClipScorer:
    """One of `FORMULAS` with a CLIP model, by default its public checkpoint.

    Raises JudgeError where the checkpoint cannot be opened; HPSv2's public files are pickles, which `convert` turns into folders.
    """

    def __init__(
        self, metric: str, model: str | None = None, batch_size: int = 64, device: torch.device | str = "cpu"
    ) -> None:
        self._formula = FORMULAS[metric]
        located = locate_judge(model or self._formula.checkpoint)
        try:
            self._model: Any = CLIPModel.from_pretrained(located.path, use_safetensors=True, dtype=torch.float32)
            self._tokenizer: Any = self._open_tokenizer(located.path, is_public=model is None)
        except (OSError, ValueError, KeyError) as error:
            raise JudgeError(
                f"{metric}: {located.path} cannot be opened ({first_line(error)}); name a folder or hub name of a CLIP model with "
                "safetensors weights, made from a pickled checkpoint by python -m selma_ray.judging.preferences.convert"
            ) from None
        self._device = device
        self._model = self._model.eval().to(self._device)
        self._batches = HalvingBatches(batch_size)
        self.name = f"{metric}:{located.path}@{located.revision}"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Return one score an image and its prompt; it depends on these two alone."""
        return self._batches.map(self._score_batch, list(zip(images, prompts, strict=True)))

    def _open_tokenizer(self, path: str, is_public: bool) -> Any:
        source = self._formula.tokenizer if is_public and self._formula.tokenizer else path
        return AutoTokenizer.from_pretrained(source)

    @torch.inference_mode()
    def _score_batch(self, pairs: Sequence[tuple[Image.Image, str]]) -> list[float]:
        images, prompts = zip(*pairs, strict=True)
        size_px = self._model.config.vision_config.image_size
        pixels_NCHW = torch.from_numpy(to_pixels(images, size_px, self._formula.preprocess)).to(self._device)
        tokens = self._tokenizer(
            [self._formula.prefix + prompt for prompt in prompts],
            padding="max_length", max_length=_MAX_TOKENS, truncation=True, return_tensors="pt",
        ).to(self._device)  # fmt: skip
        image_ND = self._model.get_image_features(pixel_values=pixels_NCHW).pooler_output
        text_ND = self._model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
        cosines_N = functional.cosine_similarity(image_ND, text_ND, dim=-1)
        return self._formula.score(cosines_N, self._model.logit_scale).tolist()
