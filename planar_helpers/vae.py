"""The amortized planar-flow VAE: encoder → FlowPosterior → chain → decoder.

The encoder emits, per image, μ and log σ² of q0 and w, u, b of each of K planar steps. The flow belongs to q, not
to p: to generate, z ~ N(0, I) goes straight to the decoder. Two other families of q are controls, without a flow.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from planar_helpers.elbo import ElboTerms, bernoulli_log_likelihood, gaussian_log_density, standard_normal_log_density
from planar_helpers.planar import CarriesConstraint, check_constraint, check_int, planar_chain, planar_inverse

FAMILIES = ("planar", "translation", "gaussian")
ROWS_AT_ONCE = 20_000  # decoded images held in memory at a time, in `elbo_draws`


@dataclass(frozen=True, eq=False, repr=False)
class FlowPosterior:
    """The approximate posterior qK(z|x) of each image: mu, logvar (B, D); w, u (B, K, D); b (B, K); and whose û.

        z0 = μ + σ ⊙ ε,   zK = f_K(… f_1(z0)),   log qK(zK) = log q0(z0) − Σ ladj

    With a shear S (B, D(D − 1)/2), the rows of a strictly lower triangular matrix, z0 + S(z0 − μ) goes into the first
    step in place of z0: q0 is then the Gaussian with the full covariance (I + S) diag σ² (I + S)ᵀ. A shear keeps areas.

    The constraint has no default: w, u and b without it are another map. Whatever is made from a posterior by the
    methods below, by `torch.func`, by copying or by pickling, keeps it. Two posteriors are equal if all values and
    the constraint are.

    Source: Rezende & Mohamed 2015, section 4.2. Derived in: notebooks/06_amortized_encoder, section
    "How does the encoder emit a flow?".
    """

    mu: Tensor
    logvar: Tensor
    w: Tensor
    u: Tensor
    b: Tensor
    constraint: str
    shear: Tensor | None = None

    def __post_init__(self) -> None:
        check_constraint(self.constraint)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The five tensors mu, logvar, w, u, b, and the shear if there is one."""
        five = self.mu, self.logvar, self.w, self.u, self.b
        return five if self.shear is None else (*five, self.shear)

    def map(self, function: Callable[[Tensor], Tensor]) -> "FlowPosterior":
        """Return the posterior with `function` applied to each of its tensors."""
        return _from_tensors(map(function, self.tensors), self.constraint)

    def replace(self, **changes: Any) -> "FlowPosterior":
        """Return the posterior with the fields named changed, and the others, the constraint too, as they are."""
        return replace(self, **changes)

    def double(self) -> "FlowPosterior":
        """Return the posterior in float64."""
        return self.map(torch.Tensor.double)

    def detach(self) -> "FlowPosterior":
        """Return the same values, cut off from whatever made them."""
        return self.map(torch.Tensor.detach)

    def image(self, i: int) -> "FlowPosterior":
        """Return the posterior of image i alone, as a batch of one; i may count from the end."""
        return self.map(lambda tensor: tensor[[int(i)]])

    def without_steps(self) -> "FlowPosterior":
        """Return q0 alone: the same μ, σ and shear, K = 0."""
        return self.replace(w=self.w[..., :0, :], u=self.u[..., :0, :], b=self.b[..., :0])

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
        """Draw zK (*sample_shape, B, D), with log_q0 and sum_ladj (*sample_shape, B) of the same draw."""
        eps = torch.randn(*sample_shape, *self.mu.shape, dtype=self.mu.dtype, device=self.mu.device)
        z0 = self.mu + torch.exp(0.5 * self.logvar) * eps
        zK, sum_ladj = planar_chain(self._sheared(z0), self.w, self.u, self.b, self.constraint)
        return zK, gaussian_log_density(z0, self.mu, self.logvar), sum_ladj

    def log_prob(self, z: Tensor) -> Tensor:
        """Return log qK(z) at any z (..., B, D), through the inverse; shape (..., B), in nats."""
        z0 = planar_inverse(z, self.w, self.u, self.b, self.constraint)
        sum_ladj = planar_chain(z0, self.w, self.u, self.b, self.constraint)[1]
        if self.shear is not None:
            away = (z0 - self.mu).unsqueeze(-1)
            z0 = self.mu + torch.linalg.solve_triangular(self._S(), away, upper=False, unitriangular=True).squeeze(-1)
        return gaussian_log_density(z0, self.mu, self.logvar) - sum_ladj

    def _S(self) -> Tensor:
        """The shear as strictly lower triangular matrices (B, D, D)."""
        shear, D = cast(Tensor, self.shear), self.mu.shape[-1]
        row, column = torch.tril_indices(D, D, -1, device=shear.device)
        flat = shear.new_zeros(*shear.shape[:-1], D * D).index_copy(-1, row * D + column, shear)
        return flat.unflatten(-1, (D, D))

    def _sheared(self, z0: Tensor) -> Tensor:
        return z0 if self.shear is None else z0 + (self._S() @ (z0 - self.mu).unsqueeze(-1)).squeeze(-1)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, FlowPosterior)
            and (self.constraint, len(self.tensors)) == (other.constraint, len(other.tensors))
            and all(torch.equal(one, another) for one, another in zip(self.tensors, other.tensors, strict=True))
        )

    def __repr__(self) -> str:
        return (
            f"FlowPosterior(mu {tuple(self.mu.shape)}, w {tuple(self.w.shape)}, {self.mu.dtype}, "
            f"constraint={self.constraint!r})"
        )


