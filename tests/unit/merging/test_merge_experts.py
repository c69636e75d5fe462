import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file, save_file

from selma_ray.errors import AdapterError
from selma_ray.merging.config import MergingConfig
from selma_ray.merging.run import merge_experts
from selma_ray.models.config import ModelConfig
from selma_ray.storage import RunFolder
from tests.unit.merging.adapters_on_disk import save_random_adapter

SKILLS = ["counting", "style", "unusual"]
SETTINGS = [{"rank": 4}, {"rank": 2, "lora_alpha": 8}, {"rank": 4, "lora_alpha": 4, "use_rslora": True}]


@pytest.fixture(scope="module")
def run_dir(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for seed, (skill, settings) in enumerate(zip(SKILLS, SETTINGS, strict=True)):
        save_random_adapter(tiny_pipeline_dir, folder / "experts" / skill, seed, **settings)
    return folder


@pytest.fixture(scope="module")
def merged_dir(run_dir: Path, tiny_pipeline_dir: Path) -> Path:
    summary = merge_experts(RunFolder(str(run_dir)), SKILLS, ModelConfig(name=str(tiny_pipeline_dir)), MergingConfig())
    assert summary.as_dict()["experts"] == SKILLS
    return run_dir / "merged" / "merged"


@torch.no_grad()
def noise_of(unet: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents_NCHW = torch.randn(2, 4, 16, 16, generator=generator)
    text_NLE = torch.randn(2, 7, 32, generator=generator)
    return unet(latents_NCHW, torch.tensor([10, 500]), text_NLE).sample


def base_unet(pipeline_dir: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(pipeline_dir, subfolder="unet")


def test_baked_pipeline_predicts_what_peft_predicts_with_all_experts_set(run_dir, merged_dir, tiny_pipeline_dir):
    # PEFT has no weights at forward time: the mean is the forward with all adapters active, each scaled by 1/K.
    model = PeftModel.from_pretrained(
        base_unet(tiny_pipeline_dir), run_dir / "experts" / SKILLS[0], adapter_name=SKILLS[0]
    )
    for skill in SKILLS[1:]:
        model.load_adapter(run_dir / "experts" / skill, adapter_name=skill)
    model.base_model.set_adapter(SKILLS)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            for skill in SKILLS:
                module.set_scale(skill, 1 / len(SKILLS))
    expected = noise_of(model)
    baked = DiffusionPipeline.from_pretrained(merged_dir / "pipeline").unet
    torch.testing.assert_close(noise_of(baked), expected, atol=2e-6, rtol=1e-5)
    assert (noise_of(base_unet(tiny_pipeline_dir)) - expected).abs().max() > 1e-2


def test_adapter_of_summed_rank_predicts_what_the_baked_pipeline_predicts(merged_dir, tiny_pipeline_dir):
    adapted = PeftModel.from_pretrained(base_unet(tiny_pipeline_dir), merged_dir / "adapter")
    baked = DiffusionPipeline.from_pretrained(merged_dir / "pipeline").unet
    torch.testing.assert_close(noise_of(adapted), noise_of(baked), atol=2e-6, rtol=1e-5)
    assert json.loads((merged_dir / "adapter" / "adapter_config.json").read_text())["r"] == 10


def test_parts_other_than_the_denoiser_are_copied(merged_dir, tiny_pipeline_dir):
    for path in tiny_pipeline_dir.rglob("*"):
        if path.is_file() and path.parent.name not in ("unet", "tokenizer-source"):
            copy = merged_dir / "pipeline" / path.relative_to(tiny_pipeline_dir)
            assert copy.read_bytes() == path.read_bytes(), path


def test_report_of_the_merge(merged_dir):
    report = json.loads((merged_dir / "report.json").read_text())
    assert np.allclose(np.diag(report["cosine"]), 1)
    assert 0 < report["energy_kept"] < 1  # ranks 4 + 2 + 4, cut to 4
    assert set(report["norms"]) == set(SKILLS)
    assert len(report["modules"]) == 32


def test_same_merge_again_is_kept_and_another_replaces_it(run_dir, merged_dir, tiny_pipeline_dir):
    folder, model = RunFolder(str(run_dir)), ModelConfig(name=str(tiny_pipeline_dir))
    weights_file = merged_dir / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights_file.stat()
    merge_experts(folder, SKILLS, model, MergingConfig())
    assert weights_file.stat().st_ino == before.st_ino
    merge_experts(folder, SKILLS, model, MergingConfig(scale=0.5))
    assert weights_file.stat().st_ino != before.st_ino
    merge_experts(folder, SKILLS, model, MergingConfig())
    assert not list(merged_dir.parent.glob("*.part"))


def test_weights_pick_one_expert(run_dir, tiny_pipeline_dir):
    weights = {"counting": 0.0, "style": 1.0, "unusual": 0.0}
    config = MergingConfig(weights=weights, name="one")
    merge_experts(RunFolder(str(run_dir)), SKILLS, ModelConfig(name=str(tiny_pipeline_dir)), config)
    one = PeftModel.from_pretrained(base_unet(tiny_pipeline_dir), run_dir / "experts" / "style")
    baked = DiffusionPipeline.from_pretrained(run_dir / "merged" / "one" / "pipeline").unet
    torch.testing.assert_close(noise_of(baked), noise_of(one), atol=2e-6, rtol=1e-5)


def test_baking_a_half_precision_base_loses_nothing(run_dir, tiny_pipeline_dir, tmp_path):
    DiffusionPipeline.from_pretrained(tiny_pipeline_dir).to(torch.float16).save_pretrained(tmp_path / "half")
    model = ModelConfig(name=str(tmp_path / "half"), dtype="fp32")
    merge_experts(RunFolder(str(run_dir)), SKILLS[:1], model, MergingConfig(name="half"))
    adapted = PeftModel.from_pretrained(
        UNet2DConditionModel.from_pretrained(tmp_path / "half", subfolder="unet", torch_dtype=torch.float32),
        run_dir / "experts" / SKILLS[0],
    )
    baked = DiffusionPipeline.from_pretrained(run_dir / "merged" / "half" / "pipeline", torch_dtype=torch.float32).unet
    torch.testing.assert_close(noise_of(baked), noise_of(adapted), atol=2e-6, rtol=1e-5)


def test_expert_of_another_base_is_refused(run_dir, tiny_pipeline_dir, tmp_path):
    other = save_random_adapter(tiny_pipeline_dir, tmp_path / "experts" / "odd", seed=9, rank=4)
    renamed = {}
    for key, tensor in load_file(other / "adapter_model.safetensors").items():
        renamed[key] = torch.cat([tensor, tensor], dim=1) if "lora_A" in key else tensor
    save_file(renamed, other / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"must have shape \(\d+, \d+\) as the adapters do"):
        merge_experts(RunFolder(str(tmp_path)), ["odd"], ModelConfig(name=str(tiny_pipeline_dir)), MergingConfig())
    assert not (tmp_path / "merged").exists() or not list((tmp_path / "merged").iterdir())


def test_missing_expert_is_one_line(run_dir, tiny_pipeline_dir):
    with pytest.raises(AdapterError, match=r"experts/absent/adapter_config.json does not exist") as caught:
        merge_experts(
            RunFolder(str(run_dir)), ["counting", "absent"], ModelConfig(name=str(tiny_pipeline_dir)), MergingConfig()
        )
    assert "\n" not in str(caught.value)


def test_experts_of_another_base_by_name_are_refused(tiny_pipeline_dir, tmp_path):
    folder = save_random_adapter(tiny_pipeline_dir, tmp_path / "experts" / "odd", seed=0)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "other/base"}))
    with pytest.raises(AdapterError, match="base_model_name_or_path must be") as caught:
        merge_experts(RunFolder(str(tmp_path)), ["odd"], ModelConfig(name=str(tiny_pipeline_dir)), MergingConfig())
    assert str(folder) in str(caught.value)


def test_baked_pipeline_renders_what_diffusers_renders_with_all_adapters_set(tiny_pipeline_dir, tmp_path):
    for seed, skill in enumerate(SKILLS):
        save_random_adapter(tiny_pipeline_dir, tmp_path / "experts" / skill, seed, rank=3)
    merge_experts(RunFolder(str(tmp_path)), SKILLS, ModelConfig(name=str(tiny_pipeline_dir)), MergingConfig())
    by_diffusers = DiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    for skill in SKILLS:
        tensors = load_file(tmp_path / "experts" / skill / "adapter_model.safetensors")
        renamed = {key.replace("base_model.model.", "unet."): tensor for key, tensor in tensors.items()}
        by_diffusers.load_lora_weights(renamed, adapter_name=skill)
    by_diffusers.set_adapters(SKILLS, adapter_weights=[1 / 3] * 3)
    baked = DiffusionPipeline.from_pretrained(tmp_path / "merged" / "merged" / "pipeline")
    torch.testing.assert_close(noise_of(baked.unet), noise_of(by_diffusers.unet), atol=2e-6, rtol=1e-5)
