"""The whole loop: each stage of a run in order, every one skipped where the run's folder says that it is finished."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from selma_ray.cluster import check_fit, connect
from selma_ray.errors import ConfigError, ModelNotFoundError, RunMismatchError
from selma_ray.models.config import ModelConfig
from selma_ray.recipe import Recipe
from selma_ray.skills import Skill, load_skills
from selma_ray.storage import RunFolder

__all__ = [
    "STAGES",
    "Progress",
    "Report",
    "Run",
    "evaluate",
    "finished",
    "generate",
    "merge",
    "models_under_test",
    "open_run",
    "prompts_from",
    "run_stage",
    "train",
]

logger = logging.getLogger(__name__)

_SHOW_EVERY_S = 1.0

# Keys that say where and how fast a run works, not what comes out of it: they may change between two starts of a run.
_PLACEMENT_SECTIONS = ("run_dir", "cluster", "serving", "study")
_PLACEMENT_KEYS = {
    "num_cpus", "num_gpus", "min_replicas", "max_replicas", "kv_cache_gb", "min_renderers", "max_renderers", "renderers",
    "cpus_per_worker", "encoders", "gpus_per_worker", "max_concurrent", "max_attempts", "max_failures", "max_failed_fraction",
    "max_requests", "max_restarts", "max_retries", "api_key_env", "license", "latency_s",
    "judges", "compare_with", "allow_other_judge",
}  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """How far a stage has come: `done` of `total` units, with a detail for people, and figures that take a line each."""

    stage: str
    done: int
    total: int
    detail: str = ""
    figures: tuple[str, ...] = ()


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Run:
    """A recipe, its folder and its skills, checked against one another."""

    recipe: Recipe
    folder: RunFolder
    skills: tuple[Skill, ...]

    @property
    def skill_names(self) -> list[str]:
        """Return the names of the skills, in the recipe's order."""
        return [skill.name for skill in self.skills]

    @property
    def merged_model(self) -> ModelConfig:
        """Return the merged model: the recipe's model with the baked pipeline in its place."""
        pipeline = self.folder.path("merged", self.recipe.merging.name, "pipeline")
        return self.recipe.model.model_copy(update={"name": pipeline, "revision": None, "variant": None})


def open_run(recipe: Recipe) -> Run:
    """Check everything a recipe names, then write it to its run folder; a run folder of another recipe is refused."""
    from selma_ray.models.locate import locate_judge, locate_text_to_image
    from selma_ray.prompts.llm import check_llm

    skills = tuple(load_skills(recipe.skills))
    unknown = set(recipe.merging.weights or {}) - {skill.name for skill in skills}
    if unknown:
        raise ConfigError(
            f"merging.weights names {sorted(unknown)[0]!r}, which is no skill of the recipe; mend the name"
        )
    for model in filter(None, (recipe.model, recipe.data.model)):
        locate_text_to_image(model.name, model.revision)
    _check_other_models(recipe)
    locate_judge(recipe.evaluation.judge.name)
    if recipe.images.selection:
        locate_judge(recipe.images.selection.judge)
    check_llm(recipe.prompts.llm)
    folder = RunFolder(recipe.run_dir)
    if folder.exists("recipe.yaml"):
        _refuse_other_recipe(yaml.safe_load(folder.read_bytes("recipe.yaml")), recipe, folder)
    else:
        folder.write_bytes(recipe.as_yaml().encode(), "recipe.yaml")
    return Run(recipe, folder, skills)


