import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file, save_file

from selma_ray.adapters.peft_format import LoraFactors, open_adapter, write_adapter
from selma_ray.errors import AdapterError

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q"], "base_model_name_or_path": "base"}
PREFIX = "base_model.model."


def write(folder: Any, config: Any = None, tensors: Any = None) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | (config or {})))
    if tensors is None:
        tensors = {f"{PREFIX}a.to_q.lora_A.weight": torch.ones(2, 5), f"{PREFIX}a.to_q.lora_B.weight": torch.ones(3, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_reads_factors_and_scale(tmp_path: Path) -> None:
    (factors,) = open_adapter(write(tmp_path / "plain"))
    assert (factors.module, factors.scale) == ("a.to_q", 2.0)
    (factors,) = open_adapter(write(tmp_path / "rslora", {"use_rslora": True}))
    assert factors.scale == pytest.approx(4 / 2**0.5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora must be False"),
        ({"bias": "all"}, "bias must be 'none'"),
        ({"lora_bias": True}, "lora_bias must be False"),
        ({"rank_pattern": ["to_q"]}, "rank_pattern must be a mapping"),
        ({"rank_pattern": {"to_q": 0}}, "rank_pattern of to_q must be a positive number, got 0"),
        ({"alpha_pattern": {"to_q": float("inf")}}, "alpha_pattern of to_q must be a positive number, got inf"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a positive number, got nan"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save must be"),
        ({"peft_type": "LOHA"}, "peft_type must be 'LORA'"),
        ({"init_lora_weights": "pissa_niter_16"}, "changes the base model"),
        ({"r": 0}, "r must be a positive number"),
    ],
)
def test_settings_that_change_the_delta_are_refused(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        open_adapter(write(tmp_path, config))
    assert "adapter_config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{PREFIX}a.to_q.lora_A.weight": torch.ones(2, 5)}, "lora_B.weight is missing"),
        (
            {f"{PREFIX}a.to_q.lora_A.weight": torch.ones(3, 5), f"{PREFIX}a.to_q.lora_B.weight": torch.ones(3, 3)},
            "r=2 says",
        ),
        (
            {
                f"{PREFIX}a.to_q.lora_A.weight": torch.ones(2, 5, 1, 1),
                f"{PREFIX}a.to_q.lora_B.weight": torch.ones(3, 2),
            },
            "linear",
        ),
        ({f"{PREFIX}a.to_q.lora_magnitude_vector": torch.ones(2)}, "lora_magnitude_vector is no weight"),
        ({}, "holds no tensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, tensors: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        open_adapter(write(tmp_path, tensors=tensors))


def test_weights_that_are_not_finite_are_refused_when_read(tmp_path: Path) -> None:
    tensors = load_file(write(tmp_path) / "adapter_model.safetensors")
    tensors[f"{PREFIX}a.to_q.lora_A.weight"][0, 0] = torch.nan
    adapter = open_adapter(write(tmp_path, tensors=tensors))
    with pytest.raises(AdapterError, match=r"lora_A.weight must be finite"):
        list(adapter)


def test_truncated_and_missing_and_pickled_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "cut") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(AdapterError, match="truncated"):
        open_adapter(path.parent)
    path.unlink()
    with pytest.raises(AdapterError, match="does not exist"):
        open_adapter(path.parent)
    (path.parent / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(AdapterError, match="pickle, which is never opened"):
        open_adapter(path.parent)
    (path.parent / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="must be JSON"):
        open_adapter(path.parent)


def test_a_written_adapter_is_read_back_by_peft_and_by_us(tmp_path: Path) -> None:
    factors = LoraFactors("a.to_q", torch.randn(3, 5), torch.randn(4, 3), scale=0.5)
    write_adapter(tmp_path, [factors], {"a.to_q": (4, 5)}, rank=3, base_model="base")
    read = open_adapter(tmp_path)
    assert (read.base_model, read.rank, read.scales) == ("base", 3, {"a.to_q": 1.0})
    torch.testing.assert_close(read.factors("a.to_q").delta(), factors.delta())
    by_peft = load_peft_weights(str(tmp_path))
    torch.testing.assert_close(by_peft[f"{PREFIX}a.to_q.lora_B.weight"], 0.5 * factors.B_OR)
