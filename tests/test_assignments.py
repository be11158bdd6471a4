"""The assignments: student copies are those of the masters, hold no answer, and state their points and pointers."""

import json
import re
import sys
from pathlib import Path

import pytest

from planar_helpers.checks import EXERCISES

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks" / "assignments"
sys.path.insert(0, str(FOLDER))
import release  # noqa: E402  (a script, not a package)

MASTERS = sorted((FOLDER / "solutions").glob("*.ipynb"))
each = pytest.mark.parametrize("path", MASTERS, ids=lambda path: path.stem)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def marks(cell: dict) -> dict:
    return cell["metadata"].get("nbgrader", {})


def test_there_is_one_student_copy_for_each_master() -> None:
    assert [path.name for path in MASTERS] == [path.name for path in sorted(FOLDER.glob("*.ipynb"))]
    assert [path.name[:2] for path in MASTERS] == ["A1", "A2", "A3", "A4", "A5", "A6"]


@each
def test_the_student_copy_is_what_the_master_gives(path: Path) -> None:
    copy = release.text_of(release.student_copy(read(path)))
    assert (FOLDER / path.name).read_text(encoding="utf-8") == copy, "run make assignments"
    assert path.read_text(encoding="utf-8") == release.text_of(read(path)), (
        "a master is saved without an editor's traces"
    )


@each
def test_a_master_is_stored_as_it_runs_and_its_copy_and_variants_without_outputs(path: Path) -> None:
    master = read(path)
    cells = [cell for cell in master["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run make notebooks ONLY=A1"
    for cell in cells:
        for output in cell["outputs"]:
            expected = "raises-exception" in cell["metadata"].get("tags", [])
            assert output["output_type"] != "error" or expected, source(cell)
            assert output.get("name") != "stderr" and "Warning" not in json.dumps(output), source(cell)
    for other in (release.student_copy(master), release.private(master, 3)):
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in other["cells"])


@each
def test_the_student_copy_holds_no_answer(path: Path) -> None:
    master, copy = read(path), read(FOLDER / path.name)
    text = "\n".join(map(source, copy["cells"]))
    for word in ("### ", "Marking", r"seed=\d"):
        assert not re.search(word, text)
    for before, after in zip(master["cells"], copy["cells"], strict=True):
        assert before["metadata"] == after["metadata"] and before["id"] == after["id"]
        if marks(before).get("solution"):
            stub = "raise NotImplementedError()" if before["cell_type"] == "code" else "YOUR ANSWER HERE"
            assert stub in source(after)
        if marks(before).get("grade") and before["cell_type"] == "code":
            assert "### BEGIN HIDDEN TESTS" in source(before) and source(after).count("checks.check(") == 1


@each
def test_cells_carry_nbgraders_metadata(path: Path) -> None:
    cells = read(path)["cells"]
    identities = [marks(cell)["grade_id"] for cell in cells if marks(cell)]
    assert len(set(identities)) == len(identities) and len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        if marks(cell):
            kinds = {"grade", "grade_id", "locked", "schema_version", "solution", "task"}
            assert set(marks(cell)) == kinds | ({"points"} if marks(cell)["grade"] else set())
            assert marks(cell)["schema_version"] == 3 and marks(cell)["grade_id"].startswith(path.name[:2] + "-")
            assert marks(cell)["locked"] == (not marks(cell)["solution"])


@each
def test_the_opener_states_points_and_minutes(path: Path) -> None:
    cells = read(path)["cells"]
    text = source(cells[0])
    graded = {kind: sum(marks(c)["points"] for c in cells if marks(c).get("grade") and c["cell_type"] == kind)
              for kind in ("code", "markdown")}  # fmt: skip
    total, computer, hand = map(
        int, re.search(r"\*\*Points:\*\* (\d+) \((\d+) .*?, (\d+) marked by hand\)", text).groups()
    )
    assert (computer, hand, total) == (graded["code"], graded["markdown"], sum(graded.values()))
    headings = re.findall(r"^## \d+ · .*\((\d+) points?, (\d+) minutes", "\n".join(map(source, cells)), re.MULTILINE)
    minutes = int(re.search(r"\*\*Minutes:\*\* (\d+)\.", text)[1])
    assert sum(int(points) for points, _ in headings) == total
    assert 60 <= minutes <= 120 and sum(int(each) for _, each in headings) == minutes
    assert "**Goals.**" in text and "**Before this:**" in text


@each
def test_each_exercise_points_to_a_section_and_has_a_check_that_exists(path: Path) -> None:
    cells = read(path)["cells"]
    text = "\n".join(map(source, cells))
    for target, section in re.findall(r"Rests on: .*?\]\(\.\./\.\./(\S+?)\), section \"(.+?)\"", text):
        headings = [source(c) for c in read(ROOT / "notebooks" / target)["cells"] if c["cell_type"] == "markdown"]
        assert re.search(rf"^#+ {re.escape(section)}$", "\n".join(headings), re.MULTILINE), (target, section)
    for name in re.findall(r"checks\.check\(\"(.+?)\"", text):
        assert name in EXERCISES and name.startswith(path.name[:2])
    for cell in cells:
        if marks(cell).get("solution") and cell["cell_type"] == "markdown":
            assert all(word in source(cell) for word in ("**Marking", "*Full (", "*Half (", "*None (0)"))


def test_every_exercise_that_is_checked_is_asked() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in MASTERS)
    assert [name for name in EXERCISES if f'\\"{name}\\"' not in text] == []


