"""The grader: what is handed in is graded as it should be, and hostile code costs nobody else a point.

Hostile code runs as a user without rights, in an empty folder. Where it cannot, it is not run: in CI that is a failure.
"""

import csv
import json
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if sys.platform != "linux":
    pytest.skip("grading needs Linux", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks" / "assignments"
sys.path.insert(0, str(FOLDER))
import feedback  # noqa: E402  (scripts, not a package)
import grade  # noqa: E402
import release  # noqa: E402
import student  # noqa: E402

STEM = "A1_planar_flow"
SIGN = "def ladj(z, w, u, b):\n    return -torch.log((1 + w @ u * (1 - torch.tanh(z @ w + b) ** 2)).abs())\n"
WRONG = "def step(z, w, u, b):\n    return z\n"
FULL = 15  # what the computer gives a perfect A1


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def filled(only: tuple[str, ...] | None = None, changes: dict[str, str] | None = None, stem: str = STEM) -> dict:
    """A student's copy with the master's answers in it, some of them changed."""
    master, copy = load(FOLDER / "solutions" / f"{stem}.ipynb"), load(FOLDER / f"{stem}.ipynb")
    for answer, cell in zip(master["cells"], copy["cells"], strict=True):
        marks = answer["metadata"].get("nbgrader", {})
        if marks.get("solution") and (only is None or marks["grade_id"] in only):
            cell["source"] = [line for line in answer["source"] if "### " not in line]
        if changes and marks.get("grade_id") in changes:
            cell["source"] = changes[marks["grade_id"]].splitlines(keepends=True)
    return copy


def code(text: str) -> dict[str, Any]:
    return {"cell_type": "code", "metadata": {}, "source": text, "outputs": [], "execution_count": 1}


def put(folder: Path, name: str, notebook: dict | str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(notebook if isinstance(notebook, str) else json.dumps(notebook), encoding="utf-8")


def run(folder: Path, grades: Path, *words: str) -> dict[str, dict[str, str]]:
    """Grade a folder, and return the rows by student."""
    assert grade.main([str(folder), "--grades", str(grades), "--jobs", "2", *words]) == 0
    rows: dict[str, dict[str, str]] = {}
    for path in sorted(grades.glob("*.csv")):
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows |= {row["student"]: row for row in csv.DictReader(file)}
    return rows


def of_students() -> list[int]:
    """Processes that belong to a student's user."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if grade.FIRST_UID <= place.stat().st_uid < grade.FIRST_UID + 100:
                found.append(int(place.name))
        except FileNotFoundError:
            pass
    return found


def without_marks(notebook: dict) -> dict:
    """As an editor leaves it that keeps neither ids nor metadata."""
    for cell in notebook["cells"]:
        cell.pop("id")
        cell["metadata"] = {"id": "aBcD"}
    return notebook


def test_submissions_of_every_kind_are_graded_as_they_should_be(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "in"
    put(folder, "perfect/A1.ipynb", filled())
    put(folder, "untouched/A1.ipynb", filled(only=()))
    put(folder, "partial/my homework (2).ipynb", filled(only=("A1-step", "A1-ladj")))
    put(folder, "sign/A1.ipynb", filled(changes={"A1-ladj": SIGN}))
    put(folder, "doe_LATE_123_456_A1_planar_flow-1.ipynb", filled(only=("A1-step",)))
    put(folder, "doe_123_455_A1_planar_flow.ipynb", filled(only=()))
    put(folder, "Zoë Ng_77_assignsubmission_file_/A1_planar_flow.ipynb", filled())
    put(folder, "Al Bo_78_assignsubmission_file_A1.ipynb", filled())
    (folder / "Nobody_79_assignsubmission_file_").mkdir()
    put(folder, "lost/A1.ipynb", without_marks(filled()))
    other = filled()
    other["metadata"] = {"kernelspec": {"name": "conda-env-mine", "language": "julia"}, "colab": {"name": "x"}}
    other["nbformat_minor"] = 0
    other["cells"] = [code("x = 1\n%time y = 2\n!true"), *other["cells"], code("ladj = 3")]
    put(folder, "editor/A1.ipynb", other)
    turned = filled()
    turned["cells"] = turned["cells"][::-1]
    put(folder, "reordered/A1.ipynb", turned)
    less = filled()
    less["cells"] = [c for c in less["cells"] if not c["id"].endswith("-check")]
    put(folder, "deleted/A1.ipynb", less)
    twice = filled()
    twice["cells"] = [c for cell in twice["cells"] for c in (cell, cell)]
    put(folder, "doubled/A1.ipynb", twice)
    faked = filled(changes={"A1-step": WRONG})
    for cell in faked["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "A1.step: right."}]
    put(folder, "faked/A1.ipynb", faked)
    put(folder, "broken/A1.ipynb", "{no json")
    put(folder, "odd/A1.ipynb", json.dumps({"cells": [{"cell_type": "code", "source": 3}]}))
    rows = run(folder, tmp_path / "out")
    for name in ("perfect", "Zoë Ng", "Al Bo", "lost", "editor", "reordered", "deleted", "doubled"):
        assert (rows[name]["total"], rows[name]["to mark by hand"]) == (str(FULL), "2"), rows[name]
    assert rows["untouched"]["total"] == "0" and rows["untouched"]["to mark by hand"] == ""
    assert (rows["partial"]["total"], rows["partial"]["step"], rows["partial"]["chain"]) == ("6", "2", "0")
    assert (rows["doe"]["total"], rows["doe"]["late"]) == ("2", "late") and "newest of 2" in rows["doe"][
        "what happened"
    ]
    assert rows["faked"]["step"] == "0" and "not JSON" in rows["broken"]["what happened"]
    assert "no list of cells" in rows["odd"]["what happened"] and "no notebook" in rows["Nobody"]["what happened"]
    page = (tmp_path / "out" / "feedback" / "A1" / "sign.html").read_text(encoding="utf-8")
    assert (
        "this is the log-determinant with the wrong sign" in page
        and "<script" not in page
        and "http" not in page.replace('xmlns="http://www.w3.org', "")
    )
    assert of_students() == []

    capsys.readouterr()  # nothing is run twice
    assert run(folder, tmp_path / "out") == rows
    assert "[1/" not in capsys.readouterr().out
    with (tmp_path / "out" / "marks" / "A1.csv").open(encoding="utf-8-sig", newline="") as file:
        lines = list(csv.DictReader(file))
    mine = next(line for line in lines if (line["student"], line["exercise"]) == ("perfect", "A1-proof"))
    assert "polynomials" in mine["answer"]
    mine |= {"points": "2,5", "comment": "one gap"}
    write_marks(tmp_path / "out" / "marks" / "A1.csv", lines)
    again = run(folder, tmp_path / "out")["perfect"]
    assert (again["proof"], again["total"], again["to mark by hand"]) == ("2.5", "17.5", "1")
    mine["points"] = "4"
    write_marks(tmp_path / "out" / "marks" / "A1.csv", lines)
    assert grade.main([str(folder), "--grades", str(tmp_path / "out")]) == 2
    assert "points of perfect, A1-proof must be a number from 0 to 3, got '4'" in capsys.readouterr().err


def test_what_comes_after_the_last_check_is_run_only_if_a_student_wrote_it(tmp_path: Path) -> None:
    master = load(FOLDER / "solutions" / f"{STEM}.ipynb")
    given = code("raise SystemError('given')")
    given["metadata"]["nbgrader"] = {"grade": False, "grade_id": "A1-last", "locked": True, "schema_version": 3}
    given["metadata"]["nbgrader"] |= {"solution": False, "task": False}
    master["cells"].append(given | {"id": "A1-last"})
    put(tmp_path / "masters", f"{STEM}.ipynb", master)
    copy = release.student_copy(master)
    put(tmp_path / "in", "as given/A1.ipynb", copy)
    copy["cells"][-1]["source"] = "raise SystemError('mine')"
    put(tmp_path / "in", "changed/A1.ipynb", copy)
    run(tmp_path / "in", tmp_path / "out", "--masters", str(tmp_path / "masters"))
    pages = {page.stem: page.read_text(encoding="utf-8") for page in (tmp_path / "out").glob("feedback/A1/*.html")}
    assert "SystemError" in pages["changed"] and "SystemError" not in pages["as given"]


def write_marks(path: Path, lines: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


HOSTILE = {
    "endless": "while True: pass",
    "stubborn": """
        import time
        while True:
            try:
                time.sleep(1)
            except BaseException:
                pass
        """,
    "hog": """
        blocks = []
        while True:
            blocks.append(bytearray(2**26))
        """,
    "hogs": """
        import os, time
        for _ in range(4):
            if os.fork() == 0:
                os.setsid()
                keep = b"x" * (300 * 2**20)
                time.sleep(30)
                os._exit(0)
        time.sleep(20)
        """,
    "fifty": """
        import os, time
        for _ in range(50):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    time.sleep(40)
                os._exit(0)
        """,
    "exits": "import sys; sys.exit(0)",
    "leaves": "import os; os._exit(0)",
    "deletes": "import os, shutil; shutil.rmtree(os.getcwd(), ignore_errors=True)",
    "replaces": """
        import torch
        from planar_helpers import checks
        checks.check = checks.compare = print
        checks.EXERCISES.clear()
        torch.allclose = torch.equal = lambda *a, **k: True
        """,
    "garbage": """
        import os
        for fd in range(3, 40):
            try:
                os.write(fd, b"\\xff" * 64)
            except OSError:
                pass
        """,
    "forges": """
        import os
        message = b'{"value": {"v": 1}, "given": [], "called": []}'
        for fd in range(3, 40):
            try:
                os.write(fd, len(message).to_bytes(4, "big") + message)
            except OSError:
                pass
        """,
    "prints": "while True: print('x' * 10000)",
    "files": """
        for i in range(3):
            open(f"f{i}", "wb").write(bytes(2**20))
        open("big", "wb").write(bytes(2**27))
        """,
}


def test_hostile_submissions_cost_nobody_else_a_point(tmp_path: Path) -> None:
    if os.getuid() != 0 and not os.environ.get("CI"):
        pytest.skip("needs root, to become a user without rights: sudo make test")
    assert os.getuid() == 0, "this test must run as root: it could not drop privileges for hostile code"
    folder, probe = tmp_path / "in", tmp_path / "probe"
    probe.write_text("untouched")
    tmp_path.chmod(0o777), probe.chmod(0o666)  # open to all: only hiding keeps a student away
    for name, text in HOSTILE.items():
        notebook = filled(changes={"A1-step": WRONG} if name in ("replaces", "forges") else None)
        notebook["cells"].insert(2, code(textwrap.dedent(text).strip()))
        put(folder, f"{name}/A1.ipynb", notebook)
    secret = folder / "honest" / "A1.ipynb"
    looks = [FOLDER / "solutions" / f"{STEM}.ipynb", secret, probe, Path("/etc/shadow")]
    spy = filled()
    spy["cells"] += [code(f"raise RuntimeError('READ ' + open({str(path)!r}).read()[:20])") for path in looks]
    spy["cells"] += [
        code(f"open({str(probe)!r}, 'w').write('mine')"),
        code("import os\nassert os.getuid() > 60000, 'ROOT'"),
    ]
    spy["cells"] += [code(f"open({str(ROOT / 'planar_helpers' / 'checks.py')!r}, 'a').write('')")]
    spy["cells"] += [code("import socket\nsocket.create_connection(('127.0.0.1', 9), 1)")]
    put(folder, "spy/A1.ipynb", spy)
    put(folder, "honest/A1.ipynb", filled())
    before = (ROOT / "planar_helpers" / "checks.py").read_bytes()
    rows = run(folder, tmp_path / "out", "--seconds", "12", "--total", "300", "--memory", "0.5")

    said = {name: row["what happened"] for name, row in rows.items()}
    assert rows["honest"]["total"] == rows["spy"]["total"] == str(FULL)
    for name in ("endless", "hog", "exits", "fifty", "prints", "files", "deletes"):
        assert rows[name]["total"] == str(FULL), (name, said[name])
    assert "KeyboardInterrupt" in said["endless"] or "stopped after 12 seconds" in said["endless"]
    assert "MemoryError" in said["hog"] and "SystemExit" in said["exits"] and "OSError" in said["files"]
    assert "did not stop after 12 seconds" in said["stubborn"] and "the process ended itself" in said["leaves"]
    assert "used more memory than allowed" in said["hogs"]
    assert rows["replaces"]["step"] == "0" and rows["replaces"]["total"] == "4"  # ladj alone needs no step
    assert rows["garbage"]["total"] == rows["forges"]["total"] == "0", (said["garbage"], said["forges"])
    results = [load(path) for path in (tmp_path / "out" / "results").glob("*.json")]
    spied = next(r["notes"] for r in results if any("uid" in n or "denied" in n or "No such" in n for n in r["notes"]))
    assert len(spied) == 7 and not any(word in note for note in spied for word in ("READ", "ROOT", "Assertion")), spied
    assert probe.read_text() == "untouched" and (ROOT / "planar_helpers" / "checks.py").read_bytes() == before
    assert of_students() == [], "a submission has left processes behind"


def test_messages_keep_values_and_carry_nothing_that_runs() -> None:
    values = (1, 2.5, True, None, "û", torch.randn(2, 3).double(), torch.tensor(3), torch.zeros(0, 2), {"a": (1,)})
    back = student.decode(student.encode(values))
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(values, back, strict=True))
    for number in (np.float64(2.5), np.float32(2.5), np.int64(2)):  # in the notebook's check they are numbers
        assert student.decode(student.encode(number)) == number.item()
        assert type(student.decode(student.encode(number))) is type(number.item())
    assert type(student.decode(student.encode(open))).__name__ == "builtin_function_or_method"
    for bad in ({"t": "", "dtype": "load", "shape": []}, {"t": "AAAA", "dtype": "float64", "shape": [9]}, 3):
        with pytest.raises((ValueError, RuntimeError)):
            student.decode(bad)


@pytest.mark.parametrize(
    ("path", "who"),
    [
        ("Zoë Ng_77_assignsubmission_file_/x.ipynb", ("Zoë Ng", False, 0)),
        ("Zoë Ng_77_assignsubmission_file_x.ipynb", ("Zoë Ng", False, 0)),
        ("doejane_LATE_12_34_A1-3.ipynb", ("doejane", True, 3)),
        ("doejane_12_34_A1.ipynb", ("doejane", False, 0)),
        ("jane/deep/er/A1.ipynb", ("jane", False, 0)),
        ("jane_doe_A1.ipynb", ("jane_doe", False, 0)),
    ],
)
def test_whose_a_file_is(path: str, who: tuple[str, bool, int]) -> None:
    assert grade.whose(Path(path)) == who


def test_what_a_student_wrote_is_text_on_the_page() -> None:
    text = feedback.markdown("<script>alert(1)</script>\n\n[x](javascript:alert(1)) and $\\alpha < 1$\n\n$$\\frac12$$")
    assert "<script" not in text and 'href="javascript' not in text and "&lt;script" in text
    if feedback.converter is not None:
        assert "<mfrac>" in text and text.count("<math") == 2
    assert "<code>" in feedback.formula("\\left(") or "<math" in feedback.formula("\\left(")


def test_a_cell_of_the_csv_is_no_formula() -> None:
    assert grade._plain("=cmd|' /C calc'!A0") == "'=cmd|' /C calc'!A0" and grade._plain("a\nb") == "a b"


def test_a_folder_that_is_none_is_told(tmp_path: Path, capsys: Any) -> None:
    assert grade.main([str(tmp_path / "none"), "--grades", str(tmp_path / "out")]) == 2
    assert "SUBMISSIONS must name a folder" in capsys.readouterr().err
    assert grade.main([str(tmp_path), "--grades", str(tmp_path / "out")]) == 2
    assert "expected name/A1.ipynb" in capsys.readouterr().err


def test_the_master_itself_is_no_student_copy() -> None:
    master = load(FOLDER / "solutions" / f"{STEM}.ipynb")
    assert release.student_copy(master) != master


def a_class(folder: Path, n: int) -> None:
    """Write n submissions of A1, five kinds in turn, no two alike: to time a class."""
    kinds: list[dict[str, Any]] = [
        {}, {"only": ("A1-step", "A1-ladj")}, {"only": ()},
        {"changes": {"A1-ladj": SIGN}}, {"changes": {"A1-step": WRONG}},
    ]  # fmt: skip
    for i in range(n):
        notebook = filled(**kinds[i % len(kinds)])
        notebook["cells"].append(code(f"mine = {i}"))
        put(folder, f"student {i:03}/A1.ipynb", notebook)


def test_a_made_class_is_graded_whole(tmp_path: Path) -> None:
    a_class(tmp_path / "in", 5)
    rows = run(tmp_path / "in", tmp_path / "out")
    assert [rows[f"student {i:03}"]["total"] for i in range(5)] == [str(FULL), "6", "0", "4", "4"]


if __name__ == "__main__":
    a_class(Path(sys.argv[1]), int(sys.argv[2]))
