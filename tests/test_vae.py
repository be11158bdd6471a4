"""The model: shapes, the batch against images one by one, what it refuses, and that the flow stays out of p."""

import pytest
import torch
from torch.distributions import Independent, Normal, TransformedDistribution

from planar_helpers.elbo import bernoulli_log_likelihood
from planar_helpers.evaluate import exact_log_px
from planar_helpers.planar import PlanarTransform, planar_chain
from planar_helpers.vae import FlowPosterior, PlanarVAE


def test_defaults_are_the_posts() -> None:
    model = PlanarVAE()
    shapes = sorted(tuple(p.shape) for p in model.parameters() if p.dim() == 2)
    assert shapes == sorted([(500, 784), (2 + 2 + 6 + 6 + 3, 500), (500, 2), (784, 500)])
    assert model.K == 3 and model.D == 2


@pytest.mark.parametrize("D", [1, 2, 5])
@pytest.mark.parametrize("K", [0, 1, 4])
@pytest.mark.parametrize("B", [0, 1, 6])
def test_shapes(D: int, K: int, B: int) -> None:
    model, x = PlanarVAE(d_x=12, hidden=8, D=D, K=K), torch.rand(B, 12)
    mu, logvar, w, u, b = model.encode(x)
    assert mu.shape == logvar.shape == (B, D) and w.shape == u.shape == (B, K, D) and b.shape == (B, K)
    assert all(term.shape == (B,) for term in model(x))
    zK, log_q0, sum_ladj = model.encode(x).rsample((7,))
    assert zK.shape == (7, B, D) and log_q0.shape == sum_ladj.shape == (7, B)
    assert model.decode(zK).shape == (7, B, 12)
    assert model.reconstruct(x).shape == (B, 12) and model.sample(3).shape == (3, 12)


def test_a_batch_equals_its_images_one_by_one() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8).double(), torch.rand(6, 12).double()
    whole = model.encode(x)
    for i in range(6):
        for field, one in zip(whole, model.encode(x[i : i + 1]), strict=True):
            assert torch.allclose(field[i], one[0], atol=1e-12)
    z0 = torch.randn(6, 2).double()
    zK, sum_ladj = planar_chain(z0, *whole[2:], "shifted")
    for i in range(6):
        z_i, ladj_i = planar_chain(z0[i], *(field[i] for field in whole[2:]), "shifted")
        assert torch.allclose(zK[i], z_i) and torch.allclose(sum_ladj[i], ladj_i)


@pytest.mark.parametrize("constraint", ["paper", "shifted"])
def test_posterior_against_torch_distributions(constraint: str) -> None:
    model, x = PlanarVAE(d_x=12, hidden=8, constraint=constraint).double(), torch.rand(6, 12).double()
    posterior = model.encode(x)
    assert posterior.constraint == posterior._replace(mu=posterior.mu + 1).constraint == constraint
    mu, logvar, w, u, b = posterior
    q0 = Independent(Normal(mu, torch.exp(0.5 * logvar)), 1)
    qK = TransformedDistribution(q0, PlanarTransform(w, u, b, constraint))
    zK, log_q0, sum_ladj = posterior.rsample((4,))
    assert torch.allclose(log_q0 - sum_ladj, qK.log_prob(zK), atol=1e-8)
    z = torch.randn(9, 6, 2).double()  # points it never sampled
    assert torch.allclose(posterior.log_prob(z), qK.log_prob(z), atol=1e-8)
    assert FlowPosterior(mu, logvar, w, u, b).constraint == "shifted"


