"""How questions about prompts are written."""

from typing import Literal

from pydantic import Field

from selma_ray.config import Placement, StrictModel

__all__ = ["QuestionLLMConfig", "WriterConfig"]


class QuestionLLMConfig(StrictModel):
    """The language model that writes questions, run by vLLM."""

    name: str = "miniature"
    """`miniature` (SmolLM2-135M-Instruct, too small for good questions), a local folder, or a hub name."""
    revision: str | None = None
    """Hub revision; default: the newest."""
    dtype: str = "auto"
    """Precision, in vLLM's words."""
    replicas: Placement[int] = Field(default=1, ge=1)
    """Largest number of vLLM engines; the pool grows from 1."""
    num_cpus: Placement[float] = Field(default=1, gt=0)
    """CPUs of an engine where there is no GPU."""
    num_gpus: Placement[float] = Field(default=0, ge=0)
    """GPUs of an engine; 0 runs it on the CPU."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs one model is split over."""
    max_model_len: int = Field(default=8192, ge=512)
    """Longest request and answer together, in tokens."""
    kv_cache_gb: Placement[int] = Field(default=1, ge=1)
    """Memory of the key-value cache of a CPU engine, in GiB."""
    max_tokens: int = Field(default=1024, ge=16)
    """Longest answer, in tokens."""


class WriterConfig(StrictModel):
    """Which kind of questions a language model writes, and how it is asked for them."""

    style: Literal["dsg", "tifa"] = "dsg"
    """`dsg`: yes/no questions that depend on one another, in three calls; `tifa`: multiple choice, in one."""
    format: Literal["json", "text"] = "json"
    """`json` holds the model to a schema; `text` is the reference's own format, read tolerantly."""
    examples: str | None = None
    """In-context examples: a JSON Lines file of them, or for DSG its tifa160-dev-anns.csv; default: a few of our own."""
    max_examples: int = Field(default=23, ge=1)
    """Examples shown, the first of the file."""
    caption_model: str | None = None
    """Text-to-text model (UnifiedQA), a folder or a hub name, that must answer a TIFA question from the prompt alone for it to
    stay; default: all do."""
    attempts: int = Field(default=2, ge=1, le=5)
    """Calls for one answer; an answer that cannot be used is asked for again, with another seed."""
    seed: int = Field(default=0, ge=0)
    """Seed of the repeated calls; the first call is greedy."""
    batch_size: int = Field(default=32, ge=1)
    """Prompts whose questions are written together; what a batch has written is kept when a run is stopped."""
    llm: QuestionLLMConfig | None = None
    """The language model; default: in a run the one that writes its prompts, elsewhere the miniature's."""
