"""What the commands do: notebooks run in surroundings of their own, copies for the lab, paths with a blank in them."""

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "notebooks")]
import execute  # noqa: E402  (scripts, not a package)
import lab  # noqa: E402
import restate  # noqa: E402
from processes import checkout  # noqa: E402

from planar_helpers import data  # noqa: E402

IMPORTS = (
    "import os, sys, planar_helpers\nimport matplotlib.pyplot as plt\nfrom planar_helpers import plots, results, run"
)
FIGURE = "fig, ax = plt.subplots()\nax.plot([0, 1])\nresults.save_figure(fig, '01_line')\nplt.show()"
WHERE = (
    "print(planar_helpers.__file__)\nprint(sys.executable, os.environ['OMP_NUM_THREADS'], os.environ['PLANAR_RUNS'])\n"
    "print(open('../encoded.txt').read(), end='')"
)
NUMBERS = "results.save_numbers('01_n', {'a': (1.5, 0.1), 'b': (2.0, 0.1)}, None)"


def notebook(*cells: str, figures: int = 0, alt: str = "") -> nbformat.NotebookNode:
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# one")])
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "x", "language": "python"}
    for text in cells:
        made.cells.append(nbformat.v4.new_code_cell(text, metadata={"collapsed": True, "tags": ["a"]}))
    picture = nbformat.v4.new_output("display_data", data={"image/png": "aa"})
    made.cells[-1].outputs = [picture] * figures
    if alt:
        made.cells[-1].metadata["alt"] = alt
    return made


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """A checkout in a folder with a blank, run under a user's settings that would spoil it."""
    base = tmp_path_factory.mktemp("base")
    root, home = base / "my course" / "plän", base / "home"
    (root / "notebooks").mkdir(parents=True)
    shutil.copytree(ROOT / "planar_helpers", root / "planar_helpers", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    for path in (ROOT / "notebooks").glob("*.py"):
        shutil.copy(path, root / "notebooks")
    (root / "encoded.txt").write_text("û ≥ −1", encoding="utf-8")
    for name, made in {
        "01_line": notebook(IMPORTS, NUMBERS, WHERE, FIGURE, figures=1, alt="a line"),
        "02_lost": notebook("print(1)", figures=1),
        "03_fails": notebook("1 / 0"),
    }.items():
        nbformat.write(made, root / "notebooks" / f"{name}.ipynb")
    stored = {"numbers": {name: {"value": value, "tolerance": 0.1} for name, value in (("a", 1.0), ("b", 2.05))}}
    (root / "figures" / "results").mkdir(parents=True)
    (root / "figures" / "results" / "01_n.json").write_text(json.dumps(stored), encoding="utf-8")
    kernel = home / ".local" / "share" / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    foreign = {"argv": ["/bin/false", "{connection_file}"], "display_name": "another", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(foreign), encoding="utf-8")
    (home / "matplotlibrc").write_text("savefig.format: svg\n", encoding="utf-8")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PLANAR_")},
        "HOME": str(home), "JUPYTER_PATH": str(kernel.parent.parent), "JUPYTER_PREFER_ENV_PATH": "0",
        "MPLBACKEND": "Agg", "MATPLOTLIBRC": str(home / "matplotlibrc"), "PYTHONIOENCODING": "ascii", "LC_ALL": "C",
        "PLANAR_BUDGET": "full", "PLANAR_RUNS": "my runs",
    }  # fmt: skip
    command = [sys.executable, "notebooks/execute.py", "--jobs", "2"]
    return root, subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def stored(root: Path, name: str) -> nbformat.NotebookNode:
    return nbformat.read(root / "build" / "notebooks" / f"{name}.ipynb", as_version=4)


