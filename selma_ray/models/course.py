"""An image's own course through the denoising steps: its scheduler state, its noise and its latents.

Shapes: N images, C latent channels, H x W latent positions.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from selma_ray.errors import DrawingError

__all__ = ["Course", "Start"]


@dataclass(frozen=True, eq=False)
class Start:
    """An image where a course starts, in place of noise alone."""

    sample: Callable[[torch.Generator], torch.Tensor]
    """Draws the image's latents (1CHW) from the autoencoder's distribution."""
    strength: float
    """How much of the steps is taken, above 0 to 1."""
    mask: torch.Tensor | None = None
    """11HW: 1 where the image is drawn anew, 0 where it stays; default: all may change."""


class Course:
    """The latents of one image and where they stand, moved on by a scheduler instance of its own.

    `flow` holds what a flow-matching model's schedule depends on beside the number of steps (sigmas, mu); it is None for diffusion.
    With `start`, an image is noised up to where its strength says, and the last steps are taken from there; outside its mask every
    step ends at the noised image itself, as diffusers' inpainting by a model of 4 channels has it.
    Raises DrawingError for a number of steps that the scheduler cannot take, and for a strength that leaves none of them.
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
        start: Start | None = None,
    ) -> None:
        self._scheduler = type(scheduler).from_config(scheduler.config)
        self._is_flow = flow is not None
        self._set_timesteps(steps, flow or {})
        # The order in which diffusers' pipelines draw: the image's latents, the noise, then what the scheduler's steps draw.
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._image_NCHW = None if start is None else start.sample(self._generator)
        self._noise_NCHW = randn_tensor(shape_NCHW, generator=self._generator, device=device, dtype=dtype)
        self._mask_11HW = None if start is None else start.mask
        self._first = 0 if start is None else self._first_position(steps, start.strength)
        self._position = self._first
        self.latents_NCHW = self._initial_latents(start)
        if self._mask_11HW is not None:  # diffusers' pipelines also sample the latents of what is masked
            randn_tensor(shape_NCHW, generator=self._generator, device=device, dtype=dtype)
        accepted = inspect.signature(self._scheduler.step).parameters
        options = {"eta": 0.0, "generator": self._generator}
        self._step_options = {name: value for name, value in options.items() if name in accepted}
        self.estimate_NCHW = self.latents_NCHW
        """Where the course seems to lead: the finished latents as the last prediction has them, where the scheduler tells."""

    @property
    def finished(self) -> bool:
        """Tell whether every step is done."""
        return self._position >= len(self._scheduler.timesteps)

    @property
    def steps_done(self) -> int:
        """Return how many steps are done."""
        return self._position - self._first

    @property
    def steps_in_all(self) -> int:
        """Return how many steps the scheduler takes here, which for some is more than were asked for."""
        return len(self._scheduler.timesteps) - self._first

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
        estimate_NCHW = getattr(moved, "pred_original_sample", straight_NCHW)
        self._position += 1
        self.latents_NCHW = self._with_kept(moved.prev_sample, noised=not self.finished)
        self.estimate_NCHW = (
            self.latents_NCHW if estimate_NCHW is None else self._with_kept(estimate_NCHW, noised=False)
        )

    def _set_timesteps(self, steps: int, flow: Mapping[str, Any]) -> None:
        # Timesteps stay on the CPU: schedulers index their tables by them, and must not wait for the device to do so.
        try:
            self._scheduler.set_timesteps(steps, device="cpu", **flow)
            most = self._scheduler.config.num_train_timesteps
            possible = self._is_flow or bool(self._scheduler.timesteps.max() < most)
        except ValueError:
            possible = False
        if not possible:
            name = type(self._scheduler).__name__
            raise DrawingError(f"{steps} steps are not possible with {name}; ask for fewer", "steps")

    def _first_position(self, steps: int, strength: float) -> int:
        """Return where the last steps begin that a strength leaves, and tell the scheduler, rounding as diffusers' pipelines do."""
        skipped = int(steps - steps * strength) if self._is_flow else steps - int(steps * strength)
        first = skipped * self._scheduler.order
        if first >= len(self._scheduler.timesteps):
            raise DrawingError(
                f"strength {strength:g} leaves none of {steps} steps; ask for more of either", "strength"
            )
        if hasattr(self._scheduler, "set_begin_index"):
            self._scheduler.set_begin_index(first)
        return first

    def _initial_latents(self, start: Start | None) -> torch.Tensor:
        if start is None or (start.mask is not None and start.strength == 1):
            return self._noise_NCHW if self._is_flow else self._noise_NCHW * self._scheduler.init_noise_sigma
        return self._noised_image()

    def _noised_image(self) -> torch.Tensor:
        """Return the image that was started from with its noise at the next timestep."""
        timestep_1 = self.timestep[None]
        if hasattr(self._scheduler, "scale_noise"):
            return self._scheduler.scale_noise(self._image_NCHW, timestep_1, self._noise_NCHW)
        return self._scheduler.add_noise(self._image_NCHW, self._noise_NCHW, timestep_1)

    def _with_kept(self, latents_NCHW: torch.Tensor, noised: bool) -> torch.Tensor:
        """Return latents with the image itself outside the mask, at the next timestep where it is `noised`."""
        if self._mask_11HW is None:
            return latents_NCHW
        kept_NCHW = self._noised_image() if noised else self._image_NCHW
        return (1 - self._mask_11HW) * kept_NCHW + self._mask_11HW * latents_NCHW

    @property
    def _noise_level(self) -> float:
        """Return sigma of the next step of a flow: latents are (1 - sigma) image + sigma noise, the velocity leads to the noise."""
        return float(self.timestep) / self._scheduler.config.num_train_timesteps
