"""How a merged model is served."""

from pydantic import Field

from selma_ray.config import StrictModel
from selma_ray.models.config import SamplingConfig

__all__ = ["ServingConfig"]


class ServingConfig(StrictModel):
    """The HTTP service: a generator and, next to it, an evaluator."""

    host: str = "127.0.0.1"
    """Address to listen on; anything but loopback needs api_keys_file."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on."""
    api_keys_file: str | None = None
    """File with one bearer key a line; none leaves the service open, which only loopback may be."""
    sampling: SamplingConfig = SamplingConfig()
    """Defaults of a request that names none."""
    max_steps: int = Field(default=100, ge=1)
    """Most denoising steps a request may ask for."""
    max_prompt_chars: int = Field(default=2000, ge=1)
    """Longest prompt."""
    max_images: int = Field(default=10, ge=1)
    """Most images a request may ask for (OpenAI's n)."""
    max_batch_size: int = Field(default=8, ge=1)
    """Images that share a denoising step."""
    max_queued_requests: int = Field(default=64, ge=1)
    """Requests that may wait; one more is answered 429."""
    request_timeout_s: float = Field(default=120, gt=0)
    """Seconds after which a request is answered 504."""
    judge: str = "miniature"
    """The judge behind POST /v1/scores: `miniature`, a local folder, or a hub name."""
    generator_replicas: int = Field(default=1, ge=1)
    """Replicas of the generator."""
    evaluator_replicas: int = Field(default=1, ge=0)
    """Replicas of the evaluator; 0 serves no scores."""
    num_cpus: float = Field(default=0.5, gt=0)
    """CPUs of a replica."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of a generator replica; a fraction shares one."""
