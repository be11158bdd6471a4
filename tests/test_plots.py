"""What is drawn: where it is, the right way up, in the project's style whatever the user's settings are."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from planar_helpers import plots, results
from planar_helpers.elbo import gaussian_log_density
from planar_helpers.grid import plane_grid

plt.switch_backend("Agg")
Z = plane_grid(-4, 4, 81)
LOG_P = gaussian_log_density(Z, torch.tensor([2.0, -1.0]).double(), torch.tensor([-3.0, -3.0]).double())


@pytest.fixture(autouse=True)
def _settings_stay() -> Iterator[None]:
    with matplotlib.rc_context():
        yield
    plt.close("all")


def test_a_density_is_drawn_where_it_is() -> None:
    fig, ax = plt.subplots()
    plots.show_density(ax, Z, LOG_P)
    image = ax.images[0]
    row, column = np.unravel_index(image.get_array().argmax(), (81, 81))
    left, right, bottom, top = image.get_extent()
    assert image.origin == "lower" and image.get_cmap().name == "viridis"
    assert left + (column + 0.5) / 81 * (right - left) == pytest.approx(2.0, abs=1e-6)
    assert bottom + (row + 0.5) / 81 * (top - bottom) == pytest.approx(-1.0, abs=1e-6)
    plots.show_contours(ax, Z, LOG_P, "red", "q")
    points = np.concatenate([p.vertices for p in ax.collections[-1].get_paths()])
    assert points.mean(0) == pytest.approx([2.0, -1.0], abs=0.1)
    radius = np.sort(np.linalg.norm(points - [2.0, -1.0], axis=1))
    sigma = np.exp(-1.5)
    assert radius[-1] == pytest.approx(sigma * np.sqrt(2 * np.log(10)), rel=0.1)  # 90 % of the mass
    assert radius[0] == pytest.approx(sigma * np.sqrt(2 * np.log(2)), rel=0.1)  # 50 %


def test_an_outline_stands_on_a_white_edge_and_only_a_label_is_in_the_legend() -> None:
    fig, ax = plt.subplots()
    plots.show_contours(ax, Z, LOG_P, "red", "q")
    plots.show_contours(ax, Z, LOG_P, "white")  # has none
    drawn = [(matplotlib.colors.to_hex(lines.get_edgecolor()[0]), lines.get_linewidth()[0]) for lines in ax.collections]
    assert drawn == [("#ffffff", 3.0), ("#ff0000", 1.4), ("#ffffff", 1.4)]
    assert ax.get_legend_handles_labels()[1] == ["q"]


def test_a_grid_of_unequal_sides_is_drawn_where_it_is_and_a_turned_one_refused() -> None:
    z = torch.stack(torch.meshgrid(torch.linspace(0, 2, 5), torch.linspace(1, 2, 3), indexing="xy"), -1)  # (3, 5, 2)
    fig, ax = plt.subplots()
    plots.show_density(ax, z, torch.zeros(3, 5))
    assert ax.images[0].get_extent() == pytest.approx((-0.25, 2.25, 0.75, 2.25))
    for bad in (z.transpose(0, 1), z.flip(0), z**2, z * 0):
        with pytest.raises(ValueError, match="z must be a grid as grid.plane_grid builds it"):
            plots.show_density(ax, bad, torch.zeros(bad.shape[:2]))
    with pytest.raises(ValueError, match="z must have shape .n ≥ 2"):
        plots.show_density(ax, z[:1], torch.zeros(1, 5))
    with pytest.raises(ValueError, match="log_density must have mass"):
        plots.show_contours(ax, z, torch.full((3, 5), -torch.inf), "red")


def test_a_posterior_with_its_outlines() -> None:
    fig, ax = plt.subplots()
    plots.show_posterior(ax, Z, LOG_P, "title", q0=LOG_P - 1, qK=LOG_P)
    assert [line.get_label() for line in ax.get_lines()] == ["$q_0$", "$q_K$"]
    assert [line.get_color() for line in ax.get_lines()] == [plots.COLOURS["q0"], plots.COLOURS["qK"]]
    assert ax.get_title(loc="left") == "title" and len(ax.images) == 1
    fig, ax = plt.subplots()
    plots.show_posterior(ax, Z, LOG_P, qK=LOG_P)
    assert [line.get_label() for line in ax.get_lines()] == ["$q_K$"]


def test_a_moved_mesh_is_drawn_line_by_line_and_red_where_it_lies_face_down() -> None:
    z = plane_grid(-1, 1, 11)
    moved = z + 5 * torch.tensor([1.0, 0.0])
    fig, ax = plt.subplots()
    plots.show_mesh(ax, moved, every=5, folded=z[..., 0] < -0.5, limits=(-9, 9), symbol="y")
    lines = ax.get_lines()
    assert len(lines) == 3 + 3 + 3 + 3 and ax.get_xlim() == (-9, 9) and ax.get_ylabel() == "$y_2$"
    for row, line in zip((0, 5, 10), lines[:3], strict=True):
        assert np.array_equal(line.get_xydata(), moved[row])
    for column, line in zip((0, 5, 10), lines[3:6], strict=True):
        assert np.array_equal(line.get_xydata(), moved[:, column])
    assert {line.get_color() for line in lines[6:]} == {plots.COLOURS["failure"]}
    red = np.concatenate([line.get_xydata() for line in lines[6:]])
    assert np.nanmax(red[:, 0]) < 4.5 and np.isnan(red).any() and np.isfinite(red).any()


def test_signed_values_are_white_at_zero_and_lie_in_their_cells() -> None:
    corners = plane_grid(-1, 1, 4)
    values = torch.tensor([[-1.0, 0.0, 0.5]] * 3)
    fig, ax = plt.subplots()
    mesh = plots.show_signed(ax, corners, values)
    assert mesh.get_clim() == (-1, 1) and mesh.get_array().shape == (3, 3)
    assert mesh.to_rgba(0.0)[:3] == pytest.approx((0.97, 0.97, 0.97), abs=0.02)
    assert mesh.to_rgba(1.0)[0] > mesh.to_rgba(1.0)[2] and mesh.to_rgba(-1.0)[0] < mesh.to_rgba(-1.0)[2]
    assert np.array_equal(mesh.get_coordinates(), corners)
    assert plots.show_signed(ax, corners, corners[..., 0], limit=0.3).get_clim() == (-0.3, 0.3)
    assert plots.show_signed(ax, corners, torch.zeros(3, 3)).get_clim() == (-1, 1)
    with pytest.raises(ValueError, match="values must be"):
        plots.show_signed(ax, corners, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="limit must be positive"):
        plots.show_signed(ax, corners, values, limit=-1)


def test_a_hyperplane_is_drawn_where_w_z_plus_b_is_zero() -> None:
    fig, ax = plt.subplots()
    w, b = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor(0.5)
    plots.show_hyperplane(ax, w, b)
    line = ax.get_lines()[0]
    for point in (line.get_xy1(), line.get_xy2()):
        assert (w @ torch.tensor(point).float() + b).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="w must not be zero"):
        plots.show_hyperplane(ax, torch.zeros(2), b)
    with pytest.raises(ValueError, match=r"w must be \(2\)"):
        plots.show_hyperplane(ax, torch.ones(3), b)


def test_the_model_is_drawn_with_the_parts_asked_for_in_orange() -> None:
    fig = plots.show_model(["draw", "chain"])
    boxes = {text.get_text(): text.get_bbox_patch() for text in fig.axes[0].texts if text.get_bbox_patch()}
    orange = matplotlib.colors.to_rgba(plots.COLOURS["qK"])
    assert list(boxes) == ["encoder", "heads", "draw", "chain", "decoder"]
    assert [name for name, box in boxes.items() if box.get_edgecolor() == orange] == ["draw", "chain"]
    plt.close(fig)
    with pytest.raises(ValueError, match="lit must name parts among encoder.*, got flow"):
        plots.show_model(["flow"])


def test_images_in_rows() -> None:
    fig, axes = plots.panels(1, 2)
    images = torch.zeros(3, 784)
    images[0, 0], images[2, 783] = 1, 0.5  # the first image's top left pixel, the last one's bottom right
    plots.image_grid(axes[0, 0], images, columns=2, padding=1, title="t")
    shown = axes[0, 0].images[0].get_array()
    assert shown[1, 1] == 1 and shown[57, 28] == 0.5 and shown.sum() == 1.5
    assert axes[0, 0].images[0].origin == "upper" and shown.shape == (59, 59)


@pytest.mark.parametrize("shape", [(4, 600), (784, 3), (0, 784), (28,), (2, 28, 29), ()])
def test_images_that_are_not_28_by_28_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images must be .*28 × 28"):
        plots.image_grid(plt.subplots()[1], torch.zeros(shape))


def test_pixels_are_bytes_or_lie_in_0_1() -> None:
    ax = plt.subplots()[1]
    for images in (torch.full((1, 784), 51, dtype=torch.uint8), np.full((1, 28, 28), 51, dtype=np.uint8)):
        plots.image_grid(ax, images)
        assert np.allclose(ax.images[-1].get_array(), 0.2)
    plots.image_grid(ax, torch.ones(1, 784, dtype=torch.bool))
    assert ax.images[-1].get_array().max() == 1
    for bad in (torch.randn(2, 784), torch.full((1, 784), torch.nan), torch.full((1, 784), 255)):
        with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
            plots.image_grid(ax, bad)
    for wrong, name in (({"columns": 0}, "columns"), ({"columns": 2.5}, "columns"), ({"padding": -1}, "padding")):
        with pytest.raises(ValueError, match=f"{name} must be a whole number, at least"):
            plots.image_grid(ax, torch.zeros(1, 784), **wrong)


def test_values_and_shapes_that_do_not_fit_are_refused() -> None:
    ax = plt.subplots()[1]
    with pytest.raises(ValueError, match=r"w must be \(2\), got shape \(3,\)"):
        plots.show_hyperplane(ax, torch.ones(3), torch.zeros(()))
    with pytest.raises(ValueError, match=r"log_density must be \(81, 81\)"):
        plots.show_density(ax, Z, torch.zeros(80, 81))
    for bad in ("abc", torch.zeros(2, dtype=torch.complex64), object()):
        with pytest.raises(TypeError, match="w must hold real numbers"):
            plots.show_hyperplane(ax, bad, torch.zeros(()))


FORMS: dict[str, Callable[[torch.Tensor], object]] = {
    "with a gradient": lambda x: (x.float() if not x.is_floating_point() else x).clone().requires_grad_(),
    "bfloat16": lambda x: x.bfloat16(),
    "float64": lambda x: x.double(),
    "an array": lambda x: x.numpy(),
    "a list": lambda x: x.tolist(),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_tensors_of_every_kind_and_arrays_are_drawn(form: Callable[[torch.Tensor], object]) -> None:
    z = plane_grid(-1, 1, 9)  # eighths: bfloat16 holds them
    ax = plt.subplots()[1]
    plots.show_posterior(ax, form(z), form(-z.square().sum(-1)), q0=form(-z.square().sum(-1)))
    plots.show_mesh(ax, form(z), folded=form((z[..., 0] > 0).float()))
    plots.show_signed(ax, form(z), form(z[..., 0]))
    plots.show_hyperplane(ax, form(torch.ones(2)), form(torch.zeros(())))
    plots.image_grid(ax, form(torch.full((2, 784), 0.5)))


USERS = {
    "image.origin": "upper", "image.cmap": "gray", "lines.linewidth": 9.0, "axes.titlelocation": "center",
    "savefig.format": "svg", "savefig.bbox": "tight", "savefig.dpi": 30, "savefig.transparent": True,
    "axes.formatter.use_locale": True, "figure.facecolor": "black", "image.interpolation": "bilinear",
    "axes.spines.top": True, "font.size": 30, "pcolor.shading": "nearest", "contour.linewidth": 7,
}  # fmt: skip


def draw() -> bytes:
    fig, axes = plots.panels(1, 3)
    plots.show_posterior(axes[0, 0], Z, LOG_P, "a title", q0=LOG_P)
    plots.image_grid(axes[0, 1], torch.rand(4, 784, generator=torch.Generator().manual_seed(0)), title="another")
    plots.show_signed(axes[0, 2], Z, Z[..., 0])
    return results.save_figure(fig, "99_style").read_bytes()


def test_the_users_settings_change_nothing_that_is_drawn_or_written() -> None:
    wanted = draw()
    matplotlib.rcParams.update(USERS)
    assert draw() == wanted
    matplotlib.rcdefaults()
    assert draw() == wanted
    plt.style.use("dark_background")
    before = dict(matplotlib.rcParams)
    assert draw() == wanted and dict(matplotlib.rcParams) == before


def test_use_style_holds_for_what_a_notebook_draws_by_itself() -> None:
    matplotlib.rcParams.update(USERS)
    plots.use_style()
    assert matplotlib.rcParams["image.origin"] == "lower" and matplotlib.rcParams["axes.titlelocation"] == "left"
    assert matplotlib.rcParams["savefig.format"] == "png" and not matplotlib.rcParams["axes.formatter.use_locale"]


def test_importing_changes_no_setting() -> None:
    code = "import matplotlib; m = dict(matplotlib.rcParams); import planar_helpers.plots, planar_helpers.results; "
    code += "assert {k: v for k, v in matplotlib.rcParams.items() if k != 'backend'} == "
    code += "{k: v for k, v in m.items() if k != 'backend'}"
    root = Path(plots.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
