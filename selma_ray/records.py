"""The rows that flow between stages: column names, Arrow schemas, content-addressed ids.

Images travel as encoded bytes in the struct {bytes, path} that `datasets` opens as an image.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa

__all__ = [
    "ANSWER_SCHEMA",
    "IMAGE_SCHEMA",
    "PROMPT_SCHEMA",
    "Split",
    "content_id",
    "seed_of",
]

Split = Literal["train", "dev", "test"]
"""What a prompt is for. An image may also be `rejected`: rendered for training, and not chosen for it."""

PROMPT_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("skill", pa.string(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),  # order in which the skill kept it
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)

_IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
_IMAGE_FIELDS = [
    pa.field("id", pa.string(), nullable=False),
    pa.field("skill", pa.string(), nullable=False),
    pa.field("prompt", pa.string(), nullable=False),
    pa.field("split", pa.string(), nullable=False),
    pa.field("image_index", pa.int32(), nullable=False),
    pa.field("seed", pa.int64(), nullable=False),
    pa.field("image", _IMAGE),  # null where rendering failed
    pa.field("model", pa.string(), nullable=False),
    pa.field("revision", pa.string(), nullable=False),
    pa.field("scheduler", pa.string(), nullable=False),
    pa.field("steps", pa.int32(), nullable=False),
    pa.field("guidance_scale", pa.float32(), nullable=False),
    pa.field("width", pa.int32(), nullable=False),
    pa.field("height", pa.int32(), nullable=False),
    pa.field("error", pa.string()),  # null where rendering succeeded
    pa.field("score", pa.float32()),  # the judge's, where a selection asked for one
]


def _hugging_face_metadata(fields: list[pa.Field]) -> dict[str, str]:
    features: dict[str, Any] = {}
    for field in fields:
        if field.type == _IMAGE:
            features[field.name] = {"_type": "Image"}
        else:
            features[field.name] = {"dtype": str(field.type).replace("float", "float32"), "_type": "Value"}
    return {"huggingface": json.dumps({"info": {"features": features}})}


IMAGE_SCHEMA = pa.schema(_IMAGE_FIELDS, metadata=_hugging_face_metadata(_IMAGE_FIELDS))

ANSWER_SCHEMA = pa.schema(
    [
        pa.field("model", pa.string(), nullable=False),  # base, merged or the name of an expert
        pa.field("skill", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("question_id", pa.int32(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("parents", pa.list_(pa.int32()), nullable=False),
        pa.field("answer", pa.string()),  # null, with a reason, where the judge could not be read
        pa.field("p_yes", pa.float32()),
        pa.field("reason", pa.string()),
        pa.field("judge", pa.string(), nullable=False),
        pa.field("gold", pa.string()),  # the right answer, null where that is a yes to a yes/no question
    ]
)


def content_id(**parts: Any) -> str:
    """Return 32 hexadecimal digits that depend on the names and values of `parts` alone."""
    return hashlib.sha256(_canonical(parts)).hexdigest()[:32]


def seed_of(base_seed: int, **parts: Any) -> int:
    """Return a seed in [0, 2**31) that depends on `base_seed` and `parts` alone, never on order or timing."""
    digest = hashlib.sha256(_canonical({"base_seed": base_seed, **parts})).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _canonical(parts: Mapping[str, Any]) -> bytes:
    return json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