def _from_tensors(tensors: Iterable[Any], constraint: Any) -> FlowPosterior:
    mu, logvar, w, u, b, *shear = tensors
    return FlowPosterior(mu, logvar, w, u, b, constraint, *shear)


# So that vmap, grad, export and their like take a posterior apart and put it together again, constraint included.
pytree.register_pytree_node(
    FlowPosterior,
    lambda posterior: (list(posterior.tensors), posterior.constraint),
    _from_tensors,
    serialized_type_name="planar_helpers.vae.FlowPosterior",
)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every part of the model in eval() mode and switch autocast off; leave each part in the mode it was in.

    Measuring a model must not depend on a dropout's draws, nor move a batch norm's averages.
    """
    modes = [(part, part.training) for part in model.modules()]
    try:
        model.eval()
        with _own_precision(model):
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def check_model(model: nn.Module) -> None:
    """Raise TypeError unless the model is a PlanarVAE itself: not the class, nor a wrapper around one."""
    if not isinstance(model, PlanarVAE):
        found = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model must be a PlanarVAE, got {found}: take it out of any wrapper")


def check_no_gradient(x: Tensor) -> None:
    """Raise ValueError if x requires a gradient where one would be taken: a measurement would return 0 for it."""
    if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
        raise ValueError("x must not require a gradient: none is computed here; pass x.detach()")


def _own_precision(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Autocast switched off."""
    return torch.autocast(next(model.parameters()).device.type, enabled=False)


