"""Square grids on the plane: their points, the log of a density's mass, the KL divergence of two densities."""

import torch
from torch import Tensor

LEAST_MASS, MOST_MASS = 0.99, 1.1  # of q, for `kl_on_grid`: less is cut off, more is a grid too coarse for q


def plane_grid(low: float = -4.0, high: float = 4.0, n: int = 201, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the points z (n, n, 2) of a square grid, z[i, j] = (z_1, z_2) with z_1 along columns, z_2 along rows.

    The grid is on the CPU, whatever the default device. Raises ValueError for n < 2 or low ≥ high.

    >>> plane_grid(-1, 1, 3)[0, 2].tolist()  # bottom right
    [1.0, -1.0]
    """
    if n < 2 or not low < high:
        raise ValueError(f"a grid needs n ≥ 2 and low < high, got n={n}, low={low}, high={high}")
    axis = torch.linspace(low, high, n, dtype=dtype, device="cpu")
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)


def log_mass(z: Tensor, log_density: Tensor) -> Tensor:
    """Return the log of ∫ exp(log_density), by the midpoint sum over a grid.

    Shapes: z (n, n, 2) from `plane_grid`, log_density (..., n, n); returns (...,), in nats. Raises ValueError for
    other shapes, and for points that are no such grid: those of a map, say, have no one cell.

    >>> z = plane_grid(-8, 8, 161)
    >>> abs(log_mass(z, -0.5 * (z**2).sum(-1) - 1.8378770664).item()) < 1e-9
    True
    """
    cell = cell_area(z, log_density)
    return torch.logsumexp(log_density.flatten(-2), dim=-1) + torch.log(cell)


def kl_on_grid(z: Tensor, log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return KL(q ‖ p) = ∫ q (log q − log p), by the midpoint sum over a grid, both renormalised to mass 1 on it.

    q is a density, and the grid must hold it: a KL divergence of what was cut off would be another number. p may come
    unnormalised, as log p(x|z) + log p(z) does; mass of p beyond the grid counts as none. So the result is never
    negative, and is 0 only for q = p.

    Shapes: z (n, n, 2) from `plane_grid`, log_q and log_p (..., n, n); returns (...,), in nats. Raises ValueError
    for other shapes, and where the sum of q over the grid is below 0.99 or above 1.1.

    >>> z = plane_grid(-8, 8, 161)
    >>> log_p = -0.5 * (z**2).sum(-1)
    >>> round(kl_on_grid(z, log_p - 1.8378770664, log_p - 0.5 * (z[..., 0] - 1) ** 2 + 0.5 * z[..., 0] ** 2).item(), 6)
    0.5
    """
    mass = log_mass(z, log_q).exp()
    if not bool(((mass >= LEAST_MASS) & (mass <= MOST_MASS)).all()):
        raise ValueError(
            f"log_q must be a density that z holds, of mass {LEAST_MASS} to {MOST_MASS}, got mass "
            f"{[round(one, 4) for one in mass.flatten().tolist()]}: take a wider grid, or a finer one"
        )
    cell_area(z, log_p)
    # Each cell's share of the mass: the cells are equal, so their area cancels.
    log_q, log_p = (torch.log_softmax(values.flatten(-2), dim=-1) for values in (log_q, log_p))
    q = log_q.exp()
    # where q is 0 its share is 0, even if log q is −∞
    return torch.where(q > 0, q * (log_q - log_p), 0.0).sum(dim=-1)


def cell_area(z: Tensor, *log_densities: Tensor) -> Tensor:
    """Return the area of a cell of the grid z (n, n, 2); log densities are to be (..., n, n).

    Raises TypeError for what is no tensor, ValueError for other shapes, and for points that are no such grid.
    """
    for name, values in (("z", z), *(("log_density", values) for values in log_densities)):
        if not isinstance(values, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(values).__name__}")
    if z.dim() != 3 or min(z.shape) < 2 or z.shape[-1] != 2 or any(v.shape[-2:] != z.shape[:2] for v in log_densities):
        shapes = ", ".join(str(tuple(values.shape)) for values in (z, *log_densities))
        raise ValueError(f"z must have shape (n ≥ 2, n ≥ 2, 2) and log_density (..., n, n), got {shapes}")
    step = (z[-1, -1] - z[0, 0]) / z.new_tensor([z.shape[1] - 1, z.shape[0] - 1])
    across, up = (z[0, 0, i] + step[i] * torch.arange(z.shape[1 - i]).to(z) for i in range(2))
    even = torch.stack(torch.meshgrid(across, up, indexing="xy"), dim=-1)
    if not bool(((z - even).abs() < 0.01 * step).all()):  # a point's place, not a step's length: steps could drift
        raise ValueError("z must be a grid as grid.plane_grid builds it: z[i, j] = (z_1[j], z_2[i]), rising evenly")
    return step.prod()
