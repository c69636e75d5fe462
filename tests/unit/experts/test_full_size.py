"""One training step and one export of SDXL at full size in bf16, random weights, against the plan of its memory; 6 GB of disk."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from selma_ray.adapters.config import LoraSettings
from selma_ray.adapters.exports import EXPORT_FILES
from selma_ray.adapters.streaming import TensorSpec, write_safetensors
from selma_ray.experts.config import ExpertsConfig
from selma_ray.experts.job import ExpertJob
from selma_ray.merging.config import MergingConfig
from selma_ray.merging.run import merge_adapters
from selma_ray.models.config import ModelConfig
from selma_ray.models.family import open_family
from selma_ray.models.published import write_configuration
from selma_ray.run.memory import traced_training
from selma_ray.run.training_memory import training_memory_parts
from selma_ray.storage import RunFolder

pytestmark = pytest.mark.heavy

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
SIZE_PX = 256
CONFIG = ExpertsConfig(
    lora=LoraSettings(rank=8, alpha=8), steps=1, batch_size=1, precision="bf16", gradient_checkpointing=True
)
# Prints the most memory that the process held, less what it held before the model was opened.
STEP = """
import json, os, pickle, resource, sys
import torch
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0", TORCHDYNAMO_DISABLE="1")
os.environ["DS_ACCELERATOR"] = "cpu"
store, job_file = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
from selma_ray.experts.trainer import ExpertTrainer

job = pickle.load(open(job_file, "rb"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
trainer = ExpertTrainer(job)
loss = trainer.step()
trainer.export(seconds=1.0)
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"loss": loss, "bytes": 1024 * (most - before)}))
"""


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    """Write SDXL's configurations, and a UNet of small random weights one tensor at a time."""
    folder = tmp_path / "sdxl"
    folder.mkdir()
    write_configuration(SDXL, folder)
    model = ModelConfig(name=str(folder), dtype="bf16")
    with torch.device("meta"):
        unet: Any = open_family(model).empty_denoiser()
    specs = [TensorSpec(name, torch.bfloat16, tuple(each.shape)) for name, each in unet.state_dict().items()]
    draw = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[torch.Tensor]:
        for spec in specs:
            norm = "norm" in spec.name and spec.name.endswith("weight")
            yield torch.ones(spec.shape) if norm else torch.randn(spec.shape, generator=draw) * 0.02

    write_safetensors(folder / "unet" / "diffusion_pytorch_model.safetensors", specs, tensors())
    return model


def encoded(folder: RunFolder, model: ModelConfig) -> str:
    """Write one random encoded example of the size of the test."""
    shapes = open_family(model).example_shapes(SIZE_PX, SIZE_PX)
    draw = torch.Generator().manual_seed(1)
    example = {name: torch.randn(1, *shape, generator=draw) for name, shape in shapes.items()}
    example["latent_std"] = torch.zeros_like(example["latent_std"])
    path = folder.local_path("cache/made/counting/0.safetensors")
    path.parent.mkdir(parents=True)
    save_file(example, path, {"ids": json.dumps(["a"])})
    folder.write_json({"shards": ["cache/made/counting/0.safetensors"], "ids": ["a"]}, "cache/made/counting/index.json")
    return "cache/made/counting"


def test_sdxl_takes_a_step_and_is_exported_within_its_plan(model: ModelConfig, tmp_path: Path) -> None:
    import pickle

    folder = RunFolder(str(tmp_path / "run"))
    job = ExpertJob("counting", folder, (encoded(folder, model),), ("made",), model, CONFIG, seed=0)
    (tmp_path / "job.pickle").write_bytes(pickle.dumps(job))
    command = [sys.executable, "-c", STEP, str(tmp_path / "store"), str(tmp_path / "job.pickle")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3000)
    assert finished.returncode == 0, finished.stderr[-2000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    assert 0 < found["loss"] < 100
    cost = traced_training(model, SIZE_PX, SIZE_PX, CONFIG.lora.rank, CONFIG.lora.targets)
    planned = sum(training_memory_parts(cost, CONFIG).values())
    # The file that the weights are read from is mapped, and counts while it is.
    assert 0.9 * planned < found["bytes"] < 1.25 * planned, (found["bytes"], planned)
    check_export(model, tmp_path)


def check_export(model: ModelConfig, tmp_path: Path) -> None:
    """An adapter of all 560 modules becomes files of both formats, with SDXL's name in kohya's."""
    adapter = tmp_path / "run" / "experts" / "counting"
    weights = load_file(adapter / "adapter_model.safetensors")
    assert len(weights) == 2 * 560
    assert all(torch.isfinite(each).all() for each in weights.values())
    assert any(each.abs().sum() > 0 for name, each in weights.items() if "lora_B" in name)
    merge_adapters({"counting": str(adapter)}, model, MergingConfig(), tmp_path / "merged")
    diffusers_file = load_file(tmp_path / "merged" / EXPORT_FILES["diffusers"])
    assert len(diffusers_file) == 2 * 560
    for name in list(diffusers_file)[::160]:
        stored = weights[f"base_model.model.{name.removeprefix('unet.')}"]
        torch.testing.assert_close(diffusers_file[name], stored)
    with safe_open(tmp_path / "merged" / EXPORT_FILES["kohya"], framework="pt") as file:
        assert len(file.keys()) == 3 * 560
        assert file.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"
