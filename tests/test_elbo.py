"""Each term against torch.distributions in float64, and the sum against a closed form."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from planar_helpers.elbo import (
    ElboTerms,
    bernoulli_log_likelihood,
    gaussian_log_density,
    standard_normal_log_density,
)
from planar_helpers.grid import log_mass, plane_grid

seeds = st.integers(0, 2**31)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=seeds, D=st.integers(1, 40), scale=st.floats(0.01, 10))
def test_gaussians_against_torch_distributions_for_any_D(seed: int, D: int, scale: float) -> None:
    z, mu, logvar = (scale * normal(seed + i, 5, D) for i in range(3))
    logvar = logvar.clamp(-20, 20)
    q0 = Independent(Normal(mu, torch.exp(0.5 * logvar)), 1)
    assert torch.allclose(gaussian_log_density(z, mu, logvar), q0.log_prob(z), rtol=1e-10)
    prior = Independent(Normal(torch.zeros(D).double(), 1.0), 1)
    assert torch.allclose(standard_normal_log_density(z), prior.log_prob(z), rtol=1e-10)


def test_gaussian_integrates_to_one_with_its_half_and_its_constant() -> None:
    z = plane_grid(-12, 12, 601)
    mu, logvar = torch.tensor([0.5, -1.0]).double(), torch.tensor([-1.0, 1.5]).double()
    assert log_mass(z, gaussian_log_density(z, mu, logvar)).item() == pytest.approx(0, abs=1e-6)
    assert log_mass(z, standard_normal_log_density(z)).item() == pytest.approx(0, abs=1e-8)


@given(seed=seeds, scale=st.floats(0.1, 20))
def test_bernoulli_against_torch_distributions_on_binary_images(seed: int, scale: float) -> None:
    logits = scale * normal(seed, 5, 30)
    x = (normal(seed + 1, 5, 30) > 0).double()
    expected = Independent(Bernoulli(logits=logits), 1).log_prob(x)
    assert torch.allclose(bernoulli_log_likelihood(x, logits), expected, rtol=1e-10)


@given(seed=seeds)
def test_bernoulli_on_greys_against_the_written_out_formula(seed: int) -> None:
    logits, x = normal(seed, 5, 30), normal(seed + 1, 5, 30).sigmoid()
    p = torch.sigmoid(logits)
    expected = (x * p.log() + (1 - x) * (1 - p).log()).sum(-1)
    assert torch.allclose(bernoulli_log_likelihood(x, logits), expected, rtol=1e-10)


def test_bernoulli_of_extreme_logits_is_finite_where_probabilities_round_to_0() -> None:
    logits, x = torch.tensor([[200.0, -200.0]]), torch.tensor([[0.0, 1.0]])
    assert bernoulli_log_likelihood(x, logits).item() == pytest.approx(-400)
    assert bernoulli_log_likelihood(x, logits.expand(3, 1, 2)).shape == (3, 1)


def test_the_sum_and_its_signs() -> None:
    terms = ElboTerms(*(torch.tensor([value, 2 * value]) for value in (-100.0, -3.0, 1.5, 0.25)))
    assert torch.allclose(terms.elbo, torch.tensor([-104.25, -208.5]))
    assert torch.allclose(terms.kl, torch.tensor([4.25, 8.5]))
    assert terms.loss.shape == () and terms.loss.item() == pytest.approx(156.375)


def test_kl_without_a_flow_agrees_with_the_closed_form_within_its_error_bar() -> None:
    mu, logvar = torch.tensor([[0.5, -1.0]]).double(), torch.tensor([[-1.0, 0.5]]).double()
    eps = normal(0, 200_000, 2)
    z = mu + torch.exp(0.5 * logvar) * eps
    zero = torch.zeros(len(z)).double()
    kl = ElboTerms(zero, standard_normal_log_density(z), gaussian_log_density(z, mu, logvar), zero).kl
    closed = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum()
    other = kl_divergence(Normal(mu, torch.exp(0.5 * logvar)), Normal(torch.zeros_like(mu), 1.0)).sum()
    assert closed.item() == pytest.approx(other.item(), rel=1e-12)
    standard_error = kl.std() / math.sqrt(len(kl))
    assert abs(kl.mean() - closed) < 4 * standard_error and standard_error < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex64, None])
def test_half_precision_and_other_types_are_refused(dtype: torch.dtype | None) -> None:
    right, wrong = torch.zeros(3, 2), [[0.0, 0.0]] if dtype is None else torch.zeros(3, 2).to(dtype)
    for name, call in (
        ("x", lambda: bernoulli_log_likelihood(wrong, right)),
        ("logits", lambda: bernoulli_log_likelihood(right, wrong)),
        ("z", lambda: gaussian_log_density(wrong, right, right)),
        ("mu", lambda: gaussian_log_density(right, wrong, right)),
        ("logvar", lambda: gaussian_log_density(right, right, wrong)),
        ("z", lambda: standard_normal_log_density(wrong)),
    ):
        with pytest.raises(TypeError, match=f"^{name} must be a tensor of float32 or float64"):
            call()


def test_a_last_size_is_never_broadcast() -> None:
    three, one = torch.zeros(5, 3), torch.zeros(5, 1)
    for call in (
        lambda: bernoulli_log_likelihood(three, one),
        lambda: bernoulli_log_likelihood(one, three),
        lambda: gaussian_log_density(three, one, three),
        lambda: gaussian_log_density(three, three, one),
        lambda: gaussian_log_density(three, three, torch.tensor(0.0)),
        lambda: standard_normal_log_density(torch.tensor(0.0)),
    ):
        with pytest.raises(ValueError, match="must end in the same size"):
            call()


def test_four_terms_of_different_shapes_are_refused() -> None:
    right, column = torch.zeros(4), torch.zeros(4, 1)
    for i in range(4):
        terms = ElboTerms(*(column if i == j else right for j in range(4)))
        for name in ("elbo", "kl", "loss"):
            with pytest.raises(ValueError, match="must have one shape"):
                getattr(terms, name)


def test_surroundings_have_no_say() -> None:
    x, logits = normal(0, 5, 30).sigmoid().float(), normal(1, 5, 30).float()
    plain = bernoulli_log_likelihood(x, logits), gaussian_log_density(x, logits, x), standard_normal_log_density(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        torch.set_default_dtype(torch.float64)
        try:
            there = (
                bernoulli_log_likelihood(x, logits),
                gaussian_log_density(x, logits, x),
                standard_normal_log_density(x),
            )
        finally:
            torch.set_default_dtype(torch.float32)
    for one, other in zip(plain, there, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype == torch.float32
