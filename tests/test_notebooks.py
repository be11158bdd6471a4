"""What a machine can see of a committed notebook. That they run, and that checked outputs hold, is nbval's part."""

import ast
import json
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))
import restate  # noqa: E402  (a script, not a package)

NOTEBOOKS = restate.series()
SAVED = r"\bsave_figure\(\s*\w+,\s*\"([^\"]+)\""
CHECKED = ("01", "02", "03", "05")  # where at least 70 % of the cells with text output are compared


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == "code" and source(cell).strip()]


def texts(cell: dict) -> list[str]:
    found = ["".join(out.get("text", [])) for out in cell["outputs"]]
    return found + ["".join(out.get("data", {}).get("text/plain", [])) for out in cell["outputs"]]


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_the_series_is_there_in_order() -> None:
    names = [path.name[:2] for path in NOTEBOOKS]
    core, deeper = ([name for name in names if (name[0] == "D") == deep] for deep in (False, True))
    assert core == [f"{i:02}" for i in range(len(core))] and len(core) >= 8
    assert deeper == [f"D{i + 1}" for i in range(len(deeper))]


@each
def test_executed_in_order_without_errors_or_warnings(path: Path) -> None:
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell["outputs"]:
            assert output["output_type"] != "error" or "raises-exception" in tags(cell), source(cell)
            assert output.get("name") != "stderr", source(cell)
        assert not any("Warning" in text for text in texts(cell)), source(cell)


@each
def test_clean_for_committing(path: Path) -> None:
    notebook = read(path)
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids), "two cells have one id"
    for cell in notebook["cells"]:
        assert set(cell["metadata"]) <= {"tags", "alt"}
        pictures = [
            kind for one in cell.get("outputs", []) for kind in one.get("data", {}) if kind.startswith("image/")
        ]
        assert not pictures or cell["metadata"].get("alt"), f"a picture without a text in its place:\n{source(cell)}"
    stored = json.dumps([[source(cell), cell.get("outputs", [])] for cell in notebook["cells"]])
    assert not re.search(
        r"(?<![\w.:/])/(?:home|root|work|tmp|Users|usr|opt)/", re.sub(r'"image/png": "[^"]*"', "", stored)
    )
    assert "widget-view" not in stored


@each
def test_figures_are_stored(path: Path) -> None:
    for cell in code_cells(path):
        if "plt.show()" in source(cell):
            kinds = [kind for output in cell["outputs"] for kind in output.get("data", {})]
            assert "image/png" in kinds, f"this cell shows a figure, and none is stored: {source(cell)}"


@each
def test_drawn_in_the_style_of_the_project(path: Path) -> None:
    code = "\n".join(source(cell) for cell in code_cells(path))
    if "save_figure(" in code:
        assert "plots.use_style()" in code
    assert "plots.save(" not in code


@each
def test_no_placeholder(path: Path) -> None:
    text = "\n".join(source(cell) for cell in read(path)["cells"])
    for word in ("OWNER", "TODO", "FIXME", "XXX"):
        assert word not in text


@each
def test_the_opener_states_the_minutes_in_the_form_that_is_kept_up_to_date(path: Path) -> None:
    assert re.search(restate.OPENER, source(read(path)["cells"][0])), "see CONTRIBUTING.md"


@each
def test_no_raw_repr_and_no_wall_of_output(path: Path) -> None:
    for cell in code_cells(path):
        for text in texts(cell):
            assert not re.search(r"<\w[\w.]* (?:object )?at 0x", text), source(cell)
            assert text.count("\n") <= 60, source(cell)


@each
def test_opener_and_closer(path: Path) -> None:
    prose = [source(cell) for cell in read(path)["cells"] if cell["cell_type"] == "markdown"]
    opener, everything = prose[0], "\n".join(prose)
    assert re.match(rf"# {path.name[:2]}\b", opener)
    if path.name[:2] != "00":
        for part in ("able to", "need", "figure to come"):
            assert part in opener.lower(), f"the opener lacks {part!r}"
        for part in ("## What was shown", "Limits", "## Questions", "Next"):
            assert part.lower() in everything.lower(), f"the closer lacks {part!r}"


def test_the_core_of_08_is_read_in_twenty_minutes_or_so() -> None:
    cells = read(ROOT / "notebooks" / "08_exact_posterior.ipynb")["cells"]
    end = next(i for i, cell in enumerate(cells) if "**Here the core ends.**" in source(cell))
    marked = [i for i, cell in enumerate(cells) if "*Core, " in source(cell)]
    assert len(marked) == 3 and max(marked) < end
    assert restate.reading_minutes(cells[: end + 1]) <= 22
    shown = {**cells[-1], "source": source(cells[-1]).partition("## Questions")[0]}
    assert f"the answer, in {restate.reading_minutes([*cells[: end + 1], shown])} minutes" in source(cells[0])


