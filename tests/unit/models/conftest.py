from pathlib import Path

import pytest

from selma_ray.models.config import ModelConfig
from tests.unit.models.tiny_flow_models import save_tiny_flux, save_tiny_sd3
from tests.unit.models.tiny_sdxl import save_tiny_sdxl

_SAVERS = {"sdxl": save_tiny_sdxl, "sd3": save_tiny_sd3, "flux": save_tiny_flux}


@pytest.fixture(scope="module", params=["sd", *_SAVERS])
def model(
    request: pytest.FixtureRequest, tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> ModelConfig:
    """Return a tiny model of each family in turn."""
    if request.param == "sd":
        return ModelConfig(name=str(tiny_pipeline_dir))
    folder = tmp_path_factory.mktemp(request.param) / "model"
    _SAVERS[request.param](folder, tiny_pipeline_dir)
    return ModelConfig(name=str(folder))
