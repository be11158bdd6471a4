"""Where a run's circumstances are decided, each in one place: seed, device, budget, folders, the one atomic write."""

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO, TypeVar

import numpy as np
import torch

T = TypeVar("T")
BUDGETS = ("quick", "full")
FOLDERS = ("data", "runs", "figures", "results", "build")


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
    name = os.environ.get("PLANAR_BUDGET") or "quick"
    if name not in BUDGETS:
        raise ValueError(f"PLANAR_BUDGET must be one of {BUDGETS}, got {name!r}")
    return name


def by_budget(quick: T, full: T) -> T:
    """Return the one of two values that the budget in force asks for."""
    return full if budget() == "full" else quick


def say(line: str, stream: TextIO | None = None) -> None:
    """Print one line to stdout, or another stream; what it cannot show, a closed one, or none at all is no error."""
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with suppress(OSError, ValueError):  # the terminal is gone, or the stream closed: the training is not
        print(line.encode(encoding, errors="replace").decode(encoding), file=stream)


def folder(kind: str) -> Path:
    """Return the folder for "data", "runs", "figures", "results" or "build"; nothing is created.

    The environment variable PLANAR_DATA, PLANAR_RUNS, PLANAR_FIGURES or PLANAR_RESULTS moves it. Else it lies in the
    checkout that the package is used from; an installed package writes under the working directory. The results
    lie in the figures' folder. Raises ValueError for another kind, or for the folder of a user who is not there.
    """
    if kind not in FOLDERS:
        raise ValueError(f"kind must be one of {FOLDERS}, got {kind!r}")
    moved = os.environ.get(f"PLANAR_{kind.upper()}") if kind != "build" else None
    if moved:
        path = Path(os.path.expanduser(moved))
        if str(path).startswith("~"):
            raise ValueError(f"PLANAR_{kind.upper()} must name a folder, got {moved!r}: there is no such user here")
        return path
    if kind == "results":
        return folder("figures") / "results"
    checkout = Path(__file__).resolve().parent.parent
    return (
        checkout / kind if all((checkout / name).exists() for name in ("pyproject.toml", "notebooks")) else Path(kind)
    )


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to, and rename it to `path` once the block is done.

    A reader sees the old file or the new one, never half of one, after a power cut, too; if the block fails, the old
    file stays and the temporary one goes. What a killed process left goes with the first write a day later. The suffix
    is the same, the folder is created if it is missing, and the file gets the permissions of any other new file, so
    that a class can share a folder.
    """
    path = Path(path).absolute()  # the block may change the working directory
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    try:
        temporary.touch(mode=0o666, exist_ok=False)  # less what the umask takes away
        with suppress(OSError):  # another process may remove them, too
            for old in path.parent.glob(f".{'[0-9a-f]' * 16}*"):
                if old.stat().st_mtime < temporary.stat().st_mtime - 24 * 3600:  # both by the disk's clock
                    old.unlink()
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())  # the content, before the name
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
