from pathlib import Path

import pytest
import torch

from selma_ray.errors import TrainingError
from selma_ray.experts.cache import EncodeExamples, encode_here, skill_cache
from selma_ray.experts.examples import EncodedExamples
from selma_ray.models.config import ModelConfig
from selma_ray.storage import RunFolder
from tests.unit.experts.rendered_images import write_failed_image, write_images


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


@pytest.fixture
def model(tiny_pipeline_dir: Path) -> ModelConfig:
    return ModelConfig(name=str(tiny_pipeline_dir))


def test_a_cache_holds_the_training_images_that_were_rendered(folder: RunFolder, model: ModelConfig) -> None:
    train = write_images(folder, "counting", 3)
    write_images(folder, "counting", 2, split="dev")
    write_failed_image(folder, "counting")
    cache = skill_cache(folder, "counting", model)
    assert list(cache.ids) == sorted(train)
    assert cache.sources == (("images/skill=counting/part-0-train.parquet", 0),)


def test_the_key_changes_with_rows_and_precision_and_not_with_files(folder: RunFolder, model: ModelConfig) -> None:
    write_images(folder, "counting", 3)
    key = skill_cache(folder, "counting", model).key
    assert key == skill_cache(folder, "counting", model).key
    assert key != skill_cache(folder, "counting", model.model_copy(update={"dtype": "bf16"})).key
    write_images(folder, "counting", 1, shard=1)
    assert key != skill_cache(folder, "counting", model).key


def test_the_key_changes_when_the_model_is_retrained(folder: RunFolder, tmp_path: Path) -> None:
    from tests.tiny_models import save_tiny_stable_diffusion

    write_images(folder, "counting", 1)
    keys = set()
    for seed in (0, 1):
        save_tiny_stable_diffusion(tmp_path / str(seed), seed=seed)
        (tmp_path / str(seed)).rename(tmp_path / "model")
        keys.add(skill_cache(folder, "counting", ModelConfig(name=str(tmp_path / "model"))).key)
        (tmp_path / "model").rename(tmp_path / f"old-{seed}")
    assert len(keys) == 2


def test_a_skill_without_images_is_refused(folder: RunFolder, model: ModelConfig) -> None:
    with pytest.raises(TrainingError, match="skill counting has no rendered training image"):
        skill_cache(folder, "counting", model)


def test_encoding_writes_shards_that_a_trainer_reads(folder: RunFolder, model: ModelConfig) -> None:
    ids = write_images(folder, "counting", 3) + write_images(folder, "counting", 2, shard=1)
    cache = skill_cache(folder, "counting", model)
    encode_here(folder, cache, EncodeExamples(folder, model))
    examples = EncodedExamples(folder, [cache.directory])
    assert examples.ids == list(cache.ids)
    assert sorted(examples.ids) == sorted(ids)
    shapes = {name: tuple(tensor.shape) for name, tensor in examples.batch([0, 4]).items()}
    assert shapes == {"latent_mean": (2, 4, 16, 16), "latent_std": (2, 4, 16, 16), "text_NTD": (2, 77, 32)}


def test_a_large_file_makes_a_shard_of_each_row_group(
    folder: RunFolder, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = folder.uri + "-small"
    write_images(RunFolder(small), "counting", 7)
    monkeypatch.setattr("selma_ray.storage.ROW_GROUP_ROWS", 3)
    write_images(folder, "counting", 7)
    caches = []
    for each in (RunFolder(small), folder):
        caches.append(skill_cache(each, "counting", model))
        encode_here(each, caches[-1], EncodeExamples(each, model))
    whole, cut = (
        EncodedExamples(each, [cache.directory]) for each, cache in zip((RunFolder(small), folder), caches, strict=True)
    )
    assert [group for _, group in caches[1].sources] == [0, 1, 2]
    assert caches[0].key == caches[1].key
    assert whole.ids == cut.ids
    for name, tensor in whole.batch(range(7)).items():
        assert torch.allclose(tensor, cut.batch(range(7))[name], atol=1e-5), name
