"""selma merge-adapters: LoRAs of a file and a folder become one, without a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from selma_ray.adapters.peft_format import open_adapter
from selma_ray.cli.commands import main
from tests.unit.adapters.adapters_on_disk import save_random_adapter


@pytest.fixture(scope="module")
def adapters(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [save_random_adapter(tiny_pipeline_dir, root / name, seed, rank=2 + seed) for seed, name in enumerate("ab")]


def test_adapters_become_one_by_their_weights(
    adapters: list[Path], tiny_pipeline_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    one, other = adapters
    out = tmp_path / "merged"
    command = ["merge-adapters", f"{one}@3", f"style={other}", "--base", str(tiny_pipeline_dir), "--out", str(out)]
    assert main([*command, "--method", "sum_deltas"]) == 0
    assert "2 adapters became" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["weights"] == {"a": 3.0, "style": 1.0}
    assert {path.name for path in out.iterdir()} == {
        "adapter", "report.json", "pytorch_lora_weights.safetensors", "kohya.safetensors"
    }  # fmt: skip
    merged, first, second = map(open_adapter, (out / "adapter", one, other))
    for factors in merged:
        expected = 3 * first.factors(factors.module).delta() + second.factors(factors.module).delta()
        torch.testing.assert_close(factors.delta(), expected, rtol=1e-4, atol=1e-6)
    assert main([*command, "--method", "sum_deltas", "--pipeline"]) == 0
    assert (out / "pipeline" / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--method", "mean"], "merge-adapters: method"),
        (["--method", "search"], "--method must not be search"),
        (["a=elsewhere"], "adapters must have different names, a is given twice"),
        (["b=nowhere"], "nowhere does not exist; name a LoRA file, an adapter's folder or a run's"),
        (["--scale", "inf"], "scale"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    changes: list[str], message: str, adapters: list[Path], tiny_pipeline_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "merged"
    arguments = ["merge-adapters", f"a={adapters[0]}", *changes, "--base", str(tiny_pipeline_dir), "--out", str(out)]
    assert main(arguments) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_folder_with_something_else_is_left_alone(
    adapters: list[Path], tiny_pipeline_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    arguments = ["merge-adapters", str(adapters[0]), "--base", str(tiny_pipeline_dir), "--out", str(tmp_path)]
    assert main(arguments) == 1
    assert "must be a folder that is empty or holds a merge" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"