def generate(run: Run, report: Report) -> dict[str, Any]:
    """Stream prompts from the LLM into the renderers; returns counts of both."""
    from selma_ray.evaluation.suites import open_suite
    from selma_ray.images.card import write_card
    from selma_ray.images.stream import check_failures, follow, image_summary, render_stream
    from selma_ray.prompts.llm import llm_errors
    from selma_ray.prompts.progress import watch_prompts
    from selma_ray.prompts.stream import prompt_stream, prompt_summary, train_count

    recipe = run.recipe
    check_fit(_least_resources(recipe), recipe.cluster)
    suite = open_suite(recipe.evaluation.suite)
    excluded = [test.prompt for test in suite]
    if recipe.data.prompts == "ground_truth":
        from selma_ray.ground_truth import write_captions

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
    from selma_ray.ground_truth import draw_images
    from selma_ray.images.stream import image_summary
    from selma_ray.prompts.stream import prompt_summary, train_count

    total = train_count(run.recipe.prompts) * len(run.skills)
    drawn = draw_images(run.folder, prompts.iter_rows(), run.recipe.images, run.recipe.seed)
    for done, row in enumerate(drawn, start=1):
        report(Progress("generate", done, total, f"{row['skill']}: {row['prompt']}"))
    return {
        "prompts": prompt_summary(run.folder, run.skill_names),
        "images": image_summary(run.folder, run.skill_names),
    }


def train(run: Run, report: Report) -> dict[str, Any]:
    """Fit one expert per skill and the baselines, all at once within the cluster's means; returns their final losses."""
    from selma_ray.experts.launch import plan_experts, train_experts

    recipe = run.recipe
    results = train_experts(
        run.folder, plan_experts(run.skill_names, recipe.experts), recipe.model, recipe.seed, recipe.cluster,
        on_progress=lambda event: report(Progress("train", event.done_steps, event.total_steps, event.detail)),
        score=_dev_scorer(run),
    )  # fmt: skip
    return {name: result.as_dict() for name, result in results.items()}


def _dev_scorer(run: Run) -> Any:
    """Return what scores adapters for the choice of checkpoints, or None where the recipe chooses none."""
    selection = run.recipe.experts.selection
    if selection is None:
        return None
    from selma_ray.dev_scores import DevScorer, dev_prompts

    prompts = dev_prompts(run.folder, run.skill_names, selection.suite, "experts.selection")
    return DevScorer(run.recipe.model, run.recipe.evaluation, prompts, selection.max_prompts, run.recipe.seed)


def merge(run: Run, report: Report) -> dict[str, Any]:
    """Merge the experts into one pipeline; returns what merging lost."""
    from selma_ray.merging.run import merge_experts

    recipe = run.recipe
    found = _searched(run, report) if recipe.merging.method == "search" else None
    report(Progress("merge", 0, 1))
    summary = merge_experts(run.folder, run.skill_names, recipe.model, recipe.merging, recipe.seed, found)
    report(Progress("merge", 1, 1))
    return summary.as_dict()


def _searched(run: Run, report: Report) -> Any:
    from selma_ray.merge_search import search_merge

    recipe = run.recipe
    return search_merge(
        run.folder, run.skill_names, recipe.model, recipe.merging, recipe.evaluation, recipe.seed, recipe.cluster,
        on_score=lambda done, total, detail: report(Progress("merge", done, total, detail)),
    )  # fmt: skip


def evaluate(run: Run, report: Report) -> dict[str, Any]:
    """Score base, experts and merged model on the same prompts and seeds, then write the report."""
    from selma_ray.evaluation.run import evaluate_models
    from selma_ray.evaluation.suites import open_suite

    recipe = run.recipe
    suite = open_suite(recipe.evaluation.suite, recipe.evaluation.max_prompts)
    summary = evaluate_models(
        run.folder, models_under_test(run), suite, recipe.evaluation, recipe.seed, recipe.cluster,
        on_progress=lambda event: report(Progress("evaluate", event.done, event.total, event.detail)),
    )  # fmt: skip
    return summary.as_dict()


STAGES: Mapping[str, Callable[[Run, Report], dict[str, Any]]] = {
    "generate": generate,
    "train": train,
    "merge": merge,
    "evaluate": evaluate,
}


