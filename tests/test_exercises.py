"""The exercise checkers: right answers pass in three styles, known slips fail and are named, the rest is told."""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Independent, MultivariateNormal, Normal

from planar_helpers import checks, elbo, planar
from planar_helpers.checks import EXERCISES, Exercise, Wrong, check

SLIPS = [(name, slip) for name, e in EXERCISES.items() if isinstance(e, Exercise) for slip in e.slips]
RIGHT = [name for name, exercise in EXERCISES.items() if isinstance(exercise, Exercise)]


def of(name: str) -> Exercise:
    return EXERCISES[name]


@pytest.mark.parametrize("name", RIGHT)
def test_the_oracle_itself_passes_with_any_seed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(5):
        check(name, EXERCISES[name].right, seed)
    assert capsys.readouterr().out.startswith(f"{name}: right.")


@pytest.mark.parametrize(("name", "slip"), SLIPS, ids=[f"{n}-{s[:40]}" for n, s in SLIPS])
def test_each_known_slip_fails_and_is_named(name: str, slip: str) -> None:
    for seed in range(3):
        with pytest.raises(Wrong) as caught:
            check(name, EXERCISES[name].slips[slip], seed)
        assert f"this is {slip}" in str(caught.value)


# Right answers in three styles: loops over numbers, einsum, torch.distributions (or torch's own functions).


