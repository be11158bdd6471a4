"""Kills, faults and hostile files: whatever happens, one clear line, a documented exit code, and nothing lost.

A sample runs in `make test`; `make stress` runs all, at the counts that tests/stress.py sets. Each process is forked
from this one, works in a folder of its own, and is ended by its id. What must not be trusted runs as an unprivileged
user, and a full disk is a limit on the size of a file.
"""

import errno
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import joblib
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from processes import bits, die, files, forked, leftovers, on_each_write  # noqa: E402

from planar_helpers import __main__ as command_line  # noqa: E402
from planar_helpers import sweep, train  # noqa: E402
from planar_helpers.data import Images, load_images  # noqa: E402
from planar_helpers.run import replacing  # noqa: E402
from planar_helpers.train import fit, train_or_load  # noqa: E402
from planar_helpers.vae import PlanarVAE  # noqa: E402

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs fork, signals and limits as Linux has them"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
KILLS = int(os.environ.get("PLANAR_KILLS", "24"))
SEED = int(os.environ.get("PLANAR_STRESS_SEED", "0"))
FULL = "PLANAR_KILLS" in os.environ
NOBODY = 65534
Tally = Callable[[str, int, str], None]  # a row of the table in tests/README.md, what to add, and of what


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
    images = images._replace(train=images.train[:240], test=images.test[:40])
    fit(PlanarVAE(hidden=8, K=1), images, 1, progress=False)  # PyTorch imports half of itself at the first step
    return images


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_any_moment_ends_in_the_same_bytes(
    small_sweep: None, tmp_path: Path, kind: str, tally: Tally
) -> None:
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
    killed, planned = 0, len(moments) + 2
    for number, (how, when) in enumerate(chain(moments, repeat(("after", 0)))):
        if number >= planned and killed >= KILLS // 2:
            break
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
    assert killed >= max(KILLS // 2, len(moments))
    tally("kill −9 survived, training and sweep, forked", killed, f"seed {SEED}, {kind}: {writes} writes")


# --- disks ----------------------------------------------------------------------------------------------------------


def start_in(folder: Path, words: str = "") -> Callable[[], None]:
    """The command line, with all its files in the folder."""
    words = words or "train --data digits --hidden 8 --K 1 --epochs 12"

    def start() -> None:
        os.environ["PLANAR_RUNS"], os.environ["PLANAR_RESULTS"] = str(folder / "runs"), str(folder / "results")
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        command_line.stop_on_signals("planar")
        sys.exit(command_line.main(words.split()))

    return start


def after_write(folder: Path, number: int, do: Callable[[], None], start: Callable[[], None]) -> Callable[[], None]:
    """The start, with something done just before its so manieth write."""

    def call() -> None:
        on_each_write(folder, lambda count: do() if count == number else None)
        start()

    return call


def one_line(said: str, *words: str) -> None:
    """Assert that of what was said one line, and no traceback, holds the words."""
    assert "Traceback" not in said, said
    assert len([line for line in said.splitlines() if all(word in line for word in words)]) == 1, said


def test_a_full_disk_costs_the_json_and_one_line(small_sweep: None, open_folder: Path, tally: Tally) -> None:
    """4 kB a file: no checkpoint fits; the JSON is small. Then 100 bytes: that does not fit either."""
    for size, code in ((4096, 0), (100, 1)):
        folder = open_folder / str(size)
        folder.mkdir()

        def start(folder: Path = folder, size: int = size) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does at its start
            start_in(folder)()

        ended = forked(start)
        assert ended.code == code, ended
        one_line(ended.said, "cannot be written to (File too large): what is trained from here on is not kept")
        assert (len(list((folder / "results").rglob("*.json"))) == 1) == (code == 0)
        assert not [name for name in files(folder) if not name.endswith((".lock", ".json"))], "half a file"
        if code:
            one_line(ended.said, "planar_helpers: ", "File too large")
    tally("faults: one clear line, its exit code, the last good state intact", 2, "a full disk")


@pytest.mark.parametrize("what", ["runs", "results", "runs with a lock in it", "an unfinished run", "everything"])
def test_a_folder_that_is_only_read_is_said_in_one_line(
    small_sweep: None, open_folder: Path, what: str, tally: Tally
) -> None:
    """As a user without rights: root writes wherever it likes."""
    runs, results = open_folder / "runs", open_folder / "results"
    for folder in (runs, results):
        folder.mkdir()
        folder.chmod(0o777)
    if what == "an unfinished run":
        words = "train --data digits --hidden 8 --K 1 --epochs 9"
        ended = forked(after_write(open_folder, 34, die, start_in(open_folder, words)), user=NOBODY)
        unfinished = max(runs.glob("*.unfinished"))
        words = (
            words[:-1] + unfinished.stem.split("-")[-1]
        )  # what a longer run left is asked for, and cannot be renamed
    elif what == "runs with a lock in it":
        forked(start_in(open_folder), user=NOBODY)
        for path in [*runs.glob("*.pt"), *results.rglob("*.json")]:
            path.unlink()
        words = ""
    else:
        words = ""
    locked = [runs, results] if what == "everything" else [results] if what == "results" else [runs]
    for folder in locked:
        folder.chmod(0o555)
    before = files(runs) if runs in locked else None
    ended = forked(start_in(open_folder, words), user=NOBODY)
    if runs in locked and what != "an unfinished run":
        one_line(ended.said, f"{runs} cannot be written to (Permission denied)")
    if results in locked:
        one_line(ended.said, "planar_helpers: [Errno 13] Permission denied")
    assert "Traceback" not in ended.said, ended.said
    assert ended.code == (1 if results in locked else 0), ended
    assert before is None or files(runs) == before
    for folder in locked:
        folder.chmod(0o777)
    tally("faults: one clear line, its exit code, the last good state intact", 1, "a folder that is only read")


def test_without_rights_means_without_rights(open_folder: Path) -> None:
    """The tests above show nothing where the user can write all the same."""
    (open_folder / "closed").mkdir(mode=0o555)
    ended = forked(lambda: (open_folder / "closed" / "file").touch(), user=NOBODY)
    assert ended.code == 99 and "PermissionError" in ended.said, "this user's rights cannot be dropped"


@pytest.mark.parametrize("when", [1, 8, 20, 41, 60])
def test_a_folder_removed_under_a_running_process_is_made_again(
    small_sweep: None, open_folder: Path, when: int, tally: Tally
) -> None:
    expected = forked(start_in(open_folder))
    assert expected.code == 0, expected.said
    reference = files(open_folder)
    shutil.rmtree(open_folder / "runs")
    shutil.rmtree(open_folder / "results")
    ended = forked(after_write(open_folder, when, lambda: shutil.rmtree(open_folder / "runs"), start_in(open_folder)))
    assert "Traceback" not in ended.said and ended.code == 0, ended.said
    (name,) = [name for name in reference if name.endswith(".json")]
    found = files(open_folder)
    assert found[name] == reference[name], "another history"
    for path in found:
        assert path.endswith(".lock") or found[path] == reference[path], path
    tally("faults: one clear line, its exit code, the last good state intact", 1, "a folder removed")


def test_a_clock_that_jumps_changes_nothing(small_sweep: None, open_folder: Path, tally: Tally) -> None:
    assert forked(start_in(open_folder)).code == 0
    reference = files(open_folder)
    shutil.rmtree(open_folder / "runs")
    shutil.rmtree(open_folder / "results")
    generator, clock = random.Random(0), time.time

    def jumping() -> None:
        time.time = lambda: clock() + generator.uniform(-1e9, 1e9)
        start_in(open_folder)()

    ended = forked(jumping)
    assert ended.code == 0 and files(open_folder) == reference, ended.said
    tally("faults: one clear line, its exit code, the last good state intact", 1, "a clock that jumps")


def test_the_content_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that after a power cut the name leads to the old content or the new, never to none."""
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append(os.readlink(f"/proc/self/fd/{number}")), sync(number)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("rename"), replace(old, new)))
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("content")
        name = str(temporary)
    assert done == [name, "rename"]


# --- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signals", "code"),
    [(["SIGTERM"], 143), (["SIGINT"], 130), (["SIGHUP"], 129), (["SIGINT", "SIGINT"], None), (["SIGHUP"] * 2, None)],
    ids=str,
)
def test_a_signal_says_one_line_and_has_its_exit_code(
    small_sweep: None, open_folder: Path, signals: list[str], code: int | None, tally: Tally
) -> None:
    numbers = [getattr(signal, name) for name in signals]
    start = start_in(open_folder)

    def heeding() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
        start()

    def stop() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    ended = forked(after_write(open_folder, 30, stop, heeding))
    one_line(ended.said, f"stopped by {signals[0]}")
    assert ended.code in ((code,) if code else (128 + numbers[0], -numbers[0])), ended
    assert list((open_folder / "runs").glob("*.unfinished")) and not list((open_folder / "results").rglob("*.json"))
    ended = forked(start_in(open_folder))
    assert ended.code == 0, ended.said
    assert not leftovers(files(open_folder)) or not code
    tally("faults: one clear line, its exit code, the last good state intact", 1, "a signal")


def test_a_signal_before_the_imports_are_done_says_one_line(tmp_path: Path, tally: Tally) -> None:
    """Sent as PyTorch begins to be imported, which takes seconds."""
    for name, number in (("SIGINT", 2), ("SIGTERM", 15)):
        hook = f"""
        import signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.addaudithook(lambda event, args: event == "import" and args[0] == "torch" and signal.raise_signal({number}))
        """
        (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(hook))
        words = [sys.executable, "-m", "planar_helpers", "train", "--data", "digits"]
        search = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(sweep.__file__).parent.parent)])}
        done = subprocess.run(words, env={**os.environ, **search}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 128 + number, done.stderr
        one_line(done.stderr, f"stopped by {name}: run it again to go on")
        tally("faults: one clear line, its exit code, the last good state intact", 1, "a signal during the imports")


def test_a_terminal_that_closes_stops_no_training_that_ignores_it(
    small_sweep: None, open_folder: Path, tally: Tally
) -> None:
    """As under nohup: SIGHUP is ignored, and the terminal no longer takes a line."""

    def start() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        read, write = os.pipe()
        os.dup2(write, 1)
        os.dup2(write, 2)
        sys.stdout, sys.stderr = open(1, "w", 1, closefd=False), open(2, "w", 1, closefd=False)
        os.close(read)  # each line is an error from here on
        os.close(write)
        os.environ["PLANAR_RUNS"], os.environ["PLANAR_RESULTS"] = str(open_folder / "runs"), str(open_folder / "r")
        command_line.stop_on_signals("planar")
        os.kill(os.getpid(), signal.SIGHUP)
        sweep.run(settings_of("constant"), progress=True)
        os._exit(0)

    assert forked(start).code == 0 and list((open_folder / "r").rglob("*.json"))
    tally("faults: one clear line, its exit code, the last good state intact", 1, "a terminal that closes")


# --- hostile checkpoints --------------------------------------------------------------------------------------------


class Attack:
    """A pickle that makes a file when it is read without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


def with_laughs(state: dict[str, Any], depth: int = 40) -> dict[str, Any]:
    """A list of two lists of two lists ...: a few hundred bytes, and 2**40 brackets if it is printed."""
    laugh: Any = ["ha"]
    for _ in range(depth):
        laugh = [laugh, laugh]
    return {**state, "settings": {**state["settings"], "lr": laugh}}


def with_endless(state: dict[str, Any], part: str) -> dict[str, Any]:
    """A tensor of 2 * 10**8 numbers, all of them the same eight bytes: 1.6 GB once it is copied."""
    if part == "means":
        endless = torch.zeros(1, 1, dtype=torch.float64).expand(len(state["means"]["train"]), 2 * 10**8)
        return {**state, "means": {**state["means"], "test": endless}}
    optimizer = {**state["optimizer"], "state": {**state["optimizer"]["state"]}}
    optimizer["state"][0] = {**optimizer["state"][0], "exp_avg": torch.zeros(1, dtype=torch.float64).expand(2 * 10**8)}
    return {**state, "optimizer": optimizer}


def bomb(path: Path, gigabytes: int) -> None:
    """An archive of a few megabytes that unpacks to so many gigabytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("archive/data/0", "w", force_zip64=True) as entry:
            for _ in range(gigabytes * 64):
                entry.write(bytes(2**24))


HOSTILE: dict[str, Callable[[dict[str, Any], Path, Path], None]] = {
    "runs code": lambda state, path, target: torch.save({**state, "extra": Attack(target)}, path),
    "runs code, a bare pickle": lambda state, path, target: path.write_bytes(pickle.dumps(Attack(target))),  # type: ignore[dict-item,return-value]
    "a name as a setting": lambda state, path, target: torch.save(
        {**state, "settings": {**state["settings"], "lr": "__import__('os')._exit(7)"}}, path
    ),
    "laughs a billion times": lambda state, path, target: torch.save(with_laughs(state), path),
    "an endless mean": lambda state, path, target: torch.save(with_endless(state, "means"), path),
    "an endless average": lambda state, path, target: torch.save(with_endless(state, "optimizer"), path),
    "a bomb": lambda state, path, target: bomb(path, gigabytes=1),
    "of another program": lambda state, path, target: torch.save({"weights": torch.ones(3)}, path),
    "of an older version": lambda state, path, target: torch.save(
        {**state, "settings": {**state["settings"], "code": "0123456789abcdef"}}, path
    ),
    "cut": lambda state, path, target: path.write_bytes(path.read_bytes()[:-1000]),  # type: ignore[dict-item,return-value]
    "a folder": lambda state, path, target: (path.unlink(), path.mkdir()),  # type: ignore[dict-item,return-value]
    "a pipe": lambda state, path, target: (path.unlink(), os.mkfifo(path)),  # type: ignore[dict-item,return-value,func-returns-value]
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_checkpoint_is_refused_in_one_line_within_its_own_size(
    few: Images, open_folder: Path, how: str, tally: Tally
) -> None:
    """As a user without rights, with 3 GB of memory and 30 seconds at the most."""
    runs, target = open_folder / "runs", open_folder / "made by the attack"
    open_folder.chmod(0o777)

    def start() -> None:
        os.environ["PLANAR_RUNS"] = str(runs)
        train_or_load(few, 2, K=1, hidden=8, progress=False)

    assert forked(start, user=NOBODY).code == 0
    (path,) = runs.glob("*-2.pt")
    state = torch.load(path, weights_only=True)
    HOSTILE[how](state, path, target)
    assert how != "a bomb" or path.stat().st_size < 10e6

    def attacked() -> None:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 3 * 2**30,) * 2)
        begin = time.process_time()
        try:
            start()
        except ValueError as error:
            print(error)
            sys.exit(3 if time.process_time() - begin < 1.5 else 4)  # a gigabyte takes longer to unpack

    ended = forked(attacked, user=NOBODY, limit=30)
    assert not target.exists(), "the attack ran"
    if how in ("a folder", "a pipe"):  # no file of the run: trained again from the first epoch, and not kept
        assert ended.code == 0, ended
    else:
        assert ended.code == 3, ended
        one_line(ended.said, path.name, "is damaged: delete it" if "version" not in how and "setting" not in how
                 and "laughs" not in how else "is of another run: ")  # fmt: skip
        assert len(ended.said) < 1000
    tally("hostile and damaged checkpoints refused, code never run", 1, how)


# --- several processes ----------------------------------------------------------------------------------------------


def test_eight_processes_that_want_one_model_train_it_once(few: Images, tmp_path: Path, tally: Tally) -> None:
    bar, trained = train._progress_bar, tmp_path / "trained"
    trained.mkdir()

    def watched(*args: Any) -> Iterator[int]:
        for epoch in bar(*args):
            (trained / f"{epoch + 1} by {os.getpid()}").touch()
            yield epoch

    def want() -> None:
        train._progress_bar = watched
        os.environ["PLANAR_RUNS"] = str(tmp_path / "runs")
        train_or_load(few, 12, K=1, hidden=8, progress=False)

    with ThreadPoolExecutor(8) as pool:  # a thread waits for each child
        ended = list(pool.map(forked, [want] * 8))
    assert {each.code for each in ended} == {0} and len({each.said for each in ended}) == 1, ended
    assert sorted(int(path.name.split()[0]) for path in trained.iterdir()) == list(range(1, 13))
    tally("processes at one folder, each with the same result", 8, "one model")


def test_two_sweeps_over_one_folder_and_a_reader_meanwhile(small_sweep: None, open_folder: Path, tally: Tally) -> None:
    words = "sweep --data digits --hidden 8 --epochs 4 --K 0,1 --seed 0-2"

    def start() -> None:
        joblib.parallel_config(backend="sequential").__enter__()
        sweep.joblib.parallel_config = lambda *_, **__: nullcontext()  # one process each: two of them are the point
        start_in(open_folder, words)()

    def read() -> None:
        results, seen = open_folder / "results" / "runs", 0
        end = time.monotonic() + 100
        while seen < 6 and time.monotonic() < end:
            found = [json.loads(path.read_text()) for path in results.glob("[!.]*.json")]
            assert all("history" in content for content in found)
            seen = len(found)

    with ThreadPoolExecutor(3) as pool:
        ended = list(pool.map(forked, [start, start, read]))
    assert [each.code for each in ended] == [0, 0, 0], ended
    together = files(open_folder)
    shutil.rmtree(open_folder / "runs")
    shutil.rmtree(open_folder / "results")
    assert forked(start).code == 0
    assert files(open_folder) == together
    tally("processes at one folder, each with the same result", 3, "two sweeps and a reader")


@pytest.mark.parametrize("error", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
@pytest.mark.parametrize("stale", [False, True])
def test_a_disk_without_locks_neither_blocks_nor_loses(
    few: Images, tmp_path: Path, error: str, stale: bool, tally: Tally
) -> None:
    """As network disks are; a lock file lies there of a process that died."""

    def start() -> None:
        import fcntl

        def refused(*_: Any) -> None:
            raise OSError(getattr(errno, error), os.strerror(getattr(errno, error)))

        fcntl.flock = refused  # type: ignore[assignment]
        os.environ["PLANAR_RUNS"] = str(tmp_path / "runs")
        train_or_load(few, 4, K=1, hidden=8, progress=False)

    if stale:
        assert (
            forked(lambda: (on_each_write(tmp_path, lambda count: die() if count == 9 else None), start())).code == -9
        )
        assert list((tmp_path / "runs").glob("*.lock"))
    ended = forked(start, limit=40)
    assert ended.code == 0 and "Traceback" not in ended.said, ended.said
    assert {path.name.split("-")[-1] for path in (tmp_path / "runs").glob("[!.]*.pt")} == {"1.pt", "3.pt", "4.pt"}
    tally("faults: one clear line, its exit code, the last good state intact", 1, "a disk without locks")


def test_the_lock_of_a_process_that_was_killed_blocks_nobody(few: Images, tmp_path: Path, tally: Tally) -> None:
    def start() -> None:
        os.environ["PLANAR_RUNS"] = str(tmp_path / "runs")
        train_or_load(few, 3, K=1, hidden=8, progress=False)

    def killed() -> None:
        on_each_write(tmp_path, lambda count: die() if count == 9 else None)
        start()

    assert forked(killed).code == -signal.SIGKILL and list((tmp_path / "runs").glob("*.lock"))
    assert forked(start, limit=40).code == 0
    tally("faults: one clear line, its exit code, the last good state intact", 1, "a stale lock")


# --- numbers that are not finite ------------------------------------------------------------------------------------


def repeated(path: Path) -> tuple[PlanarVAE, Any]:
    """The model and the terms of the step in the file, by the recipe of `Watch`'s docstring."""
    step = torch.load(path, weights_only=True)
    model = PlanarVAE(**step["settings"]).to(step["x"].dtype)
    model.load_state_dict(step["model"])
    torch.set_rng_state(step["rng"][0])
    return model, model.train(step["training"]).elbo_terms(step["x"])


def poison(name: str, epoch: int, batch: int, value: float) -> None:
    """From here on one weight is replaced before that batch, as if memory had flipped."""
    elbo_terms, calls = PlanarVAE.elbo_terms, [0]

    def poisoned(model: PlanarVAE, x: torch.Tensor) -> Any:
        calls[0] += model.training
        if model.training and calls[0] == (epoch - 1) * 3 + batch:
            weight = dict(model.named_parameters())[name.removeprefix("gradient of ")]
            if weight.requires_grad and name.startswith("gradient"):
                weight.register_hook(lambda gradient: gradient * value)
            else:
                weight.data.view(-1)[0] = value
        return elbo_terms(model, x)

    PlanarVAE.elbo_terms = poisoned  # type: ignore[method-assign]


FAILURES = {
    "a poisoned weight": ({}, ("heads.bias", 5, 2, math.nan), "epoch 5, batch 2: .* is the weight heads.bias", "-4.pt"),
    "in the first batch": ({}, ("decoder.2.bias", 1, 1, math.inf), "epoch 1, batch 1: .* decoder.2.bias", "the start"),
    "a step that explodes": ({"lr": 1e30}, None, "epoch 1, batch 2: .* is log_q0", "the start"),
    "a sum that overflows": ({}, ("decoder.2.bias", 2, 3, 3e38), "epoch 2, batch 3: .* is log_px_z", "-1.pt"),
    "a gradient": (
        {},
        ("gradient of heads.bias", 4, 2, math.inf),
        "epoch 4, batch 2: .* gradient of heads.bias",
        "-3.pt",
    ),
}


@pytest.mark.parametrize("what", FAILURES)
def test_what_is_not_finite_stops_at_its_step_and_can_be_repeated(
    few: Images, tmp_path: Path, what: str, tally: Tally
) -> None:
    changes, poisoned, message, last = FAILURES[what]

    def start() -> None:
        os.environ["PLANAR_RUNS"] = str(tmp_path)
        if poisoned:
            train.CODE._captured.pop("PlanarVAE.elbo_terms"), train.CODE._captured.pop("PlanarVAE", None)
            poison(*poisoned)
        try:
            train_or_load(few, 8, K=1, hidden=8, progress=False, **changes)
        except FloatingPointError as error:
            sys.exit(str(print(error)) and 3)

    ended = forked(start)
    assert ended.code == 3 and ended.said.count("\n") == 1, ended
    assert re.search(message, ended.said) and last in ended.said and ".failed" in ended.said, ended.said
    (path,) = tmp_path.glob("*.failed")
    model, terms = repeated(path)
    again = repeated(path)[1]
    assert all(bits(one) == bits(other) for one, other in zip(terms, again, strict=True)), "not the same bits"
    assert bool(torch.stack(terms).sum().isfinite()) == (what == "a gradient")
    assert what != "a gradient" or all(weight.isfinite().all() for weight in model.parameters()), "Adam took it"
    good = [name for name in tmp_path.glob("*.pt")]
    assert all(torch.load(name, weights_only=True)["means"]["train"].isfinite().all() for name in good)
    tally("steps that were not finite: stopped at, named, repeated", 1, what)


def test_a_training_that_went_well_leaves_the_model_as_it_was(few: Images) -> None:
    model = PlanarVAE(hidden=8, K=1)
    before = set(vars(model))
    fit(model, few, 1, progress=False)
    assert set(vars(model)) == before and model.elbo_terms.__func__ is PlanarVAE.elbo_terms


def test_pixels_out_of_range_are_refused_before_they_reach_a_step(few: Images, tally: Tally) -> None:
    model = PlanarVAE(hidden=8, K=1)
    for bad in (few.train / 255 * 2, few.train.float() - 1, few.train.to(torch.int16), few.train.half() * torch.inf):
        with pytest.raises(TypeError, match="images.train must be a tensor of uint8"):
            fit(model, few._replace(train=bad), 1)
        with pytest.raises((ValueError, TypeError), match="x must"):
            model(bad[:5])
    tally("bad inputs refused", 8, "pixels")
