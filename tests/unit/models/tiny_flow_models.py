"""Small randomly initialised Stable Diffusion 3 and FLUX pipelines in the real classes and folder formats."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

_LATENT_CHANNELS = 4


def save_tiny_sd3(folder: Path, tiny_stable_diffusion: Path, latent_channels: int = _LATENT_CHANNELS) -> None:
    """Write a StableDiffusion3Pipeline folder; the CLIP tokenizer is that of the other tiny model."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_stable_diffusion / "tokenizer")
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=latent_channels, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=32, out_channels=latent_channels,
        pos_embed_max_size=16,
    )  # fmt: skip
    StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=autoencoder(latent_channels),
        text_encoder=CLIPTextModelWithProjection(_clip_config(tokenizer)), tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer)), tokenizer_2=tokenizer,
        text_encoder_3=_t5(64), tokenizer_3=letter_tokenizer(),
    ).save_pretrained(folder)  # fmt: skip


def save_tiny_flux(folder: Path, tiny_stable_diffusion: Path) -> None:
    """Write a FluxPipeline folder; the CLIP tokenizer is that of the other tiny model."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_stable_diffusion / "tokenizer")
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4 * _LATENT_CHANNELS, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), vae=autoencoder(),
        text_encoder=CLIPTextModel(_clip_config(tokenizer)), tokenizer=tokenizer,
        text_encoder_2=_t5(32), tokenizer_2=letter_tokenizer(),
    ).save_pretrained(folder)  # fmt: skip


def autoencoder(latent_channels: int = _LATENT_CHANNELS) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 16, 32), latent_channels=latent_channels, norm_num_groups=8, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5305,
    )  # fmt: skip


def _clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=16,
        max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def _t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).eval()


def letter_tokenizer() -> PreTrainedTokenizerFast:
    pieces = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz ."]
    model = Unigram([(piece, -1.0) for piece in pieces], unk_id=2)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=77
    )
