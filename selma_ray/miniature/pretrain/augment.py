"""Augmentations that make drawn scenes look like generated ones: autoencoder round trips, blur, noise, shifted hues."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from selma_ray.miniature.pretrain.autoencoder import images_to_tensor
from selma_ray.miniature.pretrain.dataset import load_dataset

__all__ = ["augment", "cache_roundtrips"]

_ROUNDTRIPS = 6000
_LATENT_NOISE = 0.35  # the largest deviation of the noise on round trips' latents


@torch.inference_mode()
def cache_roundtrips(work_dir: Path, device: str, count: int = _ROUNDTRIPS) -> None:
    """Decode the first scenes from noisy latents once: `roundtrips.npy` is uint8 [count, 64, 64, 3]."""
    target = work_dir / "roundtrips.npy"
    if target.exists():
        return
    images = load_dataset(work_dir / "data").images
    model = AutoencoderKL.from_pretrained(work_dir / "vae").to(device)
    output = np.empty((min(count, len(images)), *images.shape[1:]), np.uint8)
    for start in range(0, len(output), 100):
        rows = slice(start, min(start + 100, len(output)))
        with torch.autocast(device, torch.bfloat16):
            latents = model.encode(images_to_tensor(images[rows]).to(device)).latent_dist.mean  # pyright: ignore
            level = torch.rand(len(latents), 1, 1, 1, device=device) * _LATENT_NOISE
            latents = latents + level * latents.std() * torch.randn_like(latents)
            decoded = model.decode(latents).sample  # pyright: ignore[reportAttributeAccessIssue]
        pixels = decoded.float().clamp(-1, 1).add(1).mul(127.5).round().byte()
        output[rows] = pixels.permute(0, 2, 3, 1).cpu().numpy()
    partial = work_dir / "roundtrips.partial.npy"
    np.save(partial, output)
    partial.rename(target)


def augment(
    images_NHWC: np.ndarray, rows: np.ndarray, roundtrips: np.ndarray, rng: np.random.Generator
) -> torch.Tensor:
    """Return augmented images in [-1, 1], [N, C, H, W]; `rows` are the images' places in the dataset."""
    images_NHWC = np.array(images_NHWC)
    swap = (rows < len(roundtrips)) & (rng.random(len(rows)) < 0.8)
    images_NHWC[swap] = roundtrips[rows[swap]]
    pixels = images_to_tensor(images_NHWC)
    size = len(pixels)

    def some(share: float) -> torch.Tensor:
        return torch.from_numpy(rng.random(size) < share)

    def level(low: float, high: float) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(low, high, size).astype(np.float32))[:, None, None, None]

    chosen = some(0.3)
    pixels[chosen] = functional.avg_pool2d(functional.pad(pixels[chosen], (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    chosen = some(0.4)
    coarse = functional.interpolate(torch.randn(size, 3, 16, 16), scale_factor=4, mode="bilinear")
    pixels[chosen] += (level(0, 0.15) * torch.randn_like(pixels) + level(0, 0.2) * coarse)[chosen]
    hue = torch.from_numpy(rng.normal(0, 0.04, (size, 3, 1, 1)).astype(np.float32))
    pixels = pixels * level(0.88, 1.08) + hue
    shift = rng.integers(-2, 3, size=2)
    return torch.roll(pixels, tuple(shift), dims=(2, 3)).clamp(-1, 1)
