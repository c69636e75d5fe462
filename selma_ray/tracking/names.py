"""The names of trackers, as a recipe gives them."""

from typing import Literal

__all__ = ["TrackerName"]

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
