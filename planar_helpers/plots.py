"""Arrays in, Figure out: nothing is saved here (that is results.save_figure's part).

Colour goes by role: q_0 blue, q_K orange, target or data grey, the hyperplane wᵀz + b = 0 dashed and dark,
failure red; viridis for densities, a diverging symmetric map for log-determinants.

The style is planar.mplstyle, on Matplotlib's own defaults. Importing this module changes no setting: each function
draws in that style by itself, whatever settings are in force, and `use_style()` puts it in force for the rest.
Every function takes tensors, with gradients or on another device, and NumPy arrays alike.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from torch import Tensor
from torchvision.utils import make_grid

from planar_helpers.grid import cell_area
from planar_helpers.results import STYLE

COLOURS = {"q0": "#2a6fb0", "qK": "#e07b00", "target": "#7a7a7a", "hyperplane": "#222222", "failure": "#c62828"}
MODEL = {  # each part, what it gives, and the ELBO's term that is read off there
    "encoder": ("hidden\n(B, 500)", ""),
    "heads": ("$\\mu, \\log\\sigma^2$ (B, D)\n$w, u$ (B, K, D)\n$b$ (B, K)", ""),
    "draw": ("$z_0$\n(B, D)", "$-\\log q_0(z_0)$"),
    "chain": ("$z_K$\n(B, D)", "$+\\Sigma\\,$ladj"),
    "decoder": ("logits\n(B, 784)", "$+\\log p(z_K)$\n$+\\log p(x|z_K)$"),
}
Values = Tensor | ArrayLike
_styled = plt.style.context(STYLE)  # a decorator: draws in the project's style, and leaves the settings as they were


def use_style() -> None:
    """Put this project's style in force for every figure from here on, in place of whatever was set before.

    In a notebook whose kernel was started with a backend that shows nothing (MPLBACKEND=Agg), figures are shown again.
    """
    plt.style.use(STYLE)
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and hasattr(shell, "kernel") and plt.get_backend().lower() in ("agg", "pdf", "ps", "svg"):
        shell.run_line_magic("matplotlib", "inline")


def _array(name: str, values: Values, *shape: Any) -> np.ndarray:
    """Return values as a float64 array of that shape, where a letter stands for any size, and ... for any shape."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().to(torch.promote_types(values.dtype, torch.float64)).numpy()
    try:
        array = np.asarray(values).astype(np.float64, casting="same_kind")  # refuses complex numbers, words, objects
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must hold real numbers, got {type(values).__name__}") from None
    fits = [wanted in (size, str(wanted)) for wanted, size in zip(shape, array.shape, strict=False)]
    if shape != (...,) and (len(shape) != array.ndim or not all(fits)):
        raise ValueError(f"{name} must be ({', '.join(map(str, shape))}), got shape {array.shape}")
    return array


@_styled
def plane_axes(ax: Axes, limits: Sequence[float], symbol: str = "z") -> Axes:
    """Dress axes as a plane: equal aspect, limits (low, high) on both axes, labels z_1 and z_2."""
    ax.set(xlim=tuple(limits), ylim=tuple(limits), aspect="equal", xlabel=f"${symbol}_1$", ylabel=f"${symbol}_2$")
    return ax


@_styled
def panels(rows: int, columns: int, size: float = 2.6, **settings: Any) -> tuple[Figure, np.ndarray]:
    """Return a figure and a (rows, columns) array of square panels, `size` inches each."""
    return plt.subplots(rows, columns, figsize=(size * columns + 0.4, size * rows + 0.3), squeeze=False, **settings)


