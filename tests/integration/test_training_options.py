"""Experts under Ray with what trainers' users expect together: images of two sizes, averaged weights, an early stop, a tracker."""

import sys
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle
from safetensors.torch import load_file

from selma_ray.adapters.config import LoraSettings
from selma_ray.cluster.config import ClusterConfig
from selma_ray.experts.config import CheckpointChoiceConfig, ExpertsConfig
from selma_ray.experts.launch import train_experts
from selma_ray.experts.plan import plan_experts
from selma_ray.models.config import ModelConfig
from selma_ray.storage import RunFolder
from selma_ray.tracking.tracker import PROJECT
from tests.unit.experts.rendered_images import write_images

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test's module

STEPS, EVERY = 40, 5
SIZES_PX = ((64, 64), (64, 32))  # width, height


class LikesTheFirst:
    """Stands for rendering and judging: every later adapter is worse."""

    def __call__(self, adapter_dir: str, skills: Any, show: Any = None) -> dict[str, Any]:
        assert load_file(Path(adapter_dir, "adapter_model.safetensors"))
        return {"dsg": 1 / int(adapter_dir.rsplit("-", 1)[1]), "images": 1}


@pytest.mark.filterwarnings("ignore")  # what MLflow's client and its database say to one another is not ours to change
def test_two_sizes_averaged_weights_an_early_stop_and_a_tracker_together(
    ray_cluster: Any, tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    for shard, size_px in enumerate(SIZES_PX):
        write_images(folder, "counting", 6, shard=shard, size_px=size_px)
    config = ExpertsConfig(
        lora=LoraSettings(rank=2, alpha=2), steps=STEPS, batch_size=4, precision="fp32", learning_rate=1e-3, ema=0.5,
        checkpoint_every_steps=EVERY, selection=CheckpointChoiceConfig(every_steps=EVERY), early_stop=2,
        trackers=("mlflow",),
    )  # fmt: skip
    model = ModelConfig(name=str(tiny_pipeline_dir))
    fitted = train_experts(
        folder, plan_experts(["counting"], config), model, 0, ClusterConfig(), score=LikesTheFirst()
    )["counting"]
    assert (fitted.step, fitted.steps, fitted.examples) == (EVERY, 3 * EVERY, 12)
    assert fitted.dev_dsg == pytest.approx(1 / EVERY)
    # Caches are one a shard, as batches are of one size.
    assert len([path for path in folder.files("cache") if path.endswith(".safetensors")]) == len(SIZES_PX)
    losses = {row["step"]: row["loss"] for row in folder.read_json("experts", "counting", "curve.json")}
    assert list(losses) == list(range(1, 3 * EVERY + 1))

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/run/mlflow/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name(PROJECT).experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    curves = {name: run.info.run_id for run in runs for name in ("train/loss", "dev/dsg") if name in run.data.metrics}
    shown = {each.step: each.value for each in client.get_metric_history(curves["train/loss"], "train/loss")}
    assert {step: shown[step] for step in losses} == pytest.approx(losses)
    scored = {each.step: each.value for each in client.get_metric_history(curves["dev/dsg"], "dev/dsg")}
    assert {step: scored[step] for step in (5, 10, 15)} == pytest.approx({5: 1 / 5, 10: 1 / 10, 15: 1 / 15})
