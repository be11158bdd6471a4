"""Quadrature against closed forms, one-dimensional integrals and a brute grid; islands of known moments and mass."""

import math

import pytest
import torch
from torch import nn

from planar_helpers import quadrature
from planar_helpers.grid import kl_on_grid, log_mass, plane_grid
from planar_helpers.quadrature import _sublattices, exact_log_px, main_island, posterior_grid
from planar_helpers.vae import PlanarVAE

ONE_ZERO = torch.tensor([[1.0, 0.0]]).double()


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
    assert error.item() <= 0.021
    assert abs(log_px.item() - model.decoder.log_px()) <= error.item() + 1e-5


def test_quadrature_of_trained_models_against_a_brute_grid(trained: PlanarVAE, digits) -> None:
    x = digits.test[:12].float() / 255
    log_px, error = exact_log_px(trained, x)
    assert error.max() <= 0.021
    double = PlanarVAE(**trained.settings).double()
    double.load_state_dict(trained.state_dict())
    z = plane_grid(-5, 5, 401).flatten(0, 1)
    with torch.no_grad():
        logits = double.decode(z)
        constant = -torch.nn.functional.softplus(logits).sum(-1) - 0.5 * (z**2).sum(-1) - math.log(2 * math.pi)
        brute = torch.logsumexp(x.double() @ logits.T + constant, dim=1) + 2 * math.log(10 / 400)
    assert ((log_px - brute).abs() <= error + 2e-3).all()


def test_quadrature_reports_a_larger_error_where_it_cannot_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PlanarVAE(d_x=2, hidden=4).double()
    model.decoder = RoundPosterior((0.04, 0.03), (0.02, 0.02))
    monkeypatch.setattr("planar_helpers.quadrature.MAX_LEVEL", 1)
    log_px, error = exact_log_px(model, torch.tensor([[1.0, 0.0]]).double())
    assert error.item() > 0.1 and abs(log_px.item() - model.decoder.log_px()) <= error.item()


def test_quadrature_does_not_depend_on_the_batch_and_takes_none() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8), torch.rand(5, 12)
    whole = exact_log_px(model, x).log_px
    alone = torch.cat([exact_log_px(model, x[i : i + 1]).log_px for i in range(5)])
    assert torch.allclose(whole, alone, atol=1e-4)
    assert exact_log_px(model, x[:0]).log_px.shape == (0,)


def test_posterior_grid_holds_densities_and_their_kl_is_the_gap(trained: PlanarVAE, digits) -> None:
    x = digits.test[:2].float() / 255
    for one in x:
        grid = posterior_grid(trained, one, n=161)
        assert grid.z.shape == (161, 161, 2)
        for log_density in grid[1:]:
            assert log_density.shape == (161, 161)
            assert log_mass(grid.z, log_density).exp().item() == pytest.approx(1, abs=0.02)
        kl = kl_on_grid(grid.z, grid.log_qK, grid.log_posterior)
        with torch.no_grad():
            draws = torch.stack([trained(one[None]).elbo for _ in range(1000)])
        gap = exact_log_px(trained, one[None]).log_px - draws.mean(0)
        assert abs(kl - gap) < 4 * draws.std() / 1000**0.5 + 0.05 * (1 + kl)


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


def test_posterior_grid_leaves_the_random_stream_and_repeats() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8), torch.rand(1, 12)
    state = torch.get_rng_state()
    one, other = posterior_grid(model, x, 21), posterior_grid(model, x, 21)
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(one.z, other.z)


def along_z1(d_x: int, w1, b1, w2, b2) -> PlanarVAE:
    """A ReLU decoder that looks at z_1 only: logits of all pixels are w2ᵀ relu(w1 z_1 + b1) + b2."""
    model = PlanarVAE(d_x=d_x, hidden=len(w1), K=0).double()
    with torch.no_grad():
        model.decoder[0].weight.copy_(torch.stack([torch.tensor(w1), torch.zeros(len(w1))], dim=1))
        model.decoder[0].bias.copy_(torch.tensor(b1))
        model.decoder[2].weight.copy_(torch.tensor(w2).expand(d_x, -1))
        model.decoder[2].bias.fill_(b2)
    return model


