"""kill -9 where several processes are at work: `make figures`, a notebook's training, a sweep on two cores.

A life is killed at one of its writes, counted over all of its processes: the process that writes dies there, or the
one that was started dies about then. The others must end by themselves; the same command then gives the same bytes.
"""

import os
import random
import runpy
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nbclient  # noqa: F401  (loaded once, before any fork)
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "notebooks")]
import execute  # noqa: E402
from processes import files, leftovers  # noqa: E402

from planar_helpers import __main__ as command_line  # noqa: E402
from planar_helpers import sweep  # noqa: E402, F401
from planar_helpers.run import replacing  # noqa: E402

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs fork, signals and /proc as Linux has them"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
KILLS = int(os.environ.get("PLANAR_KILLS", "0")) // 12 or 2
SEED = int(os.environ.get("PLANAR_STRESS_SEED", "0"))
MARK = "PLANAR_TEST_LIFE"
Tally = Callable[[str, int, str], None]

# Python runs this at the start of each process of a life: a byte in a common file for each write, and death at one.
HOOK = """
import os, sys

folder, log, number = os.environ["LIFE_FOLDER"], os.environ["LIFE_LOG"], int(os.environ["LIFE_NUMBER"])
changes = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
common = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def hook(event, args):
    if event == "open":
        writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        writes = event in changes
    if writes and str(args[0]).startswith(folder):
        os.write(common, b"x")
        if os.lseek(common, 0, os.SEEK_CUR) == number:
            os.kill(os.getpid(), 9)

sys.addaudithook(hook)
"""


class Life(NamedTuple):
    """How a life ended: its exit code, or minus the signal, what it printed, and the writes of all its processes."""

    code: int
    said: str
    writes: int


def of_life(mark: str) -> set[int]:
    """The ids of all processes that were started with this mark in their environment."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.add(int(path.parent.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def live(start: Callable[[], Any], base: Path, die_at: int = 0, end_at: int | None = None, limit: float = 120) -> Life:
    """Run `start` in a process of its own, its files under base/home.

    The process that makes the write number `die_at` dies; the one that was started is killed after the write number
    `end_at`. Fails if it takes longer than the limit, or if a process is left 20 seconds after its end.
    """
    mark, home, log, output = secrets.token_hex(8), base / "home", base / "writes", base / "output"
    (base / "hook").mkdir(exist_ok=True)
    (base / "hook" / "sitecustomize.py").write_text(HOOK)
    (home / "tmp").mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.setsid()
            signal.alarm(int(limit) + 30)  # if nobody is left to watch it
            target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(target, 1), os.dup2(target, 2)
            sys.stdout, sys.stderr = open(1, "w", 1, closefd=False), open(2, "w", 1, closefd=False)
            os.environ |= {
                MARK: mark, "LIFE_FOLDER": str(home), "LIFE_LOG": str(log), "LIFE_NUMBER": str(die_at or -1),
                "PLANAR_RUNS": str(home / "runs"), "PLANAR_RESULTS": str(home / "results"),
                "PLANAR_FIGURES": str(home / "figures"), "TMPDIR": str(home / "tmp"), "IPYTHONDIR": str(home / "tmp"),
                "PYTHONPATH": f"{base / 'hook'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", "PLANAR_BUDGET": "quick",
            }  # fmt: skip
            tempfile.tempdir = None
            signal.signal(signal.SIGINT, signal.default_int_handler)
            exec(HOOK, {})
            start()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        except BaseException as error:  # noqa: BLE001  (a child says whatever ends it)
            os.write(2, f"Traceback: {error!r}".encode())
        finally:
            os._exit(code)
    begin, status = time.monotonic(), 0
    try:
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            assert time.monotonic() < begin + limit, f"took more than {limit} seconds\n{output.read_text()}"
            if end_at is not None and log.stat().st_size >= end_at:
                os.kill(pid, signal.SIGKILL)
                ended = os.waitpid(pid, 0)
                break
            time.sleep(0.01)
        pid, status = 0, ended[1]
        begin = time.monotonic()
        while left := of_life(mark):
            assert time.monotonic() < begin + 20, f"left behind: {left}"
            time.sleep(0.1)
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for left in of_life(mark):
            os.kill(left, signal.SIGKILL)
    return Life(os.waitstatus_to_exitcode(status), output.read_text(errors="replace"), log.stat().st_size)


# --- what is killed -------------------------------------------------------------------------------------------------

TRAINS = """
from planar_helpers import data, results, train
images = data.load_images("digits")
images = images._replace(train=images.train[:240], test=images.test[:40])
model, history = train.train_or_load(images, 12, K=1, hidden=8)
"""
STORES = """
path = results.save_numbers("01_trained", {"ELBO": (history.test.elbo[-1].item(), 0.1)}, images.name)
"""
DRAWS = """
import matplotlib.pyplot as plt
fig, ax = plt.subplots()
ax.plot(history.test.elbo)
path = results.save_figure(fig, "01_trained")
plt.show()
"""
COUNTS = "print(sum(range(10)))"


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with a series of two notebooks: one trains, stores and draws."""
    root = tmp_path_factory.mktemp("course")
    shutil.copytree(ROOT / "planar_helpers", root / "planar_helpers", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "notebooks").mkdir()
    for path in (ROOT / "notebooks").glob("*.py"):
        shutil.copy(path, root / "notebooks")
    for name, cells in {"01_trained": (TRAINS, STORES, DRAWS), "02_counts": (COUNTS,)}.items():
        made = nbformat.v4.new_notebook()
        made.cells = [nbformat.v4.new_code_cell(text.strip(), id=f"c{i}") for i, text in enumerate(cells)]
        nbformat.write(made, root / "notebooks" / f"{name}.ipynb")
    return root


