"""Prompts and images: the LLM's stream into the renderers, or ground truth in the place of either."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from selma_ray.errors import StorageError
from selma_ray.images.selection import ScoreImages
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.sources import QuestionSource
from selma_ray.models.config import ModelConfig
from selma_ray.progress import Progress, Report
from selma_ray.run.demands import stage_demands, stream_fits_at_once
from selma_ray.run.opening import Run
from selma_ray.run.question_source import is_chosen_later
from selma_ray.run.questions import open_source, question_counts, questions_beside
from selma_ray.run.recipe import Recipe
from selma_ray.storage import RunFolder

if TYPE_CHECKING:  # the command line does not load Ray to read a recipe
    from ray.data import Dataset

__all__ = ["generate", "open_scorer", "prompts_from"]

_SHOW_EVERY_S = 1.0


def generate(run: Run, report: Report) -> dict[str, Any]:
    """Stream prompts from the LLM into the renderers; returns counts of both."""
    from selma_ray.images.card import write_card
    from selma_ray.images.compaction import compact_shards
    from selma_ray.images.plan import PlanImages
    from selma_ray.images.stream import check_failures, existing_ids, image_summary
    from selma_ray.judging.suites import open_suite
    from selma_ray.prompts.llm import llm_errors
    from selma_ray.prompts.stream import prompt_stream, prompt_summary

    recipe = run.recipe
    at_once = stream_fits_at_once(recipe)
    excluded = [test.prompt for test in open_suite(recipe.evaluation.suite)]
    if recipe.data.prompts == "ground_truth":
        from selma_ray.run.ground_truth import write_captions

        write_captions(run.folder, run.skill_names, recipe.prompts, recipe.seed, excluded)

    open_prompts = partial(
        prompt_stream, run.skills, recipe.prompts, recipe.seed, run.folder, recipe.cluster, excluded=excluded
    )
    if recipe.data.images == "ground_truth":
        with llm_errors(recipe.prompts.llm):
            return _draw(run, open_prompts(), report)
    if not at_once:
        _write_all_prompts(run, open_prompts(), report)
    model = recipe.data.model or recipe.model
    plan = PlanImages(recipe.images, model, recipe.seed, existing_ids(run.folder))
    streamed = _render(run, open_prompts(unfinished=plan.unfinished), model, report)
    if is_chosen_later(recipe):
        _choose(run, report)
    compact_shards(run.folder)
    summary: dict[str, Any] = {
        "prompts": prompt_summary(run.folder, run.skill_names),
        "questions": question_counts(run),
        "images": image_summary(run.folder, run.skill_names),
        "long_prompts": _long_prompts(run, model),
    }
    _check_found(streamed, summary["images"], run.folder)
    check_failures(summary["images"], recipe.images)
    write_card(run.folder, run.skill_names, recipe.images, model, prompts_from(recipe))
    return summary


def _check_found(streamed: int, images: Mapping[str, Any], folder: RunFolder) -> None:
    """Raise StorageError where the folder holds fewer images than the stream brought: they lie where the driver does not look."""
    found = sum(images[key] for key in ("rendered", "rejected", "failed"))
    if found < streamed:
        raise StorageError(
            f"{streamed} images were rendered, {found} are in {folder.uri}: it must be storage that all nodes share, and nothing may "
            "delete there; mount one filesystem there on every node, or set run_dir to s3://… or gs://…"
        )


def _long_prompts(run: Run, model: ModelConfig) -> dict[str, Any] | None:
    """Return how many prompts the model sees the end of no more, by its own tokens; None where no model reads them."""
    from selma_ray.models.prompt_length import prompt_lengths
    from selma_ray.prompts.stream import read_prompts

    if run.recipe.images.engine != "diffusers":
        return None
    prompts = [text for skill in run.skill_names for text in read_prompts(run.folder, skill)["prompt"].to_pylist()]
    lengths = prompt_lengths(model, prompts)
    return None if lengths is None else asdict(lengths)


def _write_all_prompts(run: Run, prompts: "Dataset", report: Report) -> None:
    """Keep all prompts before a renderer starts, where the cluster cannot hold both pools; returns when the LLM's engines are gone.

    Side by side one of them would wait, and take the other's place when its process dies.
    """
    from selma_ray.cluster.placement import wait_until_free
    from selma_ray.prompts.llm import llm_errors
    from selma_ray.prompts.progress import watch_prompts

    llm, wanted = run.recipe.prompts.llm, run.recipe.prompts.per_skill * len(run.skills)
    words = watch_prompts(run.folder)
    with llm_errors(llm), _showing_prompts(run.folder, words, wanted, report, f"the language model {llm.name} loads"):
        for done, row in enumerate(prompts.iter_rows(), start=1):
            figures = tuple(filter(None, (words(), "renderers start when the language model is done and gone")))
            report(Progress("generate", done, wanted, f"{row['skill']}: {row['prompt']}", figures))
    wait_until_free(stage_demands(run.recipe, "generate")[0][0][:1], run.recipe.cluster)


def _render(run: Run, prompts: "Dataset", model: ModelConfig, report: Report) -> int:
    """Stream prompts through the renderers, and have their questions written beside them where a language model does that.

    Returns the number of images that came.
    """
    from selma_ray.images.stream import follow, render_stream
    from selma_ray.prompts.llm import llm_errors
    from selma_ray.prompts.progress import watch_prompts
    from selma_ray.prompts.splits import train_count

    recipe, chosen_later = run.recipe, is_chosen_later(run.recipe)
    images = render_stream(
        prompts, recipe.images, model, recipe.seed, run.folder, recipe.cluster,
        open_scorer=None if chosen_later else _scorer_of(run), choose_later=chosen_later,
    )  # fmt: skip
    total = train_count(recipe.prompts) * len(run.skills) * recipe.images.per_prompt
    prompt_words = watch_prompts(run.folder)
    with (
        questions_beside(run, report),
        llm_errors(recipe.prompts.llm),
        _showing_prompts(run.folder, prompt_words, total, report, _loading(recipe, model)) as images_begin,
    ):
        streamed = 0
        for row, progress in follow(images, run.folder, recipe.images, total):
            streamed += 1
            images_begin()
            figures = tuple(filter(None, (prompt_words(), progress.words)))
            report(Progress("generate", progress.done, total, f"{row['skill']}: {row['prompt']}", figures))
    return streamed


def _choose(run: Run, report: Report) -> None:
    from selma_ray.images.choosing import choose_images

    selection = run.recipe.images.selection
    scorer = _scorer_of(run)
    assert selection is not None
    assert scorer is not None

    choose_images(run.folder, selection, scorer, run.recipe.cluster, report)


@contextmanager
def _showing_prompts(
    folder: RunFolder, words: Callable[[], str | None], total: int, report: Report, loading: str
) -> Iterator[Callable[[], None]]:
    """Report what loads, then the prompts, from a thread until the yielded function is called: the stream tells of images alone."""
    from selma_ray.images.progress import read_progress

    first_image = threading.Event()

    def show() -> None:
        while not first_image.wait(_SHOW_EVERY_S):
            images = read_progress(folder)
            report(Progress("generate", images.done if images else 0, total, "no image yet", (words() or loading,)))

    def end() -> None:
        first_image.set()
        thread.join()

    thread = threading.Thread(target=show, name="show-prompts", daemon=True)
    thread.start()
    try:
        yield end
    finally:
        end()


def _loading(recipe: Recipe, model: ModelConfig) -> str:
    """Return what the stream waits for before its first prompt, in words."""
    llm = recipe.prompts.llm
    if recipe.data.prompts == "ground_truth" or llm.engine == "free":
        return f"the model {model.name} loads"
    waits = "loads" if llm.engine == "vllm" else "is asked"
    patience = ", on a CPU in a minute or two" if llm.engine == "vllm" and not llm.num_gpus else ""
    return f"the language model {llm.name} {waits}{patience}; the model {model.name} loads beside it"


def _draw(run: Run, prompts: "Dataset", report: Report) -> dict[str, Any]:
    from selma_ray.images.compaction import compact_shards
    from selma_ray.images.stream import image_summary
    from selma_ray.prompts.splits import train_count
    from selma_ray.prompts.stream import prompt_summary
    from selma_ray.run.ground_truth import draw_images

    total = train_count(run.recipe.prompts) * len(run.skills)
    drawn = draw_images(run.folder, prompts.iter_rows(), run.recipe.images, run.recipe.seed)
    for done, row in enumerate(drawn, start=1):
        report(Progress("generate", done, total, f"{row['skill']}: {row['prompt']}"))
    compact_shards(run.folder)
    return {
        "prompts": prompt_summary(run.folder, run.skill_names),
        "questions": question_counts(run),
        "images": image_summary(run.folder, run.skill_names),
    }


def prompts_from(recipe: Recipe) -> str:
    """Return what wrote the prompts, in words."""
    if recipe.data.prompts == "ground_truth":
        return "the skill's own dataset"
    llm = recipe.prompts.llm
    return f"no language model ({llm.engine} stand-in)" if llm.engine == "free" else llm.name


def _scorer_of(run: Run) -> Callable[[], ScoreImages] | None:
    """Return what loads the judge that chooses among a prompt's images, where the recipe asks for a choice."""
    selection = run.recipe.images.selection
    return partial(open_scorer, selection.judge, open_source(run)) if selection else None


def open_scorer(judge: JudgeConfig, source: QuestionSource) -> ScoreImages:
    """Load a judge and return what scores images by their prompts; called in the process that judges."""
    from selma_ray.judging.judges.opening import open_judge
    from selma_ray.judging.scoring import ImageScorer

    return ImageScorer(open_judge(judge), source)
