"""Every public function over shapes, dtypes, strides and extremes; û, ladj and the inverse against 60 digits; threads.

100 examples each; `make stress` takes 2 000 (the profile "long" of conftest.py); of integrals, a twentieth.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from planar_helpers import data, elbo, grid, planar, targets
from planar_helpers.data import Images
from planar_helpers.evaluate import importance_log_px, inference_gap
from planar_helpers.quadrature import exact_log_px, posterior_grid
from planar_helpers.train import mean_terms
from planar_helpers.vae import PlanarVAE

Draw = Callable[[st.SearchStrategy], Any]
DTYPES = (torch.float32, torch.float64)


def tensor(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype, scales: tuple[float, ...]) -> Tensor:
    """Normal numbers of one scale, some of them 0, laid out in memory in one of four ways."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = draw(st.sampled_from(scales)) * torch.randn(shape, generator=generator, dtype=torch.float64)
    values = values.masked_fill(torch.rand(shape, generator=generator) < draw(st.sampled_from((0.0, 0.3))), 0.0).to(
        dtype
    )
    layout = draw(st.sampled_from(("contiguous", "transposed", "every second", "reversed axes")))
    if layout == "transposed" and len(shape) > 1:
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "every second" and shape:
        return torch.stack([values, torch.full_like(values, torch.nan)], dim=-1).flatten(-2)[..., ::2]
    if layout == "reversed axes" and shape:
        return values.permute(*reversed(range(len(shape)))).contiguous().permute(*reversed(range(len(shape))))
    return values


EXTREMES = (1e-30, 1e-12, 1e-3, 1.0, 30.0, 1e4, 1e9)
MODERATE = (1e-12, 1e-3, 1.0, 30.0)


def flow(draw: Draw) -> dict[str, Tensor]:
    """z, w, u, b of a chain."""
    batch = draw(st.sampled_from(((), (3,), (2, 3), (0,))))
    D, K, dtype = draw(st.integers(1, 5)), draw(st.integers(0, 4)), draw(st.sampled_from(DTYPES))
    own = draw(st.sampled_from((batch, ())))  # parameters for each point, or shared
    return {
        "z": tensor(draw, (*batch, D), dtype, EXTREMES), "w": tensor(draw, (*own, K, D), dtype, EXTREMES),
        "u": tensor(draw, (*own, K, D), dtype, EXTREMES), "b": tensor(draw, (*own, K), dtype, EXTREMES),
    }  # fmt: skip


def step(draw: Draw) -> dict[str, Tensor]:
    batch, D, dtype = draw(st.sampled_from(((), (3,), (2, 3)))), draw(st.integers(1, 5)), draw(st.sampled_from(DTYPES))
    found = {name: tensor(draw, (*batch, D), dtype, MODERATE) for name in "zwu"}
    return {**found, "b": tensor(draw, batch, dtype, MODERATE)}


def two(draw: Draw) -> dict[str, Tensor]:
    batch, D, dtype = draw(st.sampled_from(((), (3,), (0,)))), draw(st.integers(1, 5)), draw(st.sampled_from(DTYPES))
    return {name: tensor(draw, (*batch, D), dtype, EXTREMES) for name in "wu"}


def densities(draw: Draw) -> dict[str, Tensor]:
    batch, D, dtype = (
        draw(st.sampled_from(((3,), (2, 3), (0,)))),
        draw(st.integers(1, 5)),
        draw(st.sampled_from(DTYPES)),
    )
    return {name: tensor(draw, (*batch, D), dtype, (1e-12, 1.0, 30.0)) for name in ("z", "mu", "logvar")}


def pixels(draw: Draw) -> dict[str, Tensor]:
    B, D, dtype = draw(st.integers(0, 4)), draw(st.integers(1, 9)), draw(st.sampled_from(DTYPES))
    return {
        "x": tensor(draw, (B, D), dtype, (1.0,)).clamp(0, 1),
        "logits": tensor(draw, (B, D), dtype, (1e-12, 1.0, 1e4)),
    }


def plane(draw: Draw) -> dict[str, Tensor]:
    batch, dtype = draw(st.sampled_from(((), (5,), (2, 3), (0,)))), draw(st.sampled_from(DTYPES))
    return {"z": tensor(draw, (*batch, 2), dtype, (1e-12, 1.0, 30.0, 1e4))}