def figures(root: Path) -> Callable[[], None]:
    """What `make figures` calls."""

    def start() -> None:
        for name in ("restate", "stored"):
            sys.modules.pop(name, None)  # another checkout's
        sys.argv = ["execute.py", "--jobs", "2"]
        runpy.run_path(str(root / "notebooks" / "execute.py"), run_name="__main__")

    return start


def two_at_a_time() -> None:
    """A sweep of four runs in two processes."""
    command_line.stop_on_signals("planar")
    words = "sweep --data digits --hidden 8 --K 0,1 --seed 0,1 --epochs 3 --jobs 2"
    sys.exit(command_line.main(words.split()))


def whole(home: Path) -> dict[str, Any]:
    """All files but those with a temporary name."""
    found = files(home)
    return {name: content for name, content in found.items() if name not in leftovers(found) and "tmp/" not in name}


def kernels(home: Path) -> list[Path]:
    return [*(home / "tmp").glob("planar-kernel-*")]


def a_day_later(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that what killed processes left goes with the first write in its folder, or the first kernel."""
    left = [home / name for name in leftovers(files(home))]
    for path in [*left, *kernels(home)]:
        os.utime(path, (time.time() - 2 * 86400,) * 2)
    for folder in {path.parent for path in left}:
        with replacing(folder / "another") as temporary:
            temporary.touch()
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "tempdir", str(home / "tmp"))
        execute.clear_away()
    assert not leftovers(files(home)) and not kernels(home)


@pytest.mark.parametrize("what", ["make figures and its kernels", "a sweep in two processes"])
def test_all_processes_end_and_the_same_command_gives_the_same_bytes(
    course: Path, tmp_path: Path, what: str, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = figures(course) if what.startswith("make") else two_at_a_time
    (tmp_path / "reference").mkdir()
    reference = live(start, tmp_path / "reference")
    assert reference.code == 0, reference.said
    expected = whole(tmp_path / "reference" / "home")
    assert {Path(name).suffix for name in expected} >= {".json", ".pt"} and len(expected) > 5, sorted(expected)
    generator, begin = random.Random(f"{SEED}, {what}"), time.monotonic()
    killed = 0
    while killed < KILLS:
        base = tmp_path / f"life {killed}"
        base.mkdir()
        number = generator.randint(1, reference.writes)
        if killed % 2:
            ended = live(start, base, die_at=number)
        else:
            ended = live(start, base, end_at=number)
        print(number, killed % 2, ended)
        killed += ended.code != 0
        again = live(start, base)
        assert again.code == 0, again.said
        found = whole(base / "home")
        assert found.keys() == expected.keys(), (number, sorted(found))
        assert found == expected, [name for name in found if found[name] != expected[name]]
        a_day_later(base / "home", monkeypatch)
        shutil.rmtree(base)
    print(what, reference.writes, (time.monotonic() - begin) / KILLS, "s a kill")
    tally("kill −9 survived, several processes", killed, f"seed {SEED}, {what}: {reference.writes} writes")
