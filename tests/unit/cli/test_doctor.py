"""What `selma doctor` finds on machines that lack something."""

import importlib.util
import json
import shutil
import sys
from collections import namedtuple
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from selma_ray.cli import commands as cli
from selma_ray.cli import doctor

Disk = namedtuple("Disk", "total used free")


def states(findings: list[doctor.Finding]) -> dict[str, str]:
    return {each.what: each.state for each in findings}


def test_this_machine_has_no_fault_and_a_folder_is_tried_and_left_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"versions", "libraries", "GPUs", "shared memory", "the hub", "run_dir"} <= {each["what"] for each in found}
    assert list(tmp_path.iterdir()) == []
    assert cli.main(["doctor"]) == 0
    assert "ray 2." in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["doctor", str(tmp_path / "file" / "run")]) == 1
    assert "fault  run_dir: " in capsys.readouterr().out


def test_a_library_that_is_not_there_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def without_vllm(name: str) -> str:
        if name.startswith("vllm"):
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without_vllm)
    (fault,) = [each for each in doctor.examine() if each.state == "fault"]
    assert fault.detail == "vllm not installed"


@pytest.mark.parametrize("compiled", [True, False])
def test_packages_that_each_process_would_compile_anew_are_a_note(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiled: bool
) -> None:
    package = tmp_path / "site-packages" / "transformers"
    (package / "__pycache__").mkdir(parents=True)
    if compiled:
        (package / "__pycache__" / "__init__.pyc").touch()
    spec = ModuleSpec("transformers", None)
    spec.cached = str(package / "__pycache__" / "__init__.pyc")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    notes = [each for each in doctor.examine() if each.what == "bytecode"]
    assert [each.state for each in notes] == ([] if compiled else ["note"])
    assert all(each.remedy.endswith(f"{tmp_path / 'site-packages'}`") for each in notes)


@pytest.mark.parametrize(
    ("cuda", "remedy"), [(None, "install requirements/gpu.txt"), ("13.0", "install a driver of version 580 or newer")]
)
def test_a_card_that_torch_does_not_see_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, remedy: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor, "_cards", lambda: ["driver 535.1 for NVIDIA L40S"])
    found = doctor._gpus()
    assert (found.state, found.remedy) == ("fault", remedy)
    assert "NVIDIA L40S" in found.detail


def test_little_space_and_no_network_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Disk(10, 9, 1))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = states(doctor.examine())
    assert (found["shared memory"], found["this folder"], found["the hub"]) == ("note", "note", "note")


def test_a_token_is_never_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert doctor._token().state == "fine"
    assert cli.main(["doctor", "--json"]) == 0
    assert "hf_secret" not in capsys.readouterr().out
