"""The denoiser: a UNet fitted on loose captions, with the text encoder and the autoencoder frozen.

One process a CPU core, one thread each, with averaged gradients: on a shared machine threads of one process spend their
time waiting for one another.

Shapes: N images, C channels, H and W rows and columns, T tokens, D text features.
"""

import copy
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

from selma_ray.miniature.pretrain.dataset import load_captions, rewrite_captions
from selma_ray.miniature.pretrain.mixture import Looseness
from selma_ray.miniature.pretrain.progress import (
    Budget,
    Meter,
    load_checkpoint,
    prepare_process,
    save_checkpoint,
    train_precision,
)
from selma_ray.miniature.pretrain.text_encoder import MAX_TOKENS, load_tokenizer

__all__ = ["UnetRun", "cache_tokens", "new_scheduler", "new_unet", "start_unet_workers", "train_unet"]

logger = logging.getLogger(__name__)

_PEAK_RATE = 1e-3
_EMA_DECAY = 0.999
_EMPTY_SHARE = 0.1  # captions dropped, for classifier-free guidance
_SAVE_EVERY_S = 300
_LOOK_EVERY_S = 600


def new_unet() -> UNet2DConditionModel:
    """Make an untrained denoiser of 6.7 million parameters; text enters at 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def new_scheduler() -> DDIMScheduler:
    """Make Stable Diffusion's noise schedule with v-prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def cache_tokens(work_dir: Path, looseness: Looseness, seed: int) -> Path:
    """Tokenize training captions once; returns the file, int16 [N, captions a scene, T].

    The usual looseness means the dataset's own captions; any other has new ones written for the same scenes.
    """
    usual = looseness == Looseness()
    target = work_dir / ("tokens.npy" if usual else f"tokens_loose_{looseness.share:g}_{looseness.max_edits}.npy")
    if target.exists():
        return target
    captions = load_captions(work_dir / "data")
    if not usual:
        captions = rewrite_captions(len(captions), seed, looseness)
    tokenizer = load_tokenizer(work_dir / "tokenizer")
    flat = [caption for row in captions for caption in row]
    tokens = tokenizer(
        flat, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="np"
    ).input_ids
    partial = work_dir / "tokens.partial.npy"
    np.save(partial, tokens.astype(np.int16).reshape(len(captions), -1, MAX_TOKENS))
    partial.rename(target)
    return target