@_styled
def show_model(lit: Sequence[str] = ()) -> Figure:
    """Draw the model from x to the logits, with shapes and the ELBO's terms; the parts named in `lit` are orange.

    Raises ValueError for a part that is not in MODEL.
    """
    if unknown := set(lit) - set(MODEL):
        raise ValueError(f"lit must name parts among {', '.join(MODEL)}, got {', '.join(sorted(unknown))}")
    fig, ax = plt.subplots(figsize=(8.8, 1.6))
    ax.text(-0.62, 0.3, "$x$\n(B, 784)", ha="center", va="bottom", fontsize=9)
    for i, (part, (gives, term)) in enumerate(MODEL.items()):
        edge, fill = (COLOURS["qK"], "#fbe3c8") if part in lit else (COLOURS["target"], "#f2f2f2")
        ax.annotate("", (i - 0.3, 0), (i - 0.72, 0), arrowprops={"arrowstyle": "->", "color": COLOURS["hyperplane"]})
        ax.text(i, 0, part, ha="center", va="center", bbox={"boxstyle": "round,pad=0.5", "fc": fill, "ec": edge})
        ax.text(i + 0.5, 0.3, gives, ha="center", va="bottom", fontsize=9)
        ax.text(i, -0.6, term, ha="center", va="top", fontsize=10)
    ax.set(xlim=(-0.9, len(MODEL) - 0.2), ylim=(-1.2, 1.3))
    ax.axis("off")
    return fig


@_styled
def show_density(
    ax: Axes, z: Values, log_density: Values, title: str = "", vmax: float | None = None, symbol: str = "z"
) -> None:
    """Draw exp(log_density) (G, H) over the grid z (G, H, 2): viridis, from 0 to vmax.

    Raises ValueError if z is no grid as grid.plane_grid builds it: z[i, j] = (z_1[j], z_2[i]), evenly spaced.
    """
    grid, density = _grid_and_density(z, log_density)
    low, high = grid[0, 0], grid[-1, -1]
    half = (high - low) / (2 * (np.array(density.shape[::-1]) - 1))  # a grid point is the middle of its pixel
    extent = (low[0] - half[0], high[0] + half[0], low[1] - half[1], high[1] + half[1])
    ax.imshow(density, extent=extent, vmin=0, vmax=vmax, aspect="equal", origin="lower", cmap="viridis")
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel=f"${symbol}_1$", ylabel=f"${symbol}_2$", title=title)


@_styled
def show_contours(ax: Axes, z: Values, log_density: Values, colour: str, label: str = "") -> None:
    """Draw the outlines that hold 50 % and 90 % of a density given as log_density (G, H) on the grid z (G, H, 2)."""
    grid, density = _grid_and_density(z, log_density)
    if not density.sum() > 0:
        raise ValueError("log_density must have mass on the grid: there is nothing to outline")
    ranked = np.sort(density.ravel())[::-1]
    mass = np.cumsum(ranked) / ranked.sum()
    levels = sorted({float(ranked[np.searchsorted(mass, share)]) for share in (0.9, 0.5)})
    for edge, width in {"white": 3.0, colour: 1.4}.items():  # on a white edge, to stand out on any colour
        ax.contour(grid[..., 0], grid[..., 1], density, levels=levels, colors=edge, linewidths=width)
    ax.plot([], [], color=colour, label=label)  # for a legend, which leaves out an empty label


def show_posterior(
    ax: Axes, z: Values, log_posterior: Values, title: str = "", q0: Values | None = None, qK: Values | None = None
) -> None:
    """Draw the exact posterior over the grid z (G, H, 2) and the outlines of log q_0 and log q_K (G, H), if given.

    The outlines are named for a legend, which is the caller's to draw.
    """
    show_density(ax, z, log_posterior, title)
    for role, symbol, log_q in (("q0", "$q_0$", q0), ("qK", "$q_K$", qK)):
        if log_q is not None:
            show_contours(ax, z, log_q, COLOURS[role], symbol)


@_styled
def show_mesh(
    ax: Axes,
    z: Values,
    every: int = 5,
    folded: Values | None = None,
    limits: Sequence[float] = (-5, 5),
    symbol: str = "z'",
    colour: str = COLOURS["q0"],
) -> None:
    """Draw a mesh of points z (G, H, 2) that a map has moved: every so many lines, in both directions.

    `folded` (G, H) is true where the map turned the plane over: those stretches are drawn again, in red.
    """
    mesh = _array("z", z, "G", "H", 2)
    drawn: list[tuple[np.ndarray, dict[str, Any]]] = [(mesh, {"color": colour, "lw": 0.7})]
    if folded is not None:
        turned = _array("folded", folded, *mesh.shape[:2]) != 0
        drawn.append((np.where(turned[..., None], mesh, np.nan), {"color": COLOURS["failure"], "lw": 0.9}))
    for points, style in drawn:
        for lines in (points[::every].transpose(1, 0, 2), points[:, ::every]):  # plot draws one line a column
            ax.plot(lines[..., 0], lines[..., 1], **style)
    plane_axes(ax, limits, symbol)


