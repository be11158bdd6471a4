"""Where a figure and a number go: the one way from a run to a file."""

import json
import math
import os
import re
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure

from planar_helpers.run import budget, folder, replacing

STYLE = ("default", Path(__file__).with_name("planar.mplstyle"))  # from the defaults: nothing of the user's own is left
Number = tuple[float, float] | tuple[float, float, float]  # value, tolerance, error


def figure_path(name: str, data: str | None = None, budget_matters: bool = False) -> Path:
    """Return where a file of this name belongs: figures/, the committed gallery, or build/figures/.

    The gallery takes what depends on neither budget nor data, and what was made at the full budget, on MNIST if on
    any data. PLANAR_FIGURES, if set, replaces both folders: the tests point it away from the gallery.
    """
    same_everywhere = data is None and not budget_matters
    at_full_budget = budget() == "full" and (data is None or data.startswith("MNIST"))
    committed = same_everywhere or at_full_budget or os.environ.get("PLANAR_FIGURES")
    return (folder("figures") if committed else folder("build") / "figures") / name


def save_figure(
    fig: Figure | FuncAnimation, name: str, data: str | None = None, budget_matters: bool = False, fps: int = 8
) -> Path:
    """Write a Figure as PNG, or an animation as GIF, under its stem "NN_slug"; return the path.

    `data` names the data set the figure depends on (None: on none), `budget_matters` says that it depends on the
    budget though on no data. The file is written whole or not at all, and the same figure gives the same bytes,
    whatever the user's own Matplotlib settings. Raises ValueError for a name that is no such stem, TypeError for
    what is no figure.
    """
    _check_stem(name)
    if not isinstance(fig, Figure | FuncAnimation):
        raise TypeError(f"fig must be a Figure or an animation, got {type(fig).__name__}")
    path = figure_path(name + (".png" if isinstance(fig, Figure) else ".gif"), data, budget_matters)
    with replacing(path) as temporary, plt.style.context(STYLE):
        if isinstance(fig, Figure):
            fig.savefig(temporary, metadata={"Software": None})
        else:
            fig.save(temporary, writer=PillowWriter(fps=fps))
    return path


def save_numbers(
    name: str, numbers: dict[str, Number], data: str | None, **settings: str | int | float | list[int]
) -> Path:
    """Write a run's numbers as JSON under results/, by the same rule as figures; return the path.

    Each number comes as (value, tolerance) or (value, tolerance, error): a re-run on another machine, or another
    number of threads, should agree within the tolerance; the error is statistical. `settings` name whatever else made
    them (epochs, seeds, images), and what varies in the error. `data` is None where no data made them.

    A tolerance that two arms both fit in shows nothing. Store their difference, too, as "K = 3 minus K = 0: gap",
    with a tolerance below it: a test exchanges the arms, and wants a number to miss.

    Raises ValueError for a number that is not finite, a tolerance that is not positive, or a name that is no stem.
    """
    _check_stem(name)
    entries = {}
    for label, given in numbers.items():
        if len(given) not in (2, 3):
            raise ValueError(f"{label!r} must be (value, tolerance) or (value, tolerance, error), got {given}")
        value, tolerance, *error = (float(number) for number in given)
        if not (all(map(math.isfinite, (value, tolerance, *error))) and tolerance > 0 and min(error, default=0) >= 0):
            raise ValueError(f"{label!r} must be finite, with a positive tolerance and no negative error, got {given}")
        entries[label] = {"value": round(value, 6), "tolerance": tolerance}
        if error:
            entries[label]["error"] = round(error[0], 6)
    content = {
        "settings": {"data": data, "budget": budget(), **settings, "command": "make figures BUDGET=full"},
        "numbers": entries,
    }
    moved, file = os.environ.get("PLANAR_RESULTS"), f"{name}.json"
    path = folder("results") / file if moved else figure_path(f"results/{file}", data, budget_matters=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    return path


def _check_stem(name: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"(\d\d|D\d)_\w+", name):
        raise ValueError(f'name must be a stem "NN_slug" or "Dn_slug", got {name!r}')
