"""An image's own course through the denoising steps: its scheduler state, its noise and its latents.

Shapes: N images, C latent channels, H x W latent positions.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from selma_ray.errors import DrawingError

__all__ = ["Course"]


class Course:
    """The latents of one image and where they stand, moved on by a scheduler instance of its own.

    `flow` holds what a flow-matching model's schedule depends on beside the number of steps (sigmas, mu); it is None for diffusion.
    Raises DrawingError for a number of steps that the scheduler cannot take.
    """

    def __init__(
        self,
        scheduler: Any,
        steps: int,
        seed: int,
        shape_NCHW: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        flow: Mapping[str, Any] | None = None,
    ) -> None:
        self._scheduler = type(scheduler).from_config(scheduler.config)
        self._is_flow = flow is not None
        # Timesteps stay on the CPU: schedulers index their tables by them, and must not wait for the device to do so.
        try:
            self._scheduler.set_timesteps(steps, device="cpu", **(flow or {}))
            possible = self._is_flow or bool(self._scheduler.timesteps.max() < scheduler.config.num_train_timesteps)
        except ValueError:
            possible = False
        if not possible:
            name = type(scheduler).__name__
            raise DrawingError(f"{steps} steps are not possible with {name}; ask for fewer", "steps")
        # The order in which diffusers' pipelines draw: first the initial noise, then what the scheduler's steps draw.
        self._generator = torch.Generator("cpu").manual_seed(seed)
        noise_NCHW = randn_tensor(shape_NCHW, generator=self._generator, device=device, dtype=dtype)
        self.latents_NCHW = noise_NCHW if self._is_flow else noise_NCHW * self._scheduler.init_noise_sigma
        accepted = inspect.signature(self._scheduler.step).parameters
        options = {"eta": 0.0, "generator": self._generator}
        self._step_options = {name: value for name, value in options.items() if name in accepted}
        self._position = 0
        self.estimate_NCHW = self.latents_NCHW
        """Where the course seems to lead: the finished latents as the last prediction has them, where the scheduler tells."""

    @property
    def finished(self) -> bool:
        """Tell whether every step is done."""
        return self._position >= len(self._scheduler.timesteps)

    @property
    def steps_done(self) -> int:
        """Return how many steps are done."""
        return self._position

    @property
    def steps_in_all(self) -> int:
        """Return how many steps the scheduler takes, which for some is more than were asked for."""
        return len(self._scheduler.timesteps)

    @property
    def timestep(self) -> torch.Tensor:
        """Return the timestep of the next step, a scalar on the CPU."""
        return self._scheduler.timesteps[self._position]

    def model_input(self) -> torch.Tensor:
        """Return the latents as the denoiser wants to see them at this timestep."""
        return (
            self.latents_NCHW if self._is_flow else self._scheduler.scale_model_input(self.latents_NCHW, self.timestep)
        )

    def advance(self, prediction_NCHW: torch.Tensor) -> None:
        """Take one step along the denoiser's prediction (epsilon, v, sample or velocity, as the scheduler's config says)."""
        straight_NCHW = self.latents_NCHW - self._noise_level * prediction_NCHW if self._is_flow else None
        moved = self._scheduler.step(prediction_NCHW, self.timestep, self.latents_NCHW, **self._step_options)
        self.latents_NCHW = moved.prev_sample
        estimate_NCHW = getattr(moved, "pred_original_sample", straight_NCHW)
        self.estimate_NCHW = moved.prev_sample if estimate_NCHW is None else estimate_NCHW
        self._position += 1

    @property
    def _noise_level(self) -> float:
        """Return sigma of the next step of a flow: latents are (1 - sigma) image + sigma noise, the velocity leads to the noise."""
        return float(self.timestep) / self._scheduler.config.num_train_timesteps
