"""Grade a folder of submissions: points per exercise as CSV, and a page of feedback for each student.

    make grade SUBMISSIONS=folder             results in build/grades (GRADES=another/folder)

The folder is one as it comes from Moodle or Canvas, or holds `name/A1.ipynb`. Whose a file is follows from its name,
which assignment it is from what it holds. Each submission runs in processes of its own (`student.py`) and the checks
here: what a student's code replaces or fakes there changes nothing here. A run that was stopped goes on where it was.

Written answers wait for a marker: fill in `marks/A1.csv` and run the command again.
"""

import argparse
import ast
import contextlib
import csv
import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]
import feedback  # noqa: E402
import release  # noqa: E402
import student  # noqa: E402

from planar_helpers import checks, run  # noqa: E402

FIRST_UID = 60001  # of the students' processes, if root grades; one for each that runs side by side
CANVAS = re.compile(r"(?P<student>[^_]+)(?P<late>_LATE)?_\d+_\d+_(?P<file>.+)")
MOODLE = re.compile(r"(?P<student>.+?)_\d+_assignsubmission_file_?(?P<file>.*)")
EMPTY = "The answer was left empty."


class Submission(NamedTuple):
    """One file that was handed in."""

    student: str
    assignment: str
    path: Path
    late: bool
    note: str


class Limits(NamedTuple):
    """Seconds of a cell and of a submission, bytes of memory of a submission."""

    cell: float = 120
    total: float = 600
    memory: int = 2 * 2**30


class Ended(BaseException):
    """The student's process has gone, with the reason. No `except Exception` of a check may catch it."""


# Which files were handed in, by whom, for which assignment.


