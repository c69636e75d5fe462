import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from selma_ray.errors import TrainingError
from selma_ray.experts.config import CheckpointChoiceConfig
from selma_ray.experts.job import ExpertJob, finished_result
from selma_ray.experts.selection import is_fitted
from selma_ray.models.config import ModelConfig
from selma_ray.models.quantised import quantised_linears
from selma_ray.storage import RunFolder
from tests.unit.experts.fitting import BASE, adapter, assert_same_bits, encoded_job, fit
from tests.unit.models.tiny_flow_models import save_tiny_flux, save_tiny_sd3
from tests.unit.models.tiny_sdxl import save_tiny_sdxl

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def make_job(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = RunFolder(str(tmp_path_factory.mktemp("run")))
    model = ModelConfig(name=str(tiny_pipeline_dir))

    def make(name: str, **changes: Any) -> ExpertJob:
        return encoded_job(folder, model, name, BASE.model_copy(update=changes))

    return make


@pytest.fixture(scope="module")
def uninterrupted(make_job: Any) -> Any:
    job = make_job("counting")
    fit(job)
    return job, adapter(job)


def test_export_holds_what_a_reader_needs(uninterrupted: Any) -> None:
    job, weights = uninterrupted
    curve = job.folder.read_json(job.directory, "curve.json")
    result = finished_result(job)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert any(tensor.abs().sum() > 0 for name, tensor in weights.items() if "lora_B" in name)
    assert [row["step"] for row in curve] == [1, 2, 3, 4, 5, 6]
    assert result is not None
    assert (result.loss, result.steps, result.examples, result.precision) == (curve[-1]["loss"], 6, 7, "fp32")


def test_the_learning_rate_warms_up_and_falls_as_a_cosine(uninterrupted: Any) -> None:
    job, _ = uninterrupted
    rates = [row["learning_rate"] for row in job.folder.read_json(job.directory, "curve.json")]
    expected = [0.0, 0.5, 1.0, *(0.5 * (1 + np.cos(np.pi * done / 4)) for done in (1, 2, 3))]
    np.testing.assert_allclose(rates, 5e-3 * np.array(expected), rtol=1e-6)


def test_the_same_job_gives_the_same_bits(make_job: Any, uninterrupted: Any) -> None:
    job, weights = uninterrupted
    fit(job)
    assert_same_bits(adapter(job), weights)


def test_a_resumed_job_gives_the_bits_of_one_that_was_not_stopped(
    make_job: Any, uninterrupted: Any, tmp_path: Path
) -> None:
    job, weights = uninterrupted
    whole_curve = job.folder.read_json(job.directory, "curve.json")
    fit(job, stop_at=3, save_to=str(tmp_path))
    fit(job, start_from=str(tmp_path))
    assert_same_bits(adapter(job), weights)
    assert job.folder.read_json(job.directory, "curve.json") == whole_curve


def test_a_checkpoint_leaves_the_frozen_weights_out(make_job: Any, uninterrupted: Any, tmp_path: Path) -> None:
    job, _ = uninterrupted
    trainer = fit(job, stop_at=1, save_to=str(tmp_path))
    frozen_bytes = sum(
        4 * parameter.numel() for parameter in trainer._engine.module.parameters() if not parameter.requires_grad
    )
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < frozen_bytes


def test_experts_learn_different_things_from_different_names(make_job: Any, uninterrupted: Any) -> None:
    other = make_job("style")
    fit(other)
    name = next(name for name in adapter(other) if "lora_B" in name)
    assert not torch.equal(adapter(other)[name], uninterrupted[1][name])


@pytest.mark.parametrize(
    "change",
    [
        {"zero_stage": 0},
        {"zero_stage": 1},
        {"zero_stage": 3},
        {"micro_batch_size": 2},
        {"gradient_checkpointing": True},
    ],
)
def test_zero_stages_accumulation_and_recomputation_do_not_change_the_result(
    make_job: Any, uninterrupted: Any, change: Any
) -> None:
    job = make_job("counting", **change)
    fit(job)
    for name, tensor in adapter(job).items():
        torch.testing.assert_close(tensor, uninterrupted[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("change", [{"min_snr_gamma": 1.0}, {"caption_dropout": 0.5}])
def test_weighting_and_dropout_change_the_result(make_job: Any, uninterrupted: Any, change: Any) -> None:
    job = make_job("counting", **change)
    fit(job)
    assert any(
        not torch.allclose(tensor, uninterrupted[1][name], rtol=1e-3, atol=1e-5)
        for name, tensor in adapter(job).items()
    )


def test_candidates_are_left_to_choose_from_and_no_expert_yet(make_job: Any) -> None:
    from selma_ray.experts.trainer import ExpertTrainer

    job = make_job("chosen", steps=4, selection=CheckpointChoiceConfig(every_steps=2))
    trainer = ExpertTrainer(job)
    while trainer.steps_done < job.config.steps:
        trainer.step()
        if trainer.steps_done in job.candidate_steps:
            trainer.export_candidate()
    trainer.export(seconds=1.0)
    assert is_fitted(job)
    assert finished_result(job) is None
    early, late = (
        load_file(job.folder.local_path(job.candidate(step), "adapter_model.safetensors")) for step in (2, 4)
    )
    assert early.keys() == late.keys()
    assert any(not torch.equal(early[name], late[name]) for name in early)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_keeps_its_weights_in_fp32(make_job: Any, zero_stage: int) -> None:
    job = make_job("counting", precision="bf16", zero_stage=zero_stage)
    fit(job)
    weights = adapter(job)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights.values())


def test_a_loss_that_is_not_finite_stops_with_the_remedy(make_job: Any) -> None:
    with pytest.raises(
        TrainingError, match=r"loss of expert counting must be finite, got nan .* lower experts.learning_rate"
    ):
        fit(make_job("counting", learning_rate=1e30, warmup_steps=0))


def test_the_adapter_folder_is_peft_s(uninterrupted: Any) -> None:
    job, weights = uninterrupted
    config = json.loads(job.folder.read_bytes(job.directory, "adapter_config.json"))
    assert config["peft_type"] == "LORA"
    assert all(
        name.startswith("base_model.model.") and name.endswith((".lora_A.weight", ".lora_B.weight")) for name in weights
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("save", [save_tiny_sdxl, save_tiny_sd3, save_tiny_flux], ids=["sdxl", "sd3", "flux"])
def test_every_family_is_fitted_with_dropout_and_recomputation(
    save: Any, precision: str, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    save(tmp_path / "model", tiny_pipeline_dir)
    config = BASE.model_copy(
        update={"steps": 3, "precision": precision, "gradient_checkpointing": True, "caption_dropout": 0.5}
    )
    job = encoded_job(RunFolder(str(tmp_path / "run")), ModelConfig(name=str(tmp_path / "model")), "counting", config)
    fit(job)
    assert any(tensor.abs().sum() > 0 for name, tensor in adapter(job).items() if "lora_B" in name)
    assert all(torch.isfinite(tensor).all() for tensor in adapter(job).values())


@pytest.mark.parametrize(("weights", "share"), [("int8", 0.5), ("nf4", 0.25)])
def test_an_expert_is_fitted_on_a_base_of_fewer_bits(
    make_job: Any, uninterrupted: Any, weights: str, share: float, tmp_path: Path
) -> None:
    job = make_job("counting", base_weights=weights, precision="bf16")
    trainer = fit(job, stop_at=3, save_to=str(tmp_path))
    found = quantised_linears(trainer._engine.module)
    layers = [layer for name, layer in found.items() if "lora_" not in name]
    kept_bytes = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    assert kept_bytes == share * 2 * sum(layer.in_features * layer.out_features for layer in layers)
    fit(job, start_from=str(tmp_path))
    result = finished_result(job)
    assert result is not None
    assert result.steps == 6
    exact = uninterrupted[0].folder.read_json(uninterrupted[0].directory, "curve.json")
    assert result.loss == pytest.approx(exact[-1]["loss"], rel=0.2)
    assert adapter(job).keys() == uninterrupted[1].keys()
