"""From the pickled checkpoints that HPSv2 and ImageReward publish to folders of safetensors.

    python -m selma_ray.judging.preferences.convert hpsv2 HPS_v2.1_compressed.pt FOLDER
    python -m selma_ray.judging.preferences.convert imagereward ImageReward.pt FOLDER

The pickle is read by torch's restricted unpickler (weights_only), which builds tensors and plain containers and runs no code of
the file; a file that asks for anything else is refused. Nothing else in selma_ray reads pickles.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from selma_ray.errors import JudgeError, SelmaError, first_line, last_line
from selma_ray.judging.preferences.image_reward import ImageRewardConfig, ImageRewardModel

__all__ = [
    "clip_from_open_clip",
    "convert_hpsv2",
    "convert_imagereward",
    "image_reward_from_release",
    "main",
    "read_checkpoint",
]

_TOKENIZERS = {"hpsv2": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "imagereward": "bert-base-uncased"}

_CLIP_VIT_H = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "hidden_act": "gelu", "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407,
    },
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "hidden_act": "gelu", "image_size": 224, "patch_size": 14,
    },
}  # fmt: skip

_OPEN_CLIP_NAMES = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.weight$", "vision_model.embeddings.patch_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
)

_RELEASE_NAMES = (
    (r"^blip\.", ""),
    (r"^visual_encoder\.cls_token$", "visual_encoder.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "visual_encoder.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "visual_encoder.embeddings.patch_embedding."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"visual_encoder.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"visual_encoder.encoder.layers.\1.self_attn.qkv."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"visual_encoder.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.", "visual_encoder.encoder.layers."),
    (r"^visual_encoder\.norm\.", "visual_encoder.post_layernorm."),
)
# BLIP's heads of pretraining and buffers, which the reward does not use.
_NOT_IN_REWARD = re.compile(r"^(vision_proj|text_proj)\.|position_ids$")


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a pickled checkpoint without running code of the file; raises JudgeError where that cannot be done."""
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise JudgeError(f"{path} cannot be read ({error.strerror}); name a checkpoint file") from None
    except Exception as error:  # the unpickler's own errors, and those of a file that is no archive
        raise JudgeError(
            f"{path} holds more than tensors, or none ({first_line(error)[:200]}); name the published checkpoint"
        ) from None
    tensors = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(each, torch.Tensor) for each in tensors.values()):
        raise JudgeError(f"{path} must hold named tensors, got {type(content).__name__}; name the published checkpoint")
    return tensors


def clip_from_open_clip(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None) -> CLIPModel:
    """Return transformers' CLIP with open_clip's weights; CLIP ViT-H-14, which HPSv2 is, unless `config` says otherwise."""
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name == "visual.proj":
            renamed["visual_projection.weight"] = tensor.T
        elif name == "text_projection":
            renamed["text_projection.weight"] = tensor.T
        elif ".attn.in_proj_" in name:
            stem, kind = _renamed(name, _OPEN_CLIP_NAMES).split(".attn.in_proj_")
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{stem}.self_attn.{part}_proj.{kind}"] = chunk
        elif name != "attn_mask":
            renamed[_renamed(name, _OPEN_CLIP_NAMES)] = tensor
    return _loaded(CLIPModel(CLIPConfig(**(config or _CLIP_VIT_H))), renamed)


def image_reward_from_release(
    tensors: Mapping[str, torch.Tensor], config: ImageRewardConfig | None = None
) -> ImageRewardModel:
    """Return our model with the weights of ImageReward's release."""
    renamed = {_renamed(name, _RELEASE_NAMES): tensor for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in renamed.items() if not _NOT_IN_REWARD.search(name)}
    return _loaded(ImageRewardModel(config or ImageRewardConfig()), kept)


def convert_hpsv2(
    checkpoint: Path, folder: Path, tokenizer: str = _TOKENIZERS["hpsv2"], config: Mapping[str, Any] | None = None
) -> None:
    """Write a folder for `ClipScorer` from HPS_v2_compressed.pt or HPS_v2.1_compressed.pt."""
    clip_from_open_clip(read_checkpoint(checkpoint), config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def convert_imagereward(
    checkpoint: Path, folder: Path, tokenizer: str = _TOKENIZERS["imagereward"], config: ImageRewardConfig | None = None
) -> None:
    """Write a folder for `ImageRewardScorer` from ImageReward.pt."""
    image_reward_from_release(read_checkpoint(checkpoint), config).save_pretrained(folder)
    words = AutoTokenizer.from_pretrained(tokenizer)
    words.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    words.save_pretrained(folder)


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _loaded(model: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    try:
        missing, unexpected = model.load_state_dict(
            {name: tensor.float().contiguous() for name, tensor in tensors.items()}, strict=False
        )
    except RuntimeError as error:  # a tensor of another shape
        raise JudgeError(f"checkpoint is of another model ({last_line(error)}); name the published one") from None
    if missing or unexpected:
        first = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}"
        raise JudgeError(f"checkpoint is of another model: {first}; name the published one")
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says; returns the exit code, with one line on standard error where it is not 0."""
    parser = argparse.ArgumentParser(description="Turn a pickled checkpoint into a folder of safetensors.")
    parser.add_argument("metric", choices=sorted(_TOKENIZERS))
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", help="folder or hub name of the tokenizer; the published one by default")
    given = parser.parse_args(arguments)
    convert = convert_hpsv2 if given.metric == "hpsv2" else convert_imagereward
    try:
        convert(given.checkpoint, given.folder, given.tokenizer or _TOKENIZERS[given.metric])
    except SelmaError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
