"""Small randomly initialised pipelines whose text encoder is a language model, in the real classes and folder formats."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from tests.unit.models.tiny_flow_models import autoencoder, letter_tokenizer

_WIDTH = 32
_CHAT_TEMPLATE = "{% for message in messages %}user {{ message.content }}.{% endfor %}assistant"


def save_tiny_z_image(folder: Path, _: Path) -> None:
    """Write a ZImagePipeline folder."""
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=_WIDTH, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=_WIDTH,
        axes_dims=[4, 4, 8], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    ZImagePipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=autoencoder(),
        text_encoder=Qwen3Model(_qwen3(num_layers=3)).eval(), tokenizer=_chat_tokenizer(),
    ).save_pretrained(folder)  # fmt: skip


def save_tiny_flux2_klein(folder: Path, _: Path) -> None:
    """Write a Flux2KleinPipeline folder whose autoencoder's statistics are not those of a new one."""
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * _WIDTH, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False, timestep_guidance_channels=16,
    )  # fmt: skip
    transformer.proj_out.weight.data.mul_(8)  # so that pixels tell whether there was guidance
    vae = AutoencoderKLFlux2(
        block_out_channels=(16, 16, 32), latent_channels=4, norm_num_groups=8, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    vae.bn.running_mean = torch.linspace(-0.5, 0.7, 16)
    vae.bn.running_var = torch.linspace(0.3, 3.0, 16)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    # The pipeline reads the states after layers 9, 18 and 27.
    text_encoder = Qwen3ForCausalLM(_qwen3(num_layers=28)).eval()
    Flux2KleinPipeline(
        transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=_chat_tokenizer()
    ).save_pretrained(folder)


def save_tiny_qwen_image(folder: Path, _: Path) -> None:
    """Write a QwenImagePipeline folder."""
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=_WIDTH,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    transformer.proj_out.weight.data.mul_(8)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[-0.7, 0.1, 0.9, 0.0], latents_std=[2.8, 1.4, 0.6, 1.0],
    )  # fmt: skip
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": 64, "hidden_size": _WIDTH, "intermediate_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1200,
                "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            },
            vision_config={
                "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": _WIDTH,
                "fullatt_block_indexes": [0],
            },
        )
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0, use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    QwenImagePipeline(
        transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=letter_tokenizer()
    ).save_pretrained(folder)


def save_tiny_sana(folder: Path, _: Path) -> None:
    """Write a SanaPipeline folder."""
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=16, num_cross_attention_heads=2,
        cross_attention_head_dim=16, cross_attention_dim=_WIDTH, caption_channels=_WIDTH, sample_size=16,
    )  # fmt: skip
    blocks: Any = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("block_types", "ResBlock"), ("block_out_channels", (8, 8, 8)), ("layers_per_block", (1, 1, 1)),
            ("qkv_multiscales", ((), (), ())),
        )
    }  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, downsample_block_type="conv", upsample_block_type="interpolate",
        scaling_factor=0.41407, **blocks,
    )  # fmt: skip
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=64, hidden_size=_WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=2048,
        )
    ).eval()  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    SanaPipeline(
        transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=letter_tokenizer()
    ).save_pretrained(folder)


def _qwen3(num_layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=64, hidden_size=_WIDTH, intermediate_size=32, num_hidden_layers=num_layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=1200,
    )  # fmt: skip


def _chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
