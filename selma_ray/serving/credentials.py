"""Content credentials: a signed claim in each finished image's file that a model has drawn it, as C2PA 2 specifies."""

import io
import json
import threading
from pathlib import Path
from typing import Any

from PIL import Image

from selma_ray import __version__
from selma_ray.errors import ConfigError, first_line
from selma_ray.serving.config import CredentialsConfig, ServingConfig
from selma_ray.serving.encoding import PNG, OutputFormat, encode

__all__ = ["Signer", "open_signer"]

_SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_DRAWN, _CHANGED = f"{_SOURCE}trainedAlgorithmicMedia", f"{_SOURCE}compositeWithTrainedAlgorithmicMedia"


def open_signer(config: ServingConfig) -> "Signer | None":
    """Return what signs images, or None where serving.credentials is not set; raises ConfigError where it cannot sign."""
    return None if config.credentials is None else Signer(config.credentials)


class Signer:
    """Signs image files; may be called from several threads.

    It signs an image of its own first: raises ConfigError where c2pa-python is missing, a file cannot be read, or the certificates
    are none that C2PA accepts.
    """

    def __init__(self, config: CredentialsConfig) -> None:
        try:
            import c2pa
        except ImportError:
            raise ConfigError(
                "serving.credentials needs c2pa-python, which is not installed; pip install 'selma_ray[c2pa]', or set it to null"
            ) from None
        self._c2pa: Any = c2pa
        certificates = _read("certificates_file", config.certificates_file)
        key = _read("key_file", config.key_file)
        url = None if config.timestamp_url is None else config.timestamp_url.encode()
        self._lock = threading.Lock()
        try:
            # A thumbnail would be ten times as large as the claim itself.
            self._context = c2pa.Context.from_dict({"builder": {"thumbnail": {"enabled": False}}})
            self._signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(config.algorithm.encode(), certificates, key, url))
            self(encode(Image.new("RGB", (8, 8)), PNG), "png", False)
        except c2pa.C2paError as error:
            raise ConfigError(
                f"serving.credentials: {config.certificates_file} and {config.key_file} cannot sign by {config.algorithm} "
                f"({first_line(error)}); give a signer's certificate followed by its issuer's, and the key of the first in PKCS #8"
            ) from None

    def __call__(self, file: bytes, output_format: OutputFormat, changed: bool) -> bytes:
        """Return an image's file with a claim in it: drawn by a model, or, where `changed`, an image that a model has changed."""
        media_type = f"image/{output_format}"
        action = {
            "action": "c2pa.created",
            "digitalSourceType": _CHANGED if changed else _DRAWN,
            "softwareAgent": {"name": "selma_ray", "version": __version__},
        }
        claim = {
            "claim_generator_info": [{"name": "selma_ray", "version": __version__}],
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
        }
        signed = io.BytesIO()
        with self._lock, self._c2pa.Builder(json.dumps(claim), self._context) as builder:
            builder.sign(self._signer, media_type, io.BytesIO(file), signed)
        return signed.getvalue()


def _read(key: str, path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(
            f"serving.credentials.{key} {path} cannot be read ({type(error).__name__}); name a PEM file that every node has"
        ) from None
