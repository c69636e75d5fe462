import subprocess
import sys
from typing import Any

import pytest

from selma_ray.config import validate
from selma_ray.errors import ConfigError
from selma_ray.experts.config import GRADIENTS_AT_ONCE, ExpertsConfig
from selma_ray.experts.precision import deepspeed_config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 6, "workers_per_expert": 4}, "batch_size must divide by workers_per_expert, got 6 and 4"),
        ({"batch_size": 8, "micro_batch_size": 3}, r"must divide a worker's share of the batch \(8\), got 3"),
        ({"precision": "fp16"}, "precision fp16 needs gpus_per_worker above 0; take auto, bf16 or fp32"),
        ({"precison": "fp32"}, "precison is not a known key; did you mean 'precision'?"),
        ({"zero_stage": 4}, "zero_stage"),
        ({"lora": {"rank": 0}}, "lora.rank"),
    ],
)
def test_a_bad_setting_is_refused_in_one_line(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        validate(ExpertsConfig, settings, "recipe.yaml")
    assert "\n" not in str(error.value)


def test_deepspeed_learns_how_the_batch_is_split() -> None:
    config = deepspeed_config(ExpertsConfig(batch_size=16, workers_per_expert=2, micro_batch_size=4), "bf16", 1000)
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (16, 4)
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (True, False)


@pytest.mark.parametrize(("trainable", "held"), [(1000, 1000), (185_794_560, GRADIENTS_AT_ONCE)])
def test_the_buffer_of_gradients_is_no_larger_than_the_adapter(trainable: int, held: int) -> None:
    assert deepspeed_config(ExpertsConfig(), "bf16", trainable)["zero_optimization"]["reduce_bucket_size"] == held


def test_launching_loads_no_deep_learning_library() -> None:
    code = "import sys, selma_ray.experts.launch; print([m for m in ('torch', 'diffusers', 'deepspeed', 'peft') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
