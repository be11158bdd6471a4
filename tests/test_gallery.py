"""The committed figures: the cheap ones drawn again and compared, and the stored numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.testing.compare import compare_images

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "figures"
# notebooks whose figures depend on neither data nor budget, in seconds each
CHEAP = ("01", "02", "03", "D1", "D2", "D3", "D7")
CHEAP_FIGURES = sorted(path.name for number in CHEAP for path in FIGURES.glob(f"{number}_*.png"))
TOLERANCE = 6  # root mean square over grey levels 0..255
RESULTS = sorted((FIGURES / "results").glob("[0-9][0-9]_*.json"))


@pytest.fixture(scope="session")
def redrawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the cheap notebooks as `make figures` does, with their figures going to a folder of the test's own."""
    folder = tmp_path_factory.mktemp("figures")
    environment = {**os.environ, "PLANAR_FIGURES": str(folder), "PLANAR_BUDGET": "quick"}
    command = [sys.executable, ROOT / "notebooks" / "execute.py", *CHEAP]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
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
    assert {"07", "08", "09"} <= {path.name[:2] for path in RESULTS}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_stored_numbers_say_what_made_them(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["settings"]["data"] in ("MNIST", None) and content["settings"]["budget"] == "full"
    assert content["numbers"]
    for entry in content["numbers"].values():
        assert {"value", "tolerance"} <= set(entry) <= {"value", "tolerance", "error"} and entry["tolerance"] > 0
    notebooks = "".join(notebook.read_text(encoding="utf-8") for notebook in (ROOT / "notebooks").rglob("*.ipynb"))
    assert path.stem in notebooks, f"no notebook writes {path.name}"
    assert f"results/{path.name}" in (FIGURES / "README.md").read_text(encoding="utf-8")
