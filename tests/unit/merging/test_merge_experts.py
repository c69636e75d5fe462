import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file, save_file

from selma_ray.adapters.peft_format import open_adapter
from selma_ray.config import validate
from selma_ray.errors import AdapterError, ConfigError, StorageError
from selma_ray.merging.config import MergingConfig
from selma_ray.merging.methods import METHODS, MergeOptions, default_weight
from selma_ray.merging.run import merge_experts
from selma_ray.merging.search import MergeCandidate, SearchResult
from selma_ray.models.config import ModelConfig
from selma_ray.storage import RunFolder
from tests.unit.adapters.adapters_on_disk import save_random_adapter

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


def test_baked_pipeline_predicts_what_peft_predicts_with_all_experts_set(
    run_dir: Path, merged_dir: Path, tiny_pipeline_dir: Path
) -> None:
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


def test_adapter_of_summed_rank_predicts_what_the_baked_pipeline_predicts(
    merged_dir: Path, tiny_pipeline_dir: Path
) -> None:
    adapted = PeftModel.from_pretrained(base_unet(tiny_pipeline_dir), merged_dir / "adapter")
    baked = DiffusionPipeline.from_pretrained(merged_dir / "pipeline").unet
    torch.testing.assert_close(noise_of(adapted), noise_of(baked), atol=2e-6, rtol=1e-5)
    assert json.loads((merged_dir / "adapter" / "adapter_config.json").read_text())["r"] == 10


def test_parts_other_than_the_denoiser_are_copied(merged_dir: Path, tiny_pipeline_dir: Path) -> None:
    for path in tiny_pipeline_dir.rglob("*"):
        if path.is_file() and path.parent.name not in ("unet", "tokenizer-source"):
            copy = merged_dir / "pipeline" / path.relative_to(tiny_pipeline_dir)
            assert copy.read_bytes() == path.read_bytes(), path


def test_report_of_the_merge(merged_dir: Path) -> None:
    report = json.loads((merged_dir / "report.json").read_text())
    assert np.allclose(np.diag(report["cosine"]), 1)
    assert 0 < report["energy_kept"] < 1  # ranks 4 + 2 + 4, cut to 4
    assert set(report["norms"]) == set(SKILLS)
    assert len(report["modules"]) == 32


def test_same_merge_again_is_kept_and_another_replaces_it(
    run_dir: Path, merged_dir: Path, tiny_pipeline_dir: Path
) -> None:
    folder, model = RunFolder(str(run_dir)), ModelConfig(name=str(tiny_pipeline_dir))
    weights_file = merged_dir / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights_file.stat()
    merge_experts(folder, SKILLS, model, MergingConfig())
    assert weights_file.stat().st_ino == before.st_ino
    merge_experts(folder, SKILLS, model, MergingConfig(scale=0.5))
    assert weights_file.stat().st_ino != before.st_ino
    merge_experts(folder, SKILLS, model, MergingConfig())
    assert not list(merged_dir.parent.glob("*.part"))


def test_weights_pick_one_expert(run_dir: Path, tiny_pipeline_dir: Path) -> None:
    weights = {"counting": 0.0, "style": 2.0, "unusual": 0.0}
    config = MergingConfig(weights=weights, name="one")
    summary = merge_experts(RunFolder(str(run_dir)), SKILLS, ModelConfig(name=str(tiny_pipeline_dir)), config)
    assert summary.weights == {"counting": 0.0, "style": 1.0, "unusual": 0.0}  # a mean divides by their sum
    one = PeftModel.from_pretrained(base_unet(tiny_pipeline_dir), run_dir / "experts" / "style")
    baked = DiffusionPipeline.from_pretrained(run_dir / "merged" / "one" / "pipeline").unet
    torch.testing.assert_close(noise_of(baked), noise_of(one), atol=2e-6, rtol=1e-5)


