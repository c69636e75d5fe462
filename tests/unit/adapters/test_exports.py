"""Exports are read back by the loaders they are for."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from selma_ray.adapters.exports import EXPORT_FILES, write_kohya
from selma_ray.adapters.peft_format import Adapter, LoraFactors, open_adapter, shapes_of, write_adapter
from selma_ray.adapters.streaming import TensorSpec, write_safetensors
from selma_ray.config import validate
from selma_ray.errors import AdapterError, ConfigError
from selma_ray.merging.config import MergingConfig
from selma_ray.merging.run import merge_experts
from selma_ray.models.config import ModelConfig
from selma_ray.models.parts import denoiser_of
from selma_ray.storage import RunFolder
from tests.tiny_models import save_tiny_sdxl
from tests.unit.adapters.adapters_on_disk import MORE_TARGETS, save_random_adapter
from tests.unit.models.tiny_flow_models import save_tiny_flux, save_tiny_sd3

SKILLS = ["counting", "style"]


UNETS = ["stable_diffusion", "sdxl"]
TRANSFORMERS = ["sd3", "flux"]
UNET_FILES = [EXPORT_FILES["diffusers"], EXPORT_FILES["kohya"]]


@pytest.fixture(scope="module")
def base_dir(request: pytest.FixtureRequest, tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "stable_diffusion":
        return tiny_pipeline_dir
    folder = tmp_path_factory.mktemp("models") / request.param
    if request.param == "sdxl":
        save_tiny_sdxl(folder)
    else:
        {"sd3": save_tiny_sd3, "flux": save_tiny_flux}[request.param](folder, tiny_pipeline_dir)
    return folder


@pytest.fixture(scope="module")
def merged_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for seed, skill in enumerate(SKILLS):
        save_random_adapter(base_dir, folder / "experts" / skill, seed, rank=2 + seed, lora_alpha=3)
    merge_experts(RunFolder(str(folder)), SKILLS, ModelConfig(name=str(base_dir)), MergingConfig())
    return folder / "merged" / "merged"


def image_of(pipeline: DiffusionPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(
        "a red apple", num_inference_steps=2, guidance_scale=2.0, width=64, height=64, generator=generator
    ).images
    return np.asarray(images[0])


@pytest.mark.parametrize("base_dir", UNETS + TRANSFORMERS, indirect=True)
def test_diffusers_renders_byte_for_byte_what_peft_renders(base_dir: Path, merged_dir: Path) -> None:
    with_peft = DiffusionPipeline.from_pretrained(base_dir)
    # PEFT puts its layers into the denoiser itself.
    PeftModel.from_pretrained(denoiser_of(with_peft), merged_dir / "adapter")
    expected = image_of(with_peft)
    loaded = DiffusionPipeline.from_pretrained(base_dir)
    plain = image_of(loaded)
    loaded.load_lora_weights(merged_dir)  # finds pytorch_lora_weights.safetensors in the folder
    assert image_of(loaded).tobytes() == expected.tobytes()
    assert (plain != expected).mean() > 0.01
    baked = image_of(DiffusionPipeline.from_pretrained(merged_dir / "pipeline"))
    assert np.abs(baked.astype(int) - expected.astype(int)).max() <= 1  # floats are added in another order


@pytest.mark.parametrize("base_dir", UNETS, indirect=True)
def test_diffusers_renders_the_same_from_the_kohya_file(base_dir: Path, merged_dir: Path) -> None:
    by_format = []
    for name in UNET_FILES:
        pipeline = DiffusionPipeline.from_pretrained(base_dir)
        pipeline.load_lora_weights(merged_dir, weight_name=name)
        by_format.append(image_of(pipeline))
    assert by_format[0].tobytes() == by_format[1].tobytes()


@pytest.mark.parametrize("base_dir", UNETS, indirect=True)
def test_kohya_keys_round_trip_through_diffusers_reader(base_dir: Path, merged_dir: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(base_dir)
    reader = StableDiffusionXLPipeline if isinstance(pipeline, StableDiffusionXLPipeline) else StableDiffusionPipeline
    read, alphas = reader.lora_state_dict(str(merged_dir / EXPORT_FILES["kohya"]), unet_config=pipeline.unet.config)
    adapter = open_adapter(merged_dir / "adapter")
    expected = load_file(merged_dir / EXPORT_FILES["diffusers"])
    pipeline.load_lora_into_unet(read, alphas, pipeline.unet, adapter_name="kohya")
    by_module = dict(pipeline.unet.named_modules())
    matched = set()
    for module in adapter.modules:
        layer = by_module[module]
        for side, factors in (("A", layer.lora_A), ("B", layer.lora_B)):
            key = f"unet.{module}.lora_{side}.weight"
            assert torch.equal(factors["kohya"].weight, expected[key])
            matched.add(key)
        assert layer.scaling["kohya"] == 1.0
    assert matched == set(expected)
    assert len(read) == len(expected), "every key of the file is one of the model's"


@pytest.mark.parametrize("base_dir", UNETS, indirect=True)
def test_kohya_keys_are_those_of_diffusers_own_converter(merged_dir: Path) -> None:
    ours = load_file(merged_dir / EXPORT_FILES["kohya"])
    theirs = convert_state_dict_to_kohya(load_file(merged_dir / EXPORT_FILES["diffusers"]))
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key].float(), tensor.float()), key


@pytest.mark.parametrize("base_dir", UNETS, indirect=True)
def test_files_say_what_they_were_merged_from(merged_dir: Path) -> None:
    for name in UNET_FILES:
        with safe_open(merged_dir / name, framework="pt") as file:
            metadata = file.metadata()
        assert metadata["merge_method"] == "average_deltas"
        assert json.loads(metadata["merge_weights"]) == {"all": dict.fromkeys(SKILLS, 0.5)}
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "5"


@pytest.mark.parametrize("base_dir", UNETS[:1], indirect=True)
def test_an_adapters_scale_is_kohyas_alpha(base_dir: Path, tmp_path: Path) -> None:
    folder = save_random_adapter(base_dir, tmp_path / "adapter", seed=0, rank=4, lora_alpha=2)
    adapter = open_adapter(folder)
    write_kohya(tmp_path / "kohya.safetensors", adapter, shapes_of([adapter]), {})
    alphas = {float(value) for key, value in load_file(tmp_path / "kohya.safetensors").items() if "alpha" in key}
    assert alphas == {2.0}


def test_modules_that_kohya_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"a.to_q": (2, 2), "a_to.q": (2, 2)}
    adapter = Adapter(tmp_path, None, shapes, dict.fromkeys(shapes, 2), dict.fromkeys(shapes, 1.0))
    with pytest.raises(AdapterError, match=r"a.to_q and a_to.q are both lora_unet_a_to_q to kohya; leave kohya out"):
        write_kohya(tmp_path / "kohya.safetensors", adapter, shapes, {})
    assert not (tmp_path / "kohya.safetensors").exists()


@pytest.mark.parametrize(
    ("width", "version", "is_second"),
    [(768, "sd_v1", "False"), (1024, "sd_v2", "True"), (2048, "sdxl_base_v1-0", "False")],
)
def test_a_kohya_file_says_what_it_is(width: int, version: str, is_second: str, tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"a.attn2.to_k": (4, width)}
    factors = [LoraFactors("a.attn2.to_k", torch.ones(2, width), torch.ones(4, 2), 1.0)]
    write_adapter(tmp_path / "adapter", factors, shapes, 2, "base")
    write_kohya(tmp_path / "kohya.safetensors", open_adapter(tmp_path / "adapter"), shapes, {})
    with safe_open(tmp_path / "kohya.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_base_model_version"], metadata["ss_v2"]) == (version, is_second)
    assert metadata["modelspec.architecture"].startswith("stable-diffusion-")
    assert metadata["modelspec.architecture"].endswith("/lora")
    assert {"modelspec.sai_model_spec", "modelspec.implementation", "modelspec.title", "modelspec.resolution"} <= set(
        metadata
    )
    content = (tmp_path / "kohya.safetensors").read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize("base_dir", UNETS[:1], indirect=True)
def test_exports_are_left_out_where_the_recipe_says_so(base_dir: Path, merged_dir: Path) -> None:
    run = RunFolder(str(merged_dir.parents[1]))
    config = MergingConfig(name="bare", exports=())
    merge_experts(run, SKILLS, ModelConfig(name=str(base_dir)), config)
    assert {path.name for path in (merged_dir.parent / "bare").iterdir()} == {"adapter", "pipeline", "report.json"}


@pytest.mark.parametrize("base_dir", UNETS, indirect=True)
def test_single_experts_are_exported_where_the_recipe_says_so(base_dir: Path, merged_dir: Path) -> None:
    run = RunFolder(str(merged_dir.parents[1]))
    config = MergingConfig(name="with-experts", export_experts=True)
    merge_experts(run, SKILLS, ModelConfig(name=str(base_dir)), config)
    folder = merged_dir.parent / "with-experts" / "experts" / "style"
    with_peft = DiffusionPipeline.from_pretrained(base_dir)
    plain = image_of(with_peft)
    PeftModel.from_pretrained(denoiser_of(with_peft), run.path("experts", "style"))
    expected = image_of(with_peft).astype(int)
    for name in UNET_FILES:
        pipeline = DiffusionPipeline.from_pretrained(base_dir)
        pipeline.load_lora_weights(folder, weight_name=name)
        assert np.abs(image_of(pipeline) - expected).max() <= 1  # its scale is applied at another place
        with safe_open(folder / name, framework="pt") as file:
            assert file.metadata()["skill"] == "style"
    assert (plain != expected).mean() > 0.01


@pytest.mark.parametrize("base_dir", UNETS, indirect=True)
def test_adapters_on_more_than_attention_are_read_back_from_both_files(base_dir: Path, tmp_path: Path) -> None:
    for seed, skill in enumerate(SKILLS):
        save_random_adapter(base_dir, tmp_path / "experts" / skill, seed, rank=2, target_modules=MORE_TARGETS)
    merge_experts(RunFolder(str(tmp_path)), SKILLS, ModelConfig(name=str(base_dir)), MergingConfig())
    folder = tmp_path / "merged" / "merged"
    with_peft = DiffusionPipeline.from_pretrained(base_dir)
    PeftModel.from_pretrained(denoiser_of(with_peft), folder / "adapter")
    expected = image_of(with_peft)
    for name in UNET_FILES:
        pipeline = DiffusionPipeline.from_pretrained(base_dir)
        pipeline.load_lora_weights(folder, weight_name=name)
        assert image_of(pipeline).tobytes() == expected.tobytes()


def test_exports_of_experts_without_a_format_are_refused() -> None:
    with pytest.raises(ConfigError, match="export_experts needs a file format in exports, which is empty"):
        validate(MergingConfig, {"exports": [], "export_experts": True}, "recipe.yaml")


@pytest.mark.parametrize("base_dir", TRANSFORMERS[:1], indirect=True)
def test_a_transformer_has_no_kohya_file(merged_dir: Path) -> None:
    assert not (merged_dir / EXPORT_FILES["kohya"]).exists()


@pytest.mark.parametrize("base_dir", UNETS[:1], indirect=True)
def test_a_unet_has_no_file_of_comfyui_beside_kohya_s(merged_dir: Path) -> None:
    assert not (merged_dir / EXPORT_FILES["comfyui"]).exists()


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 2e-3), ("bf16", 2e-2)])
@pytest.mark.parametrize("base_dir", UNETS[:1], indirect=True)
def test_files_of_half_the_size_hold_the_same_adapter(
    base_dir: Path, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    for seed, skill in enumerate(SKILLS):
        save_random_adapter(base_dir, tmp_path / "experts" / skill, seed, rank=4, lora_alpha=3)
    files = {}
    for name, precision in (("whole", "fp32"), ("half", dtype)):
        config = MergingConfig.model_validate({"name": name, "export_dtype": precision})
        merge_experts(RunFolder(str(tmp_path)), SKILLS, ModelConfig(name=str(base_dir)), config)
        files[name] = tmp_path / "merged" / name
    for export in UNET_FILES:
        whole, half = (load_file(files[name] / export) for name in ("whole", "half"))
        assert whole.keys() == half.keys()
        weights = [key for key in half if not key.endswith("alpha")]
        assert {half[key].dtype for key in weights} == {{"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]}
        for key in whole:
            torch.testing.assert_close(half[key].float(), whole[key].float(), rtol=tolerance, atol=tolerance)
        assert (files["half"] / export).stat().st_size < 0.7 * (files["whole"] / export).stat().st_size


@pytest.mark.parametrize("base_dir", UNETS[:1], indirect=True)
def test_an_adapter_of_half_the_size_leaves_the_baked_weights_as_they_are(tmp_path: Path, base_dir: Path) -> None:
    for seed, skill in enumerate(SKILLS):
        save_random_adapter(base_dir, tmp_path / "experts" / skill, seed, rank=4, lora_alpha=3)
    for name, precision in (("whole", "fp32"), ("half", "bf16")):
        config = MergingConfig.model_validate({"name": name, "adapter_dtype": precision, "exports": []})
        merge_experts(RunFolder(str(tmp_path)), SKILLS, ModelConfig(name=str(base_dir)), config)
    whole, half = (tmp_path / "merged" / name for name in ("whole", "half"))
    weights = load_file(half / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    exact = load_file(whole / "adapter" / "adapter_model.safetensors")
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor.float(), exact[key], rtol=2e-2, atol=2e-2)
    baked = [load_file(next((folder / "pipeline" / "unet").glob("*.safetensors"))) for folder in (whole, half)]
    for key in baked[0]:
        torch.testing.assert_close(baked[0][key], baked[1][key])


def test_a_value_that_a_precision_cannot_hold_is_refused(tmp_path: Path) -> None:
    specs = [TensorSpec("large", torch.float16, (2,))]
    write_safetensors(tmp_path / "file", specs, [torch.tensor([1.0, 6e4])])
    assert load_file(tmp_path / "file")["large"].tolist() == [1.0, 6e4]
    with pytest.raises(AdapterError, match=r"file: large holds a value that is too large for fp16; set the dtype"):
        write_safetensors(tmp_path / "file", specs, [torch.tensor([1.0, -7e4])])
