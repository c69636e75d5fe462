"""The training of a student from the first step to its adapter, resumable, in one process. Knows no Ray.

distil/<name>-<key>/state.safetensors   the last checkpoint, with progress.json
                   /student/            the student as an adapter, when it is finished, with curve.json beside it
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save

from selma_ray.adapters.files import ADAPTER_FILES, adapter_digest, is_adapter
from selma_ray.adapters.peft_format import Shape, write_adapter
from selma_ray.config import identity
from selma_ray.merging.config import MergingConfig
from selma_ray.merging.distil import Distiller
from selma_ray.merging.inputs import open_run_experts
from selma_ray.merging.run import start_of_student
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.device import device_of
from selma_ray.models.family import open_predictor
from selma_ray.models.identity import model_identity
from selma_ray.models.rendering import load_pipeline
from selma_ray.models.schedulers import use_scheduler
from selma_ray.records import content_id
from selma_ray.storage import RunFolder

__all__ = ["student_place", "train_student"]

_CHECKPOINT_FORMAT = 1


def student_place(
    folder: RunFolder,
    prompts: Mapping[str, Sequence[str]],
    model: ModelConfig,
    config: MergingConfig,
    sampling: SamplingConfig,
    seed: int,
) -> str:
    """Return a student's folder, relative to the run's, named by all that decides it.

    Raises AdapterError where an expert that would teach it is missing, or of another base.
    """
    key = content_id(
        format=_CHECKPOINT_FORMAT,
        experts=[adapter_digest(each.folder) for each in open_run_experts(folder, list(prompts), model).values()],
        prompts={skill: list(texts) for skill, texts in prompts.items()},
        settings=identity(config),
        sampling=identity(sampling),
        seed=seed,
        base=model_identity(model),
    )
    return f"distil/{config.name}-{key[:12]}"


def train_student(
    folder: RunFolder,
    prompts: Mapping[str, Sequence[str]],
    model: ModelConfig,
    config: MergingConfig,
    sampling: SamplingConfig,
    seed: int,
    tell: Callable[[int, float], None] = lambda step, loss: None,
) -> str:
    """Distil the experts of the skills that have `prompts` into a student; returns the full place of its adapter.

    A student that is there is kept, and one that was begun goes on from its last checkpoint. `tell` is given each step and its loss.
    """
    place = student_place(folder, prompts, model, config, sampling, seed)
    if is_adapter(folder, f"{place}/student"):
        return folder.path(place, "student")
    experts = open_run_experts(folder, list(prompts), model)
    start, shapes, rank = start_of_student(experts, model, config, seed)
    device = device_of(config.distil.num_gpus, "merging.distil.num_gpus")
    pipeline = load_pipeline(model, device)
    use_scheduler(pipeline, sampling.scheduler, sampling.scheduler_config)
    distiller = Distiller(open_predictor(pipeline), experts, start, prompts, sampling, config.distil, seed)
    _load(distiller, folder, place)
    while len(distiller.losses) < config.distil.steps:
        loss = distiller.step()
        step = len(distiller.losses)
        tell(step, loss)
        if step % config.distil.checkpoint_every_steps == 0 and step < config.distil.steps:
            _save(distiller, folder, place)
    curve = [{"step": step, "loss": loss} for step, loss in enumerate(distiller.losses, start=1)]
    folder.write_json(curve, place, "curve.json")
    base = next(iter(experts.values()))
    _write_student(distiller, folder, place, shapes, rank, (base.base_model, base.revision))
    folder.delete(place, "state.safetensors")
    return folder.path(place, "student")


def _save(distiller: Distiller, folder: RunFolder, place: str) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for index, parameter in enumerate(distiller.student.parameters()):
        tensors[f"{index}.weight"] = parameter.detach().cpu().clone()
        state = distiller.optimizer.state[parameter]
        tensors |= {f"{index}.{name}": torch.as_tensor(value).cpu().clone() for name, value in state.items()}
    # One object with the losses in it, so that both are of one step.
    folder.write_bytes(save(tensors, metadata={"losses": json.dumps(distiller.losses)}), place, "state.safetensors")


def _load(distiller: Distiller, folder: RunFolder, place: str) -> None:
    if not folder.exists(place, "state.safetensors"):
        return
    content = folder.read_bytes(place, "state.safetensors")
    tensors = load(content)
    size = int.from_bytes(content[:8], "little")
    distiller.losses = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["losses"])
    for index, parameter in enumerate(distiller.student.parameters()):
        parameter.data.copy_(tensors[f"{index}.weight"])
        names = [
            name.partition(".")[2] for name in tensors if name.startswith(f"{index}.") and not name.endswith(".weight")
        ]
        distiller.optimizer.state[parameter] = {
            name: tensors[f"{index}.{name}"].to("cpu" if name == "step" else parameter.device) for name in names
        }


def _write_student(
    distiller: Distiller,
    folder: RunFolder,
    place: str,
    shapes: Mapping[str, Shape],
    rank: int,
    base: tuple[str | None, str | None],
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary)
        write_adapter(target, distiller.student.factors(), shapes, rank, *base)
        for name in ADAPTER_FILES:
            folder.write_bytes((target / name).read_bytes(), place, "student", name)
