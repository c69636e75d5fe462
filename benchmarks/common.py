"""What every benchmark prints: the machine, a table for people, and one last line of JSON with its ratios."""

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

__all__ = ["machine", "print_result", "print_table", "read_settings"]


def read_settings(defaults: Mapping[str, int]) -> dict[str, int]:
    """Return the settings with those that the command line replaces by key=value; ends the program where a word is none."""
    settings = dict(defaults)
    for word in sys.argv[1:]:
        key, _, value = word.partition("=")
        if key not in settings or not value.isdecimal():
            sys.exit(f"{word} is no setting: give key=number, with a key of {', '.join(settings)}")
        settings[key] = int(value)
    return settings


def machine() -> str:
    """Return one line on the machine that the figures come from."""
    memory_gb = round(psutil.virtual_memory().total / 1e9)
    load = psutil.getloadavg()[0]
    return (
        f"{psutil.cpu_count()} x {_processor()}, {memory_gb} GB, Python {platform.python_version()}, "
        f"load {load:.1f} at the start"
    )


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a Markdown table."""
    print(f"\n| {' | '.join(header)} |")
    print("|---" * len(header) + "|")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |")


def print_result(result: Mapping[str, Any]) -> None:
    """Print the benchmark's ratios as its last line, in JSON."""
    print(json.dumps(result), flush=True)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
