"""The experts to merge: a run's own, checked against its model and its training, or anyone's, brought into PEFT's format first."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from selma_ray.adapters.files import CONFIG_FILE
from selma_ray.adapters.foreign import import_adapter
from selma_ray.adapters.peft_format import Adapter, open_adapter
from selma_ray.errors import AdapterError
from selma_ray.local_copies import local_copy, scratch_folder
from selma_ray.merging.config import MergingConfig
from selma_ray.models.config import ModelConfig
from selma_ray.models.locate import locate_text_to_image
from selma_ray.storage import RunFolder

__all__ = ["open_adapters", "open_foreign", "open_run_experts"]


def open_adapters(
    folder: RunFolder, skills: Sequence[str], model: ModelConfig, config: MergingConfig
) -> dict[str, Adapter]:
    """Open what a run merges: the experts that its recipe names, else the run's own of `skills`; raises AdapterError."""
    if config.experts:
        return open_foreign(config.experts, scratch_folder(folder, "imported"), model, config)
    return open_run_experts(folder, skills, model)


def open_foreign(
    places: Mapping[str, str], kept_in: Path, model: ModelConfig, config: MergingConfig
) -> dict[str, Adapter]:
    """Bring LoRAs from anywhere into PEFT's format, each into a folder of `kept_in`, and open them by name; raises AdapterError."""
    adapters = {}
    for name, place in places.items():
        import_adapter(local_copy(place).expanduser(), name, kept_in / name, model, config.skip_text_encoders)
        adapters[name] = open_adapter(kept_in / name)
    return adapters


def open_run_experts(folder: RunFolder, skills: Sequence[str], model: ModelConfig) -> dict[str, Adapter]:
    """Open the experts of a run by skill; raises AdapterError for one of another base or another run."""
    trained = folder.done("train") or {}
    adapters = {}
    for skill in skills:
        adapter = open_adapter(folder.path("experts", skill))
        _check_base(adapter, model)
        _check_run(folder, skill, trained.get(skill, {}).get("key"))
        adapters[skill] = adapter
    return adapters


def _check_base(adapter: Adapter, model: ModelConfig) -> None:
    path = adapter.folder / CONFIG_FILE
    if adapter.base_model not in (None, "", model.name):
        raise AdapterError(
            f"{path}: base_model_name_or_path must be {model.name!r} as model.name says, "
            f"got {adapter.base_model!r}; merge experts of this base, or fix model.name"
        )
    revision = locate_text_to_image(model.name, model.revision).revision
    if adapter.base_model and adapter.revision not in (None, "", revision):
        raise AdapterError(
            f"{path}: revision must be {revision!r} as that of {model.name} is now, got {adapter.revision!r}: it was fitted to other "
            "weights; train the expert again, or fix model.revision"
        )


def _check_run(folder: RunFolder, skill: str, trained_key: str | None) -> None:
    """Refuse an adapter that is not the one that this run's training left; one without a result was put there by hand."""
    result = ("experts", skill, "result.json")
    if trained_key is None or not folder.exists(*result):
        return
    key = folder.read_json(*result).get("key")
    if key != trained_key:
        raise AdapterError(
            f"{folder.path(*result)}: key must be {trained_key} as this run's training says, got {key}, a checkpoint of another recipe; "
            f"delete {folder.path('experts', skill)} and {folder.path('done', 'train.json')}, and train again"
        )
