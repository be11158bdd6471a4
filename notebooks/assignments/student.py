"""Where a submission runs: a process of its own, with few rights, that runs cells and answers calls.

The keeper (`python student.py FD`) knows no master and no hidden test. For each submission it forks a student, and when
told so it ends all that the student has started. The student runs cells and calls functions as the grader asks, and
answers in JSON, which the grader reads as data only.

This limits harm; it is no sandbox. As root on Linux a student is a user without rights, sees no network, no submission,
no master and an empty /tmp. As any other user it has that user's rights: use the container.
"""

import base64
import contextlib
import ctypes
import gc
import json
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from planar_helpers import checks  # noqa: E402

LARGEST = 64 * 2**20  # bytes of one message
NEWNS, NEWIPC, NEWNET, SUBREAPER, NO_NEW_PRIVS = 0x20000, 0x8000000, 0x40000000, 36, 38


class Opaque:
    """Stands for a value that is no number, tensor or text."""


# Messages: a length of four bytes, then JSON.


def send(channel: socket.socket, message: dict[str, Any]) -> None:
    """Send one message. OverflowError if it is too large."""
    data = json.dumps(message).encode()
    if len(data) > LARGEST:
        raise OverflowError("the answer is larger than 64 MB")
    channel.sendall(len(data).to_bytes(4, "big") + data)


def receive(channel: socket.socket) -> dict[str, Any]:
    """Return the next message. EOFError if the other side has gone, ValueError if it sends no message."""
    size = int.from_bytes(_exactly(channel, 4), "big")
    if size > LARGEST:
        raise ValueError("the message is larger than 64 MB")
    message = json.loads(_exactly(channel, size))
    if not isinstance(message, dict):
        raise ValueError("the message is no object")
    return message


def _exactly(channel: socket.socket, size: int) -> bytes:
    parts = b""
    while len(parts) < size:
        part = channel.recv(min(size - len(parts), 2**20))
        if not part:
            raise EOFError
        parts += part
    return parts


def encode(value: Any, depth: int = 0) -> Any:
    """Return a value as JSON: numbers, text, tensors, arrays, lists and dicts; anything else by its type's name."""
    value = value.item() if isinstance(value, np.generic) else value  # a number of NumPy's is a number
    if value is None or isinstance(value, bool | str) or type(value) in (int, float):
        return {"v": value}
    if isinstance(value, torch.Tensor) and not value.is_complex():
        array = value.detach().cpu().contiguous()
        name, data = str(array.dtype).removeprefix("torch."), array.reshape(-1).view(torch.uint8).numpy().tobytes()
        return {"t": base64.b64encode(data).decode(), "dtype": name, "shape": list(array.shape)}
    if isinstance(value, np.ndarray):
        return (
            {"a": encode(torch.as_tensor(np.asarray(value).copy()))} if value.dtype.kind in "fiub" else {"o": "ndarray"}
        )
    if isinstance(value, list | tuple) and depth < 5 and len(value) < 100_000:
        return {"l": [encode(each, depth + 1) for each in value]}
    if isinstance(value, dict) and depth < 5 and all(isinstance(key, str) for key in value):
        return {"d": {key: encode(each, depth + 1) for key, each in value.items()}}
    if callable(value) and getattr(checks, getattr(value, "__name__", ""), None) is value:
        return {"f": value.__name__}
    return {"o": type(value).__name__}


