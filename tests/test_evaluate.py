"""Importance sampling and the gap against quadrature and closed forms; own posteriors against known ones."""

import math

import pytest
import torch
from torch import nn

from planar_helpers.elbo import bernoulli_log_likelihood
from planar_helpers.evaluate import importance_log_px, inference_gap, own_posterior
from planar_helpers.quadrature import exact_log_px, main_island
from planar_helpers.vae import FlowPosterior, PlanarVAE


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
    assert from_encoder == without


def test_own_posterior_finds_a_posterior_that_is_known() -> None:
    # A decoder that ignores z: the posterior is the prior, and the best q, with or without steps, is N(0, I).
    model = PlanarVAE(d_x=5, hidden=4, K=0)
    with torch.no_grad():
        model.decoder[2].weight.zero_()
    x = torch.rand(3, 5)
    zeros = torch.zeros(3, 2, 2), torch.zeros(3, 2, 2), torch.zeros(3, 2)
    start = FlowPosterior(torch.full((3, 2), 0.5), torch.full((3, 2), -1.0), *zeros, constraint="shifted")
    for first in (None, start):
        own = own_posterior(model, x, first, steps=400)
        assert own.w.shape[1] == (0 if first is None else 2) and not own.mu.requires_grad
        assert own.mu.abs().max() < 0.05 and own.logvar.abs().max() < 0.1
    assert torch.equal(start.mu, torch.full((3, 2), 0.5)), "the start must not be changed in place"


ISLANDS = [((0.0, 0.0), 0.05), ((2.5, 0.0), 0.5)]


@pytest.mark.parametrize("islands", [ISLANDS, ISLANDS[::-1]])
def test_the_gap_from_the_main_island_is_the_share_of_the_other(islands, bumps) -> None:
    # The best Gaussian covers the broad island alone: KL = −log(its share of the mass), here 0.14.
    model, x = PlanarVAE(d_x=2, hidden=4, K=0).double(), torch.tensor([[1.0, 0.0]]).double()
    with torch.no_grad():
        model.heads.weight.zero_()
        model.heads.bias.copy_(torch.tensor([0.0, 0.0, 2 * math.log(0.05), 2 * math.log(0.05)]))
    model.decoder = bumps(*islands)
    mass = [s**2 / (1 + s**2) * math.exp(-0.5 * c[0] ** 2 / (1 + s**2)) for c, s in ISLANDS]
    gap = inference_gap(model, x, steps=60, start=main_island(model, x), n_eval=4000)
    assert gap.approximation.item() == pytest.approx(-math.log(mass[1] / sum(mass)), abs=0.03)
    assert gap.total.item() > 2


def test_importance_sampling_without_any_weight_says_so() -> None:
    class Nowhere(nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return torch.full((*z.shape[:-1], 2), -torch.finfo(z.dtype).max)

    model, x = PlanarVAE(d_x=2, hidden=4), torch.ones(3, 2)
    model.decoder = Nowhere()
    for n in (1, 5):
        log_px, error = importance_log_px(model, x, n)
        assert (log_px == -torch.inf).all() and (error == torch.inf).all()


def test_importance_sampling_is_the_log_of_the_mean_weight_and_its_error_the_delta_method() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8), torch.rand(3, 12)
    torch.manual_seed(5)
    log_px, error = importance_log_px(model, x, 50)
    torch.manual_seed(5)
    with torch.no_grad():
        weights = model.elbo_draws(x, model.encode(x), 50).double().exp()
    torch.testing.assert_close(log_px, weights.mean(0).log().float())
    torch.testing.assert_close(error, (weights.std(0) / weights.mean(0) / 50**0.5).float())


def test_importance_sampling_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = PlanarVAE(d_x=3, hidden=2), []
    inner = model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda z: rows.append(z[..., 0].numel()) or inner(z))
    assert importance_log_px(model, torch.rand(300, 3), 200).log_px.shape == (300,)
    assert importance_log_px(model, torch.rand(2, 3), 50_000).log_px.shape == (2,)
    assert max(rows) <= 20_000


def test_no_images_and_one_image() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8), torch.rand(2, 12)
    for n in (0, 1):
        assert importance_log_px(model, x[:n], 3).error.shape == (n,)
        assert own_posterior(model, x[:n], steps=2).mu.shape == (n, 2)
        assert inference_gap(model, x[:n], steps=2, n_eval=5).total.shape == (n,)


