"""ComfyUI's files of transformers, at the published sizes and names, read back by diffusers' own readers to the same deltas."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from selma_ray.adapters.comfyui import COMFYUI_FAMILIES, UnknownNameError, write_comfyui
from selma_ray.adapters.exports import EXPORT_FILES, write_export
from selma_ray.adapters.foreign import Adapted, described, import_adapter
from selma_ray.adapters.peft_format import Adapter, LoraFactors, open_adapter, write_adapter
from selma_ray.models.config import ModelConfig

Tensors = dict[str, torch.Tensor]
MODELS = {
    "FluxPipeline": "black-forest-labs/FLUX.1-dev",
    "Flux2KleinPipeline": "black-forest-labs/FLUX.2-klein-base-4B",
    "QwenImagePipeline": "Qwen/Qwen-Image",
    "ZImagePipeline": "Tongyi-MAI/Z-Image",
}
# Not within a block, where FLUX's format has other names or another order of rows.
BLOCKS = (
    "transformer_blocks.0.",
    "single_transformer_blocks.0.",
    "layers.0.",
    "noise_refiner.0.",
    "context_refiner.0.",
)
MODULATION = "modulation"  # of FLUX.2, shared by all blocks


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Adapted:
    return described(ModelConfig(name=MODELS[request.param]))


def adapter_of(model: Adapted, folder: Path, ranks: Any = lambda place: 1 + place % 2) -> Adapter:
    """Write an adapter of the modules of each kind of block, with different ranks side by side."""
    modules = [name for name in model.shapes if name.startswith(BLOCKS)]
    shapes = {name: model.shapes[name] for name in sorted(modules)}
    draw = torch.Generator().manual_seed(0)
    factors = [
        LoraFactors(name, torch.randn(2, shape[1], generator=draw), torch.randn(shape[0], 2, generator=draw), 1.0)
        for name, shape in shapes.items()
    ]
    write_adapter(folder, factors, shapes, 2, model.model_name)
    return open_adapter(folder)


def read_by_diffusers(model: Adapted, path: Path) -> Tensors:
    """Return a vector of each delta's action, which tells deltas apart and takes no memory."""
    read: Any = getattr(diffusers, model.pipeline_class).lora_state_dict(str(path))
    prefix, side = "transformer.", ".lora_A.weight"
    return {
        key.removeprefix(prefix).removesuffix(side): acted(tensor, read[key.replace("lora_A", "lora_B")])
        for key, tensor in read.items()
        if key.endswith(side)
    }


def acted(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return B @ (A @ torch.randn(A.shape[1], 3, generator=draw))


def test_every_family_of_comfyui_is_tested() -> None:
    assert MODELS.keys() == COMFYUI_FAMILIES.keys()


def test_diffusers_reads_the_same_deltas(model: Adapted, tmp_path: Path) -> None:
    adapter = adapter_of(model, tmp_path / "adapter")
    assert write_export("comfyui", tmp_path, adapter, model, {"made": "here"})
    path = tmp_path / EXPORT_FILES["comfyui"]
    read = read_by_diffusers(model, path)
    assert read.keys() == set(adapter.modules)
    for module in adapter.modules:
        factors = adapter.factors(module)
        expected = acted(factors.A_RI, factors.scale * factors.B_OR)
        torch.testing.assert_close(read[module], expected, rtol=1e-4, atol=1e-3, msg=module)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["made"] == "here"


def test_a_part_of_a_fused_projection_leaves_the_others_as_they_are(model: Adapted, tmp_path: Path) -> None:
    adapter = adapter_of(model, tmp_path / "adapter")
    keys = [name for name in adapter.modules if name.endswith(("to_k", "proj_mlp"))]
    shapes = {name: adapter.shapes[name] for name in keys}
    write_adapter(tmp_path / "one", map(adapter.factors, keys), shapes, 2, model.model_name)
    write_comfyui(tmp_path / "lora.safetensors", open_adapter(tmp_path / "one"), model.shapes, model.pipeline_class, {})
    for module, vector in read_by_diffusers(model, tmp_path / "lora.safetensors").items():
        assert (vector.abs().max() > 0) == (module in keys), module


def test_our_reader_takes_its_own_files(model: Adapted, tmp_path: Path) -> None:
    adapter = adapter_of(model, tmp_path / "adapter")
    write_comfyui(tmp_path / "lora.safetensors", adapter, model.shapes, model.pipeline_class, {})
    import_adapter(tmp_path / "lora.safetensors", "style", tmp_path / "read", ModelConfig(name=model.model_name))
    read = open_adapter(tmp_path / "read")
    assert read.modules == adapter.modules
    for module in adapter.modules[:: max(1, len(adapter.modules) // 5)]:
        first, second = (each.factors(module) for each in (adapter, read))
        torch.testing.assert_close(acted(first.A_RI, first.B_OR), acted(second.A_RI, second.scale * second.B_OR))


@pytest.mark.parametrize("model", ["FluxPipeline"], indirect=True)
def test_what_the_format_has_no_name_for_is_not_written(model: Adapted, tmp_path: Path, caplog: Any) -> None:
    shapes = {"norm_out.linear": model.shapes["norm_out.linear"]}
    factors = [LoraFactors("norm_out.linear", torch.ones(1, 3072), torch.ones(shapes["norm_out.linear"][0], 1), 1.0)]
    write_adapter(tmp_path / "adapter", factors, shapes, 1, None)
    adapter = open_adapter(tmp_path / "adapter")
    with pytest.raises(UnknownNameError, match=r"norm_out.linear"):
        write_comfyui(tmp_path / "lora.safetensors", adapter, model.shapes, model.pipeline_class, {})
    assert not write_export("comfyui", tmp_path, adapter, model, {})
    assert "comfyui is not written, norm_out.linear has no name there" in caplog.text
    assert write_export("diffusers", tmp_path, adapter, model, {})
    assert set(load_file(tmp_path / EXPORT_FILES["diffusers"])) == {
        f"transformer.norm_out.linear.lora_{side}.weight" for side in "AB"
    }
