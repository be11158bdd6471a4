"""The flow against independent routes: autograd's Jacobian in float64, closed forms, quadrature, bisection."""

import copy
import importlib
import inspect
import io
import math
import pickle
import pkgutil
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.functional import jacobian
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import planar_helpers
from planar_helpers.grid import log_mass, plane_grid
from planar_helpers.planar import (
    CarriesConstraint,
    PlanarFlow,
    PlanarTransform,
    constrain_u,
    planar_chain,
    planar_inverse,
    planar_step,
)
from planar_helpers.planar import _SolveAlongW as SolveAlongW

CONSTRAINTS = ("paper", "shifted")
solve_along_w = SolveAlongW.apply
seeds = st.integers(0, 2**31)
# torch itself scripts a few derivatives when forward mode is first used, and warns of it
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")


def m_of(s: float, constraint: str) -> float:
    """m(s) from its definition, in Python floats, with the two branches written by hand."""
    t = s if constraint == "paper" else s + math.log(math.e - 1)
    return -1 + (t + math.log1p(math.exp(-t)) if t > 0 else math.log1p(math.exp(t)))


def random_chain(seed: int, *batch: int, K: int, D: int, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw(*batch, K, D), draw(*batch, K, D), draw(*batch, K)


def standard_normal_through(transform: PlanarTransform) -> TransformedDistribution:
    return TransformedDistribution(Independent(Normal(torch.zeros(2).double(), torch.ones(2).double()), 1), transform)


# û ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@given(seed=seeds, D=st.integers(1, 6), log_norm=st.floats(-4, 2), s=st.floats(-30, 300))
def test_w_dot_u_hat_is_m_of_s_and_the_change_is_along_w(
    constraint: str, seed: int, D: int, log_norm: float, s: float
) -> None:
    w, u, _ = random_chain(seed, K=1, D=D)
    w, u = w[0] / w.norm() * 10**log_norm, u[0]
    u = u + (s - w @ u) * w / (w @ w)  # now wᵀu = s
    u_hat = constrain_u(w, u, constraint)
    assert (w @ u_hat).item() == pytest.approx(m_of(s, constraint), abs=1e-9 * (1 + abs(s)))
    change = u_hat - u
    across = change - (change @ w) * w / (w @ w)
    assert across.norm() <= 1e-9 * (1 + u.norm())


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_s_neither_overflows_nor_goes_to_zero_before_floats_do(constraint: str, dtype: torch.dtype) -> None:
    s = torch.tensor([-1e4, -1e3, -80.0, -1.0, 0.0, 1.0, 89.0, 1e3, 1e4], dtype=dtype)
    w = torch.ones(9, 1, dtype=dtype, requires_grad=True)
    u = s.unsqueeze(1).clone().requires_grad_()
    u_hat = constrain_u(w, u, constraint)
    assert torch.isfinite(u_hat).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(u_hat.sum(), (w, u)))
    # At a = 0 the determinant is the slack itself: log slack ≈ s far below, log s far above.
    ladj = planar_chain(torch.zeros(9, 1, dtype=dtype), w.unsqueeze(-2), u.unsqueeze(-2), w[:, :1] * 0, constraint)[1]
    for value, ladj_s in zip(s.tolist(), ladj.tolist(), strict=True):
        if value >= -80:  # softplus(−1e3) is 0 in any float
            exact = (
                math.log1p(m_of(value, constraint))
                if value > -30
                else value + math.log(math.e - 1) * (constraint == "shifted")
            )
            assert ladj_s == pytest.approx(exact, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("norm", [1e-45, 1e-38, 1e-30, 1e-20, 1e-6, 1e-3, 1.0, 1e4])
def test_shifted_is_finite_with_finite_gradients_for_tiny_and_large_w(norm: float) -> None:
    w = (norm * torch.nn.functional.normalize(torch.randn(50, 3), dim=-1)).requires_grad_()
    u = torch.randn(50, 3, requires_grad=True)
    u_hat = constrain_u(w, u, "shifted")
    assert torch.isfinite(u_hat).all() and (u_hat.norm(dim=-1) <= 2 * u.norm(dim=-1) + 1).all()
    for gradient in torch.autograd.grad(u_hat.square().sum(), (w, u)):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [0.0, 1e-45, 1e-38, 1e-30, 1e-20, 1e-15, 1e-6, 1.0, 1e4])
def test_paper_is_never_nan_and_finite_from_1e_6_on(norm: float, dtype: torch.dtype) -> None:
    directions = torch.cat([torch.randn(50, 2), torch.tensor([[1.0, 0.0], [0.0, -1.0]])]).to(dtype)
    w = (norm * torch.nn.functional.normalize(directions, dim=-1)).requires_grad_()
    u = torch.randn(52, 2, dtype=dtype, requires_grad=True)
    u_hat = constrain_u(w, u, "paper")
    gradients = torch.autograd.grad(u_hat.sum(), (w, u))
    for values in (u_hat, *gradients):
        assert not torch.isnan(values).any()
        assert norm < 1e-6 or torch.isfinite(values).all()


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_float64_slack_and_u_hat_agree_where_softplus_is_nearly_linear(constraint: str) -> None:
    s = torch.linspace(-30, 60, 181).double().unsqueeze(1)
    u_hat = constrain_u(torch.ones_like(s), s, constraint)
    expected = torch.tensor([m_of(value, constraint) for value in s[:, 0].tolist()], dtype=torch.float64)
    assert ((u_hat[:, 0] - expected).abs() <= 4e-16 * (1 + s[:, 0].abs())).all()


