"""What the repository says of itself: environments agree, pointers resolve, the formula sheet is true."""

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "planar_helpers").glob("*.py"))
CONDA_NAMES = {"matplotlib-base": "matplotlib", "pytorch": "torch"}
PIP_NAMES = {"sklearn": "scikit-learn", "PIL": "pillow"}


def headings(notebook: Path) -> set[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return {line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#")}


def requirements() -> dict[str, list[str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {"": project["dependencies"], **project["optional-dependencies"]}


def test_environment_yml_and_pyproject_agree() -> None:
    wanted = sorted(requirements()[""] + requirements()["lab"] + requirements()["test"])
    lines = re.findall(r"^  - (.+)$", (ROOT / "environment.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert "pip:" in lines and "python=3.12" in lines and "conda-forge" in lines
    conda = [line for line in lines if line not in ("pip", "pip:", "conda-forge") and not line.startswith("python=")]
    renamed = [re.sub(r"^[a-z-]+(?=>)", lambda m: CONDA_NAMES.get(m[0], m[0]), line) for line in conda]
    assert sorted(renamed) == wanted


def test_constraints_record_a_version_that_the_project_admits() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", constraints, re.MULTILINE))
    for requirement in requirements()[""] + requirements()["lab"] + requirements()["test"]:
        name, least = requirement.split(">=")
        assert name in pinned, f"constraints.txt lacks {name}"
        found = [int(part) for part in re.findall(r"\d+", pinned[name])[:3]]
        assert found >= [int(part) for part in least.split(".")]


def imported(path: Path) -> set[str]:
    """The top names of all packages that a file imports, at its head or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"planar_helpers"}


def test_installing_brings_what_the_package_imports_and_no_more() -> None:
    names = {re.split("[<>=]", requirement)[0] for requirement in requirements()[""]}
    # the playground is for notebooks, whose extra brings anywidget (and traitlets with it)
    found = set().union(*(imported(path) for path in PACKAGE if path.stem != "playground"))
    assert names == {PIP_NAMES.get(name, name) for name in found} | {"pillow"}  # Matplotlib writes GIFs with pillow
    scripts = set().union(*map(imported, (ROOT / "notebooks").glob("*.py"))) - {"execute", "restate", "stored"}
    extras = {re.split("[<>=]", requirement)[0] for requirement in requirements()["lab"] + requirements()["test"]}
    assert {PIP_NAMES.get(name, name) for name in scripts} - names - extras <= {"jupyter_client"}  # nbclient's own
    assert not extras & names and "anywidget" in extras


def test_make_and_ci_call_the_same_commands() -> None:
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    assert "make PYTHON=python ${{ matrix.target }}" in workflow and "pip-audit" in workflow
    assert re.findall(r"target: \[?([\w-]+)", workflow) == ["test", "mutants", "stress", "browser", "book-test"]
    assert 'python: ["3.11", "3.12", "3.13", "3.14"]' in workflow
    for target in (
        "figures",
        "test",
        "lab",
        "notebooks",
        "readme",
        "sweep",
        "bench",
        "mutants",
        "stress",
        "versions",
        "book",
        "book-test",
        "browser",
        "assignments",
        "handout",
        "grade",
        "clean",
        "help",
    ):
        assert re.search(rf"^{target}:.*##", make, re.M), f"make help does not list {target}"
    assert "my_notebooks" not in re.search(r"^clean:.*\n(\t.*\n)+", make, re.M)[0].split("\n", 1)[1]
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert {"my_notebooks/", "/runs/", "/build/", "/data/", ".venv/"} <= set(ignored)


def test_every_public_name_has_annotations_and_a_docstring() -> None:
    for path in PACKAGE:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        public = [node for node in classes if not node.name.startswith("_")]
        for node in [*tree.body, *(member for owner in public for member in owner.body)]:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                exempt = ("self", "cls", "ctx")
                missing = [a.arg for a in node.args.args if a.annotation is None and a.arg not in exempt]
                assert not missing and node.returns is not None, f"{path.name}: {node.name} lacks annotations {missing}"


def test_derived_in_pointers_resolve() -> None:
    text = {path: " ".join(path.read_text(encoding="utf-8").split()) for path in PACKAGE}
    pointers = [
        (path.name, *match)
        for path, words in text.items()
        for match in re.findall(r'Derived in: notebooks/(\w+), section "([^"]+)"', words)
    ]
    assert len(pointers) == sum(words.count("Derived in:") for words in text.values()) > 10
    for module, stem, section in pointers:
        notebook = ROOT / "notebooks" / f"{stem}.ipynb"
        assert notebook.is_file(), f"{module} points to {stem}, which is not there"
        assert section in headings(notebook), f"{module} points to {section!r}, which {stem} lacks"


ALLOWED = {
    "planar": set(), "elbo": set(), "grid": set(), "targets": set(), "checks": set(), "run": set(), "download": {"run"},
    "vae": {"planar", "elbo"}, "quadrature": {"planar", "elbo", "grid", "vae"},
    "evaluate": {"planar", "elbo", "grid", "vae", "quadrature"},
    "data": {"run", "download"}, "results": {"run"}, "plots": {"grid", "results"},
    "checkpoint": {"planar", "elbo", "vae", "run", "data"},
    "train": {"planar", "elbo", "vae", "run", "data", "checkpoint"},
    "playground": {"planar"},
    "sweep": {"data", "evaluate", "quadrature", "run", "train", "vae"}, "__main__": {"sweep"},
}  # fmt: skip


def test_dependencies_run_one_way() -> None:
    for path in PACKAGE:
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "planar_helpers":
                found |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("planar_helpers."):
                found.add(node.module.split(".")[1])
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.stem} imports relatively"
            elif isinstance(node, ast.Import):
                assert not any(name.name.startswith("planar_helpers") for name in node.names), path.stem
        assert path.stem == "__init__" or found <= ALLOWED[path.stem], f"{path.stem} imports {found}"


def code_lines(path: Path) -> int:
    """Lines of code, without docstrings, comments and blank lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return len([line for line in ast.unparse(tree).splitlines() if line.strip()])


def test_no_module_outgrows_a_reading() -> None:
    lines = {path.stem: code_lines(path) for path in PACKAGE if path.stem not in ("checks", "playground")}
    assert max(lines.values()) <= 200, lines
    command_line = lines.pop("sweep") + lines.pop("__main__")  # not part of the reading: no notebook calls it
    assert command_line <= 200 and sum(lines.values()) <= 1500, lines


def test_contributing_fits_a_screen_and_states_the_limits() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 50
    for module in ALLOWED:
        assert f"`{module}`" in text, f"CONTRIBUTING.md says nothing of {module}"
    for word in (
        "200 lines",
        "1 500",
        "25 lines",
        "nbval-check-output",
        "raises-exception",
        "make notebooks",
        "mutants",
    ):
        assert word in text


def test_each_mutant_still_changes_one_place_that_is_there() -> None:
    """A text that was rewritten since would leave its guard untried."""
    entries = json.loads((ROOT / "tests" / "mutants.json").read_text(encoding="utf-8"))
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in {entry["file"] for entry in entries}}
    assert not [entry for entry in entries if entry["old"] and texts[entry["file"]].count(entry["old"]) != 1]
    assert len(entries) > 190 and all((ROOT / entry["tests"].split()[0]).is_file() for entry in entries)


def tracked() -> list[Path]:
    """Every text file of the project that is committed or would be."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True
    )
    if listed.returncode:
        pytest.skip("no git here")
    names = [name for name in listed.stdout.decode("utf-8").split("\0") if name]
    paths = [ROOT / name for name in names if not name.endswith((".png", ".gif", ".npz", ".ipynb"))]
    return [path for path in paths if path.is_file()]


def test_no_file_names_a_machine_or_a_placeholder() -> None:
    for path in tracked():
        text = path.read_text(encoding="utf-8")
        if path != Path(__file__).resolve():
            assert not re.search(r"(?<![\w.:/~*])/(?:home|root|work|Users)/", text), (
                f"{path.name} names a folder of a machine"
            )
            assert not re.search(r"\b(?:OWNER|FIXME|XXX)\b", text) or "test_notebooks" in path.name, path.name
        assert "\r" not in text and "\t" not in text.replace("\n\t", "\n") or path.name == "Makefile", path.name


def formula_sheet() -> tuple[list[list[str]], list[list[str]]]:
    """The rows of the two tables: number, notebook, equation; and number, functions and test."""
    cells = json.loads((ROOT / "notebooks" / "00_start_here.ipynb").read_text(encoding="utf-8"))["cells"]
    (sheet,) = ("".join(c["source"]) for c in cells if "".join(c["source"]).startswith("## Formula sheet"))
    tables = re.findall(r"(?:^\|.*\n)+", sheet, flags=re.M)
    rows = [
        [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()[2:]]
        for table in tables
    ]
    return rows[0], rows[1]


def test_the_formula_sheet_names_functions_tests_and_notebooks_that_exist() -> None:
    formulae, tests = formula_sheet()
    assert len(formulae) >= 12
    for number, (formula, tested) in enumerate(zip(formulae, tests, strict=True), 1):
        (one, notebook, _), (other, code) = formula, tested
        assert one == other == str(number), f"the sheet's two tables differ at {one} and {other}"
        functions, file, case = re.fullmatch(r"(.+); `(\w+)` `(\w+)`", code).groups()
        for name in re.findall(r"`([\w.]+)`", functions):
            module, *attributes = name.split(".")
            found = importlib.import_module(f"planar_helpers.{module}")
            for attribute in attributes:
                found = inspect.getattr_static(found, attribute)
        assert f"def {case}(" in (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"), f"{case} is not there"
        (target,) = re.findall(r"\((\w+\.ipynb)\)", notebook)
        assert (ROOT / "notebooks" / target).is_file()


@pytest.mark.parametrize(
    "name", ["README.md", "figures/README.md", "CONTRIBUTING.md", "notebooks/assignments/README.md"]
)
def test_links_of_the_readmes_resolve(name: str) -> None:
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{name} links to {target}, which is not there"


def test_the_readmes_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, flow = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    (tmp_path / "my_images").mkdir()
    for i in range(30):
        Image.effect_noise((40, 30), 60 + i).save(tmp_path / "my_images" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLANAR_RUNS", str(tmp_path / "runs"))
    found: dict[str, object] = {}
    exec(compile(own, "README.md", "exec"), found)
    assert len(found["mine"].train) == 27 and found["history"].test.elbo.isfinite().all()
    assert any((tmp_path / "runs").glob("K3-*.pt"))
    exec(compile(flow, "README.md", "exec"), found)
    assert found["kl"].shape == (64,) and all(found[name].grad.isfinite().all() for name in ("mu", "w", "u", "b"))
