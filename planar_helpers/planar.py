"""The planar flow: one step, a chain of K steps, its inverse, and the two classes that hold parameters.

A step moves z along one direction, by an amount that depends on one coordinate of z only:

    f(z) = z + û tanh(wᵀz + b),        log|det ∂f/∂z| = log(h² + (1 + wᵀû)(1 − h²)),   h = tanh(wᵀz + b).

û is u, changed just enough along w that 1 + wᵀû > 0, which makes f invertible.

Source: Rezende & Mohamed 2015, "Variational Inference with Normalizing Flows", section 4.1 and appendix A.1.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Transform, constraints

CONSTRAINTS = ("paper", "shifted")
LOG_E_MINUS_1 = math.log(math.e - 1)  # softplus(log(e − 1)) = 1, so the shifted m has m(0) = 0


def constrain_u(w: Tensor, u: Tensor, constraint: str = "shifted") -> Tensor:
    """Return û, the smallest change of u along w that makes the planar step invertible.

        û = u + (m(s) − s) w/‖w‖²,   s = wᵀu,   so that wᵀû = m(s) > −1
        "paper":    m(s) = −1 + softplus(s)                  (m(0) = −0.307: u = 0 is not the identity)
        "shifted":  m(s) = −1 + softplus(s + log(e − 1))     (m(0) = 0: u = 0 is the identity)

    Shapes: w, u and û are (..., D), batch shapes broadcast. At w = 0 exactly the step is a translation,
    whatever u is, and û = u by convention.

    As ‖w‖ → 0 the paper's û truly diverges, like 0.307/‖w‖, and its gradient like 1/‖w‖². Both are finite for
    ‖w‖ ≥ 1e-6; where 1/‖w‖² would come near overflow (‖w‖ < 7e-16 in float32) w counts as 0. The shifted û stays
    bounded, its gradient grows like 1/‖w‖ only (w counts as 0 for ‖w‖ < 7e-35 in float32).

    Raises ValueError for an unknown constraint or shapes that do not fit, TypeError unless both are float32
    or both float64.

    Source: Rezende & Mohamed 2015, appendix A.1 (the paper's m). Derived in: notebooks/03_u_hat_constraint,
    section "What is the smallest change of u that keeps the step invertible?".

    >>> w, u = torch.tensor([1.0, 0.0]), torch.tensor([-4.0, 2.0])
    >>> (w @ constrain_u(w, u)).item() > -1
    True
    """
    _check_step({"w": w, "u": u})
    return _constrain(w, u, constraint)[0]


def _constrain(w: Tensor, u: Tensor, constraint: str) -> tuple[Tensor, Tensor]:
    """Return û (..., D) and slack = 1 + wᵀû = 1 + m(s) > 0 (...,), which is never recomputed from û."""
    check_constraint(constraint)
    # w/‖w‖² by scaling first: ‖w‖² on its own would underflow for ‖w‖ < 1e-19 in float32.
    # As zero counts what 1/‖w‖² (paper) or 1/‖w‖ (shifted) would bring near overflow.
    tiny = torch.finfo(w.dtype).tiny ** (0.4 if constraint == "paper" else 0.9)
    largest = w.detach().abs().amax(dim=-1, keepdim=True)
    is_zero = largest <= tiny
    scale = largest.masked_fill(is_zero, 1.0)
    w_scaled = (w / scale).masked_fill(is_zero, 1.0)
    w_over_norm2 = w_scaled / (w_scaled * w_scaled).sum(dim=-1, keepdim=True) / scale

    s = (w * u).sum(dim=-1, keepdim=True)
    if constraint == "paper":
        slack = F.softplus(s, threshold=40)  # torch's own threshold, 20, is felt in float64
        m_minus_s = F.softplus(-s, threshold=40) - 1
    else:
        slack = F.softplus(s + LOG_E_MINUS_1, threshold=40)
        # m(s) − s without cancellation near s = 0, where it is −s/e, and without overflow at either end:
        # log(1 + (e⁻ˢ − 1)/e) for s ≥ 0, log(1 + (eˢ − 1)(1 − 1/e)) − s for s < 0.
        positive = s >= 0
        factor = torch.where(positive, s.new_tensor(1 / math.e), s.new_tensor(1 - 1 / math.e))
        m_minus_s = torch.log1p(factor * torch.expm1(torch.where(positive, -s, s))) + F.relu(-s)
    u_hat = u + m_minus_s.masked_fill(is_zero, 0.0) * w_over_norm2
    return u_hat, slack.masked_fill(is_zero, 1.0).squeeze(-1)


def planar_step(z: Tensor, w: Tensor, u: Tensor, b: Tensor, slack: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Apply one planar step with u exactly as given, and return where z lands and the step's log|det|.

        f(z) = z + u h,     h = tanh(a),  a = wᵀz + b
        ladj = log|1 + wᵀu h′| = log|h² + slack h′|,     h′ = 1 − h²,  slack = 1 + wᵀu

    The second form has no cancellation where slack → 0. Pass `slack` if it is known better than 1 + wᵀu can be
    recomputed. Without it the step may fold: nothing here asks that f be invertible.

    Shapes: z, w, u (..., D), b and slack (...,), batch shapes broadcast; returns z_next (..., D), ladj (...,), in nats.
    Raises ValueError for shapes that do not fit (a b or slack with more axes than z, w and u have before D, such as
    (5, 1) for five points, too), TypeError for dtypes and devices, as `planar_chain`.

    Source: Rezende & Mohamed 2015, equations (10) to (12). Derived in: notebooks/02_planar_flow, section
    "What is the determinant?".

    >>> z, w, u, b = torch.zeros(2), torch.ones(2), torch.ones(2), torch.tensor(0.0)
    >>> planar_step(z, w, u, b)[1].exp().item()  # 1 + wᵀu at the hyperplane
    3.0
    """
    _check_step({"z": z, "w": w, "u": u}, b=b, **({} if slack is None else {"slack": slack}))
    slack = 1 + (w * u).sum(dim=-1) if slack is None else slack
    a = (w * z).sum(dim=-1) + b
    z_next = z + u * torch.tanh(a).unsqueeze(-1)
    return z_next, torch.log(torch.abs(_det(a, slack)))


def _det(a: Tensor, slack: Tensor) -> Tensor:
    """Return the determinant of a step's Jacobian, h² + slack h′, shape (...,)."""
    h = torch.tanh(a)
    h_prime = 4 * torch.sigmoid(2 * a) * torch.sigmoid(-2 * a)  # = 1 − tanh² a, accurate where tanh² a → 1
    return h**2 + slack * h_prime


def planar_chain(z0: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str = "shifted") -> tuple[Tensor, Tensor]:
    """Push z0 through K planar steps, each made invertible by û, and sum their log-determinants.

        zK = f_K(… f_1(z0)),     sum_ladj = Σ_k log|det ∂f_k/∂z_{k−1}|,     log qK(zK) = log q0(z0) − sum_ladj

    Shapes: z0 (..., D), w and u (..., K, D), b (..., K), batch shapes broadcast; returns zK (..., D) and
    sum_ladj (...,), in nats. K = 0 is the identity.

    Raises ValueError for shapes that do not fit, D < 1, or an unknown constraint, TypeError unless all are float32
    or all float64 (half precision is too coarse for log|det|, under torch.autocast too), on one device.

    Source: Rezende & Mohamed 2015, equation (13). Derived in: notebooks/02_planar_flow, section
    "What happens when K steps follow one another?".

    >>> z0, w, u, b = torch.zeros(5, 2), torch.ones(5, 3, 2), torch.ones(5, 3, 2), torch.zeros(5, 3)
    >>> zK, sum_ladj = planar_chain(z0, w, u, b)
    >>> zK.shape, sum_ladj.shape
    (torch.Size([5, 2]), torch.Size([5]))
    """
    z, a = _check_chain("z0", z0, w, u, b), []
    u_hat, slack = _constrain(w, u, constraint)
    # unbind, not w[..., k, :] in the loop: indexing makes the backward pass quadratic in K.
    for w_k, u_hat_k, b_k in zip(w.unbind(-2), u_hat.unbind(-2), b.unsqueeze(-1).unbind(-2), strict=True):
        a.append((w_k * z).sum(dim=-1, keepdim=True) + b_k)
        z = z + u_hat_k * torch.tanh(a[-1])
    # A step's determinant needs only its own a and slack, and is positive: all K are taken at once.
    sum_ladj = torch.log(_det(torch.cat(a, dim=-1), slack)).sum(dim=-1) if a else z.new_zeros(z.shape[:-1])
    return z, sum_ladj


def planar_inverse(zK: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str = "shifted") -> Tensor:
    """Invert `planar_chain`: return the z0 that the K steps send to zK.

    Each step, undone last to first, is one scalar equation: with y = f(z), a = wᵀz + b and a′ = wᵀy + b,

        a + wᵀû tanh(a) = a′     strictly increasing in a, with its root within |wᵀû| of a′
        z = y − û tanh(a)

    solved by Newton's method inside that bracket. Derivatives of every order come from the implicit function
    theorem, in either direction and under `torch.func` too. f(f⁻¹(y)) = y up to rounding times the chain's own
    amplification: a step with wᵀû = 1000 magnifies an error up to a thousandfold. How often the loop runs depends on
    the values, so `torch.compile` and `torch.export` do not take it.

    Shapes, convention and errors as `planar_chain`. Source: the bracket is that of TuringLang/Bijectors.jl,
    PlanarLayer. Derived in: notebooks/03_u_hat_constraint, section "How is a step inverted?".

    >>> w, u, b = torch.ones(3, 2), torch.ones(3, 2), torch.zeros(3)
    >>> zK, _ = planar_chain(torch.tensor([0.5, -1.0]), w, u, b)
    >>> [round(c, 4) for c in planar_inverse(zK, w, u, b).tolist()]
    [0.5, -1.0]
    """
    z = _check_chain("zK", zK, w, u, b)
    u_hat, slack = _constrain(w, u, constraint)
    for w_k, u_hat_k, b_k, slack_k in reversed(
        list(zip(w.unbind(-2), u_hat.unbind(-2), b.unbind(-1), slack.unbind(-1), strict=True))
    ):
        a = _SolveAlongW.apply((w_k * z).sum(dim=-1) + b_k, slack_k.expand(z.shape[:-1]))
        z = z - u_hat_k * torch.tanh(a).unsqueeze(-1)
    return z


def _newton(target: Tensor, slack: Tensor) -> Tensor:
    """Solve a + (slack − 1) tanh(a) = target for a, elementwise, by Newton's method in a bracket; one shape (...,)."""
    m = slack - 1
    lo, hi = target - m.abs(), target + m.abs()
    # g is odd, so take target ≥ 0. There Newton's method is monotone from target/(1 + m) for m > 0
    # (g concave) and from target − m for m < 0 (g convex); the bracket only guards against rounding.
    a = torch.where(m > 0, target / slack.clamp(min=1), target - m * target.sign())
    rounding = torch.finfo(target.dtype).eps
    for _ in range(200):
        h = torch.tanh(a)
        residual = a + m * h - target
        lo, hi = torch.where(residual <= 0, a, lo), torch.where(residual >= 0, a, hi)
        newton = a - residual / (h**2 + slack * (1 - h**2))
        old, a = a, torch.where((newton >= lo) & (newton <= hi), newton, (lo + hi) / 2)  # at the root: lo = a = hi
        # Done where the equation held to rounding, or where a no longer moves.
        solved = (residual.abs() <= 2 * rounding * (old.abs() + (m * h).abs())) | (
            (a - old).abs() <= 4 * rounding * old.abs()
        )
        if bool(solved.all()):
            break
    return a


class _SolveAlongW(torch.autograd.Function):
    """Give `_newton` its derivatives, those of the implicit function theorem.

        ∂a/∂target = 1/det,     ∂a/∂slack = −h/det,     h = tanh(a), det = h² + slack h′ of `_det`

    Both are functions of a and slack, so they can be differentiated in their turn. To let autograd differentiate a
    last Newton iteration instead would be shorter, and lose all digits where det comes near the rounding.
    """

    forward = staticmethod(_newton)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, slack = ctx.saved_tensors
        grad_target = grad / _det(a, slack)
        return grad_target, -torch.tanh(a) * grad_target

    @staticmethod
    def jvp(ctx: Any, d_target: Tensor, d_slack: Tensor) -> Tensor:
        # torch switches forward mode off in here, for outer derivatives too, and a jvp of a jvp would be wrong without
        # a word: switch it on again (inference_mode does), on the saved values without this derivative's own tangents.
        with torch.inference_mode(False):
            target, slack = (torch.autograd.forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors)
            a = _SolveAlongW.apply(target, slack)
            return (d_target - torch.tanh(a) * d_slack) / _det(a, slack)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], *inputs: Tensor) -> tuple[Tensor, int]:
        first = [t if d is None else t.movedim(d, 0) for t, d in zip(inputs, in_dims, strict=True)]
        return _SolveAlongW.apply(*torch.broadcast_tensors(*first)), 0


