"""Experts under Ray: encoded, trained at once, finished once, resumed after a kill, and one failing alone."""

import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from ray import cloudpickle
from safetensors.torch import load_file

from selma_ray.adapters.config import LoraSettings
from selma_ray.adapters.mixture_of_experts import load_mixture
from selma_ray.cluster.config import ClusterConfig
from selma_ray.errors import JudgeError, TrainingError
from selma_ray.experts.config import CheckpointChoiceConfig, ExpertsConfig
from selma_ray.experts.launch import train_experts
from selma_ray.experts.plan import PlannedExpert, plan_experts
from selma_ray.models.config import ModelConfig
from selma_ray.models.family import open_family
from selma_ray.storage import RunFolder
from tests.unit.experts.rendered_images import write_images

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test's module

CONFIG = ExpertsConfig(
    lora=LoraSettings(rank=4, alpha=4),
    steps=40,
    batch_size=4,
    learning_rate=1e-2,
    precision="fp32",
    checkpoint_every_steps=10,
)


def planned(config: ExpertsConfig = CONFIG, *, mixed: bool = False) -> list[PlannedExpert]:
    """One expert on a skill, and one on two skills together."""
    both = [PlannedExpert("mixed", ("counting", "style"), config)] if mixed else []
    return [PlannedExpert("counting", ("counting",), config), *both]


@pytest.fixture(scope="module")
def model(tiny_pipeline_dir: Path) -> ModelConfig:
    return ModelConfig(name=str(tiny_pipeline_dir))


