"""Prompts longer than a text encoder: counted by family, and read in chunks by CLIP where a recipe asks for it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from selma_ray.errors import ConfigError
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.drawing import Drawing
from selma_ray.models.family import open_family, open_predictor
from selma_ray.models.identity import model_identity
from selma_ray.models.prompt_length import PromptLengths, prompt_lengths
from selma_ray.models.rendering import Renderer, load_pipeline
from tests.unit.models.tiny_families import FAMILIES
from tests.unit.models.tiny_flow_models import save_tiny_flux, save_tiny_sd3
from tests.unit.models.tiny_sdxl import save_tiny_sdxl

SHORT = "two red apples"
LONG = " ".join(["a red apple and a blue cup on a small table"] * 12)  # a letter is a token of the tiny tokenizers
SAMPLING = SamplingConfig(steps=2, guidance_scale=2.0, width_px=64, height_px=64)


@pytest.fixture(scope="module")
def folders(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("families")
    for name, save in (("sdxl", save_tiny_sdxl), ("sd3", save_tiny_sd3), ("flux", save_tiny_flux)):
        save(root / name, tiny_pipeline_dir)
    return {"sd": str(tiny_pipeline_dir), **{name: str(root / name) for name in ("sdxl", "sd3", "flux")}}


@pytest.mark.parametrize(
    ("family", "chunks", "limit"), [("sd", 1, 77), ("sdxl", 1, 77), ("sd", 4, 302), ("sdxl", 2, 152)]
)
def test_prompts_beyond_the_encoder_are_counted(folders: Any, family: str, chunks: int, limit: int) -> None:
    model = ModelConfig(name=folders[family], text_chunks=chunks)
    tokenizer = load_pipeline(model, "cpu").tokenizer
    longest = len(tokenizer(LONG, truncation=False, verbose=False).input_ids)
    assert longest > 302
    fitting = "a" * (limit - 2)
    assert prompt_lengths(model, [SHORT, LONG, fitting, f"{fitting}a"]) == PromptLengths(4, 2, limit, longest)
    assert prompt_lengths(model, []) == PromptLengths(0, 0, limit, 0)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_the_loaded_model_counts_as_the_recipe_s_does(folders: Any, family: str) -> None:
    model = ModelConfig(name=folders[family])
    predictor = open_predictor(load_pipeline(model, "cpu"))
    for text in ("", SHORT, LONG):
        length, limit = predictor.tokens(text)
        assert prompt_lengths(model, [text]) == PromptLengths(1, int(length > limit), limit, length)


@pytest.mark.parametrize("family", ["z_image", "qwen_image"])
def test_a_chat_s_template_counts_as_the_pipeline_reads_it(family: str, tmp_path: Path) -> None:
    FAMILIES[family](tmp_path / "model", tmp_path)
    model = ModelConfig(name=str(tmp_path / "model"))
    pipeline: Any = load_pipeline(model, "cpu")
    predictor = open_predictor(pipeline)
    if family == "qwen_image":
        beginning = pipeline.prompt_template_encode.partition("{")[0]
        pipeline.prompt_template_encode_start_idx = len(pipeline.tokenizer(beginning).input_ids)
    assert predictor.tokens(LONG)[1] == 512
    for text in (SHORT, LONG, LONG + LONG):
        (conditions,) = predictor.encode([Drawing(text, 0, 1, 0.0, 64, 64)])
        length, limit = predictor.tokens(text)
        assert conditions.positive["text_NTD"].shape[1] == min(length, limit)
        assert prompt_lengths(model, [text]) == PromptLengths(1, int(length > limit), limit, length)


def test_t5_is_cut_where_the_pipeline_of_each_family_cuts_it(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    load = AutoTokenizer.from_pretrained

    def loaded(path: str, **options: Any) -> Any:
        tokenizer = load(path, **options)
        if options["subfolder"] != "tokenizer":
            tokenizer.model_max_length = 10**30  # as of T5 tokenizers that say nothing
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", loaded)
    limits = {name: prompt_lengths(ModelConfig(name=folders[name]), []).limit for name in ("sd3", "flux")}
    assert limits == {"sd3": 256, "flux": 512}


def test_a_model_without_tokenizers_is_not_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "X", "tokenizer": ["transformers", "CLIPTokenizer"]}')
    assert prompt_lengths(ModelConfig(name=str(tmp_path)), [SHORT]) is None
    assert "not counted in tokens" in caplog.text
    (tmp_path / "model_index.json").write_text('{"_class_name": "X", "tokenizer": [null, null]}')
    assert prompt_lengths(ModelConfig(name=str(tmp_path)), [SHORT]) is None


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_one_chunk_of_many_is_what_the_pipeline_reads(folders: Any, family: str) -> None:
    """The first chunk of a text that fits it is the pipeline's own encoding; those after it are of the empty text."""
    whole, chunked = (load_pipeline(ModelConfig(name=folders[family], text_chunks=count), "cpu") for count in (1, 3))
    for guided, negative in ((False, None), (True, None), (True, "blur")):
        for texts in (SHORT, [SHORT, "a cat"]):
            unwanted = [negative] * len(texts) if negative and isinstance(texts, list) else negative
            options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": guided}
            own, ours = (each.encode_prompt(texts, negative_prompt=unwanted, **options) for each in (whole, chunked))
            for expected, given in zip(own, ours, strict=True):
                if expected is None or expected.ndim == 2:  # pooled states are the first chunk's
                    assert given is None if expected is None else torch.allclose(given, expected, atol=1e-6)
                    continue
                assert given.shape == (expected.shape[0], 3 * 77, expected.shape[2])
                assert torch.allclose(given[:, :77], expected, atol=1e-6)
                if not (guided and negative is None and family == "sdxl"):
                    assert torch.allclose(given[:, 77:154], given[:, 154:], atol=1e-6)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_end_of_a_long_prompt_matters_with_chunks_alone(folders: Any, family: str) -> None:
    changed = f"{LONG[:-1]}z"
    for chunks, is_seen in ((1, False), (6, True)):
        pipeline = load_pipeline(ModelConfig(name=folders[family], text_chunks=chunks), "cpu")
        text, other = (pipeline.encode_prompt(each, "cpu", 1, False)[0] if family == "sd" else pipeline.encode_prompt(
            each, device="cpu", do_classifier_free_guidance=False)[0] for each in (LONG, changed))  # fmt: skip
        assert torch.equal(text, other) is not is_seen


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_training_rendering_and_serving_read_the_same_chunks(folders: Any, family: str) -> None:
    model = ModelConfig(name=folders[family], text_chunks=2)
    opened = open_family(model)
    encoded = opened.load_encoders("cpu").encode_prompts([LONG, SHORT], 64, 64)
    shapes = opened.example_shapes(64, 64)
    assert {name: tuple(tensor.shape[1:]) for name, tensor in encoded.items()} == {
        name: shape for name, shape in shapes.items() if not name.startswith("latent")
    }
    assert shapes["text_NTD"][0] == 154
    pipeline = load_pipeline(model, "cpu")
    drawing = Drawing(LONG, 0, 2, 2.0, 64, 64)
    (conditions,) = open_predictor(pipeline).encode([drawing])
    assert torch.allclose(conditions.positive["text_NTD"], encoded["text_NTD"][:1], atol=1e-5)
    assert conditions.negative["text_NTD"].shape == conditions.positive["text_NTD"].shape
    renderer = Renderer(pipeline, SAMPLING)
    alone, together = renderer.render([LONG], [0]), renderer.render([SHORT, LONG], [1, 0])
    assert alone[0].tobytes() == together[1].tobytes()
    cut = Renderer(load_pipeline(ModelConfig(name=folders[family]), "cpu"), SAMPLING).render([LONG], [0])
    assert cut[0].tobytes() != alone[0].tobytes()


def test_chunks_decide_images(folders: Any) -> None:
    plain, chunked = (model_identity(ModelConfig(name=folders["sd"], text_chunks=count)) for count in (1, 2))
    assert plain != chunked
    assert "text_chunks" not in plain


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_families_with_longer_encoders_are_not_read_in_chunks(folders: Any, family: str) -> None:
    model = ModelConfig(name=folders[family], text_chunks=2)
    with pytest.raises(ConfigError, match=r"model.text_chunks must be 1 for .*Pipeline, got 2"):
        load_pipeline(model, "cpu")
    with pytest.raises(ConfigError, match=r"model\.text_chunks must be 1"):
        open_family(model).load_encoders("cpu")