def densities_on_grid(draw: Draw) -> dict[str, Tensor]:
    z = grid.plane_grid(-8, 8, draw(st.integers(81, 101)))
    q, p = (-(((z - 0.5 * torch.tanh(tensor(draw, (2,), torch.float64, (1.0,)))) ** 2).sum(-1)) for _ in "qp")
    return {"z": z, "q": q - math.log(math.pi), "p": p - math.log(math.pi)}


def model_and_images(draw: Draw) -> dict[str, Any]:
    torch.manual_seed(draw(st.integers(0, 2**32)))
    K, dtype, constraint = (
        draw(st.integers(0, 2)),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(planar.CONSTRAINTS)),
    )
    model = PlanarVAE(6, draw(st.sampled_from((3, (3, 2)))), 2, K, constraint).to(dtype).eval().requires_grad_(False)
    scale = draw(st.sampled_from((0.1, 1.0, 3.0)))
    for weight in model.parameters():
        weight.mul_(scale)
    return {"model": model, "x": tensor(draw, (draw(st.integers(1, 3)), 6), dtype, (1.0,)).clamp(0, 1)}


def chain_and_back(constraint: str) -> Callable[..., Tensor]:
    def call(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
        return planar.planar_inverse(planar.planar_chain(z, w, u, b, constraint)[0], w, u, b, constraint)

    return call


def det_and_step(z: Tensor, ladj: Tensor) -> list[Tensor]:
    """A step may fold: there log|det| is any large number, but |det| is near 0."""
    return [z, ladj.exp()]


def bytes_of(x: Tensor) -> Images:
    rows = (x * 255).byte()
    return Images(rows, torch.zeros(len(rows)), rows, torch.zeros(len(rows)), "some")


# name: (what draws its arguments, the call)
FUNCTIONS: dict[str, tuple[Callable[[Draw], dict[str, Any]], Callable[..., Any]]] = {
    **{f"constrain_u, {c}": (two, lambda w, u, c=c: planar.constrain_u(w, u, c)) for c in planar.CONSTRAINTS},
    "planar_step": (step, lambda z, w, u, b: det_and_step(*planar.planar_step(z, w, u, b))),
    **{f"planar_chain, {c}": (flow, lambda z, w, u, b, c=c: planar.planar_chain(z, w, u, b, c)) for c in planar.CONSTRAINTS},  # noqa: E501
    **{f"planar_inverse, {c}": (flow, chain_and_back(c)) for c in planar.CONSTRAINTS},
    "PlanarTransform": (flow, lambda z, w, u, b: planar.PlanarTransform(w, u, b)(z)),
    "gaussian_log_density": (densities, elbo.gaussian_log_density),
    "standard_normal_log_density": (plane, elbo.standard_normal_log_density),
    "bernoulli_log_likelihood": (pixels, elbo.bernoulli_log_likelihood),
    "ElboTerms": (densities, lambda z, mu, logvar: elbo.ElboTerms(z[..., 0], mu[..., 0], z[..., -1], mu[..., -1]).elbo),
    **{f"energy, {i}": (plane, lambda z, i=i: targets.energy(z, i)) for i in (1, 2, 3, 4)},
    "soft_wall": (plane, targets.soft_wall),
    "log_target": (plane, lambda z: targets.log_target(z, 2)),
    "log_mass": (densities_on_grid, lambda z, q, p: grid.log_mass(z, q)),
    "kl_on_grid": (densities_on_grid, lambda z, q, p: grid.kl_on_grid(z, q, p)),
    "to_float": (model_and_images, lambda model, x: data.to_float(bytes_of(x).train, x.dtype)),
    "binarise": (model_and_images, lambda model, x: data.binarise(bytes_of(x)).train),
    "encode": (model_and_images, lambda model, x: model.encode(x).tensors),
    "decode": (model_and_images, lambda model, x: model.decode(x[:, :2] - 0.5)),
    "log_joint": (model_and_images, lambda model, x: model.log_joint(x, x[:, :2])),
    "forward": (model_and_images, lambda model, x: model(x)),
    "elbo_draws": (model_and_images, lambda model, x: model.elbo_draws(x, model.encode(x), 3)),
    "log_prob": (model_and_images, lambda model, x: model.encode(x).log_prob(x[:, :2])),
    "sample": (model_and_images, lambda model, x: model.sample(3)),
    "reconstruct": (model_and_images, lambda model, x: model.reconstruct(x)),
    "mean_terms": (model_and_images, lambda model, x: mean_terms(model, bytes_of(x).train)),
    "importance_log_px": (model_and_images, lambda model, x: importance_log_px(model, x, 5)),
    "exact_log_px": (model_and_images, exact_log_px),
    "posterior_grid": (model_and_images, lambda model, x: posterior_grid(model, x[:1], n=21)[1:2]),
    "inference_gap": (model_and_images, lambda model, x: inference_gap(model, x[:1], steps=2, n_samples=2, n_eval=3)),
}  # fmt: skip


SLOW = ("exact_log_px", "posterior_grid", "inference_gap")  # a twentieth of the examples: each is an integral, or more


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [part for each in result for part in tensors_of(each)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_finite_input_gives_finite_output_whatever_its_layout(name: str, tally: Callable) -> None:
    """No NaN appears, no argument is changed, and where the numbers lie in memory has no say."""
    make, call, seen = *FUNCTIONS[name], [0]
    examples_wanted = settings().max_examples // (20 if name in SLOW else 1)

    @settings(max_examples=examples_wanted)
    @given(st.data())
    def examples(data: st.DataObject) -> None:
        seen[0] += 1
        arguments = make(data.draw)
        before = {key: value.clone() for key, value in arguments.items() if isinstance(value, Tensor)}
        torch.manual_seed(0)
        found = tensors_of(call(**arguments))
        torch.manual_seed(0)
        plain = {key: value.contiguous() if key in before else value for key, value in arguments.items()}
        for one, other in zip(found, tensors_of(call(**plain)), strict=True):
            assert not one.isnan().any(), "NaN from finite numbers"
            assert one.shape == other.shape and one.dtype == other.dtype
            scale = max([1.0, *(value.abs().max().item() for value in before.values() if value.numel())])
            rounding = 1e4 * torch.finfo(one.dtype).eps if one.is_floating_point() else 0
            assert torch.allclose(one.double(), other.double(), rtol=rounding, atol=rounding * scale**2, equal_nan=True)
        for key, value in before.items():
            assert torch.equal(arguments[key], value), f"{key} was changed"

    examples()
    tally("examples of public functions", seen[0], name)


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "half": torch.Tensor.half, "whole numbers": torch.Tensor.int, "a list": torch.Tensor.tolist, "None": lambda t: None,
    "an array": torch.Tensor.numpy, "another size": lambda t: torch.cat([t, t], dim=-1), "one more axis": lambda t: t[None, None, None].expand(7, 7, 7, *t.shape),  # noqa: E501
}  # fmt: skip


REFUSING = (
    "planar_chain, shifted", "constrain_u, paper", "planar_step", "gaussian_log_density", "bernoulli_log_likelihood",
    "forward", "exact_log_px", "importance_log_px",
)  # fmt: skip


@pytest.mark.parametrize("name", REFUSING)
def test_bad_input_is_refused_in_one_line(name: str, tally: Callable) -> None:
    make, call, refused = *FUNCTIONS[name], [0]

    @given(st.data())
    def examples(data: st.DataObject) -> None:
        arguments = make(data.draw)
        key = data.draw(st.sampled_from([key for key, value in arguments.items() if isinstance(value, Tensor)]))
        wrong = data.draw(st.sampled_from([word for word in WRONG if word not in ("another size", "one more axis")]))
        with pytest.raises((TypeError, ValueError)) as error:
            call(**{**arguments, key: WRONG[wrong](arguments[key])})
        assert "\n" not in str(error.value) and "must" in str(error.value), error.value
        refused[0] += 1

    examples()
    tally("bad inputs refused", refused[0], name)


# --- against 60 digits ----------------------------------------------------------------------------------------------


def exact_step(z: list, w: list, u: list, b: Any, constraint: str) -> tuple[list, Any, list, Any]:
    """û, wᵀû, f(z) and log|det| by mpmath."""
    s = mpmath.fdot(w, u)
    shift = mpmath.log(mpmath.e - 1) if constraint == "shifted" else 0
    m = mpmath.log1p(mpmath.exp(s + shift)) - 1
    u_hat = [u_i + (m - s) * w_i / mpmath.fdot(w, w) for u_i, w_i in zip(u, w, strict=True)]
    a = mpmath.fdot(w, z) + b
    det = 1 + m * (1 - mpmath.tanh(a) ** 2)
    return u_hat, m, [z_i + u_i * mpmath.tanh(a) for z_i, u_i in zip(z, u_hat, strict=True)], mpmath.log(det)


def exactly(values: Tensor) -> list:
    return [mpmath.mpf(value) for value in values.double().tolist()]


# times the rounding, of what the docstrings leave open: the largest number that enters
PROMISED = {"û": 4.0, "ladj": 4.0, "inverse": 4.0}


@pytest.fixture(scope="module")
def cases() -> Iterator[list[tuple[Tensor, ...]]]:
    """w, u, b, z in float64, exact in float32, too: ‖w‖ from 1e-6 (the docstring's least) to 100, wᵀu from −60 to 60."""  # noqa: E501
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(300):
        w = torch.randn(2, generator=generator)
        w = w / w.norm() * 10 ** (torch.rand(1, generator=generator) * 8 - 6)
        s = (torch.rand(1, generator=generator) * 2 - 1) * 10 ** (torch.rand(1, generator=generator) * 5 - 3.3)
        u = s * w / (w @ w) + torch.randn(2, generator=generator) * (s.abs() / w.norm()).clamp(max=3)
        b, z = torch.randn((), generator=generator) * 3, torch.randn(2, generator=generator) * 3
        found.append(tuple(one.float().double() for one in (w, u, b, z)))
    with mpmath.workdps(60):
        yield found


@pytest.mark.parametrize("constraint", planar.CONSTRAINTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_against_sixty_digits_are_a_few_roundings(
    cases: list, dtype: torch.dtype, constraint: str, tally: Callable
) -> None:
    eps, worst = torch.finfo(dtype).eps, dict.fromkeys(PROMISED, 0.0)
    for case in cases:
        w, u, b, z = (one.to(dtype) for one in case)
        u_hat, m, moved, ladj = exact_step(
            exactly(z), exactly(w), exactly(u), mpmath.mpf(b.double().item()), constraint
        )
        computed, next_ladj = planar.planar_chain(z, w[None], u[None], b[None], constraint)
        s_error = float(sum(abs(x * y) for x, y in zip(exactly(w), exactly(u), strict=True)))  # before cancelling
        size = float(max(map(abs, u_hat + exactly(u)))) + (1 + s_error) / float(mpmath.norm(exactly(w)))
        error = max(abs(x - y) for x, y in zip(exactly(planar.constrain_u(w, u, constraint)), u_hat, strict=True))
        worst["û"] = max(worst["û"], float(error) / size / eps)
        a_error = float(sum(abs(x * y) for x, y in zip(exactly(w), exactly(z), strict=True))) + abs(b.item())
        # a moves by its rounding, s by its own: log det moves with them, by |∂ log det/∂a| ≤ 2 and |∂ log slack/∂s| ≤ 1
        worst["ladj"] = max(worst["ladj"], abs(next_ladj.item() - float(ladj)) / (1 + 2 * a_error + s_error) / eps)
        back = planar.planar_inverse(computed, w[None], u[None], b[None], constraint)
        there = exact_step(exactly(back), exactly(w), exactly(u), mpmath.mpf(b.double().item()), constraint)[2]
        error = max(abs(x - y) for x, y in zip(there, exactly(computed), strict=True))
        worst["inverse"] = max(
            worst["inverse"],
            float(error) / ((1 + abs(float(m))) * (size + float(max(map(abs, exactly(computed)))))) / eps,
        )
    print({name: f"{value:.1f} of {PROMISED[name]:.0f} roundings" for name, value in worst.items()})
    for name, value in worst.items():
        tally("largest error of û, ladj and inverse, in roundings", math.ceil(value), f"{name} of at most {PROMISED[name]:.0f}, {dtype}, {constraint}")  # fmt: skip  # noqa: E501
        assert value <= PROMISED[name], (name, value)


@pytest.mark.parametrize("threads", [2, 8])
def test_threads_change_no_more_than_a_rounding(threads: int) -> None:
    torch.manual_seed(0)
    model = PlanarVAE(hidden=30).requires_grad_(False).eval()
    x, z = torch.rand(400, 784), torch.randn(100_000, 2)
    w, u, b = torch.randn(3, 2), torch.randn(3, 2), torch.randn(3)
    before, found = torch.get_num_threads(), []
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            found.append(
                [*planar.planar_chain(z, w, u, b), planar.planar_inverse(z, w, u, b), exact_log_px(model, x[:5]).log_px]
            )
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)