class PlanarVAE(CarriesConstraint):
    """A VAE whose approximate posterior is a chain of K planar steps, with parameters per image.

    Defaults are the post's: one hidden layer of 500 ReLU on each side, D = 2, K = 3. K = 0 is the plain VAE. `hidden`
    may be several sizes, from the image inwards; the decoder has them in reverse. `dropout` is the share of pixels that
    the encoder, in train(), does not see.

    `family` is q's: "planar"; or a control, which does not flow. "translation": the same heads with w = 0, so that a
    step adds u tanh b whatever z is, and K of them a constant to μ. "gaussian": a full covariance, K = 0.

    Shapes: x is a floating tensor (B, d_x) with values in [0, 1]; nothing else is accepted. Raises ValueError
    or TypeError, which name what was wrong. The values cannot be looked at under `torch.func.vmap`, `torch.compile`
    or `torch.export`: there only shapes and dtypes are checked. Autocast has no say: the model computes in its own
    precision, float32 or float64.

    Source: M. Camara Escudero, "Variational Autoencoder with Planar Flows" (the architecture); Rezende &
    Mohamed 2015 (the model). Derived in: notebooks/06_amortized_encoder, section "How does the encoder emit a flow?".

    >>> _ = torch.manual_seed(0)
    >>> terms = PlanarVAE()(torch.rand(4, 784))
    >>> terms.elbo.shape
    torch.Size([4])
    """

    def __init__(
        self, d_x: int = 784, hidden: int | tuple[int, ...] = 500, D: int = 2, K: int = 3,
        constraint: str = "shifted", family: str = "planar", dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(constraint)
        hidden = tuple(hidden) if isinstance(hidden, list | tuple) else hidden
        sizes = hidden if isinstance(hidden, tuple) else (hidden,)
        for name, value, least in (("d_x", d_x, 1), ("D", D, 1), ("K", K, 0), *(("hidden", h, 1) for h in sizes)):
            check_int(name, value, least)
        check_int("the number of hidden layers", len(sizes), least=1)
        if family not in FAMILIES or (family == "gaussian" and K > 0):
            raise ValueError(f"family must be one of {FAMILIES}, the last with K = 0, got {family!r} with K = {K}")
        if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {dropout!r}")
        self.settings = {
            "d_x": d_x, "hidden": hidden, "D": D, "K": K, "constraint": constraint, "family": family,
            "dropout": float(dropout),
        }  # fmt: skip
        self.d_x, self.D, self.K, self.family = d_x, D, K, family
        self.encoder = nn.Sequential(*[nn.Dropout(dropout)] * (dropout > 0), *_layers(d_x, *sizes))
        # μ, log σ², w, u, b, and the shear: linear heads in one matrix
        self.head_sizes = [D, D, K * D, K * D, K] + [D * (D - 1) // 2] * (family == "gaussian")
        self.heads = nn.Linear(sizes[-1], sum(self.head_sizes))
        self.decoder = nn.Sequential(*_layers(D, *reversed(sizes)), nn.Linear(sizes[0], d_x))

    def extra_repr(self) -> str:
        """Name the settings when the model is printed."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())

    def encode(self, x: Tensor) -> FlowPosterior:
        """Return the posterior's parameters for each image of x (B, d_x)."""
        self.check_images(x)
        with _own_precision(self):
            return self._encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """Return the logits (..., d_x) of the pixels at z (..., D)."""
        dtype = next(self.parameters()).dtype
        if not isinstance(z, Tensor) or z.dtype != dtype:
            raise TypeError(f"z must be a tensor of the model's dtype {dtype}, got {getattr(z, 'dtype', type(z))}")
        if z.shape[-1:] != (self.D,):
            raise ValueError(f"z must have shape (..., {self.D}), got {tuple(z.shape)}")
        with _own_precision(self):
            logits = self.decoder(z.reshape(-1, self.D))  # one row a point, for any layer that a reader has added
            return logits.reshape(*z.shape[:-1], self.d_x)

    def forward(self, x: Tensor) -> ElboTerms:
        """Return the ELBO's four terms at one draw of z0 per image, in train() and eval() alike."""
        self.check_images(x)
        return self.elbo_terms(x)

    def elbo_terms(self, x: Tensor) -> ElboTerms:
        """As `forward`, without looking at the pixel values: for a loop that has checked its data once."""
        with _own_precision(self):
            zK, log_q0, sum_ladj = self._encode(x).rsample()
            log_px_z = bernoulli_log_likelihood(x, self.decoder(zK))
        return ElboTerms(log_px_z, standard_normal_log_density(zK), log_q0, sum_ladj)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """Return log p(x, z) = log p(x|z) + log p(z) for each image of x (B, d_x), in nats.

        Shapes: z (..., B, D), each image at its own z, or (..., 1, D), all images at the same z, which is decoded
        once; returns (..., B). Raises as `encode` and `decode`. Derived in: notebooks/05_elbo_terms, section
        "What are the four terms?".
        """
        self.check_images(x)
        if not isinstance(z, Tensor) or z.dim() < 2 or z.shape[-2] not in (1, len(x)):
            raise ValueError(
                f"z must have shape (..., {len(x)}, {self.D}) or (..., 1, {self.D}), got {getattr(z, 'shape', type(z))}"
            )
        return self._log_joint(x, z)

    def _log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        logits, log_pz = self.decode(z), standard_normal_log_density(z)
        if z.shape[-2] == len(x):
            return bernoulli_log_likelihood(x, logits) + log_pz
        # Σ_i [x_i logit_i − softplus(logit_i)] as one product of matrices: the logits are never expanded to B images
        with _own_precision(self):
            return (logits @ x.T).squeeze(-2) + (log_pz - F.softplus(logits).sum(dim=-1))

    def elbo_draws(self, x: Tensor, posterior: FlowPosterior, n: int) -> Tensor:
        """Return n draws of the ELBO of each image of x (B, d_x) under any posterior: (n, B), in nats.

        One draw is log p(x, zK) − log q0(z0) + Σ ladj. The posterior is of the B images, or one for all of them.
        Gradients reach its parameters. Raises ValueError for n < 1 or another batch. Derived in:
        notebooks/06_amortized_encoder, section "Can one flow serve all images?".
        """
        self.check_images(x)
        check_int("n", n, least=1)
        if not isinstance(posterior, FlowPosterior) or posterior.mu.shape not in ((len(x), self.D), (1, self.D)):
            raise ValueError(f"posterior must be of {len(x)} images and D = {self.D}, got {posterior!r:.90}")
        size, draws = max(1, ROWS_AT_ONCE // max(1, len(x))), []
        for start in range(0, n, size):
            zK, log_q0, sum_ladj = posterior.rsample((min(size, n - start),))
            draws.append(self._log_joint(x, zK) - log_q0 + sum_ladj)
        return torch.cat(draws)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Generate n images: z ~ N(0, I), decoded. No flow is involved. Returns probabilities (n, d_x)."""
        check_int("n", n, least=0)
        like = next(self.parameters())
        with evaluating(self):
            return torch.sigmoid(self.decode(torch.randn(n, self.D, dtype=like.dtype, device=like.device)))

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return pixel probabilities (B, d_x) decoded from z0 = μ, pushed through the flow: to look at only.

        Gradients pass, as through `encode` and `decode`.
        """
        with evaluating(self):
            posterior = self.encode(x)
            zK, _ = planar_chain(posterior.mu, posterior.w, posterior.u, posterior.b, posterior.constraint)
            return torch.sigmoid(self.decode(zK))

    def check_images(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless x is floating, (B, d_x), and within [0, 1]."""
        like = next(self.parameters())
        fits = isinstance(x, Tensor) and (x.dtype, x.device, x.layout) == (like.dtype, like.device, torch.strided)
        if not fits or like.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                "x must be a floating tensor, dense, of the model's dtype and device; both must be float32 or float64; "
                f"got {getattr(x, 'dtype', type(x))} on {getattr(x, 'device', None)}, the model is {like.dtype} on "
                f"{like.device}: bytes go through data.to_float"
            )
        if x.dim() != 2 or x.shape[1] != self.d_x:
            raise ValueError(f"x must have shape (B, {self.d_x}), got {tuple(x.shape)}")
        if torch.compiler.is_compiling():
            return  # no values to look at
        with contextlib.suppress(RuntimeError):  # vmap's own: no single truth value for a batch of them
            if not ((x >= 0) & (x <= 1)).all():
                raise ValueError("x must lie in [0, 1] and hold no NaN: divide grey levels 0..255 by 255")

    def _encode(self, x: Tensor) -> FlowPosterior:
        mu, logvar, w, u, b, *shear = self.heads(self.encoder(x)).split(self.head_sizes, dim=-1)
        shape = (x.shape[0], self.K, self.D)
        posterior = FlowPosterior(mu, logvar, w.reshape(shape), u.reshape(shape), b, constraint=self.constraint)
        if self.family == "translation":
            moved = posterior.mu + (posterior.u * torch.tanh(posterior.b).unsqueeze(-1)).sum(dim=-2)
            return posterior.without_steps().replace(mu=moved)
        return posterior.replace(shear=shear[0]) if shear else posterior


def _layers(*sizes: int) -> list[nn.Module]:
    return [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
