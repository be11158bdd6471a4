"""Attacks that must fail: files that would run code, notebooks that write elsewhere, ports that others could reach.

Whatever must not happen is let happen once, to see that it would be noticed.
"""

import ast
import ctypes
import io
import json
import os
import pickle
import platform
import re
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "notebooks" / "assignments"), str(ROOT / "notebooks")]
import grade  # noqa: E402
import restate  # noqa: E402
from processes import checkout, figures, forked, live  # noqa: E402

from planar_helpers import __main__ as command_line  # noqa: E402
from planar_helpers import sweep  # noqa: E402
from planar_helpers.checkpoint import Checkpoint  # noqa: E402
from planar_helpers.data import load_images  # noqa: E402
from planar_helpers.train import fit  # noqa: E402

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs fork, Landlock and /proc as Linux has them"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
FULL = "PLANAR_KILLS" in os.environ
NOBODY = 65534
Tally = Callable[[str, int, str], None]


# --- files that would run code --------------------------------------------------------------------------------------


class Attack:
    """A pickle that makes a file when it is read without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


def would_run(target: Path) -> str:
    return f"__import__('pathlib').Path({str(target)!r}).touch()"


def as_numpy(target: Path) -> bytes:
    """Arrays of objects, under the names of a model's weights."""
    content = io.BytesIO()
    np.savez(content, **{"heads.bias": np.array([Attack(target)], dtype=object)})
    return content.getvalue()


def as_torch(target: Path) -> bytes:
    content = io.BytesIO()
    torch.save({"settings": {}, "means": {"train": []}, "model": Attack(target)}, content)
    return content.getvalue()


def as_json(target: Path) -> bytes:
    run = would_run(target)
    settings = {**sweep.DEFAULTS, "data": "digits", "hidden": run, "lr": run, "constraint": run}
    cell = {"cell_type": "code", "source": run, "metadata": {}, "outputs": []}
    return json.dumps({"settings": settings, "history": run, "numbers": {run: run}, "cells": [cell]}).encode()


HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "pickle": lambda target: pickle.dumps(Attack(target)),
    "numpy": as_numpy,
    "torch": as_torch,
    "json": as_json,
    "python": lambda target: would_run(target).encode(),
    "deep json": lambda target: b"[" * 10**6,
}


def stored_weights(path: Path) -> None:
    """What notebook 08 does with the committed weights, with this file for them."""
    cells = json.loads((ROOT / "notebooks" / "08_exact_posterior.ipynb").read_text(encoding="utf-8"))["cells"]
    text = next("".join(cell["source"]) for cell in cells if "np.load(" in "".join(cell["source"]))
    function = next(node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))
    (loading,) = [
        line for line in ast.walk(function) if isinstance(line, ast.Call) and "np.load" == ast.unparse(line.func)
    ]
    assert not loading.keywords and len(loading.args) == 1, "np.load with its default, no pickles"
    loading.args = [ast.Constant(str(path))]
    names: dict[str, Any] = {"np": np, "torch": torch, "PlanarVAE": sweep.PlanarVAE}
    exec(compile(ast.unparse(function), "08", "exec"), names)
    names[function.name](3)


def checkpoint(path: Path) -> None:
    model = sweep.PlanarVAE(K=1, hidden=8)
    Checkpoint(path).resume({}, 3, model, torch.optim.Adam(model.parameters()), {"train": [], "test": []})


def run_json(path: Path) -> None:
    """As the JSON of the run that is asked for, and as that of its decoder."""
    os.environ["PLANAR_RESULTS"] = str(path.parent)
    (settings,) = sweep.combinations({"data": ["digits"], "hidden": [8], "K": [1], "epochs": [1]})
    place = sweep.path_of(settings)
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(path.read_bytes())
    os.environ["PLANAR_RUNS"] = str(path.parent / "runs")
    words = "train --data digits --hidden 8 --epochs 1 --K".split()
    codes = {command_line.main([*words, "1"]), command_line.main([*words, "0", "--decoder", place.stem])}
    raise ValueError(codes)


def submission(path: Path) -> None:
    print(grade.read(path)["cells"][0]["cell_type"])
    raise ValueError


def numbers(path: Path) -> None:
    restate.ROOT = path.parent
    place = path.parent / "figures" / "results" / "08_x.json"
    place.parent.mkdir(parents=True)
    place.write_bytes(path.read_bytes())
    restate.entry(restate.load("08_x")["numbers"], "08_x", would_run(path))


def option(path: Path) -> None:
    """The file's text as an option on the command line."""
    command_line.parse(["train", "--lr", path.read_text(encoding="latin-1")])


LOADERS = (stored_weights, checkpoint, run_json, submission, numbers, option)


