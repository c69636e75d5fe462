"""The stream that draws the images of all experts' rounds: one Ray Data execution from the first round to the last.

Its source hands out a chunk as soon as the adapter that draws it is there, so no process starts or ends between rounds.
"""

import asyncio
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from selma_ray.cluster.asked_source import AskedSource
from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.errors import reason_of
from selma_ray.cluster.metrics import count
from selma_ray.cluster.placement import beside_driver, role_options
from selma_ray.experts.config import NftConfig
from selma_ray.experts.drawing import OpenScorer
from selma_ray.experts.rounds import RoundsPlan
from selma_ray.models.config import ModelConfig
from selma_ray.models.device import see_own_gpus

__all__ = ["DrawChunks", "RoundBoard", "RoundsDrawing"]

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_REMOTE_POLL_S = 1.0
_CHUNK_SCHEMA = pa.schema([("plan", pa.int64()), ("round", pa.int64()), ("chunk", pa.int64())])
_READS_AT_ONCE = 2


class RoundsDrawing:
    """Draws in a thread, beside training, whatever rounds become drawable; trainers learn of its end from the rounds' folders."""

    def __init__(
        self,
        plans: Sequence[RoundsPlan],
        config: NftConfig,
        model: ModelConfig,
        open_scorer: OpenScorer,
        precision: str,
        cluster: ClusterConfig,
    ) -> None:
        for plan in plans:
            plan.restart()
        self._plans = plans
        self._board = ray.remote(RoundBoard).options(**beside_driver()).remote(plans)
        blocks = ray.get(self._board.blocks.remote())
        chunks = ray.data.read_datasource(
            AskedSource(self._board.chunk, _CHUNK_SCHEMA, blocks), override_num_blocks=blocks, num_cpus=0,
            compute=TaskPoolStrategy(size=_READS_AT_ONCE),
        ) if blocks else None  # fmt: skip
        self._drawn = chunks and chunks.map_batches(
            DrawChunks,
            fn_constructor_args=(
                tuple(plans),
                model,
                open_scorer,
                precision,
                config.cpus_per_renderer,
                config.gpus_per_renderer,
            ),
            batch_size=None,
            compute=ActorPoolStrategy(size=config.renderers),
            num_cpus=config.cpus_per_renderer,
            num_gpus=config.gpus_per_renderer or None,
            **role_options("render", cluster),
        )
        self._thread = threading.Thread(target=self._draw, name="draw-rounds", daemon=True)

    def __enter__(self) -> "RoundsDrawing":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        ray.get(self._board.close.remote())
        self._thread.join()

    def _draw(self) -> None:
        if self._drawn is None:
            return
        reason = "the stream that draws them ended; run the same command again"
        try:
            for row in self._drawn.iter_rows():
                count("selma_images_rendered", row["images"], self._plans[0].folder.uri, "train")
                if row["error"]:
                    reason = row["error"]
                    break
        except Exception as error:
            logger.warning("drawing of rounds failed", exc_info=error)
            reason = reason_of(error)
        for plan in self._plans:
            plan.stop(reason)


class RoundBoard:
    """Hands out chunks of rounds in the order in which their adapters appear; a call may be repeated, as Ray repeats lost tasks."""

    def __init__(self, plans: Sequence[RoundsPlan]) -> None:
        self._plans = plans
        self._next = [1] * len(plans)
        self._blocks: list[dict[str, int]] = []
        self._closed = False

    async def blocks(self) -> int:
        """Return how many chunks all rounds have that are still to be drawn."""
        return sum(
            len(plan.of(number).missing_chunks()) for plan in self._plans for number in range(1, plan.rounds + 1)
        )

    async def close(self) -> None:
        """Hand out no more chunks."""
        self._closed = True

    async def chunk(self, position: int) -> list[dict[str, int]]:
        """Return chunk `position` (a row of plan, round and chunk) when it may be drawn; none where no more will be.

        Whoever waits holds up nobody: a later position may be asked for before an earlier one, whose images it waits for.
        """
        interval_s = _POLL_S if self._plans[0].folder.is_local else _REMOTE_POLL_S
        while position >= len(self._blocks) and not self._closed:
            if not self._take_next():
                await asyncio.sleep(interval_s)
        return self._blocks[position : position + 1]

    def _take_next(self) -> bool:
        """Put the chunks of the next drawable rounds on the board, one round of each plan; returns whether there were any."""
        found: list[dict[str, int]] = []
        for index, plan in enumerate(self._plans):
            number = self._next[index]
            while number <= plan.rounds and plan.of(number).can_be_drawn() and not plan.of(number).missing_chunks():
                number += 1
            if number <= plan.rounds and plan.of(number).can_be_drawn():
                missing = plan.of(number).missing_chunks()
                found += [{"plan": index, "round": number, "chunk": chunk} for chunk in missing]
                number += 1
            self._next[index] = number
        self._blocks += found
        return bool(found)


class DrawChunks:
    """A stage as Ray Data calls it: chunks of rounds in, counts of images out."""

    def __init__(
        self,
        plans: Sequence[RoundsPlan],
        model: ModelConfig,
        open_scorer: OpenScorer,
        precision: str,
        num_cpus: float,
        num_gpus: float,
    ) -> None:
        see_own_gpus(num_gpus)
        import torch

        from selma_ray.experts.drawing import DrawRounds

        torch.set_num_threads(max(1, int(num_cpus)))
        self._draw = DrawRounds(plans, model, open_scorer, precision, num_gpus)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Draw each chunk; an error is passed on as a row, because Ray passes on nothing but its traceback."""
        images, errors = [], []
        for plan, number, chunk in zip(batch["plan"], batch["round"], batch["chunk"], strict=True):
            try:
                images.append(self._draw(int(plan), int(number), int(chunk)))
                errors.append("")
            except Exception as error:
                logger.warning("a chunk of round %d could not be drawn", number, exc_info=error)
                images.append(0)
                errors.append(str(error).partition("\n")[0] or type(error).__name__)
        return {"images": images, "error": errors}
