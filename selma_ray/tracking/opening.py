"""Opening trackers by name, and refusing before a run what could not be opened in it."""

import os
from collections.abc import Sequence
from importlib.util import find_spec

from selma_ray.errors import ConfigError
from selma_ray.storage import RunFolder
from selma_ray.tracking.names import TrackerName
from selma_ray.tracking.tracker import TrackedRun, Tracker

__all__ = ["check_trackers", "open_tracker"]

_WANDB_KEY = "WANDB_API_KEY"


def check_trackers(names: Sequence[TrackerName], folder: RunFolder) -> None:
    """Raise ConfigError for a tracker whose client is not installed here, or that has no place or key to log to."""
    for name in names:
        if name != "tensorboard" and find_spec(name) is None:
            package = "trackio" if name == "trackio" else "'selma-ray[trackers]'"
            raise ConfigError(
                f"experts.trackers {name} needs its client; `pip install {package}` on every node, or leave it out"
            )
    if "mlflow" in names:
        _check_mlflow(folder)
    if "wandb" in names and not _wandb_can_log():
        raise ConfigError(
            f"experts.trackers wandb needs {_WANDB_KEY} in the environment of every node, or WANDB_MODE=offline; set one, or leave it out"
        )


def open_tracker(name: TrackerName, run: TrackedRun) -> Tracker:
    """Return an open curve in the tracker of that name."""
    match name:
        case "tensorboard":
            from selma_ray.tracking.tensorboard import TensorBoardTracker

            return TensorBoardTracker(run)
        case "wandb":
            from selma_ray.tracking.clients import WandbTracker

            return WandbTracker(run)
        case "mlflow":
            from selma_ray.tracking.clients import MlflowTracker

            return MlflowTracker(run)
        case "trackio":
            from selma_ray.tracking.clients import TrackioTracker

            return TrackioTracker(run)


def _check_mlflow(folder: RunFolder) -> None:
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return
    if not folder.is_local:
        raise ConfigError(
            f"experts.trackers mlflow needs MLFLOW_TRACKING_URI with {folder.uri}, which holds no database; name a server"
        )
    if find_spec("sqlalchemy") is None:
        raise ConfigError(
            "experts.trackers mlflow needs sqlalchemy for a database in the run's folder; install it, or set MLFLOW_TRACKING_URI"
        )


def _wandb_can_log() -> bool:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or os.environ.get(_WANDB_KEY):
        return True
    from netrc import NetrcParseError, netrc

    try:
        return netrc().authenticators(os.environ.get("WANDB_HOST", "api.wandb.ai")) is not None
    except (OSError, NetrcParseError):
        return False
