"""Write the student copies: each master in solutions/, without its solutions, hidden tests and marking notes.

    python notebooks/assignments/release.py            write notebooks/assignments/A*.ipynb
    python notebooks/assignments/release.py --check    say which copies are out of date, and return 1 if one is
    python notebooks/assignments/release.py --private 2027 --to folder
                                                       a variant of your own: other hidden tests, another slip in A5

A master is the only file that is edited by hand. Cells carry nbgrader's metadata (schema 3), so that nbgrader's own
`generate_assignment` makes the same text of it.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STUB = {"code": "# YOUR CODE HERE\nraise NotImplementedError()", "markdown": "YOUR ANSWER HERE"}
REGION = r"^([ \t]*)### BEGIN {0}\n.*?^[ \t]*### END {0}(?:\n|\Z)"
SOLUTION, HIDDEN = (re.compile(REGION.format(name), re.DOTALL | re.MULTILINE) for name in ("SOLUTION", "HIDDEN TESTS"))


def student_copy(master: dict[str, Any]) -> dict[str, Any]:
    """Return the notebook that a student gets. ValueError for a master whose markers do not pair up."""
    return {**master, "cells": [_student_cell(cell) for cell in master["cells"]]}


def _student_cell(cell: dict[str, Any]) -> dict[str, Any]:
    text, marks = "".join(cell["source"]), cell["metadata"].get("nbgrader", {})
    if marks.get("solution"):
        stub = STUB[cell["cell_type"]]
        text, found = SOLUTION.subn(lambda m: "".join(f"{m[1]}{line}\n" for line in stub.splitlines()), text)
        text = text.rstrip("\n") if found else stub
    text = HIDDEN.sub("", text).rstrip("\n")
    if "### BEGIN" in text or "### END" in text:
        raise ValueError(f"the markers of cell {cell.get('id')} must pair up, each alone on its line")
    text = text.replace("](../../", "](../")  # a copy lies one folder nearer to the notebooks
    return _without_outputs({**cell, "source": text.splitlines(keepends=True)})


def _without_outputs(cell: dict[str, Any]) -> dict[str, Any]:
    return {**cell, "outputs": [], "execution_count": None} if cell["cell_type"] == "code" else cell


# What a private variant exchanges in A5: as it stands, and instead.
SLIPS = [("(m - s) * w / w.norm(dim=-1, keepdim=True)", "(m - s) * w / (w * w).sum()"), ("u = 2 * w", "u = 1.8 * w")]


def private(master: dict[str, Any], number: int) -> dict[str, Any]:
    """Return a variant of a master: hidden tests with seeds of this number, and another slip where there is one."""
    draw, cells = random.Random(f"{number}"), []
    for cell in master["cells"]:
        text = re.sub(r"seed=\d+", lambda _: f"seed={draw.randrange(10**9)}", "".join(cell["source"]))
        for one, other in SLIPS:
            text = text.replace(one, other)
        cells.append(_without_outputs({**cell, "source": text.splitlines(keepends=True)}))
    return {**master, "cells": cells}


def text_of(notebook: dict[str, Any]) -> str:
    """Return a notebook as the text of its file."""
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main(words: list[str] | None = None) -> int:
    """Write all copies, check them, or write a private variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--private", type=int, metavar="NUMBER")
    parser.add_argument("--to", type=Path, metavar="FOLDER")
    given, stale = parser.parse_args(words), []
    if (given.private is None) != (given.to is None):
        parser.error("a private variant needs both, --private NUMBER and --to FOLDER")
    for path in sorted((HERE / "solutions").glob("A*.ipynb")):
        master, target = json.loads(path.read_text(encoding="utf-8")), HERE / path.name
        if given.to:
            master, target = private(master, given.private), given.to / path.name
            _write(given.to / "solutions" / path.name, text_of(master))
        copy = text_of(student_copy(master))
        if not target.is_file() or target.read_text(encoding="utf-8") != copy:
            stale.append(path.name)
            if not given.check:
                _write(target, copy)
    if given.check and stale:
        print(f"out of date: {', '.join(stale)}; run make assignments", file=sys.stderr)
        return 1
    return 0


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    temporary.replace(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
