"""Arrays in, Figure out. The style is set here and nowhere else; `save` is the one way to a file.

Colour goes by role: q_0 blue, q_K orange, target or data grey, the hyperplane wᵀz + b = 0 dashed and dark,
failure red; viridis for densities, a diverging symmetric map for log-determinants.
"""

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

from planar_helpers.run import budget

plt.style.use(Path(__file__).with_name("planar.mplstyle"))

FIGURES = Path(__file__).resolve().parent.parent / "figures"
COLOURS = {
    "q0": "#2a6fb0",
    "qK": "#e07b00",
    "target": "#7a7a7a",
    "hyperplane": "#222222",
    "failure": "#c62828",
}
DIGIT_CMAP = plt.get_cmap("tab10")


def figure_path(name: str, data: str | None = None, budget_matters: bool = False) -> Path:
    """Return where a file of this name belongs: figures/, the committed gallery, or build/figures/.

    The gallery takes what depends on neither budget nor data, and what was made at the full budget, on MNIST if on
    any data. PLANAR_FIGURES, if set, replaces both folders: the tests point it away from the gallery.
    """
    if os.environ.get("PLANAR_FIGURES"):
        return Path(os.environ["PLANAR_FIGURES"]) / name
    full = budget() == "full"
    committed = (full or not budget_matters) if data is None else (full and data.startswith("MNIST"))
    return (FIGURES if committed else FIGURES.parent / "build" / "figures") / name


def save(
    fig: Figure | FuncAnimation,
    name: str,
    data: str | None = None,
    budget_matters: bool = False,
    fps: int = 8,
) -> Path:
    """Write a Figure as PNG, or an animation as GIF, under its stem "NN_slug"; return the path.

    `data` names the data set the figure depends on (None: on none), `budget_matters` says that it depends on the
    budget though on no data. Written under a temporary name, then renamed; the same figure gives the same bytes.
    Raises ValueError for a name that is no such stem.
    """
    _check_stem(name)
    animated = isinstance(fig, FuncAnimation)
    path = figure_path(name + (".gif" if animated else ".png"), data, budget_matters)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        if animated:
            fig.save(temporary, writer=PillowWriter(fps=fps))
        else:
            fig.savefig(temporary, metadata={"Software": None})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def save_numbers(
    name: str, numbers: dict[str, tuple[float, float]], data: str, **settings: str | int | float | list[int]
) -> Path:
    """Write a run's numbers as JSON under results/, by the same rule as figures; return the path.

    Each number comes as (value, tolerance): a re-run on another machine, or another number of threads, should agree
    within the tolerance. `settings` name whatever else made them (epochs, seeds, images). Raises ValueError for a
    value that is not finite, a tolerance that is not positive, or a name that is no stem.
    """
    _check_stem(name)
    for label, (value, tolerance) in numbers.items():
        if not (math.isfinite(value) and 0 < tolerance < math.inf):
            raise ValueError(f"{label!r} must be finite, with a positive tolerance, got {value} ± {tolerance}")
    content = {
        "settings": {"data": data, "budget": budget(), **settings, "command": "make figures BUDGET=full"},
        "numbers": {k: {"value": round(value, 4), "tolerance": tolerance} for k, (value, tolerance) in numbers.items()},
    }
    path = figure_path(f"results/{name}.json", data)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _check_stem(name: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"\d\d_\w+", name):
        raise ValueError(f'name must be a stem "NN_slug", got {name!r}')


def plane_axes(ax: Axes, limits: Sequence[float], symbol: str = "z") -> Axes:
    """Dress axes as a plane: equal aspect, limits (low, high) on both axes, labels z_1 and z_2."""
    ax.set(xlim=limits, ylim=limits, aspect="equal", xlabel=f"${symbol}_1$", ylabel=f"${symbol}_2$")
    return ax


def panels(rows: int, columns: int, size: float = 2.6, **settings: bool) -> tuple[Figure, np.ndarray]:
    """Return a figure and a (rows, columns) array of square panels, `size` inches each."""
    return plt.subplots(rows, columns, figsize=(size * columns + 0.4, size * rows + 0.3), squeeze=False, **settings)


