"""The four terms of the ELBO. Nothing here knows what a flow is: it only takes a sum of log-determinants.

    ELBO = E_q0 [ log p(x|zK) + log p(zK) − log q0(z0) + Σ ladj ]

All densities are per image, in nats, summed over the last dimension.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


class ElboTerms(NamedTuple):
    """The ELBO's four terms at one draw of z0 per image, each (B,), in nats.

        elbo = log_px_z + log_pz − log_q0 + sum_ladj
        kl   = log_q0 − sum_ladj − log_pz = log qK(zK) − log p(zK)     (one draw: it may be negative)
        loss = −mean(elbo)

    Raises ValueError where the four have not one shape: (B,) and (B, 1) would broadcast to (B, B) without a word.

    Source: Rezende & Mohamed 2015, equation (15). Derived in: notebooks/05_elbo_terms, section
    "What are the four terms?".

    >>> terms = ElboTerms(torch.tensor([-90.0]), torch.tensor([-2.0]), torch.tensor([-1.0]), torch.tensor([0.5]))
    >>> terms.elbo.item(), terms.kl.item(), terms.loss.item()
    (-90.5, 0.5, 90.5)
    """

    log_px_z: Tensor
    log_pz: Tensor
    log_q0: Tensor
    sum_ladj: Tensor

    @property
    def elbo(self) -> Tensor:
        """The one-draw estimate of the bound, (B,)."""
        return self.log_px_z - self.kl

    @property
    def kl(self) -> Tensor:
        """The one-draw estimate of KL(qK ‖ p(z)), (B,)."""
        shapes = {name: tuple(term.shape) for name, term in self._asdict().items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"the four terms must have one shape, got {shapes}")
        return self.log_q0 - self.sum_ladj - self.log_pz

    @property
    def loss(self) -> Tensor:
        """What training minimises: the mean of −elbo over the batch, ()."""
        return -self.elbo.mean()


def bernoulli_log_likelihood(x: Tensor, logits: Tensor) -> Tensor:
    """Return log p(x|z) = Σ_i [ x_i log p_i + (1 − x_i) log(1 − p_i) ] with p = sigmoid(logits).

    Computed from the logits, as Σ_i [ x_i logit_i − softplus(logit_i) ]: no log of a rounded 0.

    Shapes: x in [0, 1] and logits (..., d_x), batch shapes broadcast; returns (...,), in nats. For grey x this is
    no normalised density. Raises as `check_densities`. Derived in: notebooks/05_elbo_terms, section
    "What is log p(x|z)?".

    >>> bernoulli_log_likelihood(torch.ones(1, 2), torch.zeros(1, 2))  # −2 log 2
    tensor([-1.3863])
    """
    check_densities(x=x, logits=logits)
    logits, x = torch.broadcast_tensors(logits, x)
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(dim=-1)


def gaussian_log_density(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """Return log N(z; μ, diag σ²) = −(D/2) log 2π − ½ Σ_i [ log σ_i² + (z_i − μ_i)²/σ_i² ].

    Shapes: z, mu, logvar (..., D), batch shapes broadcast; returns (...,), in nats. Raises as `check_densities`.
    Derived in: notebooks/05_elbo_terms, section "What is log q_0?".

    >>> round(gaussian_log_density(torch.zeros(2), torch.zeros(2), torch.zeros(2)).item(), 4)
    -1.8379
    """
    check_densities(z=z, mu=mu, logvar=logvar)
    return -0.5 * (LOG_2PI + logvar + (z - mu) ** 2 * torch.exp(-logvar)).sum(dim=-1)


def standard_normal_log_density(z: Tensor) -> Tensor:
    """Return log N(z; 0, I) = −(D/2) log 2π − ½ zᵀz. Shapes: z (..., D); returns (...,), in nats.

    Raises as `check_densities`. Derived in: notebooks/05_elbo_terms, section "Why is the prior taken at z_K?".

    >>> round(standard_normal_log_density(torch.zeros(3)).item(), 4)
    -2.7568
    """
    check_densities(z=z)
    return -0.5 * (LOG_2PI + z**2).sum(dim=-1)


def check_densities(**tensors: Tensor) -> None:
    """Raise TypeError unless all are float32 or float64, ValueError unless all end in the same size.

    A sum over 784 pixels in half precision is off by whole nats; a last size of 1 would be broadcast, and counted D
    times.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.float32, torch.float64):
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a tensor of float32 or float64, got {found}")
    sizes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len({size[-1:] for size in sizes.values()}) > 1 or () in sizes.values():
        raise ValueError(f"{' and '.join(tensors)} must end in the same size, got shapes {sizes}")
