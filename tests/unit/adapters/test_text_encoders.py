"""What LoRAs have for CLIP is merged, baked, exported and rendered as what they have for the UNet; diffusers' readers are the judge."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from selma_ray.adapters.applying import load_adapted_pipeline
from selma_ray.adapters.files import TEXT_ENCODERS, adapter_digest
from selma_ray.adapters.foreign import import_adapter
from selma_ray.adapters.peft_format import open_adapter
from selma_ray.adapters.text_encoders import text_parts
from selma_ray.errors import AdapterError
from selma_ray.merging.config import MergingConfig
from selma_ray.merging.run import merge_adapters
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.rendering import Renderer, load_pipeline
from tests.unit.models.tiny_families import FAMILIES

Tensors = dict[str, torch.Tensor]
UNET = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
# diffusers tells a file's format by its out_proj, and would lose q_proj without it.
TOLD = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.out_proj", "encoder.layers.1.mlp.fc1")
SAMPLING = SamplingConfig(steps=2, guidance_scale=3.0, width_px=64, height_px=64)


@pytest.fixture(scope="module", params=["stable_diffusion", "sdxl"])
def model(request: pytest.FixtureRequest, tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    FAMILIES[request.param](folder, tiny_pipeline_dir)
    return ModelConfig(name=str(folder))


def parts_of(pipeline: Any) -> dict[str, Any]:
    names = ("unet", *TEXT_ENCODERS)
    return {name: getattr(pipeline, name) for name in names if getattr(pipeline, name, None) is not None}


def factors(model: ModelConfig, seed: int = 0) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    """Return A and B by part and by the name that files of LoRAs give a module."""
    draw, made = torch.Generator().manual_seed(seed), {}
    for part, module in parts_of(load_pipeline(model, "cpu")).items():
        for name in (UNET,) if part == "unet" else TOLD:
            written = name if part == "unet" else f"text_model.{name}"
            weights = dict(module.named_parameters())
            weight = weights.get(f"{name}.weight", weights.get(f"{written}.weight"))
            made[part, written] = (
                torch.randn(2, weight.shape[1], generator=draw) * 0.1,
                torch.randn(len(weight), 2, generator=draw) * 0.1,
            )
    return made


def as_kohya(made: Any, path: Path) -> Path:
    two = any(part == "text_encoder_2" for part, _ in made)
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if two else "lora_te", "text_encoder_2": "lora_te2"}
    tensors: Tensors = {}
    for (part, module), (A, B) in made.items():
        name = f"{prefixes[part]}_{module.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": torch.tensor(1.0)}
    return saved(tensors, path)


def as_diffusers(made: Any, path: Path) -> Path:
    tensors: Tensors = {}
    for (part, module), (A, B) in made.items():
        tensors |= {f"{part}.{module}.lora_A.weight": A, f"{part}.{module}.lora_B.weight": B}
    return saved(tensors, path)


def saved(tensors: Tensors, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def changes(before: Any, after: Any) -> Tensors:
    """Return by how much each weight of a pipeline differs in another."""
    deltas = {}
    for part, module in parts_of(after).items():
        weights = parts_of(before)[part].state_dict()
        for name, tensor in module.state_dict().items():
            if (delta := tensor - weights[name]).abs().max() > 0:
                deltas[f"{part}.{name.removesuffix('.weight').removeprefix('text_model.')}"] = delta
    return deltas


def by_diffusers(model: ModelConfig, path: Path) -> Tensors:
    pipeline: Any = load_pipeline(model, "cpu")
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    pipeline.fuse_lora(components=list(parts_of(pipeline)))
    pipeline.unload_lora_weights()
    return changes(load_pipeline(model, "cpu"), pipeline)


def assert_same(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for name, delta in theirs.items():
        torch.testing.assert_close(ours[name], delta, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("write", [as_kohya, as_diffusers])
def test_a_file_changes_what_diffusers_changes_with_it(model: Any, write: Any, tmp_path: Path) -> None:
    path = write(factors(model), tmp_path / "file" / "lora.safetensors")
    import_adapter(path, "style", tmp_path / "ours", model)
    loaded = load_adapted_pipeline(model, tmp_path / "ours", "cpu")
    theirs = by_diffusers(model, path)
    assert {name.partition(".")[0] for name in theirs} == set(parts_of(loaded))
    assert_same(changes(load_pipeline(model, "cpu"), loaded), theirs)


def test_a_merge_is_baked_and_exported_with_its_text_encoders(model: Any, tmp_path: Path) -> None:
    """One of the two has nothing for text encoders, so that half of the other's is left in the mean."""
    made = factors(model)
    whole = as_kohya(made, tmp_path / "whole.safetensors")
    bare = as_diffusers(
        {key: each for key, each in factors(model, 1).items() if key[0] == "unet"}, tmp_path / "bare.safetensors"
    )
    out = tmp_path / "out"
    places = {"whole": str(whole), "bare": str(bare)}
    merge_adapters(places, model, MergingConfig(), out, bake=True)
    theirs = [by_diffusers(model, path) for path in (whole, bare)]
    expected = {name: 0.5 * sum(each[name] for each in theirs if name in each) for name in {*theirs[0], *theirs[1]}}
    baked = load_pipeline(ModelConfig(name=str(out / "pipeline")), "cpu")
    assert_same(changes(load_pipeline(model, "cpu"), baked), expected)
    for file in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        assert_same(by_diffusers(model, out / file), expected)
    adapted = Renderer(load_adapted_pipeline(model, out / "adapter", "cpu"), SAMPLING).render(["a cat"], [0])[0]
    drawn = Renderer(baked, SAMPLING).render(["a cat"], [0])[0]
    assert np.abs(np.asarray(adapted, int) - np.asarray(drawn, int)).max() <= 1
    again = tmp_path / "again"
    merge_adapters({"one": str(out)}, model, MergingConfig(), again)  # a merged folder is an adapter like others
    assert text_parts(again / "adapter") == text_parts(out / "adapter") != []
    for part in ("", *text_parts(again / "adapter")):
        first, second = (open_adapter(folder / "adapter" / part) for folder in (out, again))
        for module in first.modules:
            torch.testing.assert_close(first.factors(module).delta(), second.factors(module).delta())


def test_the_digest_of_an_adapter_names_its_text_encoders(model: Any, tmp_path: Path) -> None:
    path = as_kohya(factors(model), tmp_path / "lora.safetensors")
    digests = set()
    for skip in (False, True):
        import_adapter(path, "style", tmp_path / str(skip), model, skip_text_encoders=skip)
        digests.add(adapter_digest(tmp_path / str(skip)))
    assert text_parts(tmp_path / "True") == []
    assert len(digests) == 2


def test_a_module_that_the_text_encoder_lacks_is_named(model: Any, tmp_path: Path) -> None:
    made = factors(model)
    A, B = made["text_encoder", f"text_model.{TOLD[0]}"]
    made["text_encoder", "text_model.encoder.layers.9.self_attn.q_proj"] = (A.clone(), B.clone())
    path = as_diffusers(made, tmp_path / "lora.safetensors")
    with pytest.raises(
        AdapterError, match=r"text_model.encoder.layers.9.self_attn.q_proj is no module of .*others are"
    ):
        import_adapter(path, "style", tmp_path / "ours", model)