@each
def test_rhythm(path: Path) -> None:
    cells = [cell for cell in read(path)["cells"] if source(cell).strip()]
    lengths, run = [], 0
    for cell in cells:
        run = run + 1 if cell["cell_type"] == "code" else 0
        assert run <= 2, f"three code cells in a row, the last: {source(cell)}"
        if cell["cell_type"] == "code":
            length = len([line for line in source(cell).splitlines() if line.strip()])
            assert length <= (40 if "\nclass " in "\n" + source(cell) else 25), source(cell)
            lengths.append(length)
    assert statistics.median(lengths) <= 8


@each
def test_links_resolve(path: Path) -> None:
    for cell in read(path)["cells"]:
        if cell["cell_type"] == "markdown":
            for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", source(cell)):
                if not re.match(r"https?:|attachment:|data:", target):
                    assert (path.parent / target).exists(), f"{path.stem} links to {target}, which is not there"


@each
def test_maths_has_no_macros(path: Path) -> None:
    prose = "\n".join(source(cell) for cell in read(path)["cells"] if cell["cell_type"] == "markdown")
    for macro in (r"\newcommand", r"\def", r"\gdef", r"\eqref", r"\require"):
        assert not re.search(re.escape(macro) + r"(?![a-zA-Z])", prose), macro


@each
def test_checked_outputs(path: Path) -> None:
    printed = [cell for cell in code_cells(path) if any(out["output_type"] == "stream" for out in cell["outputs"])]
    checked = [cell for cell in printed if "nbval-check-output" in tags(cell)]
    trains = any("train_or_load(" in source(cell) for cell in code_cells(path))  # on data, at a budget
    if path.name[:2] in CHECKED or (path.name[0] == "D" and not trains):
        assert len(checked) >= 0.7 * len(printed)
    for cell in code_cells(path):
        if "nbval-check-output" in tags(cell):
            text = "".join(texts(cell))
            assert text.strip() not in ("", "True", "False"), source(cell)
            assert not re.search(r"\d\.\d{8,}", text), f"raw digits in a checked cell: {text}"


@each
def test_the_folded_solution_passes_the_readers_check(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turn = next((source(cell) for cell in code_cells(path) if "checks.your_turn(" in source(cell)), None)
    if turn is None:
        pytest.skip("no checks.your_turn in this notebook")
    names: dict[str, object] = {}
    for cell in code_cells(path):  # what a solution may use: imports and functions, no results
        kept = [
            node
            for node in ast.parse(source(cell)).body
            if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef)
        ]
        exec(compile(ast.Module(kept, []), path.stem, "exec"), names)
    prose = "\n".join(source(cell) for cell in read(path)["cells"] if cell["cell_type"] == "markdown")
    [solution] = re.findall(r"<summary>Solution</summary>.*?```python\n(.*?)```", prose, flags=re.S)
    checked = [node for node in ast.parse(turn).body if not isinstance(node, ast.FunctionDef)]
    torch.set_default_dtype(torch.float64)
    try:
        exec(compile(solution, path.stem, "exec"), names)
        exec(compile(ast.Module(checked, []), path.stem, "exec"), names)
    finally:
        torch.set_default_dtype(torch.float32)
    assert ": right: largest difference below" in capsys.readouterr().out


@each
def test_every_saved_figure_is_in_the_gallery(path: Path) -> None:
    gallery = (ROOT / "figures" / "README.md").read_text(encoding="utf-8")
    for cell in code_cells(path):
        for stem in re.findall(SAVED, source(cell)):
            assert stem.startswith(path.name[:2] + "_"), f"{stem} is saved by {path.stem}"
            files = [ROOT / "figures" / f"{stem}{suffix}" for suffix in (".png", ".gif")]
            assert any(file.is_file() for file in files), f"{stem} is missing from figures/"
            assert stem in gallery, f"{stem} is missing from figures/README.md"


def test_no_figure_is_an_orphan() -> None:
    saved = {stem for path in NOTEBOOKS for cell in code_cells(path) for stem in re.findall(SAVED, source(cell))}
    committed = {path.stem for path in (ROOT / "figures").iterdir() if path.suffix in (".png", ".gif")}
    assert committed == saved