def decode(data: Any) -> Any:
    """Undo `encode`. Nothing is executed. ValueError for what it does not know."""
    if not isinstance(data, dict):
        raise ValueError("no value")
    if "v" in data:
        return data["v"]
    if "t" in data:
        dtype = getattr(torch, str(data["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError("no dtype")
        raw = bytearray(base64.b64decode(data["t"]))
        flat = torch.frombuffer(raw, dtype=dtype).clone() if raw else torch.empty(0, dtype=dtype)
        return flat.reshape([int(size) for size in data["shape"]])
    if "a" in data:
        return decode(data["a"]).numpy()
    if "l" in data:
        return tuple(decode(each) for each in data["l"])
    if "d" in data:
        return {str(key): decode(each) for key, each in data["d"].items()}
    if "f" in data:
        return getattr(checks, data["f"])
    return type(str(data.get("o", "object"))[:80], (Opaque,), {})()


# The student: runs cells and calls functions.


def live(channel: socket.socket, folder: str, order: dict[str, Any]) -> None:
    """Give rights up, then answer the grader's messages until it goes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    hidden = confine(folder, order)
    os.chdir(folder)
    for name, text in order["files"].items():
        Path(name).write_text(text, encoding="utf-8")
    os.environ.clear()
    os.environ.update(
        HOME=folder, TMPDIR=folder, PATH="/usr/bin:/bin", LANG="C.UTF-8", MPLBACKEND="Agg", OMP_NUM_THREADS="1",
        IPYTHONDIR=folder, MPLCONFIGDIR=folder, PLANAR_RUNS=f"{folder}/runs", PLANAR_FIGURES=f"{folder}/figures",
        **order["environment"],
    )  # fmt: skip
    tempfile.tempdir = None
    torch.manual_seed(0)
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance(config=_quiet())
    shell._tee = lambda channel: contextlib.nullcontext()  # it would keep in memory all that is printed
    main, own = shell.user_module.__dict__, os.getpid()
    send(channel, {"ready": True, "hidden": hidden, "uid": os.getuid()})
    while True:
        try:
            order = receive(channel)
        except (EOFError, ValueError):
            os._exit(0)
        with contextlib.suppress(KeyboardInterrupt):
            answer = _answer(shell, main, order)
            if os.getpid() != own:
                os._exit(0)  # a child that a cell has forked, and that came out of the cell
            send(channel, answer)


def _quiet() -> Any:
    from traitlets.config import Config

    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "nocolor"
    return config


def _answer(shell: Any, main: dict[str, Any], order: dict[str, Any]) -> dict[str, Any]:
    try:
        if "run" in order:
            result = shell.run_cell(
                order["run"], store_history=False, silent=True
            )  # not silent, it keeps what is printed
            error = result.error_before_exec or result.error_in_exec
            return {"done": True} if error is None else _told(error)
        if "look" in order:
            value = main.get(order["look"], Opaque)
            return {"missing": True} if value is Opaque else {"callable": callable(value), "value": encode(value)}
        given = tuple(decode(each) for each in order["given"])
        value, called = checks_watched(main[order["call"]], given)
        return {"value": encode(value), "given": [encode(each) for each in given], "called": sorted(called)}
    except BaseException as error:  # noqa: BLE001  (SystemExit and KeyboardInterrupt, too, are answers)
        return _told(error)


checks_watched = checks.watched  # as it was before any student's code ran


def _told(error: BaseException) -> dict[str, Any]:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith("<ipython-input")]
    lines += [f.lineno for f in traceback.extract_tb(error.__traceback__) if "ipykernel" in f.filename]
    return {"error": type(error).__name__, "message": str(error)[:500], "line": lines[-1] if lines else None}


def confine(folder: str, order: dict[str, Any]) -> bool:
    """Limit this process, and as root hide files and network and become a user without rights; return if hidden."""
    libc, root, hidden = ctypes.CDLL(None, use_errno=True), os.getuid() == 0, False
    if root and libc.unshare(NEWNS | NEWIPC | NEWNET) == 0:
        hidden = _hide(folder, order["hide"])
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = {
        resource.RLIMIT_AS: used + order["memory"], resource.RLIMIT_FSIZE: 64 * 2**20, resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 256, resource.RLIMIT_NPROC: 256 if root else 4096,
    }  # fmt: skip
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    if root:
        os.chmod(folder, 0o700)
        os.chown(folder, order["uid"], order["uid"])
        os.setgroups([])
        os.setresgid(*[order["uid"]] * 3)
        os.setresuid(*[order["uid"]] * 3)  # what `setpriv --reuid --regid --clear-groups` does
    libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
    return hidden


def _hide(folder: str, places: list[str]) -> bool:
    """Lay empty folders over /tmp, a home and the places named, as this process and its children see them."""
    readable = {str(ROOT), sys.base_prefix, sys.prefix, *(p for p in sys.path if os.path.isdir(p))}
    home = os.path.expanduser("~root")
    over = ["/tmp", "/var/tmp", "/dev/shm"] + ([home] if any(_inside(p, home) for p in readable) else [])
    kept = sorted(p for p in map(os.path.realpath, readable) if any(_inside(p, place) for place in over))
    kept = [p for p in kept if not any(_inside(p, other) for other in kept if other != p)]
    data = os.environ.get("PLANAR_DATA", "")
    try:
        _mount("none", "/", 0x44000)  # MS_PRIVATE | MS_REC: nothing below is seen outside
        holds = [(os.open(p, os.O_PATH), p) for p in kept]  # a handle leads there after it is covered
        for place in over:
            if os.path.isdir(place):
                _mount("tmpfs", place, 0, "size=256m,mode=1777")
        for handle, path in holds:
            os.makedirs(path, exist_ok=True)
            _mount(f"/proc/self/fd/{handle}", path, 0x1000)  # MS_BIND
            os.close(handle)
        for place in (p for p in places if os.path.isdir(p) and not _inside(data, p)):
            _mount("tmpfs", place, 0, "size=1m,mode=755")
        os.makedirs(folder)
    except OSError:
        os.makedirs(folder, exist_ok=True)
        return False
    return True


def _inside(path: str, folder: str) -> bool:
    return bool(path) and (os.path.realpath(path) + "/").startswith(os.path.realpath(folder) + "/")


def _mount(what: str, place: str, flags: int, options: str = "") -> None:
    kind = what.encode() if what == "tmpfs" else None
    if ctypes.CDLL(None, use_errno=True).mount(what.encode(), place.encode(), kind, flags, options.encode()):
        raise OSError(ctypes.get_errno(), "mount failed", place)


# The keeper: forks students, and ends them.


def descendants(pid: int | str = "self") -> list[int]:
    """Return the ids of all processes below one; an orphan is below the keeper."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def end_all(seconds: float = 20) -> bool:
    """Kill whatever is below this process, until nothing is; return whether that came about in time."""
    until = time.monotonic() + seconds
    while (below := descendants()) and time.monotonic() < until:
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, none can fork another
            for pid in below:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)
    return not below


def memory_below() -> int:
    """Return the bytes of memory that the processes below this one hold; a page that n share counts as 1/n each."""
    total = 0
    for pid in descendants():
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def keep(control: socket.socket) -> None:
    """Serve the grader: start a student and hand its channel over, end it, tell why it was ended."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the grader, which then closes the channel
    folder, limit, why = "", 0, ""
    send(control, {"warm": True})  # a student's time begins after all this
    for order in _orders(control):
        if order is None:  # half a second has passed
            if limit and memory_below() > limit:
                why, limit = "used more memory than allowed", 0
                end_all()
        elif "start" in order:
            mine, theirs = socket.socketpair()
            folder, why, limit = tempfile.mkdtemp(prefix="planar-"), "", 2 * order["start"]["memory"]
            pid = os.fork()
            if pid == 0:
                control.close()
                mine.close()
                try:
                    live(theirs, folder, order["start"])
                finally:
                    os._exit(1)
            theirs.close()
            socket.send_fds(control, [str(pid).encode()], [mine.fileno()])
            mine.close()
        else:
            ended, limit = end_all(), 0
            shutil.rmtree(folder, ignore_errors=True)
            send(control, {"ended": ended, "why": why})


def _orders(control: socket.socket) -> Iterator[dict[str, Any] | None]:
    import select

    while True:
        if not select.select([control], [], [], 0.5)[0]:
            yield None
            continue
        try:
            yield receive(control)
        except EOFError:
            end_all()
            return


def _warm_up() -> None:
    """Import once, in the keeper, what most students import: a fork then costs nothing, and finds it read."""
    import IPython.core.interactiveshell  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import sklearn.datasets  # noqa: F401

    from planar_helpers import data, evaluate, plots, quadrature, targets, train, vae  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "Agg"
    _warm_up()
    keep(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # without the libraries' farewells
