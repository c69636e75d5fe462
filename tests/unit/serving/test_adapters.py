"""LoRAs of others: every format that is read draws what diffusers' own loader draws, bad files are refused in one line."""

import asyncio
import gc
import io
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from starlette.testclient import TestClient

from selma_ray.adapters.exports import write_diffusers, write_kohya
from selma_ray.adapters.mixing import Expert
from selma_ray.adapters.peft_format import open_adapter, shapes_of
from selma_ray.errors import AdapterError, ConfigError
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.rendering import load_pipeline
from selma_ray.serving.api import build_app
from selma_ray.serving.catalogue import Catalogue, Entry
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import PNG
from selma_ray.serving.errors import RequestError
from selma_ray.serving.experts import check_adapters, open_experts
from selma_ray.serving.generator import Generator
from selma_ray.serving.live_names import LiveNames
from selma_ray.serving.requests import ImageRequest
from selma_ray.serving.served import ModelNames, ServedModels
from tests.tiny_experts import save_experts
from tests.unit.serving.recorder import Recorder
from tests.unit.serving.solo import solo_image

CONFIG = ServingConfig(
    sampling=SamplingConfig(steps=3, guidance_scale=2.0, width_px=64, height_px=64), max_batch_size=4, num_threads=1
)
REQUEST = ImageRequest("a red ball", 0, 3, 2.0, 64, 64)
CONVOLUTION = "down_blocks.0.attentions.0.proj_in"  # of 1 x 1 pixels


@pytest.fixture(scope="module")
def model(tiny_pipeline_dir: Path) -> ModelConfig:
    return ModelConfig(name=str(tiny_pipeline_dir))


