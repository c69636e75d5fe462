"""Training examples with noise on them, and what a denoiser should say of them, in whatever a model predicts.

Epsilon, v and a flow's velocity are all linear in the clean latents x0 at a given noised point: x0(p) = a(t) x_t - c(t) p, so that an error
of the prediction by d is an error of x0 by c d. A loss over x0 needs to know c alone.

Shapes: N examples, C latent channels, h x w latent pixels.
"""

from dataclasses import dataclass

import torch

from selma_ray.models.conditions import Condition

__all__ = ["Noised"]


@dataclass(frozen=True, eq=False)
class Noised:
    """Noised examples: what the denoiser is given, and what it should predict."""

    noisy: torch.Tensor
    """NChw."""
    timesteps: torch.Tensor
    """N."""
    conditioning: Condition
    target: torch.Tensor
    """Noise, v or velocity, as the model predicts it (NChw)."""
    clean_scale: torch.Tensor
    """c: by how much an error of the prediction is one of the clean latents (N)."""
