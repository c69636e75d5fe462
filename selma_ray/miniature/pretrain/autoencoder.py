"""The autoencoder: 64 x 64 images to 16 x 16 x 4 latents and back.

Shapes: N images, C channels, H and W rows and columns.
"""

import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional

from selma_ray.miniature.pretrain.dataset import load_dataset
from selma_ray.miniature.pretrain.progress import Budget, Meter, load_checkpoint, save_checkpoint

__all__ = ["cache_latents", "images_to_tensor", "new_autoencoder", "polish_decoder", "train_autoencoder"]

logger = logging.getLogger(__name__)

_PEAK_RATE = 2e-3
_BATCH = 16
_KL_WEIGHT = 1e-3
_EDGE_WEIGHT = 0.5
_HUE_WEIGHT = 0.5
_CROP_PX = 32
_CROP_SHARE = 0.75  # of the budget: small crops teach four times as many steps a second, whole images finish
_LATENT_NOISE = 0.1  # the decoder must forgive a denoiser's small errors


def new_autoencoder() -> AutoencoderKL:
    """Make an untrained autoencoder that halves the size twice."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def images_to_tensor(images_NHWC: np.ndarray) -> torch.Tensor:
    """Turn uint8 images into floats in [-1, 1], channels first."""
    images = torch.from_numpy(np.array(images_NHWC)).permute(0, 3, 1, 2)
    return images.float().div_(127.5).sub_(1.0)


def _reconstruction_loss(output_NCHW: torch.Tensor, target_NCHW: torch.Tensor) -> torch.Tensor:
    """L1 on pixels, on horizontal and vertical differences (sharp outlines) and on channel differences (hues)."""
    loss = functional.l1_loss(output_NCHW, target_NCHW)
    loss = loss + _HUE_WEIGHT * functional.l1_loss(output_NCHW.diff(dim=1), target_NCHW.diff(dim=1))
    for dim in (2, 3):
        loss = loss + _EDGE_WEIGHT * functional.l1_loss(output_NCHW.diff(dim=dim), target_NCHW.diff(dim=dim))
    return loss


def train_autoencoder(work_dir: Path, budget: Budget, device: str) -> None:
    """Fit the autoencoder on the rendered scenes, measure its latents' scale and save it."""
    images = load_dataset(work_dir / "data").images
    model = new_autoencoder().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    saved = load_checkpoint(work_dir / "autoencoder.pt")
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        budget.resume(saved)
    meter = Meter("autoencoder", budget, every_s=15)
    rng = np.random.default_rng(budget.step)
    while budget.progress < 1:
        pixels = images_to_tensor(images[np.sort(rng.integers(len(images), size=_BATCH))]).to(device)
        if budget.progress < _CROP_SHARE:
            top, left = rng.integers(0, pixels.shape[-1] - _CROP_PX + 1, size=2)
            pixels = pixels[:, :, top : top + _CROP_PX, left : left + _CROP_PX].contiguous()
        budget.set_rate(optimizer, _PEAK_RATE)
        with torch.autocast(device, torch.bfloat16):
            posterior = model.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
            latents = posterior.sample()
            latents = latents + _LATENT_NOISE * latents.detach().std() * torch.randn_like(latents)
            output = model.decode(latents).sample  # pyright: ignore[reportAttributeAccessIssue]
        loss = (
            _reconstruction_loss(output.float(), pixels)
            + _KL_WEIGHT * posterior.kl().float().mean() / latents[0].numel()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        budget.step += 1
        meter.add(_BATCH, loss=loss.item(), std=latents.float().std().item())
        if budget.step % 250 == 0:
            save_checkpoint(
                work_dir / "autoencoder.pt",
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **budget.state()},
            )
    save_checkpoint(
        work_dir / "autoencoder.pt",
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **budget.state()},
    )
    _finish(model, images, work_dir)


