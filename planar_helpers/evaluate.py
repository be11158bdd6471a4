"""The truth about a trained model: log p(x) and p(z|x) by quadrature on the plane, importance sampling, the gap.

Nothing here trains a model. All values are per image, in nats.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from planar_helpers.elbo import bernoulli_log_likelihood, gaussian_log_density, standard_normal_log_density
from planar_helpers.planar import check_int, identity_u
from planar_helpers.targets import plane_grid
from planar_helpers.vae import FlowPosterior, PlanarVAE

HALF_WIDTH = 8.0  # the coarse lattice covers [−8, 8]²
SPACING = 0.1  # of the coarse lattice; level l has SPACING / 2^l
MAX_LEVEL = 5
# A cell is refined if a value at it is within so many nats of the image's largest one: at a deviation of 0.01 the
# peak may stand 25 nats above its neighbours on the coarse lattice, 6 on the next, 1.6 on the one after.
KEEP = (30.0, 24.0, 20.0, 18.0, 18.0, 18.0)


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


class InferenceGap(NamedTuple):
    """total = log p(x) − ELBO = approximation + amortization, each (B,), in nats."""

    total: Tensor
    approximation: Tensor
    amortization: Tensor


@torch.no_grad()
def exact_log_px(model: PlanarVAE, x: Tensor, tolerance: float = 0.008) -> LogPx:
    """Integrate log p(x) = log ∫ p(x|z) p(z) dz over the plane, by sums over ever finer lattices.

    The integral is about spacing² Σ p(x|z) p(z), and the error falls faster than any power of the spacing once that
    is below the posterior's narrowest deviation. Start from spacing 0.1 on [−8, 8]²; keep the cells with a corner
    within 30 nats of the image's largest value; halve the spacing inside them, once always and then until the error
    is below `tolerance`, at most to 0.003. That resolves deviations down to 0.01.

    The error is the lattice's own: a third of the largest disagreement between it and the four lattices of twice the
    spacing that it consists of (as for second-order convergence), at least a sixteenth of the error before (five
    lattices may agree by symmetry, but not twice running), plus twice the share of mass at the rim. In float32
    rounding adds up to 1e-3 nats. What no lattice sees: a spike much narrower than 0.05 in a place where the coarse
    lattice shows next to nothing, beside a broad mode.

    Shapes: x (B, d_x); log_px and error (B,), in nats. Memory does not grow with B. Raises ValueError for D ≠ 2,
    and for bad pixels as `PlanarVAE.encode`. Derived in: notebooks/07_train_the_vae,
    section "How far is the bound from the truth?".
    """
    _need_plane(model, "exact_log_px")
    model.check_images(x)
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance!r}")
    if len(x) == 0:
        return LogPx(x[:, 0], x[:, 0])
    coarse = _coarse_lattice(x)
    log_joint_on_coarse = _log_joint(model, coarse.flatten(0, 1))
    parts = [_integrate(model, part, coarse, log_joint_on_coarse, tolerance) for part in x.split(1000)]
    return LogPx(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def importance_log_px(model: PlanarVAE, x: Tensor, n_samples: int) -> LogPx:
    """Estimate log p(x) = log E_q[ p(x, zK)/qK(zK) ] by the mean of n_samples importance weights, for any D.

    The error is the standard error of the log of the mean, by the delta method: std(weight)/(mean √n_samples). It
    is infinite for one sample, and too small where qK misses mass: then the estimate is too low as well.

    Shapes: x (B, d_x); log_px and error (B,), in nats. Raises ValueError for n_samples < 1.

    Source: Burda, Grosse & Salakhutdinov 2016; Rezende, Mohamed & Wierstra 2014, appendix E.
    """
    check_int("n_samples", n_samples, least=1)
    model.check_images(x)
    if len(x) == 0:
        return LogPx(x[:, 0], x[:, 0])
    parts = []
    for part in x.split(max(1, 20_000 // n_samples)):
        posterior = model.encode(part)
        # (n_samples, B), drawn in pieces: the logits of all samples at once would be n_samples × B × d_x
        size = max(1, 20_000 // len(part))
        pieces = [_log_weights(model, part, posterior, n) for n in _chunks(n_samples, size)]
        log_weights = torch.cat(pieces).double()
        log_mean = torch.logsumexp(log_weights, dim=0) - math.log(n_samples)
        spread = (log_weights - log_mean).exp().std(dim=0) if n_samples > 1 else torch.full_like(log_mean, torch.inf)
        parts.append(LogPx(log_mean.to(x), (spread / n_samples**0.5).to(x)))
    return LogPx(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def posterior_grid(model: PlanarVAE, x: Tensor, n: int = 201) -> PosteriorGrid:
    """Return the true posterior of one image, q0 and qK on a common square grid that holds them all.

        log p(z|x) = log p(x|z) + log p(z) − log p(x);     log qK(z) = log q0(f⁻¹(z)) − Σ ladj, by `planar_inverse`

    Shapes: x (1, d_x) or (d_x,); z (n, n, 2) as `targets.plane_grid`. Raises ValueError for D ≠ 2 or more than one
    image.
    """
    _need_plane(model, "posterior_grid")
    check_int("n", n, least=2)
    x = x.unsqueeze(0) if isinstance(x, Tensor) and x.dim() == 1 else x
    model.check_images(x)
    if x.shape[0] != 1:
        raise ValueError(f"x must be one image of shape ({model.d_x},) or (1, {model.d_x}), got {tuple(x.shape)}")
    posterior, island = model.encode(x), main_island(model, x, K=0)
    coarse = _coarse_lattice(x).flatten(0, 1)
    broad = _mean_and_spread(coarse, torch.softmax(_log_joint(model, coarse)(x)[0], dim=0))
    with torch.random.fork_rng():  # the caller's random stream goes on, and two calls give one grid
        torch.manual_seed(0)
        zK = posterior.rsample((2000,))[0].flatten(0, 1)
    boxes = [*((q.mu[0], torch.exp(0.5 * q.logvar[0])) for q in (posterior, island)), broad, (zK.mean(0), zK.std(0))]
    low = torch.stack([centre - 3.5 * width for centre, width in boxes]).amin(0)
    high = torch.stack([centre + 3.5 * width for centre, width in boxes]).amax(0)
    half = float((high - low).max()) / 2
    z = (low + high) / 2 + half * plane_grid(-1, 1, n, x.dtype).to(x.device)
    log_posterior = _log_joint(model, z.flatten(0, 1))(x)[0] - exact_log_px(model, x).log_px
    double = FlowPosterior(*(field.double() for field in posterior), constraint=posterior.constraint)
    return PosteriorGrid(
        z,
        log_posterior.reshape(n, n),
        gaussian_log_density(z, posterior.mu[0], posterior.logvar[0]),
        double.log_prob(z.double().unsqueeze(-2)).squeeze(-1).to(x),
    )


@torch.no_grad()
def main_island(model: PlanarVAE, x: Tensor, K: int | None = None) -> FlowPosterior:
    """Return a Gaussian on the main island of each image's exact posterior, with K steps that do nothing yet.

    The main island is the one of the highest point of a coarse lattice. μ and σ are the exact posterior's mean and
    deviations there: sums over four grids, each five of the deviations found before to either side. The steps have
    û = 0, w random in units of 1/σ (seeded), and hyperplanes through μ. K is the model's unless given.

    So it is a start for `own_posterior` that lies where the posterior does, whatever the encoder says.

    Shapes: x (B, d_x); the result's as `FlowPosterior`. Raises ValueError for D ≠ 2 or K < 0. Derived in:
    notebooks/08_exact_posterior, section "Where does the flow matter most, and where least?".
    """
    _need_plane(model, "main_island")
    model.check_images(x)
    K = model.K if K is None else K
    check_int("K", K, least=0)
    log_joint_on_coarse = _log_joint(model, coarse := _coarse_lattice(x).flatten(0, 1))
    square = plane_grid(-1, 1, 31, x.dtype).to(x.device).flatten(0, 1).unsqueeze(1)  # (961, 1, 2)
    moments = [x.new_zeros(2, 0, 2)]
    for part in x.split(20):
        mean = coarse[log_joint_on_coarse(part).argmax(dim=1)]
        sigma = torch.full_like(mean, SPACING)
        for _ in range(4):
            z = mean + 5 * sigma * square  # (961, B, 2), sigma/3 apart
            share = torch.softmax(_log_joint_own(model, part, z), dim=0).unsqueeze(-1)
            mean = (share * z).sum(dim=0)
            sigma = (share * (z - mean) ** 2).sum(dim=0).sqrt().maximum(sigma / 3)
        moments.append(torch.stack([mean, sigma]))
    mean, sigma = torch.cat(moments, dim=1)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(len(x), K, 2, generator=generator, dtype=x.dtype).to(x.device) / sigma.unsqueeze(1)
    b = -(w * mean.unsqueeze(1)).sum(dim=-1)
    return FlowPosterior(mean, 2 * sigma.log(), w, identity_u(w, model.constraint), b, constraint=model.constraint)


def own_posterior(
    model: PlanarVAE,
    x: Tensor,
    start: FlowPosterior | None = None,
    steps: int = 300,
    lr: float = 0.02,
    n_samples: int = 8,
    seed: int = 0,
) -> FlowPosterior:
    """Optimise each image's own μ, log σ², w, u, b for its ELBO, the decoder fixed, from the encoder's output.

    Adam on n_samples draws an image for `steps` steps, the step size falling to 0: the best parameters *found*.
    `start` replaces the encoder's output, and may have another number of steps (none, for a Gaussian).

    Shapes: x (B, d_x); the result's as `FlowPosterior`. Raises ValueError for a start of another batch or D, steps < 0
    or n_samples < 1. Source: Cremer, Li & Duvenaud 2018. Derived in: notebooks/06_amortized_encoder, section
    "What does amortization cost?".
    """
    model.check_images(x)
    check_int("steps", steps, least=0)
    check_int("n_samples", n_samples, least=1)
    with torch.no_grad():
        start = model.encode(x) if start is None else start
    if start.mu.shape != (len(x), model.D):
        raise ValueError(f"start must be of {len(x)} images and D = {model.D}, got mu {tuple(start.mu.shape)}")
    # the caller's random stream goes on as if nothing had been drawn
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        own = FlowPosterior(*(field.detach().clone().requires_grad_() for field in start), constraint=start.constraint)
        optimizer = torch.optim.Adam(own, lr=lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        for _ in range(steps):
            elbo = _log_weights(model, x, own, n_samples)
            # only the images' own parameters move: no gradient is taken in the model's
            slopes = torch.autograd.grad(-elbo.mean(0).sum(), own, materialize_grads=True)
            for field, slope in zip(own, slopes, strict=True):
                field.grad = slope
            optimizer.step()
            scheduler.step()
    return FlowPosterior(*(field.detach() for field in own), constraint=start.constraint)


def inference_gap(
    model: PlanarVAE,
    x: Tensor,
    steps: int = 300,
    lr: float = 0.02,
    n_samples: int = 8,
    n_eval: int = 1000,
    seed: int = 0,
    start: FlowPosterior | None = None,
) -> InferenceGap:
    """Split log p(x) − ELBO in two by giving each image its own parameters (`own_posterior`).

        total = log p(x) − ELBO(encoder),  approximation = log p(x) − ELBO(own),  amortization = the rest

    The ascent starts from the encoder's output. Where that lies on a wrong island of the posterior, the ascent stays
    there, and the encoder's miss is counted as approximation. Pass `start` (from `main_island`) for a second ascent:
    for each image the better of the two counts.

    The ELBOs are means of n_eval draws: single images carry Monte Carlo noise of about (spread of the draws)/√n_eval,
    and the better of two is too good by up to about as much. The approximation gap is that of the best parameters
    *found*.

    Shapes: x (B, d_x); each (B,), in nats. Raises ValueError for D ≠ 2. Source: Cremer, Li & Duvenaud 2018. Derived in:
    notebooks/06_amortized_encoder, section "What does amortization cost?".
    """
    _need_plane(model, "inference_gap")
    check_int("n_eval", n_eval, least=1)
    log_px = exact_log_px(model, x).log_px
    starts = [None] if start is None else [None, start]
    own = [own_posterior(model, x, one, steps, lr, n_samples, seed) for one in starts]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed + 1)
        before, *after = (_mean_elbo(model, x, posterior, n_eval) for posterior in (model.encode(x), *own))
    best = torch.stack(after).amax(dim=0)
    return InferenceGap(log_px - before, log_px - best, best - before)


def _need_plane(model: PlanarVAE, name: str) -> None:
    if model.D != 2:
        raise ValueError(f"{name} integrates over a plane: D must be 2, got {model.D} (importance_log_px takes any D)")


def _chunks(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def _log_joint_own(model: PlanarVAE, x: Tensor, z: Tensor) -> Tensor:
    """log p(x|z) + log p(z), each image at its own z (S, B, D); returns (S, B)."""
    return bernoulli_log_likelihood(x, model.decode(z)) + standard_normal_log_density(z)


def _log_weights(model: PlanarVAE, x: Tensor, posterior: FlowPosterior, n: int) -> Tensor:
    zK, log_q0, sum_ladj = posterior.rsample((n,))
    return _log_joint_own(model, x, zK) - log_q0 + sum_ladj


@torch.no_grad()
def _mean_elbo(model: PlanarVAE, x: Tensor, posterior: FlowPosterior, n: int) -> Tensor:
    pieces = [_log_weights(model, x, posterior, piece).sum(0) for piece in _chunks(n, max(1, 20_000 // max(len(x), 1)))]
    return sum(pieces) / n


def _mean_and_spread(points: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    mean = share @ points
    return mean, (share @ (points - mean) ** 2).sqrt()


def _coarse_lattice(x: Tensor) -> Tensor:
    """The lattice points (n, n, 2), SPACING apart, on [−HALF_WIDTH, HALF_WIDTH)²; point [i, j] = (z_1[j], z_2[i])."""
    n = round(2 * HALF_WIDTH / SPACING)
    return plane_grid(-HALF_WIDTH, HALF_WIDTH - SPACING, n, x.dtype).to(x.device)


def _log_joint(model: PlanarVAE, points: Tensor) -> Callable[[Tensor], Tensor]:
    """Decode the points (P, 2) once; return the function x (B, d_x) -> log p(x|z) + log p(z), shape (B, P)."""
    logits = model.decode(points)  # (P, d_x)
    constant = standard_normal_log_density(points) - F.softplus(logits).sum(dim=-1)
    return lambda x: torch.addmm(constant, x, logits.T)


def _integrate(
    model: PlanarVAE, x: Tensor, coarse: Tensor, log_joint_on_coarse: Callable[[Tensor], Tensor], tolerance: float
) -> tuple[Tensor, Tensor]:
    """Log p(x) and its error for one part (B, d_x) of the images."""
    n = len(coarse)
    log_joint = log_joint_on_coarse(x).view(-1, n, n)
    log_px, error = _from_sublattices(_sublattices(log_joint), SPACING)
    rim = torch.ones(n, n, dtype=torch.bool, device=x.device)
    rim[1:-1, 1:-1] = False
    at_rim = torch.logsumexp(log_joint[:, rim].double(), dim=1) + 2 * math.log(SPACING)
    rim_share = (at_rim - log_px).exp()
    top = log_joint.flatten(1).amax(dim=1)
    # A cell is kept if one of its four corners is near the image's largest value.
    corners = F.pad(log_joint, (0, 1, 0, 1), value=-torch.inf).unsqueeze(1)
    alive = F.max_pool2d(corners, 2, stride=1).squeeze(1).flatten(1) > (top - KEEP[0]).unsqueeze(1)  # (B, n²)
    place = log_joint.flatten(1).argmax(dim=1)
    tile = (place // n // 10) * n + place % n // 10  # neighbours share cells: refine them together
    del log_joint, corners
    for group in tile.argsort(stable=True).split(100):
        for level in range(1, MAX_LEVEL + 1):
            if len(group) == 0:
                break
            cells = alive[group].any(dim=0).nonzero().squeeze(1)
            sums, tops = _refine(model, x[group], coarse.flatten(0, 1)[cells], level)
            log_px[group], disagreement = _from_sublattices(sums, SPACING / 2**level)
            error[group] = disagreement.maximum(error[group] / 16)
            # Keep a cell for the next level if it, or one beside it, holds a large enough value.
            found = tops.new_full((len(group), n * n), -torch.inf).index_copy_(1, cells, tops)
            near = F.max_pool2d(found.view(-1, 1, n, n), 3, stride=1, padding=1).flatten(1)
            alive[group] &= near > tops.amax(dim=1, keepdim=True) - KEEP[level]
            group = group[error[group] > tolerance]
    return log_px.to(x), (error + 2 * rim_share).to(x)


def _refine(model: PlanarVAE, x: Tensor, corners: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """Sum p(x, z) over the cells with these lower left corners (C, 2), on the lattice of this level.

    Returns the log sums over its four sublattices (B, 2, 2), and each cell's largest log p(x, z) (B, C).
    """
    n = 2**level
    offsets = SPACING / n * torch.arange(n, dtype=x.dtype, device=x.device)
    inside = torch.stack(torch.meshgrid(offsets, offsets, indexing="xy"), dim=-1).flatten(0, 1)  # (n², 2)
    sums, tops = [], []
    for part in corners.split(max(1, 8192 // n**2)):
        points = (part.unsqueeze(1) + inside).flatten(0, 1)
        log_joint = _log_joint(model, points)(x).view(len(x), -1, n, n)
        tops.append(log_joint.amax(dim=(2, 3)))
        sums.append(_sublattices(log_joint))
    return torch.logsumexp(torch.stack(sums), dim=0), torch.cat(tops, dim=1)


def _sublattices(log_values: Tensor) -> Tensor:
    """Log sums of exp(log_values) (B, ..., n, n), n even, over the four lattices of every second point: (B, 2, 2)."""
    split = log_values.double().unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))  # (B, ..., n/2, 2, n/2, 2)
    return torch.logsumexp(split.movedim((-3, -1), (1, 2)).flatten(3), dim=3)


def _from_sublattices(sums: Tensor, spacing: float) -> tuple[Tensor, Tensor]:
    """The log integral (B,) from all points, and its error: a third of the largest disagreement, in nats."""
    log_total = torch.logsumexp(sums.flatten(1), dim=1)
    disagreement = (sums.flatten(1) + 2 * math.log(2) - log_total.unsqueeze(1)).abs().amax(dim=1)
    return log_total + 2 * math.log(spacing), disagreement / 3
