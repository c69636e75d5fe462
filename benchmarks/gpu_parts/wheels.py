"""Wheels laid beside the repository by `make gpu-kit`, for a CUDA machine without a network. Imports nothing but `packaging`."""

import hashlib
import os
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename
from packaging.version import Version

__all__ = ["KIT", "use_wheels"]

KIT = Path(__file__).resolve().parents[2] / ".gpu-kit"


def use_wheels(folder: Path = KIT) -> list[str]:
    """Unpack the wheels that this Python lacks, or has older, and put them first on sys.path; returns their names.

    Processes started from this one find them too.
    """
    wanted = [wheel for wheel in sorted(folder.glob("*.whl")) if _is_wanted(wheel.name)]
    if not wanted:
        return []
    content = hashlib.sha256("".join(f"{wheel.name} {wheel.stat().st_size}" for wheel in wanted).encode()).hexdigest()
    target = Path(tempfile.gettempdir()) / f"selma-gpu-kit-{os.getuid()}-{content[:12]}"
    if not target.is_dir():
        _unpack(wanted, target)
    sys.path.insert(0, str(target))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(target), os.environ.get("PYTHONPATH"))))
    return [wheel.name for wheel in wanted]


def _is_wanted(filename: str) -> bool:
    name, offered, _, tags = parse_wheel_filename(filename)
    if tags.isdisjoint(sys_tags()):
        return False
    try:
        return Version(version(name)) < offered
    except PackageNotFoundError:
        return True


def _unpack(wheels: list[Path], target: Path) -> None:
    """Unpack beside the target and rename, so that a folder of that name is whole."""
    part = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=target.parent))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(part)
    part.rename(target)
