"""RegMean against its definition on dense weights in float64, and the one pass that records what it needs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from selma_ray.adapters.peft_format import open_adapter
from selma_ray.config import validate
from selma_ray.errors import AdapterError, ConfigError
from selma_ray.experts.examples import EncodedExamples, example_generators
from selma_ray.merging.config import MergingConfig
from selma_ray.merging.methods import average_deltas
from selma_ray.merging.regmean import InputStatistics, recorded_grams, regmean, write_grams
from selma_ray.merging.run import merge_experts
from selma_ray.models.config import ModelConfig
from selma_ray.models.family import open_family
from selma_ray.records import seed_of
from selma_ray.run.input_statistics import InputPass, record_inputs
from selma_ray.storage import RunFolder
from tests.unit.adapters.adapters_on_disk import save_random_adapter
from tests.unit.adapters.random_factors import I, O, assert_close, dense, random_factors, several
from tests.unit.experts.fitting import BASE, encoded_job

SKILLS = ["counting", "style"]


def inputs_of(experts: Any, rows: int = 40, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    mixed = [torch.randn(I, I, generator=draw).double() for _ in experts]
    return [torch.randn(rows, I, generator=draw).double() @ each for each in mixed]


@settings(deadline=None, max_examples=40)
@given(several, st.integers(0, 100))
def test_outputs_are_nearest_to_each_expert_s_on_its_inputs(experts: Any, seed: int) -> None:
    """The definition itself: least squares over all experts' inputs, of whole weights."""
    weights = [1.0 + index for index in range(len(experts))]
    inputs = inputs_of(experts, seed=seed)
    base = torch.randn(O, I, generator=torch.Generator().manual_seed(seed)).double()
    rows = torch.cat([weight**0.5 * each for weight, each in zip(weights, inputs, strict=True)])
    wanted = torch.cat(
        [
            weight**0.5 * each @ (base + dense(expert)).T
            for weight, each, expert in zip(weights, inputs, experts, strict=True)
        ]
    )
    solution = torch.linalg.lstsq(rows, wanted).solution.T
    merged = regmean(experts, weights, [each.T @ each for each in inputs], off_diagonal=1.0)
    assert_close(merged.delta(), solution - base, 1e-4)


@settings(deadline=None, max_examples=40)
@given(several, st.floats(0, 1))
def test_entries_off_the_diagonal_count_less(experts: Any, off_diagonal: float) -> None:
    grams = [each.T @ each for each in inputs_of(experts)]
    shrunk = [off_diagonal * gram + (1 - off_diagonal) * gram.diagonal().diag() for gram in grams]
    expected = sum(dense(each) @ gram for each, gram in zip(experts, shrunk, strict=True)) @ torch.linalg.inv(
        sum(shrunk)
    )
    merged = regmean(experts, [0.5] * len(experts), grams, off_diagonal, scale=2.0)
    assert_close(merged.delta(), 2.0 * expected, 1e-4)
    assert merged.rank == sum(each.rank for each in experts)


def test_experts_that_see_the_same_inputs_are_averaged() -> None:
    experts = [random_factors(seed, 2, 1.5) for seed in range(3)]
    gram = (each := inputs_of(experts)[0]).T @ each
    merged = regmean(experts, [1 / 3] * 3, [gram] * 3, 0.9)
    assert_close(merged.delta(), average_deltas(experts, [1 / 3] * 3).delta(), 1e-5)


def test_an_input_that_nobody_sees_has_no_say() -> None:
    experts = [random_factors(seed, 2, 1.0) for seed in range(2)]
    inputs = inputs_of(experts)
    for each in inputs:
        each[:, 4] = 0
    merged = regmean(experts, [0.5, 0.5], [each.T @ each for each in inputs], 1.0).delta()
    assert torch.isfinite(merged).all()
    assert merged[:, 4].abs().max() < 1e-3


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (torch.nn.Linear(5, 3, bias=False), (2, 7, 5)),
        (torch.nn.Conv2d(4, 3, 3, padding=1, stride=2, bias=False), (2, 4, 8, 6)),
        (torch.nn.Conv2d(4, 3, 1, bias=False), (2, 4, 5, 5)),
    ],
)
def test_a_gram_matrix_gives_the_energy_of_outputs(module: Any, shape: Any) -> None:
    """|X W^T|^2 = tr(W G W^T) for any W, which holds for the one matrix alone."""
    model = torch.nn.Sequential(module)
    parts = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    with recorded_grams(model, ["0"]) as grams, torch.no_grad():
        energy = sum(model(part).square().sum() for part in parts)
    weight_OI = module.weight.detach().flatten(1)
    torch.testing.assert_close((weight_OI @ grams["0"] * weight_OI).sum(), energy, rtol=1e-5, atol=1e-4)
    assert not module._forward_pre_hooks