def loop_step(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    rows = []
    for point in z:
        a = sum(float(w[i]) * float(point[i]) for i in range(len(w))) + float(b)
        rows.append([float(point[i]) + float(u[i]) * math.tanh(a) for i in range(len(w))])
    return torch.tensor(rows, dtype=z.dtype)


def einsum_step(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    return z + torch.einsum("d,n->nd", u, torch.tanh(torch.einsum("nd,d->n", z, w) + b))


def loop_ladj(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    s, out = float(w @ u), []
    for point in z:
        out.append(math.log(abs(1 + s * (1 - math.tanh(float(w @ point + b)) ** 2))))
    return torch.tensor(out, dtype=z.dtype)


def slogdet_ladj(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    h_prime = 1 / torch.cosh(torch.einsum("nd,d->n", z, w) + b) ** 2
    J = torch.eye(len(w), dtype=z.dtype) + torch.einsum("n,i,j->nij", h_prime, u, w)
    return torch.linalg.slogdet(J)[1]


def loop_chain(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.zeros(len(z), dtype=z.dtype)
    for w_k, u_k, b_k in zip(w, u, b, strict=True):
        total = total + loop_ladj(z, w_k, u_k, b_k)
        z = loop_step(z, w_k, u_k, b_k)
    return z, total


def torch_log_qK(z0: Tensor, w: Tensor, u: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    zK, total = loop_chain(z0, w, u, b)
    return zK, Independent(Normal(torch.zeros_like(z0), 1.0), 1).log_prob(z0) - total


def cross_squares(z: Tensor, w: Tensor, u: Tensor, b: Tensor, h: float) -> Tensor:
    e1, e2 = torch.tensor([h, 0.0]).double(), torch.tensor([0.0, h]).double()
    sides = torch.stack([einsum_step(z + e, w, u, b) - einsum_step(z, w, u, b) for e in (e1, e2)], 1)
    return torch.linalg.det(sides).abs() / (h * h)


def loop_u_hat(w: Tensor, u: Tensor) -> Tensor:
    rows = []
    for w_i, u_i in zip(w, u, strict=True):
        s = float(w_i @ u_i)
        rows.append(u_i + (max(s, 0) + math.log1p(math.exp(-abs(s))) - 1 - s) * w_i / float(w_i @ w_i))
    return torch.stack(rows)


def einsum_u_hat(w: Tensor, u: Tensor) -> Tensor:
    s = torch.einsum("nd,nd->n", w, u)
    return u + torch.einsum("n,nd->nd", (F.softplus(s, threshold=50) - 1 - s) / torch.einsum("nd,nd->n", w, w), w)


def newton_inverse(z_next: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    s, target = w @ u, z_next @ w + b
    lo, hi = target - abs(s), target + abs(s)
    for _ in range(100):
        mid = 0.5 * (lo + hi)
        lo, hi = (
            torch.where(mid + s * mid.tanh() > target, lo, mid),
            torch.where(mid + s * mid.tanh() > target, mid, hi),
        )
    return z_next - torch.outer(lo.tanh(), u)


STYLES: list[tuple[str, Callable]] = [
    ("A1.step", loop_step), ("A1.step", einsum_step),
    ("A1.step", lambda z, w, u, b: z + torch.outer((z @ w + b).tanh(), u)),
    ("A1.ladj", loop_ladj), ("A1.ladj", slogdet_ladj),
    ("A1.ladj", lambda z, w, u, b: (1 + w @ u / torch.cosh(z @ w + b) ** 2).abs().log()),
    ("A1.chain", loop_chain), ("A1.log_qK", torch_log_qK), ("A1.squares", cross_squares),
    ("A2.m", lambda s: F.softplus(s) - 1), ("A2.m", lambda s: torch.logaddexp(s, torch.zeros_like(s)) - 1),
    ("A2.u_hat", loop_u_hat), ("A2.u_hat", einsum_u_hat),
    ("A2.u_hat", lambda w, u: u + (F.softplus((w * u).sum(1)) - 1 - (w * u).sum(1))[:, None]
                                   * w / w.norm(dim=1)[:, None] ** 2),
    ("A2.inverse", newton_inverse),
    ("A3.log_px_z", lambda x, logits: torch.einsum("bi,bi->b", x, logits) - F.softplus(logits, threshold=50).sum(1)),
    ("A3.log_px_z", lambda x, logits: Bernoulli(logits=logits, validate_args=False).log_prob(x).sum(-1)),
    ("A3.log_px_z", lambda x, logits: torch.stack([-F.binary_cross_entropy_with_logits(l, x_, reduction="sum")
                                                   for l, x_ in zip(logits, x, strict=True)])),
    ("A3.log_q0", lambda z, mu, logvar: Independent(Normal(mu, (logvar / 2).exp()), 1).log_prob(z)),
    ("A3.log_q0", lambda z, mu, logvar: -0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 / logvar.exp()).sum(1)),
    ("A3.log_q0", lambda z, mu, logvar: MultivariateNormal(mu, torch.diag_embed(logvar.exp())).log_prob(z)),
    ("A3.log_pz", lambda z: -0.5 * torch.einsum("bd,bd->b", z, z) - z.shape[1] / 2 * math.log(2 * math.pi)),
    ("A3.kl", lambda mu, logvar: 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(-1)),
    ("A3.log_mean_exp", lambda draws: torch.logsumexp(draws, 0) - math.log(len(draws))),
    ("A5.elbo", lambda x, logits, z0, zK, log_q0, sum_ladj: torch.stack(
        [Bernoulli(logits=l, validate_args=False).log_prob(x_).sum() + Normal(0.0, 1.0).log_prob(z).sum()
         for x_, l, z in zip(x, logits, zK, strict=True)]) - log_q0 + sum_ladj),
    ("A6.seeds_needed", lambda difference, deviation: math.ceil((2 * math.sqrt(2) * deviation / difference) ** 2)),
    ("A6.seeds_needed", lambda difference, deviation: next(
        n for n in range(1, 9999) if abs(difference) >= 2 * deviation * math.sqrt(2 / n))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "answer"), STYLES)
def test_right_answers_in_any_style_pass(name: str, answer: Callable) -> None:
    for seed in range(3):
        check(name, answer, seed)


def says(name: str, answer: Callable, words: str) -> None:
    with pytest.raises(Wrong, match=re.escape(words)):
        check(name, answer)


def test_u_hat_by_the_norm_is_told_how_far_w_dot_u_hat_went() -> None:
    slip = next(s for s in EXERCISES["A2.u_hat"].slips.values())
    says("A2.u_hat", slip, "wᵀû reached −")


def test_what_is_no_answer_is_told_in_a_sentence() -> None:
    step, ladj = EXERCISES["A1.step"].right, EXERCISES["A1.ladj"].right

    def unwritten(*_: Tensor) -> Tensor:
        raise NotImplementedError

    def in_place(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
        z += u * torch.tanh(z @ w + b)[:, None]
        return z

    says("A1.step", unwritten, "not written yet")
    says("A1.step", in_place, "changed its argument number 1 in place")
    says("A1.step", lambda *a: None, "is None: is a return missing?")
    says("A1.step", lambda *a: step(*a).numpy(), "must be a torch tensor, this is of type ndarray")
    says(
        "A1.step",
        lambda *a: step(*a).float(),
        "must have dtype torch.float64, that of the arguments, not torch.float32",
    )
    says("A1.step", lambda *a: step(*a).T, "must have shape (7, 2) where the arguments have (7, 2), (2,), (2,), ()")
    says("A1.step", lambda *a: step(*a) * math.nan, "z_next is nan at [0, 0], and ")
    says("A1.step", lambda z, w: z, "your code raised TypeError")
    says("A1.step", lambda *a: 1 / 0, "your code raised ZeroDivisionError: division by zero")
    says("A1.step", lambda *a: (step(*a), 1), "return 1 value, z_next, not 2")
    says("A1.chain", lambda *a: step(a[0], a[1][0], a[2][0], a[3][0]), "return 2 values, zK, sum_ladj, not 1")
    says("A1.step", lambda *a: step(*a) + 0.25, "z_next is furthest off at [")
    says("A3.log_pz", lambda z: torch.full((len(z),), -1.8).double(), "log_pz is furthest off at [")
    says("A1.step", 3, "hand in the function itself")
    with pytest.raises(ValueError, match="name must be one of A1.step, "):
        check("A9", step)
    says("A1.ladj", lambda *a: ladj(*a) + 1e-6, "ladj is furthest off")


def test_what_torch_raises_is_told_in_one_line_with_the_shapes() -> None:
    says("A5.share_above", lambda claims, log_px: (claims > log_px + 3).mean(), "your code raised ")  # torch's own
    says(
        "A1.step", lambda z, w, u, b: z + u * torch.tanh(z @ w + b), "The arguments have the shapes (7, 2), (2,), (2,)"
    )
    with pytest.raises(Wrong) as caught:
        check("A3.log_px_z", lambda x, logits: Bernoulli(logits=logits).log_prob(x).sum(-1))
    assert "your code raised ValueError: Expected value" in str(caught.value) and "\n" not in str(caught.value)


def test_draws_of_ones_own_are_told() -> None:
    says("A4.draw", lambda mu, logvar, eps: mu + (logvar / 2).exp() * torch.randn_like(mu), "two calls with the same")


def test_the_trial_that_fails_is_told_apart_from_those_that_agree() -> None:
    def newton(z_next: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
        s, target = w @ u, z_next @ w + b
        a = target
        for _ in range(60):
            a = a - (a + s * torch.tanh(a) - target) / (1 + s / torch.cosh(a) ** 2)
        return z_next - torch.outer(torch.tanh(a), u)

    says("A2.inverse", newton, "(trial 4 of 5, with wᵀu = 39.0; those before it agree)")


def test_a_difference_that_six_digits_do_not_show_is_shown() -> None:
    with pytest.raises(Wrong) as caught:
        check("A2.u_hat", lambda w, u: EXERCISES["A2.u_hat"].right(w, u) + 1e-8)
    yours, right = re.search(r"yours is (\S+) and (\S+) was", str(caught.value)).groups()
    assert yours != right


def test_a_constant_is_told_to_be_one() -> None:
    same = (torch.randn(8, 2).double(),)
    exercise = Exercise(lambda draw: [(draw(4, 2),), (draw(4, 2),)], lambda z: z.sum(-1), {}, ("total",))
    EXERCISES["test"] = exercise
    try:
        says("test", lambda z: torch.ones(4).double(), "does not depend on the input")
    finally:
        del EXERCISES["test"]
    assert same[0].shape == (8, 2)


def test_a_plain_call_of_the_package_is_no_answer() -> None:
    says("A2.u_hat", lambda w, u: planar.constrain_u(w, u, "paper"), "this calls the package (constrain_u)")
    says("A3.log_pz", lambda z: elbo.standard_normal_log_density(z), "this calls the package")
    says("A1.chain", lambda z, w, u, b: planar.planar_chain(z, w, u, b), "this calls the package (planar_chain)")


def test_an_answer_that_knows_the_visible_trials_only_fails_another_seed() -> None:
    exercise = EXERCISES["A3.log_pz"]
    table = {tuple(t[0].flatten().tolist()): exercise.right(*t) for t in exercise.trials(checks.Draw(0))}

    def memorised(z: Tensor) -> Tensor:
        return table.get(tuple(z.flatten().tolist()), torch.zeros(len(z)).double())

    check("A3.log_pz", memorised)
    with pytest.raises(Wrong):
        check("A3.log_pz", memorised, seed=1)


def test_slips_of_our_own_that_no_list_names_are_told_apart() -> None:
    clamp = next(s for s in EXERCISES["A2.u_hat"].slips if "max(s, −1)" in s)
    along = next(s for s in EXERCISES["A2.u_hat"].slips if "along u" in s)
    for slip in (clamp, along):
        says("A2.u_hat", EXERCISES["A2.u_hat"].slips[slip], slip)


def generate(decode: Callable, n: int, D: int) -> Tensor:
    return torch.sigmoid(decode(torch.randn(n, D, dtype=torch.float64)))


def test_generation_is_judged_by_what_it_draws() -> None:
    check("A4.generate", generate)
    says("A4.generate", lambda decode, n, D: decode(torch.randn(n, D)), "these are logits")
    says("A4.generate", lambda decode, n, D: generate(decode, n, D).round(), "pixels of 0 and 1")
    says("A4.generate", lambda decode, n, D: torch.full((n, D), 0.5), "all pictures are the same")
    says("A4.generate", lambda decode, n, D: generate(decode, 3, D), "must have shape (20000, 2); yours has (3, 2)")
    says("A4.generate", lambda decode, n, D: None, "None: is a return missing?")

    def through_a_random_flow(decode: Callable, n: int, D: int) -> Tensor:
        w, u = torch.ones(D, dtype=torch.float64), torch.tensor([1.5, 0.2]).double()
        z = torch.randn(n, D, dtype=torch.float64)
        return torch.sigmoid(decode(z + u * torch.tanh(z @ w).unsqueeze(-1)))

    says("A4.generate", through_a_random_flow, "The flow belongs to q")

    def seeded(decode: Callable, n: int, D: int) -> Tensor:
        torch.manual_seed(3)
        return generate(decode, n, D)

    says("A4.generate", seeded, "do not seed inside")


def test_a_measurement_must_convict_the_wrong_and_acquit_the_right() -> None:
    w, u = 0.3 * torch.randn(2000, 2).double(), 5 * torch.randn(2000, 2).double()
    check("A5.lowest", lambda u_hat: (w * u_hat(w, u)).sum(-1).min())
    check("A5.lowest", lambda u_hat: float((w * u_hat(w, u)).sum(-1).min()))
    says("A5.lowest", lambda u_hat: -0.95, "û by ‖w‖ is not convicted: you found -0.950")
    says("A5.lowest", lambda u_hat: -0.67, "far from −1: try larger u")
    says("A5.lowest", lambda u_hat: (w * u_hat(w, u)).sum(-1).max(), "far from −1")
    says("A5.lowest", lambda u_hat: -2.0, "below −1, where no right û can be")
    says("A5.lowest", lambda u_hat: w, "return one number")
    says("A5.lowest", lambda u_hat: float("nan"), "return one number, this is NaN")

    def mass(log_density: Callable) -> float:
        axis = torch.linspace(-8, 8, 401).double()
        z = torch.cartesian_prod(axis, axis)
        return float(log_density(z).exp().sum() * (axis[1] - axis[0]) ** 2)

    check("A5.mass", mass)
    says("A5.mass", lambda log_density: 1.0, "with the missing ½ you found the mass 1.000, and it is 2.778")
    says("A5.mass", lambda log_density: 2 * mass(log_density), "for a right density you found the mass 2.000")


def test_the_package_is_what_a4_may_call_for_u_hat_and_for_nothing_else() -> None:
    def flow(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(z[:, 0])
        for k in range(w.shape[1]):
            u_hat = planar.constrain_u(w[:, k], u[:, k])
            a = torch.einsum("bd,bd->b", w[:, k], z) + b[:, k]
            total = total + torch.log1p(torch.einsum("bd,bd->b", w[:, k], u_hat) / torch.cosh(a) ** 2)
            z = z + u_hat * torch.tanh(a)[:, None]
        return z, total

    check("A4.flow", flow)
    says("A4.flow", planar.planar_chain, "this calls the package (planar_chain)")


def test_a_number_may_be_pythons_own_or_numpys() -> None:
    def over_seeds(runs: list[dict], arm: str, quantity: str) -> tuple[np.float64, np.float64]:
        values = np.array([run[quantity] for run in runs if run["arm"] == arm])
        return values.mean(), values.std(ddof=1)

    check("A6.over_seeds", over_seeds)
    check("A6.seeds_needed", lambda difference, deviation: np.int64(np.ceil(8 * (deviation / difference) ** 2)))
    check("A6.seeds_needed", lambda difference, deviation: math.ceil(8 * (deviation / difference) ** 2))
    says("A6.over_seeds", lambda runs, arm, quantity: tuple(torch.zeros(2)), "torch.float64, that of Python's numbers")
    says(
        "A6.seeds_needed",
        lambda difference, deviation: 8 * (deviation / difference) ** 2,
        "a number that is not rounded",
    )
    says(
        "A6.over_seeds",
        lambda runs, arm, quantity: (np.mean(v := [run[quantity] for run in runs]), np.std(v, ddof=1)),
        "mean and deviation over all arms",
    )
    says("A6.seeds_needed", lambda difference, deviation: True, "n must be a torch tensor, this is of type bool")
