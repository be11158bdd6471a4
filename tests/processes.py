"""What the tests of kills and faults share: processes that come to an end, and folders compared bit for bit."""

import os
import runpy
import secrets
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nbclient  # noqa: F401  (loaded once, before any fork)
import nbformat
import torch

ROOT = Path(__file__).resolve().parent.parent
MARK = "PLANAR_TEST_LIFE"  # in the environment of every process of a life


class Ended(NamedTuple):
    """How a process ended: its exit code, or minus the signal that killed it, and what it printed."""

    code: int
    said: str


def forked(
    call: Callable[[], Any], kill_after: float | None = None, user: int | None = None, limit: int = 120
) -> Ended:
    """Run the call in a process of its own; kill it after so many seconds, or fail if it takes more than the limit."""
    read, write = os.pipe()  # no file: its size may be limited
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.close(read)
            os.dup2(write, 1)
            os.dup2(write, 2)
            sys.stdout, sys.stderr = open(1, "w", 1, closefd=False), open(2, "w", 1, closefd=False)
            signal.alarm(limit)
            torch.set_num_threads(1)
            if user is not None and os.geteuid() == 0:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            call()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:  # noqa: BLE001  (a child says whatever ends it)
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)  # never back into the tests of the parent
    os.close(write)
    try:
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)  # not yet waited for, so the id is still this child's
        with open(read, encoding="utf-8", errors="replace") as said:
            text = said.read()
    finally:
        _, status = os.waitpid(pid, 0)
    ended = Ended(os.waitstatus_to_exitcode(status), text)
    assert ended.code != -signal.SIGALRM, f"took more than {limit} seconds\n{ended.said}"
    return ended


def on_each_write(folder: Path, do: Callable[[int], None]) -> None:
    """From here on call `do` with a running number before anything in the folder is made, changed or removed."""
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event == "open":
            writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            writes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "os.chmod")
        if writes and str(folder) in str(args[0]):
            count += 1
            do(count)

    sys.addaudithook(hook)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def bits(value: Any) -> Any:
    """The value with each tensor as its bytes: two states are equal if these are."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.detach().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {name: bits(part) for name, part in value.items()}
    return [bits(part) for part in value] if isinstance(value, list | tuple) else value


def files(folder: Path) -> dict[str, Any]:
    """All files by name: of a checkpoint what is in it, since its pickle's memo knows which strings were one object."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): bits(torch.load(path, weights_only=True))
        if path.suffix in (".pt", ".unfinished") and not path.name.startswith(".")
        else path.read_bytes()
        for path in paths
    }


def leftovers(found: dict[str, Any]) -> list[str]:
    return [name for name in found if Path(name).name.startswith(".")]


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


def live(
    start: Callable[[], Any],
    base: Path,
    die_at: int = 0,
    end_at: int | None = None,
    look: Callable[[set[int]], Any] | None = None,
    limit: float = 600,
) -> Life:
    """Run `start` in a process of its own, its files under base/home.

    The process that makes the write number `die_at` dies; the one that was started is killed after the write number
    `end_at`. `look` sees the ids of all processes, again and again. Fails if it takes longer than the limit, or if a
    process is left a minute after its end.
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
            if look is not None:
                look({pid, *of_life(mark)})
            time.sleep(0.01 if look is None else 0.2)
        pid, status = 0, ended[1]
        begin = time.monotonic()
        while left := of_life(mark):
            assert time.monotonic() < begin + 60, f"left behind: {left}"
            time.sleep(0.1)
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for left in of_life(mark):
            os.kill(left, signal.SIGKILL)
    return Life(os.waitstatus_to_exitcode(status), output.read_text(errors="replace"), log.stat().st_size)


def checkout(root: Path, series: dict[str, tuple[str, ...]]) -> Path:
    """Copy what runs notebooks to `root`, with a series of its own: each name's cells of code."""
    shutil.copytree(ROOT / "planar_helpers", root / "planar_helpers", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "notebooks").mkdir()
    for path in (ROOT / "notebooks").glob("*.py"):
        shutil.copy(path, root / "notebooks")
    for name, cells in series.items():
        made = nbformat.v4.new_notebook()
        made.cells = [nbformat.v4.new_code_cell(text.strip(), id=f"c{i}") for i, text in enumerate(cells)]
        nbformat.write(made, root / "notebooks" / f"{name}.ipynb")
    return root


def figures(root: Path, *words: str) -> Callable[[], None]:
    """What `make figures` calls."""

    def start() -> None:
        for name in ("restate", "stored"):
            sys.modules.pop(name, None)  # another checkout's
        sys.argv = ["execute.py", "--jobs", "2", *words]
        runpy.run_path(str(root / "notebooks" / "execute.py"), run_name="__main__")

    return start
