"""Seed, device and budget; where figures go, that they are written whole, and drawn the right way up."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from planar_helpers import plots
from planar_helpers.elbo import gaussian_log_density
from planar_helpers.run import budget, by_budget, pick_device, seed_all
from planar_helpers.targets import plane_grid


def test_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLANAR_BUDGET", raising=False)
    assert budget() == "quick" and by_budget(1, 2) == 1
    monkeypatch.setenv("PLANAR_BUDGET", "full")
    assert budget() == "full" and by_budget(1, 2) == 2
    monkeypatch.setenv("PLANAR_BUDGET", "Full")
    with pytest.raises(ValueError, match="PLANAR_BUDGET must be one of"):
        budget()


def test_device_and_seed() -> None:
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    seed_all(3)
    first = torch.rand(3), np.random.rand()  # noqa: NPY002
    seed_all(3)
    assert torch.equal(first[0], torch.rand(3)) and first[1] == np.random.rand()  # noqa: NPY002


def test_only_full_mnist_figures_and_constant_ones_reach_the_gallery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLANAR_FIGURES")
    for set_budget, data, budget_matters, gallery in (
        ("quick", None, False, True),
        ("full", None, False, True),
        ("quick", None, True, False),
        ("full", None, True, True),
        ("quick", "MNIST", False, False),
        ("full", "MNIST", False, True),
        ("full", "MNIST", True, True),
        ("full", "digits", False, False),
    ):
        monkeypatch.setenv("PLANAR_BUDGET", set_budget)
        folder = plots.figure_path("x.png", data, budget_matters).parent
        assert folder == (plots.FIGURES if gallery else plots.FIGURES.parent / "build" / "figures")


def test_a_figure_is_saved_whole_and_twice_the_same(tmp_path: Path) -> None:
    contents = []
    for _ in range(2):
        fig, ax = plt.subplots()
        ax.plot([0, 1])
        contents.append(plots.save(fig, "99_line").read_bytes())
        plt.close(fig)
    assert contents[0] == contents[1] and contents[0].startswith(b"\x89PNG")
    fig, ax = plt.subplots(figsize=(1, 1))
    (line,) = ax.plot([0, 1])
    animation = plots.animate(lambda frame: line.set_ydata([0, frame]), 3, fig)
    path = plots.save(animation, "99_moving")
    assert path.suffix == ".gif" and path.read_bytes().startswith(b"GIF")
    plt.close(fig)
    assert {p.name for p in path.parent.iterdir()} == {"99_line.png", "99_moving.gif"}


def test_a_failed_save_leaves_nothing_behind() -> None:
    class Broken(plt.Figure):
        def savefig(self, path: Path, **_: object) -> None:
            Path(path).write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        plots.save(Broken(), "99_broken")
    folder = plots.figure_path("x").parent
    assert not folder.exists() or list(folder.iterdir()) == []


def test_numbers_are_kept_with_their_tolerance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANAR_FIGURES", str(tmp_path))
    path = plots.save_numbers("07_x", {"ELBO": (-1.23456, 0.5)}, "MNIST", seed=0)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["numbers"] == {"ELBO": {"value": -1.2346, "tolerance": 0.5}}
    assert content["settings"]["data"] == "MNIST" and content["settings"]["seed"] == 0
    for bad in ((float("nan"), 1.0), (1.0, 0.0)):
        with pytest.raises(ValueError, match="'ELBO' must be finite"):
            plots.save_numbers("07_x", {"ELBO": bad}, "MNIST")
    assert json.loads(path.read_text(encoding="utf-8")) == content
    assert [file.name for file in path.parent.iterdir()] == ["07_x.json"]


def test_a_density_is_drawn_where_it_is() -> None:
    z = plane_grid(-4, 4, 81)
    log_density = gaussian_log_density(z, torch.tensor([2.0, -1.0]).double(), torch.tensor([-3.0, -3.0]).double())
    fig, ax = plt.subplots()
    plots.show_density(ax, z, log_density)
    image = ax.images[0]
    row, column = np.unravel_index(image.get_array().argmax(), (81, 81))
    left, right, bottom, top = image.get_extent()
    assert image.origin == "lower"
    assert left + (column + 0.5) / 81 * (right - left) == pytest.approx(2.0, abs=1e-6)
    assert bottom + (row + 0.5) / 81 * (top - bottom) == pytest.approx(-1.0, abs=1e-6)
    plots.show_contours(ax, z, log_density, "red", "q")
    points = np.concatenate([p.vertices for p in ax.collections[-1].get_paths()])
    assert points.mean(0) == pytest.approx([2.0, -1.0], abs=0.1)
    radius = np.sort(np.linalg.norm(points - [2.0, -1.0], axis=1))
    sigma = np.exp(-1.5)
    assert radius[-1] == pytest.approx(sigma * np.sqrt(2 * np.log(10)), rel=0.1)  # 90 % of the mass
    assert radius[0] == pytest.approx(sigma * np.sqrt(2 * np.log(2)), rel=0.1)  # 50 %
    plt.close(fig)


def test_a_hyperplane_is_drawn_where_w_z_plus_b_is_zero() -> None:
    fig, ax = plt.subplots()
    w, b = torch.tensor([1.0, -2.0]), torch.tensor(0.5)
    plots.show_hyperplane(ax, w, b)
    line = ax.get_lines()[0]
    for point in (line.get_xy1(), line.get_xy2()):
        assert w @ torch.tensor(point) + b == pytest.approx(0, abs=1e-6)
    plt.close(fig)


def test_images_and_curves_and_points() -> None:
    fig, axes = plots.panels(1, 3)
    images = torch.zeros(3, 784)
    images[0, 0] = 1  # the first image's top left pixel
    plots.image_grid(axes[0, 0], images, columns=2, padding=1, title="t")
    shown = axes[0, 0].images[0].get_array()
    assert shown[1, 1] == 1 and axes[0, 0].images[0].origin == "upper" and shown.shape == (59, 59)
    plots.show_curves(axes[0, 1], torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), "c", "k")
    assert [line.get_label() for line in axes[0, 1].get_lines()] == ["train", "test"]
    assert axes[0, 1].get_lines()[1].get_xdata().tolist() == [1, 2]
    plots.scatter_by_digit(axes[0, 2], torch.zeros(10, 2), torch.arange(10))
    assert axes[0, 2].get_xlabel() == "$z_1$" and len(axes[0, 2].get_legend().get_texts()) == 10
    plt.close(fig)


@pytest.mark.parametrize("name", ["../escape", "/absolute", "01_a/b", "", "01_x.png", "7_x", "01 x", None])
def test_a_name_that_is_no_stem_is_refused(name) -> None:
    with pytest.raises(ValueError, match="name must be a stem"):
        plots.save(None, name)
    with pytest.raises(ValueError, match="name must be a stem"):
        plots.save_numbers(name, {}, "MNIST")