def test_a_notebook_runs_under_this_interpreter_with_the_package_beside_it(course) -> None:
    root, done = course
    text = stored(root, "01_line").cells[3].outputs[0].text.splitlines()
    assert Path(text[0]) == root / "planar_helpers" / "__init__.py"
    assert text[1] == f"{sys.executable} 1 {root / 'my runs'}", "one thread, and folders as absolute paths"
    assert text[2] == "û ≥ −1"


def test_figures_are_shown_and_saved_whatever_the_backend(course) -> None:
    root, done = course
    cell = stored(root, "01_line").cells[4]
    (output,) = [output for output in cell.outputs if "image/png" in output.get("data", {})]
    assert output.metadata["image/png"]["alt"] == "a line"
    assert cell.metadata == {"tags": ["a"], "alt": "a line"}, "alt and tags stay, the rest goes"
    assert (root / "figures" / "01_line.png").read_bytes().startswith(b"\x89PNG")


def test_failures_lost_figures_and_missed_numbers_are_told_and_fail_the_command(course) -> None:
    root, done = course
    assert done.returncode == 1
    assert "03_fails failed" in done.stderr and "ZeroDivisionError" in done.stdout
    assert "02_lost.ipynb holds 1 figures and this run gave 0" in done.stderr
    assert "1 stored numbers missed their tolerance" in done.stderr
    assert "2 of 2 stored numbers made again, 1 outside" in done.stdout and "01_n: a: 1.5 now" in done.stdout
    assert "done in" in done.stdout and "1 of 3 notebooks" in done.stdout
    written = {path.name for path in (root / "build" / "notebooks").iterdir()}
    assert written == {"01_line.ipynb"}, "only what ran to its end is written"


DIES = """
import os, sys
if "ipykernel_launcher" in sys.orig_argv:
    with open(os.environ["BORN"], "a") as born:
        born.write("x")
    if os.path.getsize(os.environ["BORN"]) == 2:
        os._exit(1)
"""


def test_a_kernel_that_dies_before_its_first_answer_or_later_fails_its_notebook_alone(tmp_path: Path) -> None:
    root = checkout(
        tmp_path / "course", {"01_runs": ("print(1)",), "02_stillborn": ("1",), "03_dies": ("import os\nos._exit(1)",)}
    )
    (tmp_path / "sitecustomize.py").write_text(DIES, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "BORN": str(tmp_path / "born")}
    command = [sys.executable, str(root / "notebooks" / "execute.py"), "--jobs", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.split("\n")[:2] == ["02_stillborn failed", "03_dies failed"], done
    assert done.stdout.count("Kernel died") == 2 and "Traceback" not in done.stdout + done.stderr, done
    assert "1 of 3 notebooks" in done.stdout


def test_progress_is_told_notebook_by_notebook_and_cell_by_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (False, True):
        out = io.StringIO()
        out.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr(sys, "stdout", out)
        progress = execute.Progress(2)
        one, two = progress.begin("01_a"), progress.begin("02_b")
        progress.say(one, "cell 3 of 9")
        progress.say(two, "5 s", last=True)
        progress.say(one, "7 s", last=True)
        lines = out.getvalue().splitlines()
        assert one == "[1/2] 01_a" and two == "[2/2] 02_b"
        if terminal:
            assert any(line.endswith("[1/2] 01_a: cell 3 of 9") for line in lines) and progress.lines == {}
        else:
            assert lines == ["[1/2] 01_a: starts", "[2/2] 02_b: starts", "[2/2] 02_b: 5 s", "[1/2] 01_a: 7 s"]


def test_unknown_notebooks_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["77"], ["01,77"], ["01", "--jobs", "0"]):
        monkeypatch.setattr(sys, "argv", ["execute.py", *words])
        with pytest.raises(SystemExit):
            execute.main()
        assert "names must be of notebooks" in capsys.readouterr().err


def configured(*args: str, nbval: bool = False, lax: bool = False) -> SimpleNamespace:
    """What pytest would hand to the notebooks' conftest."""
    options = {"nbval": nbval or lax, "nbval_lax": lax}
    return SimpleNamespace(args=args, getoption=options.get, option=SimpleNamespace())


