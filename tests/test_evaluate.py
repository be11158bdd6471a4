"""Quadrature against closed forms and a brute grid; importance sampling and the gap against quadrature."""

import math

import pytest
import torch
from torch import nn

from planar_helpers.elbo import bernoulli_log_likelihood
from planar_helpers.evaluate import (
    exact_log_px,
    importance_log_px,
    inference_gap,
    main_island,
    own_posterior,
    posterior_grid,
)
from planar_helpers.targets import log_mass, plane_grid
from planar_helpers.vae import FlowPosterior, PlanarVAE


class RoundPosterior(nn.Module):
    """Logits ±c(z) whose Bernoulli likelihood of x = (1, 0) is a Gaussian bump: log p(x|z) = −‖z − centre‖²/(2 width²).

    So p(x) is a Gaussian integral, in closed form. The bump may be long, narrow and turned.
    """

    def __init__(self, centre: tuple[float, float], widths: tuple[float, float], angle: float = 0.0) -> None:
        super().__init__()
        turn = torch.tensor(
            [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64
        )
        self.centre = torch.tensor(centre, dtype=torch.float64)
        self.precision = turn @ torch.diag(torch.tensor(widths, dtype=torch.float64) ** -2) @ turn.T
        self.covariance = turn @ torch.diag(torch.tensor(widths, dtype=torch.float64) ** 2) @ turn.T

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        offset = z - self.centre
        half = 0.25 * torch.einsum("...i,ij,...j->...", offset, self.precision, offset) + 1e-12
        logit = -(half + torch.log1p(-torch.exp(-half)))  # so that log(1 + e^{−logit}) = half, for both pixels
        return torch.stack([logit, -logit], dim=-1)

    def log_px(self) -> float:
        total, centre = self.covariance + torch.eye(2).double(), self.centre
        log_normal = (
            -math.log(2 * math.pi) - 0.5 * torch.logdet(total) - 0.5 * centre @ torch.linalg.solve(total, centre)
        )
        return (log_normal + math.log(2 * math.pi) + 0.5 * torch.logdet(self.covariance)).item()


@pytest.mark.parametrize("angle", [0.0, 0.6])
@pytest.mark.parametrize(
    "centre", [(0.0, 0.0), (1.234, -0.777), (-2.95, 3.05), (0.05, 0.05), (0.025, 0.025), (0.05, 1.2)]
)
@pytest.mark.parametrize("widths", [(0.01, 0.01), (0.02, 0.02), (0.01, 1.0), (0.05, 0.2), (1.0, 1.0), (30.0, 30.0)])
def test_quadrature_against_the_closed_form_down_to_deviations_of_0_01(widths, centre, angle: float) -> None:
    model = PlanarVAE(d_x=2, hidden=4).double()
    model.decoder = RoundPosterior(centre, widths, angle)
    log_px, error = exact_log_px(model, torch.tensor([[1.0, 0.0]]).double())
    assert error.item() <= 0.01
    assert abs(log_px.item() - model.decoder.log_px()) <= error.item() + 1e-5


def test_quadrature_of_trained_models_against_a_brute_grid(trained: PlanarVAE, digits) -> None:
    x = digits.test[:12].float() / 255
    log_px, error = exact_log_px(trained, x)
    assert error.max() <= 0.01
    double = PlanarVAE(**trained.settings).double()
    double.load_state_dict(trained.state_dict())
    z = plane_grid(-6, 6, 601).flatten(0, 1)
    with torch.no_grad():
        logits = double.decode(z)
        constant = -torch.nn.functional.softplus(logits).sum(-1) - 0.5 * (z**2).sum(-1) - math.log(2 * math.pi)
        brute = torch.logsumexp(x.double() @ logits.T + constant, dim=1) + 2 * math.log(12 / 600)
    assert ((log_px - brute).abs() <= error + 2e-3).all()


def test_quadrature_reports_a_larger_error_where_it_cannot_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PlanarVAE(d_x=2, hidden=4).double()
    model.decoder = RoundPosterior((0.04, 0.03), (0.02, 0.02))
    monkeypatch.setattr("planar_helpers.evaluate.MAX_LEVEL", 1)
    log_px, error = exact_log_px(model, torch.tensor([[1.0, 0.0]]).double())
    assert error.item() > 0.1 and abs(log_px.item() - model.decoder.log_px()) <= error.item()


def test_quadrature_says_when_mass_lies_beyond_its_square() -> None:
    model = PlanarVAE(d_x=2, hidden=4).double()
    model.decoder = RoundPosterior((9.0, 0.0), (0.5, 0.5))
    assert exact_log_px(model, torch.tensor([[1.0, 0.0]]).double()).error.item() > 0.01


def test_quadrature_does_not_depend_on_the_batch_and_takes_none() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8), torch.rand(5, 12)
    whole = exact_log_px(model, x).log_px
    alone = torch.cat([exact_log_px(model, x[i : i + 1]).log_px for i in range(5)])
    assert torch.allclose(whole, alone, atol=1e-4)
    assert exact_log_px(model, x[:0]).log_px.shape == importance_log_px(model, x[:0], 3).error.shape == (0,)