@pytest.fixture(scope="module")
def run(ray_cluster: Any, model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run whose experts were trained at once, with the progress that was told."""
    folder = RunFolder(str(tmp_path_factory.mktemp("run")))
    for skill in ("counting", "style"):
        write_images(folder, skill, 5)
        write_images(folder, skill, 2, shard=1)
    told: list[Any] = []
    results = train_experts(folder, planned(mixed=True), model, 0, ClusterConfig(), told.append)
    return folder, results, told


def copy_of(folder: RunFolder, target: Path) -> RunFolder:
    """Return a run with the same images and caches, and no experts."""
    for name in ("images", "cache"):
        shutil.copytree(folder.local_path(name), target / name)
    return RunFolder(str(target))


def files_of(folder: RunFolder) -> dict[str, int]:
    return {path: folder.local_path(path).stat().st_mtime_ns for path in folder.files("experts")}


def noise_prediction(denoiser: Any) -> torch.Tensor:
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return denoiser(latents, torch.tensor([500]), encoder_hidden_states=torch.ones(1, 77, 32)).sample


def test_each_expert_changes_the_denoiser_in_its_own_way(run: Any, model: ModelConfig) -> None:
    folder, results, _ = run
    denoisers = {name: open_family(model).load_denoiser() for name in results}
    base = noise_prediction(open_family(model).load_denoiser())
    outputs = [
        noise_prediction(PeftModel.from_pretrained(denoiser, folder.path("experts", name)))
        for name, denoiser in denoisers.items()
    ]
    assert not torch.allclose(base, outputs[0], atol=1e-4)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-4)


def test_results_and_progress_tell_what_was_done(run: Any) -> None:
    folder, results, told = run
    assert {name: (result.steps, result.examples) for name, result in results.items()} == {
        "counting": (40, 7),
        "mixed": (40, 14),
    }
    done = [progress.done for progress in told]
    assert done == sorted(done)
    assert (done[-1], told[-1].total) == (80, 80)
    names = {Path(path).name for path in folder.files("experts", "mixed")}
    assert {name for name in names if not name.startswith("events.out.tfevents")} == {
        "adapter_config.json", "adapter_model.safetensors", "curve.json", "result.json"
    }  # fmt: skip


def test_tensorboard_shows_the_curve(run: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _, _ = run
    events = EventAccumulator(folder.path("experts", "mixed", "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    curve = [(row["step"], pytest.approx(row["loss"])) for row in folder.read_json("experts", "mixed", "curve.json")]
    assert shown == curve


def test_a_finished_run_does_nothing(run: Any, model: ModelConfig) -> None:
    folder, results, _ = run
    before = files_of(folder)
    assert train_experts(folder, planned(mixed=True), model, 0, ClusterConfig()) == results
    assert files_of(folder) == before


def test_a_worker_killed_at_its_second_expert_ends_with_the_same_weights(
    run: Any, model: ModelConfig, tmp_path: Path
) -> None:
    """In the run before, the experts were fitted at once; here they take turns in one process."""
    folder, _, _ = run
    second = copy_of(folder, tmp_path / "killed")
    killer = threading.Thread(target=_kill_worker_after_step, args=(second, "mixed", 12), daemon=True)
    killer.start()
    config = CONFIG.model_copy(update={"max_concurrent": 1, "max_failures": 1})
    train_experts(second, planned(config, mixed=True), model, 0, ClusterConfig())
    killer.join(timeout=1)
    assert not killer.is_alive()
    for name in ("counting", "mixed"):
        for file in ("adapter_model.safetensors", "curve.json"):
            assert second.read_bytes("experts", name, file) == folder.read_bytes("experts", name, file)
    assert not [path for path in second.files("experts") if "checkpoints" in path]


def test_one_expert_s_failure_does_not_stop_the_others(run: Any, model: ModelConfig, tmp_path: Path) -> None:
    folder, _, _ = run
    second = copy_of(folder, tmp_path / "failing")
    shard = next(path for path in second.files("cache", suffix=".safetensors") if "/style/" in path)
    second.write_bytes(second.read_bytes(shard)[:-5], shard)
    config = CONFIG.model_copy(update={"max_concurrent": 1, "max_failures": 0})
    with pytest.raises(
        TrainingError, match=r"1 expert\(s\) could not be fitted \(style: .*whole shard.*run again"
    ) as error:
        train_experts(second, plan_experts(["style", "counting"], config), model, 0, ClusterConfig())
    assert "\n" not in str(error.value)
    assert second.exists("experts", "counting", "adapter_config.json")
    assert not second.exists("experts", "style", "adapter_config.json")


class LikesStep20:
    """Stands for rendering and judging: likes the adapter of step 20 best, and fails where it is told to."""

    def __init__(self, failing_skill: str | None = None) -> None:
        self.failing_skill = failing_skill

    def __call__(self, adapter_dir: Any, skills: Any, show: Any = None) -> Any:
        assert load_file(Path(adapter_dir, "adapter_model.safetensors"))
        if self.failing_skill in skills:
            raise JudgeError("the judge has no voice")
        return {"dsg": 0.9 if adapter_dir.endswith("step-000020") else 0.5, "images": 3}


def test_the_best_adapter_is_kept_and_a_judge_s_failure_spares_the_others(
    run: Any, model: ModelConfig, tmp_path: Path
) -> None:
    folder, _, _ = run
    second = copy_of(folder, tmp_path / "chosen")
    experts = plan_experts(
        ["counting", "style"], CONFIG.model_copy(update={"selection": CheckpointChoiceConfig(every_steps=20)})
    )
    with pytest.raises(TrainingError, match=r"1 expert\(s\) could not be fitted \(style: .*the judge has no voice"):
        train_experts(second, experts, model, 0, ClusterConfig(), score=LikesStep20(failing_skill="style"))
    assert not second.exists("experts", "style", "adapter_config.json")
    result = second.read_json("experts", "counting", "result.json")
    assert (result["step"], result["dev_dsg"], result["steps"]) == (20, 0.9, 40)
    weights = ("experts", "counting", "adapter_model.safetensors")
    assert second.read_bytes(*weights) != folder.read_bytes(*weights)

    seconds = second.read_json("experts", "style", "result.json")["seconds"]
    results = train_experts(second, experts, model, 0, ClusterConfig(), score=LikesStep20())
    assert (results["style"].step, results["counting"].step) == (20, 20)
    assert results["style"].seconds == seconds, "what was fitted is scored, not fitted again"


def test_a_mixture_is_fitted_when_its_experts_are_finished(run: Any, model: ModelConfig, tmp_path: Path) -> None:
    """The experts are those of the run, which are left as they are; a second start finds the mixture finished."""
    folder, results, _ = run
    second = RunFolder(str(tmp_path / "mixture"))
    for name in ("images", "cache", "experts"):
        shutil.copytree(folder.local_path(name), second.local_path(name))
    before = files_of(second)
    config = CONFIG.model_copy(update={"steps": 5})
    experts = [*planned(mixed=True), PlannedExpert("moe", ("counting", "style"), config, ("counting", "mixed"))]
    fitted = train_experts(second, experts, model, 0, ClusterConfig())
    assert {name: fitted[name] for name in results} == results
    assert (fitted["moe"].steps, fitted["moe"].examples) == (5, 14)
    after = files_of(second)
    assert {name: after[name] for name in before} == before
    denoiser = open_family(model).load_denoiser()
    base = noise_prediction(denoiser)
    load_mixture(denoiser, second.path("experts", "moe"))
    assert not torch.allclose(noise_prediction(denoiser), base, atol=1e-4)
    assert train_experts(second, experts, model, 0, ClusterConfig()) == fitted
    assert files_of(second) == after


@pytest.mark.heavy
def test_two_workers_give_what_one_gives(run: Any, model: ModelConfig, tmp_path: Path) -> None:
    """Gradients are summed in another order: 40 steps drew weights of 0.2 on average apart by at most 2e-5 when it was measured."""
    folder, _, _ = run
    second = copy_of(folder, tmp_path / "two")
    train_experts(second, planned(CONFIG.model_copy(update={"workers_per_expert": 2})), model, 0, ClusterConfig())
    one, two = (
        load_file(each.local_path("experts", "counting", "adapter_model.safetensors")) for each in (folder, second)
    )
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-4)


def _kill_worker_after_step(folder: RunFolder, name: str, step: int) -> None:
    while (
        not folder.exists("experts", name, "progress.json")
        or folder.read_json("experts", name, "progress.json")["step"] < step
    ):
        time.sleep(0.05)
    for process in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            process.kill()
