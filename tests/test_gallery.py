"""The committed figures: the cheap ones drawn again and compared, and the stored numbers."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.testing.compare import compare_images

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))
from execute import compare_numbers, stored_numbers  # noqa: E402  (a script, not a package)

FIGURES = ROOT / "figures"
CHEAP = ("01", "02", "03")  # notebooks whose figures depend on neither data nor budget, in seconds each
CHEAP_FIGURES = sorted(path.name for number in CHEAP for path in FIGURES.glob(f"{number}_*.png"))
TOLERANCE = 6  # root mean square over grey levels 0..255
RESULTS = sorted((FIGURES / "results").glob("*.json"))


@pytest.fixture(scope="session")
def redrawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the cheap notebooks as `make figures` does, with their figures going to a folder of the test's own."""
    folder = tmp_path_factory.mktemp("figures")
    environment = {**os.environ, "PLANAR_FIGURES": str(folder), "PLANAR_BUDGET": "quick"}
    command = [sys.executable, ROOT / "notebooks" / "execute.py", *CHEAP]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", CHEAP_FIGURES)
def test_committed_figure_is_what_the_notebook_draws(redrawn: Path, name: str) -> None:
    assert (redrawn / name).is_file(), f"{name} is committed, and no notebook draws it"
    difference = compare_images(str(FIGURES / name), str(redrawn / name), tol=TOLERANCE)
    assert difference is None, difference


def test_every_cheap_figure_is_committed(redrawn: Path) -> None:
    assert CHEAP_FIGURES == sorted(path.name for path in redrawn.glob("*.png") if "-failed-diff" not in path.name)


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    image = matplotlib.image.imread(FIGURES / CHEAP_FIGURES[0])
    changed = image.copy()
    changed[::3, :, :3] = 0
    matplotlib.image.imsave(tmp_path / "changed.png", changed)
    matplotlib.image.imsave(tmp_path / "same.png", image)
    assert compare_images(str(tmp_path / "same.png"), str(tmp_path / "changed.png"), tol=TOLERANCE) is not None


def test_there_are_stored_numbers_for_each_measuring_notebook() -> None:
    assert {path.name[:2] for path in RESULTS} == {"07", "08", "09"}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_stored_numbers_say_what_made_them(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["settings"]["data"] == "MNIST" and content["settings"]["budget"] == "full"
    assert content["numbers"]
    for entry in content["numbers"].values():
        assert set(entry) == {"value", "tolerance"} and entry["tolerance"] > 0
    notebooks = "".join(notebook.read_text(encoding="utf-8") for notebook in (ROOT / "notebooks").glob("*.ipynb"))
    assert path.stem in notebooks, f"no notebook writes {path.name}"
    assert f"results/{path.name}" in (FIGURES / "README.md").read_text(encoding="utf-8")


def test_a_rerun_is_told_which_numbers_it_missed() -> None:
    before = {"a": (1.0, 0.1), "b": (2.0, 0.1), "c": (3.0, 0.1)}
    lines = compare_numbers(before, {"a": (1.05, 0.1), "b": (2.2, 9.0)})
    assert "2 of 3 numbers made again, 1 outside" in lines[0]
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["b"]
    assert "0 of 3 numbers made again" in compare_numbers(before, {})[0], "nothing made again is no agreement"


def test_only_what_a_run_wrote_counts_as_made_again() -> None:
    assert stored_numbers() and not stored_numbers(since=time.time() + 1)


def test_the_readme_states_the_stored_numbers() -> None:
    numbers = json.loads((FIGURES / "results" / "07_bound_and_truth.json").read_text(encoding="utf-8"))["numbers"]
    table = (ROOT / "README.md").read_text(encoding="utf-8").replace("−", "-")
    for K in (0, 3):
        row = re.search(rf"^\|\s*{K}\b[^|]*\|.*$", table, flags=re.M)
        assert row, f"README has no row for K = {K}"
        for name in ("ELBO", "log p(x)", "gap"):
            value = numbers[f"K = {K}: {name}"]["value"]
            assert f"{value:.2f}" in row[0], f"README's row {row[0]} lacks {name} = {value:.2f}"
