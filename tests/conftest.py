"""Shared fixtures: the smallest honest model and data, and no test that writes into figures/ or runs/."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from planar_helpers.data import Images, load_images
from planar_helpers.train import fit
from planar_helpers.vae import PlanarVAE

collect_ignore_glob = ["browser_*.py"]  # scripts, some of which need an extra

# 100 examples a test; `make stress` takes the long profile
settings.register_profile("planar", deadline=None, derandomize=True, max_examples=100)
settings.register_profile("long", deadline=None, derandomize=True, max_examples=2000)
settings.load_profile(os.environ.get("PLANAR_EXAMPLES") or "planar")


@pytest.fixture(autouse=True)
def _away_from_figures_and_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLANAR_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setenv("PLANAR_RUNS", str(tmp_path / "runs"))
    torch.manual_seed(0)


@pytest.fixture
def tally() -> Callable[[str, int, str], None]:
    """Add to a row of the table that `make stress` writes."""

    def add(row: str, count: int, note: str) -> None:
        if os.environ.get("PLANAR_TALLY"):
            with open(os.environ["PLANAR_TALLY"], "a", encoding="utf-8") as lines:
                lines.write(json.dumps([row, count, note]) + "\n")

    return add


@pytest.fixture(scope="session")
def digits() -> Images:
    """The embedded digits: they need neither a file nor a network."""
    return load_images("digits")


@pytest.fixture(scope="session", params=[(0, "shifted"), (3, "paper"), (3, "shifted"), (16, "shifted")], ids=str)
def trained(request: pytest.FixtureRequest, digits: Images) -> PlanarVAE:
    """Models of four kinds, trained for real on the digits."""
    K, constraint = request.param
    torch.manual_seed(0)
    model = PlanarVAE(hidden=100, K=K, constraint=constraint)
    fit(model, digits, epochs=40, progress=False)
    return model.eval()
