"""Grids on the plane, and the paper's four test densities."""

import torch
from torch import Tensor


def plane_grid(low: float = -4.0, high: float = 4.0, n: int = 201, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the points z (n, n, 2) of a square grid, z[i, j] = (z_1, z_2) with z_1 along columns, z_2 along rows.

    >>> plane_grid(-1, 1, 3)[0, 2].tolist()  # bottom right
    [1.0, -1.0]
    """
    if n < 2 or not low < high:
        raise ValueError(f"a grid needs n ≥ 2 and low < high, got n={n}, low={low}, high={high}")
    axis = torch.linspace(low, high, n, dtype=dtype)
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)


def log_mass(z: Tensor, log_density: Tensor) -> Tensor:
    """Return the log of ∫ exp(log_density) by the midpoint sum over a grid z (n, n, 2); log_density (..., n, n), in nats.

    >>> z = plane_grid(-8, 8, 161)
    >>> abs(log_mass(z, -0.5 * (z**2).sum(-1) - 1.8378770664).item()) < 1e-9
    True
    """
    cell = (z[0, 1, 0] - z[0, 0, 0]) * (z[1, 0, 1] - z[0, 0, 1])
    return torch.logsumexp(log_density.flatten(-2), dim=-1) + torch.log(cell)
