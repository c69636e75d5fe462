"""How often the host waits for the device, counted by PyTorch's profiler."""

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["host_syncs"]


def host_syncs(step: Callable[[], Any], count: int, device: torch.device) -> dict[str, Any]:
    """Return waits and copies between host and device in a step, over `count` of them, and the lines where waits were found.

    On the CPU there are none to be found.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    counts = _counted(lambda: [step() for _ in range(count)], activities)
    counts -= _counted(lambda: None, activities)  # the profiler waits, too
    waits = {name: times / count for name, times in counts.items() if "Synchronize" in name}
    copies = {name: times / count for name, times in counts.items() if name.startswith("Memcpy")}
    return {
        "host_syncs_per_step": round(sum(waits.values()), 3),
        "waits_per_step": waits,
        "copies_per_step": copies,
        "waiting_lines": _waiting_lines(step) if cuda else [],
    }


def _counted(go: Callable[[], Any], activities: list[ProfilerActivity]) -> Counter[str]:
    with profile(activities=activities) as watched:
        go()
    return Counter(event.name for event in watched.events())


def _waiting_lines(step: Callable[[], Any]) -> list[str]:
    """Return the lines of Python that made a step wait, as PyTorch's own check for it reports them."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sorted({f"{Path(each.filename).name}:{each.lineno}" for each in seen if "synchroniz" in str(each.message)})