def test_paper_diverges_like_one_over_w_and_shifted_does_not() -> None:
    u = torch.zeros(2, dtype=torch.float64)
    for norm in (1e-3, 1e-6, 1e-9):
        w = torch.tensor([norm, 0.0], dtype=torch.float64)
        assert constrain_u(w, u, "paper").norm().item() * norm == pytest.approx(1 - math.log(2), rel=1e-6)
        assert constrain_u(w, u, "shifted").norm() == 0


@given(seed=seeds)
def test_shifted_limit_as_w_vanishes_depends_on_its_direction(seed: int) -> None:
    direction, u, _ = random_chain(seed, K=1, D=3)
    direction, u = direction[0] / direction.norm(), u[0]
    limit = u - (direction @ u) * direction / math.e
    assert torch.allclose(constrain_u(1e-9 * direction, u, "shifted"), limit, atol=1e-8)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_w_zero_is_a_translation_by_convention(constraint: str) -> None:
    w, u, b = torch.zeros(1, 2), torch.tensor([[3.0, -2.0]]), torch.tensor([0.7])
    assert torch.equal(constrain_u(w, u, constraint), u)
    zK, ladj = planar_chain(torch.ones(2), w, u, b, constraint)
    assert ladj.item() == pytest.approx(0, abs=1e-7)
    assert torch.allclose(zK, torch.ones(2) + u[0] * math.tanh(0.7))


