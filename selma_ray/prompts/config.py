"""How prompts are written (SELMA, section 3.1)."""

from typing import Any, Literal

from pydantic import Field, model_validator

from selma_ray.config import Placement, StrictModel
from selma_ray.models.thinking import NO_THINKING

__all__ = ["FreeConfig", "LLMConfig", "PromptsConfig", "RemoteConfig"]


class FreeConfig(StrictModel):
    """A stand-in without a model, for measuring a pipeline and trying out a recipe."""

    latency_s: Placement[float] = Field(default=0.0, ge=0)
    """Seconds that one replica waits for each request, one request after another."""


class RemoteConfig(StrictModel):
    """A server that speaks OpenAI's API, such as vLLM's own."""

    url: Placement[str] = Field(default="http://127.0.0.1:8000/v1", pattern=r"^https?://\S+$")
    """Address of the API, with its version: requests go to URL/chat/completions, or URL/completions where `chat` is false."""
    api_key_env: Placement[str | None] = None
    """Name of the environment variable that holds the API key; default: no key is sent."""
    grammars: bool = True
    """Send the grammars of skills, as `structured_outputs`; vLLM's server understands them."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=lambda: dict(NO_THINKING))
    """Arguments of the model's chat template, sent with chats; default: those that switch thinking off. vLLM's and SGLang's servers
    understand them; `{}` sends none, for a server that refuses them, such as OpenAI's own."""
    timeout_s: Placement[float] = Field(default=600, gt=0)
    """Seconds after which a request without an answer is tried again."""
    max_retries: Placement[int] = Field(default=6, ge=0)
    """Times a request is tried again when the server is busy or cannot be reached, each after twice the time: 1, 2, 4 s …"""


class LLMConfig(StrictModel):
    """The language model that writes prompts."""

    engine: Literal["vllm", "remote", "free"] = "vllm"
    """`vllm` runs the model in the cluster, `remote` asks a server, `free` is a stand-in without a model, for measuring."""
    name: str = "miniature"
    """`miniature` (SmolLM2-135M-Instruct), a local folder, or a hub name; with `remote`, the server's name of the model."""
    revision: str | None = None
    """Hub revision; default: the newest."""
    chat: bool | None = None
    """Ask in the model's chat form; default: where its tokenizer has a chat template, or the engine is `remote`."""
    chat_template: str | None = None
    """A file with a Jinja chat template, in place of the tokenizer's."""
    dtype: str = "auto"
    """Precision, in vLLM's words."""
    min_replicas: Placement[int] = Field(default=1, ge=1)
    """Smallest number of vLLM engines."""
    max_replicas: Placement[int] = Field(default=1, ge=1)
    """Largest number of vLLM engines; the pool autoscales between the two."""
    max_restarts: Placement[int] = Field(default=5, ge=0)
    """Times each engine may die and be started anew before the run stops; lost nodes that were taken back do not count."""
    num_cpus: Placement[float] = Field(default=1, gt=0)
    """CPUs of each of the workers of an engine, of which there are `tensor_parallel_size`."""
    num_gpus: Placement[float] = Field(default=0, ge=0)
    """GPUs of each of the workers of an engine; 0 runs it on the CPU."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Workers that one model is split over."""
    max_model_len: int = Field(default=2048, ge=128)
    """Longest request and answer together, in tokens."""
    kv_cache_gb: Placement[int] = Field(default=1, ge=1)
    """Memory of the key-value cache of a CPU engine, in GiB."""
    engine_options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's engine by name, such as quantization or gpu_memory_utilization."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """Sampling temperature; a skill file may set its own, as all of sampling."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of the sampled tokens."""
    max_tokens: int = Field(default=1024, ge=16)
    """Longest answer, in tokens."""
    remote: RemoteConfig = RemoteConfig()
    """Settings of the engine `remote`."""
    free: FreeConfig = FreeConfig()
    """Settings of the engine `free`."""

    @model_validator(mode="after")
    def _replicas_in_order(self) -> "LLMConfig":
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas must be at least min_replicas={self.min_replicas}, got {self.max_replicas}")
        return self


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
    max_requests: Placement[int] = Field(default=1000, ge=1)
    """Requests after which a skill that has not kept enough prompts is given up."""
    rouge_l_threshold: float = Field(default=0.8, gt=0, le=1)
    """A candidate whose ROUGE-L F-measure to a kept prompt exceeds this is dropped."""
    dev_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of kept prompts set aside for choosing checkpoints and merge weights."""
    llm: LLMConfig = LLMConfig()
    """The language model."""

    @property
    def block_size(self) -> int:
        """Return how many requests are issued and answered together."""
        return max(1, self.requests_in_flight // 4)

    def blocks_per_engine(self, num_skills: int) -> int:
        """Return how many blocks an engine may hold at once: all that may be in flight, shared by the most engines there may be.

        More would go to the engine that is there first, or nearest, while others wait for work.
        """
        in_flight = -(-self.requests_in_flight * num_skills // self.block_size)
        return max(1, -(-in_flight // self.llm.max_replicas))

    @model_validator(mode="after")
    def _bound_can_be_kept(self) -> "PromptsConfig":
        most = self.max_requests * self.per_request
        if most < self.per_skill:
            raise ValueError(
                f"max_requests={self.max_requests} requests of per_request={self.per_request} prompts cannot fill "
                f"per_skill={self.per_skill}; raise max_requests to several times {-(-self.per_skill // self.per_request)}"
            )
        return self
