"""The truth about one image under a model with D = 2: log p(x) and p(z|x), by sums over lattices of the plane.

Nothing here trains a model or looks at its encoder, except to lay a grid around q0 and qK. Values are per image, in
nats, and computed in the model's own precision, in eval() mode.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from planar_helpers.grid import log_mass, plane_grid
from planar_helpers.planar import check_int, identity_u
from planar_helpers.vae import FlowPosterior, PlanarVAE, check_model, check_no_gradient, evaluating

TURN = 0.6  # radians of the lattices against the axes: a kink parallel to an axis then meets them at every phase
ROTATION = ((math.cos(TURN), math.sin(TURN)), (-math.sin(TURN), math.cos(TURN)))
HALF_WIDTH = 8.0  # of a square; the first is centred at the origin, the others tile the plane around it
SPACING = 0.1  # of a square's coarse lattice; level l has SPACING / 2^l
PER_SIDE = round(2 * HALF_WIDTH / SPACING)  # points
MAX_LEVEL = 5
# A cell is refined if a value at it is within so many nats of the image's largest one: at a deviation of 0.01 the
# peak may stand 25 nats above its neighbours on the coarse lattice, 6 on the next, 1.6 on the one after.
KEEP = (30.0, 24.0, 20.0, 18.0, 18.0, 18.0)
TOLERANCE = 0.02  # nats: the error at which refinement ends
LOOK_SPACING = 0.4  # of the lattice beyond the first square
FARTHEST = 72.0  # radius, a whole number of squares: nothing is looked at beyond
BEYOND = 12.0  # nats: mass that is certainly smaller than exp(−12) of what was found is not looked for
ROUNDING = 8  # units in the last place of log p(x)
AT_ONCE = 6_000_000  # pairs of a cell and an image: those of 20 000 images at most
TOPS = 4  # candidates for the main island, in each square


class LogPx(NamedTuple):
    """An estimate of log p(x) per image, and its own error: both (B,), in nats."""

    log_px: Tensor
    error: Tensor


class PosteriorGrid(NamedTuple):
    """One image on a grid z (n, n, 2): log p(z|x), log q0(z) and log qK(z), each (n, n), in nats."""

    z: Tensor
    log_posterior: Tensor
    log_q0: Tensor
    log_qK: Tensor

    @property
    def mass(self) -> Tensor:
        """How much of p(z|x), q0 and qK the grid holds, (3,): 1 each, unless the grid is too small or too coarse."""
        return log_mass(self.z, torch.stack(self[1:])).exp()


@contextlib.contextmanager
def measuring(model: PlanarVAE) -> Iterator[None]:
    """As `evaluating`, without gradients; what is computed can be used anywhere, inference mode or not."""
    with torch.inference_mode(False), torch.no_grad(), evaluating(model):
        yield


def exact_log_px(model: PlanarVAE, x: Tensor, tolerance: float = TOLERANCE) -> LogPx:
    """Integrate log p(x) = log ∫ p(x|z) p(z) dz over the plane, by sums over ever finer lattices.

    Start from spacing 0.1 on [−8, 8]²; keep the cells with a corner within 30 nats of the image's largest value; halve
    the spacing inside them, once always and then until the error is below `tolerance`, at most to 0.003. That resolves
    deviations down to 0.01. The error of such a sum falls faster than any power of the spacing if p(x, z) is smooth; a
    ReLU decoder has kinks, and it falls as spacing². The lattices are turned by 0.6 rad against the axes, so that a
    kink parallel to an axis meets them at every phase.

    What lies outside is bounded: p(x|z) ≤ exp(−H), H = −Σ_i [x_i log x_i + (1 − x_i) log(1 − x_i)], so at most
    exp(−H − R²/2) of p(x) comes from ‖z‖ > R. Up to the R where that is negligible, at most 72, a lattice of spacing
    0.4 is looked at; squares of width 16 in which it finds a value worth adding are integrated as the first one.

    The error is what the lattice says of itself: the largest disagreement between it and the four lattices of twice
    the spacing that it consists of, at least a sixteenth of the error of the level before (they may agree by symmetry,
    but not twice running), plus rounding, plus the bound for what lies beyond the look. It is an estimate, and mostly
    several times too large. Not covered: a spike between the points of a lattice, much narrower than 0.05 in the first
    square or than 0.2 outside it, in a place where the lattice shows next to nothing.

    Shapes: x (B, d_x); log_px and error (B,), in nats. Weights that are not finite give NaN. Memory does not grow
    with B. Raises ValueError for D ≠ 2, and for bad pixels as `PlanarVAE.encode`. Derived in:
    notebooks/07_train_the_vae, section "How far is the bound from the truth?".
    """
    check_plane(model, x, "exact_log_px")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance!r}")
    with measuring(model):
        return _exact_log_px(model, x, tolerance)


def posterior_grid(model: PlanarVAE, x: Tensor, n: int = 201) -> PosteriorGrid:
    """Return the true posterior of one image, q0 and qK on a common square grid that holds them all.

        log p(z|x) = log p(x|z) + log p(z) − log p(x);     log qK(z) = log q0(f⁻¹(z)) − Σ ladj, by `planar_inverse`

    The result's `mass` says how much of each it does hold.

    Shapes: x (1, d_x) or (d_x,); z (n, n, 2) as `grid.plane_grid`. Raises ValueError for D ≠ 2 or more than one image.
    """
    check_int("n", n, least=2)
    x = x.unsqueeze(0) if isinstance(x, Tensor) and x.dim() == 1 else x
    check_plane(model, x, "posterior_grid")
    if x.shape[0] != 1:
        raise ValueError(f"x must be one image of shape ({model.d_x},) or (1, {model.d_x}), got {tuple(x.shape)}")
    with measuring(model):
        posterior, island, log_px = (
            model.encode(x),
            _main_island(model, x, K=0),
            _exact_log_px(model, x, TOLERANCE).log_px,
        )
        with repeatable(x, seed=0):
            zK = posterior.rsample((2000,))[0].squeeze(1)
        boxes = [
            *((q.mu[0], torch.exp(0.5 * q.logvar[0])) for q in (posterior, island)),
            _mean_and_deviation(model, x),
            (zK.mean(0), zK.std(0)),
        ]
        low, high = torch.stack([centre + s * width for centre, width in boxes for s in (-3.5, 3.5)]).aminmax(dim=0)
        z = (low + high) / 2 + (high - low).max() / 2 * plane_grid(-1, 1, n, x.dtype).to(x.device)
        return PosteriorGrid(
            z,
            model._log_joint(x, z.unsqueeze(-2)).squeeze(-1) - log_px,
            posterior.without_steps().log_prob(z.unsqueeze(-2)).squeeze(-1),
            posterior.double().log_prob(z.double().unsqueeze(-2)).squeeze(-1).to(x),
        )


def main_island(model: PlanarVAE, x: Tensor, K: int | None = None) -> FlowPosterior:
    """Return a Gaussian on the main island of each image's exact posterior, with K steps that do nothing yet.

    The main island is the one of most mass. Candidates are the highest points of a coarse lattice, those of most mass
    within ±0.5 first, at least 0.5 apart. μ and σ are the exact posterior's mean and deviations there: sums over five
    grids, each four of the deviations found before to either side. The last also gives the island's mass. The steps
    have û = 0, w random in units of 1/σ (seeded), and hyperplanes through μ. K is the model's unless given; a family
    without planar steps has none, and a full covariance starts with no shear.

    So it is a start for `own_posterior` that lies where the posterior does, whatever the encoder says.

    Shapes: x (B, d_x); the result's as `FlowPosterior`. Raises ValueError for D ≠ 2 or K < 0. Derived in:
    notebooks/08_exact_posterior, section "What can the family do?".
    """
    check_plane(model, x, "main_island")
    K = (model.K if model.family == "planar" else 0) if K is None else K
    check_int("K", K, least=0)
    with measuring(model):
        return _main_island(model, x, K)


def check_plane(model: PlanarVAE, x: Tensor, name: str) -> None:
    """Raise TypeError or ValueError unless the model's latent space is a plane and x can be measured under it."""
    check_model(model)
    if model.D != 2:
        raise ValueError(f"{name} integrates over a plane: D must be 2, got {model.D} (importance_log_px takes any D)")
    check_no_gradient(x)
    model.check_images(x)