def log_px_along_z1(model: PlanarVAE, x: torch.Tensor) -> torch.Tensor:
    """∫ p(x|z_1) N(z_1) dz_1 by a fine sum; the integral over z_2 is exactly 1."""
    z_1 = torch.linspace(-80, 80, 800_001, dtype=torch.float64)
    with torch.no_grad():
        hidden = torch.relu(z_1.unsqueeze(1) * model.decoder[0].weight[:, 0] + model.decoder[0].bias)
        logit = hidden @ model.decoder[2].weight[0] + model.decoder[2].bias[0]
    one, zero = x.sum(1, keepdim=True), (1 - x).sum(1, keepdim=True)
    log_likelihood = -one * nn.functional.softplus(-logit) - zero * nn.functional.softplus(logit)
    return torch.logsumexp(log_likelihood - 0.5 * z_1**2, dim=1) - 0.5 * math.log(2 * math.pi) + math.log(2e-4)


@pytest.mark.parametrize(
    ("w1", "b1", "w2", "b2", "truth"),
    [
        ([1.0], [-9.0], [5.0], 0.0, -55.8956),  # a step far out: the mode is at z_1 = 10.2
        ([-1.0], [-9.0], [5.0], 0.0, -55.8956),
        ([1.0], [50.0], [0.025], -1.6, -633.6273),  # broad, and half outside of the first square
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quadrature_looks_beyond_its_first_square(w1, b1, w2, b2, truth: float, dtype: torch.dtype) -> None:
    model, x = along_z1(784, w1, b1, w2, b2), torch.ones(1, 784).double()
    assert log_px_along_z1(model, x).item() == pytest.approx(truth, abs=1e-4)
    log_px, error = exact_log_px(model.to(dtype), x.to(dtype))
    assert abs(log_px.item() - truth) <= error.item() + 1e-4 and error.item() <= 0.021


@pytest.mark.parametrize("seed", range(12))
def test_quadrature_of_decoders_that_look_at_z1_is_within_its_error(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden, d_x = 1 + seed % 4, (3, 30, 784)[seed % 3]
    place = 12 * torch.rand(hidden, generator=generator) * (1 if seed % 2 else 0.3)
    w1 = torch.randn(hidden, generator=generator).sign()
    w2 = torch.randn(hidden, generator=generator) * (0.3, 2.0, 10.0)[seed % 3]
    model = along_z1(d_x, w1.tolist(), (-place).tolist(), w2.tolist(), 0.3)
    x = torch.rand(3, d_x, generator=generator, dtype=torch.float64).round()
    x[0] = 1
    log_px, error = exact_log_px(model, x)
    assert ((log_px - log_px_along_z1(model, x)).abs() <= error + 1e-7).all()  # 1e-7: the fine sum's own
    assert (error <= 0.021).all()


def test_quadrature_bounds_what_lies_beyond_its_farthest_look() -> None:
    model, x = along_z1(784, [1.0], [-75.0], [5.0], -4.0), torch.ones(1, 784).double()
    log_px, error = exact_log_px(model, x)
    assert log_px.item() < -2900 and error.item() > 100 and log_px_along_z1(model, x).item() <= log_px + error


def test_quadrature_does_not_look_far_where_nothing_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    # p(x|z) ≤ exp(−H): grey images leave less room than binary ones
    model, radii = PlanarVAE(d_x=200, hidden=3, K=0).double(), []
    inner = model._log_joint
    monkeypatch.setattr(model, "_log_joint", lambda x, z: radii.append(z.abs().max().item()) or inner(x, z))
    exact_log_px(model, torch.full((2, 200), 0.5).double())
    assert max(radii) < 2**0.5 * 8  # the corners of the first square
    exact_log_px(model, torch.ones(2, 200).double())
    assert 2**0.5 * 8 < max(radii) < 20


def test_quadrature_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, largest = PlanarVAE(d_x=3, hidden=2), torch.rand(1100, 3), []
    inner = model._log_joint

    def counting(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        result = inner(x, z)
        largest.append(result.numel())
        return result

    monkeypatch.setattr(model, "_log_joint", counting)
    exact_log_px(model, x)
    assert max(largest) <= 500 * 160**2
    largest.clear()
    main_island(model, x[:100], K=0)
    assert max(largest) <= 100 * 160**2


def test_quadrature_takes_as_many_images_at_once_as_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, taken = PlanarVAE(d_x=3, hidden=2), torch.rand(40, 3), []
    whole, inner = exact_log_px(model, x), quadrature._integrate
    monkeypatch.setattr(quadrature, "AT_ONCE", 100_000)  # about 19 000 cells an image: the posterior is the prior
    monkeypatch.setattr(quadrature, "_integrate", lambda m, x, *rest: taken.append(len(x)) or inner(m, x, *rest))
    parts = exact_log_px(model, x)
    assert max(taken) <= 6 and sum(taken) == 40
    assert torch.allclose(whole.log_px, parts.log_px, atol=1e-5)


def test_quadrature_of_an_image_in_company_is_that_of_the_image_alone() -> None:
    # to rounding, in float64: what cells hold that only other images keep does not count
    model, x = PlanarVAE(d_x=40, hidden=20).double(), torch.rand(30, 40).double()
    with torch.no_grad():
        model.decoder[2].weight.mul_(8)
    log_px, error = exact_log_px(model, x)
    for i in range(0, 30, 10):
        alone = exact_log_px(model, x[[i]])
        assert abs(log_px[i] - alone.log_px) < 1e-12 and abs(error[i] - alone.error) < 1e-12


def test_sublattices_are_every_second_point() -> None:
    values = torch.randn(2, 4, 4, 3).double()
    expected = [[values[:, i::2, j::2].exp().sum((0, 1, 2)).log() for j in (0, 1)] for i in (0, 1)]
    torch.testing.assert_close(_sublattices(values), torch.stack([torch.stack(row) for row in expected]))


BROAD_AND_NARROW = [((0.0, 0.0), 0.05), ((2.5, 0.0), 0.5)]


@pytest.mark.parametrize("islands", [BROAD_AND_NARROW, BROAD_AND_NARROW[::-1], [((0.0, 0.0), 0.5), ((2.5, 0.0), 0.05)]])
def test_main_island_is_the_one_of_most_mass(islands, bumps) -> None:
    model = PlanarVAE(d_x=2, hidden=4, K=2).double()
    model.decoder = bumps(*islands)
    (centre, s) = max(islands, key=lambda island: island[1])
    island = main_island(model, ONE_ZERO.expand(3, -1))
    shrunk = 1 / (1 + s**2)  # by the prior
    assert island.mu.tolist() == [pytest.approx([centre[0] * shrunk, 0.0], abs=0.02)] * 3
    assert island.logvar.exp().sqrt().flatten().tolist() == pytest.approx([s * shrunk**0.5] * 6, rel=0.05)


def test_main_island_may_lie_beyond_the_first_square() -> None:
    model, x = along_z1(100, [1.0], [-9.0], [5.0], 0.0).float(), torch.ones(1, 100)
    # where the slopes balance: 100 × 5 sigmoid(−5 (z_1 − 9)) = z_1
    island = main_island(model, x)
    assert island.mu[0].tolist() == pytest.approx([9.8, 0.0], abs=0.1)
    grid = posterior_grid(model, x, n=201)
    assert grid.mass.tolist() == pytest.approx([1, 1, 1], abs=0.02)


def test_main_island_starts_its_steps_across_the_island() -> None:
    model = PlanarVAE(d_x=2, hidden=4, K=3).double()
    model.decoder = RoundPosterior((0.7, -0.4), (0.02, 0.2))
    island = main_island(model, ONE_ZERO.expand(2, -1), K=500)
    sigma = torch.exp(0.5 * island.logvar)
    a = (island.w * island.mu.unsqueeze(1)).sum(-1) + island.b
    assert a.abs().max() < 1e-9, "each hyperplane goes through μ"
    spread = (island.w * sigma.unsqueeze(1)).std(dim=1)
    assert spread.flatten().tolist() == pytest.approx([1.0] * 4, rel=0.15), "w is in units of 1/σ"
    assert torch.equal(island.u, torch.zeros_like(island.u))


def test_posterior_grid_says_how_much_mass_it_holds() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8), torch.rand(1, 12)
    grid = posterior_grid(model, x, n=101)
    assert grid.mass.shape == (3,) and grid.mass.tolist() == pytest.approx([1, 1, 1], abs=0.02)
    off = grid._replace(log_q0=grid.log_q0 - 1)
    assert off.mass[1].item() == pytest.approx(grid.mass[1].item() / math.e)
    assert len(grid) == 4


def test_surroundings_change_nothing() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8), torch.rand(3, 12)
    calls = [exact_log_px, lambda m, x: main_island(m, x).tensors, lambda m, x: posterior_grid(m, x[:1], 41)]
    before = [call(model, x) for call in calls]
    x_other = torch.empty(12, 3).T.copy_(x)  # not contiguous
    surroundings = [
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.no_grad(),
        torch.inference_mode(),
        torch.device("meta"),
    ]
    for place in surroundings:
        with place:
            after = [call(model, x) for call in calls]
        assert all(
            torch.equal(a, b) and not a.is_inference()
            for one, two in zip(before, after, strict=True)
            for a, b in zip(one, two, strict=True)
        )
    torch.set_default_dtype(torch.float64)
    try:
        after = [call(model, x) for call in calls]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for one, two in zip(before, after, strict=True) for a, b in zip(one, two, strict=True))
    after = [call(model, x_other) for call in calls]
    assert all(
        torch.allclose(a, b, atol=1e-5)
        for one, two in zip(before, after, strict=True)
        for a, b in zip(one, two, strict=True)
    )
    assert not any(a.requires_grad for one in after for a in one)


def test_a_gradient_that_would_be_lost_is_refused() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8), torch.rand(1, 12, requires_grad=True)
    for call in (exact_log_px, main_island, posterior_grid):
        with pytest.raises(ValueError, match="x must not require a gradient"):
            call(model, x)
        with pytest.raises(ValueError, match="x must not require a gradient"):
            torch.func.grad(lambda x, call=call: call(model, x)[0].sum())(x.detach())
        with torch.no_grad():
            call(model, x)