def show_density(
    ax: Axes, z: Tensor, log_density: Tensor, title: str = "", vmax: float | None = None, symbol: str = "z"
) -> None:
    """Draw exp(log_density) (G, G) over the grid z (G, G, 2): viridis, from 0 to vmax."""
    low, high = z[0, 0].tolist(), z[-1, -1].tolist()
    half = [(high[i] - low[i]) / (2 * (len(z) - 1)) for i in (0, 1)]  # a grid point is the middle of its pixel
    extent = (low[0] - half[0], high[0] + half[0], low[1] - half[1], high[1] + half[1])
    # z[i, j] = (z_1[j], z_2[i]) as targets.plane_grid builds it
    ax.imshow(log_density.exp().numpy(), extent=extent, vmin=0, vmax=vmax, aspect="equal")
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), title=title)
    ax.set(xlabel=f"${symbol}_1$", ylabel=f"${symbol}_2$")


def show_contours(ax: Axes, z: Tensor, log_density: Tensor, colour: str, label: str = "") -> None:
    """Draw the outlines that hold 50 % and 90 % of a density given as log_density (G, G) on the grid z (G, G, 2)."""
    density = log_density.exp().numpy()
    ranked = np.sort(density.ravel())[::-1]
    mass = np.cumsum(ranked) / ranked.sum()
    levels = sorted({float(ranked[np.searchsorted(mass, share)]) for share in (0.9, 0.5)})
    ax.contour(z[..., 0].numpy(), z[..., 1].numpy(), density, levels=levels, colors=colour, linewidths=1.4)
    if label:
        ax.plot([], [], color=colour, label=label)


def show_hyperplane(ax: Axes, w: Tensor, b: Tensor) -> None:
    """Draw the line wᵀz + b = 0 in the plane, dashed and dark; w (2,), b ()."""
    foot, along = -b * w / (w @ w), torch.stack([-w[1], w[0]])
    ax.axline(foot.tolist(), (foot + along).tolist(), color=COLOURS["hyperplane"], ls="--", lw=1.2)


def image_grid(ax: Axes, images: Tensor, columns: int = 10, padding: int = 5, title: str = "") -> None:
    """Draw images (N, 784) in [0, 1] in rows of `columns`, black background."""
    grid = make_grid(images.detach().cpu().reshape(-1, 1, 28, 28), nrow=columns, padding=padding)
    ax.imshow(grid[0].numpy(), cmap="gray", vmin=0, vmax=1, origin="upper")
    ax.set(title=title)
    ax.axis("off")


def show_curves(ax: Axes, train: Tensor, test: Tensor, title: str, colour: str) -> None:
    """Draw one quantity by epoch, train and test (epochs,): train thin and pale, test full."""
    for curve, label, style in ((train, "train", {"alpha": 0.45, "lw": 1.2}), (test, "test", {})):
        ax.plot(np.arange(1, len(curve) + 1), curve.numpy(), color=colour, label=label, **style)
    ax.set(xlabel="epoch", ylabel="nats per image", title=title)


def scatter_by_digit(ax: Axes, z: Tensor, labels: Tensor, title: str = "", limits: Sequence[float] = (-4, 4)) -> None:
    """Draw points z (N, 2), coloured by digit, with a legend of ten."""
    size = 2 if len(z) > 2000 else 10
    ax.scatter(z[:, 0], z[:, 1], c=labels, cmap=DIGIT_CMAP, vmin=-0.5, vmax=9.5, s=size, alpha=0.6, linewidths=0)
    for digit in range(10):
        ax.plot([], [], "o", ms=5, color=DIGIT_CMAP(digit), label=str(digit))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="digit")
    plane_axes(ax, limits)
    ax.set_title(title)


def animate(draw: Callable[[int], None], frames: int, fig: Figure) -> FuncAnimation:
    """Return an animation of `frames` calls of draw(frame) on the figure."""
    return FuncAnimation(fig, draw, frames=frames, interval=125)
