"""The paper's four test densities, p(z) ∝ exp(−energy(z, i)).

Three of the four energies do not grow along z_1, so their mass is infinite. `log_target` therefore adds a soft wall
that is 0 inside [−4, 4]², the square on which the paper draws them.
"""

import math

import torch
from torch import Tensor

TARGETS = (1, 2, 3, 4)


def energy(z: Tensor, i: int) -> Tensor:
    """Return the energy U_i(z) of the paper's test density i, up to a constant −log p.

        1:  ½((‖z‖ − 2)/0.4)² − log(exp(−½((z_1 − 2)/0.6)²) + exp(−½((z_1 + 2)/0.6)²))
        2:  ½((z_2 − w_1)/0.4)²
        3:  −log(exp(−½((z_2 − w_1)/0.35)²) + exp(−½((z_2 − w_1 + w_2)/0.35)²))
        4:  −log(exp(−½((z_2 − w_1)/0.4)²) + exp(−½((z_2 − w_1 + w_3)/0.35)²))
        w_1 = sin(2π z_1/4),   w_2 = 3 exp(−½((z_1 − 1)/0.6)²),   w_3 = 3 sigmoid((z_1 − 1)/0.3)

    Shapes: z (..., 2); returns (...,), in nats. Raises ValueError for another i or another last size.

    Source: Rezende & Mohamed 2015, table 1. Derived in: notebooks/04_fitting_densities, section
    "Which densities shall we fit?".

    >>> energy(torch.tensor([[1.0, 1.0], [1.0, 1.4]]), 2)  # on the ridge z_2 = w_1, and one deviation above it
    tensor([0.0000, 0.5000])
    """
    if z.shape[-1:] != (2,):
        raise ValueError(f"z must have shape (..., 2), got {tuple(z.shape)}")
    if isinstance(i, bool) or i not in TARGETS:
        raise ValueError(f"i must be one of {TARGETS}, got {i!r}")
    z_1, z_2 = z.unbind(-1)
    if i == 1:
        ring = _half_square(torch.linalg.vector_norm(z, dim=-1) - 2, 0.4)
        return ring + _either(_half_square(z_1 - 2, 0.6), _half_square(z_1 + 2, 0.6))
    ridge = z_2 - torch.sin(2 * math.pi * z_1 / 4)  # z_2 − w_1
    if i == 2:
        return _half_square(ridge, 0.4)
    if i == 3:
        w_2 = 3 * torch.exp(-_half_square(z_1 - 1, 0.6))
        return _either(_half_square(ridge, 0.35), _half_square(ridge + w_2, 0.35))
    w_3 = 3 * torch.sigmoid((z_1 - 1) / 0.3)
    return _either(_half_square(ridge, 0.4), _half_square(ridge + w_3, 0.35))


def soft_wall(z: Tensor, half_width: float = 4.0, softness: float = 0.2) -> Tensor:
    """Return an energy that is 0 inside the square [−half_width, half_width]² and grows quadratically outside.

        wall(z) = ½ Σ_j (max(|z_j| − half_width, 0)/softness)²

    Its gradient is continuous and, at most, linear in z. Shapes: z (..., D); returns (...,), in nats.
    Raises ValueError unless both lengths are positive. Derived in: notebooks/04_fitting_densities, section
    "Why can three of them not be fitted as they stand?".

    >>> soft_wall(torch.tensor([[4.0, -4.0], [4.2, 0.0]]))  # on the edge, and one softness outside
    tensor([0.0000, 0.5000])
    """
    if not (half_width > 0 and softness > 0):
        raise ValueError(f"half_width and softness must be positive, got {half_width} and {softness}")
    return _half_square((z.abs() - half_width).clamp(min=0), softness).sum(dim=-1)


def log_target(z: Tensor, i: int) -> Tensor:
    """Return −energy(z, i) − soft_wall(z), the log of test density i on the walled square, not normalised.

    Its mass is finite for every i: `log_mass` of `grid` over [−6, 6]² gives its log.

    Shapes: z (..., 2); returns (...,), in nats. Raises ValueError as `energy`. Derived in:
    notebooks/04_fitting_densities, section "Why can three of them not be fitted as they stand?".

    >>> bool(log_target(torch.tensor([1.0, 1.0]), 2) == 0), bool(log_target(torch.tensor([9.0, 1.0]), 2) < -300)
    (True, True)
    """
    return -energy(z, i) - soft_wall(z)


def _half_square(distance: Tensor, scale: float) -> Tensor:
    """Return ½(distance/scale)², the energy of a Gaussian ridge of that deviation."""
    return 0.5 * (distance / scale) ** 2


def _either(first: Tensor, second: Tensor) -> Tensor:
    """Return −log(exp(−first) + exp(−second)), without underflow: low where either energy is low."""
    return -torch.logaddexp(-first, -second)
