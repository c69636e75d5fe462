"""The unit of evaluation: a batch of prompts that one model renders and a judge then answers for, each written once."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from PIL import Image

from selma_ray.config import identity
from selma_ray.errors import named_line
from selma_ray.evaluation.config import ANSWERS, SECOND_ANSWERS, EvaluationConfig
from selma_ray.judging.judges.opening import open_judge
from selma_ray.judging.questions import PromptWithQuestions
from selma_ray.judging.scoring import score_images
from selma_ray.models.batches import render_each
from selma_ray.models.config import ModelConfig
from selma_ray.models.device import device_of
from selma_ray.records import ANSWER_SCHEMA, IMAGE_SCHEMA, content_id, seed_of
from selma_ray.storage import RunFolder

if TYPE_CHECKING:
    from selma_ray.models.rendering import Renderer

__all__ = ["Chunk", "JudgeChunk", "ModelUnderTest", "RenderChunk", "plan_chunks"]

_ERROR_CHARS = 300


@dataclass(frozen=True)
class ModelUnderTest:
    """A model to evaluate: a pipeline, with a PEFT adapter folder on it where one is given."""

    model: ModelConfig
    adapter_dir: str | None = None


@dataclass(frozen=True)
class Chunk:
    """Prompts and seeds that one model renders together; `key` names their content, and so their files."""

    model: str
    revision: str
    key: str
    prompts: tuple[PromptWithQuestions, ...]
    seeds: tuple[int, ...]
    image_indices: tuple[int, ...]

    @property
    def images_path(self) -> tuple[str, ...]:
        """Return the place of the images in the run's folder."""
        return ("evaluation", self.model, "images", f"{self.key}.parquet")

    def answers_path(self, judge_key: str, kind: str = ANSWERS) -> tuple[str, ...]:
        """Return the place of a judge's answers in the run's folder."""
        return ("evaluation", self.model, kind, f"{content_id(images=self.key, judge=judge_key)}.parquet")


def plan_chunks(
    model: str, revision: str, suite: Sequence[PromptWithQuestions], config: EvaluationConfig, seed: int
) -> list[Chunk]:
    """Split prompts x seeds into batches; every model gets the same seed for the same prompt."""
    rows = [
        (prompt, seed_of(seed, prompt=prompt.prompt, sampling_seed=sampling_seed), index)
        for index, sampling_seed in enumerate(config.seeds)
        for prompt in suite
    ]
    chunks = []
    for start in range(0, len(rows), config.batch_size):
        prompts, seeds, indices = zip(*rows[start : start + config.batch_size], strict=True)
        key = content_id(
            prompts=[[prompt.id, prompt.skill, prompt.prompt] for prompt in prompts],
            questions=[[vars(question) for question in prompt.questions] for prompt in prompts],
            seeds=seeds,
            revision=revision,
            sampling=identity(config.sampling),
        )
        chunks.append(Chunk(model, revision, key, prompts, seeds, indices))
    return chunks


