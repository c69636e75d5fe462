"""CLIP and ImageReward once more, in float64 and plain NumPy, from weights under open_clip's and the release's own names."""

import math
from typing import Any

import numpy as np
from scipy.special import erf

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def gelu(x: Any) -> Any:
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def quick_gelu(x: Any) -> Any:
    return x / (1 + np.exp(-1.702 * x))


def layer_norm(x: Any, weights: Any, name: Any, eps: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weights[f"{name}.weight"]
        + weights[f"{name}.bias"]
    )


def linear(x: Any, weights: Any, name: Any) -> Any:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attend(query_TD: Any, key_SD: Any, value_SD: Any, heads: Any, allowed: Any = None) -> Any:
    width = query_TD.shape[1] // heads
    parts = []
    for head in range(heads):
        columns = slice(head * width, (head + 1) * width)
        scores = query_TD[:, columns] @ key_SD[:, columns].T / math.sqrt(width)
        if allowed is not None:
            scores = np.where(allowed, scores, -np.inf)
        chances = np.exp(scores - scores.max(-1, keepdims=True))
        parts.append(chances / chances.sum(-1, keepdims=True) @ value_SD[:, columns])
    return np.concatenate(parts, axis=1)


def clip_blocks(x_TD: Any, weights: Any, prefix: Any, heads: Any, activation: Any, allowed: Any = None) -> Any:
    layer = 0
    while f"{prefix}.{layer}.ln_1.weight" in weights:
        name = f"{prefix}.{layer}"
        normed = layer_norm(x_TD, weights, f"{name}.ln_1", 1e-5)
        qkv = normed @ weights[f"{name}.attn.in_proj_weight"].T + weights[f"{name}.attn.in_proj_bias"]
        x_TD = x_TD + linear(attend(*np.split(qkv, 3, axis=1), heads, allowed), weights, f"{name}.attn.out_proj")  # type: ignore[call-arg]
        normed = layer_norm(x_TD, weights, f"{name}.ln_2", 1e-5)
        x_TD = x_TD + linear(activation(linear(normed, weights, f"{name}.mlp.c_fc")), weights, f"{name}.mlp.c_proj")
        layer += 1
    return x_TD


def patches(pixels_CHW: Any, kernel: Any) -> Any:
    size = kernel.shape[-1]
    rows, columns = pixels_CHW.shape[1] // size, pixels_CHW.shape[2] // size
    cut = pixels_CHW.reshape(3, rows, size, columns, size).transpose(1, 3, 0, 2, 4).reshape(rows * columns, -1)
    return cut @ kernel.reshape(len(kernel), -1).T


def clip_image(pixels_CHW: Any, weights: Any, heads: Any, activation: Any) -> Any:
    cells = patches(pixels_CHW, weights["visual.conv1.weight"])
    x_TD = np.vstack([weights["visual.class_embedding"], cells]) + weights["visual.positional_embedding"]
    x_TD = layer_norm(x_TD, weights, "visual.ln_pre", 1e-5)
    x_TD = clip_blocks(x_TD, weights, "visual.transformer.resblocks", heads, activation)
    return layer_norm(x_TD[0], weights, "visual.ln_post", 1e-5) @ weights["visual.proj"]


def clip_text(tokens_T: Any, weights: Any, heads: Any, activation: Any, end: Any) -> Any:
    x_TD = weights["token_embedding.weight"][tokens_T] + weights["positional_embedding"][: len(tokens_T)]
    allowed = np.tril(np.ones((len(tokens_T), len(tokens_T)), dtype=bool))
    x_TD = clip_blocks(x_TD, weights, "transformer.resblocks", heads, activation, allowed)
    return layer_norm(x_TD, weights, "ln_final", 1e-5)[list(tokens_T).index(end)] @ weights["text_projection"]


def cosine(left: Any, right: Any) -> Any:
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


def image_reward(pixels_CHW: Any, tokens_T: Any, keep_T: Any, weights: Any, vision_heads: Any, text_heads: Any) -> Any:
    states = _blip_vision(pixels_CHW, weights, vision_heads)
    x_TD = weights["blip.text_encoder.embeddings.word_embeddings.weight"][tokens_T]
    x_TD = x_TD + weights["blip.text_encoder.embeddings.position_embeddings.weight"][: len(tokens_T)]
    x_TD = layer_norm(x_TD, weights, "blip.text_encoder.embeddings.LayerNorm", 1e-12)
    layer = 0
    while f"blip.text_encoder.encoder.layer.{layer}.intermediate.dense.weight" in weights:
        name = f"blip.text_encoder.encoder.layer.{layer}"
        x_TD = _bert_attention(
            x_TD, x_TD, weights, f"{name}.attention", text_heads, np.asarray(keep_T, dtype=bool)[None]
        )
        x_TD = _bert_attention(x_TD, states, weights, f"{name}.crossattention", text_heads, None)
        hidden = linear(gelu(linear(x_TD, weights, f"{name}.intermediate.dense")), weights, f"{name}.output.dense")
        x_TD = layer_norm(hidden + x_TD, weights, f"{name}.output.LayerNorm", 1e-12)
        layer += 1
    reward = x_TD[0]
    for position in (0, 2, 4, 6, 7):
        reward = linear(reward, weights, f"mlp.layers.{position}")
    return float((reward[0] - 0.16717362830052426) / 1.0333394966054072)


def _bert_attention(x_TD: Any, memory_SD: Any, weights: Any, name: Any, heads: Any, allowed: Any) -> Any:
    query = linear(x_TD, weights, f"{name}.self.query")
    key, value = (linear(memory_SD, weights, f"{name}.self.{part}") for part in ("key", "value"))
    attended = linear(attend(query, key, value, heads, allowed), weights, f"{name}.output.dense")
    return layer_norm(attended + x_TD, weights, f"{name}.output.LayerNorm", 1e-12)


def _blip_vision(pixels_CHW: Any, weights: Any, heads: Any) -> Any:
    prefix = "blip.visual_encoder"
    cells = (
        patches(pixels_CHW, weights[f"{prefix}.patch_embed.proj.weight"]) + weights[f"{prefix}.patch_embed.proj.bias"]
    )
    x_TD = np.vstack([weights[f"{prefix}.cls_token"][0], cells]) + weights[f"{prefix}.pos_embed"][0]
    layer = 0
    while f"{prefix}.blocks.{layer}.norm1.weight" in weights:
        name = f"{prefix}.blocks.{layer}"
        qkv = linear(layer_norm(x_TD, weights, f"{name}.norm1", 1e-6), weights, f"{name}.attn.qkv")
        x_TD = x_TD + linear(attend(*np.split(qkv, 3, axis=1), heads), weights, f"{name}.attn.proj")  # type: ignore[call-arg]
        hidden = gelu(linear(layer_norm(x_TD, weights, f"{name}.norm2", 1e-6), weights, f"{name}.mlp.fc1"))
        x_TD = x_TD + linear(hidden, weights, f"{name}.mlp.fc2")
        layer += 1
    return layer_norm(x_TD, weights, f"{prefix}.norm", 1e-6)