def masters(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the masters by the names of their assignments, A1 to A6."""
    paths = sorted(folder.glob("A*.ipynb"))
    if not paths:
        raise FileNotFoundError(f"MASTERS must name a folder that holds A*.ipynb, got {str(folder)!r}")
    return {path.name.split("_")[0]: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def collect(folder: Path, known: dict[str, dict[str, Any]]) -> list[Submission]:
    """Return one submission a student and assignment, the newest, with a note where there were others."""
    if not folder.is_dir():
        raise FileNotFoundError(f"SUBMISSIONS must name a folder, got {str(folder)!r}")
    files = [path for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
    files = [path for path in files if path.suffix == ".ipynb" and not _hidden(path.relative_to(folder))]
    found: dict[tuple[str, str], list[tuple[Any, Submission]]] = {}
    for path in sorted(files):
        who, late, number = whose(path.relative_to(folder))
        which, note = assignment_of(path, known)
        order = (number, path.lstat().st_mtime)
        found.setdefault((who, which), []).append((order, Submission(who, which, path, late, note)))
    submissions = []
    for several in found.values():
        newest = max(several, key=lambda each: each[0])[1]
        others = ", ".join(each.path.name for _, each in several if each is not newest)
        more = f"newest of {len(several)} files (not graded: {others})" if others else ""
        submissions.append(newest._replace(note="; ".join(filter(None, [newest.note, more]))))
    given = {submission.student for submission in submissions}
    for place in sorted(each for each in folder.iterdir() if each.is_dir() and not _hidden(Path(each.name))):
        who = whose(Path(place.name) / "nothing.ipynb")[0]
        if who not in given:
            submissions.append(Submission(who, "?", place, False, "no notebook in this folder"))
    return sorted(submissions, key=lambda each: (each.assignment, each.student))


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


def whose(path: Path) -> tuple[str, bool, int]:
    """Return the student, whether the platform says late, and the number of the hand-in, from a path in the folder."""
    top, name = path.parts[0], path.stem
    text = top if len(path.parts) > 1 else name
    again = re.search(r"-(\d+)$", name)  # Canvas and browsers number later ones
    number = int(again[1]) if again else 0
    for pattern in (MOODLE, CANVAS):
        match = pattern.fullmatch(text) or pattern.fullmatch(name)
        if match:
            return match["student"].strip(), bool(match.groupdict().get("late")), number
    if len(path.parts) == 1:  # name_A1.ipynb, all in one folder
        text = re.sub(r"[ _-]*A\d.*$", "", name) or name
    return text, False, number


def assignment_of(path: Path, known: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """Return which assignment a file is, by its cells, else by its name, else "?"; and what is wrong with the file."""
    note = ""
    try:
        cells = read(path)["cells"]
        votes = re.findall(r"\b(A\d)[-.]\w", " ".join(_identity(cell) + " " + source(cell)[:4000] for cell in cells))
        votes = [vote for vote in votes if vote in known]
        if votes:
            return max(set(votes), key=votes.count), ""
        note = "no cell of an assignment in it"
    except (OSError, ValueError) as error:
        note = f"not readable: {error}"
    named = re.search(r"A(\d)", path.name)
    return (named[0] if named and named[0] in known else "?"), note


def read(path: Path) -> dict[str, Any]:
    """Return a submitted notebook. ValueError if it is none, OSError if it cannot be read."""
    if path.is_symlink() or not path.is_file():
        raise ValueError("a link, not a file")
    if path.stat().st_size > 50 * 2**20:
        raise ValueError("larger than 50 MB")
    try:
        notebook = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise ValueError("not a notebook: the file is not JSON") from None
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if cells is None and isinstance(notebook, dict) and notebook.get("worksheets"):  # version 3 of the format
        raise ValueError("a notebook of an old format (version 3): open it in JupyterLab and save it")
    if not isinstance(cells, list) or not all(_is_cell(cell) for cell in cells):
        raise ValueError("not a notebook: it holds no list of cells")
    return notebook


def _is_cell(cell: Any) -> bool:
    if not isinstance(cell, dict) or not isinstance(cell.get("metadata", {}), dict):
        return False
    text = cell.get("source", "")
    return isinstance(text, str) or (isinstance(text, list) and all(isinstance(line, str) for line in text))


def source(cell: dict[str, Any]) -> str:
    """Return a cell's text."""
    return "".join(cell.get("source", ""))


def _identity(cell: dict[str, Any]) -> str:
    """What a cell was called in the student's copy, if its editor has kept that: in the metadata, or as its id."""
    marks = cell.get("metadata", {}).get("nbgrader", {})
    name = marks.get("grade_id") if isinstance(marks, dict) else None
    return str(name or cell.get("id", ""))


# One submission: its cells run over there, its checks here.


class Room:
    """A keeper, and the student that it has started."""

    def __init__(self, uid: int, hide: list[str]) -> None:
        mine, theirs = socket.socketpair()
        command = [sys.executable, "-s", str(HERE / "student.py"), str(theirs.fileno())]
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        self.keeper = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=clean)
        theirs.close()
        self.control, self.uid, self.hide = mine, uid, hide
        student.receive(mine)  # it has read its libraries

    def start(self, limits: Limits, files: dict[str, str]) -> "Student":
        """Start a student, in an empty folder with these files."""
        environment = {name: os.environ[name] for name in ("PLANAR_DATA", "PLANAR_BUDGET") if os.environ.get(name)}
        order = {
            "uid": self.uid, "hide": self.hide, "memory": limits.memory, "files": files, "environment": environment,
        }  # fmt: skip
        student.send(self.control, {"start": order})
        data, descriptors, _, _ = socket.recv_fds(self.control, 100, 1)
        return Student(socket.socket(fileno=descriptors[0]), int(data), limits)

    def end(self) -> str:
        """End all that the student has started; return why the keeper had ended it before, if it had."""
        student.send(self.control, {"end": True})
        answer = student.receive(self.control)
        return str(answer["why"] or ("" if answer["ended"] else "left processes that could not be ended"))

    def close(self) -> None:
        """Let the keeper go, and wait until it has."""
        self.control.close()
        self.keeper.wait(60)