def test_importance_sampling_agrees_with_quadrature_within_its_error_bars() -> None:
    torch.manual_seed(1)
    model, x = PlanarVAE(d_x=30, hidden=20), torch.rand(40, 30)
    exact, estimate = exact_log_px(model, x), importance_log_px(model, x, 20_000)
    z_scores = (estimate.log_px - exact.log_px) / (estimate.error)
    assert z_scores.abs().max() < 4.5 and 0.5 < z_scores.std() < 1.6
    assert estimate.error.max() < 0.05


def test_importance_sampling_rises_to_log_px_from_the_elbo(trained: PlanarVAE, digits) -> None:
    x = digits.test[:12].float() / 255
    exact = exact_log_px(trained, x).log_px.mean()
    means = [importance_log_px(trained, x, n).log_px.mean() for n in (1, 10, 5000)]
    assert means[0] < means[1] < means[2] <= exact + 0.02
    assert means[2] > exact - 1.0
    assert torch.isinf(importance_log_px(trained, x, 1).error).all()


def test_importance_sampling_for_other_D() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8, D=1, K=2), torch.rand(4, 12)
    z = torch.linspace(-10, 10, 20001).unsqueeze(1)
    with torch.no_grad():
        joint = (
            bernoulli_log_likelihood(x.unsqueeze(1), model.decode(z)) - 0.5 * z[:, 0] ** 2 - 0.5 * math.log(2 * math.pi)
        )
    exact = torch.logsumexp(joint.double(), dim=1) + math.log(0.001)
    estimate = importance_log_px(model, x, 50_000)
    assert ((estimate.log_px - exact).abs() < 4 * estimate.error + 1e-4).all()


def test_posterior_grid_holds_densities_and_their_kl_is_the_gap(trained: PlanarVAE, digits) -> None:
    x = digits.test[:3].float() / 255
    for one in x:
        grid = posterior_grid(trained, one, n=241)
        assert grid.z.shape == (241, 241, 2)
        for log_density in grid[1:]:
            assert log_density.shape == (241, 241)
            assert log_mass(grid.z, log_density).exp().item() == pytest.approx(1, abs=0.02)
        qK = torch.softmax(grid.log_qK.flatten(), 0)
        kl = (qK * (grid.log_qK - grid.log_posterior).flatten()).sum()
        with torch.no_grad():
            draws = torch.stack([trained(one[None]).elbo for _ in range(1000)])
        gap = exact_log_px(trained, one[None]).log_px - draws.mean(0)
        assert abs(kl - gap) < 4 * draws.std() / 1000**0.5 + 0.05 * (1 + kl)


def test_inference_gap_adds_up_and_optimising_helps(trained: PlanarVAE, digits) -> None:
    x = digits.test[:8].float() / 255
    before = [p.clone() for p in trained.parameters()]
    state = torch.get_rng_state()
    gap = inference_gap(trained, x, steps=150)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(before, trained.parameters(), strict=True))
    assert torch.allclose(gap.total, gap.approximation + gap.amortization, atol=1e-3)
    assert gap.amortization.mean() > 0 and gap.approximation.mean() > -0.05
    nothing = inference_gap(trained, x, steps=0)
    assert nothing.amortization.abs().mean() < 0.3


@pytest.mark.parametrize("widths", [(0.02, 0.02), (0.05, 0.2), (0.5, 1.5)])
@pytest.mark.parametrize("constraint", ["paper", "shifted"])
def test_main_island_has_the_exact_moments_and_steps_that_do_nothing(widths, constraint: str) -> None:
    centre = (0.73, -0.41)
    model = PlanarVAE(d_x=2, hidden=4, K=3, constraint=constraint).double()
    model.decoder = RoundPosterior(centre, widths)
    x = torch.tensor([[1.0, 0.0]]).double().expand(3, -1)
    state = torch.get_rng_state()
    island = main_island(model, x)
    assert torch.equal(state, torch.get_rng_state())
    for i, width in enumerate(widths):  # the posterior: a Gaussian of precision 1 + 1/width²
        variance = 1 / (1 + width**-2)
        assert island.mu[:, i].tolist() == pytest.approx(3 * [centre[i] * variance / width**2], abs=0.01 * width)
        assert island.logvar[:, i].exp().sqrt().tolist() == pytest.approx(3 * [variance**0.5], rel=0.02)
    z = torch.randn(5, 3, 2).double()
    no_steps = main_island(model, x, K=0)
    assert island.w.shape == (3, 3, 2) and no_steps.w.shape == (3, 0, 2)
    assert torch.allclose(island.log_prob(z), no_steps.log_prob(z), atol=1e-9)


