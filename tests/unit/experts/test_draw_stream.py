"""The board that hands out chunks of rounds: in any order in which they are asked for, and each as soon as its adapter is there."""

import asyncio
from pathlib import Path

import pytest

from selma_ray.experts.draw_stream import RoundBoard
from selma_ray.experts.rounds import RoundsPlan
from selma_ray.models.config import SamplingConfig
from selma_ray.storage import RunFolder


@pytest.fixture
def plans(tmp_path: Path) -> list[RoundsPlan]:
    folder = RunFolder(str(tmp_path))
    return [
        RoundsPlan(folder, f"experts/{name}/rounds-1", ((name, "a cup"),), SamplingConfig(), 2, 2, 2, 1, seed=0)
        for name in ("counting", "style")
    ]


def publish(plan: RoundsPlan, number: int) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        plan.folder.write_bytes(b"{}", plan.of(number).adapter, name)


def draw(plan: RoundsPlan, number: int) -> None:
    for chunk in range(plan.chunks_per_round):
        plan.folder.write_bytes(b"", plan.of(number).images(chunk))
        plan.folder.write_bytes(b"", plan.of(number).examples(chunk))


def test_who_waits_for_a_later_round_holds_up_nobody(plans: list[RoundsPlan]) -> None:
    async def ask() -> list[list[dict[str, int]]]:
        board = RoundBoard(plans)
        later = asyncio.ensure_future(board.chunk(4))  # of the second round, asked for before the last of the first
        await asyncio.sleep(0)
        for plan in plans:
            publish(plan, 1)
        first = [await asyncio.wait_for(board.chunk(position), 10) for position in range(4)]
        assert not later.done()
        publish(plans[0], 2)
        return [*first, await asyncio.wait_for(later, 10)]

    rows = [row for (row,) in asyncio.run(ask())]
    assert [(row["plan"], row["round"], row["chunk"]) for row in rows] == [
        (0, 1, 0), (0, 1, 1), (1, 1, 0), (1, 1, 1), (0, 2, 0),
    ]  # fmt: skip


def test_what_is_drawn_is_not_handed_out_and_nobody_waits_once_the_board_is_closed(plans: list[RoundsPlan]) -> None:
    async def ask() -> list[list[dict[str, int]]]:
        board = RoundBoard(plans)
        publish(plans[0], 1)
        draw(plans[0], 1)
        publish(plans[1], 1)
        assert await board.blocks() == 6
        handed_out = [await asyncio.wait_for(board.chunk(position), 10) for position in range(2)]
        waiting = asyncio.ensure_future(board.chunk(2))
        await asyncio.sleep(0)
        await board.close()
        return [*handed_out, await asyncio.wait_for(waiting, 10)]

    assert asyncio.run(ask()) == [
        [{"plan": 1, "round": 1, "chunk": 0}], [{"plan": 1, "round": 1, "chunk": 1}], [],
    ]  # fmt: skip
