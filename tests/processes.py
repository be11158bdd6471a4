"""What the tests of kills and faults share: processes that come to an end, and folders compared bit for bit."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch


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
