from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from selma_ray.errors import ConfigError, RenderError
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.rendering import CPU_LANES, Renderer, load_pipeline
from tests.tiny_models import save_tiny_sdxl

SAMPLING = SamplingConfig(steps=2, guidance_scale=2.0, width_px=64, height_px=64)


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_dir: Path) -> Any:
    return load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)), "cpu")


@pytest.fixture
def renderer(pipeline: Any) -> Renderer:
    return Renderer(pipeline, SAMPLING)


def test_another_family_renders_with_a_scheduler_by_name_and_a_negative_prompt(tmp_path: Path) -> None:
    save_tiny_sdxl(tmp_path / "sdxl")
    sampling = SAMPLING.model_copy(update={"scheduler": "DPMSolverMultistepScheduler", "negative_prompt": "blur"})
    renderer = Renderer(load_pipeline(ModelConfig(name=str(tmp_path / "sdxl")), "cpu"), sampling)
    assert renderer.scheduler == "DPMSolverMultistepScheduler"
    assert renderer.render(["a cat"], [0])[0].size == (64, 64)


@pytest.mark.parametrize("name", ["EulerScheduler", "DDIMSchedulers", "FlowMatchEulerDiscreteScheduler", "UNet2DModel"])
def test_a_scheduler_that_does_not_fit_names_those_that_do(pipeline: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"must be a diffusers scheduler .*DDIMScheduler.*got '{name}'"):
        Renderer(pipeline, SAMPLING.model_copy(update={"scheduler": name}))


@pytest.mark.parametrize(
    "failure", [torch.OutOfMemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_batch_that_does_not_fit_is_halved_until_it_does(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch, failure: Any
) -> None:
    sizes = []

    def draw(prompts: Any, seeds: Any, size_px: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise failure
        return [f"{prompts[0]} {seeds[0]}"]

    monkeypatch.setattr(renderer, "_render", draw)
    assert renderer.render(["a", "b", "c"], [1, 2, 3]) == ["a 1", "b 2", "c 3"]
    assert sizes == [CPU_LANES, 2, 1, 1, 1, 1]
    renderer.render(["d"], [4])
    assert sizes[6:] == [1] * CPU_LANES, "what did not fit is not tried again"


def test_other_errors_and_single_rows_are_not_halved(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_with(error: Any) -> None:
        def draw(prompts: Any, seeds: Any, size_px: Any) -> None:
            raise error

        monkeypatch.setattr(renderer, "_render", draw)

    fail_with(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        renderer.render(["a", "b"], [1, 2])
    fail_with(torch.OutOfMemoryError("no"))
    with pytest.raises(torch.OutOfMemoryError):
        renderer.render(["a"], [1])


def test_images_are_those_of_the_pipeline_itself(tiny_pipeline_dir: Path) -> None:
    pipeline: Any = load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)), "cpu")
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(CPU_LANES)]
    theirs = pipeline(
        prompt=list("abcd"), num_inference_steps=2, guidance_scale=2.0, width=64, height=64, generator=generators
    ).images
    ours = Renderer(pipeline, SAMPLING).render(list("abcd"), range(CPU_LANES))
    assert [image.tobytes() for image in ours] == [image.tobytes() for image in theirs]


def test_an_image_that_is_not_finite_is_an_error_and_no_black_image(
    tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = Renderer(load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)), "cpu"), SAMPLING)
    decode = renderer.pipeline.vae.decode
    monkeypatch.setattr(
        renderer.pipeline.vae, "decode", lambda *args, **kwargs: (decode(*args, **kwargs)[0] * torch.nan,)
    )
    with pytest.raises(RenderError, match=r"the decoded image is not finite; .* set it to bf16 or fp32"):
        renderer.render(["a"], [0])


def test_no_safety_checker_blackens_what_is_learnt_from(tiny_pipeline_dir: Path) -> None:
    pipeline: Any = load_pipeline(ModelConfig(name=str(tiny_pipeline_dir)), "cpu")
    before = Renderer(pipeline, SAMPLING).render(["a"], [0])[0].tobytes()

    def flag_all(images: Any, clip_input: Any) -> Any:
        return images * 0, [True] * len(images)

    pipeline.safety_checker, pipeline.feature_extractor = flag_all, lambda images, return_tensors: None
    assert Renderer(pipeline, SAMPLING).render(["a"], [0])[0].tobytes() == before
    assert any(before), "it is not black"


def test_an_autoencoder_that_was_upcast_when_memory_ran_out_gets_its_precision_back(
    tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = Renderer(load_pipeline(ModelConfig(name=str(tiny_pipeline_dir), dtype="bf16"), "cpu"), SAMPLING)
    rows = []

    def draw(prompts: Any, seeds: Any, size_px: Any) -> Any:
        rows.append((len(prompts), renderer.pipeline.vae.dtype))
        if len(rows) == 1:
            renderer.pipeline.vae.to(dtype=torch.float32)
            raise torch.OutOfMemoryError("while decoding")
        return np.zeros((len(prompts), 8, 8, 3))

    monkeypatch.setattr(renderer, "_draw", draw)
    renderer.render(list("abcd"), range(4))
    assert rows == [(4, torch.bfloat16), (2, torch.bfloat16), (2, torch.bfloat16)]
