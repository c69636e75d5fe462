"""What kinds of rows cost in one batch: guided beside unguided, rows with LoRAs beside plain ones."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import print_table
from benchmarks.serving_parts.load import closed_loop
from selma_ray.adapters.peft_format import LoraFactors, write_adapter
from selma_ray.models.parts import denoiser_of

__all__ = ["KINDS", "PAIRS", "cost_of_kinds", "kinds_together", "write_experts"]

Body = dict[str, Any]

KINDS: Mapping[str, Body] = {
    "unguided": {"model": "merged", "guidance_scale": 1.0},
    "guided": {"model": "merged", "guidance_scale": 2.0},
    "plain": {"model": "base", "guidance_scale": 1.0},
    "one LoRA": {"model": "one", "guidance_scale": 1.0},
    "two LoRAs": {"model": {"one": 0.5, "two": 0.5}, "guidance_scale": 1.0},
}
"""What requests of a kind say; plain rows and those with LoRAs are drawn by one denoiser, the base."""

PAIRS = (("unguided", "guided"), ("plain", "one LoRA"), ("plain", "two LoRAs"), ("one LoRA", "two LoRAs"))
_RANK = 16
_CLIENTS = 16


def cost_of_kinds(
    draw: Callable[[Sequence[Body]], float], body: Body, count: int, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return images/s of each kind alone, and for each pair in one batch the time over that of both halves by themselves.

    `draw` draws bodies together and returns the seconds; kinds take turns, so that a slow minute hits all of them.
    """
    alone: dict[str, list[float]] = {kind: [] for kind in KINDS}
    together: dict[tuple[str, str], list[float]] = {pair: [] for pair in PAIRS}
    for number in range(rounds):
        for kind, seconds in alone.items():
            seconds.append(draw([{**body, **KINDS[kind], "seed": number} for _ in range(count)]))
        for pair, seconds in together.items():
            seconds.append(draw([{**body, **KINDS[pair[index % 2]], "seed": number} for index in range(count)]))
    rates = {kind: count / statistics.median(seconds) for kind, seconds in alone.items()}
    shares = {
        f"{one} and {other}": statistics.median(
            both / ((first + second) / 2)
            for both, first, second in zip(together[one, other], alone[one], alone[other], strict=True)
        )
        for one, other in PAIRS
    }
    return rates, shares


def kinds_together(url: str, body: Body, rounds: int) -> dict[str, float]:
    """Print what kinds of rows cost, alone and in one batch; returns the worst ratio, and that of images/s without guidance and with it."""
    rates, shares = cost_of_kinds(partial(closed_loop, url, clients=_CLIENTS), body, 2 * _CLIENTS, rounds)
    print_table(("kind alone", "images/s"), [(kind, f"{rate:.2f}") for kind, rate in rates.items()])
    print_table(
        ("in one batch", "time over both halves alone"), [(pair, f"{share:.2f}") for pair, share in shares.items()]
    )
    return {
        "mixed_over_apart": max(shares.values()),
        "unguided_over_guided": rates["unguided"] / rates["guided"],
    }


def write_experts(pipeline: Any, folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Write random LoRAs on the attention of a pipeline's denoiser; returns their folders by name."""
    modules = {
        name: tuple(module.weight.shape)
        for name, module in denoiser_of(pipeline).named_modules()
        if isinstance(module, torch.nn.Linear) and "attn" in name
    }
    generator = torch.Generator().manual_seed(0)
    for name in names:
        factors = [
            LoraFactors(
                module,
                torch.randn(_RANK, inputs, generator=generator) / inputs**0.5,
                0.01 * torch.randn(outputs, _RANK, generator=generator),
                1.0,
            )
            for module, (outputs, inputs) in modules.items()
        ]
        write_adapter(folder / name, factors, modules, _RANK, "miniature")
    return {name: str(folder / name) for name in names}
