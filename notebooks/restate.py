"""State the stored numbers where they are quoted: in the READMEs, and the minutes in the notebooks too (`make readme`).

A comment above a table or a paragraph of Markdown says where its numbers come from, and this script fills them in:

    <!-- numbers from 07_bound_and_truth, 2 digits: {row}: {column} | K = 0; K = 3 | ELBO; log p(x); gap -->
    <!-- numbers from 09_claimed_against_exact, in this order: 30 epochs, corrected: log p(x); |K = 3: gap| -->

The first fills a table: each row's and column's part of a stored name, in order; an error that is stored goes beside
its value. The second fills the decimals of a paragraph, one after the other; |...| prints a size without its sign.
The minutes of computing come from figures/results/minutes.json, which execute.py records; those of reading are counted
here. With --check nothing is written: it says what is out of date.
"""

import argparse
import datetime
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT)]
from planar_helpers import run  # noqa: E402

READMES = (ROOT / "README.md", ROOT / "figures" / "README.md")
DECIMAL = r"[−-]?\d+\.\d+"
WORDS = {1: "one core", 2: "two cores"}
OPENER = (
    r"\*\*Minutes:\*\* \d+ of reading; of computing on [\w ]+ cores?, "
    r"[\d.]+ at the quick budget, [\d.]+ at the full one\."
)
WORDS_A_MINUTE = 180
SECONDS = {"equation": 60.0, "line": 7.3}  # fitted once: a reader's 9 1/2 hours for 00 to 06 of commit b81eaa1


def series(folder: Path = HERE) -> list[Path]:
    """The notebooks in the order of reading: the core, then what goes deeper."""
    return [*sorted(folder.glob("[0-9][0-9]_*.ipynb")), *sorted((folder / "deeper").glob("D[0-9]_*.ipynb"))]


def reading_minutes(cells: list[dict]) -> int:
    """How long the cells take to read: words, displayed equations and lines of code; folded parts are not counted."""
    words, equations, lines = 0, 0, 0
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            lines += sum(bool(line.strip()) for line in text.splitlines())
            continue
        text = re.sub(r"<details>.*?</details>", "", text, flags=re.S)
        equations += len(re.findall(r"\$\$.*?\$\$", text, flags=re.S))
        text = re.sub(r"\$\$.*?\$\$|\]\([^)]*\)", " ", text, flags=re.S)
        words += len(text.split())
    return round(words / WORDS_A_MINUTE + (equations * SECONDS["equation"] + lines * SECONDS["line"]) / 60)


def read_in() -> dict[str, int]:
    """Minutes of reading by stem."""
    return {path.stem: reading_minutes(json.loads(path.read_text(encoding="utf-8"))["cells"]) for path in series()}


def load(stem: str) -> dict | None:
    """The content of figures/results/stem.json, or None if it is not there."""
    path = ROOT / "figures" / "results" / f"{stem}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def number(value: float, digits: int) -> str:
    """A number as prose prints it: rounded, with a true minus sign and never −0."""
    text = f"{value:.{digits}f}"
    return ("" if float(text) == 0 else "−" if value < 0 else "") + text.lstrip("-")


def entry(numbers: dict[str, dict[str, float]], stem: str, name: str) -> dict[str, float]:
    """A stored number by its name, or "A minus B: gap" from the two; KeyError with a line that says what is missing."""
    head, _, label = name.rpartition(": ")
    one, minus, other = head.partition(" minus ")
    if name not in numbers and minus:
        before = one.rpartition(", ")[0]  # "test, K = 3 minus K = 0": both on test
        first, second = (
            entry(numbers, stem, f"{arm}: {label}") for arm in (one, f"{before}, {other}" if before else other)
        )
        return {"value": first["value"] - second["value"]}
    if name not in numbers:
        raise KeyError(f"figures/results/{stem}.json has no number named {name!r}")
    return numbers[name]


def fill_table(block: str, stem: str, numbers: dict[str, dict[str, float]], rule: str, digits: int) -> str:
    """Fill a Markdown table: pattern | rows | columns; the heading and each row's first cell stay."""
    pattern, rows, columns = (part.strip() for part in rule.split("|"))
    lines = block.splitlines()
    if len(lines) != 2 + len(rows.split(";")):
        raise KeyError(f"the table from {stem} has {len(lines) - 2} rows, its comment names {len(rows.split(';'))}")
    for i, row in enumerate(rows.split(";"), 2):
        cells = [lines[i].strip("| ").split("|")[0].strip()]
        for column in columns.split(";"):
            found = entry(numbers, stem, pattern.format(row=row.strip(), column=column.strip()))
            error = f" ± {number(found['error'], digits)}" if "error" in found else ""
            cells.append(number(found["value"], digits) + error)
        lines[i] = f"| {' | '.join(cells)} |"
    return "\n".join(lines)


def fill_prose(block: str, stem: str, numbers: dict[str, dict[str, float]], rule: str) -> str:
    """Fill a paragraph's decimals, in order, each with as many digits as it has."""
    names = [name.strip() for name in rule.split(";")]
    found = re.findall(DECIMAL, block)
    if len(found) != len(names):
        raise KeyError(f"a paragraph from {stem} has {len(found)} decimals, its comment names {len(names)}")

    def next_number(match: re.Match[str]) -> str:
        name = names.pop(0)
        value = entry(numbers, stem, name.strip("|"))["value"]
        return number(abs(value) if name.startswith("|") else value, len(match[0].split(".")[1]))

    return re.sub(DECIMAL, next_number, block)


