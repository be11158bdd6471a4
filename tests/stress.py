"""`make stress`: every kill, fault, hostile file and number, at full counts; the table in tests/README.md.

    python tests/stress.py [--kills 200] [--examples long] [--seed 0] [words of pytest, such as -k kill]

Exit code 1 if a test fails: then the table stays as it was.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "test_kills.py",
    "test_stress.py",
    "test_properties.py",
    "test_security.py",
    "test_download.py",
)  # longest first
LARGEST = "largest error"  # rows that begin so are no sums


def table(lines: list[list]) -> list[str]:
    """One row for each name: the sum, or the largest, and what it is made of."""
    rows: dict[str, list[tuple[int, str]]] = {}
    for row, count, note in lines:
        rows.setdefault(row, []).append((count, note))
    found = ["| what | count | of |", "|---|---|---|"]
    for row, counts in sorted(rows.items()):
        numbers = [count for count, _ in counts]
        total = max(numbers) if row.startswith(LARGEST) else sum(numbers)
        by_note: dict[str, int] = {}
        for count, note in counts:
            by_note[note] = (
                max(count, by_note.get(note, 0)) if row.startswith(LARGEST) else count + by_note.get(note, 0)
            )
        found.append(f"| {row} | {total} | {'; '.join(f'{note}: {n}' for note, n in sorted(by_note.items()))} |")
    return found


def main() -> int:
    """Run the tests, and write what they counted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=240, help="at least so many (default 240)")
    parser.add_argument("--examples", default="long", help="Hypothesis's profile: long (2 000) or planar (100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", default="2")
    arguments, rest = parser.parse_known_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="planar-stress-") as folder:
        counts = Path(folder, "tally")
        counts.touch()
        environment = {
            **os.environ, "PLANAR_TALLY": str(counts), "PLANAR_KILLS": str(arguments.kills), "OMP_NUM_THREADS": "1",
            "PLANAR_EXAMPLES": arguments.examples, "PLANAR_STRESS_SEED": str(arguments.seed),
        }  # fmt: skip
        tests = [str(ROOT / "tests" / name) for name in TESTS]
        words = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            arguments.jobs,
            "--dist=worksteal",
            "-p",
            "no:cacheprovider",
            *tests,
            *rest,
        ]
        code = subprocess.run(words, env=environment, cwd=ROOT).returncode
        lines = [json.loads(line) for line in counts.read_text(encoding="utf-8").splitlines()]
    print("\n".join(table(lines)))
    if code == 0 and not rest:
        page = ROOT / "tests" / "README.md"
        minutes = (time.monotonic() - begin) / 60
        said = f"{arguments.kills} kills, seed {arguments.seed}, profile {arguments.examples}, {minutes:.0f} minutes"
        text = page.read_text(encoding="utf-8")
        new = "\n".join(["<!-- stress -->", f"*By `make stress`: {said}.*", "", *table(lines), "<!-- end -->"])
        page.write_text(re.sub(r"<!-- stress -->.*<!-- end -->", lambda _: new, text, flags=re.S), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
