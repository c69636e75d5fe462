"""Which text-to-image model a run starts from, and how it is sampled."""

from typing import Any, Literal

from pydantic import Field

from selma_ray.config import Placement, StrictModel

__all__ = ["CardConfig", "ModelConfig", "SamplingConfig"]


class CardConfig(StrictModel):
    """How a pipeline is kept on a card: less memory or less time for the same images, up to rounding. On the CPU none of it applies."""

    offload: Literal["none", "model", "sequential"] = "none"
    """Keep in the host's memory what is not in use: `model` moves a part (text encoder, denoiser, autoencoder) to the card when its
    turn comes, `sequential` a layer, which takes the least memory and many times the time."""
    vae_slicing: bool = True
    """Decode the images of a batch one at a time."""
    channels_last: bool = False
    """Lay a UNet's and the autoencoder's weights out as tensor cores read them in convolutions."""
    compile: bool = False
    """Compile the denoiser's repeated blocks: the first images wait for the compiler, and so does every new batch size."""
    tf32: bool = True
    """Multiply matrices of fp32 in TF32."""


class ModelConfig(StrictModel):
    """A text-to-image model."""

    name: str = "miniature"
    """`miniature`, a local folder in diffusers' format, or a hub name."""
    revision: str | None = None
    """Hub revision; default: the newest."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of rendering."""
    variant: str | None = None
    """File variant on the hub, such as fp16."""
    vae: str | None = None
    """An autoencoder in the place of the model's, a folder or a hub name, such as SDXL's that does not overflow in fp16."""
    vae_tiling: bool = False
    """Decode in overlapping tiles that are blended: large images in little memory, with faint seams."""
    text_chunks: int = Field(default=1, ge=1, le=8)
    """Chunks of 75 tokens in which CLIP reads a prompt, for Stable Diffusion 1.x, 2.x and XL: with 1, what is beyond 77 tokens is cut.
    All prompts are then read in as many, in training, rendering and serving, which changes the images of short ones too."""
    card: Placement[CardConfig] = CardConfig()
    """How its pipeline is kept on a card."""


class SamplingConfig(StrictModel):
    """How an image is sampled."""

    steps: int = Field(default=50, ge=1, le=1000)
    """Denoising steps."""
    guidance_scale: float = Field(default=7.5, ge=0)
    """Classifier-free guidance scale; 1 is none."""
    scheduler: str | None = None
    """diffusers class name such as DDIMScheduler; default: the model's own."""
    scheduler_config: dict[str, Any] = Field(default_factory=dict)
    """Settings of that class over the model's own, such as use_karras_sigmas, final_sigmas_type, timestep_spacing,
    rescale_betas_zero_snr or shift."""
    negative_prompt: str = ""
    """What the images should not show."""
    width_px: int = Field(default=512, ge=8, multiple_of=8)
    """Image width in pixels."""
    height_px: int = Field(default=512, ge=8, multiple_of=8)
    """Image height in pixels."""
