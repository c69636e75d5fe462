"""Putting a finished folder in the place of another without a moment in which there is none."""

import ctypes
import os
import shutil
from pathlib import Path

__all__ = ["replace_folder"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def replace_folder(part: Path, target: Path) -> None:
    """Move the folder `part` to `target`; what was there is deleted after the new one has taken its place."""
    if not target.exists():
        part.replace(target)
        return
    if not _exchanged(part, target):
        aside = part.with_suffix(".old.part")
        target.replace(aside)
        part.replace(target)
        part = aside
    shutil.rmtree(part, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two paths change places at once (Linux, renameat2); False where the system or the filesystem cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
