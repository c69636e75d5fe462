"""LoRA files of other programs become adapters whose deltas are those that diffusers' own reader gives; bad ones are one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from selma_ray.adapters.foreign import import_adapter
from selma_ray.adapters.peft_format import open_adapter
from selma_ray.errors import AdapterError, ConfigError
from selma_ray.merging.config import MergingConfig
from selma_ray.merging.run import merge_experts
from selma_ray.models.config import ModelConfig
from selma_ray.models.parts import denoiser_of
from selma_ray.models.rendering import load_pipeline
from selma_ray.storage import RunFolder
from tests.unit.adapters.adapters_on_disk import save_random_adapter
from tests.unit.models.tiny_families import FAMILIES

Tensors = dict[str, torch.Tensor]
# A linear module, one of 1 x 1 and one of 3 x 3, of the tiny Stable Diffusion.
LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
POINTWISE = "mid_block.attentions.0.proj_in"
CONVOLUTION = "down_blocks.0.resnets.0.conv1"


@pytest.fixture(scope="module")
def models(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelConfig]:
    made: dict[str, ModelConfig] = {}

    def model(family: str) -> ModelConfig:
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / "model"
            FAMILIES[family](folder, tiny_pipeline_dir)
            made[family] = ModelConfig(name=str(folder))
        return made[family]

    return model


def random_factors(model: ModelConfig, modules: dict[str, int], seed: int = 0) -> dict[str, tuple[Any, Any]]:
    """Return factors in the shapes that kohya and PEFT store, of a rank for each module."""
    denoiser = denoiser_of(load_pipeline(model, "cpu"))
    draw = torch.Generator().manual_seed(seed)
    factors = {}
    for module, rank in modules.items():
        weight: Any = denoiser.get_submodule(module).weight
        ones = (1,) * (weight.dim() - 2)
        A = torch.randn(rank, *weight.shape[1:], generator=draw) * 0.1
        factors[module] = A, torch.randn(len(weight), rank, *ones, generator=draw) * 0.1
    return factors


def kohya(factors: dict[str, tuple[Any, Any]], alpha: float | None = 2.0, prefix: str = "lora_unet_") -> Tensors:
    tensors: Tensors = {}
    for module, (A, B) in factors.items():
        name = prefix + module.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def deltas_by_diffusers(model: ModelConfig, path: Path) -> Tensors:
    pipeline: Any = load_pipeline(model, "cpu")
    denoiser = denoiser_of(pipeline)
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    deltas = {name.removesuffix(".weight"): tensor - before[name] for name, tensor in denoiser.state_dict().items()}
    return {name: delta.flatten(1) for name, delta in deltas.items() if delta.abs().max() > 0}


def deltas_by_us(model: ModelConfig, source: Path, target: Path, **options: Any) -> Tensors:
    import_adapter(source, "style", target, model, **options)
    return {factors.module: factors.delta() for factors in open_adapter(target)}


def assert_same(ours: Tensors, theirs: Tensors, tolerance: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, delta in theirs.items():
        torch.testing.assert_close(ours[name], delta, rtol=1e-4, atol=tolerance, msg=name)


def saved(tensors: Tensors, path: Path, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def of_diffusers(family: str) -> Callable[[ModelConfig], tuple[Tensors, Any]]:
    """Return what makes a file as a pipeline's `save_lora_weights` writes it, alpha in its header."""

    def make(model: ModelConfig) -> tuple[Tensors, Any]:
        part = "unet" if family == "stable_diffusion" else "transformer"
        denoiser = denoiser_of(load_pipeline(model, "cpu"))
        modules = [name for name, _ in denoiser.named_modules() if name.endswith(("to_q", "to_out.0"))]
        factors = random_factors(model, dict.fromkeys(modules, 3))
        tensors: Tensors = {}
        for module, (A, B) in factors.items():
            tensors |= {f"{part}.{module}.lora_A.weight": A, f"{part}.{module}.lora_B.weight": B}
        settings = {f"{part}.r": 3, f"{part}.lora_alpha": 6, f"{part}.target_modules": modules}
        return tensors, {"lora_adapter_metadata": json.dumps(settings)}

    return make