class PlanarTransform(Transform):
    """Wrap K planar steps as a `torch.distributions` transform, so that `rsample` and `log_prob` work.

    `log_prob` goes through `planar_inverse`. `cache_size=1` saves that for the points just sampled, and then must not
    be used while w, u, b change: what is kept would be stale.

    Shapes: w, u (..., K, D), b (..., K). Raises as `planar_chain`. Derived in: notebooks/03_u_hat_constraint, section
    "What is log q_K at a point we never sampled?".

    >>> from torch.distributions import Independent, Normal, TransformedDistribution
    >>> q0 = Independent(Normal(torch.zeros(2), 1.0), 1)
    >>> qK = TransformedDistribution(q0, PlanarTransform(torch.ones(3, 2), torch.ones(3, 2), torch.zeros(3)))
    >>> qK.log_prob(torch.zeros(5, 2)).shape
    torch.Size([5])
    """

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, w: Tensor, u: Tensor, b: Tensor, constraint: str = "shifted", cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        _check_parameters(w, u, b)
        check_constraint(constraint)
        self.w, self.u, self.b, self.constraint = w, u, b, constraint

    def with_cache(self, cache_size: int = 1) -> "PlanarTransform":
        """Return the same transform with another cache size (asked for by `torch.distributions`)."""
        return PlanarTransform(self.w, self.u, self.b, self.constraint, cache_size)

    def __eq__(self, other: object) -> bool:
        """Compare the constraint and the parameters' values."""
        return (
            isinstance(other, PlanarTransform)
            and (self.constraint, self.w.device) == (other.constraint, other.w.device)
            and all(torch.equal(getattr(self, name), getattr(other, name)) for name in "wub")
        )

    def __repr__(self) -> str:
        return f"PlanarTransform(D={self.w.shape[-1]}, K={self.w.shape[-2]}, constraint={self.constraint!r})"

    def _call(self, z0: Tensor) -> Tensor:
        return planar_chain(z0, self.w, self.u, self.b, self.constraint)[0]

    def _inverse(self, zK: Tensor) -> Tensor:
        return planar_inverse(zK, self.w, self.u, self.b, self.constraint)

    def log_abs_det_jacobian(self, z0: Tensor, zK: Tensor) -> Tensor:
        """Return sum_ladj at z0, shape (...,)."""
        return planar_chain(z0, self.w, self.u, self.b, self.constraint)[1]

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """Broadcast a base shape (..., D) with the parameters' batch shape; ValueError where they do not fit."""
        # a tensor of any shape takes no memory where it only repeats one number
        return _check_chain("the base", self.w.new_empty(()).expand(shape), self.w, self.u, self.b).shape

    inverse_shape = forward_shape


