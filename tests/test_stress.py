"""Kills, faults and hostile files: whatever happens, one clear line, a documented exit code, and nothing lost.

A sample runs in `make test`; `make stress` runs all, at the counts that tests/stress.py sets. Each process is forked
from this one, works in a folder of its own, and is ended by its id. What must not be trusted runs as an unprivileged
user, and a full disk is a limit on the size of a file.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from planar_helpers import sweep
from planar_helpers.data import Images, load_images
from planar_helpers.run import replacing

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs fork, signals and limits as Linux has them"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
KILLS = int(os.environ.get("PLANAR_KILLS", "24"))
SEED = int(os.environ.get("PLANAR_STRESS_SEED", "0"))
FULL = "PLANAR_KILLS" in os.environ
NOBODY = 65534


def tally(row: str, count: int, note: str = "") -> None:
    """Add to a row of the table that tests/stress.py writes."""
    path = os.environ.get("PLANAR_TALLY")
    if path:
        with open(path, "a", encoding="utf-8") as lines:
            lines.write(json.dumps({"row": row, "count": count, "note": note}) + "\n")


# --- processes that come to an end ----------------------------------------------------------------------------------


class Ended(NamedTuple):
    """How a process ended: its exit code, or minus the signal that killed it, and what it printed."""

    code: int
    said: str


def forked(
    call: Callable[[], Any], kill_after: float | None = None, user: int | None = None, limit: int = 120
) -> Ended:
    """Run the call in a process of its own; kill it after so many seconds, or fail if it takes more than the limit."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
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
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        try:
            if kill_after is not None:
                time.sleep(kill_after)
                os.kill(pid, signal.SIGKILL)  # not yet waited for, so the id is still this child's
        finally:
            _, status = os.waitpid(pid, 0)
        said.seek(0)
        ended = Ended(os.waitstatus_to_exitcode(status), said.read())
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


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user can look into."""
    folder = Path(tempfile.mkdtemp(prefix="planar-stress-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def few() -> Images:
    images = load_images("digits")
    return images._replace(train=images.train[:240], test=images.test[:40])


@pytest.fixture
def small_sweep(few: Images, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Runs of sweep.py that take a fraction of a second, with their images loaded before any fork."""
    monkeypatch.setattr(sweep, "load_images", lambda name: few)
    sweep._images.cache_clear()
    sweep._images("digits", False, held_out=True), sweep._images("digits", False)
    yield
    sweep._images.cache_clear()


# --- kill -9 --------------------------------------------------------------------------------------------------------

KINDS = {"constant": {"epochs": 12}, "cosine": {"epochs": 7, "schedule": "cosine"}}


def settings_of(kind: str) -> sweep.Settings:
    lists = {"data": "digits", "hidden": 8, "K": 1, **KINDS[kind]}
    return sweep.combinations({name: [value] for name, value in lists.items()})[0]


def life(folder: Path, kind: str) -> Callable[[], None]:
    """One start of the command that trains a run and writes its JSON, with all its files in the folder."""

    def start() -> None:
        os.environ["PLANAR_RUNS"], os.environ["PLANAR_RESULTS"] = str(folder / "runs"), str(folder / "results")
        sweep.run(settings_of(kind))

    return start


def bits(value: Any) -> Any:
    """The value with each tensor as its bytes: two states are equal if these are."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()
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


def killed_at(start: Callable[[], None], folder: Path, number: int) -> Callable[[], None]:
    def call() -> None:
        on_each_write(folder, lambda count: die() if count == number else None)
        start()

    return call


def killed_half_way(start: Callable[[], None], number: int) -> Callable[[], None]:
    """Die when half of the so manieth file's content is written."""

    def call() -> None:
        write, left = Path.write_bytes, [number]

        def half(path: Path, content: bytes) -> int:
            left[0] -= 1
            if left[0] == 0:
                write(path, content[: len(content) // 2])
                die()
            return write(path, content)

        Path.write_bytes = half  # type: ignore[assignment,method-assign]
        start()

    return call


def leftovers(found: dict[str, Any]) -> list[str]:
    return [name for name in found if Path(name).name.startswith(".")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_any_moment_ends_in_the_same_bytes(small_sweep: None, tmp_path: Path, kind: str) -> None:
    start, reference = life(tmp_path / "reference", kind), tmp_path / "reference"
    counts = tmp_path / "counts"

    def counted() -> None:
        on_each_write(reference, lambda count: counts.write_text(str(count)))
        start()

    begin = time.monotonic()
    ended = forked(counted)
    assert ended.code == 0, ended.said
    seconds, writes = time.monotonic() - begin, int(counts.read_text())
    expected = files(reference)
    assert not leftovers(expected) and writes > 5 * KINDS[kind]["epochs"]

    generator = random.Random(f"{SEED}, {kind}")
    epochs = KINDS[kind]["epochs"]
    moments = [("at write", n) for n in range(1, writes + 1)] + [("half-way", n) for n in range(1, epochs + 1)]
    if not FULL:
        moments = generator.sample(moments, KILLS // 4) + [("at write", writes), ("at write", writes - 1)]
    moments += [("after", 0)] * max((KILLS // 2 - len(moments)) // 2, 2)
    killed = 0
    for number, (how, when) in enumerate(moments):
        folder = tmp_path / f"life {number}"
        start, deaths = life(folder, kind), 0
        while True:
            if deaths == 3 or (how != "after" and deaths):
                ended = forked(start)
            elif how == "after":
                ended = forked(start, kill_after=generator.uniform(0, seconds))
            else:
                ended = forked(killed_at(start, folder, when) if how == "at write" else killed_half_way(start, when))
            if ended.code == 0:
                break
            assert ended.code == -signal.SIGKILL, ended.said
            deaths += 1
        found = files(folder)
        assert len(leftovers(found)) <= deaths
        whole = {name: content for name, content in found.items() if name not in leftovers(found)}
        assert whole.keys() == expected.keys(), f"life {number}: {sorted(whole)}"
        assert whole == expected, f"life {number}: {[name for name in whole if whole[name] != expected[name]]}"
        for name in leftovers(found):  # they go with the first write a day later
            os.utime(folder / name, (time.time() - 2 * 86400,) * 2)
            with replacing((folder / name).with_name("another")) as temporary:
                temporary.touch()
            assert not (folder / name).exists()
        killed += deaths
        shutil.rmtree(folder)
    assert killed >= len([how for how, _ in moments if how != "after"])
    tally("kill −9 survived, training and sweep, forked", killed, f"seed {SEED}, {kind}: {writes} writes")