class Student:
    """A student's process, asked in messages. Ended is raised once it has gone."""

    def __init__(self, channel: socket.socket, pid: int, limits: Limits) -> None:
        self.channel, self.pid, self.limits = channel, pid, limits
        self.until = time.monotonic() + limits.total
        self.ready = self.ask(None)

    def ask(self, message: dict[str, Any] | None) -> dict[str, Any]:
        """Send a message and return the answer; interrupt what takes too long, and then give up."""
        left = self.until - time.monotonic()
        if left <= 0:
            raise Ended(f"the {self.limits.total:.0f} seconds of a submission were over")
        try:
            self.channel.settimeout(min(self.limits.cell, left))
            if message is not None:
                student.send(self.channel, message)
            try:
                return student.receive(self.channel)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGINT)
                self.channel.settimeout(5)
                student.receive(self.channel)
                return {"error": "TimeoutError", "message": f"stopped after {min(self.limits.cell, left):.0f} seconds"}
        except TimeoutError:
            raise Ended(f"did not stop after {self.limits.cell:.0f} seconds") from None
        except (EOFError, OSError):
            raise Ended("the process ended itself") from None
        except (ValueError, RecursionError):
            raise Ended("the process sent what is no answer") from None


class Proxy:
    """A function of the student's, called over there."""

    def __init__(self, name: str, person: Student) -> None:
        self.__name__, self.person, self.called = name, person, ()

    def __call__(self, *given: Any) -> Any:
        """Call it; what it changed in its arguments is changed here, too."""
        answer = self.person.ask({"call": self.__name__, "given": [student.encode(each) for each in given]})
        if "error" in answer:
            raise _as_error(answer)
        try:
            value, after = student.decode(answer["value"]), [student.decode(each) for each in answer["given"]]
            self.called = tuple(map(str, answer["called"]))
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise Ended("the process sent what is no answer") from None
        for mine, theirs in zip(given, after, strict=False):
            if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor) and mine.shape == theirs.shape:
                mine.copy_(theirs)
        return value


def _as_error(answer: dict[str, Any]) -> Exception:
    name = re.sub(r"\W", "", str(answer.get("error")))[:60] or "Error"
    if _unwritten(answer):
        return NotImplementedError()
    line = f" (line {answer['line']} of the cell)" if answer.get("line") else ""
    base = RuntimeError if name == "RuntimeError" else Exception
    return type(name, (base,), {})(f"{str(answer.get('message'))[:500]}{line}")


def _unwritten(answer: dict[str, Any]) -> bool:
    """Whether this is the error of a stub; torch's own NotImplementedError has a text."""
    return answer.get("error") == "NotImplementedError" and not answer.get("message")


def judge(code: str, person: Student) -> str:
    """Run a check cell of the master here, its functions over there; return "" if it passes, or what it says."""
    names = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    space: dict[str, Any] = {"checks": checks, "torch": torch}
    for name in sorted(names - set(space)):
        answer = person.ask({"look": name})
        if answer.get("missing"):
            return f"{name} is not defined."
        if answer.get("callable"):
            space[name] = Proxy(name, person)
        else:
            try:
                space[name] = student.decode(answer.get("value"))
            except (KeyError, TypeError, ValueError, RuntimeError):
                raise Ended("the process sent what is no answer") from None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, "check", "exec"), space)
    except Exception as error:  # noqa: BLE001  (a check that fails in any way is told, and gives no points)
        return str(error) or type(error).__name__
    return ""


def identified(cells: list[dict[str, Any]], copy: list[dict[str, Any]]) -> list[str]:
    """Return which cell of the student's copy each submitted cell is, "" for a cell of the student's own.

    By its name in the metadata or its id; where an editor has dropped both, by its text, by the function it defines,
    or, for a written answer, by the cell above it.
    """
    texts = {_identity(cell): source(cell).strip() for cell in copy}
    by_text = {text: name for name, text in texts.items() if not text.startswith("YOUR ANSWER")}
    by_def = {m[1]: name for name, text in texts.items() if (m := re.search(r"^def (\w+)\(", text, re.MULTILINE))}
    order, names = list(texts), []
    for cell in cells:
        name, text, code = _identity(cell), source(cell).strip(), cell.get("cell_type") == "code"
        if name not in texts:
            name = by_text.get(text, "")
        if not name and code:
            defined = re.search(r"^def (\w+)\(", text, re.MULTILINE)
            name = by_def.get(defined[1], "") if defined else ""
        if not name and not code and names and names[-1]:
            below = order[order.index(names[-1]) + 1 : order.index(names[-1]) + 2]
            name = below[0] if below and texts[below[0]].startswith("YOUR ANSWER") else ""
        names.append(name)
    return names


