"""ImageReward (Xu et al. 2023, section 3) on transformers' BLIP: the image is read by the prompt's encoder, its first state is scored.

Shapes: N images and as many prompts, T tokens, P patches, D features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoTokenizer,
    BlipTextConfig,
    BlipVisionConfig,
    BlipVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.blip.modeling_blip_text import BlipTextModel

from selma_ray.errors import JudgeError, first_line
from selma_ray.judging.preferences.preprocessing import crop_evenly, to_pixels
from selma_ray.models.batches import HalvingBatches
from selma_ray.models.locate import locate_judge

__all__ = ["CHECKPOINT", "ImageRewardConfig", "ImageRewardModel", "ImageRewardScorer"]

CHECKPOINT = "THUDM/ImageReward"

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
_MAX_TOKENS = 35


class ImageRewardConfig(PreTrainedConfig):
    """Sizes of the two encoders, in transformers' words; the public checkpoint's by default."""

    model_type = "selma_image_reward"

    def __init__(self, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # BLIP's vision encoder normalises with 1e-6 (timm), where transformers' own default differs.
        self.vision = vision or {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6,
        }  # fmt: skip
        self.text = text or {
            "vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": 1024, "intermediate_size": 3072,
            "num_hidden_layers": 12, "num_attention_heads": 12,
        }  # fmt: skip


class ImageRewardModel(PreTrainedModel):
    """A BLIP vision encoder, a text encoder with cross-attention to it, and linear layers on the first text state."""

    config_class = ImageRewardConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ImageRewardConfig) -> None:
        super().__init__(config)
        self.visual_encoder = BlipVisionModel(BlipVisionConfig(**config.vision))
        self.text_encoder = BlipTextModel(BlipTextConfig(**config.text), add_pooling_layer=False)
        self.mlp = _Reward(config.text["hidden_size"])
        self.post_init()

    def forward(self, pixels_NCHW: torch.Tensor, tokens_NT: torch.Tensor, keep_NT: torch.Tensor) -> torch.Tensor:
        """Return rewards [N], normalised as the release does."""
        patches_NPD = self.visual_encoder(pixel_values=pixels_NCHW).last_hidden_state
        states_NTD = self.text_encoder(
            input_ids=tokens_NT, attention_mask=keep_NT, encoder_hidden_states=patches_NPD,
            encoder_attention_mask=torch.ones(patches_NPD.shape[:2], dtype=torch.long, device=patches_NPD.device),
        ).last_hidden_state  # fmt: skip
        return (self.mlp(states_NTD[:, 0]).squeeze(-1) - _MEAN) / _STD


class _Reward(nn.Module):
    """The release's layers: linear, without activations; dropout keeps the names of its weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1),
            nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, states_ND: torch.Tensor) -> torch.Tensor:
        """Return unnormalised rewards [N, 1]."""
        return self.layers(states_ND)


class ImageRewardScorer:
    """Scores images against prompts with a folder that `convert` made; the public checkpoint is a pickle and is refused."""

    def __init__(self, model: str | None = None, batch_size: int = 64, device: torch.device | str = "cpu") -> None:
        located = locate_judge(model or CHECKPOINT)
        try:
            self._model: Any = ImageRewardModel.from_pretrained(located.path, use_safetensors=True, dtype=torch.float32)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(located.path)
        except (OSError, ValueError, KeyError) as error:
            raise JudgeError(
                f"imagereward: {located.path} cannot be opened ({first_line(error)}); the public ImageReward.pt is a pickle: convert it "
                "once with python -m selma_ray.judging.preferences.convert imagereward ImageReward.pt FOLDER and name the folder"
            ) from None
        self._device = device
        self._model = self._model.eval().to(self._device)
        self._batches = HalvingBatches(batch_size)
        self.name = f"imagereward:{located.path}@{located.revision}"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Return one reward an image and its prompt, whose tokens beyond the 35th are not read."""
        return self._batches.map(self._score_batch, list(zip(images, prompts, strict=True)))

    @torch.inference_mode()
    def _score_batch(self, pairs: Sequence[tuple[Image.Image, str]]) -> list[float]:
        images, prompts = zip(*pairs, strict=True)
        pixels_NCHW = torch.from_numpy(to_pixels(images, self._model.config.vision["image_size"], crop_evenly))
        tokens = self._tokenizer(
            list(prompts), padding="max_length", max_length=_MAX_TOKENS, truncation=True, return_tensors="pt"
        ).to(self._device)
        return self._model(pixels_NCHW.to(self._device), tokens["input_ids"], tokens["attention_mask"]).tolist()
