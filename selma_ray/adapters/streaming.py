"""Writing a safetensors file one tensor at a time: memory holds one tensor, whatever the size of the file.

The format: eight bytes with the header's length, a JSON header of names, dtypes, shapes and offsets, then the raw tensors.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from selma_ray.errors import AdapterError

__all__ = ["DTYPES", "TensorSpec", "write_safetensors"]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor that is yet to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Return the tensor's size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(
    path: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `tensors`, which come in the order of `specs`, each converted to its spec's dtype.

    Raises AdapterError for a value that fp16 cannot hold.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        offset += spec.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        for spec, tensor in zip(specs, tensors, strict=True):
            # Factors of convolutions come laid out in two dimensions.
            assert tensor.numel() == torch.Size(spec.shape).numel(), (spec, tensor.shape)
            _check_range(tensor, spec, path)
            stream.write(tensor.to(spec.dtype).contiguous().reshape(-1).view(torch.uint8).numpy())


def _check_range(tensor: torch.Tensor, spec: TensorSpec, path: Path) -> None:
    if spec.dtype != torch.float16 or tensor.dtype == torch.float16 or not tensor.numel():
        return
    least, most = torch.aminmax(tensor)
    if max(-least, most) > torch.finfo(torch.float16).max:
        raise AdapterError(
            f"{path.name}: {spec.name} holds a value that is too large for fp16; set the dtype of what is written to bf16 or fp32"
        )
