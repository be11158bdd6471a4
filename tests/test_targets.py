"""The paper's four densities against an independent re-typing of its table 1, and what the soft wall does to them."""

import math

import pytest
import torch

from planar_helpers.grid import log_mass, plane_grid
from planar_helpers.targets import TARGETS, energy, log_target, soft_wall


def retyped_energy(x: float, y: float, i: int) -> float:
    """Table 1 of Rezende & Mohamed 2015, typed from the paper: plain math, no logsumexp, nothing shared."""
    wave = math.sin(2 * math.pi * x / 4)
    bump = 3 * math.exp(-(1 / 2) * ((x - 1) / 0.6) ** 2)
    rise = 3 * (1 / (1 + math.exp(-((x - 1) / 0.3))))
    if i == 1:
        radial = (1 / 2) * ((math.hypot(x, y) - 2) / 0.4) ** 2
        return radial - math.log(math.exp(-(1 / 2) * ((x - 2) / 0.6) ** 2) + math.exp(-(1 / 2) * ((x + 2) / 0.6) ** 2))
    if i == 2:
        return (1 / 2) * ((y - wave) / 0.4) ** 2
    if i == 3:
        upper = math.exp(-(1 / 2) * ((y - wave) / 0.35) ** 2)
        lower = math.exp(-(1 / 2) * ((y - wave + bump) / 0.35) ** 2)
    else:
        upper = math.exp(-(1 / 2) * ((y - wave) / 0.4) ** 2)
        lower = math.exp(-(1 / 2) * ((y - wave + rise) / 0.35) ** 2)
    return -math.log(upper + lower)


@pytest.mark.parametrize("i", TARGETS)
def test_energy_is_table_1(i):
    z = plane_grid(-4, 4, 33).reshape(-1, 2)
    expected = torch.tensor([retyped_energy(x, y, i) for x, y in z.tolist()], dtype=torch.float64)
    torch.testing.assert_close(energy(z, i), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("i", TARGETS)
def test_energy_keeps_batch_shape_and_dtype(i):
    for dtype in (torch.float32, torch.float64):
        values = energy(torch.randn(3, 0, 5, 2, dtype=dtype), i)
        assert values.shape == (3, 0, 5) and values.dtype == dtype
    assert log_target(torch.zeros(2), i).shape == ()


@pytest.mark.parametrize(("i", "per_unit"), [(2, 0.4), (3, 0.35 + 0.35), (4, 0.4 + 0.35)])
def test_without_wall_mass_per_unit_of_z1_is_the_same_everywhere(i, per_unit):
    z_2 = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    for z_1 in (-1000.0, -3.0, 0.0, 1.0, 50.0):
        z = torch.stack([torch.full_like(z_2, z_1), z_2], dim=-1)
        mass = torch.trapezoid(torch.exp(-energy(z, i)), z_2).item()
        assert mass == pytest.approx(per_unit * math.sqrt(2 * math.pi), rel=1e-9)


@pytest.mark.parametrize("i", TARGETS)
def test_with_wall_mass_is_finite_and_converges(i):
    masses = []
    for low, n in ((6, 121), (6, 241), (6, 481), (8, 641)):
        z = plane_grid(-low, low, n)
        masses.append(log_mass(z, log_target(z, i)).exp().item())
    coarse, middle, fine, wider = masses
    assert abs(middle - fine) <= max(abs(coarse - fine), 1e-9)
    assert middle == pytest.approx(fine, rel=1e-4) and wider == pytest.approx(fine, rel=1e-9)
    per_unit = {1: math.inf, 2: 0.4, 3: 0.7, 4: 0.75}[i] * math.sqrt(2 * math.pi)
    assert 0 < fine < per_unit * (8 + 0.2 * math.sqrt(2 * math.pi)) * (1 + 1e-9)


def test_wall_is_zero_inside_and_half_a_square_outside():
    assert torch.equal(soft_wall(plane_grid(-4, 4, 9)), torch.zeros(9, 9, dtype=torch.float64))
    z = torch.tensor([[4.2, 0.0], [0.0, -4.4], [4.2, 4.2]], dtype=torch.float64)
    torch.testing.assert_close(soft_wall(z), torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(soft_wall(z, half_width=4.1, softness=0.1)[0], torch.tensor(0.5, dtype=torch.float64))


@pytest.mark.parametrize("i", TARGETS)
def test_log_target_is_minus_energy_minus_wall(i):
    z = plane_grid(-6, 6, 25)
    torch.testing.assert_close(log_target(z, i), -energy(z, i) - soft_wall(z), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("i", TARGETS)
def test_extreme_points_have_finite_values_and_gradients(i, dtype):
    corners = [[x, y] for x in (-1e3, 0.0, 1e3) for y in (-1e3, 0.0, 1e3)]
    z = torch.tensor(corners, dtype=dtype, requires_grad=True)
    value = log_target(z, i)
    (grad,) = torch.autograd.grad(value.sum(), z)
    assert torch.isfinite(value).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize("i", TARGETS)
def test_gradient_by_finite_differences(i):
    generator = torch.Generator().manual_seed(0)
    z = (3 * torch.randn(50, 2, generator=generator, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: log_target(z, i), (z,))


@pytest.mark.parametrize("i", [0, 5, "1", 2.5, True, None])
def test_unknown_target_is_an_error(i):
    with pytest.raises(ValueError, match="i must be one of"):
        energy(torch.zeros(2), i)


def test_bad_shapes_and_lengths_are_errors():
    with pytest.raises(ValueError, match="z must have shape"):
        energy(torch.zeros(5, 3), 1)
    with pytest.raises(ValueError, match="half_width and softness must be positive"):
        soft_wall(torch.zeros(2), softness=0.0)