def grade(submission: Submission, master: dict[str, Any], room: Room, limits: Limits) -> dict[str, Any]:
    """Run one submission and return its verdicts: {"cells": {grade_id: {points, of, says, text}}, "status": ...}.

    A check is right if it is where it stands, or once all cells have run.
    """
    copy = release.student_copy(master)["cells"]
    blank = {_identity(cell): source(cell).strip() for cell in copy}
    graded = {_identity(c): c for c in master["cells"] if c["metadata"].get("nbgrader", {}).get("grade")}
    tests = {name: source(c) for name, c in graded.items() if c["cell_type"] == "code"}
    idle = list(blank)[max(list(blank).index(name) for name in tests) + 1 :]  # what only the student looks at
    cells = read(submission.path)["cells"]
    names = identified(cells, copy)
    texts = {name: source(cell) for name, cell in zip(names, cells, strict=True)}  # of two, the last
    says: dict[str, str] = {}
    notes, status = [], "ran to its end"
    files = {path.name: path.read_text(encoding="utf-8") for path in HERE.glob("*.json")}
    person = None
    try:
        person = room.start(limits, files)
        for number, (name, cell) in enumerate(zip(names, cells, strict=True), 1):
            if cell.get("cell_type") != "code" or (name in idle and source(cell).strip() == blank[name]):
                continue
            if name not in tests or source(cell).strip() != blank[name]:
                answer = person.ask({"run": source(cell)})
                if "error" in answer and not _unwritten(answer):
                    notes.append(f"cell {number}: {answer.get('error')}: {str(answer.get('message'))[:200]}")
            if name in tests and says.get(name, "-"):
                says[name] = judge(tests[name], person)
        for name in tests:
            if says.get(name, "-"):
                says[name] = judge(tests[name], person)
    except Ended as reason:
        status = f"ended early: {reason}"
    finally:
        why = room.end()
        if person is not None:
            person.channel.close()
    status = f"ended early: {why}" if why else status
    verdicts = {}
    for name, cell in graded.items():
        of = cell["metadata"]["nbgrader"]["points"]
        if name in tests:
            said, text = says.get(name, f"Not reached: {status}."), texts.get(name.removesuffix("-check"), "")
            verdicts[name] = {"points": 0 if said else of, "of": of, "says": said, "text": text[:20_000]}
        else:
            text = texts.get(name, "")
            empty = text.strip() in ("", blank[name])
            verdicts[name] = {"points": 0 if empty else None, "of": of, "says": EMPTY if empty else "", "text": text}
    confined = bool(person and person.ready.get("hidden"))
    return {"cells": verdicts, "status": status, "notes": notes[:20], "confined": confined}


# Many of them.


_room: Room | None = None


def _work(task: tuple[Submission, dict[str, Any], Path, Limits, list[str], int]) -> tuple[float, str]:
    """Grade one submission in this worker's room, and keep its result."""
    global _room
    submission, master, target, limits, hide, first = task
    begin = time.monotonic()
    for second in (False, True):
        try:
            if _room is None:
                _room = Room(_slot(first), hide)
            result = grade(submission, master, _room, limits)
            break
        except (OSError, EOFError) as error:  # the keeper has gone: a new one, once
            _room = None
            result = {"cells": {}, "status": f"could not be run: {error}", "notes": [], "confined": False}
            if second:
                return time.monotonic() - begin, str(result["status"])
    seconds = time.monotonic() - begin
    with run.replacing(target) as temporary:
        temporary.write_text(json.dumps(result | {"seconds": seconds}), encoding="utf-8")
    return seconds, f"{_points(result)}, {result['status']}"


def _slot(first: int) -> int:
    import multiprocessing

    identity = multiprocessing.current_process()._identity
    return first + (identity[0] - 1 if identity else 0)


def _points(result: dict[str, Any]) -> str:
    marks = result["cells"].values()
    return f"{sum(m['points'] or 0 for m in marks):g} points of {sum(m['of'] for m in marks):g}"


