"""LiteLLM, unchanged, before the service: what it makes of a call is understood, and what it is answered it understands."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from selma_ray.serving.api import build_app
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import PNG, encode
from selma_ray.serving.served import ModelNames
from tests.local_service import served
from tests.unit.serving.recorder import Recorder, picture

pytestmark = pytest.mark.filterwarnings("ignore")  # its own, of pydantic and of what it deprecates


@pytest.fixture(scope="module")
def litellm() -> Iterator[Any]:
    """Return the package, which would fetch prices from the network when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        package = pytest.importorskip("litellm", reason="litellm is not installed")
        patch.setattr(package, "suppress_debug_info", True)
        yield package


@pytest.fixture
def service(backend: Recorder) -> Iterator[dict[str, str]]:
    app = build_app(backend, ServingConfig(), ModelNames("merged", base=True, experts=("counting",)), ())
    with served(app) as address:
        yield {"api_base": f"{address}/v1", "api_key": "none"}


def test_images(litellm: Any, service: dict[str, str], backend: Recorder) -> None:
    answer = litellm.image_generation(
        "a cat", model="openai/base", n=2, size="64x64", quality="low", user="me", seed=3, **service
    )
    assert [(each.seed, each.steps, each.mix) for each in backend.requests] == [(3, 25, ()), (4, 25, ())]
    assert [Image.open(io.BytesIO(base64.b64decode(each.b64_json))).size for each in answer.data] == [(16, 16)] * 2
    assert answer.usage.input_tokens == len("a cat")


def test_edits(litellm: Any, service: dict[str, str], backend: Recorder) -> None:
    image = io.BytesIO(encode(picture(40), PNG))
    answer = litellm.image_edit(image=image, prompt="a dog", model="openai/merged", size="64x64", **service)
    assert answer.data[0].b64_json
    (request,) = backend.requests
    assert request.source is not None
    assert request.source.image.getpixel((0, 0)) == (40, 0, 0)


def test_refusals(litellm: Any, service: dict[str, str]) -> None:
    with pytest.raises(litellm.NotFoundError, match="'nope' is not served; names: merged, base, counting"):
        litellm.image_generation("a cat", model="openai/nope", **service)
