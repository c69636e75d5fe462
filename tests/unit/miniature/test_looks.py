"""LoRAs of looks are files as anyone's: our merge and diffusers' loader take them."""

import shutil
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from selma_ray.cli import main
from selma_ray.miniature.locate import text_to_image_dir
from selma_ray.miniature.looks import LOOKS, fit_look
from selma_ray.miniature.world import draw_caption


@pytest.fixture(scope="module")
def sepia(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_look("sepia", tmp_path_factory.mktemp("loras"), steps=2)


def test_a_look_changes_a_scene_and_not_its_size() -> None:
    scene = draw_caption("a green tree in a meadow", 0)
    looks = [look(scene) for look in LOOKS.values()]
    assert {(each.size, each.mode) for each in looks} == {(scene.size, "RGB")}
    assert len({each.tobytes() for each in [scene, *looks]}) == len(LOOKS) + 1


def test_diffusers_reads_the_file(sepia: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(text_to_image_dir())
    pipeline.load_lora_weights(sepia.parent, weight_name=sepia.name)
    assert pipeline.get_active_adapters()


def test_looks_are_merged_by_the_command_line(sepia: Path, tmp_path: Path) -> None:
    other = shutil.copy(sepia, tmp_path / "night.safetensors")
    out = tmp_path / "merged"
    assert main(["merge-adapters", str(sepia), str(other), "--base", "miniature", "--out", str(out)]) == 0
    modules = {key.partition(".lora")[0] for key in load_file(sepia)}
    merged = {key.partition(".lora")[0] for key in load_file(out / "pytorch_lora_weights.safetensors")}
    assert merged == modules