def _key(submission: Submission, master: dict[str, Any], limits: Limits) -> str:
    """What a result depends on: the file, the master, the checks, the limits."""
    code = Path(checks.__file__).read_bytes() + Path(student.__file__).read_bytes() + Path(__file__).read_bytes()
    parts = [submission.path.read_bytes(), release.text_of(master).encode(), code, repr(limits).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def grade_all(
    submissions: list[Submission], known: dict[str, Any], results: Path, limits: Limits, jobs: int, hide: list[str]
) -> dict[int, dict[str, Any]]:
    """Return the results by the submissions' places in the list; those of an earlier run are read, not made again."""
    found: dict[int, dict[str, Any]] = {}
    tasks: dict[int, tuple[Any, ...]] = {}
    for i, submission in enumerate(submissions):
        try:
            if submission.assignment not in known:
                raise ValueError(submission.note or "of no known assignment")
            read(submission.path)
            key = _key(submission, known[submission.assignment], limits)
        except (OSError, ValueError) as error:
            found[i] = {"cells": {}, "status": str(error), "notes": [], "confined": False, "seconds": 0}
            continue
        target = results / f"{key}.json"
        if target.is_file():
            found[i] = json.loads(target.read_text(encoding="utf-8"))
        else:
            tasks[i] = (submission, known[submission.assignment], target, limits, hide, FIRST_UID)
    if found and tasks:
        print(f"{len(found)} of {len(submissions)} are done already, or cannot be run")
    begin = time.monotonic()
    with _pool(min(jobs, len(tasks))) as pool:
        futures = {pool.submit(_work, task): i for i, task in tasks.items()}
        for done, future in enumerate(as_completed(futures), 1):
            i = futures[future]
            seconds, line = future.result()
            left = (time.monotonic() - begin) / done * (len(tasks) - done)
            name = f"{submissions[i].assignment} {submissions[i].student}"
            run.say(f"[{done}/{len(tasks)}] {name}: {line} ({seconds:.1f} s); {left / 60:.1f} minutes left")
            sys.stdout.flush()
            target = tasks[i][2]
            if target.is_file():
                found[i] = json.loads(target.read_text(encoding="utf-8"))
            else:
                found[i] = {"cells": {}, "status": line, "notes": [], "confined": False, "seconds": seconds}
    return found


@contextlib.contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Workers; when they go, so do their keepers, which see their channel close."""
    pool = ProcessPoolExecutor(max(1, jobs))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


# What is written.


def write(
    submissions: list[Submission], found: dict[int, dict[str, Any]], known: dict[str, Any], folder: Path
) -> list[Path]:
    """Write a CSV for each assignment, the sheets for written answers, and the pages; return the CSVs."""
    written = []
    for which in [*known, "?"]:
        mine = [i for i, submission in enumerate(submissions) if submission.assignment == which]
        if not mine:
            continue
        names = [
            (_identity(c), c["metadata"]["nbgrader"]["points"], c["cell_type"] == "markdown")
            for c in known.get(which, {"cells": []})["cells"]
            if c["metadata"].get("nbgrader", {}).get("grade")
        ]
        marks = _marks(folder / "marks" / f"{which}.csv", [(i, submissions[i], found[i]) for i in mine], names)
        rows = []
        for i in mine:
            submission, cells = submissions[i], found[i]["cells"]
            row: dict[str, Any] = {"student": submission.student, "file": submission.path.name}
            row["late"] = "late" if submission.late else ""
            for name, _, by_hand in names:
                mark = marks.get((submission.student, name))
                if by_hand and mark and mark[0] is not None:
                    cells.setdefault(name, {"of": 0, "says": "", "text": ""})["points"] = mark[0]
                    cells[name]["says"] = mark[1]
                points = cells.get(name, {"points": 0})["points"]
                row[name.split("-", 1)[1].removesuffix("-check")] = "" if points is None else points
            waiting = sum(cells.get(name, {"points": 0})["points"] is None for name, _, _ in names)
            row["total"] = sum(cells.get(name, {"points": 0})["points"] or 0 for name, _, _ in names)
            row["of"] = sum(points for _, points, _ in names)
            row["to mark by hand"] = waiting or ""
            row["what happened"] = "; ".join(
                filter(None, [found[i]["status"], submission.note, *found[i]["notes"][:3]])
            )
            rows.append({name: _plain(value) for name, value in row.items()})
            page = folder / "feedback" / which.replace("?", "unknown") / f"{_file_name(submission.student)}.html"
            with run.replacing(page) as temporary:
                text = feedback.page(submission.student, which, known.get(which), found[i], submission.note)
                temporary.write_text(text, encoding="utf-8")
        target = folder / f"{which.replace('?', 'unknown')}.csv"
        with run.replacing(target) as temporary, temporary.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        written.append(target)
    return written


def _plain(value: Any, most: int = 500) -> Any:
    """A cell of a CSV: one line, and no formula for a spreadsheet to run."""
    if not isinstance(value, str):
        return value
    line = " ".join(value.split())[:most]
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line


def _file_name(name: str) -> str:
    safe = re.sub(r"[^\w .@+-]", "_", name).strip(". ") or "unnamed"
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _marks(path: Path, mine: list[tuple[int, Submission, Any]], names: list[Any]) -> dict[tuple[str, str], Any]:
    """Read the marks given by hand, and add lines for the answers that wait. ValueError for a mark that is none."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    most = {name: points for name, points, by_hand in names if by_hand}
    if path.is_file():
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line in csv.DictReader(file):
                lines[(line["student"], line["exercise"])] = line
    for _, submission, result in mine:
        for name in most:
            waits = result["cells"].get(name, {"points": 0})["points"] is None
            if waits and (submission.student, name) not in lines:
                text = _plain(result["cells"][name]["text"], 20_000)
                entry = {"student": submission.student, "exercise": name, "of": most[name], "points": "", "comment": ""}
                lines[(submission.student, name)] = {**entry, "answer": text}
    marks = {}
    for (who, name), line in lines.items():
        points = None
        if (line["points"] or "").strip():
            try:
                points = float(line["points"].replace(",", "."))
            except ValueError:
                points = -1.0
            if not 0 <= points <= float(most.get(name, 0)):
                raise ValueError(
                    f"{path}: points of {who}, {name} must be a number from 0 to {most.get(name, 0)}, "
                    f"got {line['points']!r}"
                )
        marks[(who, name)] = (points, line["comment"] or "")
    if lines:
        with run.replacing(path) as temporary, temporary.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["student", "exercise", "of", "points", "comment", "answer"])
            writer.writeheader()
            writer.writerows(lines.values())
    return marks


