"""The amortized planar-flow VAE: encoder → FlowPosterior → chain → decoder.

The encoder emits, per image, μ and log σ² of q0 and w, u, b of each of K planar steps. The flow belongs to q, not
to p: to generate, z ~ N(0, I) goes straight to the decoder.
"""

from collections import namedtuple

import torch
from torch import Tensor, nn

from planar_helpers.elbo import (
    ElboTerms,
    bernoulli_log_likelihood,
    gaussian_log_density,
    standard_normal_log_density,
)
from planar_helpers.planar import check_constraint, check_int, planar_chain, planar_inverse


class FlowPosterior(namedtuple("FlowPosterior", "mu logvar w u b")):
    """The approximate posterior qK(z|x) of each image: mu, logvar (B, D); w, u (B, K, D); b (B, K).

        z0 = μ + σ ⊙ ε,   zK = f_K(… f_1(z0)),   log qK(zK) = log q0(z0) − Σ ladj

    Source: Rezende & Mohamed 2015, section 4.2. Derived in: notebooks/06_amortized_encoder, section
    "How does the encoder emit a flow?".
    """

    constraint = "shifted"

    def __new__(
        cls, mu: Tensor, logvar: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str = "shifted"
    ) -> "FlowPosterior":
        self = super().__new__(cls, mu, logvar, w, u, b)
        self.constraint = constraint
        return self

    def _replace(self, **changes: Tensor) -> "FlowPosterior":
        return FlowPosterior(**{**self._asdict(), **changes}, constraint=self.constraint)

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
        """Draw zK (*sample_shape, B, D), with log_q0 and sum_ladj (*sample_shape, B) of the same draw."""
        eps = torch.randn(*sample_shape, *self.mu.shape, dtype=self.mu.dtype, device=self.mu.device)
        z0 = self.mu + torch.exp(0.5 * self.logvar) * eps
        zK, sum_ladj = planar_chain(z0, self.w, self.u, self.b, self.constraint)
        return zK, gaussian_log_density(z0, self.mu, self.logvar), sum_ladj

    def log_prob(self, z: Tensor) -> Tensor:
        """Return log qK(z) at any z (..., B, D), through the inverse; shape (..., B), in nats."""
        z0 = planar_inverse(z, self.w, self.u, self.b, self.constraint)
        sum_ladj = planar_chain(z0, self.w, self.u, self.b, self.constraint)[1]
        return gaussian_log_density(z0, self.mu, self.logvar) - sum_ladj


class PlanarVAE(nn.Module):
    """A VAE whose approximate posterior is a chain of K planar steps, with parameters per image.

    Defaults are the post's: one hidden layer of 500 ReLU on each side, D = 2, K = 3. K = 0 is the plain VAE.

    Shapes: x is a floating tensor (B, d_x) with values in [0, 1]; nothing else is accepted. Raises ValueError
    or TypeError, which name what was wrong.

    Source: M. Camara Escudero, "Variational Autoencoder with Planar Flows" (the architecture); Rezende &
    Mohamed 2015 (the model). Derived in: notebooks/06_amortized_encoder, section "How does the encoder emit a flow?".

    >>> _ = torch.manual_seed(0)
    >>> terms = PlanarVAE()(torch.rand(4, 784))
    >>> terms.elbo.shape
    torch.Size([4])
    """

    def __init__(self, d_x: int = 784, hidden: int = 500, D: int = 2, K: int = 3, constraint: str = "shifted") -> None:
        super().__init__()
        for name, value, least in (("d_x", d_x, 1), ("hidden", hidden, 1), ("D", D, 1), ("K", K, 0)):
            check_int(name, value, least)
        check_constraint(constraint)
        self.settings = {"d_x": d_x, "hidden": hidden, "D": D, "K": K, "constraint": constraint}
        self.d_x, self.D, self.K, self.constraint = d_x, D, K, constraint
        self.encoder = nn.Sequential(nn.Linear(d_x, hidden), nn.ReLU())
        self.head_sizes = [D, D, K * D, K * D, K]  # μ, log σ², w, u, b: five linear heads in one matrix
        self.heads = nn.Linear(hidden, sum(self.head_sizes))
        self.decoder = nn.Sequential(nn.Linear(D, hidden), nn.ReLU(), nn.Linear(hidden, d_x))

    def encode(self, x: Tensor) -> FlowPosterior:
        """Return the posterior's parameters for each image of x (B, d_x)."""
        self.check_images(x)
        return self._encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """Return the logits (..., d_x) of the pixels at z (..., D)."""
        if not isinstance(z, Tensor) or z.dtype != self.heads.weight.dtype:
            found = z.dtype if isinstance(z, Tensor) else type(z).__name__
            raise TypeError(f"z must be a tensor of the model's dtype {self.heads.weight.dtype}, got {found}")
        if z.shape[-1:] != (self.D,):
            raise ValueError(f"z must have shape (..., {self.D}), got {tuple(z.shape)}")
        return self.decoder(z)

    def forward(self, x: Tensor) -> ElboTerms:
        """Return the ELBO's four terms at one draw of z0 per image, in train() and eval() alike."""
        self.check_images(x)
        return self.elbo_terms(x)

    def elbo_terms(self, x: Tensor) -> ElboTerms:
        """As `forward`, without looking at the pixel values: for a loop that has checked its data once."""
        zK, log_q0, sum_ladj = self._encode(x).rsample()
        log_px_z = bernoulli_log_likelihood(x, self.decoder(zK))
        return ElboTerms(log_px_z, standard_normal_log_density(zK), log_q0, sum_ladj)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Generate n images: z ~ N(0, I), decoded. No flow is involved. Returns probabilities (n, d_x)."""
        check_int("n", n, least=0)
        like = self.heads.weight
        return torch.sigmoid(self.decode(torch.randn(n, self.D, dtype=like.dtype, device=like.device)))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Return pixel probabilities (B, d_x) decoded from z0 = μ, pushed through the flow: to look at only."""
        mu, _, w, u, b = self.encode(x)
        return torch.sigmoid(self.decode(planar_chain(mu, w, u, b, self.constraint)[0]))

    def check_images(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless x is floating, (B, d_x), and within [0, 1]."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating tensor in [0, 1], got {found}: bytes go through data.to_float")
        if x.dtype != self.heads.weight.dtype:
            raise TypeError(f"x must have the model's dtype {self.heads.weight.dtype}, got {x.dtype}")
        if x.dim() != 2 or x.shape[1] != self.d_x:
            raise ValueError(f"x must have shape (B, {self.d_x}), got {tuple(x.shape)}")
        if not bool(((x >= 0) & (x <= 1)).all()):
            raise ValueError("x must lie in [0, 1] and hold no NaN: divide grey levels 0..255 by 255")

    def _encode(self, x: Tensor) -> FlowPosterior:
        mu, logvar, w, u, b = self.heads(self.encoder(x)).split(self.head_sizes, dim=-1)
        shape = (len(x), self.K, self.D)
        return FlowPosterior(mu, logvar, w.reshape(shape), u.reshape(shape), b, constraint=self.constraint)
