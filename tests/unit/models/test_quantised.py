"""Layers that are quantised take the weights they are made from as they are: no second copy of a large model."""

from typing import Any

import pytest
import torch

from selma_ray.models.quantised import quantise


@pytest.mark.parametrize(("weights", "most_error"), [("int8", 0.03), ("nf4", 0.2)])
@pytest.mark.parametrize("bias", [True, False])
def test_weights_are_not_copied_before_they_are_moved(weights: Any, most_error: float, bias: bool) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 64, bias=bias).bfloat16()
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([linear])
    quantise(model, weights, torch.bfloat16)
    layer = model.blocks[0]
    assert layer is not linear
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.data_ptr() == linear.weight.data_ptr()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    inputs = torch.randn(4, 128).bfloat16()
    exact = linear(inputs)
    model.to("cpu")
    assert layer.weight.element_size() == 1
    assert (layer(inputs) - exact).abs().max() <= most_error * exact.abs().max()
