"""Which files of a diffusers folder make one pipeline, and how they are named without a variant."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PipelineFile", "copy_file", "pipeline_files"]

_SHARD = r"-\d{5}-of-\d{5}"
_WEIGHTS = re.compile(
    rf"(?P<stem>diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?(?P<shard>{_SHARD})?(?:\.(?P<late_variant>\w+))?\.safetensors"
)
_INDEX = re.compile(r"(?P<stem>\w+)\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")
_OTHER_WEIGHTS = {
    ".bin",
    ".ckpt",
    ".pt",
    ".pth",
    ".pkl",
    ".msgpack",
    ".h5",
    ".onnx",
    ".onnx_data",
    ".gguf",
    ".safetensors",
}


@dataclass(frozen=True)
class PipelineFile:
    """A file to copy: its path in the source folder, and its path in the copy, both relative."""

    source: Path
    target: Path


def pipeline_files(folder: Path, variant: str | None) -> list[PipelineFile]:
    """Return the files of a pipeline: of each part, the weights of `variant` where there are such, else the plain ones.

    Weights are safetensors alone; single-file checkpoints, pickles and other frameworks' weights are left out.
    """
    files = list(_part_files(folder, folder, variant))
    for part in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files += _part_files(folder, part, variant)
    return files


def copy_file(source: Path, target: Path) -> None:
    """Copy a file; in a weights index the names of the shards lose their variant."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if _INDEX.fullmatch(source.name):
        index = json.loads(source.read_text())
        index["weight_map"] = {key: _plain_name(name) for key, name in index["weight_map"].items()}
        target.write_text(json.dumps(index, indent=2) + "\n")
    else:
        shutil.copyfile(source, target)


def _part_files(root: Path, part: Path, variant: str | None) -> Iterator[PipelineFile]:
    paths = sorted(path for path in part.iterdir() if path.is_file())
    in_variant = variant if any(variant == _variant_of(path.name) for path in paths if _is_weights(path.name)) else None
    for path in paths:
        if _is_weights(path.name) or _INDEX.fullmatch(path.name):
            if part == root or _variant_of(path.name) != in_variant:
                continue
        elif path.suffix in _OTHER_WEIGHTS:
            continue
        yield PipelineFile(path.relative_to(root), (part / _plain_name(path.name)).relative_to(root))


def _is_weights(name: str) -> bool:
    return _WEIGHTS.fullmatch(name) is not None


def _variant_of(name: str) -> str | None:
    match = _WEIGHTS.fullmatch(name) or _INDEX.fullmatch(name)
    return match and (match["variant"] or match.groupdict().get("late_variant"))


def _plain_name(name: str) -> str:
    weights, index = _WEIGHTS.fullmatch(name), _INDEX.fullmatch(name)
    if weights:
        return f"{weights['stem']}{weights['shard'] or ''}.safetensors"
    return f"{index['stem']}.safetensors.index.json" if index else name
