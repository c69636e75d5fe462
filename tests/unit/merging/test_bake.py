import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from selma_ray.adapters.peft_format import LoraFactors
from selma_ray.errors import AdapterError
from selma_ray.merging.bake import bake_pipeline
from selma_ray.merging.pipeline_files import pipeline_files

MODULE = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def factors(module: str) -> LoraFactors:
    generator = torch.Generator().manual_seed(0)
    return LoraFactors(module, torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator), 1.0)


def weight_of(unet: torch.nn.Module, module: str) -> torch.Tensor:
    return unet.get_submodule(module).weight.detach()


def test_a_variant_in_shards_becomes_a_plain_pipeline(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    pipeline.to(torch.float16).save_pretrained(tmp_path / "source", variant="fp16", max_shard_size="40KB")
    (tmp_path / "source" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "source" / "single-file.safetensors").write_bytes(b"checkpoint")
    bake_pipeline(tmp_path / "source", tmp_path / "baked", {MODULE: (32, 32)}, factors, torch.float16, variant="fp16")

    names = {path.relative_to(tmp_path / "baked").as_posix() for path in (tmp_path / "baked").rglob("*")}
    assert not [name for name in names if "fp16" in name or name.endswith(".bin") or name.startswith("single-file")]
    index = json.loads((tmp_path / "baked" / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    baked = DiffusionPipeline.from_pretrained(tmp_path / "baked", torch_dtype=torch.float16).unet
    expected = weight_of(pipeline.unet, MODULE).float() + factors(MODULE).delta()
    torch.testing.assert_close(weight_of(baked, MODULE), expected.half())
    other = MODULE.replace("to_k", "to_v")
    torch.testing.assert_close(weight_of(baked, other), weight_of(pipeline.unet, other), rtol=0, atol=0)


def test_no_more_than_one_merged_module_is_in_memory_at_a_time(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    unet = DiffusionPipeline.from_pretrained(tiny_pipeline_dir).unet
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in unet.named_modules()
        if name.rpartition(".")[2] in ("to_q", "to_k", "to_v")
    }
    asked: list[weakref.ref] = []

    def merged(module: Any) -> Any:
        alive = [reference for reference in asked if reference() is not None]
        assert len(alive) <= 1
        rows, columns = shapes[module]
        result = LoraFactors(module, torch.ones(2, columns), torch.ones(rows, 2), 1.0)
        asked.append(weakref.ref(result))
        return result

    bake_pipeline(tiny_pipeline_dir, tmp_path / "baked", shapes, merged, torch.float32)
    assert len(asked) == len(shapes) > 20


def test_of_plain_and_variant_weights_one_is_copied(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    pipeline.save_pretrained(tmp_path)
    pipeline.save_pretrained(tmp_path, variant="fp16")
    for variant in (None, "fp16"):
        files = [file for file in pipeline_files(tmp_path, variant) if file.source.suffix == ".safetensors"]
        assert len(files) == 3
        assert all(("fp16" in file.source.name) == (variant == "fp16") for file in files)
        assert not [file for file in files if "fp16" in file.target.name]


def test_a_module_of_another_base_is_refused_before_anything_is_written(
    tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=r"down\.nowhere\.weight must have shape \(32, 32\).* it is missing"):
        bake_pipeline(tiny_pipeline_dir, tmp_path / "baked", {"down.nowhere": (32, 32)}, factors, torch.float32)
    assert not (tmp_path / "baked").exists()
