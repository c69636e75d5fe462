"""Optimisers by name, the moving average, the loss by noise level and aspect-ratio buckets, as the trainer takes them."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.optimization import get_scheduler

from selma_ray.adapters.training import add_adapter, trainable_parameters
from selma_ray.experts.config import CheckpointChoiceConfig, ExpertsConfig
from selma_ray.experts.examples import EncodedExamples, example_generators
from selma_ray.experts.figures import NOISE_LEVELS, by_noise_level
from selma_ray.experts.job import ExpertJob
from selma_ray.experts.optimizers import open_optimizer
from selma_ray.models.config import ModelConfig
from selma_ray.models.cost import TrainingCost
from selma_ray.models.family import open_family
from selma_ray.records import seed_of
from selma_ray.run.training_memory import training_memory_parts
from selma_ray.storage import RunFolder
from tests.unit.experts.fitting import BASE, adapter, assert_same_bits, encoded_job, fit
from tests.unit.experts.rendered_images import write_images

pytestmark = pytest.mark.usefixtures("process_group")

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adafactor": {"optimizer": "adafactor", "zero_stage": 0, "learning_rate": 1e-2},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "prodigy-zero-0": {"optimizer": "prodigy", "learning_rate": 1.0, "zero_stage": 0},
}


@pytest.fixture(scope="module")
def make_job(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = RunFolder(str(tmp_path_factory.mktemp("run")))
    write_images(folder, "counting", 5)
    write_images(folder, "counting", 4, shard=1, size_px=(48, 80))
    model = ModelConfig(name=str(tiny_pipeline_dir))

    def make(**changes: Any) -> ExpertJob:
        return encoded_job(folder, model, "counting", BASE.model_copy(update=changes))

    return make


def fitted_plainly(job: ExpertJob) -> dict[str, torch.Tensor]:
    """Fit an adapter as a training script does: PyTorch's loop, and no DeepSpeed."""
    config, seed = job.config, seed_of(job.seed, expert=job.name)
    family, examples = open_family(job.model), EncodedExamples(job.folder, job.caches)
    model = add_adapter(family.load_denoiser(), config.lora, job.model.name, job.seed, family.located.revision)
    model.train()
    parameters = trainable_parameters(model)
    optimizer = open_optimizer(list(parameters.values()), config)
    schedule = get_scheduler(
        config.schedule, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.steps
    )
    for step in range(config.steps):
        batch = examples.batch(examples.positions(config.batch_size, step, seed))
        generators = example_generators(step, range(config.batch_size), seed)
        family.errors(model, batch, generators).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.gradient_clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_moves_the_weights_as_in_a_plain_loop(make_job: Any, name: str) -> None:
    if name.startswith("prodigy"):
        pytest.importorskip("prodigyopt")
    job = make_job(**OPTIMIZERS[name])
    trainer = fit(job)
    expected = fitted_plainly(job)
    found = trainer._trained_weights()
    assert found.keys() == expected.keys()
    for weight, tensor in found.items():
        torch.testing.assert_close(tensor, expected[weight], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw"])
def test_an_optimiser_s_state_is_in_the_checkpoint(make_job: Any, name: str, tmp_path: Path) -> None:
    if name.startswith("prodigy"):
        pytest.importorskip("prodigyopt")
    job = make_job(**OPTIMIZERS[name])
    fit(job)
    whole = adapter(job)
    fit(job, stop_at=3, save_to=str(tmp_path))
    fit(job, start_from=str(tmp_path))
    assert_same_bits(adapter(job), whole)


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}], ids=["fp32", "bf16"])
def test_the_average_of_the_weights_is_kept_and_resumed(make_job: Any, changes: Any, tmp_path: Path) -> None:
    from selma_ray.experts.trainer import ExpertTrainer

    job = make_job(ema=0.4, **changes)
    expected: dict[str, torch.Tensor] = {}
    trainer = ExpertTrainer(job)
    for step in range(1, job.config.steps + 1):
        trainer.step()
        decay = 0.0 if step == 1 else min(0.4, step / (9 + step))
        for name, weight in trainer._trained_weights().items():
            before = expected.get(name, weight.double())
            expected[name] = decay * before + (1 - decay) * weight.double()
    trainer.export(seconds=1.0)
    whole = adapter(job)
    for name, average in trainer._kept_weights().items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-7)
    assert any(
        not torch.equal(trainer._trained_weights()[name].cpu(), each) for name, each in trainer._kept_weights().items()
    )
    fit(job, stop_at=3, save_to=str(tmp_path))
    fit(job, start_from=str(tmp_path))
    assert_same_bits(adapter(job), whole)