@pytest.mark.parametrize("constraint, power", [("paper", 0.4), ("shifted", 0.9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_w_counts_as_zero_up_to_the_cut_and_not_above(constraint: str, power: float, dtype: torch.dtype) -> None:
    cut = torch.tensor(torch.finfo(dtype).tiny ** power, dtype=dtype)
    above = torch.nextafter(cut, torch.ones_like(cut))
    u = torch.tensor([1.0, 1.0], dtype=dtype)
    for sign in (1, -1):
        kept, changed = (constrain_u(torch.stack([0 * size, sign * size]), u, constraint) for size in (cut, above))
        assert torch.equal(kept, u) and not torch.equal(changed, u)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_gradients_of_u_hat_against_finite_differences(constraint: str) -> None:
    w, u, _ = random_chain(3, K=6, D=3)
    u[0] = 0.0  # s = 0 exactly: the shifted form's removable singularity
    assert gradcheck(lambda w, u: constrain_u(w, u, constraint), (w.requires_grad_(), u.requires_grad_()))


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_the_u_that_makes_each_constraint_the_identity(constraint: str) -> None:
    w = torch.randn(4, 2, dtype=torch.float64)
    u = math.log(math.e - 1) * w / (w**2).sum(-1, keepdim=True) if constraint == "paper" else torch.zeros_like(w)
    assert constrain_u(w, u, constraint).abs().max() < 1e-15


# step and chain -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@given(seed=seeds, D=st.integers(1, 5), K=st.integers(0, 8), log_scale=st.floats(-2, 0.5))
def test_sum_ladj_equals_the_log_determinant_of_autograds_jacobian(
    constraint: str, seed: int, D: int, K: int, log_scale: float
) -> None:
    w, u, b = random_chain(seed, K=K, D=D, scale=10**log_scale)
    z0 = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    zK, sum_ladj = planar_chain(z0, w, u, b, constraint)
    sign, expected = torch.linalg.slogdet(jacobian(lambda z: planar_chain(z, w, u, b, constraint)[0], z0))
    assert sign == 1
    # the Jacobian's own determinant cancels where it is small: compare where it does not
    if expected > -12:
        assert sum_ladj.item() == pytest.approx(expected.item(), abs=1e-8, rel=1e-8)


def test_a_step_uses_u_as_given_and_may_fold() -> None:
    z = torch.tensor([[-0.9], [0.0], [0.9]], dtype=torch.float64)
    w, u, b = torch.ones(3, 1).double(), torch.full((3, 1), -4.0).double(), torch.zeros(3).double()
    z_next, ladj = planar_step(z, w, u, b)
    assert torch.allclose(z_next[:, 0], z[:, 0] - 4 * torch.tanh(z[:, 0]))
    assert torch.allclose(ladj, torch.log(torch.abs(1 - 4 / torch.cosh(z[:, 0]) ** 2)))


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_float32_ladj_agrees_with_float64_down_to_a_slack_of_e_to_minus_79(constraint: str) -> None:
    s = torch.cat([torch.linspace(-79, 79, 317), torch.tensor([1e3, 1e4])])  # halves: exact in float32
    a = torch.cat([torch.tensor([0.0]), 2.0 ** torch.arange(-40, 6)])  # exact in float32 as well
    s, a = torch.meshgrid(s, a, indexing="ij")
    one = torch.ones_like(s).unsqueeze(-1)
    inputs = (a.unsqueeze(-1), one.unsqueeze(-1), s[..., None, None], torch.zeros_like(s).unsqueeze(-1))
    single = planar_chain(*inputs, constraint)[1].double()
    double = planar_chain(*(t.double() for t in inputs), constraint)[1]
    assert torch.isfinite(single).all()
    assert ((single - double).abs() / (1 + double.abs())).max() < 1e-5
    # and float64 is right itself: the closed form in log space, log(exp(2 log h) + exp(log slack + 2 log sech))
    shift = 0.0 if constraint == "paper" else math.log(math.e - 1)
    a, t = a.double(), s.double() + shift
    log_slack = torch.where(t < -30, t, torch.log(torch.logaddexp(t, torch.zeros_like(t))))
    log_sech2 = 2 * (math.log(2) - a - torch.log1p(torch.exp(-2 * a)))
    truth = torch.logaddexp(2 * torch.log(torch.tanh(a)), log_slack + log_sech2)
    assert ((double - truth).abs() / (1 + truth.abs())).max() < 1e-12


def test_chain_is_the_composition_of_its_steps_in_order() -> None:
    w, u, b = random_chain(0, 5, K=3, D=2)
    z0 = torch.randn(5, 2, dtype=torch.float64)
    z, total = z0, torch.zeros(5, dtype=torch.float64)
    for k in range(3):
        z, ladj = planar_step(z, w[:, k], constrain_u(w[:, k], u[:, k]), b[:, k])
        total = total + ladj
    zK, sum_ladj = planar_chain(z0, w, u, b)
    assert torch.allclose(zK, z, atol=1e-12) and torch.allclose(sum_ladj, total, atol=1e-12)


def test_batch_shapes_broadcast_and_edge_sizes_work() -> None:
    w, u, b = random_chain(1, 4, K=3, D=2)
    z0 = torch.randn(7, 4, 2, dtype=torch.float64)
    zK, sum_ladj = planar_chain(z0, w, u, b)
    assert zK.shape == (7, 4, 2) and sum_ladj.shape == (7, 4)
    assert torch.allclose(zK[3, 2], planar_chain(z0[3, 2], w[2], u[2], b[2])[0])
    identity, zero = planar_chain(z0, w[:, :0], u[:, :0], b[:, :0])
    assert torch.equal(identity, z0) and torch.equal(zero, torch.zeros(7, 4, dtype=torch.float64))
    assert planar_chain(z0[0, 0], w, u, b)[0].shape == (4, 2)  # one z0, four chains
    assert planar_chain(torch.zeros(0, 2).double(), w[0], u[0], b[0])[1].shape == (0,)


def test_backward_cost_is_linear_in_K() -> None:
    """Count the elements that the backward pass writes: indexing w[:, k] would write K times the whole tensor."""

    def elements(K: int) -> int:
        w, u, b = (t.requires_grad_() for t in random_chain(0, 10, K=K, D=2))
        zK, sum_ladj = planar_chain(torch.zeros(10, 2, dtype=torch.float64), w, u, b)
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            (zK.sum() + sum_ladj.sum()).backward()
        return sum(max(event.cpu_memory_usage, 0) for event in profile.function_events)

    assert elements(64) < 5 * elements(16)


# inverse ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@given(seed=seeds, D=st.integers(1, 4), s=st.floats(-20, 1e3), log_norm=st.floats(-2, 2), b=st.floats(-1e4, 1e4))
def test_inverse_of_one_step_at_extreme_parameters(
    constraint: str, seed: int, D: int, s: float, log_norm: float, b: float
) -> None:
    w, u, _ = random_chain(seed, K=1, D=D)
    w = w / w.norm() * 10**log_norm
    u = u + (s - (w * u).sum()) * w / (w**2).sum()
    bias = torch.tensor([b], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    y = 3 * torch.randn(20, D, dtype=torch.float64, generator=generator)
    y[10:] -= b * w[0] / (w**2).sum()  # and points near the hyperplane, where the step is steepest
    z = planar_inverse(y, w, u, bias, constraint)
    again = planar_chain(z, w, u, bias, constraint)[0]
    assert ((again - y).abs().amax(-1) <= 1e-10 * (1 + y.abs().amax(-1))).all()


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@given(seed=seeds, D=st.integers(1, 4), K=st.integers(0, 32))
def test_inverse_of_a_chain_of_up_to_32_steps(constraint: str, seed: int, D: int, K: int) -> None:
    w, u, b = random_chain(seed, K=K, D=D)
    y = 3 * torch.randn(20, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    z0 = planar_inverse(y, w, u, b, constraint)
    assert ((planar_chain(z0, w, u, b, constraint)[0] - y).abs()).max() < 1e-10
    assert ((planar_inverse(planar_chain(y, w, u, b, constraint)[0], w, u, b, constraint) - y).abs()).max() < 1e-6


@given(slack=st.floats(1e-20, 1e3), target=st.floats(-1e3, 1e3))
def test_the_scalar_root_against_bisection(slack: float, target: float) -> None:
    lo, hi = target - abs(slack - 1) - 1, target + abs(slack - 1) + 1
    for _ in range(200):
        middle = (lo + hi) / 2
        lo, hi = (middle, hi) if middle + (slack - 1) * math.tanh(middle) < target else (lo, middle)
    root = solve_along_w(torch.tensor(target, dtype=torch.float64), torch.tensor(slack, dtype=torch.float64)).item()
    h = math.tanh(root)
    slope = h**2 + slack * (1 - h**2)
    assert abs(root - lo) <= 1e-11 * (1 + abs(lo)) + 1e-14 * (abs(target) + 1) / max(slope, 1e-10)


def lattice(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Targets and slacks from near nothing to huge, each with each, and near |m|, where the step is flattest."""
    slack = torch.cat([torch.tensor([0.0]), torch.logspace(-30, 9, 118)]).to(dtype)
    target = torch.cat([torch.tensor([0.0]), torch.logspace(-20, 3, 200)]).to(dtype)
    target, slack = torch.meshgrid(torch.cat([target, -target]), slack, indexing="ij")
    near = (slack - 1).abs() * (1 + torch.linspace(-1e-3, 1e-3, len(slack), dtype=dtype)).unsqueeze(1)
    return torch.cat([target, near]), torch.cat([slack, slack])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_root_holds_to_rounding_for_every_target_and_slack_at_once(dtype: torch.dtype) -> None:
    target, slack = lattice(dtype)
    a, target, slack = (t.double() for t in (solve_along_w(target, slack), target, slack))
    part = (slack - 1) * torch.tanh(a)
    residual = (a + part - target).abs() / (a.abs() + part.abs() + target.abs() + 1e-300)
    assert residual.max() < 20 * torch.finfo(dtype).eps


def test_the_bracket_keeps_what_rounding_would_throw_away() -> None:
    """In float32, where slack is near eps and while others are not done: 200 000 roundings off without it."""
    target, slack = torch.meshgrid(torch.logspace(-14, -11, 200), torch.linspace(4e-8, 6e-8, 200), indexing="ij")
    target = torch.cat([target.flatten(), torch.tensor([2.2863181e-14])])  # the last needs 23 iterations
    slack = torch.cat([slack.flatten(), torch.tensor([6.3509492e-07])])
    a, target, slack = (t.double() for t in (solve_along_w(target, slack), target, slack))
    part = (slack - 1) * torch.tanh(a)
    residual = (a + part - target).abs() / (a.abs() + part.abs())
    assert residual.max() < 20 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_root_alone_is_as_good_as_in_company(dtype: torch.dtype) -> None:
    """A stopping rule that lets one element end the loop for itself must not end it too early."""
    target, slack = (t.flatten()[::997] for t in lattice(dtype))
    for one_target, one_slack in zip(target, slack, strict=True):
        a = solve_along_w(one_target, one_slack).double()
        part = (one_slack.double() - 1) * torch.tanh(a)
        assert (a + part - one_target).abs() <= 20 * torch.finfo(dtype).eps * (a.abs() + part.abs())


def test_the_root_passes_nan_on_and_keeps_the_rest() -> None:
    a = solve_along_w(torch.tensor([torch.nan, 1.0, 1.0]), torch.tensor([2.0, torch.nan, 2.0]))
    assert a[:2].isnan().all() and a[2] + torch.tanh(a[2]) == pytest.approx(1)


# derivatives of the inverse ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_inverse_can_be_differentiated_twice_in_either_direction(constraint: str) -> None:
    w, u, b = random_chain(5, 3, K=2, D=2)
    inputs = tuple(t.requires_grad_() for t in (torch.randn(3, 2, dtype=torch.float64), w, u, b))

    def inverse(*inputs: Tensor) -> Tensor:
        return planar_inverse(*inputs, constraint)

    assert gradcheck(inverse, inputs, check_forward_ad=True)
    assert gradgradcheck(inverse, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_second_derivatives_of_log_prob_against_difference_quotients(constraint: str) -> None:
    w, u, b = random_chain(0, K=3, D=2)
    qK = standard_normal_through(PlanarTransform(w, u, b, constraint))
    z, eps = torch.randn(2, dtype=torch.float64), 1e-5
    axes = eps * torch.eye(2).double()
    truth = torch.stack([(grad(qK.log_prob)(z + e) - grad(qK.log_prob)(z - e)) / (2 * eps) for e in axes])
    for second in (hessian(qK.log_prob)(z), torch.autograd.functional.hessian(qK.log_prob, z)):
        assert torch.allclose(second, truth, atol=1e-6)


NESTED = {
    "reverse of reverse": (jacrev, jacrev),
    "forward of reverse": (jacfwd, jacrev),
    "reverse of forward": (jacrev, jacfwd),
    "forward of forward": (jacfwd, jacfwd),  # without care torch makes this wrong in silence
}


@pytest.mark.parametrize("outer, inner", NESTED.values(), ids=NESTED)
def test_every_nesting_of_derivatives_agrees_with_difference_quotients(outer: Callable, inner: Callable) -> None:
    w, u, b = random_chain(1, K=3, D=2)
    z, eps = torch.randn(2, dtype=torch.float64), 1e-5

    def inverse(z: Tensor) -> Tensor:
        return planar_inverse(z, w, u, b)

    def quotients(f: Callable) -> Tensor:
        axes = eps * torch.eye(2).double()
        return torch.stack([(f(z + e) - f(z - e)) / (2 * eps) for e in axes], dim=-1)

    assert torch.allclose(inner(inverse)(z), quotients(inverse), atol=1e-8)
    second = outer(inner(inverse))
    assert torch.allclose(second(z), quotients(inner(inverse)), atol=1e-8)
    assert torch.allclose(outer(second)(z), quotients(second), atol=1e-7)


@pytest.mark.parametrize("function", [planar_inverse, lambda *args: planar_chain(*args)[0]], ids=["inverse", "chain"])
def test_torch_func_and_forward_mode(function: Callable) -> None:
    w, u, b = random_chain(1, 5, K=3, D=2)
    z = torch.randn(5, 2, dtype=torch.float64)
    ones = torch.ones_like(z)
    whole = function(z, w, u, b)
    one_by_one = torch.stack([function(z[i], w[i], u[i], b[i]) for i in range(5)])
    assert torch.allclose(vmap(function)(z, w, u, b), one_by_one, atol=1e-12)
    crossed = vmap(vmap(function, (0, None, None, None)), (None, 0, 0, 0))(z, w, u, b)
    assert torch.allclose(crossed.diagonal().T, whole, atol=1e-12) and crossed.shape == (5, 5, 2)
    pairs = [torch.stack([t, t + 1], dim=1) for t in (z, w, u, b)]
    expected = torch.stack([whole, function(z + 1, w + 1, u + 1, b + 1)])
    assert torch.allclose(vmap(function, in_dims=1)(*pairs), expected, atol=1e-12)
    per_image = vmap(jacrev(function))(z, w, u, b)
    expected = torch.stack([jacobian(lambda z, i=i: function(z, w[i], u[i], b[i]), z[i]) for i in range(5)])
    assert torch.allclose(per_image, expected, atol=1e-12)
    assert torch.allclose(vmap(jacfwd(function))(z, w, u, b), expected, atol=1e-12)
    tangent = jvp(lambda z: function(z, w, u, b), (z,), (ones,))[1]
    assert torch.allclose(tangent, expected.sum(-1), atol=1e-12)
    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(z, ones), w, u, b)
        assert torch.allclose(forward_ad.unpack_dual(dual).tangent, tangent, atol=1e-12)


@pytest.mark.parametrize("function", [planar_inverse, lambda *args: planar_chain(*args)[0]], ids=["inverse", "chain"])
def test_vectorised_jacobians_and_hessians_in_forward_mode(function: Callable) -> None:
    w, u, b = random_chain(1, K=3, D=2)
    z = torch.randn(2, dtype=torch.float64)
    forward = {"vectorize": True, "strategy": "forward-mode"}
    assert torch.allclose(jacobian(lambda z: function(z, w, u, b), z, **forward), jacfwd(function)(z, w, u, b))
    assert torch.allclose(jacobian(lambda w: function(z, w, u, b), w, **forward), jacfwd(function, 1)(z, w, u, b))

    def length(z: Tensor) -> Tensor:
        return function(z, w, u, b).square().sum()

    second = torch.autograd.functional.hessian(length, z, vectorize=True, outer_jacobian_strategy="forward-mode")
    assert torch.allclose(second, jacrev(jacrev(length))(z), atol=1e-12)


@pytest.mark.parametrize("slack", [1e-12, 1e-6, 1.0, 1e3])
def test_the_roots_derivatives_keep_their_digits_where_the_step_is_steep(slack: float) -> None:
    """At target 0 the root is 0 and its derivative 1/slack: 1 + m h′ instead of det would lose it."""
    target, slacks = torch.zeros(()).double().requires_grad_(), torch.tensor(slack, dtype=torch.float64)
    assert torch.autograd.grad(solve_along_w(target, slacks), target)[0].item() == pytest.approx(1 / slack, rel=1e-14)
    tangent = jvp(lambda t: solve_along_w(t, slacks), (target.detach(),), (torch.ones(()).double(),))[1]
    assert tangent.item() == pytest.approx(1 / slack, rel=1e-14)


def test_forward_mode_asks_for_no_gradients_that_are_off() -> None:
    w, u, b = (t.requires_grad_() for t in random_chain(1, K=3, D=2))
    z = torch.randn(2, dtype=torch.float64)
    with torch.no_grad(), forward_ad.dual_level():
        dual = planar_inverse(forward_ad.make_dual(z, torch.ones_like(z)), w, u, b)
        assert not forward_ad.unpack_dual(dual).tangent.requires_grad


class AsModule(nn.Module):
    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(*args)


CALLS = {
    "chain": lambda z, w, u, b: planar_chain(z, w, u, b),
    "paper chain": lambda z, w, u, b: planar_chain(z, w, u, b, "paper"),
    "inverse": lambda z, w, u, b: (planar_inverse(z, w, u, b),),
    "constrain_u": lambda z, w, u, b: (constrain_u(w, u),),
    "step": lambda z, w, u, b: planar_step(z, w[:, 0], u[:, 0], b[:, 0]),
}


def one_call(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    w, u, b = random_chain(1, 4, K=3, D=2)
    return tuple(t.to(dtype) for t in (torch.ones(4, 2), w, u, b))


def equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Whether value, dtype and device are the same, bit for bit."""
    pairs = list(zip(found, expected, strict=True))
    return all(torch.equal(f, e) and (f.dtype, f.device) == (e.dtype, e.device) for f, e in pairs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", sorted(CALLS.keys() - {"inverse"}))  # its loop depends on values: torch cannot open it
def test_export_and_fullgraph_compile_give_the_same(call: str) -> None:
    function, inputs = CALLS[call], one_call()
    assert equal(torch.export.export(AsModule(function), inputs).module()(*inputs), function(*inputs))
    inputs = tuple(t.requires_grad_() for t in inputs)
    torch._dynamo.reset()
    found, expected = torch.compile(function, backend="aot_eager", fullgraph=True)(*inputs), function(*inputs)
    assert equal(found, expected)
    gradients = (
        torch.autograd.grad(sum(t.square().sum() for t in out), inputs, allow_unused=True) for out in (found, expected)
    )
    for one, other in zip(*gradients, strict=True):
        assert (one is None and other is None) or torch.allclose(one, other, atol=1e-5, rtol=1e-5)


# ambient settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_surroundings_change_nothing(function: Callable, dtype: torch.dtype) -> None:
    inputs = one_call(dtype)
    expected = function(*inputs)
    for setting in (torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode(), torch.no_grad()):
        with setting:
            assert equal(function(*inputs), expected)
    with torch.device("meta"):  # the same as torch.set_default_device("meta")
        assert equal(function(*inputs), expected)
    for default in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            assert equal(function(*inputs), expected)
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("function", CALLS.values(), ids=CALLS)
def test_any_layout_of_the_inputs_gives_the_same(function: Callable) -> None:
    inputs = one_call()
    expected = function(*inputs)
    assert equal(function(*(nn.Parameter(t) for t in inputs)), expected)
    strided = tuple(torch.stack([t, t], dim=-1)[..., 0] for t in inputs)
    assert not strided[0].is_contiguous() and equal(function(*strided), expected)
    expanded = tuple(t[:1].expand(4, *t.shape[1:]) for t in inputs)
    assert equal(function(*expanded), function(*(t.contiguous() for t in expanded)))
    if function is not CALLS["inverse"]:  # its loop looks at values
        assert all(t.device.type == "meta" for t in function(*(t.to("meta") for t in inputs)))


def test_a_flow_made_under_another_default_dtype_has_that_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        flow = PlanarFlow(2, 3)
        assert {p.dtype for p in flow.parameters()} == {torch.float64}
        assert {t.dtype for t in (*flow(torch.zeros(2)), flow.transform().inv(torch.zeros(2)))} == {torch.float64}
    finally:
        torch.set_default_dtype(torch.float32)


# the constraint, in one place -------------------------------------------------------------------------------------


def test_no_signature_of_the_package_has_another_default_than_shifted() -> None:
    seen = 0
    for module in pkgutil.iter_modules(planar_helpers.__path__):
        for owner in vars(importlib.import_module(f"planar_helpers.{module.name}")).values():
            if isinstance(owner, type) and issubclass(owner, Exception):
                continue  # it may have no signature
            if getattr(owner, "__module__", "").startswith("planar_helpers"):
                parts = vars(owner).values() if isinstance(owner, type) else ()
                for thing in (owner, *(part for part in parts if inspect.isroutine(part))):
                    if callable(thing):
                        found = inspect.signature(thing).parameters.get("constraint")
                        seen += found is not None
                        assert found is None or found.default in ("shifted", inspect.Parameter.empty), thing
    assert seen >= 8


def test_the_state_dict_carries_the_constraint_through_files_and_clones() -> None:
    for i, constraint in enumerate(CONSTRAINTS):  # files depend on the order
        flow, buffer = PlanarFlow(2, 3, constraint), io.BytesIO()
        state = {name: tensor.clone() for name, tensor in flow.state_dict().items()}
        assert state["_extra_state"].dtype == torch.uint8 and state["_extra_state"].item() == i
        torch.save(state, buffer)
        buffer.seek(0)
        fresh = PlanarFlow(2, 3, constraint)
        fresh.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(fresh(torch.ones(2))[0], flow(torch.ones(2))[0])
        assert torch.equal(functional_call(flow, state, torch.ones(2))[0], flow(torch.ones(2))[0])
    with torch.device("meta"):
        assert flow.state_dict()["_extra_state"].device.type == "cpu"


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("wrap", [lambda flow: flow, lambda flow: nn.Sequential(nn.Linear(2, 2), flow)])
def test_weights_of_another_constraint_or_of_none_are_refused_before_any_is_copied(
    strict: bool, wrap: Callable
) -> None:
    paper, flow = PlanarFlow(2, 3, "paper"), PlanarFlow(2, 3)
    before = [p.clone() for p in flow.parameters()]
    with pytest.raises(ValueError, match="of constraint 'paper', this PlanarFlow is of 'shifted'"):
        wrap(flow).load_state_dict(wrap(paper).state_dict(), strict=strict)
    bare = {name: tensor for name, tensor in wrap(PlanarFlow(2, 3)).state_dict().items() if "extra" not in name}
    with pytest.raises(
        ValueError, match="of constraint 'unknown', .* as '_extra_state': where that is missing, add it"
    ):
        wrap(flow).load_state_dict(bare, strict=strict)
    for broken in (torch.tensor(2), torch.tensor(0.5), None):
        with pytest.raises(ValueError, match="the weights are of constraint"):
            flow.load_state_dict(flow.state_dict() | {"_extra_state": broken}, strict=strict)
    assert all(torch.equal(p, q) for p, q in zip(flow.parameters(), before, strict=True))
    if not strict:  # nothing of the flow's own is loaded: nothing to guess
        nn.ModuleDict({"flow": flow}).load_state_dict({"other.weight": torch.zeros(1)}, strict=False)


def test_flows_and_transforms_keep_print_and_compare_their_constraint() -> None:
    flow = PlanarFlow(2, 3, "paper")
    assert repr(flow) == "PlanarFlow(D=2, K=3, constraint='paper')" and isinstance(flow, CarriesConstraint)
    transform = flow.transform()
    assert repr(transform) == "PlanarTransform(D=2, K=3, constraint='paper')"
    assert transform.w is flow.w and torch.equal(transform(torch.ones(2)), flow(torch.ones(2))[0])
    for kept in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert kept.constraint == "paper" and torch.equal(kept(torch.ones(2))[0], flow(torch.ones(2))[0])
    copies = (
        copy.deepcopy(transform),
        pickle.loads(pickle.dumps(transform)),
        transform.inv.inv,
    )
    assert all(kept == transform and not kept != transform for kept in copies)
    assert copy.deepcopy(transform).inv == transform.inv and "'paper'" in repr(transform.inv)
    w, u, b = transform.w, transform.u, transform.b
    for other in (
        PlanarTransform(w, u, b),
        *(PlanarTransform(*t, "paper") for t in ((u, u, b), (w, w, b), (w, u, b + 1))),
    ):
        assert transform != other
    assert transform != "paper" and transform != PlanarTransform(*(t.detach().to("meta") for t in (w, u, b)), "paper")


@pytest.mark.parametrize("flow", [PlanarFlow(2, 3), nn.Sequential(PlanarFlow(2, 3))[0]])
def test_the_constraint_can_be_read_and_not_set(flow: PlanarFlow) -> None:
    for change in (lambda: setattr(flow, "constraint", "paper"), lambda: setattr(flow, "constraint", "shifted")):
        with pytest.raises(AttributeError, match="property 'constraint' of 'PlanarFlow' object has no setter"):
            change()
    with pytest.raises(AttributeError):
        del flow.constraint
    buffer = io.BytesIO()
    torch.save(flow, buffer)
    buffer.seek(0)
    for kept in (torch.load(buffer, weights_only=False), copy.copy(flow), copy.deepcopy(flow), flow):
        assert kept.constraint == "shifted" and "'shifted'" in repr(kept) and kept.transform().constraint == "shifted"


def test_an_expanded_distribution_keeps_the_constraint() -> None:
    qK = standard_normal_through(PlanarTransform(*random_chain(2, K=3, D=2), "paper"))
    z = torch.randn(5, 4, 2, dtype=torch.float64)
    assert torch.allclose(qK.expand((4,)).log_prob(z), qK.log_prob(z), atol=1e-12)
    batch = standard_normal_through(PlanarTransform(*random_chain(2, 4, K=3, D=2), "paper"))
    assert batch.batch_shape == (4,) and torch.equal(batch.expand((5, 4)).log_prob(z), batch.log_prob(z))


# distributions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_transformed_distribution_integrates_to_one_at_points_it_did_not_sample(constraint: str) -> None:
    w, u, b = random_chain(2, K=3, D=2)
    q0 = Independent(Normal(torch.zeros(2).double(), torch.ones(2).double()), 1)
    qK = TransformedDistribution(q0, PlanarTransform(w, u, b, constraint))
    z = plane_grid(-16, 16, 401)
    assert log_mass(z, qK.log_prob(z)).item() == pytest.approx(0, abs=2e-4)
    sample = qK.rsample((50_000,))
    for corner in (-1.0, 0.0, 1.0):
        inside = (z < corner).all(-1)
        exact = (qK.log_prob(z).exp() * inside).sum() * (z[0, 1, 0] - z[0, 0, 0]) ** 2
        share = (sample < corner).all(-1).double().mean()
        assert abs(share - exact) < 4 * (exact * (1 - exact) / 50_000).sqrt() + 0.01 * exact.sqrt() * 0.5


def test_transform_batches() -> None:
    w, u, b = random_chain(2, 4, K=3, D=2)
    q0 = Independent(Normal(torch.zeros(2).double(), torch.ones(2).double()), 1)
    qK = TransformedDistribution(q0, PlanarTransform(w, u, b))
    sample = qK.rsample((7,))
    assert sample.shape == (7, 4, 2) and qK.log_prob(sample).shape == (7, 4)
    z0 = planar_inverse(sample, w, u, b)
    expected = q0.log_prob(z0) - planar_chain(z0, w, u, b)[1]
    assert torch.allclose(qK.log_prob(sample), expected, atol=1e-9)


def test_log_prob_follows_parameters_that_are_trained() -> None:
    w, u, b = (t.requires_grad_() for t in random_chain(2, K=3, D=2))
    q0 = Independent(Normal(torch.zeros(2).double(), torch.ones(2).double()), 1)
    transform = PlanarTransform(w, u, b, "shifted")
    qK = TransformedDistribution(q0, transform)
    sample, optimizer = qK.sample((20,)), torch.optim.SGD([w, u, b], lr=0.1)
    losses = []
    for _ in range(3):
        losses.append(-qK.log_prob(sample).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[0]


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_nan_is_passed_on_and_not_hidden(constraint: str) -> None:
    w, u, b = random_chain(0, 4, K=3, D=2)
    z0 = torch.zeros(4, 2).double()
    for i, tensor in enumerate((z0, w, u, b)):
        tensor.view(4, -1)[i, 0] = torch.nan  # image i: NaN in another input
    zK, sum_ladj = planar_chain(z0, w, u, b, constraint)
    assert torch.isnan(sum_ladj).all() and torch.isnan(zK).any(dim=-1).all()


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_planar_flow_starts_near_the_identity_and_inverts(constraint: str) -> None:
    flow = PlanarFlow(D=2, K=8, constraint=constraint).double()
    z0 = torch.randn(50, 2, dtype=torch.float64)
    zK, sum_ladj = flow(z0)
    assert (zK - z0).abs().max() < 0.5 and sum_ladj.abs().max() < 0.5
    assert torch.allclose(flow.transform().inv(zK), z0, atol=1e-9)
    sum_ladj.sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in flow.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu() -> None:
    w, u, b = random_chain(0, 5, K=3, D=2)
    z0 = torch.randn(5, 2, dtype=torch.float64)
    there = planar_chain(*(t.cuda() for t in (z0, w, u, b)))
    assert torch.allclose(there[0].cpu(), planar_chain(z0, w, u, b)[0], atol=1e-12)
    assert torch.allclose(planar_inverse(there[0], *(t.cuda() for t in (w, u, b))).cpu(), z0, atol=1e-9)


# bad input ----------------------------------------------------------------------------------------------------------

W, U, B, Z = torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3), torch.zeros(2)


@pytest.mark.parametrize("function", [planar_chain, planar_inverse])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3), W, U, B), ValueError, r"z(0|K) must have shape \(\.\.\., 2\)"),
        ((torch.zeros(()), W, U, B), ValueError, r"z(0|K) must have shape"),
        ((Z, W[0], U[0], B), ValueError, "w, u and b must have shapes"),
        ((Z, W, U[:2], B), ValueError, "w, u and b must have shapes"),
        ((Z, W, U, B[:2]), ValueError, "w, u and b must have shapes"),
        ((torch.zeros(0), W[:, :0], U[:, :0], B), ValueError, "D ≥ 1"),
        ((torch.zeros(5, 2), W.expand(4, 3, 2), U.expand(4, 3, 2), B.expand(4, 3)), ValueError, "broadcast"),
        ((Z, W.double(), U, B), TypeError, "must be .* that share one dtype and one device"),
        ((Z.double(), W, U, B), TypeError, "must be .* that share one dtype and one device"),
        ((Z.long(), W, U, B), TypeError, "z(0|K), w must be float32 or float64 .* got z(0|K) torch.int64"),
        ((Z, W + 0j, U, B), TypeError, "w, u, b must be float32 or float64 .* got w torch.complex64"),
        ((Z.half(), W.half(), U.half(), B.half()), TypeError, "w, u, b must be float32 or.* got w torch.float16"),
        ((Z, W, U, B.bfloat16()), TypeError, "must be float32 or float64 torch.Tensors .* b torch.bfloat16 on cpu"),
        (
            (Z, W.to("meta"), U, B),
            TypeError,
            "w, u, b must be .* that share one dtype and one device, got w torch.float32 on meta, u torch.float32 on",
        ),
        ((Z.to("meta"), W, U, B), TypeError, "z(0|K), w must be .* that share one dtype and one device"),
        (([0.0, 0.0], W, U, B), TypeError, "z(0|K), w must be .* torch.Tensors .* got z(0|K) list"),
        ((Z, W, U, B, "papre"), ValueError, "constraint must be one of"),
    ],
)
def test_bad_input_gets_a_clear_error(function, arguments: tuple, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        function(*arguments)


def test_bad_sizes_and_constraints_get_a_clear_error() -> None:
    for D, K in ((0, 1), (-1, 1), (2, -1), (2.0, 1), (2, True)):
        with pytest.raises(ValueError, match="must be an integer"):
            PlanarFlow(D, K)
    for call in (
        lambda: PlanarFlow(2, 1, "none"),
        lambda: constrain_u(Z, Z, "none"),
        lambda: constrain_u(Z, torch.zeros(3)),
    ):
        with pytest.raises(ValueError, match="constraint must be|w, u must be .* same size D ≥ 1, .*w .2,., u .3,."):
            call()
    with pytest.raises(ValueError, match="w, u and b must have shapes"):
        PlanarTransform(W, U, B[:1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z": (5, 1)}, r"z, w, u must be .* same size D ≥ 1, .* got z \(5, 1\), w \(2,\), u \(2,\), b \(\)"),
        ({"u": (1,)}, "same size D"),
        ({"w": ()}, "same size D"),
        ({"z": (5, 0), "w": (0,), "u": (0,)}, "D ≥ 1"),
        ({"b": (5, 1)}, r"b and slack \(\.\.\.,\), got .* b \(5, 1\)"),
        ({"slack": (5, 1)}, r"b and slack \(\.\.\.,\), got .* slack \(5, 1\)"),
        ({"b": (3,)}, r"z and w and u and b must have batch shapes that broadcast, got .*\(3,\)"),
        ({"slack": (3,)}, "z and w and u and b and slack must have batch shapes that broadcast"),
        ({"w": (4, 2)}, "must have batch shapes that broadcast"),
    ],
)
def test_a_step_refuses_shapes_that_would_broadcast_to_something_else(changes: dict, message: str) -> None:
    shapes = {"z": (5, 2), "w": (2,), "u": (2,), "b": ()} | changes
    with pytest.raises(ValueError, match=message):
        planar_step(**{name: torch.ones(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize(
    "shapes",
    [
        ((7, 4, 2), (4, 2), (4, 2), (4,), (4,)),
        ((5, 2), (2,), (2,), (1,), ()),
        ((2,), (5, 2), (5, 2), (5,), (5,)),
        ((9, 1), (3, 1, 1), (3, 1, 1), (3, 1), (3, 1)),
        ((6, 1, 2), (3, 2), (1, 2), (6, 1), (3,)),
    ],
)
def test_a_step_takes_every_batch_that_is_meant(shapes: tuple) -> None:
    z, w, u, b, slack = (torch.rand(shape) for shape in shapes)
    batch = torch.broadcast_shapes(z.shape[:-1], w.shape[:-1], b.shape)
    z_next, ladj = planar_step(z, w, u, b, slack)
    assert z_next.shape == (*batch, z.shape[-1]) and ladj.shape == batch


@pytest.mark.parametrize(
    ("base", "batch", "message"),
    [
        ((3,), (), r"the base must have shape \(\.\.\., 2\) to fit w, got \(3,\)"),
        ((1,), (), r"the base must have shape \(\.\.\., 2\) to fit w, got \(1,\)"),
        ((4, 2), (3,), r"the base and w must have batch shapes that broadcast, got .*4,.*3,"),
    ],
)
def test_a_base_that_does_not_fit_the_transform_is_named(base: tuple, batch: tuple, message: str) -> None:
    transform = PlanarTransform(W.expand(*batch, 3, 2), U.expand(*batch, 3, 2), B.expand(*batch, 3))
    with pytest.raises(ValueError, match=message):
        TransformedDistribution(Independent(Normal(torch.zeros(base), 1.0), 1), transform)
    assert transform.forward_shape((5, *batch, 2)) == transform.inv.forward_shape((5, *batch, 2)) == (5, *batch, 2)


def test_a_cache_saves_the_inverse_and_keeps_the_constraint() -> None:
    w, u, b = random_chain(2, K=3, D=2)
    kept = PlanarTransform(w, u, b, "paper").with_cache(1)
    assert kept.constraint == "paper" and kept == PlanarTransform(w, u, b, "paper")
    z0 = torch.randn(7, 2, dtype=torch.float64)
    zK = kept(z0)
    assert kept.inv(zK) is z0 and torch.allclose(kept.inv(zK.clone()), z0, atol=1e-9)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_a_flow_inverts_itself_under_its_own_constraint(constraint: str) -> None:
    flow, z0 = PlanarFlow(2, 8, constraint).double(), torch.randn(50, 2, dtype=torch.float64)
    assert torch.allclose(flow.inverse(flow(z0)[0]), z0, atol=1e-9)
