"""Fills .gpu-kit with wheels for a CUDA machine without a network that has Python 3.12, torch, transformers, peft and pyarrow.

Run: make gpu-kit. What lies in the folder is unpacked by `python -m benchmarks.gpu` there, where that machine lacks it or has it older.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks.gpu_parts.wheels import KIT

__all__: list[str] = []

_ROOT = Path(__file__).resolve().parents[1]
_WHEELS = (
    "annotated-types", "diffusers", "hjson", "importlib-metadata", "pydantic", "pydantic-core", "typing-extensions",
    "typing-inspection", "zipp",
)  # fmt: skip
_BUILT = "deepspeed"
_TRIMMED = "bitsandbytes"
_KEPT_LIBRARY = re.compile(r"libbitsandbytes_(cpu|cuda13\d)\.so$")
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_LIMIT_MIB = 64


def main() -> None:
    """Download, build and trim the wheels, and say how large the folder and the tree are."""
    shutil.rmtree(KIT, ignore_errors=True)
    KIT.mkdir()
    _download([*_WHEELS, _TRIMMED])
    # It is published as source alone; without its kernels, which an adapter's AdamW does not use, it is pure Python.
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(KIT), _pin(_BUILT), DS_BUILD_OPS="0")
    for wheel in KIT.glob(f"{_TRIMMED}-*.whl"):
        _trim(wheel)
    kit_mib, tree_mib = _mib(KIT.iterdir()), _mib(_ROOT / name for name in _tree())
    print(
        f"{KIT.name}: {len(list(KIT.iterdir()))} wheels, {kit_mib:.1f} MiB; with the working tree {kit_mib + tree_mib:.1f} MiB"
    )
    if kit_mib + tree_mib > _LIMIT_MIB:
        sys.exit(f"the tree and {KIT.name} must be at most {_LIMIT_MIB} MiB to be carried to a card; leave a wheel out")


def _download(names: list[str]) -> None:
    platforms = [word for platform in _PLATFORMS for word in ("--platform", platform)]
    tags = [
        "--python-version",
        "3.12",
        "--implementation",
        "cp",
        "--abi",
        "cp312",
        "--abi",
        "abi3",
        "--abi",
        "none",
        *platforms,
    ]
    _pip("download", "--no-deps", "--only-binary=:all:", *tags, "--dest", str(KIT), *map(_pin, names))


def _pip(*words: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", words[0], "--quiet", "--disable-pip-version-check", *words[1:]]
    subprocess.run(command, check=True, env={**os.environ, **environment})


def _pin(name: str) -> str:
    """Return a requirement with the version that this environment is pinned to."""
    for line in (_ROOT / "requirements" / "cpu.txt").read_text().splitlines():
        if line.startswith(f"{name}=="):
            return line.partition(";")[0].strip()
    sys.exit(f"requirements/cpu.txt must pin {name}; run `make lock`")


def _trim(wheel: Path) -> None:
    """Leave out the kernels for CUDA before 13 and for other makers' cards."""
    part = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as trimmed:
        for name in whole.namelist():
            if "/libbitsandbytes_" not in name or _KEPT_LIBRARY.search(name):
                trimmed.writestr(name, whole.read(name))
    part.replace(wheel)


def _tree() -> list[str]:
    """Return the files that are tracked, or new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.splitlines() if (_ROOT / name).is_file()]


def _mib(files: Iterable[Path]) -> float:
    return sum(path.stat().st_size for path in files) / 2**20


if __name__ == "__main__":
    main()