def of_kohya_on_stable_diffusion(model: ModelConfig) -> tuple[Tensors, Any]:
    return kohya(random_factors(model, {LINEAR: 2, POINTWISE: 3, CONVOLUTION: 4})), None


def of_kohya_on_sdxl(model: ModelConfig) -> tuple[Tensors, Any]:
    """Blocks are counted as in the original format, not as in diffusers'."""
    block = "down_blocks.1.attentions.0."
    names = (
        "transformer_blocks.0.attn1.to_out.0",
        "transformer_blocks.0.attn2.to_k",
        "transformer_blocks.0.ff.net.2",
        "proj_in",
    )
    factors = random_factors(model, {f"{block}{name}": 2 for name in names})
    return kohya({name.replace(block, "input_blocks.3.1."): each for name, each in factors.items()}), None


def of_kohya_on_flux(model: ModelConfig) -> tuple[Tensors, Any]:
    """Fused projections, as the original format has them: one A, and the B of query, key and value one above the other."""
    draw = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    for stream in ("img", "txt"):
        name = f"lora_unet_double_blocks_0_{stream}_attn_qkv"
        tensors |= {
            f"{name}.lora_down.weight": torch.randn(2, 32, generator=draw) * 0.1,
            f"{name}.lora_up.weight": torch.randn(96, 2, generator=draw) * 0.1,
            f"{name}.alpha": torch.tensor(1.0),
        }
    return tensors, None


def of_comfyui_on_qwen_image(model: ModelConfig) -> tuple[Tensors, Any]:
    factors = random_factors(model, {"transformer_blocks.0.attn.to_q": 2, "transformer_blocks.1.img_mlp.net.2": 3})
    tensors: Tensors = {}
    for module, (A, B) in factors.items():
        name = f"diffusion_model.{module}"
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B, f"{name}.alpha": torch.tensor(1.0)}
    return tensors, None


def of_kohya_on_qwen_image(model: ModelConfig) -> tuple[Tensors, Any]:
    return kohya(
        random_factors(model, {"transformer_blocks.0.attn.to_q": 2, "transformer_blocks.1.attn.add_k_proj": 2})
    ), None


FORMATS: dict[str, tuple[str, Callable[[ModelConfig], tuple[Tensors, Any]]]] = {
    "diffusers": ("stable_diffusion", of_diffusers("stable_diffusion")),
    "diffusers, transformer": ("flux", of_diffusers("flux")),
    "diffusers, Z-Image": ("z_image", of_diffusers("z_image")),
    "kohya, with convolutions and ranks": ("stable_diffusion", of_kohya_on_stable_diffusion),
    "kohya, SDXL's own blocks": ("sdxl", of_kohya_on_sdxl),
    "FLUX, fused": ("flux", of_kohya_on_flux),
    "Qwen-Image, original": ("qwen_image", of_comfyui_on_qwen_image),
    "Qwen-Image, kohya": ("qwen_image", of_kohya_on_qwen_image),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_has_the_deltas_that_diffusers_gives_it(name: str, models: Any, tmp_path: Path) -> None:
    family, make = FORMATS[name]
    model = models(family)
    tensors, metadata = make(model)
    path = saved(tensors, tmp_path / "file" / "lora.safetensors", metadata)
    assert_same(deltas_by_us(model, path, tmp_path / "ours"), deltas_by_diffusers(model, path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_file_of_few_bits_is_multiplied_in_many(dtype: torch.dtype, models: Any, tmp_path: Path) -> None:
    model = models("stable_diffusion")
    factors = {module: (A.to(dtype), B.to(dtype)) for module, (A, B) in random_factors(model, {LINEAR: 4}).items()}
    path = saved(kohya(factors, alpha=3.0), tmp_path / "lora.safetensors")
    A, B = factors[LINEAR]
    assert_same(deltas_by_us(model, path, tmp_path / "ours"), {LINEAR: 0.75 * B.float() @ A.float()}, 1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"to_q": 6}, "alpha_pattern": {"mid_block.*to_k": 9}},
        {"target_modules": ["to_q", "conv1", "proj_in"]},
    ],
)
def test_a_folder_has_the_deltas_that_peft_gives_it(options: Any, models: Any, tmp_path: Path) -> None:
    model = models("stable_diffusion")
    folder = save_random_adapter(Path(model.name), tmp_path / "peft", 0, rank=4, lora_alpha=3, **options)
    denoiser = AutoModel.from_pretrained(model.name, subfolder="unet")
    from peft import PeftModel

    loaded: Any = PeftModel.from_pretrained(denoiser, str(folder))
    theirs = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().flatten(1)
        for name, module in loaded.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert_same(deltas_by_us(model, folder, tmp_path / "ours"), theirs)


