"""Content credentials: what c2pa's own reader finds in images that a service has answered."""

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from selma_ray.cluster.config import ClusterConfig
from selma_ray.errors import ConfigError
from selma_ray.serving.api import build_app
from selma_ray.serving.config import CredentialsConfig, ServingConfig
from selma_ray.serving.credentials import open_signer
from selma_ray.serving.encoding import PNG, encode
from selma_ray.serving.run import check_start
from selma_ray.serving.served import ModelNames
from tests.signing import write_chain
from tests.unit.serving.recorder import Recorder, picture

c2pa = pytest.importorskip("c2pa", reason="the extra c2pa is not installed")

PATH = "/v1/images/generations"
IPTC = "http://cv.iptc.org/newscodes/digitalsourcetype/"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    write_chain(folder)
    return folder


def config_for(chain: Path, certificates: str = "chain.pem", key: str = "key.pem", **changes: Any) -> ServingConfig:
    credentials = CredentialsConfig(certificates_file=str(chain / certificates), key_file=str(chain / key), **changes)
    return ServingConfig(port=0, credentials=credentials)


@pytest.fixture
def client(backend: Recorder, chain: Path) -> TestClient:
    config = config_for(chain)
    app = build_app(backend, config, ModelNames("merged"), (), sign=open_signer(config))
    return TestClient(app, "http://127.0.0.1:8000", client=("127.0.0.1", 5))


def read(b64_json: str, kind: str) -> dict[str, Any]:
    """Return the active manifest of an image, whose bytes are as they were signed."""
    content = base64.b64decode(b64_json)
    Image.open(io.BytesIO(content)).load()
    with c2pa.Reader(f"image/{kind}", io.BytesIO(content)) as reader:
        found = json.loads(reader.json())
    assert found["validation_state"] == "Valid", found.get("validation_status")
    return found["manifests"][found["active_manifest"]]


def action(manifest: dict[str, Any]) -> dict[str, Any]:
    (actions,) = (each["data"] for each in manifest["assertions"] if each["label"].startswith("c2pa.actions"))
    return actions["actions"][0]


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
@pytest.mark.parametrize("chosen", [{}, {"best_of": 2}], ids=["drawn", "best of several"])
def test_every_image_says_that_a_model_has_drawn_it(client: TestClient, kind: str, chosen: dict[str, Any]) -> None:
    body = {"prompt": "a cat", "seed": 9, "output_format": kind, **chosen}
    (datum,) = client.post(PATH, json=body).json()["data"]
    manifest = read(datum["b64_json"], kind)
    assert action(manifest)["digitalSourceType"] == f"{IPTC}trainedAlgorithmicMedia"
    assert manifest["signature_info"]["issuer"] == "Tests"
    assert manifest["claim_generator_info"][0]["name"] == "selma_ray"


def test_a_changed_image_says_so_and_a_linked_one_is_signed(client: TestClient) -> None:
    form = {"prompt": "a cat", "response_format": "url"}
    answer = client.post("/v1/images/edits", data=form, files={"image": encode(picture(40), PNG)}).json()
    content = base64.b64encode(client.get(answer["data"][0]["url"]).content).decode()
    assert action(read(content, "png"))["digitalSourceType"] == f"{IPTC}compositeWithTrainedAlgorithmicMedia"


def test_of_a_stream_the_finished_image_is_signed(client: TestClient) -> None:
    body = {"prompt": "a cat", "stream": True, "partial_images": 1}
    events = [
        json.loads(line.removeprefix("data: "))
        for line in client.post(PATH, json=body).text.splitlines()
        if line.startswith("data: ")
    ]
    preview, finished = events
    read(finished["b64_json"], "png")
    with pytest.raises(c2pa.C2paError):
        read(preview["b64_json"], "png")


@pytest.mark.parametrize(
    ("files", "changes", "line"),
    [
        ({"certificates": "root.pem", "key": "root_key.pem"}, {}, r"cannot sign by es256 \(.*self-signed"),
        ({"key": "root_key.pem"}, {}, r"cannot sign by es256 .*; give a signer's certificate followed by its issuer's"),
        ({"certificates": "key.pem"}, {}, r"chain|key\.pem cannot sign"),
        ({}, {"algorithm": "ps256"}, r"cannot sign by ps256"),
        ({"key": "missing.pem"}, {}, r"^serving\.credentials\.key_file .*missing\.pem cannot be read"),
    ],
)
def test_what_cannot_sign_is_refused_before_a_start(
    chain: Path, files: dict[str, str], changes: dict[str, Any], line: str
) -> None:
    with pytest.raises(ConfigError, match=line) as refusal:
        check_start(config_for(chain, **files, **changes), ClusterConfig())
    assert "\n" not in str(refusal.value)


def test_without_the_package_the_extra_is_named(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(ConfigError, match=r"needs c2pa-python.*pip install 'selma_ray\[c2pa\]'"):
        open_signer(config_for(chain))


def test_by_default_images_bear_no_signature(backend: Recorder) -> None:
    assert open_signer(ServingConfig()) is None
