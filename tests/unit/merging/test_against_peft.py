"""Our merges against PEFT's own `add_weighted_adapter`, on adapters of mixed ranks, scales and rsLoRA."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from selma_ray.adapters.peft_format import open_adapter
from selma_ray.merging.interference import ties
from selma_ray.merging.methods import average_deltas, average_factors, sum_deltas, svd
from tests.unit.adapters.random_factors import assert_close, exact_sum

WEIGHTS = [0.5, 0.3, 0.2]
SETTINGS = [{"r": 4, "lora_alpha": 4}, {"r": 2, "lora_alpha": 8}, {"r": 3, "lora_alpha": 6, "use_rslora": True}]
NAMES = ["one", "two", "three"]
ROWS, COLUMNS = 24, 16


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q = torch.nn.Linear(COLUMNS, ROWS, bias=False)

    def forward(self, hidden_NI: torch.Tensor) -> torch.Tensor:
        return self.to_q(hidden_NI)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(zip(NAMES, SETTINGS, strict=True)):
        model = get_peft_model(Attention(), LoraConfig(target_modules=["to_q"], **settings))
        torch.manual_seed(10 + seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(root / name)
    return [root / name for name in NAMES]


@pytest.fixture
def model(folders: list[Path]) -> PeftModel:
    model = PeftModel.from_pretrained(Attention(), folders[0], adapter_name=NAMES[0])
    for name, folder in zip(NAMES[1:], folders[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    return model


@pytest.fixture
def experts(folders: list[Path]) -> Any:
    return [open_adapter(folder).factors("to_q") for folder in folders]


def merged_by_peft(model: PeftModel, kind: str, names: Any = NAMES, weights: Any = WEIGHTS, **options: Any) -> Any:
    """Return PEFT's merged factors and its dense delta."""
    model.add_weighted_adapter(names, weights, "merged", combination_type=kind, **options)
    layer = model.base_model.model.to_q
    return layer.lora_A["merged"].weight.data, layer.lora_B["merged"].weight.data, layer.get_delta_weight("merged").data


def test_scales_of_single_adapters_are_pefts(model: PeftModel, experts: Any) -> None:
    for name, expert in zip(NAMES, experts, strict=True):
        assert_close(expert.delta(), model.base_model.model.to_q.get_delta_weight(name).data, 1e-6)


def test_sum_deltas_is_pefts_forward_with_all_adapters_and_its_cat(model: PeftModel, experts: Any) -> None:
    merged = sum_deltas(experts, WEIGHTS)
    hidden_NI = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(1))
    A_RI, B_OR, delta_OI = merged_by_peft(model, "cat")
    assert merged.rank == A_RI.shape[0] == B_OR.shape[1] == 9
    assert_close(merged.delta(), delta_OI, 1e-6)
    layer = model.base_model.model.to_q
    for name, weight in zip(NAMES, WEIGHTS, strict=True):
        layer.set_scale(name, weight)
    model.base_model.set_adapter(NAMES)
    with torch.no_grad():
        together_NO = model(hidden_NI)
        base_NO = Attention()(hidden_NI)
    torch.testing.assert_close(base_NO + hidden_NI @ merged.delta().T, together_NO, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_svd_is_pefts_up_to_the_signs_of_singular_vectors(model: PeftModel, experts: Any, rank: int) -> None:
    merged = svd(experts, WEIGHTS, rank, scale=sum(WEIGHTS))  # PEFT does not divide by the weights' sum
    A_RI, B_OR, delta_OI = merged_by_peft(model, "svd", svd_rank=rank)
    assert_close(merged.delta(), delta_OI)
    for vector in range(rank):
        # PEFT holds the singular value in B, we in A: the product of a pair of vectors has neither question nor sign.
        ours = merged.B_OR[:, vector : vector + 1] @ merged.A_RI[vector : vector + 1]
        assert_close(ours, B_OR[:, vector : vector + 1] @ A_RI[vector : vector + 1], 1e-4)


def test_pefts_linear_has_cross_terms_that_no_sum_of_deltas_has(folders: list[Path]) -> None:
    """PEFT's `linear` is (sum sqrt(w_i s_i) B_i)(sum sqrt(w_i s_i) A_i): K^2 products where the sum of deltas has K."""
    adapters = [open_adapter(folders[0]).factors("to_q")] * 2
    model = PeftModel.from_pretrained(Attention(), folders[0], adapter_name="one")
    model.load_adapter(folders[0], adapter_name="two")
    *_, delta_OI = merged_by_peft(model, "linear", ["one", "two"], [0.5, 0.5])
    assert_close(
        delta_OI, 2 * average_deltas(adapters, [0.5, 0.5]).delta(), 1e-5
    )  # twice the adapter it was given twice
    assert_close(average_factors(adapters, [0.5, 0.5]).delta(), adapters[0].delta(), 1e-6)


def test_ties_is_pefts_ties_svd_of_full_rank(model: PeftModel, experts: Any) -> None:
    with torch.no_grad():
        *_, delta_OI = merged_by_peft(model, "ties_svd", weights=[1.0] * 3, density=0.4, svd_rank=COLUMNS)
    assert_close(ties(experts, [1.0] * 3, 0.4).delta(), delta_OI, 1e-5)


def test_sum_deltas_is_within_1e_5_of_float64(experts: Any) -> None:
    assert_close(sum_deltas(experts, WEIGHTS).delta(), exact_sum(experts, WEIGHTS), 1e-6)
