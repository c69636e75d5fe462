"""Drawing the images of rounds: one pipeline, into which the adapters of experts are folded in turn, a judge, and encoders."""

import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from selma_ray.errors import RenderError, named_line
from selma_ray.experts.rounds import DrawnPrompt, Round, RoundsPlan
from selma_ray.models.batches import render_each
from selma_ray.models.config import ModelConfig
from selma_ray.models.device import device_of
from selma_ray.models.locate import locate_text_to_image
from selma_ray.records import IMAGE_SCHEMA

__all__ = ["PROMPT_PREFIX", "DrawRounds", "OpenScorer", "ScoreImages"]

PROMPT_PREFIX = "prompt/"
"""Of the tensors of a chunk that have a row for each prompt, not for each image."""

ScoreImages = Callable[[Sequence[Image.Image], Sequence[str]], list[float | None]]
OpenScorer = Callable[[], ScoreImages]
"""Loads what scores images by their prompts, in [0, 1]; None for one that could not be judged."""

_NOTHING_FOLDED = ""


class DrawRounds:
    """Draws, scores and encodes chunks of rounds; whatever is written already is not drawn again."""

    def __init__(
        self, plans: Sequence[RoundsPlan], model: ModelConfig, open_scorer: OpenScorer, num_gpus: float = 0
    ) -> None:
        from selma_ray.adapters.folding import FoldedAdapter
        from selma_ray.models.family import open_family
        from selma_ray.models.parts import denoiser_of
        from selma_ray.models.rendering import Renderer, load_pipeline

        device = device_of(num_gpus, "experts.nft.gpus_per_renderer")
        pipeline: Any = load_pipeline(model, device)
        self._plans = plans
        self._model = model
        self._renderer = Renderer(pipeline, plans[0].sampling)
        self._folded = FoldedAdapter(denoiser_of(pipeline))
        self._encoders = open_family(model).load_encoders(device)
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
        rows, images = self._drawn(round_, prompts)
        if all(row["error"] for row in rows):
            raise RenderError(f"no image of {len(rows)} could be drawn: {rows[0]['error']}")
        self._write_examples(round_, chunk, prompts, rows, images)
        table = pa.Table.from_pylist(rows, schema=IMAGE_SCHEMA)
        round_.plan.folder.write_table(table, round_.images(chunk))
        return len(rows)

    def _drawn(self, round_: Round, prompts: Sequence[DrawnPrompt]) -> tuple[list[dict[str, Any]], list[Any]]:
        texts = [each.prompt for each in prompts for _ in each.seeds]
        seeds = [seed for each in prompts for seed in each.seeds]
        images = render_each(self._renderer.render, texts, seeds)
        there = [(place, image) for place, image in enumerate(images) if isinstance(image, Image.Image)]
        scores: list[float | None] = [None] * len(images)
        for (place, _), score in zip(
            there, self._score([image for _, image in there], [texts[place] for place, _ in there]), strict=True
        ):
            scores[place] = score
        pairs = [(each, index) for each in prompts for index in range(len(each.seeds))]
        rows = [
            self._row(round_, each, index, image, score)
            for (each, index), image, score in zip(pairs, images, scores, strict=True)
        ]
        return rows, images

    def _row(
        self, round_: Round, drawn: DrawnPrompt, index: int, image: Image.Image | Exception, score: float | None
    ) -> dict[str, Any]:
        sampling, row_id = round_.plan.sampling, round_.row_id(drawn, index)
        failed = isinstance(image, Exception)
        return {
            "id": row_id, "skill": drawn.skill, "prompt": drawn.prompt, "split": "train",
            "image_index": drawn.place * round_.plan.images_per_prompt + index, "seed": drawn.seeds[index],
            "image": None if failed else {"bytes": _png(image), "path": f"{row_id}.png"}, "model": self._model.name,
            "revision": locate_text_to_image(self._model.name, self._model.revision).revision,
            "scheduler": self._renderer.scheduler, "steps": sampling.steps, "guidance_scale": sampling.guidance_scale,
            "width": sampling.width_px, "height": sampling.height_px, "score": score,
            "error": named_line(image) if isinstance(image, Exception) else None,
        }  # fmt: skip

    def _write_examples(
        self,
        round_: Round,
        chunk: int,
        prompts: Sequence[DrawnPrompt],
        rows: Sequence[dict[str, Any]],
        images: Sequence[Any],
    ) -> None:
        """Write the latents of the scored images, and the conditioning of each prompt once."""
        from safetensors.torch import save

        used = [place for place, row in enumerate(rows) if row["score"] is not None]
        sampling = round_.plan.sampling
        encoded = self._encoders.encode_prompts(
            [each.prompt for each in prompts], sampling.height_px, sampling.width_px
        )
        tensors = {f"{PROMPT_PREFIX}{name}": tensor for name, tensor in encoded.items()}
        if used:
            tensors |= self._encoders.encode_images(np.stack([np.asarray(images[place]) for place in used]))
        per_prompt = round_.plan.images_per_prompt
        groups = [place // per_prompt for place in used]
        known = {
            "ids": [rows[place]["id"] for place in used],
            "prompts": groups,
            "scores": [rows[place]["score"] for place in used],
        }
        metadata = {name: json.dumps(values) for name, values in known.items()}
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=metadata)
        round_.plan.folder.write_bytes(content, round_.examples(chunk))


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
