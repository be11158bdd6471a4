"""What is saved of a run, how it is named, resumed, refused.

A run's files lie in one folder, one for each length that is kept: {name}-30.pt is the run after 30 epochs, with all
that is needed to go on from there. The name is a hash of the settings, the pixels and the code that trains.
"""

import ast
import hashlib
import inspect
import io
import json
import os
import sys
import textwrap
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from planar_helpers.run import replacing, say

State = dict[str, Any]
# What the bytes of no checkpoint, or of half of one, make of zipfile, torch.load and the parts that they are put into.
DAMAGE = (
    zipfile.BadZipFile, zlib.error, UnpicklingError, EOFError, OSError, RuntimeError, ArithmeticError, LookupError,
    TypeError, ValueError, AttributeError,
)  # fmt: skip


class Checkpoint:
    """The one file of a run that may be interrupted; with no path, nothing is kept."""

    def __init__(self, path: str | Path | None) -> None:
        if not isinstance(path, str | os.PathLike | None):
            raise TypeError(f"checkpoint must be a path, got {path!r}")
        self.path = None if path is None else Path(path).absolute()
        if self.path is not None and not self.path.parent.is_dir():
            raise FileNotFoundError(f"checkpoint must lie in an existing folder, got {str(path)!r}")
        if self.path is not None and self.path.exists() and not self.path.is_file():
            raise ValueError(f"checkpoint must name a file, got {str(path)!r}, which is none")

    def find(self, epochs: int) -> Path | None:
        """Return the file to go on from in a run of so many epochs, if there is one."""
        return self.path if self.path is not None and self.path.is_file() else None

    def keep(self, state: State, epochs: int) -> None:
        """Write the state after so many epochs. Raise OSError if that cannot be done."""
        if self.path is not None:
            try:
                _write(state, self.path)
            except OSError as error:
                raise OSError(
                    error.errno, f"checkpoint cannot be written ({_reason(error)})", str(self.path)
                ) from error

    def resume(
        self, settings: State, epochs: int, model: nn.Module, optimizer: Any, means: dict[str, list[Tensor]]
    ) -> int:
        """Restore the run, random stream included, if a file of it is there; return the epoch to go on from.

        Raises ValueError for a damaged file, or one of another or of a longer run.
        """
        path = self.find(epochs)
        if path is None:
            return 0
        restore(path, settings, model, means, optimizer)
        if len(means["train"]) > epochs:
            raise ValueError(
                f"checkpoint {path.name} is of another run: it has {len(means['train'])} epochs, "
                f"more than the {epochs} asked for"
            )
        return len(means["train"])

    def save(self, settings: State, model: nn.Module, optimizer: Any, means: dict[str, list[Tensor]]) -> None:
        """Keep all that the run needs to go on to the same bits."""
        if self.path is None:
            return
        state = {
            "settings": settings,
            "means": {part: torch.stack(values) for part, values in means.items()},
            "rng": [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])],
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        self.keep(state, len(means["train"]))


class Run(Checkpoint):
    """The files of one run in a folder: with a constant step a run passes through every shorter one, bit for bit.

    Kept are 1, 3, 10, 30, 100, ... epochs and the number asked for, and, until the run has passed it, the last epoch.
    """

    def __init__(self, folder: Path, name: str, asked: int) -> None:
        self.folder, self.name, self.asked = folder.absolute(), name, asked
        self.path = self.finished(asked)
        self.writable = True

    def finished(self, epochs: int) -> Path:
        """Return the name of the file of the run after so many epochs."""
        return self.folder / f"{self.name}-{epochs}.pt"

    def find(self, epochs: int) -> Path | None:
        """Return the file of the most epochs that are not more than those asked for, if there is one."""
        lengths = {length: path for length, path in self._files() if length <= epochs}
        if not lengths:
            return None
        path = lengths[max(lengths)]
        if path == self.finished(epochs).with_suffix(".unfinished") and self.writable:
            path = path.replace(self.finished(epochs))  # what a longer run left behind is now asked for
        return path

    def keep(self, state: State, epochs: int) -> None:
        """Write the state, and remove an earlier one that was not to be kept; if that cannot be done, say so once."""
        if not self.writable:
            return
        whole = "epochs" not in state["settings"] and str(epochs).rstrip("0") in ("1", "3")
        path = self.finished(epochs)
        try:
            _write(state, path if whole or epochs == self.asked else path.with_suffix(".unfinished"))
            for length, old in self._files():
                if length < epochs and old.suffix == ".unfinished":
                    old.unlink(missing_ok=True)
        except OSError as error:
            self._give_up(error)

    def lock(self) -> AbstractContextManager[Any]:
        """Wait until no other process trains this run; where the folder cannot be written to, say so and go on."""
        path = self.folder / f"{self.name}.lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o666)  # the permissions of any new file: a class shares the folder
            return FileLock(path, mode=path.stat().st_mode & 0o777).acquire()
        except (OSError, NotImplementedError) as error:
            self._give_up(error)
            return nullcontext()

    def _give_up(self, error: Exception) -> None:
        """Train without keeping anything: a full disk must not cost what was trained."""
        self.writable = False
        say(f"{self.folder} cannot be written to ({_reason(error)}): what is trained from here on is not kept")

    def _files(self) -> Iterator[tuple[int, Path]]:
        """Yield (epochs, file) of all that is there, unfinished before finished."""
        for suffix in (".unfinished", ".pt"):
            for path in sorted(self.folder.glob(f"{self.name}-*{suffix}")):
                length = path.stem.removeprefix(f"{self.name}-")
                if length.isdecimal() and path.is_file():
                    yield int(length), path


