"""Grids against closed forms: where the points lie, what a density's mass is, and the KL of two Gaussians."""

import math

import pytest
import torch

from planar_helpers.grid import kl_on_grid, log_mass, plane_grid

LOG_2PI = math.log(2 * math.pi)


def gaussian(z: torch.Tensor, mean: float, sigma: float) -> torch.Tensor:
    """Log density of N((mean, 0), sigma² I)."""
    offset = z - torch.tensor([mean, 0.0], dtype=z.dtype)
    return -0.5 * (offset**2).sum(-1) / sigma**2 - LOG_2PI - 2 * math.log(sigma)


def test_grid_runs_along_z1_in_columns_from_low_to_high() -> None:
    z = plane_grid(-1, 1, 3)
    assert z.shape == (3, 3, 2) and z.dtype == torch.float64
    assert z[0, :, 0].tolist() == [-1, 0, 1] and z[:, 0, 1].tolist() == [-1, 0, 1]
    assert plane_grid().shape == (201, 201, 2) and plane_grid()[0, 0].tolist() == [-4, -4]
    assert plane_grid()[-1, -1].tolist() == [4, 4] and plane_grid(0, 1, 2, torch.float32).dtype == torch.float32


def test_log_mass_of_a_batch() -> None:
    z = plane_grid(-8, 8, 161)
    log_density = gaussian(z, 0, 1)
    masses = log_mass(z, torch.stack([log_density, log_density + 1]))
    torch.testing.assert_close(masses, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shift", [0.0, 300.0])  # p may come unnormalised: on neither side may exp overflow
def test_kl_of_two_gaussians_is_the_closed_form(shift: float) -> None:
    z = plane_grid(-10, 10, 401)
    log_q = torch.stack([gaussian(z, 0.3, 0.5), gaussian(z, -1.0, 1.2)])
    log_p = gaussian(z, 0.0, 1.0) + shift
    exact = [0.5 * (2 * s**2 + m**2 - 2) - 2 * math.log(s) for m, s in ((0.3, 0.5), (-1.0, 1.2))]
    assert kl_on_grid(z, log_q, log_p).tolist() == pytest.approx(exact, rel=1e-9)
    assert kl_on_grid(z, log_p - shift, log_p).item() == pytest.approx(0, abs=1e-12)


def test_kl_renormalises_q_and_counts_no_density_as_no_share() -> None:
    z = plane_grid(-2.7, 2.7, 201)  # holds 0.986 of N(0, I) and 0.995 of N(0, 0.9² I)
    log_p, log_q = gaussian(z, 0, 1), gaussian(z, 0, 0.9)
    assert kl_on_grid(z, log_q, log_q + 7).item() == pytest.approx(0, abs=1e-12)
    half = torch.where(z[..., 0] > 0, log_q + math.log(2), -torch.inf)
    half = half - log_mass(z, half)
    value = kl_on_grid(z, half, log_p)
    q = torch.softmax(half.flatten(), 0)
    inside = q > 0
    p = torch.softmax(log_p.flatten(), 0)
    assert value.item() == pytest.approx((q[inside] * (q[inside] / p[inside]).log()).sum().item(), rel=1e-9)
    assert kl_on_grid(z, log_q, half).item() == math.inf


def test_kl_refuses_a_grid_that_does_not_hold_q() -> None:
    z = plane_grid(-2.7, 2.7, 201)
    for bad in (gaussian(z, 0, 1), gaussian(z, 9, 1), gaussian(z, 0, 0.9) + 0.2, gaussian(z, 0, 1) * math.nan):
        with pytest.raises(ValueError, match="log_q must be a density"):
            kl_on_grid(z, bad, gaussian(z, 0, 1))
    for fine in (math.log(0.9901 / 0.9946), math.log(1.09)):
        kl_on_grid(z, gaussian(z, 0, 0.9) + fine, gaussian(z, 0, 1))


def test_bad_shapes_and_lengths_are_errors() -> None:
    z = plane_grid(-1, 1, 5)
    with pytest.raises(ValueError, match="n ≥ 2"):
        plane_grid(n=1)
    with pytest.raises(ValueError, match="low < high"):
        plane_grid(1.0, 1.0)
    for bad_z, bad in ((z, z[..., 0].flatten()), (z.flatten(0, 1), z[..., 0]), (z[:1, :1], z[:1, :1, 0])):
        with pytest.raises(ValueError, match="log_density"):
            log_mass(bad_z, bad)


def test_a_default_device_or_dtype_changes_nothing() -> None:
    with torch.device("meta"):
        assert plane_grid(-1, 1, 5).device.type == "cpu"


def test_points_that_are_no_even_grid_are_refused() -> None:
    z = plane_grid(-4, 4, 41)
    log_p = -0.5 * (z**2).sum(-1)
    moved = torch.stack([z[..., 0] + 0.3 * torch.tanh(z[..., 1]), z[..., 1]], dim=-1)
    uneven = z.clone()
    uneven[:, 20:, 0] += 0.1
    for wrong in (z.transpose(0, 1), z.flip(0), z.flip(1), moved, uneven, z[torch.tensor([0, *range(2, 41), 40])]):
        for call in (
            lambda z: log_mass(z, log_p),
            lambda z: kl_on_grid(z, log_p - log_mass(plane_grid(-4, 4, 41), log_p), log_p),
        ):
            with pytest.raises(ValueError, match="z must be a grid as grid.plane_grid builds it"):
                call(wrong)
    for wrong in (z.numpy(), None):
        with pytest.raises(TypeError, match="z must be a torch.Tensor"):
            log_mass(wrong, log_p)
    with pytest.raises(TypeError, match="log_density must be a torch.Tensor"):
        log_mass(z, log_p.numpy())
    shifted = z + torch.tensor([1.0, -2.0]).double()  # a grid need not be centred
    assert log_mass(shifted, log_p) == pytest.approx(log_mass(z, log_p).item())


def test_a_grid_whose_steps_drift_is_none() -> None:
    z = plane_grid(-3, 3, 101)
    drifting = z.clone()
    drifting[..., 0] += 0.0015 * (9 - drifting[..., 0] ** 2)  # each step within 1 % of the mean one
    with pytest.raises(ValueError, match="rising evenly"):
        log_mass(drifting, torch.zeros(101, 101))
    assert log_mass(z, torch.zeros(101, 101)).isfinite()