@contextlib.contextmanager
def repeatable(x: Tensor, seed: int) -> Iterator[None]:
    """Draw as after manual_seed(seed) on the device of x; afterwards the caller's random stream goes on as before."""
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        yield


def _exact_log_px(model: PlanarVAE, x: Tensor, tolerance: float) -> LogPx:
    groups, beyond = _squares(model, x)
    log_px, error = torch.full_like(beyond, -torch.inf), torch.zeros_like(beyond)
    for lattices, which in groups:
        log_px[which], error[which] = _integrate(model, x[which], lattices, tolerance)
    # plus log(1 + what may lie beyond the look, as a share of what was found)
    return LogPx(log_px.to(x), (error + F.softplus(beyond - log_px)).to(x))


def _squares(model: PlanarVAE, x: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Find the squares that may hold mass: the first, and others that tile the plane around it.

    Returns groups of images with the same squares, each as their coarse lattices (M, n, n, 2) and the numbers of the
    images, and an upper bound (B,), in float64, for the log of what lies beyond all that was looked at. The points of
    lattices are on centre + [−HALF_WIDTH, HALF_WIDTH)², turned. A group has about AT_ONCE cells to refine, or fewer.
    """
    most = (torch.special.xlogy(x, x) + torch.special.xlogy(1 - x, 1 - x)).double().sum(dim=1)  # −H ≥ log p(x|z)
    points = (FARTHEST - LOOK_SPACING / 2) * plane_grid(-1, 1, round(2 * FARTHEST / LOOK_SPACING), x.dtype)
    points = points.flatten(0, 1)[points.norm(dim=2).flatten().argsort(stable=True)].to(x.device)
    across = round(FARTHEST / HALF_WIDTH)  # squares in a row, an odd number: the middle one is the first square
    square = ((points + FARTHEST) // (2 * HALF_WIDTH)).long() @ torch.tensor([1, across], device=x.device)
    found = most.new_full((len(x), across**2), -torch.inf)  # the highest value in each square
    reach, cells = torch.full_like(most, torch.inf), torch.full_like(most, AT_ONCE // 20_000)
    for part, its_square in zip(points.split(1000), square.split(1000), strict=True):  # from the origin outwards
        near = (reach > part[0].norm()).nonzero().squeeze(1)
        if len(near) == 0:
            break
        for which in near.split(5000):
            log_joint = model._log_joint(x[which], _turned(part).unsqueeze(1))  # (P, B)
            for i in its_square.unique().tolist():
                found[which, i] = found[which, i].maximum(log_joint[its_square == i].amax(dim=0).double())
            # a point of this lattice stands for 16 cells
            cells[which] += 16 * (log_joint > found[which].amax(dim=1) - KEEP[0]).sum(dim=0)
        # the lattice's highest value, times its cell, is a first estimate of p(x): too low rather than too high
        reach = (2 * (most - found.amax(dim=1) - 2 * math.log(LOOK_SPACING) + BEYOND)).clamp(min=HALF_WIDTH**2).sqrt()
    needed = found > found.amax(dim=1, keepdim=True) - KEEP[0]
    needed[:, across**2 // 2] = True
    share = (cells.cumsum(dim=0) // AT_ONCE).unsqueeze(1)
    patterns, pattern = torch.cat([needed, share], dim=1).unique(dim=0, return_inverse=True)
    centres = plane_grid(HALF_WIDTH - FARTHEST, FARTHEST - HALF_WIDTH, across, x.dtype).view(-1, 1, 1, 2).to(x.device)
    lattices = _turned(centres + plane_grid(-HALF_WIDTH, HALF_WIDTH - SPACING, PER_SIDE, x.dtype).to(x.device))
    groups = [(lattices[its[:-1] > 0], (pattern == i).nonzero().squeeze(1)) for i, its in enumerate(patterns)]
    return groups, most - 0.5 * reach.clamp(max=FARTHEST) ** 2


def _turned(points: Tensor) -> Tensor:
    """Where the points (..., 2) of a lattice lie in the plane of z."""
    return points @ points.new_tensor(ROTATION)


def _integrate(model: PlanarVAE, x: Tensor, lattices: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Log of the integral over all the squares together, and its error: (B,), in float64.

    All images go down the levels together, so that a point is decoded once for all that need it. Many images share a
    cell, but an image has few of them: what is kept are pairs of a cell and an image, each as cell · B + image, sorted.
    """
    B, corners = len(x), lattices.flatten(0, 2)
    sums, pairs, tops = _first_lattice(model, x, corners)
    log_px, error = _from_sublattices(sums, SPACING)
    for level in range(1, MAX_LEVEL + 1):
        # Once always, then until the error is small. Nothing is refined in NaN, or where no point has any mass.
        image, on = pairs % B, log_px.isfinite() & ((error > tolerance) | (level == 1))
        top = tops.new_full((B,), -torch.inf).scatter_reduce(0, image, tops, "amax")
        near = pairs[on[image] & (tops > (top - KEEP[level - 1])[image])]
        # A cell is kept if one of its corners is near the top; later on, if a point in it is, or in a cell beside it.
        pairs = _beside(near, B, -1, 0) if level == 1 else pairs[torch.isin(pairs, _beside(near, B, -1, 0, 1))]
        if len(pairs) == 0:
            break
        sums, tops = _refine(model, x, corners, pairs, level)
        finer, disagreement = _from_sublattices(sums, SPACING / 2**level)
        log_px, error = torch.where(on, finer, log_px), torch.where(on, disagreement.maximum(error / 16), error)
    return log_px, error + ROUNDING * torch.finfo(x.dtype).eps * log_px.abs()


def _first_lattice(model: PlanarVAE, x: Tensor, points: Tensor) -> tuple[Tensor, ...]:
    """Sum p(x, z) over the coarse lattices, and find the pairs of a point and an image near the image's top.

    Returns the log sums over the four sublattices (2, 2, B); those pairs, and some more (N,); log p(x, z) there (N,).
    """
    fours = torch.arange(len(points), device=x.device).view(-1, 2, PER_SIDE // 2, 2).transpose(1, 2).reshape(-1, 2, 2)
    fours = fours[torch.arange(len(fours), device=x.device) * 15_823 % len(fours)]  # all over the plane, for a top soon
    sums, top, found = x.new_full((2, 2, len(x)), -torch.inf).double(), x.new_full((len(x),), -torch.inf), []
    for part in fours.split(max(1, min(2**11, 2**19 // max(1, len(x))))):
        log_joint = model._log_joint(x, points[part].unsqueeze(-2))  # (C, 2, 2, B)
        sums, top = torch.logaddexp(sums, _sublattices(log_joint)), top.maximum(log_joint.amax(dim=(0, 1, 2)))
        c, i, j, image = (log_joint > top - KEEP[0]).nonzero(as_tuple=True)
        found.append((part[c, i, j] * len(x) + image, log_joint[c, i, j, image]))
    return sums, *(torch.cat(parts) for parts in zip(*found, strict=True))


def _beside(pairs: Tensor, B: int, *steps: int) -> Tensor:
    """The pairs with the cells so many steps to the right and up, sorted.

    A step over a square's edge comes in at another edge: that is now and then a cell too many, but none too few.
    """
    for step_size in (B, PER_SIDE * B):
        pairs = torch.cat([pairs + step * step_size for step in steps]).unique()
    return pairs[pairs >= 0]


def _refine(model: PlanarVAE, x: Tensor, corners: Tensor, pairs: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """Sum p(x, z) over the pairs' cells, with these lower left corners, on the lattice of this level.

    Returns the log sums over four sublattices (2, 2, B), and the largest log p(x, z) of each pair (N,).
    """
    n, B, tops, sums = 2**level, len(x), [], x.new_full((2, 2, len(x)), -torch.inf).double()
    inside = _turned(SPACING / n * plane_grid(0, n - 1, n, x.dtype).to(x.device))  # (n, n, 2)
    for part in pairs.split(2**14 // n**2):
        cells, images = (part // B).unique_consecutive(), (part % B).unique()
        log_joint = model._log_joint(x[images], (corners[cells, None, None] + inside).unsqueeze(-2))  # (C, n, n, I)
        own = torch.isin(cells.unsqueeze(1) * B + images, part, assume_unique=True)  # (C, I): the pairs, in order
        log_joint = torch.where(own[:, None, None], log_joint, -torch.inf)
        tops.append(log_joint.amax(dim=(1, 2))[own])
        sums[..., images] = torch.logaddexp(sums[..., images], _sublattices(log_joint))
    return sums, torch.cat(tops)


def _sublattices(log_values: Tensor) -> Tensor:
    """Log sums of exp(log_values) (C, n, n, B), n even, over the four lattices of every second point: (2, 2, B)."""
    split = log_values.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (C, n/2, 2, n/2, 2, B)
    least = split.amax(dim=(0, 1, 3), keepdim=True) - 80  # too small to matter, but exp is slow where it underflows
    return torch.logsumexp(split.maximum(least), dim=(0, 1, 3)).double()


def _from_sublattices(sums: Tensor, spacing: float) -> tuple[Tensor, Tensor]:
    """The log integral (B,) from all points, and the largest disagreement with it of a sublattice, in nats."""
    log_total = torch.logsumexp(sums, dim=(0, 1))
    return log_total + 2 * math.log(spacing), (sums + 2 * math.log(2) - log_total).abs().amax(dim=(0, 1))


def _mean_and_deviation(model: PlanarVAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """The posterior's mean (2,) and deviations (2,) for one image, from the coarse lattices, all islands together."""
    ((lattices, _),) = _squares(model, x)[0]
    _, number, log_joint = _first_lattice(model, x, lattices.flatten(0, 2))
    points, share = lattices.flatten(0, 2)[number], torch.softmax(log_joint, dim=0)
    mean = share @ points
    return mean, (share @ (points - mean) ** 2).sqrt()


def _main_island(model: PlanarVAE, x: Tensor, K: int) -> FlowPosterior:
    mean, sigma = x.new_zeros(len(x), 2), x.new_ones(len(x), 2)
    for lattices, which in _squares(model, x)[0]:
        for part in which.split(20):
            values = torch.stack([model._log_joint(x[part], lattice.unsqueeze(-2)) for lattice in lattices])
            starts, images = _tops(values.permute(0, 3, 1, 2), lattices)
            its_mean, its_sigma, mass = _moments(model, x[part][images], starts)
            for i, its in zip(part.tolist(), (images == j for j in range(len(part))), strict=True):
                best = mass[its].argmax()
                mean[i], sigma[i] = its_mean[its][best], its_sigma[its][best]
    generator = torch.Generator("cpu").manual_seed(0)
    w = torch.randn(len(x), K, 2, generator=generator, dtype=x.dtype, device="cpu").to(x.device) / sigma.unsqueeze(1)
    b = -(w * mean.unsqueeze(1)).sum(dim=-1)
    shear = x.new_zeros(len(x), 1) if model.family == "gaussian" else None
    return FlowPosterior(mean, 2 * sigma.log(), w, identity_u(w, model.constraint), b, model.constraint, shear)


def _tops(values: Tensor, lattices: Tensor) -> tuple[Tensor, Tensor]:
    """The candidates (P, 2) for a main island, and whose they are (P,), from log p(x, z) on lattices (M, B, n, n)."""
    largest = F.max_pool2d(values, 11, stride=1, padding=5)
    is_top = (values == largest) & (values > values.amax(dim=(0, 2, 3), keepdim=True) - KEEP[0])
    around = F.avg_pool2d((values - largest.clamp(min=torch.finfo(values.dtype).min)).exp(), 11, stride=1, padding=5)
    score = torch.where(is_top, values + around.log(), -torch.inf).transpose(0, 1).flatten(1)  # (B, M n²)
    best, place = score.topk(TOPS, dim=1)
    best[:, 0] = torch.inf  # one at least, whatever the values
    images, rank = (best > -torch.inf).nonzero(as_tuple=True)
    return lattices.flatten(0, 2)[place[images, rank]], images


def _moments(model: PlanarVAE, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and deviations (B, 2) and log mass (B,) of the island around each start (B, 2), one for each image."""
    square = plane_grid(-1, 1, 21, x.dtype).to(x.device).flatten(0, 1).unsqueeze(1)  # (441, 1, 2)
    sigma = torch.full_like(mean, SPACING)
    for _ in range(5):
        z = mean + 4 * sigma * square  # (441, B, 2), 0.4 sigma apart
        log_joint = model._log_joint(x, z)
        mass = torch.logsumexp(log_joint, dim=0) + 2 * math.log(0.4) + sigma.log().sum(dim=1)
        share = torch.softmax(log_joint, dim=0).unsqueeze(-1)
        mean = (share * z).sum(dim=0)
        sigma = (share * (z - mean) ** 2).sum(dim=0).sqrt().maximum(sigma / 3)
    return mean, sigma, mass
