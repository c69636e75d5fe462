"""How prompts are written (SELMA, section 3.1)."""

from typing import Literal

from pydantic import Field

from selma_ray.config import StrictModel

__all__ = ["FreeConfig", "LLMConfig", "PromptsConfig"]


class FreeConfig(StrictModel):
    """The stand-in that takes no model and no computation: for measuring and rehearsing a pipeline."""

    latency_s: float = Field(default=0.0, ge=0)
    """Seconds that one replica waits for each request, one request after another."""


class LLMConfig(StrictModel):
    """The language model that writes prompts."""

    engine: Literal["vllm", "free"] = "vllm"
    """`vllm` runs the model in the cluster; `free` is a stand-in without a model, for measuring."""
    name: str = "miniature"
    """`miniature` (SmolLM2-135M-Instruct), a local folder, or a hub name."""
    revision: str | None = None
    """Hub revision; none takes the newest."""
    dtype: str = "auto"
    """Precision, in vLLM's words."""
    min_replicas: int = Field(default=1, ge=1)
    """Smallest number of vLLM engines."""
    max_replicas: int = Field(default=1, ge=1)
    """Largest number of vLLM engines; the pool autoscales between the two."""
    num_cpus: float = Field(default=1, gt=0)
    """CPUs of an engine."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of an engine; 0 runs it on the CPU."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs one model is split over."""
    max_model_len: int = Field(default=2048, ge=128)
    """Longest request and answer together, in tokens."""
    kv_cache_gb: int = Field(default=1, ge=1)
    """Memory of the key-value cache of a CPU engine, in GiB."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """Sampling temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of the sampled tokens."""
    max_tokens: int = Field(default=1024, ge=16)
    """Longest answer, in tokens."""
    free: FreeConfig = FreeConfig()
    """Settings of the engine `free`."""


class PromptsConfig(StrictModel):
    """How many prompts a skill keeps and how they are asked for."""

    per_skill: int = Field(default=1000, ge=1)
    """Prompts kept for each skill."""
    per_request: int = Field(default=20, ge=1, le=100)
    """Prompts one request asks for."""
    examples_per_request: int = Field(default=3, ge=1)
    """Examples one request shows."""
    requests_in_flight: int = Field(default=16, ge=1)
    """Requests of a skill in flight at once (W in the design); request r sees what was kept up to request r - W."""
    max_requests: int = Field(default=1000, ge=1)
    """Requests after which a skill that has not kept enough prompts is given up."""
    rouge_l_threshold: float = Field(default=0.8, gt=0, le=1)
    """A candidate whose ROUGE-L F-measure to a kept prompt exceeds this is dropped."""
    dev_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of kept prompts set aside for choosing checkpoints and merge weights."""
    llm: LLMConfig = LLMConfig()
    """The language model."""
