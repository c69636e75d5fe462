"""Scores of the trained models: DSG of the base model, accuracy and calibration of the judge, the autoencoder's losses."""

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image

from selma_ray.miniature.heldout import heldout_by_skill
from selma_ray.miniature.judge import MiniatureJudge
from selma_ray.miniature.pretrain.dataset import load_dataset
from selma_ray.miniature.pretrain.judge import NUM_TEST_SCENES
from selma_ray.miniature.pretrain.question_bank import CATEGORIES, QuestionBank
from selma_ray.miniature.pretrain.samples import assemble_pipeline
from selma_ray.miniature.questions import questions_for

__all__ = ["score_images", "score_models"]

logger = logging.getLogger(__name__)

_CHUNK = 20


def score_models(work_dir: Path, steps: int, guidances: Sequence[float], per_skill: int) -> None:
    """Measure everything the model card states and write `scores.json`."""
    judge = MiniatureJudge.from_pretrained(work_dir / "judge")
    scores: dict[str, Any] = {
        "steps": steps,
        "captions_per_skill": per_skill,
        **_score_judge(work_dir, judge),
        "dsg": {},
    }
    logger.info("score: judge %s", scores)
    pipeline = assemble_pipeline(work_dir, UNet2DConditionModel.from_pretrained(work_dir / "unet"))
    skills = {skill: captions[:per_skill] for skill, captions in heldout_by_skill().items()}
    captions = [caption for group in skills.values() for caption in group]
    for guidance in guidances:
        images: list[Image.Image] = []
        for start in range(0, len(captions), _CHUNK):
            chunk = list(captions[start : start + _CHUNK])
            generators = [torch.Generator().manual_seed(start + place) for place in range(len(chunk))]
            with torch.autocast("cpu", torch.bfloat16):
                output = pipeline(
                    chunk, num_inference_steps=steps, guidance_scale=guidance, height=64, width=64, generator=generators
                )
            images.extend(output.images)  # pyright: ignore[reportAttributeAccessIssue]
        scores["dsg"][str(guidance)] = score_images(work_dir / "judge", captions, images, list(skills))
        logger.info("score: guidance %s: %s", guidance, scores["dsg"][str(guidance)])
        partial = work_dir / "scores.json.partial"
        partial.write_text(json.dumps(scores, indent=1))
        partial.replace(work_dir / "scores.json")


def score_images(
    judge_dir: Path, captions: Sequence[str], images: Sequence[Image.Image], skills: Sequence[str] = ()
) -> dict[str, float]:
    """Return the `official` DSG of images in % (a denied parent denies its children): in all, by skill and by category.

    With `skills`, the captions are taken as that many groups of equal size.
    """
    judge = MiniatureJudge.from_pretrained(judge_dir)
    questions = [questions_for(caption) for caption in captions]
    per_image: list[float] = []
    by_category: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(captions), 100):
        states = judge.encode_images(images[start : start + 100])
        asked = questions[start : start + 100]
        chances = judge.probability_yes(states, [[q.question for q in group] for group in asked])
        for group, yes in zip(asked, chances, strict=True):
            raw = {q.id: chance > 0.5 for q, chance in zip(group, yes, strict=True)}
            valid = {q.id: raw[q.id] and all(raw[p] for p in q.parents if p) for q in group}
            per_image.append(float(np.mean(list(valid.values()))))
            for question in group:
                by_category[question.category].append(valid[question.id])
    result = {"all": 100 * float(np.mean(per_image))}
    size = len(captions) // max(1, len(skills))
    for place, skill in enumerate(skills):
        result[skill] = 100 * float(np.mean(per_image[place * size : (place + 1) * size]))
    result |= {f"{name} questions": 100 * float(np.mean(hits)) for name, hits in sorted(by_category.items())}
    return {name: round(value, 2) for name, value in result.items()}


def _score_judge(work_dir: Path, judge: MiniatureJudge) -> dict[str, object]:
    """Return balanced accuracy by category, the share of answers that survive a round trip and the calibration error."""
    scenes, bank = load_dataset(work_dir / "data"), QuestionBank()
    vae = AutoencoderKL.from_pretrained(work_dir / "vae")
    rng = np.random.default_rng(1)
    accuracy, chances, truths = {}, [], []
    survived: list[bool] = []
    rows = np.arange(len(scenes) - NUM_TEST_SCENES // 2, len(scenes) - NUM_TEST_SCENES // 2 + 600)
    images = [Image.fromarray(image) for image in scenes.images[rows]]
    states = torch.cat([judge.encode_images(images[start : start + 100]) for start in range(0, len(images), 100)])
    passed = [image for start in range(0, len(images), 50) for image in _roundtrip(vae, images[start : start + 50])]
    passed_states = judge.encode_images(passed)
    for category in CATEGORIES:
        asked, answers = bank.draw(scenes, rows, 8, rng, category)
        texts = [[bank.texts[number] for number in row] for row in asked.tolist()]
        scores = torch.stack(judge.answer(states, texts))
        hits = scores.argmax(-1) == answers
        accuracy[category] = 100 * float(np.mean([hits[answers == a].float().mean() for a in answers.unique()]))
        survived.extend(
            (torch.stack(judge.answer(passed_states, texts)).argmax(-1) == scores.argmax(-1)).flatten().tolist()
        )
        if category != "how_many":
            chances.append((scores[..., 1] / (scores[..., 0] + scores[..., 1])).flatten())
            truths.append((answers == 1).float().flatten())
    return {
        "judge": {name: round(value, 2) for name, value in accuracy.items()},
        "roundtrip": round(100 * float(np.mean(survived)), 2),
        "calibration_error": round(_calibration_error(torch.cat(chances), torch.cat(truths)), 4),
    }


def _calibration_error(chances: torch.Tensor, truths: torch.Tensor, bins: int = 10) -> float:
    """Return the expected gap between P(yes) and the share of yes, over equal bins of P(yes)."""
    places = (chances * bins).long().clamp(max=bins - 1)
    gaps = [
        (chances[places == b].mean() - truths[places == b].mean()).abs() * (places == b).float().mean()
        for b in range(bins)
        if (places == b).any()
    ]
    return float(torch.stack(gaps).sum())


@torch.inference_mode()
def _roundtrip(vae: AutoencoderKL, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Encode and decode images."""
    from selma_ray.miniature.judge import images_to_pixels

    latents = vae.encode(images_to_pixels(images)).latent_dist.mean  # pyright: ignore[reportAttributeAccessIssue]
    output = vae.decode(latents).sample  # pyright: ignore[reportAttributeAccessIssue]
    pixels = output.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in pixels]
