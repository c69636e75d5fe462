"""What names the content of a model's folder."""

import os
from pathlib import Path

import pytest

from selma_ray.models.config import ModelConfig
from selma_ray.models.fingerprint import fingerprint
from selma_ray.models.identity import model_identity


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a model's folder of one large file and a small one; the user's cache is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("selma_ray.models.fingerprint._remembered", {})
    model = tmp_path / "model"
    (model / "unet").mkdir(parents=True)
    (model / "unet" / "weights.safetensors").write_bytes(bytes(1 << 20))
    (model / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return model


def write_in_the_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_other_weights_in_the_middle_of_a_file_are_another_model(folder: Path) -> None:
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    write_in_the_middle(folder / "unet" / "weights.safetensors")
    assert fingerprint(folder) != before


def test_names_count_and_places_do_not(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(folder)
    folder.rename(tmp_path / "elsewhere")
    assert fingerprint(tmp_path / "elsewhere") == before
    (tmp_path / "elsewhere" / "unet" / "weights.safetensors").rename(
        tmp_path / "elsewhere" / "unet" / "other.safetensors"
    )
    assert fingerprint(tmp_path / "elsewhere") != before


def test_linked_folders_and_files_count_by_what_they_hold(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(folder)
    (folder / "unet").rename(tmp_path / "unet")
    (folder / "unet").symlink_to(tmp_path / "unet")
    assert fingerprint(folder) == before
    write_in_the_middle(tmp_path / "unet" / "weights.safetensors")
    assert fingerprint(folder) != before
    (tmp_path / "unet" / "back").symlink_to(folder)  # a loop of links ends
    assert fingerprint(folder)


def test_a_file_is_read_once_even_by_another_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(folder)
    monkeypatch.setattr("selma_ray.models.fingerprint._remembered", {})  # as in a new process
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("it was read before"))
    assert fingerprint(folder) == before
    os.utime(folder / "model_index.json")
    with pytest.raises(pytest.fail.Exception, match="read before"):
        fingerprint(folder)


def test_a_cache_that_is_broken_or_cannot_be_written_costs_time_alone(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(folder)
    (tmp_path / "cache" / "selma_ray" / "file_hashes.json").write_text("[broken")
    assert fingerprint(folder) == before


def test_a_model_s_identity_is_its_content_precision_and_variant_not_its_place(folder: Path, tmp_path: Path) -> None:
    before = model_identity(ModelConfig(name=str(folder)))
    assert model_identity(ModelConfig(name=str(folder), dtype="fp16")) != before
    assert model_identity(ModelConfig(name=str(folder), variant="fp16")) != before
    folder.rename(tmp_path / "moved")
    assert model_identity(ModelConfig(name=str(tmp_path / "moved"))) == before
    one, other = (model_identity(ModelConfig(name=name)) for name in ("owner/one", "owner/other"))
    assert one != other, "both are of the revision main"
