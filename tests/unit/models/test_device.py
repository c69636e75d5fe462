"""A role's resources decide where it computes, and a worker without GPUs sees none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from selma_ray.adapters.applying import load_adapted_pipeline
from selma_ray.errors import ConfigError
from selma_ray.evaluation.chunks import ModelUnderTest, RenderChunk, plan_chunks
from selma_ray.evaluation.config import EvaluationConfig
from selma_ray.experts.cache import EncodeExamples
from selma_ray.experts.precision import resolve_drawing_precision, resolve_precision
from selma_ray.images.config import ImagesConfig
from selma_ray.images.engines import open_engine
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.judges.opening import open_judge
from selma_ray.judging.metrics import open_metric
from selma_ray.judging.questions import PromptWithQuestions
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.device import device_of, see_own_gpus, task_options
from selma_ray.models.rendering import load_pipeline
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.generator import Generator
from selma_ray.serving.served import ServedModels
from selma_ray.storage import RunFolder

SAMPLING = SamplingConfig(steps=1, guidance_scale=1.0, width_px=64, height_px=64)
WORKERS = (
    "images.rendering", "images.choosing", "experts.cache", "experts.selection", "experts.launch", "evaluation.run",
    "merging.candidates", "serving.generator", "serving.evaluator",
)  # fmt: skip
LOOK_FOR_GPUS = ("accelerate", "deepspeed", "peft", "transformers", "vllm")


@pytest.fixture(params=[True, False], ids=["with a GPU", "without a GPU"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param)
    return request.param


def test_no_gpus_is_the_cpu_whatever_is_there(gpu: bool) -> None:
    assert device_of(0, "images.num_gpus").type == "cpu"


def test_gpus_are_cuda_or_an_error_that_names_the_key(gpu: bool) -> None:
    if gpu:
        assert device_of(0.5, "images.num_gpus").type == "cuda"
        return
    with pytest.raises(
        ConfigError, match=r"images\.num_gpus is 1, but torch sees no CUDA device on this node; set .* to 0"
    ):
        device_of(1, "images.num_gpus")


def test_loaders_without_gpus_stay_on_the_cpu(gpu: bool, tiny_pipeline_dir: Path) -> None:
    model = ModelConfig(name=str(tiny_pipeline_dir))
    assert load_pipeline(model, "cpu").device.type == "cpu"
    assert load_adapted_pipeline(model, None, "cpu").device.type == "cpu"
    assert open_engine(ImagesConfig(sampling=SAMPLING), model).render(["a"], [0])[0].size == (64, 64)
    assert open_judge(JudgeConfig()).name.startswith("miniature@")
    generator = Generator(ServedModels("merged", model), ServingConfig(sampling=SAMPLING, num_threads=1))
    generator.close()
    assert generator._pipeline.device.type == "cpu"


def test_every_role_says_that_its_gpu_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, folder = ModelConfig(name=str(tiny_pipeline_dir)), RunFolder(str(tmp_path))
    evaluation = EvaluationConfig(sampling=SAMPLING, num_gpus=1)
    chunk = plan_chunks("base", "r0", [PromptWithQuestions("p", "common", "a cup", ())], evaluation, 0)[0]
    with pytest.raises(ConfigError, match=r"^images\.num_gpus is 1"):
        open_engine(ImagesConfig(sampling=SAMPLING, num_gpus=1), model)
    with pytest.raises(ConfigError, match=r"^judge\.num_gpus is 0\.5"):
        open_judge(JudgeConfig(num_gpus=0.5))
    with pytest.raises(ConfigError, match=r"^judge\.num_gpus is 1"):
        open_judge(JudgeConfig(num_gpus=1, engine="vllm"))
    with pytest.raises(ConfigError, match=r"^num_gpus of clipscore is 1"):
        open_metric("clipscore", num_gpus=1)
    with pytest.raises(ConfigError, match=r"^evaluation\.num_gpus is 1"):
        RenderChunk(folder, {"base": ModelUnderTest(model)}, evaluation)(chunk)
    with pytest.raises(ConfigError, match=r"^experts\.gpus_per_worker is 1"):
        EncodeExamples(folder, model, num_gpus=1)
    with pytest.raises(ConfigError, match=r"^serving\.num_gpus is 1"):
        Generator(ServedModels("merged", model), ServingConfig(sampling=SAMPLING, num_gpus=1))


def test_precision_goes_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False})
    assert resolve_precision("auto", torch.device("cuda")) == "bf16"
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"
    assert resolve_precision("fp16", torch.device("cuda")) == "fp16"


@pytest.mark.parametrize(
    ("unit", "fitted_in", "drawn_in"),
    [("amx_bf16", "bf16", "bf16"), ("avx512_bf16", "fp32", "bf16"), ("avx2", "fp32", "fp32")],
)
def test_a_cpu_fits_and_draws_in_what_it_gains_from(
    monkeypatch: pytest.MonkeyPatch, unit: str, fitted_in: str, drawn_in: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {unit: True})
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == fitted_in
    assert resolve_drawing_precision("auto", cpu) == drawn_in
    assert resolve_drawing_precision("fp32", cpu) == "fp32"


def test_a_worker_hides_gpus_before_anything_looks_for_them() -> None:
    """What Ray imports to make a worker loads no library that looks for GPUs, so that hiding comes first."""
    code = (
        "import importlib, json, os, sys\n"
        f"for name in {WORKERS!r}: importlib.import_module('selma_ray.' + name)\n"
        f"early = [name for name in {LOOK_FOR_GPUS!r} if name in sys.modules]\n"
        "from selma_ray.models.device import see_own_gpus\n"
        "see_own_gpus(0.5)\n"
        "kept = os.environ['CUDA_VISIBLE_DEVICES']\n"
        "see_own_gpus(0)\n"
        "import torch\n"
        "print(json.dumps([early, kept, os.environ['CUDA_VISIBLE_DEVICES'], torch.cuda.device_count()]))\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == [[], "0", "", 0]


def test_a_worker_given_a_gpu_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    see_own_gpus(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_tasks_with_and_without_gpus_share_no_process() -> None:
    assert task_options(0) == {"num_gpus": 0}
    assert task_options(0.5)["num_gpus"] == 0.5
    assert task_options(0.5)["runtime_env"]["env_vars"]
