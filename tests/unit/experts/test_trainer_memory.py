"""What a trainer's process holds: the denoiser and the adapter, no autoencoder and no text encoder."""

import json
import subprocess
import sys
from pathlib import Path

from selma_ray.models.config import ModelConfig
from selma_ray.models.family import open_family
from selma_ray.storage import RunFolder
from tests.unit.experts.fitting import BASE, encoded_job

FIT = """
import gc, json, os, pickle, sys
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import PreTrainedModel

def held():
    gc.collect()
    models = [each for each in gc.get_objects() if isinstance(each, (AutoencoderKL, UNet2DConditionModel, PreTrainedModel))]
    return sorted({type(model).__name__ for model in models})

os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
store, job_file = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
from selma_ray.experts.trainer import ExpertTrainer
from selma_ray.models.family import open_family

job = pickle.load(open(job_file, "rb"))
trainer = ExpertTrainer(job)
trainer.step()
training = held()
frozen = sum(each.numel() for each in trainer._engine.module.parameters() if not each.requires_grad)
storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if isinstance(t, torch.Tensor)}
encoders = open_family(job.model).load_encoders("cpu")
print(json.dumps({"training": training, "frozen": frozen, "bytes": sum(storages.values()), "with encoders": held()}))
"""


def test_a_trainer_holds_the_denoiser_alone(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    import pickle

    model = ModelConfig(name=str(tiny_pipeline_dir))
    job = encoded_job(RunFolder(str(tmp_path / "run")), model, "counting", BASE)
    (tmp_path / "job.pickle").write_bytes(pickle.dumps(job))
    command = [sys.executable, "-c", FIT, str(tmp_path / "store"), str(tmp_path / "job.pickle")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    denoiser = sum(parameter.numel() for parameter in open_family(model).load_denoiser().parameters())
    assert found["training"] == ["UNet2DConditionModel"]
    assert found["frozen"] == denoiser
    assert 4 * denoiser <= found["bytes"] < 2 * 4 * denoiser, "weights once, and an adapter with its optimiser's state"
    assert {"AutoencoderKL", "CLIPTextModel"} <= set(found["with encoders"]), "they would have been seen"