def test_baking_a_half_precision_base_loses_nothing(run_dir: Path, tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    DiffusionPipeline.from_pretrained(tiny_pipeline_dir).to(torch.float16).save_pretrained(tmp_path / "half")
    model = ModelConfig(name=str(tmp_path / "half"), dtype="fp32")
    merge_experts(RunFolder(str(run_dir)), SKILLS[:1], model, MergingConfig(name="half"))
    adapted = PeftModel.from_pretrained(
        UNet2DConditionModel.from_pretrained(tmp_path / "half", subfolder="unet", torch_dtype=torch.float32),
        run_dir / "experts" / SKILLS[0],
    )
    baked = DiffusionPipeline.from_pretrained(run_dir / "merged" / "half" / "pipeline", torch_dtype=torch.float32).unet
    torch.testing.assert_close(noise_of(baked), noise_of(adapted), atol=2e-6, rtol=1e-5)


def test_expert_of_another_base_is_refused(run_dir: Path, tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    other = save_random_adapter(tiny_pipeline_dir, tmp_path / "experts" / "odd", seed=9, rank=4)
    renamed = {}
    for key, tensor in load_file(other / "adapter_model.safetensors").items():
        renamed[key] = torch.cat([tensor, tensor], dim=1) if "lora_A" in key else tensor
    save_file(renamed, other / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"must have shape \(\d+, \d+\) as the adapters do"):
        merge_experts(RunFolder(str(tmp_path)), ["odd"], ModelConfig(name=str(tiny_pipeline_dir)), MergingConfig())
    assert not (tmp_path / "merged").exists() or not list((tmp_path / "merged").iterdir())


def test_missing_expert_is_one_line(run_dir: Path, tiny_pipeline_dir: Path) -> None:
    with pytest.raises(AdapterError, match=r"experts/absent/adapter_config.json does not exist") as caught:
        merge_experts(
            RunFolder(str(run_dir)), ["counting", "absent"], ModelConfig(name=str(tiny_pipeline_dir)), MergingConfig()
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_model_name_or_path": "other/base"}, r"adapter_config.json: base_model_name_or_path must be"),
        ({"revision": "0123"}, r"adapter_config.json: revision must be .* got '0123': it was fitted to other weights"),
    ],
)
def test_experts_of_another_base_by_name_or_revision_are_refused(
    tiny_pipeline_dir: Path, tmp_path: Path, settings: Any, message: str
) -> None:
    folder = save_random_adapter(tiny_pipeline_dir, tmp_path / "experts" / "odd", seed=0)
    path = folder / "adapter_config.json"
    named = {"base_model_name_or_path": str(tiny_pipeline_dir), **settings}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    with pytest.raises(AdapterError, match=message) as caught:
        merge_experts(RunFolder(str(tmp_path)), ["odd"], ModelConfig(name=str(tiny_pipeline_dir)), MergingConfig())
    assert str(folder) in str(caught.value)


def test_baked_pipeline_renders_what_diffusers_renders_with_all_adapters_set(
    tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
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


@pytest.mark.parametrize(
    "method", ["sum_deltas", "released_scale", "svd", "ties", "dare", "knots", "core_space", "tsv_m", "iso_c"]
)
def test_each_method_is_baked_as_its_function_says(run_dir: Path, tiny_pipeline_dir: Path, method: Any) -> None:
    model = ModelConfig(name=str(tiny_pipeline_dir))
    config = MergingConfig(method=method, name=method, scale=0.9, rank=3, density=0.5)
    summary = merge_experts(RunFolder(str(run_dir)), SKILLS, model, config, seed=4)
    merged_dir = run_dir / "merged" / method
    weight = default_weight(method, len(SKILLS), model.name)
    assert summary.weights == dict.fromkeys(SKILLS, weight)

    options = MergeOptions(0.9, 3, 0.5, 4, model.name)
    experts = [open_adapter(run_dir / "experts" / skill) for skill in SKILLS]
    base, baked = base_unet(tiny_pipeline_dir), DiffusionPipeline.from_pretrained(merged_dir / "pipeline").unet
    written = open_adapter(merged_dir / "adapter")
    assert written.rank == (3 if method in ("svd", "ties", "dare") else 10)
    for module in written.modules[::8]:
        delta = METHODS[method]([expert.factors(module) for expert in experts], [weight] * len(SKILLS), options).delta()
        added = (weight_of(baked, module) - weight_of(base, module)).detach()
        torch.testing.assert_close(added, delta, atol=1e-5, rtol=1e-5)
        kept = written.factors(module).delta().square().sum() / delta.square().sum()
        reported = json.loads((merged_dir / "report.json").read_text())["modules"][module]
        assert reported["energy_kept"] == pytest.approx(1 if method == "svd" else float(kept), abs=1e-4) or kept > 0.999
        assert 0 < reported["sign_conflicts"] < 1


def weight_of(unet: torch.nn.Module, module: str) -> torch.Tensor:
    return unet.get_submodule(module).weight


def test_methods_that_draw_follow_the_seed(run_dir: Path, tiny_pipeline_dir: Path) -> None:
    folder, model = RunFolder(str(run_dir)), ModelConfig(name=str(tiny_pipeline_dir))
    weights = []
    for seed in (0, 0, 1):
        merge_experts(folder, SKILLS, model, MergingConfig(method="dare", name="drawn"), seed=seed)
        weights.append((run_dir / "merged" / "drawn" / "adapter" / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_found_weights_reach_their_blocks(run_dir: Path, tiny_pipeline_dir: Path) -> None:
    weights = {
        group: dict(zip(SKILLS, of_group, strict=True))
        for group, of_group in {"down_blocks": [1, 0, 0], "mid_block": [0, 1, 0], "up_blocks": [0, 0, 2]}.items()
    }
    mean = {group: dict.fromkeys(SKILLS, 1 / 3) for group in weights}
    found = SearchResult((MergeCandidate(0, 0, mean, 0.5), MergeCandidate(1, 1, weights, 0.7)), best=1)
    config = MergingConfig(method="search", name="found")
    model = ModelConfig(name=str(tiny_pipeline_dir))
    merge_experts(RunFolder(str(run_dir)), SKILLS, model, config, found=found)
    base = base_unet(tiny_pipeline_dir)
    baked = DiffusionPipeline.from_pretrained(run_dir / "merged" / "found" / "pipeline").unet
    experts = {skill: open_adapter(run_dir / "experts" / skill) for skill in SKILLS}
    for module in experts["style"].modules:
        by_skill = weights[module.partition(".")[0]]
        expected = sum(by_skill[skill] * experts[skill].factors(module).delta() for skill in SKILLS)
        torch.testing.assert_close(weight_of(baked, module) - weight_of(base, module), expected, atol=1e-5, rtol=1e-5)
    report = json.loads((run_dir / "merged" / "found" / "report.json").read_text())
    assert report["weights"] == pytest.approx({"counting": 1 / 3, "style": 1 / 3, "unusual": 2 / 3})
    assert report["search"]["weights"] == weights
    assert [candidate["score"] for candidate in report["search"]["candidates"]] == [0.5, 0.7]


def test_a_checkpoint_of_another_recipe_is_refused(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    save_random_adapter(tiny_pipeline_dir, tmp_path / "experts" / "style", seed=0)
    folder.mark_done("train", {"style": {"key": "this"}})
    folder.write_json({"key": "this"}, "experts", "style", "result.json")
    model = ModelConfig(name=str(tiny_pipeline_dir))
    merge_experts(folder, ["style"], model, MergingConfig())
    folder.write_json({"key": "other"}, "experts", "style", "result.json")
    with pytest.raises(AdapterError, match=r"experts/style/result.json: key must be this .* got other") as caught:
        merge_experts(folder, ["style"], model, MergingConfig())
    assert "train again" in str(caught.value)
    (tmp_path / "experts" / "style" / "result.json").write_text("{")
    with pytest.raises(StorageError, match=r"result\.json must be JSON"):
        merge_experts(folder, ["style"], model, MergingConfig())


def broken_run(pipeline_dir: Path, folder: Path, change: Any) -> RunFolder:
    """Return a run of two experts, the tensors of the second changed."""
    for seed, skill in enumerate(("good", "bad")):
        save_random_adapter(pipeline_dir, folder / "experts" / skill, seed)
    path = folder / "experts" / "bad" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    return RunFolder(str(folder))


def widened(tensors: Any) -> Any:
    return {key: torch.cat([value, value], dim=1) if "lora_A" in key else value for key, value in tensors.items()}


def with_infinity(tensors: Any) -> Any:
    next(iter(tensors.values()))[0, 0] = torch.inf
    return tensors


def with_one_module_less(tensors: Any) -> Any:
    return {key: value for key, value in tensors.items() if "mid_block" not in key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (widened, r"bad/adapter_model.safetensors: .* must be \(\d+, \d+\) as in .*good.*merge experts of one base"),
        (with_infinity, r"bad/adapter_model.safetensors: .*lora_A.weight must be finite.*train this expert again"),
        (with_one_module_less, r"must adapt the same modules, mid_block.* is in one; train both alike"),
    ],
)
def test_an_expert_that_does_not_fit_is_one_line_and_nothing_is_written(
    tiny_pipeline_dir: Path, tmp_path: Path, change: Any, message: str
) -> None:
    folder = broken_run(tiny_pipeline_dir, tmp_path, change)
    with pytest.raises(AdapterError, match=message) as caught:
        merge_experts(folder, ["good", "bad"], ModelConfig(name=str(tiny_pipeline_dir)), MergingConfig())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "merged").exists() or not list((tmp_path / "merged").iterdir())


def test_a_pickle_beside_no_safetensors_is_refused(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    path = save_random_adapter(tiny_pipeline_dir, tmp_path / "experts" / "odd", seed=0) / "adapter_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(
        AdapterError, match=r"adapter_model.bin is a pickle, which is never opened; save the adapter as"
    ):
        merge_experts(RunFolder(str(tmp_path)), ["odd"], ModelConfig(name=str(tiny_pipeline_dir)), MergingConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "mean"}, "method should be 'average_deltas', .* or 'search', got 'mean'"),
        ({"method": "ties", "weights": {"a": -1.0}}, "weights must not be negative with method ties, got -1"),
        ({"method": "released_scale", "weights": {"a": 1.0}}, "weights must be left out with method released_scale"),
        ({"density": 0}, "density should be greater than 0, got 0"),
        ({"rank": 0}, "rank should be greater than or equal to 1, got 0"),
        ({"name": "../elsewhere"}, "name .*got '../elsewhere'"),
        ({"exports": ["gguf"]}, "exports.0 should be 'diffusers', 'kohya' or 'comfyui', got 'gguf'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(MergingConfig, settings, "recipe")


def test_a_weight_for_every_skill_is_asked_for(run_dir: Path, tiny_pipeline_dir: Path) -> None:
    config = MergingConfig(weights={"style": 1.0})
    with pytest.raises(AdapterError, match=r"merging.weights must weigh every skill, 'counting' is missing"):
        merge_experts(RunFolder(str(run_dir)), SKILLS, ModelConfig(name=str(tiny_pipeline_dir)), config)
