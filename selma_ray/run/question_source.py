"""Which source of questions a recipe means, for which of its prompts, and what writes them."""

from typing import Literal

from selma_ray.errors import ConfigError
from selma_ray.judging.writing.config import QuestionLLMConfig, WriterConfig
from selma_ray.records import Split
from selma_ray.run.recipe import Recipe

__all__ = ["SourceName", "check_questions_can_be_had", "is_chosen_later", "source_name", "splits_judged", "writer_of"]

SourceName = Literal["grammar", "suite", "written", "whole"]

_MINIATURES = ("miniature", "miniature-weak")


def source_name(recipe: Recipe) -> SourceName:
    """Return the source of questions that a recipe means."""
    source = recipe.questions.source
    if source == "auto":
        return "grammar" if recipe.model.name in _MINIATURES else "written"
    return source


def is_chosen_later(recipe: Recipe) -> bool:
    """Tell whether images are chosen when all are rendered: a renderer cannot wait for questions that are yet to be written."""
    selection = recipe.images.selection
    return selection is not None and (selection.judges > 0 or source_name(recipe) == "written")


def splits_judged(recipe: Recipe) -> tuple[Split, ...]:
    """Return the splits of the run's own prompts whose images are judged while the run is made."""
    chosen = recipe.images.selection is not None and recipe.data.images == "model"
    splits: list[Split] = ["train"] if chosen or recipe.experts.nft else []
    choice, search = recipe.experts.selection, recipe.merging.search
    if (
        (choice and choice.suite is None)
        or (recipe.merging.method == "search" and search.suite is None)
        or recipe.rounds > 1
    ):
        splits.append("dev")
    return tuple(splits)


def writer_of(recipe: Recipe) -> WriterConfig:
    """Return how questions are written, by the language model that writes the prompts where the recipe names no other.

    Raises ConfigError where that is not run by vLLM.
    """
    writer, llm = recipe.questions.writer, recipe.prompts.llm
    if writer.llm is not None:
        return writer
    if llm.engine != "vllm":
        raise ConfigError(
            f"questions.writer.llm must name a language model for vLLM where prompts.llm.engine is {llm.engine}; name one, or set "
            "questions.source to suite or whole"
        )
    same = llm.model_dump(
        include={"name", "revision", "dtype", "num_cpus", "num_gpus", "tensor_parallel_size", "kv_cache_gb"}
    )
    return writer.model_copy(update={"llm": QuestionLLMConfig(**same, replicas=llm.max_replicas)})


def check_questions_can_be_had(recipe: Recipe) -> None:
    """Raise ConfigError where questions are to be written and no language model for it is named, before anything runs."""
    if splits_judged(recipe) and source_name(recipe) == "written":
        writer_of(recipe)
    if recipe.questions.source == "suite":
        from selma_ray.judging.suites import open_suite

        open_suite(recipe.questions.suite or "")
