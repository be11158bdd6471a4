"""Write the student copies: each master in solutions/, without its solutions, hidden tests and marking notes.

    python notebooks/assignments/release.py            write notebooks/assignments/A*.ipynb
    python notebooks/assignments/release.py --check    say which copies are out of date, and return 1 if one is

A master is the only file that is edited by hand. Cells carry nbgrader's metadata (schema 3), so that nbgrader's own
`generate_assignment` makes the same text of it.
"""

import json
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
    copy = {**cell, "source": text.splitlines(keepends=True)}
    return {**copy, "outputs": [], "execution_count": None} if cell["cell_type"] == "code" else copy


def text_of(notebook: dict[str, Any]) -> str:
    """Return a notebook as the text of its file."""
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main() -> int:
    """Write all copies, or check them."""
    stale = []
    for path in sorted((HERE / "solutions").glob("A*.ipynb")):
        copy, target = text_of(student_copy(json.loads(path.read_text(encoding="utf-8")))), HERE / path.name
        if not target.is_file() or target.read_text(encoding="utf-8") != copy:
            stale.append(path.name)
            if "--check" not in sys.argv:
                temporary = target.with_suffix(".tmp")
                temporary.write_text(copy, encoding="utf-8", newline="\n")
                temporary.replace(target)
                print(f"wrote {path.name}")
    if "--check" in sys.argv and stale:
        print(f"out of date: {', '.join(stale)}; run make assignments", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
