"""Trackers with a client library of their own, which is loaded when one is opened. Keys come from the environment, and go nowhere else."""

import os
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from filelock import FileLock
from PIL import Image

from selma_ray.local_copies import scratch_folder
from selma_ray.tracking.tracker import PROJECT, TrackedRun

__all__ = ["MLFLOW_PLACE", "MlflowTracker", "TrackioTracker", "WandbTracker"]

MLFLOW_PLACE = "MLFLOW_TRACKING_URI"


class WandbTracker:
    """A run of Weights & Biases; the steps that a killed start logged after its last checkpoint are there twice.

    WANDB_API_KEY, WANDB_MODE, WANDB_PROJECT and WANDB_ENTITY are the client's own. Files lie in the run's folder, wandb/.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        directory = scratch_folder(run.folder)
        directory.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.key,
            group=run.group,
            dir=str(directory),
            config=dict(run.settings),
            resume="allow",
            reinit="create_new",  # experts are fitted one after another in one process
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Log a row of figures."""
        self._run.log({**figures, "step": step})

    def log_images(self, images: Mapping[str, Image.Image], step: int) -> None:
        """Log a panel of images."""
        panel = [self._wandb.Image(image, caption=caption) for caption, image in images.items()]
        self._run.log({"samples": panel, "step": step})

    def keep(self) -> None:
        """Do nothing: the client sends what it has by itself."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MlflowTracker:
    """A run of MLflow; steps that are logged again replace one another in its charts.

    MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME are the client's own; without the first, a database in the run's folder, mlflow/.
    """

    def __init__(self, run: TrackedRun) -> None:
        from mlflow.tracking import MlflowClient

        place, artifacts = os.environ.get(MLFLOW_PLACE), None
        directory = scratch_folder(run.folder, "mlflow")
        directory.mkdir(parents=True, exist_ok=True)
        if place is None:
            place, artifacts = f"sqlite:///{directory}/mlflow.db", directory.joinpath("artifacts").as_uri()
        with FileLock(directory / "opening.lock"):  # whoever comes first makes the tables and the experiment
            self._client = MlflowClient(tracking_uri=place)
            self._id = self._open(run, artifacts)

    def _open(self, run: TrackedRun, artifacts: str | None) -> str:
        client, name = self._client, os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        there = client.get_experiment_by_name(name)
        experiment = there.experiment_id if there else client.create_experiment(name, artifact_location=artifacts)
        found = client.search_runs([experiment], f"tags.selma_key = '{run.key}'", max_results=1)
        if found:
            client.update_run(found[0].info.run_id, status="RUNNING")
            return found[0].info.run_id
        tags = {"selma_key": run.key, "group": run.group}
        run_id = client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        for key, value in _flat(run.settings).items():
            client.log_param(run_id, key, value)
        return run_id

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Log a metric for each figure, in one call."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now_ms, step) for name, value in figures.items()])

    def log_images(self, images: Mapping[str, Image.Image], step: int) -> None:
        """Log images by number, and their captions beside them."""
        for number, image in enumerate(images.values()):
            self._client.log_image(self._id, image, key=f"sample_{number}", step=step)
        self._client.log_dict(
            self._id, {str(number): caption for number, caption in enumerate(images)}, f"captions-{step:06d}.json"
        )

    def keep(self) -> None:
        """Do nothing: nothing is buffered."""

    def close(self) -> None:
        """Finish the run."""
        self._client.set_terminated(self._id)


class TrackioTracker:
    """A run of trackio, on this machine or the server or space that its environment names; TRACKIO_DIR is its own."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self._trackio = trackio
        with redirect_stdout(StringIO()):  # it prints how to show it
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=f"{run.group}/{run.name}-{run.key[:8]}",
                group=run.group,
                config=dict(run.settings),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Log a row of figures."""
        self._run.log(dict(figures), step=step)

    def log_images(self, images: Mapping[str, Image.Image], step: int) -> None:
        """Log images by number, with their captions."""
        pictures = {
            f"samples/{number}": self._trackio.Image(image, caption=caption)
            for number, (caption, image) in enumerate(images.items())
        }
        self._run.log(pictures, step=step)

    def keep(self) -> None:
        """Do nothing: the client writes what it has by itself."""

    def close(self) -> None:
        """Finish the run."""
        with redirect_stdout(StringIO()):
            self._run.finish()


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return settings by dotted keys, as MLflow takes them."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat
