"""From which guidance scale on a step is guided: plans, memory and the server say the same of a family."""

from importlib import import_module

import pytest
import torch

from selma_ray.adapters.mixing import LowRank, fitted_expert
from selma_ray.adapters.targets import check_targets
from selma_ray.errors import AdapterError, ConfigError
from selma_ray.models.config import ModelConfig
from selma_ray.models.cost import TrainingCost
from selma_ray.models.families import FAMILIES
from selma_ray.models.family import open_family
from selma_ray.models.memory import DrawingCost
from selma_ray.models.published import configured

Z_IMAGE = ModelConfig(name="Tongyi-MAI/Z-Image")


@pytest.mark.parametrize("pipeline_class", FAMILIES)
def test_a_family_and_its_predictor_guide_above_the_same_scale(pipeline_class: str) -> None:
    module, family, predictor = FAMILIES[pipeline_class]
    loaded = import_module(f"selma_ray.models.{module}")
    assert getattr(loaded, family).guides_above == getattr(loaded, predictor).guides_above


def test_a_plan_counts_guidance_from_where_the_family_counts_it() -> None:
    drawing = DrawingCost(1, 1, 1, 2, upcasts=False)
    assert [drawing.rows(scale) for scale in (0.0, 0.5, 1.0, 1.5)] == [1, 1, 1, 2]
    from_zero = DrawingCost(1, 1, 1, 2, upcasts=False, guides_above=0.0)
    assert [from_zero.rows(scale) for scale in (0.0, 0.5, 1.0, 1.5)] == [1, 2, 2, 2]
    training = TrainingCost(1, 1, 1, 1, 1, 1, 1, 1, 2, guides_above=0.0)
    assert [training.predictions(scale) for scale in (0.0, 0.5)] == [1, 2]


def test_embedders_that_see_all_rows_as_one_are_refused_for_a_service_that_mixes() -> None:
    with configured(Z_IMAGE) as model, torch.device("meta"):
        denoiser = open_family(model).empty_denoiser()
    check_targets(denoiser, ["to_q", "cap_embedder.1"], "Z-Image")
    check_targets(denoiser, ["to_q"], "Z-Image", rows_apart=True)
    with pytest.raises(
        ConfigError, match=r"'cap_embedder.1' names cap_embedder.1 of Z-Image; set serving.experts=false"
    ):
        check_targets(denoiser, ["to_q", "cap_embedder.1"], "Z-Image", rows_apart=True)
    weight = denoiser.get_submodule("cap_embedder.1").weight
    expert = {"cap_embedder.1": LowRank(torch.ones(1, weight.shape[1]), torch.ones(weight.shape[0], 1))}
    with pytest.raises(
        AdapterError, match=r"expert style: cap_embedder.1 sees the tokens of all rows of a batch as one"
    ):
        fitted_expert("style", expert, denoiser)