def test_the_loss_by_noise_level_makes_up_the_loss() -> None:
    errors_N, levels_N = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.1, 0.2, 0.3, 1.0])
    figures = by_noise_level(errors_N, levels_N)
    counts = [float(figures[f"count/{name}"]) for name in NOISE_LEVELS]
    assert counts == [0.5, 0.25, 0.0, 0.25]
    assert sum(float(figures[f"sum/{name}"]) for name in NOISE_LEVELS) == errors_N.mean()
    assert float(figures["sum/noise_0_25"] / figures["count/noise_0_25"]) == 1.5


def test_the_curve_has_the_loss_by_noise_level_however_a_batch_is_split(make_job: Any) -> None:
    curves = [fit(make_job(steps=3, **changes)).curve for changes in ({}, {"micro_batch_size": 1})]
    names = {f"loss_{name}" for name in NOISE_LEVELS}
    for whole, split in zip(*(curve.rows() for curve in curves), strict=True):
        assert whole.keys() == split.keys()
        assert whole.keys() & names, "a batch has examples of some level"
        np.testing.assert_allclose(list(whole.values()), list(split.values()), rtol=1e-3)
    assert curves[0].latest().keys() == curves[0].rows()[-1].keys() - {"step"}


def test_a_batch_is_of_one_bucket_and_all_buckets_are_learnt_from(make_job: Any) -> None:
    job = make_job()
    examples = EncodedExamples(job.folder, job.caches)
    batches = [examples.batch(examples.positions(4, step, seed=0)) for step in range(9)]
    assert {tuple(batch["latent_mean"].shape) for batch in batches} == {(4, 4, 16, 16), (4, 4, 20, 12)}


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            {"optimizer": "adamw8bit"},
            "optimizer adamw8bit needs gpus_per_worker above 0; take adamw or adafactor on the CPU",
        ),
        ({"optimizer": "adafactor"}, "optimizer adafactor needs zero_stage 0, .* got 2"),
        ({"optimizer": "prodigy"}, "must be at least 0.01, got 0.0003; set 1"),
        ({"optimizer": "prodigy", "learning_rate": 1, "workers_per_expert": 2}, "prodigy needs workers_per_expert 1"),
        ({"optimizer": "sgd"}, "adamw"),
        ({"ema": 1.0}, "less than 1"),
        ({"early_stop": 2}, "early_stop needs selection"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(settings: Any, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        ExpertsConfig(**settings)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "prodigy"])
def test_the_plan_counts_an_optimiser_s_state(name: str) -> None:
    if name == "prodigy":
        pytest.importorskip("prodigyopt")
    weight = torch.nn.Parameter(torch.rand(64, 256))
    optimizer = open_optimizer([weight], ExpertsConfig(**OPTIMIZERS[name]))
    weight.sum().backward()
    optimizer.step()
    held = sum(
        each.nbytes for each in optimizer.state[weight].values() if isinstance(each, torch.Tensor) and each.dim()
    )
    cost = TrainingCost(*[0] * len(fields(TrainingCost)))
    parts = training_memory_parts(
        replace(cost, lora_parameters=weight.numel()),
        ExpertsConfig(**{**OPTIMIZERS[name], "zero_stage": 0, "precision": "fp32"}),
    )
    gradients = 4 * weight.numel()
    assert held == pytest.approx(parts["gradients and optimiser"] - gradients, abs=0.1 * 4 * weight.numel())


def test_options_decide_the_adapter(make_job: Any) -> None:
    selection = CheckpointChoiceConfig(every_steps=2)
    options: list[dict[str, Any]] = [{}, {"ema": 0.9}, {"ema": 0.99}, {"optimizer": "adafactor"}, {"selection": selection},
               {"selection": selection, "early_stop": 1}]  # fmt: skip
    assert len({make_job(**each).key for each in options}) == len(options)
