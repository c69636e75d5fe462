"""The command line of the miniature's training: one subcommand a model, each resumable."""

import argparse
import os
from pathlib import Path

import torch

from selma_ray.miniature.pretrain.mixture import LOOSE_SHARE, Looseness
from selma_ray.miniature.pretrain.progress import Budget, prepare_process


def main() -> None:
    """Run one part of the training."""
    parser = argparse.ArgumentParser(prog="python -m selma_ray.miniature.pretrain", description=__doc__)
    parser.add_argument("part", choices=sorted(_PARTS))
    parser.add_argument("--hours", type=float, help="budget of this part in hours, over restarts too")
    parser.add_argument("--steps", type=int, help="budget of this part in steps, over restarts too")
    parser.add_argument("--work-dir", type=Path, default=_default_work_dir(), help="where data and checkpoints live")
    parser.add_argument("--scenes", type=int, default=100_000, help="number of scenes that `data` renders")
    parser.add_argument("--threads", type=int, default=1, help="threads a process; 1 is fastest on a shared machine")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes of `data` and of `unet` on a CPU"
    )
    parser.add_argument("--batch", type=int, default=32, help="images a step of `unet`, over all its processes")
    parser.add_argument("--loose-share", type=float, default=LOOSE_SHARE, help="share of loose captions, for `unet`")
    parser.add_argument("--loose-edits", type=int, default=1, help="edits that a loose caption has at most, for `unet`")
    parser.add_argument("--sampling-steps", type=int, default=20, help="denoising steps of `score`")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="guidance scales of `score`")
    parser.add_argument("--captions-per-skill", type=int, default=100, help="held-out captions of `score`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    prepare_process(arguments.threads, arguments.seed)
    _PARTS[arguments.part](arguments)


def _default_work_dir() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "selma_ray" / "pretrain"


def _data(arguments: argparse.Namespace) -> None:
    from selma_ray.miniature.pretrain.dataset import build_dataset

    build_dataset(arguments.work_dir / "data", arguments.scenes, arguments.seed, arguments.workers)


def _autoencoder(arguments: argparse.Namespace) -> None:
    from selma_ray.miniature.pretrain.autoencoder import cache_latents, train_autoencoder

    train_autoencoder(arguments.work_dir, Budget(arguments.hours, arguments.steps), arguments.device)
    cache_latents(arguments.work_dir, arguments.device, arguments.scenes)


def _decoder(arguments: argparse.Namespace) -> None:
    from selma_ray.miniature.pretrain.autoencoder import polish_decoder

    polish_decoder(arguments.work_dir, Budget(arguments.hours, arguments.steps), arguments.device)


def _text_encoder(arguments: argparse.Namespace) -> None:
    from selma_ray.miniature.pretrain.text_encoder import train_text_encoder

    train_text_encoder(arguments.work_dir, Budget(arguments.hours, arguments.steps), arguments.device, arguments.seed)


def _unet(arguments: argparse.Namespace) -> None:
    from selma_ray.miniature.pretrain.unet import UnetRun, cache_tokens, start_unet_workers

    looseness = Looseness(arguments.loose_share, arguments.loose_edits)
    tokens = cache_tokens(arguments.work_dir, looseness, arguments.seed)
    workers = 1 if arguments.device == "cuda" else arguments.workers
    start_unet_workers(
        UnetRun(
            work_dir=arguments.work_dir,
            tokens=tokens,
            looseness=looseness,
            hours=arguments.hours,
            steps=arguments.steps,
            batch=arguments.batch,
            workers=workers,
            threads=arguments.threads,
            seed=arguments.seed,
            device=arguments.device,
        )
    )


def _judge(arguments: argparse.Namespace) -> None:
    from selma_ray.miniature.pretrain.augment import cache_roundtrips
    from selma_ray.miniature.pretrain.judge import train_judge

    cache_roundtrips(arguments.work_dir, arguments.device)
    train_judge(arguments.work_dir, Budget(arguments.hours, arguments.steps), arguments.device, arguments.seed)


def _detector(arguments: argparse.Namespace) -> None:
    from selma_ray.miniature.pretrain.augment import cache_roundtrips
    from selma_ray.miniature.pretrain.detector import train_detector

    cache_roundtrips(arguments.work_dir, arguments.device)
    train_detector(arguments.work_dir, Budget(arguments.hours, arguments.steps), arguments.device, arguments.seed)


def _package(arguments: argparse.Namespace) -> None:
    from selma_ray.miniature.pretrain.package import package_models

    package_models(arguments.work_dir, Path(__file__).parents[1] / "weights")


def _score(arguments: argparse.Namespace) -> None:
    from selma_ray.miniature.pretrain.score import score_models

    score_models(arguments.work_dir, arguments.sampling_steps, arguments.guidance, arguments.captions_per_skill)


_PARTS = {
    "data": _data,
    "autoencoder": _autoencoder,
    "decoder": _decoder,
    "detector": _detector,
    "text-encoder": _text_encoder,
    "unet": _unet,
    "judge": _judge,
    "package": _package,
    "score": _score,
}

if __name__ == "__main__":
    main()