class _PairStream:
    """Draws batches of noised latents, timesteps, tokens and targets without end."""

    def __init__(self, work_dir: Path, tokens: Path, seed: int, scheduler: DDIMScheduler) -> None:
        self.moments = np.load(work_dir / "latents.npy", mmap_mode="r")
        self.tokens = np.load(tokens, mmap_mode="r")
        self.empty = torch.tensor(load_tokenizer(work_dir / "tokenizer")("", padding="max_length").input_ids)
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.scheduler = scheduler

    def draw(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return noisy latents [N, C, H, W], timesteps [N], tokens [N, T] and v targets [N, C, H, W]."""
        rows = np.sort(self.rng.integers(len(self.moments), size=size))
        mean, deviation = torch.from_numpy(self.moments[rows]).float().chunk(2, dim=1)
        latents_NCHW = mean + deviation * torch.randn(mean.shape, generator=self.generator)
        columns = self.rng.integers(self.tokens.shape[1], size=size)
        tokens_NT = torch.from_numpy(self.tokens[rows, columns].astype(np.int64))
        tokens_NT[torch.rand(size, generator=self.generator) < _EMPTY_SHARE] = self.empty
        # Middle and high noise decide what is where; the lowest noise levels only polish.
        position = torch.sigmoid(0.3 + 1.2 * torch.randn(size, generator=self.generator))
        timesteps_N = (position * 1000).long().clamp(0, 999)
        noise_NCHW = torch.randn(latents_NCHW.shape, generator=self.generator)
        noisy_NCHW = self.scheduler.add_noise(latents_NCHW, noise_NCHW, timesteps_N)  # pyright: ignore
        target_NCHW = self.scheduler.get_velocity(latents_NCHW, noise_NCHW, timesteps_N)  # pyright: ignore
        return noisy_NCHW, timesteps_N, tokens_NT, target_NCHW


@dataclass(frozen=True)
class UnetRun:
    """How to train the denoiser; `batch` is a whole step's, over all workers."""

    work_dir: Path
    tokens: Path
    looseness: Looseness
    hours: float | None
    steps: int | None
    batch: int
    workers: int
    threads: int
    seed: int
    device: str


def start_unet_workers(run: UnetRun) -> None:
    """Fit the denoiser in `run.workers` processes and wait for their end."""
    if run.workers == 1:
        train_unet(0, run)
        return
    (run.work_dir / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.spawn(train_unet, (run,), nprocs=run.workers)


def train_unet(rank: int, run: UnetRun) -> None:
    """Fit the denoiser as worker `rank`."""
    prepare_process(run.threads, run.seed)
    workers, work_dir, device = run.workers, run.work_dir, run.device
    budget = Budget(run.hours, run.steps)
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{work_dir}/rendezvous", rank=rank, world_size=workers)
    text_encoder = CLIPTextModel.from_pretrained(work_dir / "text_encoder").to(device).eval()
    state = _TrainingState(work_dir, run.looseness, budget, device)
    stream = _PairStream(work_dir, run.tokens, run.seed + 1000 * budget.step + rank, new_scheduler())
    meter = Meter("unet", budget)
    saved_at, looked_at = time.monotonic() - _SAVE_EVERY_S + 120, time.monotonic() - _LOOK_EVERY_S + 180
    stop = False
    while not stop:
        budget.set_rate(state.optimizer, _PEAK_RATE)
        loss = _fit_batch(state.model, text_encoder, [part.to(device) for part in stream.draw(run.batch // workers)])
        stop = _average_gradients(state.model, budget.progress >= 1, workers)
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
        state.optimizer.step()
        state.update_average()
        budget.step += 1
        if rank > 0:
            continue
        meter.add(run.batch, loss=loss)
        if time.monotonic() - saved_at > _SAVE_EVERY_S or stop:
            saved_at = time.monotonic()
            state.save()
        if time.monotonic() - looked_at > _LOOK_EVERY_S or stop:
            looked_at = time.monotonic()
            state.look()
    if workers > 1:
        dist.destroy_process_group()


class _TrainingState:
    """The denoiser, its running average and its optimizer, with their checkpoint."""

    def __init__(self, work_dir: Path, looseness: Looseness, budget: Budget, device: str) -> None:
        self.work_dir, self.budget, self.device = work_dir, budget, device
        self.captions = f"{looseness.share:g} {looseness.max_edits}"
        self.earlier_steps: dict[str, int] = {}  # by captions
        self.model = new_unet().to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=_PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        saved = load_checkpoint(work_dir / "unet.pt")
        if saved:
            self.model.load_state_dict(saved["model"])
            self.average.load_state_dict(saved["average"])
            self.optimizer.load_state_dict(saved["optimizer"])
            budget.resume(saved)
            self.earlier_steps = saved.get("steps_by_captions", {f"{Looseness().share:g} 1": budget.step})
        self._steps_before = budget.step

    @property
    def steps_by_captions(self) -> dict[str, int]:
        """Steps on each kind of captions, named by their looseness's share and edits."""
        before = self.earlier_steps.get(self.captions, 0)
        return self.earlier_steps | {self.captions: before + self.budget.step - self._steps_before}

    @torch.no_grad()
    def update_average(self) -> None:
        step = self.budget.step
        weight = 1 - min(_EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), weight)

    def save(self) -> None:
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps_by_captions": self.steps_by_captions,
            **self.budget.state(),
        }
        save_checkpoint(self.work_dir / "unet.pt", state)

    def look(self) -> None:
        """Save the averaged weights as a diffusers folder and draw a grid of samples from them."""
        from selma_ray.miniature.pretrain.samples import draw_samples

        self.average.save_pretrained(self.work_dir / "unet")
        try:
            draw_samples(self.work_dir, self.average, self.budget.step)
        except Exception:
            logger.exception("unet: the sample grid failed; the training goes on")


def _fit_batch(model: UNet2DConditionModel, text_encoder: CLIPTextModel, batch: list[torch.Tensor]) -> float:
    """Leave the gradients of one batch in the model and return its loss."""
    noisy_NCHW, timesteps_N, tokens_NT, target_NCHW = batch
    model.zero_grad(set_to_none=True)
    with train_precision(noisy_NCHW.device.type):
        with torch.no_grad():
            states_NTD = text_encoder(tokens_NT).last_hidden_state
        output_NCHW = model(noisy_NCHW, timesteps_N, states_NTD).sample
    loss = (output_NCHW.float() - target_NCHW).square().mean()
    loss.backward()
    return loss.item()


def _average_gradients(model: torch.nn.Module, stop: bool, workers: int) -> bool:
    """Average the gradients over the workers; return whether any worker's budget is used up, so that all stop at once."""
    if workers == 1:
        return stop
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients] + [torch.tensor([float(stop)])])
    dist.all_reduce(flat)
    flat /= workers
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()
    return bool(flat[-1] > 0)