def finished(run: Run, name: str) -> dict[str, Any] | None:
    """Return the summary of a finished stage, or None; an evaluation is unfinished where it is to be compared with other results."""
    done = run.folder.done(name)
    if done is not None and name == "evaluate":
        wanted = {key: other.model_dump() for key, other in run.recipe.evaluation.compare_with.items()}
        if done.get("compare_with", {}) != wanted:
            return None
    return done


def run_stage(run: Run, name: str, report: Report) -> dict[str, Any]:
    """Run one stage unless it is finished; returns its summary either way. Raises ConfigError where an earlier one is missing."""
    done = finished(run, name)
    if done is not None:
        logger.info("%s is finished in %s", name, run.folder.uri)
        return done
    names = list(STAGES)
    for earlier in names[: names.index(name)]:
        if run.folder.done(earlier) is None:
            raise ConfigError(
                f"{name} needs the finished stage {earlier} in {run.folder.uri}; run `selma {earlier}` first"
            )
    connect(run.recipe.cluster)
    summary = STAGES[name](run, report)
    run.folder.mark_done(name, summary)
    return summary


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
    from selma_ray.evaluation.config import JudgeConfig
    from selma_ray.evaluation.judges.opening import open_judge
    from selma_ray.evaluation.scoring import ImageScorer

    scorer = ImageScorer(open_judge(JudgeConfig(name=judge)))

    def score(images: Sequence[Any], prompts: Sequence[str]) -> list[float | None]:
        questions = [scorer.questions(prompt) for prompt in prompts]
        return [scored.score for scored in scorer.score(images, questions)]

    return score


def models_under_test(run: Run) -> dict[str, Any]:
    """Return the models that are evaluated, by name: base, the experts, the merged one and those the recipe adds."""
    from selma_ray.evaluation.run import ModelUnderTest
    from selma_ray.experts.plan import plan_experts

    recipe = run.recipe
    models = {"base": ModelUnderTest(recipe.model)}
    if recipe.evaluation.experts:
        for expert in plan_experts(run.skill_names, recipe.experts):
            models[expert.name] = ModelUnderTest(recipe.model, adapter_dir=run.folder.path("experts", expert.name))
    models["merged"] = ModelUnderTest(run.merged_model)
    for name, other in recipe.evaluation.models.items():
        if name in models:
            raise ConfigError(f"evaluation.models.{name} is the name of a model of this run; choose another")
        models[name] = ModelUnderTest(other.model, other.adapter_dir)
    return models


def _check_other_models(recipe: Recipe) -> None:
    """Raise ModelNotFoundError where evaluation.models names a pipeline or an adapter that is not there."""
    from selma_ray.models.locate import locate_text_to_image

    for name, other in recipe.evaluation.models.items():
        locate_text_to_image(other.model.name, other.model.revision)
        if other.adapter_dir is not None and not Path(other.adapter_dir, "adapter_config.json").is_file():
            raise ModelNotFoundError(
                f"evaluation.models.{name}.adapter_dir {other.adapter_dir} must hold adapter_config.json; name a PEFT adapter's folder"
            )


def _refuse_other_recipe(before: dict[str, Any], recipe: Recipe, folder: RunFolder) -> None:
    now = yaml.safe_load(recipe.as_yaml())
    for section in now.keys() | before.keys():
        if section in _PLACEMENT_SECTIONS:
            continue
        difference = _first_difference(before.get(section), now.get(section), section)
        if difference:
            key, old, new = difference
            raise RunMismatchError(
                f"{folder.uri} was made with {key}={old!r}, this recipe says {new!r}; set run_dir to a new folder or undo the change"
            )


def _first_difference(before: Any, now: Any, key: str) -> tuple[str, Any, Any] | None:
    if key.rpartition(".")[2] in _PLACEMENT_KEYS:
        return None
    if isinstance(before, dict) and isinstance(now, dict):
        nested = (
            _first_difference(before.get(name), now.get(name), f"{key}.{name}")
            for name in sorted(before.keys() | now.keys())
        )
        return next(filter(None, nested), None)
    return None if before == now else (key, before, now)