def test_markers_that_do_not_pair_up_are_refused() -> None:
    for broken in ("### BEGIN SOLUTION\nx = 1", "x = 1\n### END HIDDEN TESTS"):
        cell = {"cell_type": "code", "id": "c", "source": [broken], "metadata": {}}
        with pytest.raises(ValueError, match="must pair up"):
            release.student_copy({"cells": [cell]})
    whole = {"cell_type": "code", "id": "c", "source": ["x = 1"], "metadata": {"nbgrader": {"solution": True}}}
    assert source(release.student_copy({"cells": [whole]})["cells"][0]) == release.STUB["code"]


def test_a_private_variant_has_other_hidden_tests_and_another_slip(tmp_path: Path) -> None:
    assert release.main(["--private", "7", "--to", str(tmp_path / "a")]) == 0
    assert release.main(["--private", "8", "--to", str(tmp_path / "b")]) == 0
    for path in MASTERS:
        mine, yours = ((tmp_path / name / "solutions" / path.name).read_text(encoding="utf-8") for name in "ab")
        assert "seed=" in mine and mine != yours and mine != path.read_text(encoding="utf-8")
        assert not re.search(r"seed=\d", (tmp_path / "a" / path.name).read_text(encoding="utf-8"))
    friend = (tmp_path / "a" / "A5_find_the_bug.ipynb").read_text(encoding="utf-8")
    assert release.SLIPS[0][1] in friend and release.SLIPS[0][0] not in friend
    for one, _ in release.SLIPS:
        assert one in (FOLDER / "A5_find_the_bug.ipynb").read_text(encoding="utf-8")


def test_copies_that_are_out_of_date_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert release.main(["--check"]) == 0
    monkeypatch.setitem(release.STUB, "code", "pass")
    assert release.main(["--check"]) == 1 and "out of date: A1_planar_flow.ipynb" in capsys.readouterr().err


def test_the_runs_of_a6_are_those_of_the_gallery() -> None:
    runs = json.loads((FOLDER / "A6_runs.json").read_text(encoding="utf-8"))
    stored = json.loads((ROOT / "figures" / "results" / "08_exact_posterior.json").read_text(encoding="utf-8"))[
        "numbers"
    ]
    arms = ("plain", "translation", "full covariance", "planar 3", "planar 16")
    seeds = {run["seed"] for run in runs}
    assert sorted((run["arm"], run["seed"]) for run in runs) == sorted((arm, seed) for arm in arms for seed in seeds)
    for arm in arms:
        for quantity in ("ELBO", "log p(x)", "gap"):
            values = [run[quantity] for run in runs if run["arm"] == arm]
            assert abs(sum(values) / len(values) - stored[f"{arm}: {quantity}"]["value"]) < 0.01


@pytest.mark.filterwarnings("ignore")  # nbgrader's own
@each
def test_nbgrader_makes_the_same_text_of_a_master(path: Path) -> None:
    preprocessors = pytest.importorskip(
        "nbgrader.preprocessors", reason="nbgrader is an extra: pip install -e .[grade]"
    )
    import nbformat

    notebook, resources = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4), {}
    for name in ("ClearSolutions", "ClearHiddenTests"):
        notebook, resources = getattr(preprocessors, name)().preprocess(notebook, resources)
    copy = read(FOLDER / path.name)["cells"]
    for cell, mine in zip(notebook["cells"], copy, strict=True):
        assert cell["source"].replace("](../../", "](../").rstrip("\n") == source(mine)
