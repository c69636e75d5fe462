"""Each score against an independent computation in float64, on small random checkpoints in the published formats."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from selma_ray.errors import JudgeError
from selma_ray.judging.preferences import agreement, convert
from selma_ray.judging.preferences.clip import FORMULAS, ClipScorer
from selma_ray.judging.preferences.convert import clip_from_open_clip, image_reward_from_release, read_checkpoint
from selma_ray.judging.preferences.image_reward import ImageRewardScorer
from selma_ray.judging.preferences.preprocessing import crop_evenly, crop_to_floor, pad_to_square, to_pixels
from tests.unit.judging import float64_models as float64
from tests.unit.judging import tiny_preferences as tiny

PROMPTS = ["a red cup", "two dogs on the grass", "x", "a long prompt, " * 12]
TOLERANCE = 2e-5  # float32 against float64


@pytest.fixture(scope="module")
def images() -> Any:
    generator = np.random.default_rng(0)
    sizes = [(32, 32), (51, 40), (40, 77), (33, 200)]
    return [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


@pytest.fixture(scope="module", params=["gelu", "quick_gelu"])
def clip_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder in transformers' format, and the same weights under open_clip's names."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = tiny.character_tokenizer(folder / "source")
    weights = tiny.open_clip_weights(len(tokenizer))
    clip_from_open_clip(weights, tiny.clip_config(tokenizer, request.param)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    plain = {name: tensor.double().numpy() for name, tensor in weights.items()}
    return folder / "model", plain, tokenizer, getattr(float64, request.param)


def cosines(clip_checkpoint: Any, images: Any, prompts: Any, prepare: Any) -> Any:
    _, weights, tokenizer, activation = clip_checkpoint
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        pixels_CHW = ((np.asarray(prepare(image)) / 255 - float64.MEAN) / float64.STD).transpose(2, 0, 1)
        tokens = tokenizer(prompt, truncation=True, max_length=77)["input_ids"]
        seen = float64.clip_image(pixels_CHW, weights, tiny.HEADS, activation)
        read = float64.clip_text(tokens, weights, tiny.HEADS, activation, tokenizer.eos_token_id)
        found.append(float64.cosine(seen, read))
    return found


def shorter_side(image: Any, half: Any) -> Any:
    """Written once more: resize the shorter side to 32 and crop the centre."""
    scale = 32 / min(image.size)
    size = tuple(32 if side == min(image.size) else int(side * 32 / min(image.size)) for side in image.size)
    assert scale > 0
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = half(size[0] - 32), half(size[1] - 32)
    return resized.crop((left, top, left + 32, top + 32))


def padded(image: Any) -> Any:
    width, height = (round(side * 32 / max(image.size)) for side in image.size)
    array = np.zeros((32, 32, 3), dtype=np.uint8)
    top, left = (32 - height) // 2, (32 - width) // 2
    array[top : top + height, left : left + width] = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(array)


def test_clipscore(clip_checkpoint: Any, images: Any) -> None:
    expected = cosines(
        clip_checkpoint, images, ["A photo depicts " + prompt for prompt in PROMPTS],
        lambda image: shorter_side(image, lambda room: round(room / 2)),
    )  # fmt: skip
    scores = ClipScorer("clipscore", str(clip_checkpoint[0])).score(images, PROMPTS)
    assert scores == pytest.approx([2.5 * max(each, 0) for each in expected], abs=TOLERANCE)


def test_pickscore(clip_checkpoint: Any, images: Any) -> None:
    expected = cosines(clip_checkpoint, images, PROMPTS, lambda image: shorter_side(image, lambda room: room // 2))
    scale = math.exp(float(clip_checkpoint[1]["logit_scale"]))
    scores = ClipScorer("pickscore", str(clip_checkpoint[0])).score(images, PROMPTS)
    assert scores == pytest.approx([scale * each for each in expected], abs=TOLERANCE)


@pytest.mark.parametrize("version", ["hpsv2", "hpsv2.1"])
def test_hpsv2(clip_checkpoint: Any, images: Any, version: str) -> None:
    scores = ClipScorer(version, str(clip_checkpoint[0])).score(images, PROMPTS)
    assert scores == pytest.approx(cosines(clip_checkpoint, images, PROMPTS, padded), abs=TOLERANCE)


@pytest.fixture(scope="module")
def reward_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = tiny.word_tokenizer(folder / "source")
    weights = tiny.release_weights(len(tokenizer))
    image_reward_from_release(weights, tiny.image_reward_config(len(tokenizer))).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model", {name: tensor.double().numpy() for name, tensor in weights.items()}, tokenizer


def test_imagereward(reward_checkpoint: Any, images: Any) -> None:
    folder, weights, tokenizer = reward_checkpoint
    expected = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        prepared = shorter_side(image, lambda room: round(room / 2))
        pixels_CHW = ((np.asarray(prepared) / 255 - float64.MEAN) / float64.STD).transpose(2, 0, 1)
        tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=35)
        keep = tokens["attention_mask"]
        expected.append(float64.image_reward(pixels_CHW, tokens["input_ids"], keep, weights, tiny.HEADS, tiny.HEADS))
    assert len(tokenizer(PROMPTS[-1])["input_ids"]) > 35
    scores = ImageRewardScorer(str(folder)).score(images, PROMPTS)
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert np.std(scores) > 1e-3


def test_scores_depend_neither_on_the_batch_nor_on_its_order(
    clip_checkpoint: Any, reward_checkpoint: Any, images: Any
) -> None:
    for opened in (
        lambda size: ClipScorer("pickscore", str(clip_checkpoint[0]), size),
        lambda size: ImageRewardScorer(str(reward_checkpoint[0]), size),
    ):
        together = opened(64).score(images, PROMPTS)
        assert opened(1).score(images, PROMPTS) == pytest.approx(together, abs=1e-4)
        assert opened(3).score(images[::-1], PROMPTS[::-1])[::-1] == pytest.approx(together, abs=1e-4)
        assert opened(2).score([], []) == []


def test_crops_are_those_of_transformers_and_differ_by_a_rounded_half(images: Any) -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    theirs = processor(images, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(to_pixels(images, 32, crop_to_floor), theirs, atol=1e-5)
    image = Image.fromarray(np.arange(32 * 35 * 3, dtype=np.uint8).reshape(32, 35, 3))
    assert np.asarray(crop_to_floor(image, 32))[0, 0, 0] == 3
    assert np.asarray(crop_evenly(image, 32))[0, 0, 0] == 6


@pytest.mark.parametrize("size", [(10, 40), (40, 10), (32, 20), (1, 500), (7, 7)])
def test_padding_is_black_and_every_image_becomes_square(size: Any) -> None:
    square = pad_to_square(Image.new("RGB", size, "white"), 32)
    assert square.size == (32, 32)
    share = np.asarray(square).mean() / 255
    assert share == pytest.approx(min(size) / max(size), abs=0.05)


def test_files_of_another_kind_are_named(tmp_path: Path) -> None:
    torch.save({"state_dict": {"visual.class_embedding": torch.zeros(3)}}, tmp_path / "other.pt")
    with pytest.raises(JudgeError, match="checkpoint is of another model"):
        clip_from_open_clip(
            read_checkpoint(tmp_path / "other.pt"), tiny.clip_config(tiny.character_tokenizer(tmp_path / "t"))
        )
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(JudgeError, match="must hold named tensors, got list"):
        read_checkpoint(tmp_path / "list.pt")
    with pytest.raises(JudgeError, match=r"absent.pt cannot be read"):
        read_checkpoint(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("no archive")
    with pytest.raises(JudgeError, match="holds more than tensors, or none"):
        read_checkpoint(tmp_path / "text.pt")


class Malicious:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code of the file ran')",)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": Malicious()}}, tmp_path / "bad.pt")
    with pytest.raises(JudgeError, match="holds more than tensors") as caught:
        read_checkpoint(tmp_path / "bad.pt")
    assert "\n" not in str(caught.value)
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(JudgeError, match="holds more than tensors"):
        read_checkpoint(tmp_path / "bad.pkl")


def test_the_converter_says_what_is_wrong_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main(["hpsv2", str(tmp_path / "absent.pt"), str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_published_files_become_folders_that_score_the_same(
    clip_checkpoint: Any, reward_checkpoint: Any, images: Any, tmp_path: Path
) -> None:
    tokenizer = clip_checkpoint[2]
    torch.save({"state_dict": tiny.open_clip_weights(len(tokenizer)), "epoch": 3}, tmp_path / "hps.pt")
    config = json.loads((clip_checkpoint[0] / "config.json").read_text())
    convert.convert_hpsv2(tmp_path / "hps.pt", tmp_path / "hps", str(clip_checkpoint[0]), config)
    scores = ClipScorer("hpsv2", str(tmp_path / "hps")).score(images, PROMPTS)
    assert scores == pytest.approx(cosines(clip_checkpoint, images, PROMPTS, padded), abs=TOLERANCE)

    size = len(reward_checkpoint[2])
    torch.save(tiny.release_weights(size), tmp_path / "reward.pt")
    convert.convert_imagereward(
        tmp_path / "reward.pt", tmp_path / "reward", str(reward_checkpoint[0]), tiny.image_reward_config(size)
    )
    expected = ImageRewardScorer(str(reward_checkpoint[0])).score(images, PROMPTS)
    assert ImageRewardScorer(str(tmp_path / "reward")).score(images, PROMPTS) == pytest.approx(expected, abs=1e-6)


def test_a_folder_of_pickles_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    for metric in FORMULAS:
        with pytest.raises(JudgeError, match=r"preferences\.convert") as caught:
            ClipScorer(metric, str(tmp_path))
        assert "\n" not in str(caught.value)
    with pytest.raises(JudgeError, match=r"preferences\.convert imagereward"):
        ImageRewardScorer(str(tmp_path))


def test_agreement_is_the_references(shared_eval: Path) -> None:
    def cases(name: Any) -> Any:
        return json.loads((shared_eval / "oracles" / name).read_text())["cases"]

    for case in cases("pickscore_acc.json"):
        accuracy = agreement.pickscore_accuracy(case["labels_0"], case["probs"], case["threshold"])
        assert accuracy == pytest.approx(case["acc"], abs=1e-12)
    for case in cases("hpsv2_inversion.json"):
        score = agreement.inversion_score(case["pred"], case["gold"])
        assert score == pytest.approx(case["inversion_score"], abs=1e-12)


def test_imagereward_accuracy_counts_pairs_of_different_ranks() -> None:
    assert agreement.imagereward_accuracy([[1, 2, 2]], [[0.9, 0.5, 0.1]]) == 1.0
    assert agreement.imagereward_accuracy([[1, 2]], [[0.5, 0.5]]) == 0.0  # equal rewards are wrong
    assert agreement.imagereward_accuracy([[1, 2, 3], [2, 1]], [[3, 1, 2], [0, 1]]) == 3 / 4
    with pytest.raises(JudgeError, match="different ranks"):
        agreement.imagereward_accuracy([[1, 1]], [[0.1, 0.2]])
    with pytest.raises(JudgeError, match="as many"):
        agreement.inversion_score([1, 2], [1])


def test_public_checkpoints_on_a_closed_network_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for metric, formula in FORMULAS.items():
        with pytest.raises(JudgeError, match=f"{metric}: {formula.checkpoint} cannot be opened") as caught:
            ClipScorer(metric)
        assert "\n" not in str(caught.value)
    with pytest.raises(JudgeError, match="imagereward: THUDM/ImageReward cannot be opened"):
        ImageRewardScorer()