def noticed(event: str, args: tuple) -> None:
    """End the process at whatever a file should not be able to do."""
    text = event == "exec" and getattr(args[0], "co_filename", "") == "<string>"
    if text or event in ("pickle.find_class", "os.system", "os.exec", "subprocess.Popen", "socket.connect"):
        os.write(2, f"NOTICED {event} {args}\n".encode())
        os._exit(77)


@pytest.fixture(scope="module")
def imported() -> None:
    """PyTorch imports half of itself at the first step, and executes strings for it."""
    images = load_images("digits")
    fit(sweep.PlanarVAE(hidden=8, K=1), images._replace(train=images.train[:100]), 1, progress=False)
    platform.platform()  # calls uname


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.__name__)
@pytest.mark.parametrize("what", HOSTILE)
def test_no_file_runs_code(tmp_path: Path, loader: Callable[[Path], None], what: str, tally: Tally) -> None:
    """No unpickling, no eval, no program started; and the file that the attack would make is not there."""
    target, path = tmp_path / "made by the attack", tmp_path / "given"
    path.write_bytes(HOSTILE[what](target))

    def attacked() -> None:
        sys.addaudithook(noticed)
        loader(path)

    ended = forked(attacked, limit=60)
    assert ended.code != 77 and not target.exists(), ended.said
    assert ended.code in (2, 99), ended
    last = ended.said.strip().splitlines()[-1]
    refused = r"(ValueError|\w*UnpicklingError|KeyError|AttributeError|RuntimeError|TypeError|RecursionError)\b"
    assert ended.code == 2 or re.match(refused, last.split(".")[-1]) or "Error" in last, ended.said
    if loader is run_json and what != "json":
        assert ended.said.count("is damaged: delete it, and the run is made again\n") == 2, ended.said
    tally("attacks that fail: no file runs code", 1, f"{loader.__name__}: {what}")


@pytest.mark.parametrize(
    "careless",
    [
        lambda path: pickle.loads(path.read_bytes()),
        lambda path: np.load(path, allow_pickle=True)["heads.bias"],
        lambda path: torch.load(path, weights_only=False),
        lambda path: eval(path.read_text()),
    ],
)
@pytest.mark.parametrize("watched", [True, False])
def test_a_careless_reader_would_be_noticed(tmp_path: Path, careless: Callable[[Path], Any], watched: bool) -> None:
    target, done = tmp_path / "made by the attack", []
    for what in ("pickle", "numpy", "torch", "python"):
        path = tmp_path / what
        path.write_bytes(HOSTILE[what](target))

        def attacked(path: Path = path) -> None:
            if watched:
                sys.addaudithook(noticed)
            careless(path)

        ended = forked(attacked)
        done.append(ended.code == 77 if watched else target.exists())
    assert any(done)


# --- what a notebook may write --------------------------------------------------------------------------------------