class RenderChunk:
    """Renders chunks; holds one pipeline at a time in its memory."""

    def __init__(self, folder: RunFolder, models: Mapping[str, ModelUnderTest], config: EvaluationConfig) -> None:
        self._folder = folder
        self._models = models
        self._config = config
        self._loaded: tuple[str, Renderer] | None = None

    def __call__(self, chunk: Chunk) -> None:
        """Write the chunk's images; those that are there already stay as they are."""
        if not self._folder.exists(*chunk.images_path):
            table = pa.Table.from_pylist(self._rendered(chunk), IMAGE_SCHEMA)
            self._folder.write_table(table, *chunk.images_path)

    def _rendered(self, chunk: Chunk) -> list[dict[str, Any]]:
        renderer = self._renderer(chunk.model)
        texts = [prompt.prompt for prompt in chunk.prompts]
        images = render_each(renderer.render, texts, chunk.seeds)
        return [self._image_row(chunk, row, image, renderer.scheduler) for row, image in enumerate(images)]

    def _image_row(self, chunk: Chunk, row: int, image: Image.Image | Exception, scheduler: str) -> dict[str, Any]:
        sampling, prompt = self._config.sampling, chunk.prompts[row]
        identity = {
            "skill": prompt.skill, "prompt": prompt.prompt, "image_index": chunk.image_indices[row], "seed": chunk.seeds[row],
            "revision": chunk.revision, "scheduler": scheduler, "steps": sampling.steps,
            "guidance_scale": sampling.guidance_scale, "width": sampling.width_px, "height": sampling.height_px,
        }  # fmt: skip
        image_id = content_id(**identity, negative_prompt=sampling.negative_prompt)
        error = named_line(image) if isinstance(image, Exception) else None
        encoded = None if isinstance(image, Exception) else {"bytes": _png(image), "path": f"{image_id}.png"}
        return {"id": image_id, **identity, "split": "test", "image": encoded, "model": chunk.model, "error": error}

    def _renderer(self, name: str) -> "Renderer":
        # Here, so that a worker can hide GPUs before PEFT looks for them.
        from selma_ray.adapters.applying import load_adapted_pipeline
        from selma_ray.models.rendering import Renderer

        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # frees the previous pipeline before the next is loaded
            tested = self._models[name]
            device = device_of(self._config.num_gpus, "evaluation.num_gpus")
            pipeline = load_adapted_pipeline(tested.model, tested.adapter_dir, device)
            self._loaded = (name, Renderer(pipeline, self._config.sampling))
        return self._loaded[1]


class JudgeChunk:
    """Asks a judge, which it holds in its memory, the questions about a chunk's images."""

    def __init__(self, folder: RunFolder, config: EvaluationConfig, judge_key: str, second: bool = False) -> None:
        judge = config.second_judge if second else config.judge
        assert judge is not None
        self._folder = folder
        self._scorer = config.dsg_scorer
        self._judge = open_judge(judge)
        self._judge_key = judge_key
        self._kind = SECOND_ANSWERS if second else ANSWERS

    def __call__(self, chunk: Chunk) -> None:
        """Write the answers about the chunk's images, unless they are there.

        An image that is not there or is corrupt is null, with its reason.
        """
        path = chunk.answers_path(self._judge_key, self._kind)
        if self._folder.exists(*path):
            return
        rows = self._folder.read_table(["/".join(chunk.images_path)]).to_pylist()
        self._folder.write_table(pa.Table.from_pylist(self._answered(chunk, rows), ANSWER_SCHEMA), *path)

    def _answered(self, chunk: Chunk, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        images, faults = zip(*map(_decoded, rows), strict=True)
        scores = score_images(self._judge, images, [prompt.questions for prompt in chunk.prompts], self._scorer)
        return [
            {
                "model": chunk.model, "skill": prompt.skill, "prompt_id": prompt.id, "prompt": prompt.prompt, "seed": seed,
                "question_id": each.id, "category": each.category, "question": each.question, "parents": list(each.parents),
                "answer": each.answer, "p_yes": each.p_yes, "reason": fault or each.reason, "judge": score.judge,
                "gold": asked.answer if asked.choices or asked.answer != "yes" else None,
            }
            for prompt, seed, score, fault in zip(chunk.prompts, chunk.seeds, scores, faults, strict=True)
            for each, asked in zip(score.questions, prompt.questions, strict=True)
        ]  # fmt: skip


def _decoded(row: Mapping[str, Any]) -> tuple[Image.Image | None, str | None]:
    """Return a row's image, or the reason why there is none."""
    if not row["image"] or not row["image"]["bytes"]:
        return None, row["error"] or "there is no image"
    try:
        return Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"), None
    except (OSError, SyntaxError, ValueError) as error:
        return None, f"the image cannot be read: {error}"[:_ERROR_CHARS]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
