"""The kit as a bare machine runs it: every part, with Ray and vLLM out of reach of it and of what it starts."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu_parts.wheels import use_wheels

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = {"sdxl", "sd3", "flux"}


@pytest.mark.timeout(1800)  # minutes where nothing else runs
def test_every_part_runs_without_ray(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules.update(ray=None, vllm=None)\n")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(tmp_path / "out")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    ratios = json.loads(finished.stdout.splitlines()[-1])
    for key in ("render_over_diffusers", "train_over_diffusers", "serve_over_diffusers", "peak_over_plan"):
        assert set(ratios[key]) == FAMILIES
        assert all(ratio > 0 for ratio in ratios[key].values()), (key, ratios)
    assert ratios["tiny"] is True
    assert {"name", "torch", "diffusers"} <= ratios["machine"].keys()
    (written,) = (tmp_path / "out").glob("*.json")
    parts = json.loads(written.read_text())["parts"]
    assert list(parts) == ["miniature", "rendering", "training", "serving"]
    assert "ratios say nothing of full-size models" in finished.stdout


def test_what_a_card_needs_is_imported_without_ray() -> None:
    parts = sorted(path.stem for path in (ROOT / "benchmarks" / "gpu_parts").glob("*.py"))
    imported = ", ".join(f"benchmarks.gpu_parts.{name}" for name in parts if name != "__init__")
    code = f"import sys; sys.modules.update(ray=None, vllm=None); import benchmarks.gpu, {imported}, selma_ray.experts.trainer"
    code += "; assert 'mlflow' not in sys.modules, 'no trainer needs it, and each would pay for it'"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]


def test_full_size_models_are_refused_without_a_card(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 1
    assert "torch sees no CUDA device here; run it where there is one, or with --tiny on the CPU" in finished.stderr
    assert not list(tmp_path.iterdir())


def test_a_wheel_is_used_where_this_python_lacks_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "before")
    kit = tmp_path / "kit"
    kit.mkdir()
    for wheel in (
        "laid_beside-1.0-py3-none-any.whl",  # not installed
        "torch-0.1-py3-none-any.whl",  # installed, and newer
        "of_another_python-1.0-cp26-cp26-manylinux_2_17_x86_64.whl",
    ):
        with zipfile.ZipFile(kit / wheel, "w") as archive:
            archive.writestr(f"{wheel.partition('-')[0]}.py", "value = 7\n")
    assert use_wheels(kit) == ["laid_beside-1.0-py3-none-any.whl"]
    import laid_beside

    assert laid_beside.value == 7
    assert os.environ["PYTHONPATH"].endswith(f"{os.pathsep}before")
    assert use_wheels(tmp_path / "nothing") == []