class CarriesConstraint(nn.Module):
    """Keep the constraint with the weights that were trained under it.

    `constraint` can be read, not set: weights, settings and names would no longer agree. `state_dict()` carries its
    index in CONSTRAINTS as a uint8 tensor. Raises ValueError where weights of another constraint, or weights without
    one, are loaded, with strict=False too: it is never guessed.

    >>> PlanarFlow(2, 8).state_dict()["_extra_state"]
    tensor(1, dtype=torch.uint8)
    """

    def __init__(self, constraint: str) -> None:
        super().__init__()
        check_constraint(constraint)
        self._constraint = constraint

    @property
    def constraint(self) -> str:
        """The constraint that the weights belong to; AttributeError if it is set."""
        return self._constraint

    def get_extra_state(self) -> Tensor:
        """Return what `state_dict()` keeps besides the weights (asked for by `torch.nn`)."""
        return torch.tensor(CONSTRAINTS.index(self.constraint), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Raise ValueError unless the weights' constraint is this module's own."""
        found = "unknown" if state is None else dict(enumerate(CONSTRAINTS)).get(state.item(), state)
        if found != self.constraint:
            raise ValueError(
                f"the weights are of constraint {found!r}, this {type(self).__name__} is of {self.constraint!r} "
                f"(weights carry the index in {CONSTRAINTS} as '_extra_state': where that is missing, add it)"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(name.startswith(prefix) for name in state_dict):
            self.set_extra_state(state_dict.get(prefix + "_extra_state"))  # before any weight is copied
        super()._load_from_state_dict(state_dict, prefix, *args)


class PlanarFlow(CarriesConstraint):
    """Hold w, u (K, D) and b (K,) as free parameters of one flow, near the identity at the start.

    Calling it gives (zK, sum_ladj); `inverse` gives z0. Raises ValueError for D < 1, K < 0 or an unknown
    constraint. Derived in: notebooks/04_fitting_densities, section "How do we fit it?".

    >>> _ = torch.manual_seed(0)
    >>> zK, sum_ladj = PlanarFlow(D=2, K=8)(torch.zeros(5, 2))
    >>> bool(sum_ladj.abs().max() < 0.5)
    True
    """

    def __init__(self, D: int, K: int, constraint: str = "shifted") -> None:
        super().__init__(constraint)
        check_int("D", D, least=1)
        check_int("K", K, least=0)
        self.w = nn.Parameter(torch.randn(K, D))
        self.u = nn.Parameter(identity_u(self.w.detach(), constraint) + 0.01 * torch.randn(K, D))
        self.b = nn.Parameter(torch.zeros(K))

    def forward(self, z0: Tensor) -> tuple[Tensor, Tensor]:
        """Return (zK, sum_ladj), as `planar_chain`."""
        return planar_chain(z0, self.w, self.u, self.b, self.constraint)

    def inverse(self, zK: Tensor) -> Tensor:
        """Return z0, as `planar_inverse`."""
        return planar_inverse(zK, self.w, self.u, self.b, self.constraint)

    def transform(self) -> PlanarTransform:
        """Return the flow as a `torch.distributions` transform, with its own constraint; it follows the training."""
        return PlanarTransform(self.w, self.u, self.b, self.constraint)

    def extra_repr(self) -> str:
        """Say D, K and the constraint when the module is printed."""
        return f"D={self.w.shape[1]}, K={self.w.shape[0]}, constraint={self.constraint!r}"


def identity_u(w: Tensor, constraint: str) -> Tensor:
    """Return the u (..., D) with û = 0, whose step is the identity: log(e − 1) w/‖w‖² ("paper"), or 0 ("shifted").

    Derived in: notebooks/03_u_hat_constraint, section "Which u makes the step the identity?".
    """
    return LOG_E_MINUS_1 * w / (w**2).sum(-1, keepdim=True) if constraint == "paper" else torch.zeros_like(w)


def check_int(name: str, value: int, least: int) -> None:
    """Raise ValueError unless value is an integer of at least `least` (True and False are none)."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_constraint(constraint: str) -> None:
    """Raise ValueError unless the constraint is one of "paper" and "shifted"."""
    if constraint not in CONSTRAINTS:
        raise ValueError(f"constraint must be one of {CONSTRAINTS}, got {constraint!r}")


def _check_tensors(**tensors: Tensor) -> None:
    """Raise TypeError unless all are float32 or all float64 tensors on one device."""
    fine = all(isinstance(t, Tensor) and t.dtype in (torch.float32, torch.float64) for t in tensors.values())
    found = {k: f"{t.dtype} on {t.device}" if isinstance(t, Tensor) else type(t).__name__ for k, t in tensors.items()}
    if not fine or len(set(found.values())) > 1:  # half precision is too coarse for log|det|
        raise TypeError(
            f"{', '.join(tensors)} must be float32 or float64 torch.Tensors that share one dtype and one device, "
            f"got {', '.join(f'{name} {kind}' for name, kind in found.items())}"
        )


def _check_parameters(w: Tensor, u: Tensor, b: Tensor) -> None:
    """Check the shapes and dtypes of a chain's parameters (no values: that would wait for the device)."""
    _check_tensors(w=w, u=u, b=b)
    if w.dim() < 2 or u.shape != w.shape or b.shape != w.shape[:-1] or w.shape[-1] < 1:
        raise ValueError(
            "w, u and b must have shapes (..., K, D), (..., K, D) and (..., K) with D ≥ 1, "
            f"got {tuple(w.shape)}, {tuple(u.shape)} and {tuple(b.shape)}"
        )


def _check_chain(name: str, z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    """Check that z fits the parameters, and return it expanded to the batch shape of both together."""
    _check_parameters(w, u, b)
    _check_tensors(**{name: z}, w=w)
    if z.dim() < 1 or z.shape[-1] != w.shape[-1]:
        raise ValueError(f"{name} must have shape (..., {w.shape[-1]}) to fit w, got {tuple(z.shape)}")
    return z.expand(*_broadcast(**{name: z.shape[:-1], "w": w.shape[:-2]}), w.shape[-1])


def _check_step(vectors: dict[str, Tensor], **scalars: Tensor) -> None:
    """Check one step's vectors (..., D) and scalars (...,), which may not have an axis that all the vectors lack."""
    _check_tensors(**vectors, **scalars)
    batch = _broadcast(
        **{name: tensor.shape[:-1] for name, tensor in vectors.items()},
        **{name: tensor.shape for name, tensor in scalars.items()},
    )
    sizes = {tuple(tensor.shape[-1:]) for tensor in vectors.values()}
    if len(sizes) > 1 or (0,) in sizes or len(batch) >= max(tensor.dim() for tensor in vectors.values()):
        raise ValueError(
            f"{', '.join(vectors)} must be (..., D), with the same size D ≥ 1, b and slack (...,), got "
            + ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in (vectors | scalars).items())
        )


def _broadcast(**shapes: torch.Size) -> torch.Size:
    """Return the batch shape of all together."""
    try:
        return torch.broadcast_shapes(*shapes.values())
    except RuntimeError as error:
        raise ValueError(
            f"{' and '.join(shapes)} must have batch shapes that broadcast, got {[*map(tuple, shapes.values())]}"
        ) from error
