"""Shared fixtures: the smallest honest model and data, and no test that writes into figures/ or runs/."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import nn

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


class Bumps(nn.Module):
    """Logits whose Bernoulli likelihood of x = (1, 0) is Σ exp(2 − ‖z − c‖²/2s²) − 10: islands of known mass."""

    def __init__(self, *islands: tuple[tuple[float, float], float]) -> None:
        super().__init__()
        self.islands = islands

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        logs = [2 - ((z - torch.tensor(c).double()) ** 2).sum(-1) / (2 * s**2) - 10 for c, s in self.islands]
        half = -0.5 * torch.logsumexp(torch.stack(logs), dim=0)
        logit = -(half + torch.log1p(-torch.exp(-half)))
        return torch.stack([logit, -logit], dim=-1)


@pytest.fixture
def bumps() -> type[Bumps]:
    """A decoder that leaves islands of posterior mass."""
    return Bumps
