from pathlib import Path
from typing import Any

import pytest

from selma_ray.cli.show_plan import show_plan
from selma_ray.experts.config import ExpertsConfig
from selma_ray.models.cost import TrainingCost
from selma_ray.plan.estimate import plan_recipe, training_memory_bytes
from selma_ray.run.recipe import load_recipe

DEMO = Path(__file__).parents[3] / "jobs" / "recipes" / "demo.yaml"
COST = TrainingCost(
    parameters=1000, lora_parameters=100, block_parameters=800, cached_bytes=1,
    activation_bytes=400, checkpointed_bytes=200, forward_flops=1, step_flops=2
)  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"precision": "fp32"}, 4 * 1100 + 4 * 100 + 8 * 100 + 8 * 400 + 4 * 100),
        ({"precision": "bf16"}, 2 * 1100 + 2 * 100 + 12 * 100 + 8 * 200 + 2 * 100),
        ({"precision": "bf16", "micro_batch_size": 2}, 2 * 1100 + 2 * 100 + 12 * 100 + 2 * 200 + 2 * 100),
        ({"precision": "bf16", "gradient_checkpointing": True}, 2 * 1100 + 2 * 100 + 12 * 100 + 8 * 100 + 2 * 100),
        ({"precision": "bf16", "base_weights": "int8"}, 2 * 300 + 800 + 2 * 100 + 12 * 100 + 8 * 200 + 2 * 100),
        ({"precision": "bf16", "base_weights": "nf4"}, 2 * 300 + 450 + 2 * 100 + 12 * 100 + 8 * 200 + 2 * 100),
        ({"precision": "bf16", "workers_per_expert": 2, "zero_stage": 0}, 2 * 1100 + 2 * 100 + 12 * 100 + 4 * 200),
        (
            {"precision": "bf16", "workers_per_expert": 2, "zero_stage": 1},
            2 * 1100 + 2 * 100 + 6 * 100 + 4 * 200 + 2 * 100,
        ),
        (
            {"precision": "bf16", "workers_per_expert": 2, "zero_stage": 2},
            2 * 1100 + 1 * 100 + 6 * 100 + 4 * 200 + 2 * 100,
        ),
        (
            {"precision": "bf16", "workers_per_expert": 2, "zero_stage": 3},
            1 * 1100 + 1 * 100 + 6 * 100 + 4 * 200 + 2 * 100,
        ),
    ],
)
def test_a_worker_s_memory_is_what_it_holds(settings: Any, expected: Any) -> None:
    assert training_memory_bytes(COST, ExpertsConfig(batch_size=8, **settings)) == expected


ONE_IMAGE = ["images.per_prompt=1", "images.selection=null"]


@pytest.fixture
def recipe(tiny_pipeline_dir: Path) -> Any:
    return load_recipe(DEMO, [f"model.name={tiny_pipeline_dir}", "evaluation.suite=nowhere.jsonl", *ONE_IMAGE])


def test_work_and_storage_grow_with_the_recipe(recipe: Any, tiny_pipeline_dir: Path) -> None:
    stages = {stage.name: stage for stage in plan_recipe(recipe).stages}
    larger = load_recipe(
        DEMO,
        [
            f"model.name={tiny_pipeline_dir}",
            "experts.steps=200",
            "images.per_prompt=3",
            "images.selection=null",
            "experts.mixed={ranks: [16]}",
        ],
    )
    after = {stage.name: stage for stage in plan_recipe(larger).stages}
    assert after["experts"].pflop == pytest.approx(2 * 6 / 5 * stages["experts"].pflop)
    assert after["images"].pflop == pytest.approx(3 * stages["images"].pflop)
    assert after["cache"].storage_bytes == pytest.approx(3 * stages["cache"].storage_bytes)
    assert stages["images"].storage_bytes == 5 * 38 * 3 * 64 * 64
    assert stages["evaluation"].pflop is None
    assert after["evaluation"].pflop > 0


def test_preferences_take_both_images_of_a_pair_and_the_base_model(recipe: Any, tiny_pipeline_dir: Path) -> None:
    plain = {stage.name: stage for stage in plan_recipe(recipe).stages}
    fitted_to_pairs = load_recipe(
        DEMO,
        [
            f"model.name={tiny_pipeline_dir}",
            "images.per_prompt=4",
            "images.selection={judge: miniature}",
            "experts.dpo={}",
        ],
    )
    after = {stage.name: stage for stage in plan_recipe(fitted_to_pairs).stages}
    assert 2 < after["experts"].pflop / plain["experts"].pflop < 4
    assert after["cache"].storage_bytes == pytest.approx(2 * plain["cache"].storage_bytes)
    assert after["experts"].memory_bytes > plain["experts"].memory_bytes


def test_the_plan_is_shown(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(recipe, tflops=28)
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("images", "experts", "merging", "serving", "suite nowhere.jsonl"))