def test_a_run_names_its_expert_or_its_merge(models: Any, tmp_path: Path) -> None:
    model = models("stable_diffusion")
    save_random_adapter(Path(model.name), tmp_path / "run" / "experts" / "style", 1)
    save_random_adapter(Path(model.name), tmp_path / "merged" / "adapter", 2)
    deltas = [deltas_by_us(model, tmp_path / name, tmp_path / "ours" / name) for name in ("run", "merged")]
    assert deltas[0].keys() == deltas[1].keys()
    assert not torch.equal(*(each[LINEAR] for each in deltas))


def test_text_encoders_are_left_out_where_the_recipe_says_so(models: Any, tmp_path: Path) -> None:
    model, module = models("flux"), "transformer_blocks.0.attn.to_q"
    tensors = of_diffusers("flux")(model)[0]
    told = kohya(
        {"text_model.encoder.layers.0.self_attn.q_proj": (torch.ones(2, 32), torch.ones(32, 2))}, prefix="lora_te1_"
    )
    told = {key.replace(".lora_down", ".lora_A").replace(".lora_up", ".lora_B"): each for key, each in told.items()}
    path = saved(tensors | told, tmp_path / "lora.safetensors")
    with pytest.raises(
        AdapterError, match=r"lora_te1_text_model.* is of a text encoder, .*merging.skip_text_encoders=true"
    ):
        deltas_by_us(model, path, tmp_path / "ours")
    assert module in deltas_by_us(model, path, tmp_path / "ours", skip_text_encoders=True)


