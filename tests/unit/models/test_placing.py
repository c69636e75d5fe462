from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from selma_ray.errors import ConfigError, ModelNotFoundError
from selma_ray.models.config import CardConfig, ModelConfig, SamplingConfig
from selma_ray.models.family import open_family
from selma_ray.models.identity import model_identity
from selma_ray.models.placing import place_on_card
from selma_ray.models.rendering import Renderer, load_pipeline

CPU = torch.device("cpu")
SAMPLING = SamplingConfig(steps=2, guidance_scale=2.0, width_px=64, height_px=64)
PROMPTS, SEEDS = list("abcd"), list(range(4))


@pytest.fixture(scope="module")
def model(tiny_pipeline_dir: Path) -> ModelConfig:
    return ModelConfig(name=str(tiny_pipeline_dir))


@pytest.fixture(scope="module")
def plain(model: ModelConfig) -> Any:
    return rendered(load_pipeline(model, CPU))


def rendered(pipeline: Any) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=int) for image in Renderer(pipeline, SAMPLING).render(PROMPTS, SEEDS)])


@pytest.mark.parametrize("settings", [{}, {"channels_last": True}, {"offload": "model"}, {"vae_slicing": False}])
def test_what_saves_memory_or_time_changes_images_by_rounding_alone(
    model: ModelConfig, plain: Any, settings: Any
) -> None:
    pipeline = place_on_card(load_pipeline(model, CPU), CardConfig(tf32=False, **settings), CPU)
    assert np.abs(rendered(pipeline) - plain).max() <= 1


@pytest.mark.heavy
def test_a_compiled_denoiser_draws_the_same_images(model: ModelConfig, plain: Any) -> None:
    pipeline = place_on_card(load_pipeline(model, CPU), CardConfig(tf32=False, compile=True), CPU)
    assert np.abs(rendered(pipeline) - plain).max() <= 1


def test_layers_move_to_the_card_one_by_one_where_a_recipe_asks_for_it(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline: Any = load_pipeline(model, CPU)
    moved: list[Any] = []
    monkeypatch.setattr(pipeline, "enable_sequential_cpu_offload", lambda device: moved.append(device))
    place_on_card(pipeline, CardConfig(tf32=False, offload="sequential"), CPU)
    assert moved == [CPU]


def test_what_cannot_be_traced_is_not_compiled(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline: Any = load_pipeline(model, CPU)
    monkeypatch.setattr(pipeline, "enable_sequential_cpu_offload", lambda device: None)
    with pytest.raises(ConfigError, match=r"model.card.compile must be false with model.card.offload=sequential"):
        place_on_card(pipeline, CardConfig(offload="sequential", compile=True), CPU)


def test_tiles_are_decoded_where_the_model_says_so(model: ModelConfig) -> None:
    tiled: Any = load_pipeline(model.model_copy(update={"vae_tiling": True}), CPU)
    assert tiled.vae.use_tiling
    assert not load_pipeline(model, CPU).vae.use_tiling


@pytest.fixture(scope="module")
def other_autoencoder(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder") / "vae"
    torch.manual_seed(7)
    config = dict(AutoencoderKL.load_config(str(tiny_pipeline_dir), subfolder="vae")) | {"scaling_factor": 0.5}
    AutoencoderKL.from_config(config).save_pretrained(folder)
    return folder


def test_another_autoencoder_decodes_and_encodes_in_the_place_of_the_model_s(
    model: ModelConfig, plain: Any, other_autoencoder: Path
) -> None:
    replaced = model.model_copy(update={"vae": str(other_autoencoder)})
    pipeline: Any = load_pipeline(replaced, CPU)
    assert pipeline.vae.config.scaling_factor == 0.5
    assert np.abs(rendered(pipeline) - plain).max() > 1
    family: Any = open_family(replaced)
    assert family.latent_scale == 0.5
    pixels = np.full((1, 64, 64, 3), 90, np.uint8)
    own, other = open_family(model).load_encoders(CPU), family.load_encoders(CPU)
    assert not torch.equal(own.encode_images(pixels)["latent_mean"], other.encode_images(pixels)["latent_mean"])


def test_what_decodes_is_part_of_the_model_s_identity_and_where_it_is_kept_is_not(
    model: ModelConfig, other_autoencoder: Path
) -> None:
    changes: list[dict[str, Any]] = [{"vae": str(other_autoencoder)}, {"vae_tiling": True}]
    identities = [model_identity(model.model_copy(update=change)) for change in [{}, *changes]]
    assert len({str(each) for each in identities}) == 3
    kept = model.model_copy(update={"card": CardConfig(offload="model", compile=True)})
    assert model_identity(kept) == identities[0]


def test_an_autoencoder_that_is_not_there_is_named_by_its_key(model: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"model.vae: model folder .* does not exist"):
        load_pipeline(model.model_copy(update={"vae": str(tmp_path / "nowhere")}), CPU)