def restore(
    path: Path, settings: State, model: nn.Module, means: dict[str, list[Tensor]], optimizer: Any = None
) -> None:
    """Read a file that `Checkpoint.save` wrote into model and means; with an optimizer, to go on training.

    Raises ValueError if the file is damaged, or of another run than these settings say; OSError if it cannot be read.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        if zipfile.ZipFile(content).testzip() is not None:  # torch.load does not look at the checksums
            raise ValueError("a checksum differs")
        content.seek(0)
        state = torch.load(content, map_location="cpu", weights_only=True)  # never unpickles: it may come from anyone
        different = sorted(k for k in {**state["settings"], **settings} if state["settings"].get(k) != settings.get(k))
        if not different:
            model.load_state_dict(state["model"])
            means.update({part: [row.clone() for row in state["means"][part]] for part in ("train", "test")})
            if optimizer is not None:
                optimizer.load_state_dict(state["optimizer"])
                cpu, *cuda = state["rng"]
                torch.set_rng_state(cpu)
                if cuda and torch.cuda.is_available():
                    torch.cuda.set_rng_state_all(cuda)
    except DAMAGE as error:
        raise ValueError(f"checkpoint {path} is damaged: delete it and train again") from error
    if different:
        told = ", ".join(f"{k} is {state['settings'].get(k)!r} there, {settings.get(k)!r} here" for k in different)
        raise ValueError(f"checkpoint {path.name} is of another run: {told}")


def run_name(settings: State) -> str:
    """Return the stem of the run's files: what a reader looks for, then a hash of all settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"K{settings['K']}-{settings['constraint']}-{digest[:10]}"


def pixels_version(*parts: Tensor) -> list[str]:
    """Return digests of the pixels: two data sets of one name are two."""
    return [hashlib.sha256(part.cpu().contiguous().numpy().tobytes()).hexdigest()[:16] for part in parts]


class Code:
    """The source of functions, methods, classes and constants, captured once, when they were imported.

    They are passed themselves, so one that was moved or renamed is an ImportError or AttributeError here.
    """

    def __init__(self, *things: Any, **constants: float) -> None:
        self._captured: dict[str, Any] = {thing.__qualname__: bytecode(thing) for thing in things}
        self._constants = constants
        self._modules = sorted({thing.__module__ for thing in things})
        sources = sorted(f"{thing.__qualname__}\n{bare(inspect.getsource(thing))}" for thing in things)
        lines = [*sources, *(f"{name} = {value!r}" for name, value in sorted(constants.items()))]
        self._version = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def version(self) -> str:
        """Return the digest of the source. Raise RuntimeError if something that was captured is other code by now."""
        for module in (sys.modules[name] for name in self._modules):
            captured = ((name, code) for name, code in self._captured.items() if name.split(".")[0] in vars(module))
            changed = [name for name, code in captured if bytecode(attrgetter(name)(module)) != code]
            changed += [name for name, value in self._constants.items() if vars(module).get(name, value) != value]
            if changed:
                raise RuntimeError(
                    f"{changed[0]} in {module.__name__} is not what was imported, and a model trained with it would be "
                    "filed under a wrong name: restart Python"
                )
        return self._version


def bytecode(thing: Any) -> list[Any]:
    """Return what runs when a function, a decorated one, a property or a class is used, to compare it later."""
    if thing is None:
        return []
    if isinstance(thing, type):
        return [code for member in vars(thing).values() for code in bytecode(member)]
    function: Any = getattr(thing, "fget", None) or getattr(thing, "__func__", None) or thing
    parts = [getattr(function, part, None) for part in ("__code__", "__defaults__", "__kwdefaults__")]
    return [type(function), *parts, *bytecode(getattr(function, "__wrapped__", None))]


def bare(source: str) -> str:
    """Return the lines of some source without comments, docstrings and blank lines: the same under every Python."""
    lines = textwrap.dedent(source).splitlines()
    text = "\n".join(lines) + "\n"
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            for row in range(docstring.lineno - 1, docstring.end_lineno or docstring.lineno):
                lines[row] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _write(state: State, path: Path) -> None:
    content = io.BytesIO()
    torch.save(state, content)  # to memory first: on a full disk it would raise RuntimeError, not OSError
    with replacing(path) as temporary:
        temporary.write_bytes(content.getvalue())


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
