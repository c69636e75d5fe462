"""Small random checkpoints in the formats that open_clip and ImageReward's release publish."""

from pathlib import Path
from typing import Any

import torch
from transformers import BertTokenizer, CLIPConfig, CLIPTokenizer

from selma_ray.judging.preferences.image_reward import ImageRewardConfig
from tests.tiny_models import character_tokenizer as character_tokenizer

IMAGE_PX, PATCH_PX, WIDTH, HEADS, LAYERS, PROJECTED = 32, 8, 32, 4, 2, 16
NUM_PATCHES = (IMAGE_PX // PATCH_PX) ** 2


def clip_config(tokenizer: CLIPTokenizer, activation: str = "gelu") -> dict:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
             "hidden_act": activation}  # fmt: skip
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 77, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    vision = {**sizes, "image_size": IMAGE_PX, "patch_size": PATCH_PX}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTED).to_dict()


def open_clip_weights(vocab_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    shapes = {
        "visual.class_embedding": (WIDTH,), "visual.positional_embedding": (NUM_PATCHES + 1, WIDTH),
        "visual.conv1.weight": (WIDTH, 3, PATCH_PX, PATCH_PX), "visual.proj": (WIDTH, PROJECTED),
        "token_embedding.weight": (vocab_size, WIDTH), "positional_embedding": (77, WIDTH),
        "text_projection": (WIDTH, PROJECTED), "logit_scale": (),
    }  # fmt: skip
    norms = ["visual.ln_pre", "visual.ln_post", "ln_final"]
    for tower in ("visual.transformer", "transformer"):
        for layer in range(LAYERS):
            name = f"{tower}.resblocks.{layer}"
            norms += [f"{name}.ln_1", f"{name}.ln_2"]
            shapes[f"{name}.attn.in_proj_weight"], shapes[f"{name}.attn.in_proj_bias"] = (
                (3 * WIDTH, WIDTH),
                (3 * WIDTH,),
            )
            shapes |= _linear(f"{name}.attn.out_proj", WIDTH, WIDTH)
            shapes |= _linear(f"{name}.mlp.c_fc", WIDTH, 2 * WIDTH) | _linear(f"{name}.mlp.c_proj", 2 * WIDTH, WIDTH)
    return _random(shapes, norms, seed)


def image_reward_config(vocab_size: int) -> ImageRewardConfig:
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    vision = {**sizes, "image_size": IMAGE_PX, "patch_size": PATCH_PX, "layer_norm_eps": 1e-6}
    return ImageRewardConfig(vision, {**sizes, "vocab_size": vocab_size, "encoder_hidden_size": WIDTH})


def release_weights(vocab_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    eyes, words = "blip.visual_encoder", "blip.text_encoder"
    shapes = {
        f"{eyes}.cls_token": (1, 1, WIDTH), f"{eyes}.pos_embed": (1, NUM_PATCHES + 1, WIDTH),
        f"{eyes}.patch_embed.proj.weight": (WIDTH, 3, PATCH_PX, PATCH_PX), f"{eyes}.patch_embed.proj.bias": (WIDTH,),
        f"{words}.embeddings.word_embeddings.weight": (vocab_size, WIDTH),
        f"{words}.embeddings.position_embeddings.weight": (512, WIDTH),
        "blip.vision_proj.weight": (8, WIDTH), "blip.text_proj.weight": (8, WIDTH),
    }  # fmt: skip
    norms = [f"{eyes}.norm", f"{words}.embeddings.LayerNorm"]
    for layer in range(LAYERS):
        name = f"{eyes}.blocks.{layer}"
        norms += [f"{name}.norm1", f"{name}.norm2"]
        shapes |= _linear(f"{name}.attn.qkv", WIDTH, 3 * WIDTH) | _linear(f"{name}.attn.proj", WIDTH, WIDTH)
        shapes |= _linear(f"{name}.mlp.fc1", WIDTH, 2 * WIDTH) | _linear(f"{name}.mlp.fc2", 2 * WIDTH, WIDTH)
        name = f"{words}.encoder.layer.{layer}"
        for part in ("attention", "crossattention"):
            norms.append(f"{name}.{part}.output.LayerNorm")
            for each in ("self.query", "self.key", "self.value", "output.dense"):
                shapes |= _linear(f"{name}.{part}.{each}", WIDTH, WIDTH)
        norms.append(f"{name}.output.LayerNorm")
        shapes |= _linear(f"{name}.intermediate.dense", WIDTH, 2 * WIDTH) | _linear(
            f"{name}.output.dense", 2 * WIDTH, WIDTH
        )
    for position, (fan_in, fan_out) in zip(
        (0, 2, 4, 6, 7), ((WIDTH, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)), strict=True
    ):
        shapes |= _linear(f"mlp.layers.{position}", fan_in, fan_out)
    weights = _random(shapes, norms, seed)
    weights[f"{words}.embeddings.position_ids"] = torch.arange(512)[None]
    return weights


def word_tokenizer(folder: Path) -> BertTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    (folder / "words.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
    return BertTokenizer(str(folder / "words.txt"))


def _linear(name: Any, fan_in: Any, fan_out: Any) -> Any:
    return {f"{name}.weight": (fan_out, fan_in), f"{name}.bias": (fan_out,)}


def _random(shapes: Any, norms: Any, seed: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=generator) * (0.5 if len(shape) < 2 else (2 / shape[-1]) ** 0.5)
        for name, shape in shapes.items()
    }
    for name in norms:
        weights[f"{name}.weight"] = 1 + 0.1 * torch.randn(WIDTH, generator=generator)
        weights[f"{name}.bias"] = 0.1 * torch.randn(WIDTH, generator=generator)
    return weights
