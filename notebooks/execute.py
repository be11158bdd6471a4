"""Execute the notebooks in order, each in a fresh kernel: copies under build/ (`make figures`), or in place.

In place (`make notebooks`) is for committing: at the full budget, on MNIST, and cleaned so that a second run gives
the same bytes. A notebook is written only when it has run to its end.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "figures" / "results"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def execute(path: Path) -> nbformat.NotebookNode:
    """Run one notebook in its own folder and return it, clean: no timestamps, progress bars or widget state."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(HERE)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # not its notice that it listens on this machine
    ).execute()
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {})
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and not is_widget(o)]
    return notebook


def is_widget(output: nbformat.NotebookNode) -> bool:
    """Whether an output is a live widget, whose stored form GitHub cannot show."""
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def stored_numbers(since: float = 0.0) -> dict[str, tuple[float, float]]:
    """The results in figures/results written at time `since` or later: name -> (value, tolerance)."""
    return {
        f"{path.stem}: {name}": (entry["value"], entry["tolerance"])
        for path in sorted(RESULTS.glob("*.json"))
        if path.stat().st_mtime >= since
        for name, entry in json.loads(path.read_text(encoding="utf-8"))["numbers"].items()
    }


def compare_numbers(before: dict[str, tuple[float, float]], after: dict[str, tuple[float, float]]) -> list[str]:
    """Say how many of the stored numbers this run made again, and which of those missed their tolerance."""
    again = [name for name in before if name in after]
    missed = [name for name in again if not abs(after[name][0] - before[name][0]) <= before[name][1]]
    return [
        f"figures/results: {len(again)} of {len(before)} numbers made again, {len(missed)} outside their tolerance",
        *(f"  {name}: {after[name][0]} now, {before[name][0]} ± {before[name][1]} before" for name in missed),
    ]


def main() -> int:
    """Run the notebooks named (all by default); return 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="stems or numbers, such as 07; all by default")
    parser.add_argument("--in-place", action="store_true", help="write back into notebooks/, for committing")
    arguments = parser.parse_args()
    paths = [
        path for path in sorted(HERE.glob("[0-9][0-9]_*.ipynb"))
        if not arguments.names or any(path.stem.startswith(name) for name in arguments.names)
    ]  # fmt: skip
    if not paths:
        parser.error(f"names must be of notebooks in {HERE.name}/, got {arguments.names}")
    target = HERE if arguments.in_place else HERE.parent / "build" / "notebooks"
    target.mkdir(parents=True, exist_ok=True)
    begin, clock, before = time.monotonic(), time.time(), stored_numbers()
    for number, path in enumerate(paths, 1):
        print(f"[{number}/{len(paths)}] {path.stem} ...", end=" ", flush=True)
        start = time.monotonic()
        try:
            notebook = execute(path)
        except CellExecutionError as error:
            print(f"failed after {time.monotonic() - start:.0f} s\n{error}", file=sys.stderr)
            return 1
        temporary = target / f".{os.getpid()}-{path.name}"
        nbformat.write(notebook, temporary)
        os.replace(temporary, target / path.name)
        print(f"{time.monotonic() - start:.0f} s", flush=True)
    if os.environ.get("PLANAR_BUDGET") == "full":
        print("\n".join(compare_numbers(before, stored_numbers(since=clock))))
    print(f"done in {(time.monotonic() - begin) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
