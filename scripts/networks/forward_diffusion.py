"""Forward diffusion of the image embedding, conditioned on the class (AutoMedSAM, section 3.2.1, Eqs. 4 and 5).

The noise is an argument, so that the network never draws: standard normal values of the embedding's shape, or None for
none. Both forms are closed; neither loops over time steps.
"""

import numpy as np
import torch


def noise_scale(timestep: torch.Tensor) -> torch.Tensor:
    """Standard deviation sigma_t = 1 / (t + 1) of the noise at steps t >= 1 (Eq. 4)."""
    return 1.0 / (timestep + 1.0)


def accumulated_noise_scale(steps: int) -> float:
    """Standard deviation of the sum of the noises of steps 1 to T: the root of the sum of 1 / (t + 1)^2."""
    return float(np.sqrt(np.sum(np.arange(2.0, steps + 2.0) ** -2)))


def diffuse_once(
    image_embedding: torch.Tensor, class_map: torch.Tensor, noise: torch.Tensor | None, timestep: torch.Tensor
) -> torch.Tensor:
    """Take one diffusion step from the image embedding: F_t = F_I + eps_t + c_expand (Eq. 5).

    Args:
        image_embedding: F_I `(N, 256, h, w)`.
        class_map: the projected class `(N, 1, h, w)`, spread over the channels.
        noise: standard normal values `(N, 256, h, w)`, or None for none.
        timestep: t `(N,)`, from 1 to T.

    Returns:
        F_t `(N, 256, h, w)`.
    """
    diffused = image_embedding + class_map
    if noise is None:
        return diffused
    return diffused + noise * noise_scale(timestep).reshape(-1, 1, 1, 1)


def diffuse_accumulated(
    image_embedding: torch.Tensor, class_map: torch.Tensor, noise: torch.Tensor | None, steps: int
) -> torch.Tensor:
    """Take T steps one after the other, as the authors' released code does in a loop, adding the class at each.

    The T noises are independent and Gaussian, so that their sum has the distribution of one draw:
    F_T = F_I + T c_expand + sqrt(sum of 1 / (t + 1)^2) z.

    Args:
        image_embedding: F_I `(N, 256, h, w)`.
        class_map: the projected class `(N, 1, h, w)`.
        noise: standard normal values z `(N, 256, h, w)`, or None for none.
        steps: T.

    Returns:
        F_T `(N, 256, h, w)`.
    """
    diffused = image_embedding + steps * class_map
    return diffused if noise is None else diffused + accumulated_noise_scale(steps) * noise