def test_planning_runs_and_writes_nothing(recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from selma_ray.cli import main

    words = ["plan", str(DEMO), f"model.name={recipe.model.name}", f"run_dir={tmp_path / 'run'}", "--tflops", "100"]
    assert main(words) == 0
    assert "Hours at 100 TFLOP/s" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_the_plan_says_what_fits_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    from selma_ray.cli import main

    words = ["plan", str(DEMO.with_name("sdxl.yaml")), "evaluation.suite=nowhere.jsonl", "--gpu-memory"]
    assert main([*words, "48"]) == 0
    assert "does not fit" not in capsys.readouterr().out
    assert main([*words, "24"]) == 2
    shown = capsys.readouterr()
    assert "does not fit" in shown.out
    assert "set experts.gradient_checkpointing=true" in shown.err


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "fast"])
def test_a_rate_that_is_no_rate_is_refused(rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    from selma_ray.cli import main

    with pytest.raises(SystemExit, match="2"):
        main(["plan", str(DEMO), "--tflops", rate])
    assert "--tflops" in capsys.readouterr().err


def test_the_plan_of_a_study_counts_what_it_makes(tiny_pipeline_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from selma_ray.cli import main

    assert (
        main(["plan", "jobs/recipes/miniature_study.yaml", f"model.name={tiny_pipeline_dir}", "study.seeds=[0]"]) == 0
    )
    assert "The study: 9 runs in all, what they share made once: " in capsys.readouterr().out


def stages_of(recipe: Any) -> dict[str, Any]:
    return {stage.name: stage for stage in plan_recipe(recipe).stages}


def test_rounds_of_an_expert_draw_learn_and_keep(tiny_pipeline_dir: Path) -> None:
    words = [f"model.name={tiny_pipeline_dir}", "evaluation.suite=nowhere.jsonl", *ONE_IMAGE, "experts.batch_size=6"]
    nft = "rounds: 4, prompts_per_round: 3, images_per_prompt: 2"
    plain = stages_of(load_recipe(DEMO, [*words, "experts.steps=4"]))["experts"]
    drawn, guided, twice = (
        stages_of(load_recipe(DEMO, [*words, f"experts.nft={{{nft}, {more}}}"]))["experts"]
        for more in ("sampling_steps: 10", "sampling_steps: 10, guidance_scale: 2", "sampling_steps: 20")
    )
    images = 5 * 4 * 3 * 2
    assert f"{images} images in rounds" in drawn.note
    # The second prediction of a guided step takes what ten steps more take.
    assert guided.pflop == twice.pflop > drawn.pflop > plain.pflop
    an_image = (twice.pflop - drawn.pflop) / images / 10
    assert drawn.pflop - plain.pflop == pytest.approx(images * (10 + 1) * an_image), "ten steps, and the old adapter's"
    kept = drawn.storage_bytes - plain.storage_bytes - images * 3 * 64 * 64
    assert kept == 5 * 4 * 4 * plan_recipe(load_recipe(DEMO, words)).lora_parameters


def test_a_student_draws_and_is_taught(tiny_pipeline_dir: Path) -> None:
    def merging(**distil: Any) -> float:
        settings = {"steps": 2, "prompts_per_skill": 3, "states_per_image": 4, "sampling_steps": 10} | distil
        words = [f"merging.distil.{key}={value}" for key, value in settings.items()]
        stage = stages_of(load_recipe(DEMO, [*common, "merging.method=distil", *words]))["merging"]
        assert f"{2 * 5 * 3} images of a student" in stage.note
        return float(stage.pflop)

    common = [f"model.name={tiny_pipeline_dir}", "evaluation.suite=nowhere.jsonl", *ONE_IMAGE]
    an_image = (merging(sampling_steps=11) - merging()) / 30
    assert merging(anchor=0.5) - merging() == pytest.approx(30 * 4 * an_image)
    assert merging(teacher_guidance_scale=2) - merging() == pytest.approx(30 * 4 * an_image)
    assert merging(states_per_image=5) - merging() > 2 * 30 * an_image, "a loss with its gradient, and the teacher"
    assert stages_of(load_recipe(DEMO, common))["merging"].pflop is None


def test_rounds_of_the_loop_take_its_stages_again(tiny_pipeline_dir: Path) -> None:
    words = [f"model.name={tiny_pipeline_dir}", "evaluation.suite=nowhere.jsonl", "prompts.dev_fraction=0.1"]
    once, thrice = (stages_of(load_recipe(DEMO, [*words, f"rounds={rounds}"])) for rounds in (1, 3))
    for name in ("images", "experts"):
        assert thrice[name].pflop == pytest.approx(3 * once[name].pflop)
        assert thrice[name].storage_bytes == pytest.approx(3 * once[name].storage_bytes)
    assert thrice["evaluation"] == once["evaluation"]