@pytest.fixture
def run(tiny_pipeline_dir: Path, tmp_path: Path) -> Any:
    """Return a run's folder with cached examples and two experts, and the pass of each."""
    folder, model = RunFolder(str(tmp_path / "run")), ModelConfig(name=str(tiny_pipeline_dir))
    passes = []
    for seed, skill in enumerate(SKILLS):
        save_random_adapter(tiny_pipeline_dir, tmp_path / "run" / "experts" / skill, seed)
        job = encoded_job(folder, model, skill, BASE, skill=skill)
        passes.append(InputPass(folder, skill, job.caches[0], job.cache_keys[0], model, 5, 2, "fp32", 0, 1, 0))
    return folder, model, passes


def test_one_pass_over_cached_examples_records_what_the_expert_sees(run: Any, tmp_path: Path) -> None:
    folder, _, passes = run
    for each in passes:
        assert not each.is_done()
        record_inputs(each)
        assert each.is_done()
    first = passes[0]
    found = load_file(folder.local_path(first.directory, "inputs.safetensors"))
    pipeline_inputs = by_peft(first)
    assert found.keys() == pipeline_inputs.keys()
    for name, gram in found.items():
        torch.testing.assert_close(gram, pipeline_inputs[name], rtol=1e-3, atol=1e-2, msg=name)
    (tmp_path / "run/experts/counting/adapter_model.safetensors").write_bytes(
        (tmp_path / "run/experts/style/adapter_model.safetensors").read_bytes()
    )
    assert not first.is_done(), "the expert is another one"


def by_peft(each: InputPass) -> dict[str, torch.Tensor]:
    """Record the same inputs at PEFT's own layers."""
    from peft import PeftModel

    family = open_family(each.model)
    examples = EncodedExamples(each.folder, [each.cache])
    adapted: Any = PeftModel.from_pretrained(family.load_denoiser(), each.folder.path(each.directory))
    seed = seed_of(each.seed, expert=each.skill, inputs=True)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A")
    }
    grams: dict[str, torch.Tensor] = {}
    for name, module in layers.items():

        def hook(_: Any, inputs: Any, name: str = name) -> None:
            rows = inputs[0].flatten(0, -2)
            grams[name] = grams.get(name, 0) + rows.T @ rows

        module.register_forward_pre_hook(hook)
    with torch.no_grad():
        for step in range(3):
            batch = examples.batch(examples.positions(2, step, seed))
            family.errors(adapted, batch, example_generators(step, range(2), seed))
    return grams


def test_a_run_is_merged_by_its_inputs(run: Any, tmp_path: Path) -> None:
    folder, model, passes = run
    for each in passes:
        record_inputs(each)
    config = MergingConfig(method="regmean", exports=())
    with pytest.raises(AdapterError, match="regmean needs a run's own experts and their examples"):
        merge_experts(folder, SKILLS, model, config)
    paths = {each.skill: folder.path(each.directory, "inputs.safetensors") for each in passes}
    merge_experts(folder, SKILLS, model, config, inputs=InputStatistics(paths, 0.9))
    merge_experts(folder, SKILLS, model, MergingConfig(name="plain", exports=()))
    assert open_adapter(tmp_path / "run/merged/merged/adapter").rank == 8
    weights = [
        load_file(tmp_path / "run/merged" / name / "pipeline/unet/diffusion_pytorch_model.safetensors")
        for name in ("merged", "plain")
    ]
    assert any(not torch.allclose(weights[0][key], weights[1][key], atol=1e-4) for key in weights[0])
    write_grams(tmp_path / "few.safetensors", {"other": torch.eye(2)})
    few = InputStatistics({**paths, "style": str(tmp_path / "few.safetensors")}, 0.9)
    with pytest.raises(AdapterError, match=r"needs the inputs of .* of expert style, which were not recorded"):
        merge_experts(folder, SKILLS, model, config.model_copy(update={"name": "again"}), inputs=few)


def test_adapters_of_others_have_no_examples() -> None:
    with pytest.raises(ConfigError, match="experts must be left out with method regmean, which needs the examples"):
        validate(MergingConfig, {"method": "regmean", "experts": {"a": "b"}}, "recipe.yaml")