def test_what_is_no_model_is_refused_by_name() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8), torch.rand(1, 12)
    for call in (exact_log_px, main_island, posterior_grid):
        for wrong in (nn.DataParallel(model), x, PlanarVAE, None):
            with pytest.raises(TypeError, match="model must be a PlanarVAE"):
                call(wrong, x)


def test_dropout_and_batch_norm_of_a_reader_are_at_rest() -> None:
    model, x = PlanarVAE(d_x=12, hidden=8), torch.rand(4, 12)
    model.decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 12))
    model.encoder = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8))
    model.train()
    one, other = exact_log_px(model, x), exact_log_px(model, x)
    assert torch.equal(one.log_px, other.log_px) and model.decoder[3].training and model.encoder[1].training
    posterior_grid(model, x[0], n=21)
    assert model.encoder[1].num_batches_tracked == 0


def test_weights_that_are_not_finite_give_no_plausible_number() -> None:
    x = torch.rand(3, 12)
    for bad in (math.nan, math.inf, -math.inf):
        model = PlanarVAE(d_x=12, hidden=8)
        with torch.no_grad():
            model.decoder[2].weight[0] = bad
        log_px, error = exact_log_px(model, x)
        assert (~log_px.isfinite() & ~error.isfinite()).all()


def test_half_precision_is_refused() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model, x = PlanarVAE(d_x=12, hidden=8).to(dtype), torch.rand(3, 12).to(dtype)
        for call in (exact_log_px, main_island, posterior_grid):
            with pytest.raises(TypeError, match="float32 or float64"):
                call(model, x)


def test_bad_input_gets_a_clear_error() -> None:
    line, x = PlanarVAE(d_x=12, hidden=8, D=3), torch.rand(4, 12)
    for call in (exact_log_px, posterior_grid, main_island):
        with pytest.raises(ValueError, match="D must be 2, got 3"):
            call(line, x)
    plane = PlanarVAE(d_x=12, hidden=8)
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="n must be"):
            posterior_grid(plane, x[:1], n=bad)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="tolerance must be positive"):
            exact_log_px(plane, x, tolerance=bad)
    with pytest.raises(ValueError, match="K must be"):
        main_island(plane, x, K=-1)
    with pytest.raises(TypeError, match="x must be"):
        posterior_grid(plane, None)
    for call in (exact_log_px, main_island):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            call(plane, x + 1)
    with pytest.raises(ValueError, match="one image"):
        posterior_grid(plane, x)
