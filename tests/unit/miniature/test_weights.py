import os
import random
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from selma_ray.errors import ModelNotFoundError
from selma_ray.miniature import locate
from selma_ray.miniature.heldout import heldout_by_skill
from selma_ray.miniature.judge import MiniatureJudge
from selma_ray.miniature.pretrain.package import SIZE_LIMIT_MB
from selma_ray.miniature.questions import questions_for
from selma_ray.miniature.scenes import Group, Scene, render_scene


def test_the_pipeline_loads_and_draws() -> None:
    pipeline = DiffusionPipeline.from_pretrained(locate.text_to_image_dir())
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config["prediction_type"] == "v_prediction"
    names = [name for name, _ in pipeline.unet.named_modules()]
    for projection in ("to_q", "to_k", "to_v", "to_out.0"):
        assert any(name.endswith(f"attn2.{projection}") for name in names)
    image = pipeline("a red car", num_inference_steps=2, height=64, width=64).images[0]
    assert image.size == (64, 64)
    lengths = [len(pipeline.tokenizer(caption).input_ids) for caption in chain(*heldout_by_skill().values())]
    assert max(lengths) <= pipeline.tokenizer.model_max_length == 64
    assert pipeline.text_encoder.dtype == torch.float32


def test_the_weights_fit_their_limit() -> None:
    folder = locate.judge_dir().parent
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < SIZE_LIMIT_MB * 1e6
    assert (folder / "MODEL_CARD.md").read_text().startswith("# ")


def test_the_judge_tells_a_drawn_scene_from_another() -> None:
    judge = MiniatureJudge.from_pretrained(locate.judge_dir())
    caption = "two blue bananas to the left of a red car on a beach"
    questions = [question.question for question in questions_for(caption)]
    right = Scene((Group("banana", "blue", 2), Group("car", "red", 1)), "left_of", "beach")
    wrong = Scene((Group("hat", "green", 1),), None, "snow")
    states = judge.encode_images([render_scene(scene, random.Random(0)) for scene in (right, wrong)])
    yes, no = judge.probability_yes(states, [questions, questions])
    assert sum(yes) / len(yes) > 0.8
    assert sum(no) / len(no) < 0.3


def test_missing_models_name_their_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(locate, "_WEIGHTS", tmp_path)
    with pytest.raises(ModelNotFoundError, match="pretrain package"):
        locate.text_to_image_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(locate.metadata, "files", lambda name: None)  # type: ignore[attr-defined]
    with pytest.raises(ModelNotFoundError, match="pip install"):
        locate.llm_dir()


def test_the_language_model_is_unpacked_in_a_quiet_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(command: list[Any], env: dict[str, str], check: bool) -> None:
        assert command[1:3] == ["-m", "selma_ray.miniature.unpack_llm"]
        assert (env["TQDM_DISABLE"], env["DS_ACCELERATOR"], check) == ("1", "cpu", True)
        (command[-1] / "config.json").write_text("{}")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(locate, "_find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr("subprocess.run", run)
    assert (locate.llm_dir() / "config.json").exists()
    assert "DS_ACCELERATOR" not in os.environ
    assert "unpacked into" in caplog.text  # nothing else is said before the first stage


def test_the_language_model_is_made_once_and_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = []

    def convert(source: Any, target: Any) -> None:
        made.append(source)
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(locate, "_find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(locate, "_convert", convert)
    assert locate.llm_dir() == locate.llm_dir() == tmp_path / "selma_ray" / "smollm2-135m-instruct"
    assert len(made) == 1