def changed(key: str, value: Any) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {next(each for each in tensors if each.endswith(key)): value}


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "DoRA": (lambda tensors: tensors | {"lora_unet_x.dora_scale": torch.ones(1)}, r"dora_scale is of DoRA, .*merge plain LoRAs"),
    "LoHa": (lambda tensors: {"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, r"hada_w1_a is of LyCORIS .*no product of two factors"),
    "LoKr": (lambda tensors: {"lora_unet_x.lokr_w1": torch.ones(2, 2)}, r"lokr_w1 is of LyCORIS"),
    "full difference": (lambda tensors: {"diffusion_model.x.diff": torch.ones(2, 2)}, r"x.diff is of LyCORIS"),
    "NaN": (changed("lora_up.weight", torch.full((32, 2), torch.nan)), r"lora_up.weight must be finite, holds NaN or infinity"),
    "infinite alpha": (changed(".alpha", torch.tensor(torch.inf)), r"alpha must be finite"),
    "alpha of many numbers": (changed(".alpha", torch.ones(2)), r"alpha must be one number, has shape \(2,\)"),
    "another shape": (changed("lora_down.weight", torch.ones(2, 7)), r"to_q must have factors of a weight of shape \(16, 16\)"),
    "one factor": (
        lambda tensors: {key: tensor for key, tensor in tensors.items() if "lora_up" not in key},
        r"to_q must have both factors, the second is missing",
    ),
    "another family": (
        lambda tensors: {
            "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 8),
            "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(8, 2),
        },
        r"transformer_blocks.0.attn.to_q is no module of .*, none of its names is; name a LoRA of this model",
    ),
    "keys nobody knows": (lambda tensors: tensors | {"what.is.this": torch.ones(2)}, r"name a LoRA of this model"),
    "nothing": (lambda tensors: {}, r"holds nothing for the unet"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_merged_is_one_line(name: str, models: Any, tmp_path: Path) -> None:
    model = models("stable_diffusion")
    change, message = REFUSED[name]
    path = saved(change(kohya(random_factors(model, {LINEAR: 2}))), tmp_path / "lora.safetensors")
    with pytest.raises(AdapterError, match=message) as refusal:
        import_adapter(path, "style", tmp_path / "ours", model)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS, .*git lfs pull"),
        (b"\x00" * 100, "truncated or no safetensors file"),
    ],
)
@pytest.mark.parametrize("name", ["lora.safetensors", "folder/adapter_model.safetensors"])
def test_a_file_that_is_not_whole_is_one_line(
    name: str, content: bytes, message: str, models: Any, tmp_path: Path
) -> None:
    model, path = models("stable_diffusion"), tmp_path / name
    if "folder" in name:
        save_random_adapter(Path(model.name), path.parent, 0)
    path.write_bytes(content)
    with pytest.raises(AdapterError, match=message) as refusal:
        import_adapter(path.parent if "folder" in name else path, "style", tmp_path / "ours", model)
    assert path.name in str(refusal.value)


@pytest.mark.parametrize(("content", "message"), [("[]", "must be a mapping, is a list"), ("{", "must be JSON")])
def test_a_folder_whose_settings_cannot_be_read_is_one_line(
    content: str, message: str, models: Any, tmp_path: Path
) -> None:
    model = models("stable_diffusion")
    folder = save_random_adapter(Path(model.name), tmp_path / "peft", 0)
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(AdapterError, match=message):
        import_adapter(folder, "style", tmp_path / "ours", model)


def test_foreign_adapters_merge_in_the_place_of_a_runs_own(models: Any, tmp_path: Path) -> None:
    """They differ in format, modules and ranks; a convolution is baked and exported like the rest."""
    model = models("stable_diffusion")
    file = saved(kohya(random_factors(model, {LINEAR: 2, CONVOLUTION: 3, POINTWISE: 1})), tmp_path / "lora.safetensors")
    folder = save_random_adapter(Path(model.name), tmp_path / "peft", 1, rank=4)
    config = MergingConfig(experts={"style": str(file), "counting": str(folder)})
    run = tmp_path / "run"
    summary = merge_experts(RunFolder(str(run)), [], model, config)
    assert list(summary.weights) == ["style", "counting"]
    deltas = [deltas_by_us(model, source, tmp_path / "ours" / source.stem) for source in (file, folder)]
    merged = run / "merged" / "merged"
    base = load_file(Path(model.name) / "unet" / "diffusion_pytorch_model.safetensors")
    baked = load_file(merged / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    expected = {name: 0.5 * sum(each[name] for each in deltas if name in each) for name in {*deltas[0], *deltas[1]}}
    for name, delta in expected.items():
        weight = f"{name}.weight"
        torch.testing.assert_close((baked[weight] - base[weight]).flatten(1), delta, rtol=1e-4, atol=1e-6, msg=name)
    for export in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        assert_same(deltas_by_diffusers(model, merged / export), expected)


def test_a_target_that_cannot_be_merged_is_refused_before_training(models: Any) -> None:
    from selma_ray.adapters.targets import check_targets

    denoiser = denoiser_of(load_pipeline(models("stable_diffusion"), "cpu"))
    check_targets(denoiser, ["to_q", "conv1", "proj_in"], "tiny")
    with pytest.raises(
        ConfigError, match=r"targets must name linear modules .*, 'norm1' names .* \(LayerNorm\) of tiny"
    ):
        check_targets(denoiser, ["to_q", "norm1"], "tiny")
    with pytest.raises(
        ConfigError, match=r"must name linear modules alone with experts.moe, 'conv1' names .* \(Conv2d\)"
    ):
        check_targets(denoiser, ["to_q", "conv1"], "tiny", linear_alone=True)
    assert get_peft_model(denoiser, LoraConfig(target_modules=["conv1"])) is not None