def test_surroundings_change_nothing_and_the_random_stream_goes_on() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8), torch.rand(3, 12)
    calls = [lambda: own_posterior(model, x, steps=3).tensors, lambda: inference_gap(model, x, steps=3, n_eval=10)]
    calls.append(lambda: torch.random.manual_seed(0) and importance_log_px(model, x, 10))
    before = [call() for call in calls]
    surroundings = [torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad(), torch.inference_mode()]
    for place in surroundings:
        with place:
            after = [call() for call in calls]
        for one, other in zip(before, after, strict=True):
            for a, b in zip(one, other, strict=True):
                assert torch.equal(a, b) and not b.is_inference() and not b.requires_grad
    with torch.device("meta"):
        assert all(torch.equal(a, b) for a, b in zip(before[0], calls[0](), strict=True))
    torch.set_default_dtype(torch.float64)
    try:
        assert all(torch.equal(a, b) for a, b in zip(before[0], calls[0](), strict=True))
    finally:
        torch.set_default_dtype(torch.float32)
    state = torch.get_rng_state()
    calls[0](), calls[1]()
    assert torch.equal(state, torch.get_rng_state())


def test_what_was_made_in_inference_mode_can_be_optimised() -> None:
    with torch.inference_mode():
        model, x = PlanarVAE(d_x=12, hidden=8), torch.rand(3, 12)
        start = model.encode(x)
        inside = own_posterior(model, x, start, steps=3)
    assert inside == own_posterior(model, x, start, steps=3)
    (inside.mu * torch.ones(2, requires_grad=True)).sum().backward()


def test_dropout_and_batch_norm_of_a_reader_are_at_rest() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8), torch.rand(4, 12)
    model.decoder = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 12))
    model.encoder = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8))
    for training in (True, False):
        model.train(training)
        gap = inference_gap(model, x, steps=3, n_eval=20)
        importance_log_px(model, x, 3)
        assert model.decoder[2].training == training and model.encoder[1].num_batches_tracked == 0
        if training:
            first = gap
    assert all(torch.equal(a, b) for a, b in zip(first, gap, strict=True))


def test_weights_that_are_not_finite_and_half_precision_give_no_plausible_number() -> None:
    x = torch.rand(3, 12)
    model = PlanarVAE(d_x=12, hidden=8)
    with torch.no_grad():
        model.decoder[2].weight[0] = math.nan
    for n in (1, 5):
        assert all(part.isnan().all() for part in importance_log_px(model, x, n))
    assert all(part.isnan().all() for part in inference_gap(model, x, steps=2, n_eval=5))
    half = PlanarVAE(d_x=12, hidden=8).bfloat16()
    for call in (lambda m, x: importance_log_px(m, x, 5), inference_gap, own_posterior):
        with pytest.raises(TypeError, match="float32 or float64"):
            call(half, x.bfloat16())


def test_bad_input_gets_a_clear_error() -> None:
    line, x = PlanarVAE(d_x=12, hidden=8, D=3), torch.rand(4, 12)
    with pytest.raises(ValueError, match="D must be 2, got 3"):
        inference_gap(line, x)
    plane = PlanarVAE(d_x=12, hidden=8)
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="n_samples must be"):
            importance_log_px(plane, x, bad)
        with pytest.raises(ValueError, match="n_samples must be"):
            own_posterior(plane, x, n_samples=bad)
        with pytest.raises(ValueError, match="n_eval must be"):
            inference_gap(plane, x, n_eval=bad, steps=0)
    with pytest.raises(ValueError, match="steps must be"):
        own_posterior(plane, x, steps=-1)
    with pytest.raises(ValueError, match="start must be of 4 images"):
        own_posterior(plane, x, plane.encode(x[:2]))
    for bad in (plane.encode(x).double(), plane.encode(x).tensors):
        with pytest.raises(TypeError, match="start must be a FlowPosterior of torch.float32"):
            own_posterior(plane, x, bad)
    for call in (own_posterior, lambda m, x: importance_log_px(m, x, 5), inference_gap):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            call(plane, x + 1)


def test_importance_sampling_takes_another_posterior() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8, D=3, K=2), torch.rand(5, 12)
    torch.manual_seed(0)
    own = importance_log_px(model, x, 7)
    torch.manual_seed(0)
    same = importance_log_px(model, x, 7, model.encode(x))
    assert torch.equal(own.log_px, same.log_px)
    for bad in (model.encode(x[:4]), "q"):
        with pytest.raises(ValueError, match="posterior must be of 5 images and D = 3"):
            importance_log_px(model, x, 7, bad)
    wide = model.encode(x).replace(logvar=torch.full((5, 3), 3.0))
    exact = importance_log_px(model, x, 40_000)
    other = importance_log_px(model, x, 40_000, wide)
    assert (other.error > exact.error).all()
    assert ((other.log_px - exact.log_px).abs() < 6 * (other.error + exact.error)).all()


@pytest.mark.parametrize("family", ["translation", "gaussian"])
def test_own_parameters_stay_in_the_family(family: str) -> None:
    model, x = PlanarVAE(d_x=12, hidden=8, K=0 if family == "gaussian" else 3, family=family), torch.rand(3, 12)
    for start in (None, main_island(model, x)):
        own = own_posterior(model, x, start, steps=20)
        assert own.w.shape == (3, 0, 2) and (own.shear is None) == (family == "translation")
        if family == "gaussian":
            assert own.shear.abs().min() > 0, "the shear moves"
