"""The stored numbers of two runs, compared: what execute.py says at the end of a run at the full budget."""

import json
import re
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
from planar_helpers.run import folder  # noqa: E402


def stored_numbers(since: float = 0.0) -> dict[str, tuple[float, float]]:
    """Read the numbers in the results' folder written at time `since` or later: "file: name" -> (value, tolerance)."""
    paths = [path for path in sorted(folder("results").glob("[0-9][0-9]_*.json")) if path.stat().st_mtime >= since]
    return _numbers({path.stem: path.read_text(encoding="utf-8") for path in paths})


def committed_numbers(results: Path) -> tuple[dict[str, tuple[float, float]], str]:
    """Read the numbers of a results folder as they are committed, and say so; without git, as they lie there now."""
    git = ["git", "-C", str(results)]
    try:
        listed = subprocess.run([*git, "ls-tree", "--name-only", "HEAD", "./"], capture_output=True, check=True)
        names = re.findall(r"^\d\d_\w+\.json$", listed.stdout.decode("utf-8"), flags=re.M)
        shown = {
            name: subprocess.run([*git, "show", f"HEAD:./{name}"], capture_output=True, check=True) for name in names
        }
    except (OSError, subprocess.CalledProcessError):
        shown = {}
    if shown:
        return _numbers(
            {name[:-5]: done.stdout.decode("utf-8") for name, done in shown.items()}
        ), "the committed values"
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(results.glob("[0-9][0-9]_*.json"))}
    return _numbers(texts), "the files as they lay before (no commit found)"


def compare_numbers(
    before: dict[str, tuple[float, float]], after: dict[str, tuple[float, float]]
) -> tuple[list[str], int]:
    """Say which stored numbers a run made again and which of them missed; return the lines, and how many missed."""
    again = [name for name in before if name in after]
    missed = [name for name in again if not abs(after[name][0] - before[name][0]) <= before[name][1]]
    lines = [f"{len(again)} of {len(before)} stored numbers made again, {len(missed)} outside their tolerance"]
    lines += [f"  {name}: {after[name][0]} now, {before[name][0]} ± {before[name][1]} before" for name in missed]
    return lines, len(missed)


def _numbers(texts: dict[str, str]) -> dict[str, tuple[float, float]]:
    return {
        f"{stem}: {name}": (entry["value"], entry["tolerance"])
        for stem, text in texts.items()
        for name, entry in json.loads(text)["numbers"].items()
    }
