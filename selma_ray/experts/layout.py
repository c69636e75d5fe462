"""Names of files in the cache of encoded examples, for whoever writes and whoever reads it."""

__all__ = ["EMPTY_CAPTION"]

EMPTY_CAPTION = "empty-caption.safetensors"
"""Conditioning of an example without a caption, beside the shards."""
