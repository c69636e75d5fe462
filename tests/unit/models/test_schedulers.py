"""Samplers set by a recipe, checked against diffusers' classes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.training_utils import compute_snr

from selma_ray.errors import ConfigError
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.rendering import Renderer, load_pipeline
from selma_ray.models.schedulers import check_sampling, use_scheduler
from selma_ray.models.stable_diffusion import StableDiffusion

DIFFUSION: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def used(own: Any, name: str | None, config: dict[str, Any]) -> Any:
    pipeline = SimpleNamespace(scheduler=own)
    use_scheduler(pipeline, name, config)
    return pipeline.scheduler


@pytest.mark.parametrize(
    ("own", "name", "config"),
    [
        (DDIMScheduler(**DIFFUSION), "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        (
            DDIMScheduler(**DIFFUSION),
            "DPMSolverMultistepScheduler",
            {"final_sigmas_type": "sigma_min", "algorithm_type": "dpmsolver"},
        ),
        (
            DDIMScheduler(**DIFFUSION),
            "EulerDiscreteScheduler",
            {"timestep_spacing": "trailing", "use_beta_sigmas": True},
        ),
        (DDIMScheduler(**DIFFUSION), "UniPCMultistepScheduler", {"sigma_max": 14.6, "use_exponential_sigmas": True}),
        (DDIMScheduler(**DIFFUSION), None, {"timestep_spacing": "trailing", "set_alpha_to_one": True}),
        (
            DDIMScheduler(**DIFFUSION, prediction_type="v_prediction"),
            None,
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        ),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), None, {"shift": 1}),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None, {"base_shift": 0.25, "max_shift": 1.5}),
        (
            FlowMatchEulerDiscreteScheduler(shift=3.0),
            "FlowMatchEulerDiscreteScheduler",
            {"use_karras_sigmas": True, "shift_terminal": 0.02},
        ),
    ],
)
def test_settings_of_the_class_are_set_over_the_model_s(own: Any, name: str | None, config: dict[str, Any]) -> None:
    scheduler = used(own, name, config)
    assert type(scheduler).__name__ == (name or type(own).__name__)
    assert {key: scheduler.config[key] for key in config} == config
    kept = {"beta_end", "num_train_timesteps", "prediction_type"} & own.config.keys() & scheduler.config.keys()
    assert all(scheduler.config[key] == own.config[key] for key in kept - config.keys())


def test_karras_sigmas_are_those_of_the_class() -> None:
    ours = used(DDIMScheduler(**DIFFUSION), "DPMSolverMultistepScheduler", {"use_karras_sigmas": True})
    theirs = DPMSolverMultistepScheduler(**DIFFUSION, use_karras_sigmas=True)
    plain = DPMSolverMultistepScheduler(**DIFFUSION)
    for scheduler in (ours, theirs, plain):
        scheduler.set_timesteps(12)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert not torch.equal(ours.sigmas, plain.sigmas)


@pytest.mark.parametrize(
    ("own", "name", "config", "fault"),
    [
        (DDIMScheduler(), None, {"use_karras_sigma": True}, r"use_karras_sigma is no setting of DDIMScheduler; "),
        (DDIMScheduler(), "EulerDiscreteScheduler", {"use_karras_sigma": True}, "did you mean 'use_karras_sigmas'"),
        (PNDMScheduler(), None, {"use_karras_sigmas": True}, "no setting of PNDMScheduler"),
        (DDIMScheduler(), None, {"shift": 3}, "shift is no setting of DDIMScheduler"),
        (FlowMatchEulerDiscreteScheduler(), None, {"rescale_betas_zero_snr": True}, "no setting of FlowMatchEuler"),
        (DDIMScheduler(), None, {"timestep_spacing": "trail"}, "timestep_spacing must be one of .*'trailing'.*, got 'trail'"),
        (DDIMScheduler(), "DPMSolverMultistepScheduler", {"use_karras_sigmas": "yes"}, "must be true or false, got 'yes'"),
        (DDIMScheduler(), "DPMSolverMultistepScheduler", {"solver_order": True}, "solver_order must be a finite number, got True"),
        (FlowMatchEulerDiscreteScheduler(), None, {"shift": float("nan")}, "shift must be a finite number, got nan"),
        (FlowMatchEulerDiscreteScheduler(), None, {"shift": "3"}, "shift must be a finite number, got '3'"),
        (DDIMScheduler(), "DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "cannot be used by"),
        (DDIMScheduler(), "DPMSolverMultistepScheduler", {"algorithm_type": "none"}, "cannot be used by|must be one of"),
        (DDIMScheduler(), None, {"rescale_betas_zero_snr": True}, "zero terminal SNR needs a model of v_prediction"),
        (DDIMScheduler(), "EulerDiscreteScheduler", {"rescale_betas_zero_snr": True}, "zero terminal SNR needs a model of v_prediction"),
        (DDIMScheduler(), "NoScheduler", {"shift": 3}, "sampling.scheduler must be a diffusers scheduler that fits"),
        (DDIMScheduler(), None, {"_class_name": "x"}, "_class_name is no setting"),
    ],
)  # fmt: skip
def test_what_the_class_does_not_have_is_refused_in_one_line(
    own: Any, name: str | None, config: dict[str, Any], fault: str
) -> None:
    pipeline = SimpleNamespace(scheduler=own)
    with pytest.raises(ConfigError, match=fault) as caught:
        use_scheduler(pipeline, name, config)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("sampling.scheduler")
    assert pipeline.scheduler is own


def test_without_settings_a_pipeline_keeps_its_own_scheduler() -> None:
    own = EulerDiscreteScheduler()
    assert used(own, None, {}) is own
    assert used(own, "EulerDiscreteScheduler", {}) is own
    assert isinstance(used(own, "UniPCMultistepScheduler", {}), UniPCMultistepScheduler)


def test_images_are_drawn_with_the_settings(tiny_pipeline_dir: Path) -> None:
    model = ModelConfig(name=str(tiny_pipeline_dir))
    base = SamplingConfig(steps=3, width_px=64, height_px=64, scheduler="DPMSolverMultistepScheduler")
    karras = base.model_copy(update={"scheduler_config": {"use_karras_sigmas": True}})
    check_sampling(model, karras)
    images = [
        Renderer(load_pipeline(model, "cpu"), each).render(["a cat"], [0])[0].tobytes()
        for each in (base, karras, karras)
    ]
    assert images[0] != images[1] == images[2]
    with pytest.raises(ConfigError, match="no setting of DDIMScheduler"):
        check_sampling(model, SamplingConfig(scheduler_config={"use_karras_sigmas": True}))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("is_zero", [False, True])
@pytest.mark.parametrize("gamma", [1e-6, 5.0, 1e6])
def test_min_snr_weights_are_finite_at_every_timestep(prediction_type: Any, is_zero: bool, gamma: float) -> None:
    family = StableDiffusion.__new__(StableDiffusion)
    family.__dict__["schedule"] = DDPMScheduler(
        **DIFFUSION, prediction_type=prediction_type, rescale_betas_zero_snr=is_zero
    )
    timesteps_N = torch.arange(1000)
    weights_N = family._min_snr_weights(timesteps_N, gamma)
    snr_N = compute_snr(family.schedule, timesteps_N)
    assert bool(torch.isfinite(weights_N).all())
    assert (float(snr_N[-1]) == 0) is is_zero
    expected_N = snr_N.clamp(max=gamma) / (snr_N if prediction_type == "epsilon" else snr_N + 1)
    assert torch.allclose(weights_N[:-1], expected_N[:-1])
    assert float(weights_N[-1]) == pytest.approx(1.0 if prediction_type == "epsilon" else 0.0, abs=0.01) or gamma < 1
