from pathlib import Path

import pytest

from selma_ray.models.config import ModelConfig
from tests.unit.models.tiny_families import FAMILIES


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(
    request: pytest.FixtureRequest, tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> ModelConfig:
    """Return a tiny model of each family in turn."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    FAMILIES[request.param](folder, tiny_pipeline_dir)
    return ModelConfig(name=str(folder))
