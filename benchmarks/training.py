"""Training steps of an expert in one process, on the miniature: ours, a bare PyTorch and PEFT loop on the same cached tensors, and
a loop that encodes images and captions at every step, as diffusers' text-to-image LoRA script does.

Run: python -m benchmarks.training [key=value …], keys and defaults as in SETTINGS

The three take turns, so that what else the machine does falls on all; a figure is the median of its turns. All train a LoRA of the same
rank with the same batch, optimiser, clipping, precision and threads. The last one does at every step what that script's does: it decodes
and normalises each image, tokenises its caption, and runs the autoencoder and the text encoder.

`of_bare_loop` is our rate over the bare loop's (goal: at least 0.9), `over_uncached` ours over the encoding loop's (goal: at least 2).
`most_over_uncached` is what a cache could give if the rest of our step were the bare loop's: the encoding loop's time over the bare one's.
"""

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from PIL import Image

from benchmarks.common import machine, print_result, print_table, read_settings
from benchmarks.drawn_run import draw_run
from selma_ray.adapters.config import LoraSettings
from selma_ray.experts.cache import EncodeExamples, encode_here, skill_cache
from selma_ray.experts.config import ExpertsConfig
from selma_ray.experts.examples import EncodedExamples
from selma_ray.experts.job import ExpertJob
from selma_ray.models.config import ModelConfig
from selma_ray.models.locate import locate_text_to_image
from selma_ray.storage import RunFolder

SETTINGS = {"rounds": 11, "steps_per_round": 6, "batch_size": 16, "rank": 16, "images": 64, "threads": 1}
MODEL = ModelConfig()
SKILL = "counting"
_LEARNING_RATE, _WEIGHT_DECAY, _CLIP = 5e-4, 1e-2, 1.0


def main() -> None:
    """Measure the three loops in turn, then print a table and one JSON line."""
    settings = read_settings(SETTINGS)
    torch.set_num_threads(settings["threads"])
    print(machine(), settings)
    with tempfile.TemporaryDirectory() as path:
        folder = draw_run(path, [SKILL], settings["images"])
        job = _job(folder, settings)
        examples = EncodedExamples(folder, job.caches)
        loops = {
            "ours": _our_steps(job, path),
            "bare loop": _bare_steps(examples, settings),
            "encoding at every step": _uncached_steps(folder, settings),
        }
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        for _ in range(settings["rounds"] + 1):
            for name, steps in loops.items():
                seconds[name].append(_time_of(steps, settings["steps_per_round"]))
    rates = {name: settings["steps_per_round"] / statistics.median(each[1:]) for name, each in seconds.items()}
    print_table(["loop", "steps/s"], [[name, f"{rate:.2f}"] for name, rate in rates.items()])
    ours = rates["ours"]
    print_result(
        {
            "of_bare_loop": round(ours / rates["bare loop"], 3),
            "over_uncached": round(ours / rates["encoding at every step"], 2),
            "most_over_uncached": round(rates["bare loop"] / rates["encoding at every step"], 2),
        }
    )


def _time_of(steps: Iterator[float], count: int) -> float:
    started_s = time.perf_counter()
    for _ in range(count):
        next(steps)
    return time.perf_counter() - started_s


def _job(folder: RunFolder, settings: dict[str, int]) -> ExpertJob:
    cache = skill_cache(folder, SKILL, MODEL)
    encode_here(folder, cache, EncodeExamples(folder, MODEL))
    config = ExpertsConfig(
        lora=LoraSettings(rank=settings["rank"], alpha=settings["rank"]),
        steps=10_000,
        batch_size=settings["batch_size"],
        learning_rate=_LEARNING_RATE,
        weight_decay=_WEIGHT_DECAY,
        gradient_clip=_CLIP,
        precision="fp32",
    )
    return ExpertJob(SKILL, folder, (cache.directory,), (cache.key,), MODEL, config, seed=0)


def _our_steps(job: ExpertJob, path: str) -> Iterator[float]:
    from selma_ray.experts.trainer import ExpertTrainer

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=0, world_size=1)
    trainer = ExpertTrainer(job)
    while True:
        yield trainer.step()


def _bare_steps(examples: EncodedExamples, settings: dict[str, int]) -> Iterator[float]:
    everything = examples.batch(range(len(examples)))
    scale = _part("vae").config.scaling_factor

    def batch(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return latents (B, C, H, W) and text (B, T, D) of cached examples."""
        mean, std = everything["latent_mean"][rows], everything["latent_std"][rows]
        return (mean + std * torch.randn_like(mean)) * scale, everything["text_NTD"][rows]

    return _lora_steps(batch, len(examples), settings)


def _uncached_steps(folder: RunFolder, settings: dict[str, int]) -> Iterator[float]:
    rows = folder.read_table(folder.files("images", suffix=".parquet"), columns=["image", "prompt"]).to_pylist()
    vae, text_encoder, tokenizer = (_part(name) for name in ("vae", "text_encoder", "tokenizer"))

    def batch(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return latents (B, C, H, W) and text (B, T, D) of images and captions that are encoded now."""
        examples = [rows[number] for number in chosen.tolist()]
        pixels = torch.stack([_pixels(example["image"]["bytes"]) for example in examples])
        tokens = tokenizer(
            [example["prompt"] for example in examples],
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            return latents, text_encoder(tokens)[0]

    return _lora_steps(batch, len(rows), settings)


def _lora_steps(
    batch: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], num_examples: int, settings: dict[str, int]
) -> Iterator[float]:
    """The loop that a person writes with PyTorch, diffusers and PEFT alone."""
    path = locate_text_to_image(MODEL.name).path
    schedule = DDPMScheduler.from_pretrained(path, subfolder="scheduler")
    unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", torch_dtype=torch.float32)
    lora = LoraConfig(
        r=settings["rank"], lora_alpha=settings["rank"], target_modules=["to_q", "to_k", "to_v", "to_out.0"]
    )
    model = get_peft_model(unet, lora).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    while True:
        latents, text = batch(torch.randint(num_examples, (settings["batch_size"],)))
        noise = torch.randn_like(latents)
        timesteps = torch.randint(schedule.config.num_train_timesteps, (len(latents),))
        noisy = schedule.add_noise(latents, noise, timesteps)
        target = (
            noise if schedule.config.prediction_type == "epsilon" else schedule.get_velocity(latents, noise, timesteps)
        )
        loss = torch.nn.functional.mse_loss(model(noisy, timesteps, text).sample, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def _part(name: str) -> Any:
    path = locate_text_to_image(MODEL.name).path
    pipeline = StableDiffusionPipeline.from_pretrained(path, unet=None, safety_checker=None, torch_dtype=torch.float32)
    return getattr(pipeline, name)


def _pixels(png: bytes) -> torch.Tensor:
    array = np.array(Image.open(io.BytesIO(png)).convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1.0


if __name__ == "__main__":
    main()
