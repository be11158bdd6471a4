"""What the repository says of itself: environments agree, pointers resolve, the formula sheet is true."""

import ast
import importlib
import inspect
import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "planar_helpers").glob("*.py"))
CONDA_NAMES = {"matplotlib-base": "matplotlib", "pytorch": "torch"}


def headings(notebook: Path) -> set[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return {line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#")}


def test_environment_yml_and_pyproject_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = sorted(project["dependencies"] + project["optional-dependencies"]["test"])
    lines = re.findall(r"^  - (.+)$", (ROOT / "environment.yml").read_text(), re.MULTILINE)
    assert "pip:" in lines and "python=3.12" in lines and "conda-forge" in lines
    conda = [line for line in lines if line not in ("pip", "pip:", "conda-forge") and not line.startswith("python=")]
    renamed = [re.sub(r"^[a-z-]+(?=>)", lambda m: CONDA_NAMES.get(m[0], m[0]), line) for line in conda]
    assert sorted(renamed) == wanted


def test_constraints_record_a_version_that_the_project_admits() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for requirement in project["dependencies"] + project["optional-dependencies"]["test"]:
        name, least = requirement.split(">=")
        assert name in pinned, f"constraints.txt lacks {name}"
        found = [int(part) for part in re.findall(r"\d+", pinned[name])[:3]]
        assert found >= [int(part) for part in least.split(".")]


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


def test_dependencies_run_one_way() -> None:
    allowed = {
        "planar": set(), "elbo": set(), "run": set(), "data": set(), "targets": set(), "plots": {"run"},
        "vae": {"planar", "elbo"}, "evaluate": {"planar", "elbo", "vae", "targets"},
        "train": {"planar", "elbo", "vae", "run", "data"},
    }  # fmt: skip
    for path in PACKAGE:
        found = set(
            re.findall(r"^\s*from planar_helpers\.(\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE)
        )
        assert path.stem == "__init__" or found <= allowed[path.stem], f"{path.stem} imports {found}"


def test_no_module_outgrows_a_reading() -> None:
    total = 0
    for path in PACKAGE:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        lines = len([line for line in ast.unparse(tree).splitlines() if line.strip()])
        assert lines <= 200, f"{path.name} has {lines} lines of code"
        total += lines
    assert total <= 1000


def formula_sheet() -> list[list[str]]:
    cells = json.loads((ROOT / "notebooks" / "00_start_here.ipynb").read_text(encoding="utf-8"))["cells"]
    sheet = next(c for c in cells if c["cell_type"] == "markdown" and "formula sheet" in "".join(c["source"]).lower())
    rows = [
        line.strip().strip("|").split("|") for line in "".join(sheet["source"]).splitlines() if line.startswith("|")
    ]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_formula_sheet_names_functions_tests_and_notebooks_that_exist() -> None:
    rows = formula_sheet()
    assert len(rows) >= 12
    for row in rows:
        _, function, test, notebook = row
        for name in re.findall(r"`([\w.]+)`", function):
            module, *attributes = name.split(".")
            found = importlib.import_module(f"planar_helpers.{module}")
            for attribute in attributes:
                found = inspect.getattr_static(found, attribute)
        file, case = re.fullmatch(r"`(\w+)::(\w+)`", test).groups()
        assert f"def {case}(" in (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"), f"{test} is not there"
        (target,) = re.findall(r"\((\w+\.ipynb)\)", notebook)
        assert (ROOT / "notebooks" / target).is_file()


@pytest.mark.parametrize("name", ["README.md", "figures/README.md"])
def test_links_of_the_readmes_resolve(name: str) -> None:
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{name} links to {target}, which is not there"