def polish_decoder(work_dir: Path, budget: Budget, device: str) -> None:
    """Fit the decoder alone for longer: the encoder and so all cached latents stay as they are."""
    images = load_dataset(work_dir / "data").images
    model = AutoencoderKL.from_pretrained(work_dir / "vae").to(device).requires_grad_(False)
    trained = nn.ModuleList([model.decoder, model.post_quant_conv]).requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=_PEAK_RATE / 2, betas=(0.9, 0.99), weight_decay=1e-4)
    saved = load_checkpoint(work_dir / "decoder.pt")
    if saved:
        trained.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        budget.resume(saved)
    meter, rng = Meter("decoder", budget), np.random.default_rng(1000 + budget.step)
    while budget.progress < 1:
        pixels = images_to_tensor(images[np.sort(rng.integers(len(images), size=_BATCH))]).to(device)
        budget.set_rate(optimizer, _PEAK_RATE / 2)
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                latents = model.encode(pixels).latent_dist.mean  # pyright: ignore[reportAttributeAccessIssue]
                latents = latents + _LATENT_NOISE * latents.std() * torch.randn_like(latents)
            output = model.decode(latents).sample  # pyright: ignore[reportAttributeAccessIssue]
        loss = _reconstruction_loss(output.float(), pixels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        budget.step += 1
        meter.add(_BATCH, loss=loss.item())
        if budget.step % 250 == 0 or budget.progress >= 1:
            state = {"model": trained.state_dict(), "optimizer": optimizer.state_dict(), **budget.state()}
            save_checkpoint(work_dir / "decoder.pt", state)
    model.save_pretrained(work_dir / "vae")


@torch.inference_mode()
def _finish(model: AutoencoderKL, images: np.ndarray, work_dir: Path) -> None:
    """Measure the latents, fold their scale into the weights and save the folder."""
    device = next(model.parameters()).device
    latents = model.encode(images_to_tensor(images[:2000:4]).to(device)).latent_dist.mean  # pyright: ignore
    _standardise_latents(model, latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)))
    latents = model.encode(images_to_tensor(images[1:2000:4]).to(device)).latent_dist.mean  # pyright: ignore
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    logger.info("autoencoder: scaling factor %s", model.config["scaling_factor"])
    model.save_pretrained(work_dir / "vae")


@torch.no_grad()
def _standardise_latents(model: AutoencoderKL, mean_C: torch.Tensor, deviation_C: torch.Tensor) -> None:
    """Give every latent channel mean 0 and deviation 1 by changing the 1 x 1 convolutions on both sides of the latents.

    Reconstructions stay the same. A denoiser then spends its effort evenly over the channels, which one scaling factor
    for all of them cannot achieve.
    """
    before, after = model.quant_conv, model.post_quant_conv
    count = len(mean_C)
    before.weight[:count] /= deviation_C[:, None, None, None]
    before.bias[:count] = (before.bias[:count] - mean_C) / deviation_C
    before.bias[count:] -= 2 * deviation_C.log()
    after.bias += after.weight[:, :, 0, 0] @ mean_C
    after.weight *= deviation_C[None, :, None, None]


@torch.inference_mode()
def cache_latents(work_dir: Path, device: str, limit: int | None = None) -> None:
    """Encode the first `limit` scenes once: `latents.npy` holds scaled means and deviations as float16 [N, 8, 16, 16]."""
    target = work_dir / "latents.npy"
    if target.exists():
        return
    images = load_dataset(work_dir / "data").images[:limit]
    model = AutoencoderKL.from_pretrained(work_dir / "vae").to(device)
    moments = np.empty((len(images), 8, 16, 16), np.float16)
    for start in range(0, len(images), 250):
        with torch.autocast(device, torch.bfloat16):
            posterior = model.encode(images_to_tensor(images[start : start + 250]).to(device)).latent_dist
        scaled = torch.cat([posterior.mean, posterior.std], dim=1) * model.config["scaling_factor"]
        moments[start : start + 250] = scaled.float().cpu().numpy()
        if start % 10000 == 0:
            logger.info("latents: %d of %d", start, len(images))
    partial = work_dir / "latents.partial.npy"
    np.save(partial, moments)
    partial.rename(target)
