"""Stage 2: the model renders its own training images (SELMA, section 3.2), prompt by prompt as the LLM writes them."""

from typing import Any

from ray.data import ActorPoolStrategy, Dataset

from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.placement import beside_driver, role_options
from selma_ray.images.config import ImagesConfig
from selma_ray.images.engines import open_engine
from selma_ray.images.plan import PlanImages
from selma_ray.images.progress import follow
from selma_ray.images.rendering import OpenEngine, RenderPrompts
from selma_ray.images.selection import OpenScorer
from selma_ray.images.shards import check_failures, existing_ids, forget_failures, image_summary, read_images
from selma_ray.images.writing import WriteImages
from selma_ray.models.config import ModelConfig
from selma_ray.storage import RunFolder

__all__ = ["check_failures", "existing_ids", "follow", "image_summary", "read_images", "render_stream"]

# One batch is denoised while the one before it is encoded, and rows of the next are there to fill it up.
_CALLS_PER_RENDERER = 4
# A light stage takes whole blocks, in an actor: starting a worker anew for its tasks can cost seconds.
_LIGHT_STAGE: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}


def render_stream(
    prompts: Dataset,
    config: ImagesConfig,
    model: ModelConfig,
    seed: int,
    folder: RunFolder,
    cluster: ClusterConfig,
    *,
    open_scorer: OpenScorer | None = None,
    choose_later: bool = False,
    open_engine: OpenEngine = open_engine,
) -> Dataset:
    """Return the stream of finished images: a light row (id, skill, prompt, split, error, seconds, again) for each written.

    Takes rows of PROMPT_SCHEMA; only training prompts whose images are not in the folder are rendered. Images that fail
    are recorded with their reason; `follow` stops where there are too many. A recipe with a selection needs `open_scorer`, or chooses
    later: then all images of a prompt are kept for `choose_images`.
    """
    judge = config.selection.judge if config.selection and not choose_later else None  # in the renderer's process
    forget_failures(folder)
    planned = prompts.map_batches(
        PlanImages,
        fn_constructor_args=(config, model, seed, existing_ids(folder)),
        compute=ActorPoolStrategy(size=1),
        **_LIGHT_STAGE,
        **beside_driver(),
    )
    rendered = planned.map_batches(
        RenderPrompts,
        fn_constructor_args=(
            config,
            model,
            folder,
            None if choose_later or not config.selection else open_scorer,
            open_engine,
        ),
        batch_size=config.rows_per_batch,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=config.min_renderers,
            max_size=config.max_renderers,
            max_tasks_in_flight_per_actor=_CALLS_PER_RENDERER,
            max_concurrent_calls_per_actor=_CALLS_PER_RENDERER,
            enable_true_multi_threading=True,
        ),
        num_cpus=max(config.num_cpus, judge.num_cpus) if judge else config.num_cpus,
        num_gpus=(max(config.num_gpus, judge.num_gpus) if judge else config.num_gpus) or None,
        **role_options("render", cluster),
    )
    return rendered.map_batches(
        WriteImages,
        fn_constructor_args=(folder, choose_later),
        compute=ActorPoolStrategy(min_size=1, max_size=config.max_renderers),
        num_cpus=0,
        **_LIGHT_STAGE,
    )
