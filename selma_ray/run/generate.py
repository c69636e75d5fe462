"""Prompts and images: the LLM's stream into the renderers, or ground truth in the place of either."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from selma_ray.cluster.placement import check_fit
from selma_ray.run.opening import Run
from selma_ray.run.progress import Progress, Report
from selma_ray.run.recipe import Recipe
from selma_ray.storage import RunFolder

__all__ = ["generate", "prompts_from"]

_SHOW_EVERY_S = 1.0


def generate(run: Run, report: Report) -> dict[str, Any]:
    """Stream prompts from the LLM into the renderers; returns counts of both."""
    from selma_ray.images.card import write_card
    from selma_ray.images.stream import check_failures, follow, image_summary, render_stream
    from selma_ray.judging.suites import open_suite
    from selma_ray.prompts.llm import llm_errors
    from selma_ray.prompts.progress import watch_prompts
    from selma_ray.prompts.splits import train_count
    from selma_ray.prompts.stream import prompt_stream, prompt_summary

    recipe = run.recipe
    check_fit(_least_resources(recipe), recipe.cluster)
    suite = open_suite(recipe.evaluation.suite)
    excluded = [test.prompt for test in suite]
    if recipe.data.prompts == "ground_truth":
        from selma_ray.run.ground_truth import write_captions

        write_captions(run.folder, run.skill_names, recipe.prompts, recipe.seed, excluded)
    prompts = prompt_stream(run.skills, recipe.prompts, recipe.seed, run.folder, recipe.cluster, excluded=excluded)
    if recipe.data.images == "ground_truth":
        with llm_errors(recipe.prompts.llm):
            return _draw(run, prompts, report)
    model = recipe.data.model or recipe.model
    images = render_stream(
        prompts, recipe.images, model, recipe.seed, run.folder, recipe.cluster, open_scorer=_scorer_of(recipe)
    )
    total = train_count(recipe.prompts) * len(run.skills) * recipe.images.per_prompt
    prompt_words = watch_prompts(run.folder)
    with llm_errors(recipe.prompts.llm), _showing_prompts(run.folder, prompt_words, total, report) as images_begin:
        for row, progress in follow(images, run.folder, recipe.images, total):
            images_begin()
            figures = tuple(filter(None, (prompt_words(), progress.words)))
            report(Progress("generate", progress.done, total, f"{row['skill']}: {row['prompt']}", figures))
    summary = {
        "prompts": prompt_summary(run.folder, run.skill_names),
        "images": image_summary(run.folder, run.skill_names),
    }
    check_failures(summary["images"], recipe.images)
    write_card(run.folder, run.skill_names, recipe.images, model, prompts_from(recipe))
    return summary


@contextmanager
def _showing_prompts(
    folder: RunFolder, words: Callable[[], str | None], total: int, report: Report
) -> Iterator[Callable[[], None]]:
    """Report the prompts from a thread until the yielded function is called: before its first image the stream says nothing."""
    from selma_ray.images.progress import read_progress

    first_image = threading.Event()

    def show() -> None:
        while not first_image.wait(_SHOW_EVERY_S):
            if said := words():
                images = read_progress(folder)
                report(Progress("generate", images.done if images else 0, total, "no image yet", (said,)))

    def end() -> None:
        first_image.set()
        thread.join()

    thread = threading.Thread(target=show, name="show-prompts", daemon=True)
    thread.start()
    try:
        yield end
    finally:
        end()


def _draw(run: Run, prompts: Any, report: Report) -> dict[str, Any]:
    from selma_ray.images.stream import image_summary
    from selma_ray.prompts.splits import train_count
    from selma_ray.prompts.stream import prompt_summary
    from selma_ray.run.ground_truth import draw_images

    total = train_count(run.recipe.prompts) * len(run.skills)
    drawn = draw_images(run.folder, prompts.iter_rows(), run.recipe.images, run.recipe.seed)
    for done, row in enumerate(drawn, start=1):
        report(Progress("generate", done, total, f"{row['skill']}: {row['prompt']}"))
    return {
        "prompts": prompt_summary(run.folder, run.skill_names),
        "images": image_summary(run.folder, run.skill_names),
    }


def _least_resources(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Return what the two pools of the stream take at least, by the key of the recipe that says so."""
    images, llm = recipe.images, recipe.prompts.llm
    demands = {
        "images.min_renderers": {
            "CPU": images.min_renderers * images.num_cpus,
            "GPU": images.min_renderers * images.num_gpus,
        }
    }
    if llm.engine in ("vllm", "free") and recipe.data.prompts != "ground_truth":
        demands["prompts.llm.min_replicas"] = {
            "CPU": llm.min_replicas * llm.tensor_parallel_size * llm.num_cpus,
            "GPU": llm.min_replicas * llm.tensor_parallel_size * llm.num_gpus,
        }
    return demands


def prompts_from(recipe: Recipe) -> str:
    """Return what wrote the prompts, in words."""
    if recipe.data.prompts == "ground_truth":
        return "the skill's own dataset"
    llm = recipe.prompts.llm
    return f"no language model ({llm.engine} stand-in)" if llm.engine == "free" else llm.name


def _scorer_of(recipe: Recipe) -> Callable[[], Any] | None:
    """Return what loads the judge that chooses among a prompt's images, where the recipe asks for a choice."""
    selection = recipe.images.selection
    return partial(_open_scorer, selection.judge) if selection else None


def _open_scorer(judge: str) -> Callable[[Sequence[Any], Sequence[str]], list[float | None]]:
    """Load a judge and return what scores images by their prompts; called in a renderer's process."""
    from selma_ray.judging.config import JudgeConfig
    from selma_ray.judging.judges.opening import open_judge
    from selma_ray.judging.scoring import ImageScorer

    scorer = ImageScorer(open_judge(JudgeConfig(name=judge)))

    def score(images: Sequence[Any], prompts: Sequence[str]) -> list[float | None]:
        questions = [scorer.questions(prompt) for prompt in prompts]
        return [scored.score for scored in scorer.score(images, questions)]

    return score
