"""Estimates beside the exact values: importance sampling, each image's own posterior, the gap and its two parts.

Nothing here trains a model. Values are per image, in nats, and computed in the model's own precision, in eval() mode.
"""

import copy
import math
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from planar_helpers.planar import check_int
from planar_helpers.quadrature import TOLERANCE, LogPx, _exact_log_px, check_plane, measuring, repeatable
from planar_helpers.vae import FlowPosterior, PlanarVAE, check_model, check_no_gradient

DRAWS_AT_ONCE = 20_000  # images times samples


class InferenceGap(NamedTuple):
    """total = log p(x) − ELBO = approximation + amortization, each (B,), in nats."""

    total: Tensor
    approximation: Tensor
    amortization: Tensor


def importance_log_px(model: PlanarVAE, x: Tensor, n_samples: int, posterior: FlowPosterior | None = None) -> LogPx:
    """Estimate log p(x) = log E_q[ p(x, zK)/qK(zK) ] by the mean of n_samples importance weights, for any D.

    The error is the standard error of the log of the mean, by the delta method: std(weight)/(mean √n_samples). It
    is infinite for one sample, and too small where qK misses mass: then the estimate is too low as well. Where no
    sample has any weight, log_px is −∞ and the error ∞. `posterior`, of the same images, replaces the encoder's q.

    Shapes: x (B, d_x); log_px and error (B,), in nats. Raises ValueError for n_samples < 1, or a posterior of others.

    Source: Burda, Grosse & Salakhutdinov 2016; Rezende, Mohamed & Wierstra 2014, appendix E.
    """
    check_int("n_samples", n_samples, least=1)
    check_model(model)
    check_no_gradient(x)
    model.check_images(x)
    if posterior is not None and (not isinstance(posterior, FlowPosterior) or posterior.mu.shape != (len(x), model.D)):
        raise ValueError(f"posterior must be of {len(x)} images and D = {model.D}, got {posterior!r:.90}")
    parts = []
    with measuring(model):
        for i in torch.arange(len(x), device=x.device).split(max(1, DRAWS_AT_ONCE // n_samples)):
            q = model._encode(x[i]) if posterior is None else posterior.map(itemgetter(i))
            log_weights = model.elbo_draws(x[i], q, n_samples).double()
            log_mean = torch.logsumexp(log_weights, dim=0) - math.log(n_samples)
            # relative to the mean weight; without any weight there is no mean to compare with
            weights = (log_weights - log_mean).exp()
            spread = ((weights - weights.mean(dim=0)) ** 2).sum(dim=0).div(max(1, n_samples - 1)).sqrt()
            unknown = (log_mean == -torch.inf) | ((n_samples == 1) & ~log_mean.isnan())
            parts.append(LogPx(log_mean, (spread / n_samples**0.5).masked_fill(unknown, torch.inf)))
        return LogPx(*(torch.cat(column).to(x) for column in zip(*parts, strict=True)))


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

    Shapes: x (B, d_x); the result's as `FlowPosterior`. Raises TypeError for a start that is no `FlowPosterior` of the
    model's dtype, ValueError for one of another batch or D, steps < 0 or n_samples < 1. Source: Cremer, Li & Duvenaud
    2018. Derived in: notebooks/06_amortized_encoder, section "What does amortization cost?".
    """
    check_model(model)
    check_no_gradient(x)
    model.check_images(x)
    check_int("steps", steps, least=0)
    check_int("n_samples", n_samples, least=1)
    if start is not None and (not isinstance(start, FlowPosterior) or start.mu.dtype != x.dtype):
        raise TypeError(f"start must be a FlowPosterior of {x.dtype}, got {start!r}")
    if start is not None and start.mu.shape != (len(x), model.D):
        raise ValueError(f"start must be of {len(x)} images and D = {model.D}, got mu {tuple(start.mu.shape)}")
    with measuring(model):
        start = model._encode(x) if start is None else start
    with torch.inference_mode(False):
        # What was made in inference mode takes part in no gradient: copies do.
        x = x.detach().clone() if x.is_inference() else x.detach()
        model = copy.deepcopy(model) if any(p.is_inference() for p in model.parameters()) else model
        own = start.map(lambda field: field.detach().clone().requires_grad_())
        optimizer = torch.optim.Adam(own.tensors, lr=lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        with measuring(model), torch.enable_grad(), repeatable(x, seed):
            for _ in range(steps):
                elbo = model.elbo_draws(x, own, n_samples)
                optimizer.zero_grad()
                # only the images' own parameters move: no gradient is taken in the model's
                (-elbo.mean(0).sum()).backward(inputs=own.tensors)
                with torch.device("cpu"):  # where Adam's count of steps lies, whatever default device is in force
                    optimizer.step()
                scheduler.step()
    return own.detach()


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
    check_plane(model, x, "inference_gap")
    check_int("n_eval", n_eval, least=1)
    starts = [None] if start is None else [start, None]  # a start that does not fit is refused at once
    own = [own_posterior(model, x, one, steps, lr, n_samples, seed) for one in starts]
    with measuring(model), repeatable(x, seed + 1):
        log_px = _exact_log_px(model, x, TOLERANCE).log_px
        posteriors = model._encode(x), *reversed(own)
        before, *after = (model.elbo_draws(x, posterior, n_eval).mean(dim=0) for posterior in posteriors)
        best = torch.stack(after).amax(dim=0)
        return InferenceGap(log_px - before, log_px - best, best - before)