def test_a_second_start_finds_what_a_start_on_a_wrong_island_misses(digits) -> None:
    # An encoder that says (4, 4) with a tiny deviation for every image.
    model, x = PlanarVAE(hidden=50, K=0), digits.test[:4].float() / 255
    with torch.no_grad():
        model.heads.weight.zero_()
        model.heads.bias.copy_(torch.tensor([4.0, 4.0, -9.0, -9.0]))
        model.decoder[0].weight.mul_(20)
        model.decoder[2].weight.mul_(10)
    alone = inference_gap(model, x, steps=30)
    both = inference_gap(model, x, steps=30, start=main_island(model, x))
    assert (both.approximation <= alone.approximation + 1e-4).all()
    assert both.approximation.mean() < alone.approximation.mean() - 1
    assert torch.allclose(both.total, alone.total)


def test_own_posterior_takes_an_encoders_output_and_works_without_gradients() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8), torch.rand(4, 12)
    from_encoder = own_posterior(model, x, model.encode(x), steps=3)
    with torch.no_grad():
        without = own_posterior(model, x, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(from_encoder, without, strict=True))


def test_posterior_grid_leaves_the_random_stream_and_repeats() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8), torch.rand(1, 12)
    state = torch.get_rng_state()
    one, other = posterior_grid(model, x, 21), posterior_grid(model, x, 21)
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(one.z, other.z)


def test_own_posterior_finds_a_posterior_that_is_known() -> None:
    # A decoder that ignores z: the posterior is the prior, and the best q, with or without steps, is N(0, I).
    model = PlanarVAE(d_x=5, hidden=4, K=0)
    with torch.no_grad():
        model.decoder[2].weight.zero_()
    x = torch.rand(3, 5)
    zeros = torch.zeros(3, 2, 2), torch.zeros(3, 2, 2), torch.zeros(3, 2)
    start = FlowPosterior(torch.full((3, 2), 0.5), torch.full((3, 2), -1.0), *zeros)
    for first in (None, start):
        own = own_posterior(model, x, first, steps=400)
        assert own.w.shape[1] == (0 if first is None else 2) and not own.mu.requires_grad
        assert own.mu.abs().max() < 0.05 and own.logvar.abs().max() < 0.1
    assert torch.equal(start.mu, torch.full((3, 2), 0.5)), "the start must not be changed in place"


def test_bad_input_gets_a_clear_error() -> None:
    line, x = PlanarVAE(d_x=12, hidden=8, D=3), torch.rand(4, 12)
    for call in (exact_log_px, posterior_grid, inference_gap, main_island):
        with pytest.raises(ValueError, match="D must be 2, got 3"):
            call(line, x)
    plane = PlanarVAE(d_x=12, hidden=8)
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="n_samples must be"):
            importance_log_px(plane, x, bad)
        with pytest.raises(ValueError, match="n_samples must be"):
            own_posterior(plane, x, n_samples=bad)
        with pytest.raises(ValueError, match="n_eval must be"):
            inference_gap(plane, x, n_eval=bad, steps=0)
        with pytest.raises(ValueError, match="n must be"):
            posterior_grid(plane, x[:1], n=bad)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="tolerance must be positive"):
            exact_log_px(plane, x, tolerance=bad)
    with pytest.raises(ValueError, match="steps must be"):
        own_posterior(plane, x, steps=-1)
    with pytest.raises(ValueError, match="start must be of 4 images"):
        own_posterior(plane, x, plane.encode(x[:2]))
    with pytest.raises(ValueError, match="K must be"):
        main_island(plane, x, K=-1)
    with pytest.raises(TypeError, match="x must be"):
        posterior_grid(plane, None)
    for call in (exact_log_px, lambda m, x: importance_log_px(m, x, 5), inference_gap):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            call(plane, x + 1)
    with pytest.raises(ValueError, match="one image"):
        posterior_grid(plane, x)