def only_below(*folders: Path) -> None:
    """From here on let this process, and all that it starts, write below these folders only (Landlock)."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(444, None, 0, 1)
    rights = sum(1 << bit for bit in (1, *range(4, 13 + (version > 1) + (version > 2))))
    ruleset = libc.syscall(444, ctypes.byref(ctypes.c_uint64(rights)), 8, 0)
    assert version > 0 and ruleset >= 0, "Landlock is needed, and this kernel has none"
    for folder in folders:
        rule = rights.to_bytes(8, "little") + os.open(folder, os.O_PATH).to_bytes(4, "little")
        assert libc.syscall(445, ruleset, 1, rule, 0) == 0, os.strerror(ctypes.get_errno())
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.syscall(446, ruleset, 0) == 0, os.strerror(ctypes.get_errno())


def confined(start: Callable[[], None], home: Path) -> Callable[[], None]:
    """The start, able to write only to its own folders, /dev and the terminal."""

    def call() -> None:
        only_below(home, Path("/dev"))
        start()

    return call


def needs_landlock() -> None:
    if ctypes.CDLL(None).syscall(444, None, 0, 1) < 1 and not os.environ.get("GITHUB_ACTIONS"):
        pytest.skip("this kernel has no Landlock")


@pytest.mark.skipif(not FULL, reason="in make stress")
def test_the_notebooks_write_nowhere_else(tmp_path: Path, tally: Tally) -> None:
    """The kernel refuses them every other folder, and they run all the same."""
    needs_landlock()
    ended = live(confined(figures(ROOT, "00,01,02,03,04,05,06,D"), tmp_path), tmp_path, limit=1200)
    assert ended.code == 0, ended.said
    written = [*(tmp_path / "home" / "figures" / "notebooks").rglob("*.ipynb")]
    assert written and [*(tmp_path / "home" / "figures").glob("*.png")]
    tally(
        "attacks that fail: notebooks write below the folders of run.py only", len(written), "a notebook of the series"
    )


def test_a_notebook_that_writes_elsewhere_is_stopped(tmp_path: Path, tally: Tally) -> None:
    needs_landlock()
    places = [tmp_path / "course" / "notebooks" / "new", tmp_path / "course" / "planar_helpers" / "vae.py",
              tmp_path / "new", Path.home() / f"planar-{os.getpid()}"]  # fmt: skip
    writes = tuple(f"open({str(place)!r}, 'a').write('mine')" for place in places)
    (tmp_path / "course").mkdir()
    (tmp_path / "life").mkdir()
    series = {f"0{i}_writes": (text,) for i, text in enumerate(writes)}
    course = checkout(tmp_path / "course", series)
    before = places[1].read_bytes()
    ended = live(confined(figures(course), tmp_path / "life"), tmp_path / "life")
    assert ended.code == 1 and ended.said.count("[Errno 13] Permission denied") >= len(places), ended.said
    assert places[1].read_bytes() == before and not any(place.exists() for place in (places[0], *places[2:]))
    tally("attacks that fail: notebooks write below the folders of run.py only", len(places), "another place")


# --- what listens ---------------------------------------------------------------------------------------------------


def listening(ids: set[int]) -> set[str]:
    """The addresses at which these processes listen, TCP and UDP, as hexadecimal words of the machine's order."""
    sockets = set()
    for number in ids:
        for path in Path(f"/proc/{number}/fd").glob("*"):
            with suppress(OSError):  # closed by now
                sockets |= {*re.findall(r"socket:\[(\d+)\]", os.readlink(path))}
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[9] in sockets and (words[3] == "0A" or table.startswith("udp")):
                found.add(words[1].split(":")[0])
    return found


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def test_the_look_sees_what_listens(tmp_path: Path) -> None:
    for address, expected in (("127.0.0.1", "0100007F"), ("0.0.0.0", "00000000")):
        with socket.create_server((address, 0)):
            if address == "127.0.0.1":  # a test listens nowhere else: the other is only bound
                assert listening({os.getpid()}) == {expected}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        bound.bind(("0.0.0.0", 0))
        assert "00000000" in listening({os.getpid()}) - LOOPBACK


def test_executing_notebooks_listens_on_loopback_only(tmp_path: Path, tally: Tally) -> None:
    for name in ("course", "life"):
        (tmp_path / name).mkdir()
    course = checkout(tmp_path / "course", {"01_waits": ("import time\ntime.sleep(3)",)})
    seen: set[str] = set()
    ended = live(figures(course), tmp_path / "life", look=lambda ids: seen.update(listening(ids)))
    assert ended.code == 0, ended.said
    assert seen and seen <= LOOPBACK, seen
    tally("attacks that fail: nothing listens beyond loopback", 1, "execute.py and its kernels")


@pytest.mark.skipif(not FULL, reason="in make stress")
def test_the_lab_listens_on_loopback_only_and_asks_for_its_token(tmp_path: Path, tally: Tally) -> None:
    for name in ("course", "life"):
        (tmp_path / name).mkdir()
    course = checkout(tmp_path / "course", {"00_start_here": ("print(1)",)})
    seen: set[str] = set()
    answers: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def start() -> None:
        os.environ |= {f"JUPYTER_{kind}_DIR": str(tmp_path / "life" / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
        words = ["--no-browser", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--allow-root"]
        os.execv(sys.executable, [sys.executable, str(course / "notebooks" / "lab.py"), *words])

    def look(ids: set[int]) -> None:
        seen.update(listening(ids))
        if seen and not answers:
            for path in ("api/contents", "api/kernels", "lab"):
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as answer:
                        answers.append(200 if "/login" not in answer.url else 302)
                except urllib.error.HTTPError as error:
                    answers.append(error.code)
                except OSError:
                    answers.clear()
                    return
        if len(answers) == 3:  # a scheduler ends what it started, and that alone
            answers.append(0)
            (lab,) = [number for number in ids if b"lab.py" in Path(f"/proc/{number}/cmdline").read_bytes()]
            os.kill(lab, signal.SIGTERM)

    ended = live(start, tmp_path / "life", look=look)
    assert answers.pop() == 0 and len(answers) == 3 and set(answers) <= {302, 403}, (answers, ended.said)
    assert "Traceback" not in ended.said, ended.said
    assert seen and seen <= LOOPBACK, seen
    tally("attacks that fail: nothing listens beyond loopback", 1, "make lab")
    tally("attacks that fail: a request without the lab's token", 3, "api/contents, api/kernels, lab")