def test_pytest_says_how_notebooks_are_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("notebooks_conftest", ROOT / "notebooks" / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    for cwd, args, nbval in (
        (ROOT, ["notebooks"], False), (ROOT / "notebooks", ["."], False), (ROOT, ["notebooks"], True),
        (ROOT, ["notebooks/01_x.ipynb::Cell 1"], False),
    ):  # fmt: skip
        monkeypatch.chdir(cwd)
        with pytest.raises(pytest.UsageError, match="--nbval-lax"):
            conftest.pytest_configure(configured(*args, nbval=nbval))
    monkeypatch.chdir(ROOT)
    for asked in (
        configured(),
        configured("tests", "planar_helpers"),
        configured("."),
        configured("tests", "notebooks"),
    ):
        conftest.pytest_configure(asked)
    lax = configured("notebooks", lax=True)
    conftest.pytest_configure(lax)
    assert lax.option.nbval_current_env


def test_pytest_of_the_whole_folder_collects_the_tests_and_no_script(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns("[0-9]*", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("tests/conftest", "tests/test_one", "planar_helpers/run", "build/test_copy", "my_notebooks/test_mine"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text('"""One.\n\n>>> 1\n1\n"""\n\n\ndef test_one() -> None:\n    pass\n', encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "tests/test_one.py::test_one" in done.stdout and "planar_helpers/run.py::" in done.stdout
    assert not any(folder in done.stdout for folder in ("notebooks/", "build/"))
    refused = subprocess.run([*command[:3], "notebooks"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 4 and "--nbval-lax" in refused.stderr


def test_copies_for_the_lab_are_updated_until_they_are_edited(tmp_path: Path) -> None:
    source, mine = tmp_path / "notebooks", tmp_path / "my_notebooks"
    (source / "deeper").mkdir(parents=True)
    for name in ("01_a", "02_b", "deeper/D1_c"):
        (source / f"{name}.ipynb").write_text("old", encoding="utf-8")
    assert lab.copy_notebooks(source, mine) == []
    (mine / "01_a.ipynb").write_text("my own", encoding="utf-8")
    (mine / "03_mine.ipynb").write_text("mine", encoding="utf-8")
    assert lab.copy_notebooks(source, mine) == [], "an edited copy whose original stays is nothing to talk about"
    for name in ("01_a", "02_b"):
        (source / f"{name}.ipynb").write_text("new", encoding="utf-8")
    assert lab.copy_notebooks(source, mine) == ["01_a.ipynb"]
    read = {path.relative_to(mine).as_posix(): path.read_text(encoding="utf-8") for path in mine.rglob("*.ipynb")}
    assert read == {"01_a.ipynb": "my own", "02_b.ipynb": "new", "deeper/D1_c.ipynb": "old", "03_mine.ipynb": "mine"}
    (mine / "01_a.ipynb").unlink()
    assert lab.copy_notebooks(source, mine) == [] and (mine / "01_a.ipynb").read_text(encoding="utf-8") == "new"
    (mine / ".copied.json").unlink()
    (source / "02_b.ipynb").write_text("newer", encoding="utf-8")
    assert lab.copy_notebooks(source, mine) and (mine / "02_b.ipynb").read_text(encoding="utf-8") == "new", (
        "in doubt, theirs"
    )


def test_the_lab_opens_a_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called = {}

    class Server:
        def __init__(self, command: list[str], env: dict[str, str], cwd: Path) -> None:
            called.update(command=command, env=env, cwd=cwd, waits=0)

        def terminate(self) -> None:
            called["terminated"] = True

        def wait(self) -> int:
            called["waits"] += 1
            if called["waits"] == 1:
                raise KeyboardInterrupt  # JupyterLab got it, too, and asks what to do
            signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)
            return 0

    monkeypatch.setattr(lab, "MINE", tmp_path)
    monkeypatch.setattr(lab.subprocess, "Popen", Server)
    monkeypatch.setattr(sys, "argv", ["lab.py"])
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.delenv("PLANAR_FIGURES")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert lab.main() == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert called["waits"] == 2 and called["terminated"]
    assert called["command"][-1] == str(tmp_path / "00_start_here.ipynb") and Path(called["command"][-1]).is_file()
    assert "MPLBACKEND" not in called["env"] and called["cwd"] == ROOT
    assert Path(called["env"]["PLANAR_FIGURES"]) == ROOT / "build" / "my_figures", "never into the gallery"


def test_the_lab_says_that_a_read_only_checkout_takes_no_copies(
    monkeypatch: pytest.MonkeyPatch, tmp_path, capsys
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setattr(lab, "MINE", tmp_path / "a file")
    assert lab.main() == 1 and "my_notebooks/ cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(("name", "wrong"), [("digits", []), ("MNIST", []), ("MNIST", ["a number missed"])])
def test_in_place_is_for_mnist_and_records_minutes_only_when_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, wrong: list[str], recorded: bool
) -> None:
    done = []
    monkeypatch.setattr(data, "load_images", lambda: SimpleNamespace(name=name))
    monkeypatch.setattr(
        execute, "execute_all", lambda *_: done.append("run") or ({"01_change_of_variables": 0.2}, wrong)
    )
    monkeypatch.setattr(restate, "record", lambda *_: done.append("record"))
    monkeypatch.setattr(restate, "main", lambda _: done.append("restate"))
    monkeypatch.setenv("PLANAR_BUDGET", "full")
    monkeypatch.setattr(sys, "argv", ["execute.py", "--in-place", "01", *["--record"] * recorded])
    code, lines = execute.main(), capsys.readouterr().err.splitlines()
    if name == "digits":
        assert code == 2 and done == [] and len(lines) == 1 and lines[0].startswith("MNIST is needed in place")
    else:
        assert code == len(wrong) and done == ["run", *["record"] * recorded, "restate"] and lines == wrong


@pytest.fixture()
def stubs(tmp_path: Path) -> Path:
    """A folder with a blank in its path: the Makefile, an environment, and tools that only note how they are called."""
    root = tmp_path / "my course"
    tools = root / "my env" / "bin"
    tools.mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root)
    for tool in ("python", "ruff"):
        note = f'#!/bin/sh\n{{ printf "{tool}"; for a; do printf "|%s" "$a"; done; '
        note += 'echo "|$PLANAR_BUDGET|$PLANAR_FIGURES|$OMP_NUM_THREADS|$MPLBACKEND$PYTHONPATH"; } >> "$NOTES"\n'
        (tools / tool).write_text(note, encoding="utf-8")
        (tools / tool).chmod(0o755)
    (root / "my env" / ".installed").touch()
    return root


def make(root: Path, *words: str) -> list[str]:
    """The calls that make passes on, from a folder with a blank, under a user's own backend and search path."""
    notes = root / "notes.txt"
    its_own = re.findall(r"^(\w+) \?=", (root / "Makefile").read_text(encoding="utf-8"), re.M)  # of an outer make's
    assert "BUILD" in its_own
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PLANAR_", "MAKE")) and name not in its_own
    }
    environment |= {"NOTES": str(notes), "MPLBACKEND": "Agg", "PYTHONPATH": "elsewhere"}
    done = subprocess.run(["make", "VENV=my env", *words], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return notes.read_text(encoding="utf-8").splitlines()


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_passes_a_path_with_a_blank_and_what_was_asked_for(stubs: Path) -> None:
    calls = make(stubs, "test")
    assert [call.split("|")[0] for call in calls] == ["ruff", "ruff", "python", "python", "python"]
    assert "|-m|mypy|" in calls[2] and "|tests|planar_helpers|" in calls[3]
    assert (
        calls[4].endswith(f"|notebooks|quick|{stubs}/build/test-figures|1|")
        and "|--nbval-lax|--nbval-current-env|" in calls[4]
    )
    assert all(call.endswith("|1|") for call in calls[2:]), "one thread; no backend and no search path of the user's"
    moved = make(stubs, "test", "BUILD=else where")[5:]
    assert "|--cache-dir=else where/mypy|" in moved[2] and "|else where/test-figures|" in moved[4]
    assert not {"build", ".hypothesis", ".mypy_cache"} & {path.name for path in stubs.iterdir()}
    (call,) = make(stubs, "figures", "ONLY=08", "BUDGET=full", "JOBS=3")[10:]
    assert call.startswith("python|notebooks/execute.py|--jobs|3|08|full|")
    assert make(stubs, "notebooks")[11].startswith("python|notebooks/execute.py|--in-place|--jobs|2|full|")


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_clean_leaves_my_notebooks(stubs: Path) -> None:
    for name in ("my_notebooks", "build", "runs", "data"):
        (stubs / name).mkdir()
    subprocess.run(["make", "clean", "VENV=my env"], cwd=stubs, check=True, capture_output=True)
    left = {path.name for path in stubs.iterdir()}
    assert {"my_notebooks", "data"} <= left and not left & {"build", "runs", "my env"}


def test_the_scripts_say_what_is_out_of_date(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    stale = tmp_path / "README.md"
    stale.write_text("<!-- numbers from 07_x, in this order: a -->\nIt is 1.0.\n", encoding="utf-8")
    monkeypatch.setattr(restate, "READMES", (stale,))
    monkeypatch.setattr(restate, "ROOT", tmp_path)
    monkeypatch.setattr(restate, "HERE", tmp_path)
    (tmp_path / "figures" / "results").mkdir(parents=True)
    numbers = {"numbers": {"a": {"value": 2.04, "tolerance": 0.1}}}
    (tmp_path / "figures" / "results" / "07_x.json").write_text(json.dumps(numbers), encoding="utf-8")
    assert restate.main(["--check"]) == 1 and "out of date" in capsys.readouterr().out and "1.0" in stale.read_text()
    assert restate.main([]) == 0 and "It is 2.0.\n" in stale.read_text(encoding="utf-8")
    assert restate.main(["--check"]) == 0


def test_what_differs_from_run_to_run_is_dropped() -> None:
    made = notebook("print(1)", alt="a line")
    picture = nbformat.v4.new_output("display_data", data={"image/png": "aa"}, metadata={"image/png": {"width": 3}})
    widget = nbformat.v4.new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {}})
    streams = [nbformat.v4.new_output("stream", name=name, text="1") for name in ("stdout", "stderr")]
    made.cells[1].outputs = [*streams, widget, picture]
    execute.clean(made)
    assert made.metadata == {"kernelspec": execute.KERNEL, "language_info": {"name": "python"}}
    assert made.cells[1].metadata == {"tags": ["a"], "alt": "a line"} and made.cells[0].metadata == {}
    assert [output.get("name", "picture") for output in made.cells[1].outputs] == ["stdout", "picture"]
    assert made.cells[1].outputs[1].metadata == {"image/png": {"width": 3, "alt": "a line"}}
    assert execute.figures_in(made) == 1


def test_a_kernel_gets_surroundings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MPLBACKEND", "PYTHONWARNINGS", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("PYTHONPATH", "theirs")
    monkeypatch.setenv("PLANAR_DATA", "data here")
    given = execute.surroundings("folder")
    assert given["OMP_NUM_THREADS"] == given["MKL_NUM_THREADS"] == "1" and "PYTHONWARNINGS" not in given
    assert given["MPLBACKEND"].endswith("backend_inline") and given["IPYTHONDIR"] == "folder"
    assert given["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "theirs"]
    assert given["PLANAR_DATA"] == str(Path.cwd() / "data here")
