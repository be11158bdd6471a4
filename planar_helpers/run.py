"""Where a run's circumstances are decided, each in one place: seed, device, budget."""

import os
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")
BUDGETS = ("quick", "full")


def seed_all(seed: int) -> None:
    """Seed torch (CPU and GPU) and NumPy's legacy generator.

    >>> seed_all(0); a = torch.rand(1); seed_all(0); bool(a == torch.rand(1))
    True
    """
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (libraries that draw from the legacy generator)


def pick_device() -> torch.device:
    """Return the GPU if CUDA has one, else the CPU. MPS is never chosen by itself: it has no float64."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def budget() -> str:
    """Return "quick" or "full", from the environment variable PLANAR_BUDGET (default quick)."""
    name = os.environ.get("PLANAR_BUDGET", "quick")
    if name not in BUDGETS:
        raise ValueError(f"PLANAR_BUDGET must be one of {BUDGETS}, got {name!r}")
    return name


def by_budget(quick: T, full: T) -> T:
    """Return the one of two values that the budget in force asks for."""
    return full if budget() == "full" else quick
