"""Which model judges images, and where the questions that it is asked come from."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from selma_ray.config import Placement, StrictModel
from selma_ray.judging.writing.config import WriterConfig

__all__ = ["JudgeConfig", "JudgeSetting", "QuestionsConfig"]


class JudgeConfig(StrictModel):
    """The model that answers questions about images."""

    name: str = "miniature"
    """`miniature`, its second judge `miniature-detector`, a local folder, or a hub name."""
    revision: str | None = None
    """Hub revision; default: the newest."""
    engine: Literal["auto", "miniature", "miniature_detector", "transformers", "vllm"] = "auto"
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
    gpu_memory_fraction: Placement[float | None] = Field(default=None, gt=0, le=1)
    """Share of a GPU's memory that a judge in vLLM takes; default: vLLM's own, 0.9. In a renderer's process leave room for the pipeline."""
    kv_cache_gb: Placement[int] = Field(default=1, ge=1)
    """Memory of the key-value cache of a judge in vLLM on the CPU, in GiB."""


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


JudgeSetting = Annotated[JudgeConfig, BeforeValidator(_named)]
"""A judge in a recipe: its settings, or its name alone."""


class QuestionsConfig(StrictModel):
    """Where the questions about a caption come from, wherever images are judged by a run's own prompts."""

    source: Literal["auto", "grammar", "suite", "written", "whole"] = "auto"
    """`grammar`: the miniature's; `suite`: those of a file; `written`: a language model in vLLM writes them; `whole`: VQAScore's one
    question about the whole prompt. `auto`: grammar where the model is the miniature, written elsewhere. A prompt that the source has
    no questions for is asked the one about the whole prompt, and counted."""
    suite: str | None = None
    """Suite by name, or JSON Lines file of prompts with questions, for the source `suite`."""
    exact_counts: bool = False
    """With the source `grammar`, ask also whether there is exactly one where a caption says “a”: nobody else asks about one too many."""
    writer: WriterConfig = WriterConfig()
    """How a language model writes them, for the source `written`."""

    @model_validator(mode="after")
    def _suite_is_named(self) -> "QuestionsConfig":
        if self.source == "suite" and self.suite is None:
            raise ValueError("source suite needs questions.suite; name a suite or a JSON Lines file")
        return self