def test_forward_draws_z0_in_eval_too_and_its_terms_are_those_of_its_draw() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8).eval(), torch.rand(6, 12)
    assert not torch.equal(model(x).log_q0, model(x).log_q0)
    torch.manual_seed(3)
    terms = model(x)
    torch.manual_seed(3)
    zK, log_q0, sum_ladj = model.encode(x).rsample()
    prior = Independent(Normal(torch.zeros(2), 1.0), 1)
    assert torch.allclose(terms.log_px_z, bernoulli_log_likelihood(x, model.decode(zK)))
    assert torch.allclose(terms.log_pz, prior.log_prob(zK))  # at zK, not at z0
    assert torch.equal(terms.log_q0, log_q0) and torch.equal(terms.sum_ladj, sum_ladj)


def test_gradients_reach_every_parameter() -> None:
    model = PlanarVAE(d_x=12, hidden=8)
    model(torch.rand(50, 12)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert (model.heads.weight.grad.abs().sum(1) > 0).all()  # each row: μ, log σ², w, u, b


def test_generation_decodes_the_prior_and_knows_no_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PlanarVAE(d_x=12, hidden=8)
    monkeypatch.setattr("planar_helpers.vae.planar_chain", lambda *_: pytest.fail("the flow was used to generate"))
    torch.manual_seed(5)
    images = model.sample(4)
    torch.manual_seed(5)
    assert torch.equal(images, torch.sigmoid(model.decode(torch.randn(4, 2))))


def test_a_reconstruction_is_repeatable_and_pushed_through_the_flow() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8), torch.rand(6, 12)
    mu, _, w, u, b = model.encode(x)
    expected = torch.sigmoid(model.decode(planar_chain(mu, w, u, b, "shifted")[0]))
    assert torch.equal(model.reconstruct(x), model.reconstruct(x))
    assert torch.allclose(model.reconstruct(x), expected)


def test_the_elbo_is_below_exact_log_px(trained: PlanarVAE, digits) -> None:
    """The mean of many draws, with its standard error, for every model the tests train."""
    x = digits.test[:16].float() / 255
    with torch.no_grad():
        draws = torch.stack([trained(x).elbo for _ in range(400)])
    log_px, error = exact_log_px(trained, x)
    standard_error = draws.std(0) / 20
    assert (draws.mean(0) <= log_px + error + 4 * standard_error).all()
    assert (log_px - draws.mean(0)).mean() > 0.05  # and not by being equal


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.rand(3, 11), ValueError, r"x must have shape \(B, 12\)"),
        (torch.rand(12), ValueError, "x must have shape"),
        (torch.rand(3, 1, 12), ValueError, "x must have shape"),
        (torch.rand(3, 12).double(), TypeError, "dtype"),
        (torch.ones(3, 12, dtype=torch.uint8), TypeError, "to_float"),
        ([[0.0] * 12], TypeError, "x must be a floating tensor"),
        (torch.full((3, 12), 1.5), ValueError, r"\[0, 1\]"),
        (torch.full((3, 12), -0.01), ValueError, r"\[0, 1\]"),
        (torch.full((3, 12), torch.nan), ValueError, "NaN"),
    ],
)
def test_bad_images_get_a_clear_error(x, error: type, message: str) -> None:
    model = PlanarVAE(d_x=12, hidden=8)
    for call in (model.encode, model.forward, model.reconstruct):
        with pytest.raises(error, match=message):
            call(x)


def test_bad_sizes_get_a_clear_error() -> None:
    for settings in (
        {"K": -1},
        {"D": 0},
        {"D": 2.5},
        {"hidden": 0},
        {"hidden": 2.5},
        {"d_x": 0},
        {"d_x": True},
        {"constraint": "no"},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            PlanarVAE(**settings)
    model = PlanarVAE(d_x=12, hidden=8)
    with pytest.raises(ValueError, match="z must have shape"):
        model.decode(torch.zeros(4, 3))
    for bad in (-1, 2.0, True):
        with pytest.raises(ValueError, match="n must be"):
            model.sample(bad)
    for bad in (torch.zeros(4, 2).double(), [[0.0, 0.0]]):
        with pytest.raises(TypeError, match="z must be a tensor"):
            model.decode(bad)
