"""The judging step of an evaluation against one question at a time, and against the judge's bare batched forward pass.

Run: python -m benchmarks.judging [rounds=5]

All three answer the DSG questions about the same drawn scenes with the miniature's judge, on one thread. The step starts from the
files of rendered images and ends with the files of answers, as `selma evaluate` does: it reads, decodes, asks, scores and writes,
with a judge that has seen no question before. The loop opens an image for each question. The bare pass is the model alone on
pixels and tokens that lie ready, in the same batches.
"""

import io
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from benchmarks.common import machine, print_result, print_table, read_settings
from selma_ray.evaluation.chunks import Chunk, JudgeChunk, plan_chunks
from selma_ray.evaluation.config import EvaluationConfig
from selma_ray.judging.suites import open_suite
from selma_ray.miniature.captions import parse_caption
from selma_ray.miniature.judge import MAX_QUESTION_TOKENS, MiniatureJudge, images_to_pixels
from selma_ray.miniature.locate import judge_dir
from selma_ray.miniature.scenes import render_scene
from selma_ray.records import IMAGE_SCHEMA
from selma_ray.storage import RunFolder

_BATCH_SIZE = 64
_ALONE_EVERY = 8  # the loop answers for one image in eight: it takes as long for any other


def main() -> None:
    """Measure the three in turns, then print a table and one JSON line."""
    rounds = read_settings({"rounds": 5})["rounds"]
    torch.set_num_threads(1)
    print(machine())
    with tempfile.TemporaryDirectory() as directory:
        folder, chunks = _rendered(directory)
        judge = MiniatureJudge.from_pretrained(judge_dir())
        ready = [_tensors(judge, folder, chunk) for chunk in chunks]
        measures: dict[str, Callable[[], float]] = {
            "step": lambda: _step(folder, chunks),
            "bare forward": lambda: _bare(judge, ready, chunks),
            "one by one": lambda: _one_by_one(judge, folder, chunks),
        }
        rates: dict[str, list[float]] = {name: [] for name in measures}
        for _ in range(rounds + 1):
            for name, measure in measures.items():
                rates[name].append(measure())
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}  # the first round warms up
    rows = [[name, f"{medians[name]:,.0f}", f"{medians['step'] / medians[name]:.2f}"] for name in measures]
    print_table(["way", "questions/s", "the step is times as fast"], rows)
    print_result(
        {
            "over_one_by_one": round(medians["step"] / medians["one by one"], 1),
            "of_bare_forward": round(medians["step"] / medians["bare forward"], 2),
        }
    )


def _rendered(directory: str) -> tuple[RunFolder, list[Chunk]]:
    """Write the image files of the whole held-out suite, as rendering leaves them."""
    folder, suite = RunFolder(directory), open_suite("miniature")
    chunks = plan_chunks("drawn", "0", suite, EvaluationConfig(batch_size=_BATCH_SIZE), seed=0)
    for chunk in chunks:
        rows = [_row(prompt, seed) for prompt, seed in zip(chunk.prompts, chunk.seeds, strict=True)]
        folder.write_table(pa.Table.from_pylist(rows, IMAGE_SCHEMA), *chunk.images_path)
    return folder, chunks


def _row(prompt: Any, seed: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    render_scene(parse_caption(prompt.prompt), random.Random(seed)).save(buffer, "PNG")
    return {
        "id": prompt.id, "skill": prompt.skill, "prompt": prompt.prompt, "split": "test", "image_index": 0, "seed": seed,
        "image": {"bytes": buffer.getvalue(), "path": None}, "model": "drawn", "revision": "0", "scheduler": "", "steps": 0,
        "guidance_scale": 0.0, "width": 64, "height": 64, "error": None,
    }  # fmt: skip


def _images(folder: RunFolder, chunk: Chunk) -> list[Image.Image]:
    rows = folder.read_table(["/".join(chunk.images_path)], columns=["image"])["image"].to_pylist()
    return [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in rows]


def _tensors(judge: MiniatureJudge, folder: RunFolder, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a chunk's pixels [N, C, H, W] and the tokens [N, Q, T] of its questions."""
    asked = [[question.question for question in prompt.questions] for prompt in chunk.prompts]
    tokens_NQT = torch.zeros(len(asked), max(map(len, asked)), MAX_QUESTION_TOKENS, dtype=torch.long)
    for row, questions in enumerate(asked):
        encoded = judge.tokenizer(
            questions, padding="max_length", max_length=MAX_QUESTION_TOKENS, truncation=True, return_tensors="pt"
        )
        tokens_NQT[row, : len(questions)] = encoded["input_ids"]
    return images_to_pixels(_images(folder, chunk)), tokens_NQT


def _step(folder: RunFolder, chunks: Sequence[Chunk]) -> float:
    judge_chunk = JudgeChunk(folder, EvaluationConfig(), "benchmark")
    started_s = time.perf_counter()
    for chunk in chunks:
        judge_chunk(chunk)
    return _questions(chunks) / (time.perf_counter() - started_s)


@torch.inference_mode()
def _bare(judge: MiniatureJudge, ready: Sequence[tuple[torch.Tensor, torch.Tensor]], chunks: Sequence[Chunk]) -> float:
    started_s = time.perf_counter()
    for pixels_NCHW, tokens_NQT in ready:
        judge.model(judge.model.encode_images(pixels_NCHW), tokens_NQT)
    return _questions(chunks) / (time.perf_counter() - started_s)


def _one_by_one(judge: MiniatureJudge, folder: RunFolder, chunks: Sequence[Chunk]) -> float:
    rows = [
        (row, prompt)
        for chunk in chunks
        for row, prompt in zip(
            folder.read_table(["/".join(chunk.images_path)], columns=["image"])["image"].to_pylist(),
            chunk.prompts,
            strict=True,
        )
    ][::_ALONE_EVERY]
    started_s = time.perf_counter()
    for row, prompt in rows:
        for question in prompt.questions:
            image = Image.open(io.BytesIO(row["bytes"])).convert("RGB")
            judge.answer(judge.encode_images([image]), [[question.question]])
    return sum(len(prompt.questions) for _, prompt in rows) / (time.perf_counter() - started_s)


def _questions(chunks: Sequence[Chunk]) -> int:
    return sum(len(prompt.questions) for chunk in chunks for prompt in chunk.prompts)


if __name__ == "__main__":
    main()
