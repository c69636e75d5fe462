"""The dataset card beside the shards: what the Hugging Face hub and a reader want to know of a dataset."""

from collections.abc import Iterable, Sequence

from huggingface_hub import DatasetCard, DatasetCardData

from selma_ray.images.config import ImagesConfig
from selma_ray.images.shards import image_summary, splits_of_shards
from selma_ray.models.config import ModelConfig
from selma_ray.models.locate import locate_text_to_image
from selma_ray.storage import RunFolder

__all__ = ["card_text", "write_card"]

_SPLITS = ("train", "dev", "test", "rejected")
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def write_card(
    folder: RunFolder, skills: Sequence[str], config: ImagesConfig, model: ModelConfig, llm: str, stage: str = "images"
) -> None:
    """Write images/README.md, with which `datasets.load_dataset` opens the folder as it stands, each split apart."""
    splits = sorted(splits_of_shards(folder, skills), key=_SPLITS.index)
    layout: dict[str, object] = {
        "config_name": "default",
        "data_files": [{"split": split, "path": f"skill=*/{split}-*.parquet"} for split in splits],
    }
    folder.write_bytes(card_text(folder, skills, config, model, llm, [layout]).encode(), stage, "README.md")


def card_text(
    folder: RunFolder,
    skills: Sequence[str],
    config: ImagesConfig,
    model: ModelConfig,
    llm: str,
    layouts: Sequence[dict[str, object]] = (),
) -> str:
    """Return the card of a run's images; `layouts` are the hub's `configs`, for files it would not find by itself."""
    summary = image_summary(folder, skills)
    count = summary["rendered"] + summary["rejected"]
    header = _header(config.license, count, layouts)
    images = [(skill, each["rendered"], each["rejected"], each["failed"]) for skill, each in summary["skills"].items()]
    lines = [
        "# Images that a text-to-image model rendered for its own training",
        "",
        "Prompts of several skills, and what was rendered of them, without human labels "
        "([SELMA](https://arxiv.org/abs/2403.06952)). The second table says who wrote and who rendered.",
        "",
        *_table(("skill", "images", "rejected", "failed"), images),
        "",
        *_table(("setting", "value"), _settings(config, model, llm).items()),
        "",
        "Every row names its prompt, skill, seed, model and sampler; its id is a hash of them all.",
        "",
    ]
    return str(DatasetCard(f"---\n{header}\n---\n" + "\n".join(lines)))


def _header(license_: str, count: int, layouts: Sequence[dict[str, object]]) -> DatasetCardData:
    return DatasetCardData(
        license=license_,
        task_categories=["text-to-image"],
        language=["en"],
        tags=["synthetic", "selma"],
        size_categories=[next((name for bound, name in _SIZES if count < bound), "n>1M")],
        configs=list(layouts) or None,
    )


def _settings(config: ImagesConfig, model: ModelConfig, llm: str) -> dict[str, object]:
    return {
        "text-to-image model": model.name if config.engine == "diffusers" else f"none ({config.engine} stand-in)",
        "revision": locate_text_to_image(model.name, model.revision).revision,
        "precision": model.dtype,
        "scheduler": _scheduler_words(config),
        "steps": config.sampling.steps,
        "guidance scale": config.sampling.guidance_scale,
        "size": ", ".join(f"{width_px} x {height_px} px" for width_px, height_px in config.sizes_px),
        "negative prompt": config.sampling.negative_prompt or "none",
        "images per prompt": config.per_prompt,
        "selection": _selection_words(config),
        "prompts written by": llm,
        "licence": config.license,
    }


def _scheduler_words(config: ImagesConfig) -> str:
    name, settings = config.sampling.scheduler or "the model's own", config.sampling.scheduler_config
    return f"{name} with {', '.join(f'{key}={value}' for key, value in settings.items())}" if settings else name


def _selection_words(config: ImagesConfig) -> str:
    if config.selection is None:
        return "none"
    selection = config.selection
    return f"the best {selection.keep_best} of each prompt by {selection.judge.name}, scores from {selection.min_score:g} on"


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
