"""The whole loop on Stable Diffusion 1.x at full size: published configurations, random weights, 256 px, a few steps, real vLLM.

Takes about 6 GB of memory, 10 GB of disk and seven minutes of two cores:
`python -m pytest -m heavy tests/e2e/test_full_size.py`.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors import safe_open

SD = "CompVis/stable-diffusion-v1-4"  # 1.5 is the same network
SAMPLING = "steps: 2, width_px: 256, height_px: 256"
FEW = [
    "skills=[miniature/common, miniature/counting]",
    "prompts.per_skill=4",
    "prompts.per_request=4",
    "prompts.requests_in_flight=2",
    "prompts.dev_fraction=0",
    f"images.sampling={{{SAMPLING}, guidance_scale: 2.0}}",
    "images.batch_size=4",
    "images.per_prompt=1",
    "images.selection=null",
    "images.max_renderers=1",
    "experts.lora={rank: 4, alpha: 4}",
    "experts.steps=2",
    "experts.batch_size=2",
    "experts.micro_batch_size=1",
    "experts.checkpoint_every_steps=1",
    "experts.precision=bf16",
    "experts.gradient_checkpointing=true",
    "experts.max_concurrent=1",
    "evaluation.max_prompts=2",
    "evaluation.batch_size=4",
    f"evaluation.sampling={{{SAMPLING}, guidance_scale: 1.0}}",
    "evaluation.experts=false",
    f"serving.sampling={{{SAMPLING}, guidance_scale: 1.0}}",
    "serving.experts=false",
    "serving.port=0",
]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """Write a pipeline of full size in bf16; its tokenizer knows letters alone."""
    import torch
    import transformers
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    from selma_ray.models.published import write_configuration
    from tests.tiny_models import character_tokenizer

    source = tmp_path / "configurations"
    source.mkdir()
    write_configuration(SD, source)
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        name: part.from_config(part.load_config(source / name)).to(torch.bfloat16)
        for name, part in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL))
    }
    text = transformers.CLIPTextConfig.from_pretrained(source / "text_encoder")
    pipeline = StableDiffusionPipeline(
        **parts,
        text_encoder=transformers.CLIPTextModel(text).to(torch.bfloat16),
        tokenizer=character_tokenizer(tmp_path / "tokenizer-source"),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.heavy
@pytest.mark.timeout(7200)
def test_the_whole_loop_on_a_model_of_full_size(selma: Any, model_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    finished = selma("run", f"run_dir={run_dir}", f"model={{name: {model_dir}, dtype: bf16}}", *FEW, timeout_s=7000)
    assert finished.returncode == 0, finished.stderr[-4000:]
    tables = [pq.read_table(path) for path in (run_dir / "images").rglob("*.parquet")]
    assert sum(table.num_rows for table in tables) == 2 * 4
    assert {size for table in tables for size in table["width"].to_pylist() + table["height"].to_pylist()} == {256}
    merged = run_dir / "merged" / "merged"
    with safe_open(merged / "kohya.safetensors", framework="pt") as file:
        assert len(file.keys()) == 3 * 128
        assert file.metadata()["ss_base_model_version"] == "sd_v1"
    with safe_open(merged / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        assert len(file.keys()) == 686
    report = json.loads((run_dir / "report.json").read_text())
    assert set(report["evaluation"]["models"]) == {"base", "merged"}
    assert Image.open(run_dir / "served.png").size == (256, 256)