@_styled
def show_signed(ax: Axes, z: Values, values: Values, limit: float | None = None, edges: bool = False) -> QuadMesh:
    """Draw signed values in a diverging map, white at 0, red above, from −limit to limit; return it for a colour bar.

    z (G, H, 2) are the corners of the cells, moved by a map or not, if values are (G − 1, H − 1), one for each cell;
    or the points of the values, if they are (G, H). `limit` is the largest size if not given; `edges` draws the cells'.
    """
    corners = _array("z", z, "G", "H", 2)
    cells = tuple(size - 1 for size in corners.shape[:2])
    signed = _array("values", values, ...)
    at_points = signed.shape == corners.shape[:2]
    if not at_points and signed.shape != cells:
        raise ValueError(f"values must be {cells}, one a cell, or {corners.shape[:2]}, got shape {signed.shape}")
    bound = limit if limit is not None else float(np.nanmax(np.abs(signed), initial=0)) or 1.0
    if not bound > 0:
        raise ValueError(f"limit must be positive, got {limit}")
    mesh = ax.pcolormesh(
        corners[..., 0], corners[..., 1], signed, cmap="RdBu_r", vmin=-bound, vmax=bound,
        shading="gouraud" if at_points else "flat", rasterized=at_points,
    )  # fmt: skip
    if edges:
        mesh.set(edgecolor="0.7", linewidth=0.2)
    return mesh


@_styled
def show_hyperplane(ax: Axes, w: Values, b: Values) -> None:
    """Draw the line wᵀz + b = 0 in the plane, dashed and dark; w (2,), b (). Raises ValueError if w is zero."""
    normal, offset = _array("w", w, 2), _array("b", b)
    if not normal.any():
        raise ValueError("w must not be zero: there is no line")
    foot, along = -offset * normal / (normal @ normal), np.array([-normal[1], normal[0]])
    ax.axline(tuple(foot), tuple(foot + along), color=COLOURS["hyperplane"], ls="--", lw=1.2)


@_styled
def image_grid(ax: Axes, images: Values, columns: int = 10, padding: int = 5, title: str = "") -> None:
    """Draw images (N, 784), each 28 × 28, in rows of `columns`, on black: floats in [0, 1], or bytes from 0 to 255.

    Raises ValueError for images of another size, for none, and for pixels that are neither.
    """
    white = 255 if str(getattr(images, "dtype", "")).endswith("uint8") else 1
    pixels = _array("images", images, ...) / white
    single = pixels.shape[-1:] == (784,) or pixels.shape[-2:] == (28, 28)
    if not single or pixels.size == 0:
        raise ValueError(f"images must be (N, 784), each 28 × 28, with N ≥ 1, got shape {pixels.shape}")
    if not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(f"images must lie in [0, 1], got values from {pixels.min():.3g} to {pixels.max():.3g}")
    for name, given, least in (("columns", columns, 1), ("padding", padding, 0)):
        if not isinstance(given, int | np.integer) or given < least:
            raise ValueError(f"{name} must be a whole number, at least {least}, got {given!r}")
    # a single image gets no padding
    grid = make_grid(torch.from_numpy(pixels).reshape(-1, 1, 28, 28), nrow=columns, padding=padding)
    ax.imshow(grid[0].numpy(), cmap="gray", vmin=0, vmax=1, origin="upper")
    ax.set(title=title)
    ax.axis("off")


def animate(draw: Callable[[int], Any], frames: int, fig: Figure) -> FuncAnimation:
    """Return an animation of `frames` calls of draw(frame) on the figure."""
    return FuncAnimation(fig, _styled(draw), frames=frames, interval=125)


def _grid_and_density(z: Values, log_density: Values) -> tuple[np.ndarray, np.ndarray]:
    """The grid (G, H, 2) and exp(log_density) (G, H), after a look at whether z is a grid that can be drawn."""
    grid = _array("z", z, "G", "H", 2)
    density = np.exp(_array("log_density", log_density, *grid.shape[:2]))
    cell_area(torch.from_numpy(grid))
    return grid, density
