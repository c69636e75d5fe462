"""What a run made, with a card, as a repository of the Hugging Face hub or as a folder."""

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from selma_ray.errors import ConfigError, StorageError, first_line
from selma_ray.local_copies import local_copy
from selma_ray.run.opening import Run

__all__ = ["PUSHED", "model_card", "push_run"]

What = Literal["adapter", "pipeline", "dataset"]
PUSHED: tuple[What, ...] = ("adapter", "pipeline", "dataset")
"""What of a run can be pushed."""

_HUB = "hub:"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def push_run(run: Run, what: What, to: str, *, license_: str | None = None, private: bool = False) -> str:
    """Push the merged adapter with its exports, the merged pipeline, or the images of a run; returns where they are.

    `to` is hub:OWNER/NAME or a folder that is empty or not there. Raises ConfigError for another place, StorageError where the run has
    nothing to push, or the hub does not take it.
    """
    if to.startswith(_HUB) and not _HUB_NAME.fullmatch(to.removeprefix(_HUB)):
        raise ConfigError(f"--to must be hub:OWNER/NAME or a folder, got {to!r}")
    target = None if to.startswith(_HUB) else Path(to).expanduser()
    if target is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--to must be a folder that is empty or not there, got {to}; name another")
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary)
        for source, relative in _files(run, what):
            (staged / relative).parent.mkdir(parents=True, exist_ok=True)
            (staged / relative).symlink_to(source)
        if what != "dataset":
            card = model_card(run, what, to.removeprefix(_HUB), license_)
            (staged / "README.md").write_text(card)
        if target is not None:
            shutil.copytree(staged, target, dirs_exist_ok=True)
            return str(target)
        return _uploaded(staged, to.removeprefix(_HUB), "dataset" if what == "dataset" else "model", private=private)


def model_card(run: Run, what: What, name: str, license_: str | None = None) -> str:
    """Return a card that names base, licence, recipe, merge, and scores with their intervals."""
    from huggingface_hub import ModelCard, ModelCardData

    recipe = run.recipe
    base = recipe.model.name
    on_hub = _HUB_NAME.fullmatch(base) is not None and not Path(base).exists()
    header = ModelCardData(
        license=license_ or "unknown",
        base_model=base if on_hub else None,
        base_model_relation=("adapter" if what == "adapter" else "finetune") if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["selma", "text-to-image", *(["lora"] if what == "adapter" else [])],
    )
    lines = [
        f"# {name.rpartition('/')[2]}",
        "",
        f"{Path(base).name if not on_hub else base}, taught to follow its prompts better by its own images of prompts that a language "
        "model wrote, without labels ([SELMA](https://arxiv.org/abs/2403.06952)): one LoRA a skill, merged.",
        "",
        *_loading(what, name, base if on_hub else "BASE"),
        "",
        *_scores(run),
        "## Recipe",
        "",
        "```yaml",
        _recipe_text(run).rstrip(),
        "```",
        "",
    ]
    return str(ModelCard(f"---\n{header}\n---\n" + "\n".join(lines)))


def _loading(what: What, name: str, base: str) -> list[str]:
    opened = base if what == "adapter" else name
    lines = [f'pipeline = DiffusionPipeline.from_pretrained("{opened}")']
    if what == "adapter":
        lines.append(f'pipeline.load_lora_weights("{name}", weight_name="pytorch_lora_weights.safetensors")')
    return ["```python", "from diffusers import DiffusionPipeline", "", *lines, "```"]


def _scores(run: Run) -> list[str]:
    """Return the evaluation's table; nothing where the run was not evaluated."""
    evaluation: Mapping[str, Any] = run.folder.done("evaluate") or {}
    models = {name: each for name, each in evaluation.get("models", {}).items() if each.get("dsg") is not None}
    if not models:
        return []
    judge = run.recipe.evaluation.judge.name
    lines = ["## Scores", "", f"DSG by {judge}, in percent, with bootstrap intervals over prompts.", ""]
    lines += ["| model | DSG | interval | images |", "|---|---|---|---|"]
    for name, each in models.items():
        low, high = each["interval"]
        lines.append(f"| {name} | {100 * each['dsg']:.1f} | {100 * low:.1f} to {100 * high:.1f} | {each['images']} |")
    return [*lines, ""]


def _recipe_text(run: Run) -> str:
    """Return the recipe without the places on the machine that it ran on."""
    recipe = yaml.safe_load(run.recipe.as_yaml())
    recipe.pop("run_dir", None)
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


def _files(run: Run, what: What) -> Iterator[tuple[Path, str]]:
    """Yield the files to push and their names there; raises StorageError where there are none."""
    merged = run.merged_parts
    parts, command = {
        "adapter": ((*merged, "adapter"), "merge"),
        "pipeline": ((*merged, "pipeline"), "merge"),
        "dataset": (("images",), "generate"),
    }[what]
    if not run.folder.files(*parts):
        raise StorageError(f"{run.folder.path(*parts)} holds no {what}; run `selma {command}` first")
    root = local_copy(run.folder.path(*parts))
    for path in sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".part"):
        yield path.absolute(), str(path.relative_to(root))
    if what == "adapter":
        exports = map(PurePosixPath, run.folder.files(*merged, suffix=".safetensors"))
        for export in (path for path in exports if path.parent == PurePosixPath(*merged)):
            yield local_copy(run.folder.path(str(export))).absolute(), export.name


def _uploaded(folder: Path, name: str, kind: str, *, private: bool) -> str:
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        made = api.create_repo(name, repo_type=kind, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, repo_type=kind, folder_path=folder, commit_message="selma push")
        return str(made)
    except errors.LocalTokenNotFoundError:
        reason = "needs a token that may write: set HF_TOKEN"
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        reason = (
            f"does not take it ({status}): set HF_TOKEN to a token that may write there, or fix the name"
            if status in (401, 403, 404)
            else f"answered {status} ({first_line(error)}); try again"
        )
    except (errors.OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = f"cannot be reached or does not take it ({first_line(error)}); check HF_ENDPOINT and HF_HUB_OFFLINE"
    except Exception as error:  # whatever HTTP library the hub's client uses
        reason = f"cannot be reached ({first_line(error)}); try again"
    raise StorageError(f"the hub's {name} {reason}")
