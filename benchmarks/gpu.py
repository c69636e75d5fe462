"""What one card shows in ten minutes, on a machine without Ray and without a network, beside diffusers' own code on the same card.

Run: python -m benchmarks.gpu [--only PART …] [--minutes 9.5] [--out DIR], where PART is miniature, rendering, training or serving
     python -m benchmarks.gpu --tiny, which takes the same ways with tiny models, on the CPU unless --device says cuda

Stable Diffusion XL, 3.5 and FLUX have their published shapes and random weights. Figures go to DIR/<card>.json as they are found; a case
that fails leaves its error there and the rest goes on. The last line is JSON: `render_over_diffusers` is images/s over diffusers'
pipeline call, `train_over_diffusers` steps/s over its LoRA script, which encodes at every step, `serve_over_diffusers` denoising steps/s of
mixed requests over its pipeline called for one after another, `peak_over_plan` memory of training over what `selma plan` says.
"""

import argparse
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu_parts.wheels import use_wheels

if TYPE_CHECKING:
    from benchmarks.gpu_parts.report import Report

__all__ = ["main"]

_SHARES = {"miniature": 0.08, "rendering": 0.28, "training": 0.34, "serving": 0.30}
"""Parts, and the share of the time that each may take; what one leaves goes to those after it."""


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; returns 1 where a case failed."""
    options = _options(words)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.device != "cuda":
        os.environ.setdefault(
            "OMP_NUM_THREADS", "1"
        )  # before torch is imported: tiny products wait longer for threads than they take
    used = use_wheels()
    _quiet()
    import torch

    from benchmarks.common import print_result
    from benchmarks.gpu_parts.device import describe, the_device
    from benchmarks.gpu_parts.report import Report
    from benchmarks.gpu_parts.summary import summary

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device here; run it where there is one, or with --tiny on the CPU")
    device = the_device(options.device)
    machine = describe(device)
    path = options.out / f"{_slug(machine['name'])}{'-tiny' if options.tiny else ''}.json"
    report = Report(path, {"machine": machine, "wheels": used, "tiny": options.tiny})
    print(f"{machine}\nfigures: {path}", flush=True)
    _run(report, device, options)
    for error in report.errors:
        print(f"failed: {error}")
    if options.tiny:
        print(f"Tiny models on this {device.type}: these ratios say nothing of full-size models on a card.")
    print_result(summary(report.found))
    return 1 if report.errors else 0


def _run(report: "Report", device: Any, options: argparse.Namespace) -> None:
    from benchmarks.gpu_parts.device import process_group
    from benchmarks.gpu_parts.pipelines import FAMILIES, subject

    seconds_left, chosen = 60.0 * options.minutes, options.only or list(_SHARES)
    with tempfile.TemporaryDirectory() as folder, process_group(device):
        subjects = [subject(name, Path(folder) / name, device, tiny=options.tiny) for name in FAMILIES]
        parts = _parts(subjects, device, report, tiny=options.tiny, training="training" in chosen)
        for index, name in enumerate(chosen):
            share = _SHARES[name] / sum(_SHARES[each] for each in chosen[index:])
            with report.part(name, share * seconds_left):
                parts[name]()
            seconds_left -= report.found["parts"][name]["seconds"]
        parts["close"]()


def _parts(
    subjects: Sequence[Any], device: Any, report: "Report", *, tiny: bool, training: bool
) -> Mapping[str, Callable[[], None]]:
    from benchmarks.gpu_parts.miniature import measure_miniature
    from benchmarks.gpu_parts.plans import Plans
    from benchmarks.gpu_parts.rendering import measure_rendering
    from benchmarks.gpu_parts.serving import measure_serving
    from benchmarks.gpu_parts.training import measure_training

    plans = Plans(subjects if training else ())

    def each(measure: Callable[..., None], *more: Any) -> None:
        for index, subject in enumerate(subjects):
            with report.share(1 / (len(subjects) - index)):
                measure(subject, device, report, *more)

    return {
        "miniature": partial(measure_miniature, device, report, tiny=tiny),
        "rendering": partial(each, measure_rendering),
        "training": partial(each, measure_training, plans),
        "serving": partial(each, measure_serving),
        "close": plans.close,
    }


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="tiny models, on the CPU")
    parser.add_argument(
        "--only", action="append", choices=list(_SHARES), metavar="PART", help="this part; may be given again"
    )
    parser.add_argument("--out", type=Path, help="folder of the JSON file; default: docs/gpu, for tiny models runs/gpu")
    parser.add_argument("--minutes", type=float, help="time for all parts; default: 9.5, for tiny models 30")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda, with --tiny the CPU")
    options = parser.parse_args(words)
    options.minutes = options.minutes or (30 if options.tiny else 9.5)
    options.device = options.device or ("cpu" if options.tiny else "cuda")
    if options.device == "cpu" and not options.tiny:
        parser.error("full-size models on the CPU take hours; give --tiny")
    options.out = options.out or Path(__file__).resolve().parents[1] / ("runs/gpu" if options.tiny else "docs/gpu")
    return options


def _quiet() -> None:
    """Leave the terminal to what is measured; libraries' advice on loading says nothing here."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


def _slug(name: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split())


if __name__ == "__main__":
    sys.exit(main())
