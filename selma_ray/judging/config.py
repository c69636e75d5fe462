"""Which model judges images."""

from typing import Literal

from pydantic import Field

from selma_ray.config import Placement, StrictModel

__all__ = ["JudgeConfig"]


class JudgeConfig(StrictModel):
    """The model that answers questions about images."""

    name: str = "miniature"
    """`miniature`, a local folder, or a hub name."""
    revision: str | None = None
    """Hub revision; none takes the newest."""
    engine: Literal["auto", "miniature", "transformers", "vllm"] = "auto"
    """What runs it: `transformers` ViLT and BLIP, `vllm` any vision-language model; `auto` goes by its configuration."""
    embedder: str | None = None
    """Sentence embedding model, a folder or a hub name, that maps free answers to a question's choices (TIFA)."""
    batch_size: int = Field(default=64, ge=1)
    """Images judged at once; with `transformers` and `vllm` pairs of image and question."""
    num_cpus: Placement[float] = Field(default=1, gt=0)
    """CPUs of a judge."""
    num_gpus: Placement[float] = Field(default=0, ge=0)
    """GPUs of a judge."""
    dtype: str = "auto"
    """Precision of a judge in vLLM, in its words."""
    max_model_len: int = Field(default=4096, ge=128)
    """Longest image and question together, in tokens, of a judge in vLLM."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs one judge in vLLM is split over."""
    kv_cache_gb: Placement[int] = Field(default=1, ge=1)
    """Memory of the key-value cache of a judge in vLLM on the CPU, in GiB."""
