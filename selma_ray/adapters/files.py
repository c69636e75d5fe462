"""The files of a PEFT adapter's folder: their names, whether they are there, and what names their content. Loads no torch."""

import hashlib
from pathlib import Path

from selma_ray.local_copies import local_copy
from selma_ray.storage import RunFolder

__all__ = [
    "ADAPTER_FILES",
    "CONFIG_FILE",
    "TEXT_ENCODERS",
    "WEIGHTS_FILE",
    "adapter_digest",
    "is_adapter",
    "local_adapter",
]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_FILES = (WEIGHTS_FILE, CONFIG_FILE)
"""In the order in which they are written: the last one's being there means that the adapter is whole."""
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
"""Folders inside an adapter's, each with the same files, for what it has for text encoders."""

_ALL_FILES = (*ADAPTER_FILES, *(f"{part}/{name}" for part in TEXT_ENCODERS for name in ADAPTER_FILES))


def is_adapter(folder: RunFolder, directory: str) -> bool:
    """Tell whether a folder of a run holds a whole adapter."""
    return folder.exists(directory, CONFIG_FILE)


def local_adapter(place: str | Path) -> Path:
    """Return a local folder with an adapter's files; one on object storage is fetched. Raises StorageError where it cannot be read."""
    return local_copy(place, only=_ALL_FILES)


def adapter_digest(place: str | Path) -> str:
    """Return a hash of an adapter's weights and settings."""
    digest, adapter_dir = hashlib.sha256(), local_adapter(place)
    for name in _ALL_FILES:
        if name in ADAPTER_FILES or (adapter_dir / name).is_file():
            with (adapter_dir / name).open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
