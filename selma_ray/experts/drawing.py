"""Drawing the images of rounds: one pipeline, into which the adapters of experts are folded in turn, and a judge."""

import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from PIL import Image

from selma_ray.errors import RenderError, named_line
from selma_ray.experts.rounds import DrawnPrompt, Round, RoundsPlan
from selma_ray.models.config import ModelConfig
from selma_ray.models.device import device_of
from selma_ray.models.locate import locate_text_to_image
from selma_ray.records import IMAGE_SCHEMA

if TYPE_CHECKING:
    from selma_ray.models.row_drawing import DrawnRow

__all__ = ["PROMPT_PREFIX", "DrawRounds", "OpenScorer", "ScoreImages"]

PROMPT_PREFIX = "prompt/"
"""Of the tensors of a chunk that have a row for each prompt, not for each image."""

ScoreImages = Callable[[Sequence[Image.Image], Sequence[str]], list[float | None]]
OpenScorer = Callable[[], ScoreImages]
"""Loads what scores images by their prompts, in [0, 1]; None for one that could not be judged."""

_NOTHING_FOLDED = ""


class DrawRounds:
    """Draws and scores chunks of rounds; whatever is written already is not drawn again.

    What is learnt from are the latents that were drawn, as published, not those of images that were decoded and encoded again. A model in
    fp32 is drawn in what `precision` resolves to: its weights stay as they are, so that what an adapter adds to them is not rounded away.
    """

    def __init__(
        self,
        plans: Sequence[RoundsPlan],
        model: ModelConfig,
        open_scorer: OpenScorer,
        precision: str,
        num_gpus: float = 0,
    ) -> None:
        import torch

        from selma_ray.adapters.folding import FoldedAdapter
        from selma_ray.experts.precision import resolve_drawing_precision
        from selma_ray.models.family import open_family
        from selma_ray.models.parts import DTYPES, denoiser_of
        from selma_ray.models.rendering import load_pipeline
        from selma_ray.models.row_drawing import RowDrawer

        device = device_of(num_gpus, "experts.nft.gpus_per_renderer")
        pipeline: Any = load_pipeline(model, device)
        drawn_in = resolve_drawing_precision(precision, device)
        lowered = model.dtype == "fp32" and drawn_in != "fp32"
        self._in_precision = partial(torch.autocast, device.type, DTYPES[drawn_in], enabled=lowered)
        self._plans = plans
        self._model = model
        self._family = open_family(model)
        self._drawer = RowDrawer(pipeline, plans[0].sampling)
        self._folded = FoldedAdapter(denoiser_of(pipeline))
        self._score = open_scorer()
        self._adapter = _NOTHING_FOLDED

    def __call__(self, plan: int, number: int, chunk: int) -> int:
        """Draw one chunk of one round of one plan; returns how many images that were."""
        round_ = self._plans[plan].of(number)
        if chunk not in round_.missing_chunks():
            return 0
        adapter = round_.plan.folder.path(round_.adapter)
        if adapter != self._adapter:
            self._folded.fold(adapter)
            self._adapter = adapter
        prompts = round_.chunk(chunk)
        texts, seeds = zip(*((each.prompt, seed) for each in prompts for seed in each.seeds), strict=True)
        with self._in_precision():
            drawn = self._drawer.draw(texts, seeds)
        scores = self._scores(prompts, drawn)
        rows = self._rows(round_, prompts, drawn, scores)
        if all(row["error"] for row in rows):
            raise RenderError(f"no image of {len(rows)} could be drawn: {rows[0]['error']}")
        self._write_examples(round_, chunk, rows, drawn)
        round_.plan.folder.write_table(pa.Table.from_pylist(rows, schema=IMAGE_SCHEMA), round_.images(chunk))
        return len(rows)

    def _scores(self, prompts: Sequence[DrawnPrompt], drawn: Sequence["DrawnRow | Exception"]) -> list[float | None]:
        """Return the score of each image; None for what was not drawn, and what could not be judged."""
        texts = [each.prompt for each in prompts for _ in each.seeds]
        judged = [(row.image, text) for row, text in zip(drawn, texts, strict=True) if not isinstance(row, Exception)]
        scores = iter(self._score([image for image, _ in judged], [text for _, text in judged]))
        return [None if isinstance(row, Exception) else next(scores) for row in drawn]

    def _rows(
        self,
        round_: Round,
        prompts: Sequence[DrawnPrompt],
        drawn: Sequence["DrawnRow | Exception"],
        scores: Sequence[float | None],
    ) -> list[dict[str, Any]]:
        """Return the images as rows of IMAGE_SCHEMA."""
        plan, sampling = round_.plan, round_.plan.sampling
        alike = {
            "split": "train", "model": self._model.name,
            "revision": locate_text_to_image(self._model.name, self._model.revision).revision,
            "scheduler": self._drawer.scheduler, "steps": sampling.steps, "guidance_scale": sampling.guidance_scale,
            "width": sampling.width_px, "height": sampling.height_px,
        }  # fmt: skip
        pairs = [(each, index) for each in prompts for index in range(plan.images_per_prompt)]
        rows = []
        for (prompt, index), row, score in zip(pairs, drawn, scores, strict=True):
            row_id = round_.row_id(prompt, index)
            if isinstance(row, Exception):
                result: dict[str, Any] = {"image": None, "error": named_line(row)}
            else:
                result = {"image": {"bytes": _png(row.image), "path": f"{row_id}.png"}, "error": None}
            rows.append({
                **alike, "id": row_id, "skill": prompt.skill, "prompt": prompt.prompt, "seed": prompt.seeds[index],
                "image_index": prompt.place * plan.images_per_prompt + index, "score": score, **result,
            })  # fmt: skip
        return rows

    def _write_examples(
        self, round_: Round, chunk: int, rows: Sequence[dict[str, Any]], drawn: Sequence["DrawnRow | Exception"]
    ) -> None:
        """Write the latents of the scored images, and the conditioning of each of their prompts once."""
        import torch
        from safetensors.torch import save

        from selma_ray.models.conditions import stacked

        per_prompt = round_.plan.images_per_prompt
        used = [
            (place, row) for place, row in enumerate(drawn)
            if rows[place]["score"] is not None and not isinstance(row, Exception)
        ]  # fmt: skip
        conditions = {place // per_prompt: row.condition for place, row in used}
        groups = {prompt: group for group, prompt in enumerate(conditions)}
        tensors = {}
        if used:
            tensors = {f"{PROMPT_PREFIX}{name}": tensor for name, tensor in stacked(list(conditions.values())).items()}
            tensors |= self._family.drawn_example(torch.cat([row.latents for _, row in used]))
        known = {
            "ids": [rows[place]["id"] for place, _ in used],
            "prompts": [groups[place // per_prompt] for place, _ in used],
            "scores": [rows[place]["score"] for place, _ in used],
        }
        metadata = {name: json.dumps(values) for name, values in known.items()}
        content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata=metadata)
        round_.plan.folder.write_bytes(content, round_.examples(chunk))


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
