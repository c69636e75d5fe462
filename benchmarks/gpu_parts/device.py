"""The device that is measured: what it is called, when it is done, and what its memory holds at the most."""

import gc
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "Memory",
    "describe",
    "fp32_products",
    "free_memory",
    "peak_memory",
    "process_group",
    "rates_in_turns",
    "synchronize",
    "the_device",
]

_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "deepspeed")


@dataclass
class Memory:
    """Bytes of tensors on the device, at the most, while it was watched; `added` leaves out what was there before."""

    peak_bytes: int = 0
    added_bytes: int = 0


def the_device(kind: str) -> torch.device:
    """Return the CPU or the first card, by its number, which some of PyTorch's functions insist on."""
    return torch.device("cuda", 0) if kind == "cuda" else torch.device(kind)


def describe(device: torch.device) -> dict[str, Any]:
    """Return the card's (or CPU's) name and memory, its driver, and the versions of what computes on it."""
    found: dict[str, Any] = {"device": device.type, "python": platform.python_version()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    else:
        found |= {"name": f"CPU with {torch.get_num_threads()} threads"}
    return found | {name: version(name) for name in _LIBRARIES}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory() -> None:
    """Give back what nothing holds any more; engines hold themselves in cycles."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA was not started


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Memory]:
    """Watch the memory of a device; the figures are there when the context has ended.

    On the CPU, allocations are traced by PyTorch's profiler and tensors that were there before are not seen.
    """
    memory = Memory()
    if device.type == "cuda":
        free_memory()
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield memory
        synchronize(device)
        memory.peak_bytes = torch.cuda.max_memory_allocated(device)
        memory.added_bytes = memory.peak_bytes - before
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield memory
    held = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            memory.peak_bytes = max(memory.peak_bytes, held)
    memory.added_bytes = memory.peak_bytes


def rates_in_turns(
    ways: Mapping[str, Callable[[], Any]], device: torch.device, seconds_left: Callable[[], float], rounds: int
) -> dict[str, float]:
    """Return how often a second each way can be gone, the median of rounds in which the ways take turns.

    The first round warms up and does not count; no round begins that would not end in time, but for one that counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        started_s = time.monotonic()
        for name, go in ways.items():
            synchronize(device)
            begun_s = time.perf_counter()
            go()
            synchronize(device)
            if number:
                seconds[name].append(time.perf_counter() - begun_s)
        if number and time.monotonic() - started_s > seconds_left():
            break
    return {name: 1 / statistics.median(each) for name, each in seconds.items()}


@contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """Let a card multiply matrices of fp32 in PyTorch's `highest` (its default: fp32) or `high` (TF32)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Give this process a process group of its own, as Ray Train gives a worker; one for all that it fits, as DeepSpeed keeps the first."""
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            backend, init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1
        )
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def _driver() -> str | None:
    try:
        shown = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return shown.stdout.split("\n")[0].strip()
