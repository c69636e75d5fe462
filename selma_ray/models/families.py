"""The families that can be trained and served, by the class of their pipeline; loads none of them."""

from collections.abc import Mapping

__all__ = ["FAMILIES"]

FAMILIES: Mapping[str, tuple[str, str, str]] = {
    "StableDiffusionPipeline": ("stable_diffusion", "StableDiffusion", "StableDiffusionPredictor"),
    "StableDiffusionXLPipeline": ("sdxl", "StableDiffusionXL", "StableDiffusionXLPredictor"),
    "StableDiffusion3Pipeline": ("sd3", "StableDiffusion3", "StableDiffusion3Predictor"),
    "FluxPipeline": ("flux", "Flux", "FluxPredictor"),
    "ZImagePipeline": ("z_image", "ZImage", "ZImagePredictor"),
    "Flux2KleinPipeline": ("flux2", "Flux2Klein", "Flux2KleinPredictor"),
    "QwenImagePipeline": ("qwen_image", "QwenImage", "QwenImagePredictor"),
    "SanaPipeline": ("sana", "Sana", "SanaPredictor"),
}
"""Module in selma_ray.models, family, predictor; imported when needed, so that no model pays for the others."""
