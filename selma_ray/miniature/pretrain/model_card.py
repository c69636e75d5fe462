"""The model card: how the miniature was trained, and scores read from the `score` command's JSON."""

import json
import os
import platform
from pathlib import Path
from typing import Any

from selma_ray.miniature.pretrain.mixture import SKILL_SHARES
from selma_ray.miniature.pretrain.progress import load_checkpoint

__all__ = ["write_model_card"]

_INTRODUCTION = """# The miniature's models

A text-to-image model and a judge for a small drawn world: scenes of one or two kinds of twelve everyday objects in eight
colours, counts 1 to 4, four spatial relations, six backgrounds and four styles, 64 x 64 pixels. They exist so that the whole
of SELMA runs offline on a laptop; they know nothing else. License: Apache-2.0, as the code. All training images were drawn by
`selma_ray.miniature.scenes`; no outside data was used.
"""
_LAYOUT = """
- `text_to_image/`: a diffusers `StableDiffusionPipeline` (CLIPTokenizer, CLIPTextModel, UNet2DConditionModel, AutoencoderKL with
  16 x 16 x 4 latents, DDIM with v-prediction). The text encoder was fitted to tell a scene from its caption and then frozen.
- `text_to_image_weak/`: the same with a denoiser of an earlier checkpoint, for the experiment from a weak to a strong model.
- `judge/`: `selma_ray.miniature.judge.MiniatureJudge`: encodes an image once and answers many questions about it.
- `detector/` (where it was trained): `selma_ray.miniature.detector.MiniatureDetector`, the second judge: finds objects, and answers are
  computed by rule.
"""


def write_model_card(work_dir: Path, target: Path) -> None:
    """Write the card from the work folder's checkpoints and `scores.json`; what was not measured is left out."""
    shares = ", ".join(f"{skill} {share:.0%}" for skill, share in SKILL_SHARES.items())
    lines = [_INTRODUCTION, "## What is here", _LAYOUT, "## Training", ""]
    lines += [
        f"- Scenes by kind: {shares}. Natural colours, counts 1 and 2 and plain scenes dominate.",
        *_describe_captions(load_checkpoint(work_dir / "unet.pt") or {}),
        "- One caption in sixteen, chosen by its hash, is for tests only and was never trained on.",
        f"- Hardware: {os.cpu_count()} CPU cores ({platform.machine()}), no GPU; bf16 autocast; seed 0.",
        "- Two steps were taken by hand and no one command repeats them: the latents were standardised per channel after the autoencoder",
        "  was trained, and the judge's image part comes from the first 719 steps of an earlier judge with another question part.",
        "",
        "| model | steps | hours |",
        "|---|---|---|",
    ]
    for name in ("autoencoder", "decoder", "text_encoder", "unet_weak", "unet", "judge", "detector"):
        saved = load_checkpoint(work_dir / f"{name}.pt")
        if saved:
            lines.append(f"| {name.replace('_', ' ')} | {saved['step']} | {saved['spent_s'] / 3600:.2f} |")
    scores = work_dir / "scores.json"
    if scores.exists():
        lines += _describe_scores(json.loads(scores.read_text()))
    target.write_text("\n".join(lines) + "\n")


def _describe_captions(denoiser: dict[str, Any]) -> list[str]:
    """Tell how loose the captions were, and for how many steps of the denoiser."""
    lines = []
    for captions, steps in denoiser.get("steps_by_captions", {}).items():
        share, edits = captions.split()
        number = "one statement" if edits == "1" else f"one to {edits} statements"
        lines.append(
            f"- Denoiser, {steps} steps: {float(share):.0%} of the captions are loose: {number} (count, colour, relation, object or "
            "setting) wrong or missing."
        )
    return [*lines, "- 10% of the captions are dropped for classifier-free guidance."]


def _describe_scores(scores: dict[str, Any]) -> list[str]:
    lines = ["", "## Scores", "", f"DSG on held-out captions, {scores['steps']} steps, one image a caption, in %:", ""]
    columns = list(next(iter(scores["dsg"].values())))
    lines += [f"| guidance | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for guidance, row in scores["dsg"].items():
        lines.append(f"| {guidance} | " + " | ".join(f"{row[column]:.1f}" for column in columns) + " |")
    lines += ["", "Judge, balanced accuracy on held-out scenes, in %:", "", "| questions | accuracy |", "|---|---|"]
    lines += [f"| {name} | {value:.1f} |" for name, value in scores["judge"].items()]
    lines += ["", f"Judge's answers that survive the autoencoder's round trip: {scores['roundtrip']:.1f}%.", ""]
    lines.append(f"Calibration error of P(yes) on held-out scenes: {scores['calibration_error']:.3f}.")
    return lines