BLOCK = re.compile(r"(<!-- numbers from (\w+), (?:(\d) digits|in this order): (.*?) -->\n+)(.*?)(?=\n\n|\n?\Z)", re.S)


def restate_numbers(text: str, load: Callable[[str], dict | None] = load) -> str:
    """Fill every block that a comment marks; one whose file is not there yet stays as it is."""

    def fill(match: re.Match[str]) -> str:
        comment, stem, digits, rule, block = match.groups()
        content = load(stem)
        if content is None:
            return match[0]
        if digits:
            return comment + fill_table(block, stem, content["numbers"], rule, int(digits))
        return comment + fill_prose(block, stem, content["numbers"], rule)

    return BLOCK.sub(fill, text)


def spell(minutes: float) -> str:
    """Minutes as prose prints them: whole ones from ten on, else tenths, at least one."""
    return f"{minutes:.0f}" if minutes >= 9.95 else f"{max(minutes, 0.1):.1f}"


def restate_minutes(text: str, stem: str | None, recorded: dict | None, reading: dict[str, int]) -> str:
    """Fill in the minutes: an opener's sentence, a table's columns "reading" and "minutes …", a line "*Minutes: …*"."""
    if not recorded or not {"quick", "full"} <= set(recorded):
        return text
    quick, full = recorded["quick"], recorded["full"]
    if stem in quick["notebooks"] and stem in full["notebooks"]:
        both = spell(quick["notebooks"][stem]), spell(full["notebooks"][stem])
        cores = WORDS.get(full["cores"], f"{full['cores']} cores")
        said = (
            f"**Minutes:** {reading[stem]} of reading; of computing on {cores}, {both[0]} at the quick budget, "
            f"{both[1]} at the full one."
        )
        text = re.sub(OPENER, said, text)
    text = re.sub(r"^\*Minutes: .*\*$", summary(quick, full), text, flags=re.M)
    return "\n".join(_minutes_column(text.split("\n"), quick["notebooks"], full["notebooks"], reading))


def summary(quick: dict, full: dict) -> str:
    """One line on the two runs that were timed."""
    runs = [
        f"{spell(timed['total'])} in all at the {budget} budget ({timed['data']}, {timed['cores']} cores, "
        f"{'one notebook' if timed['jobs'] == 1 else str(timed['jobs']) + ' notebooks'} at a time, "
        f"{timed['processor']}, {timed['date']})"
        for budget, timed in (("quick", quick), ("full", full))
    ]
    return f"*Minutes: {'; '.join(runs)}. A notebook's own count holds the trainings that it did itself.*"


def _minutes_column(
    lines: list[str], quick: dict[str, float], full: dict[str, float], reading: dict[str, int]
) -> Iterator[str]:
    column, both, reads = None, False, None
    for line in lines:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        heads = [i for i, cell in enumerate(cells) if cell.startswith("minutes")]
        link = re.search(r"((?:\d\d|D\d)_\w+)\.ipynb", line)
        if not cells:
            column = reads = None
        elif heads:
            column, both = heads[0], "full" in cells[heads[0]]
            reads = cells.index("reading") if "reading" in cells else None
        elif column is not None and link and link[1] in quick and link[1] in full:
            cells[column] = spell(quick[link[1]]) + (f" / {spell(full[link[1]])}" if both else "")
            if reads is not None:
                cells[reads] = str(reading[link[1]])
            line = f"| {' | '.join(cells)} |"
        yield line


def record(budget: str, minutes: dict[str, float], total: float, jobs: int) -> None:
    """Write what a run took to figures/results/minutes.json, with the machine, the data and the date."""
    from planar_helpers.data import load_images  # heavy, and needed here only

    path = run.folder("results") / "minutes.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    earlier = content.get(budget, {})
    notebooks = {**earlier.get("notebooks", {}), **{stem: round(m, 2) for stem, m in minutes.items()}}
    whole = set(minutes) >= set(earlier.get("notebooks", {}))
    # one at a time, the total of a run of some of the notebooks is known: it is the sum
    total = total if whole else sum(notebooks.values()) if jobs == earlier["jobs"] == 1 else earlier["total"]
    content[budget] = {
        "data": load_images().name,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "jobs": jobs,
        "date": datetime.date.today().isoformat(),
        "total": round(total, 2),
        "notebooks": dict(sorted(notebooks.items())),
    }
    with run.replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n")


def processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), flags=re.M)
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def restated(path: Path) -> str:
    """The content that a README or a notebook should have."""
    text, recorded, reading = path.read_text(encoding="utf-8"), load("minutes"), read_in()
    if path.suffix == ".md":
        return restate_minutes(restate_numbers(text), None, recorded, reading)
    notebook = json.loads(text)
    changed = False
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            source = "".join(cell["source"])
            new = restate_minutes(source, path.stem, recorded, reading)
            changed |= new != source
            cell["source"] = new.splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n" if changed else text


def main(words: list[str] | None = None) -> int:
    """Bring READMEs and notebooks up to date, or with --check say which are not; return 1 if some are not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, say what is out of date")
    check = parser.parse_args(words).check
    stale = 0
    for path in (*READMES, *series()):
        new = restated(path)
        if new != path.read_text(encoding="utf-8"):
            stale += 1
            print(
                f"{path.relative_to(ROOT)}: " + ("is out of date: run make readme" if check else "brought up to date")
            )
            if not check:
                with run.replacing(path) as temporary:
                    temporary.write_text(new, encoding="utf-8", newline="\n")
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