@pytest.fixture(scope="module")
def folders(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_experts(load_pipeline(model, "cpu"), tmp_path_factory.mktemp("experts"))


def write_files(folder: str, target: Path) -> dict[str, str]:
    """Write an adapter in the formats of single files, one of them with a convolution and something for the text encoder."""
    adapter = open_adapter(folder)
    write_diffusers(target / "diffusers.safetensors", adapter, shapes_of([adapter]), "unet", {})
    write_kohya(target / "kohya.safetensors", adapter, shapes_of([adapter]), {})
    generator = torch.Generator().manual_seed(1)
    name = f"lora_unet_{CONVOLUTION.replace('.', '_')}"
    text = "lora_te_text_model_encoder_layers_0_self_attn_out_proj"
    state = {
        f"{name}.lora_down.weight": torch.randn(4, 16, 1, 1, generator=generator),
        f"{name}.lora_up.weight": torch.randn(16, 4, 1, 1, generator=generator),
        f"{name}.alpha": torch.tensor(2.0),
        f"{text}.lora_down.weight": torch.zeros(4, 32),
        f"{text}.lora_up.weight": torch.zeros(32, 4),
        f"{text}.alpha": torch.tensor(2.0),
    }
    save_file(state, target / "convolution.safetensors")
    return {each: str(target / f"{each}.safetensors") for each in ("diffusers", "kohya", "convolution")}


@pytest.fixture(scope="module")
def files(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_files(folders["counting"], tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def generator(model: ModelConfig, files: dict[str, str]) -> Iterator[Generator]:
    generator = Generator(ServedModels("merged", model, model, files), CONFIG, open_experts)
    yield generator
    generator.close()


def drawn(generator: Generator, **weights: float) -> np.ndarray:
    request = replace(REQUEST, mix=tuple(weights.items()))
    (file,) = asyncio.run(generator.generate([request], PNG)).files
    return np.asarray(Image.open(io.BytesIO(file)), dtype=int)


@pytest.mark.parametrize("name", ["diffusers", "kohya", "convolution"])
def test_a_file_draws_what_diffusers_own_loader_draws(
    model: ModelConfig, files: dict[str, str], generator: Generator, name: str
) -> None:
    reference: Any = load_pipeline(model, "cpu")
    plain = solo_image(reference, REQUEST)
    reference.load_lora_weights(files[name])
    expected = solo_image(reference, REQUEST)
    assert np.abs(drawn(generator, **{name: 1.0}) - expected).max() <= 1
    assert np.abs(expected - plain).max() > 5, "it changes the picture"


def test_a_folder_and_the_files_made_of_it_are_the_same(
    model: ModelConfig, folders: dict[str, str], files: dict[str, str]
) -> None:
    pipeline: Any = load_pipeline(model, "cpu")
    paths = {"folder": folders["counting"], "diffusers": files["diffusers"], "kohya": files["kohya"]}
    folder, *others = open_experts(paths, pipeline.unet, type(pipeline)).values()
    for other in others:
        assert folder.keys() == other.keys()
        for module, delta in folder.items():
            torch.testing.assert_close(delta.B_OR @ delta.A_RI, other[module].B_OR @ other[module].A_RI)


def test_what_is_for_the_text_encoder_is_left_out_with_a_warning(
    model: ModelConfig, files: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    check_adapters({"style": files["convolution"]}, model)
    (message,) = [each for each in caplog.messages if "left out" in each]
    assert message.endswith("what it has for text encoders is left out, the unet alone is adapted")


def saved(path: Path, **tensors: torch.Tensor) -> Path:
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)
    return path


Q = "unet__down_blocks__0__attentions__0__transformer_blocks__0__attn1__to_q"
# More of them are in tests/unit/adapters/test_foreign_files.py: the reader is the same.
BAD_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "no.safetensors", "no.safetensors does not exist; name a LoRA file"),
    "an empty folder": (lambda folder: folder, "must hold adapter_config.json, experts/style or one .safetensors file"),
    "DoRA": (
        lambda folder: saved(folder / "dora.safetensors", **{f"{Q}__dora_scale": torch.ones(1)}), "is of DoRA"
    ),
    "another model": (
        lambda folder: saved(
            folder / "flux.safetensors",
            transformer__x__lora_A__weight=torch.ones(2, 16), transformer__x__lora_B__weight=torch.ones(16, 2),
        ),
        "name a LoRA of this model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_before_anything_is_started(model: ModelConfig, tmp_path: Path, name: str) -> None:
    make, message = BAD_FILES[name]
    with pytest.raises(AdapterError) as refusal:
        check_adapters({"style": str(make(tmp_path))}, model)
    assert str(refusal.value).startswith("serving.adapters.style: ")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_adapters_are_added_while_the_generator_runs(
    generator: Generator, folders: dict[str, str], files: dict[str, str]
) -> None:
    before = drawn(generator, kohya=1.0)
    started_with = generator.stats()["experts"]
    again = {"kohya": files["kohya"]}  # named already, and not twice for it
    asyncio.run(generator.reconfigure({"adapters": {"style": folders["style"], **again}}))
    assert generator.stats()["experts"] == [*started_with, "style"]
    assert np.abs(drawn(generator, style=1.0) - drawn(generator)).max() > 5
    assert np.array_equal(drawn(generator, kohya=1.0), before)
    for adapters, error in (
        ({"style": folders["counting"]}, ConfigError),
        ({"merged": folders["style"]}, ConfigError),
        ({"other": "/nowhere"}, AdapterError),
    ):
        with pytest.raises(error):
            asyncio.run(generator.reconfigure({"adapters": adapters}))
    assert generator.stats()["experts"] == [*started_with, "style"]
    asyncio.run(generator.reconfigure({}))
    assert generator.stats()["experts"] == started_with


def test_an_adapter_that_is_no_longer_named_leaves_the_memory(model: ModelConfig, folders: dict[str, str]) -> None:
    read: list[weakref.ref[torch.Tensor]] = []

    def open_noted(paths: Mapping[str, str], denoiser: Any, pipeline_class: Any) -> Mapping[str, Expert]:
        opened = open_experts(paths, denoiser, pipeline_class)
        read.extend(weakref.ref(each.A_RI) for name in opened if name == "style" for each in opened[name].values())
        return opened

    generator = Generator(ServedModels("merged", model, model, {"counting": folders["counting"]}), CONFIG, open_noted)
    try:
        asyncio.run(generator.reconfigure({"adapters": {"style": folders["style"], "counting": folders["counting"]}}))
        before = drawn(generator, style=1.0)

        async def draw_while_it_leaves() -> Any:
            slow = replace(REQUEST, mix=(("style", 1.0),))
            drawing = asyncio.create_task(generator.generate([slow], PNG))
            while not generator.stats()["in_flight"]:
                await asyncio.sleep(0)
            await generator.reconfigure({})
            return await drawing

        images = asyncio.run(draw_while_it_leaves())
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(images.files[0])), dtype=int), before)
        drawn(generator, counting=1.0)  # the weights of the last mix are kept until there is another
        gc.collect()
        assert read
        assert not [each for each in read if each() is not None]
        with pytest.raises(RequestError, match="model 'style' is not served; names: merged, base, counting"):
            drawn(generator, style=1.0)
        asyncio.run(generator.reconfigure({"adapters": {"style": folders["style"]}}))
        assert np.array_equal(drawn(generator, style=1.0), before), "it can come again"
    finally:
        generator.close()


def test_an_added_adapter_can_be_asked_for_at_once(backend: Recorder) -> None:
    app = build_app(backend, CONFIG, ModelNames("merged", base=True, experts=("counting",)), ())
    client = TestClient(app, "http://127.0.0.1:8000", client=("127.0.0.1", 5))
    backend.stats = [{"experts": ["counting", "style", "new"]}, {"experts": ["counting", "style"]}]
    body = {"prompt": "a cat", "model": {"style": 0.5}}
    assert client.post("/v1/images/generations", json=body).status_code == 200
    assert backend.requests[0].mix == (("style", 0.5),)
    refused = client.post("/v1/images/generations", json=body | {"model": "new"})
    assert refused.json()["error"]["message"] == "model 'new' is not served; names: merged, base, counting, style"


def test_strangers_names_are_looked_up_once_a_second() -> None:
    class Counting(Recorder):
        asked = 0

        async def generator_stats(self) -> list[dict[str, Any]]:
            self.asked += 1
            return await super().generator_stats()

    now_s = 0.0
    backend = Counting()
    names = LiveNames(Catalogue({"": Entry(ModelNames("merged"), CONFIG)}), backend, lambda: now_s)
    for _ in range(5):
        asyncio.run(names.known())
    now_s = 1.0
    asyncio.run(names.known())
    assert backend.asked == 2