def main(words: list[str] | None = None) -> int:
    """Grade the folder named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("submissions", type=Path)
    parser.add_argument("--grades", type=Path, default=run.folder("build") / "grades", help="where results go")
    parser.add_argument("--masters", type=Path, default=HERE / "solutions", help="of a private variant")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at a time")
    parser.add_argument("--seconds", type=float, default=Limits().cell, help="of a cell")
    parser.add_argument("--total", type=float, default=Limits().total, help="seconds of a submission")
    parser.add_argument("--memory", type=float, default=2.0, help="GiB of a submission")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    limits = Limits(given.seconds, given.total, int(given.memory * 2**30))
    begin = time.monotonic()
    try:
        known = masters(given.masters)
        submissions = collect(given.submissions.resolve(), known)
        if not submissions:
            raise FileNotFoundError(
                f"no notebook in {given.submissions}: expected name/A1.ipynb, or Moodle's or Canvas's"
            )
        hide = [
            str(HERE / "solutions"),
            str(given.masters.resolve()),
            str(given.submissions.resolve()),
            str(given.grades.resolve()),
        ]
        if os.getuid() != 0:
            print("No sandbox: submissions run with your own rights. See README.md, 'Safety', for a container.")
        given.grades.mkdir(parents=True, exist_ok=True)
        found = grade_all(submissions, known, given.grades / "results", limits, given.jobs, hide)
        if feedback.converter is None:
            print("Formulas are shown as LaTeX: pip install -e '.[grade]' brings what draws them")
        if os.getuid() == 0 and any(r["cells"] and not r["confined"] for r in found.values()):
            print("No sandbox: files could not be hidden here, so submissions may read what any user may read.")
        written = write(submissions, found, known, given.grades)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    minutes = (time.monotonic() - begin) / 60
    print(f"{len(submissions)} submissions in {minutes:.1f} minutes: {', '.join(map(str, written))}")
    waiting = sum(v["points"] is None for r in found.values() for v in r["cells"].values())
    if waiting:
        print(f"{waiting} written answers wait: fill in {given.grades / 'marks'}/*.csv and run this again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
