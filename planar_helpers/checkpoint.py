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
import reprlib
import sys
import textwrap
import tokenize
import zipfile
import zlib
from contextlib import AbstractContextManager, nullcontext, suppress
from operator import attrgetter
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from planar_helpers.run import folder, replacing, say

State = dict[str, Any]
# What the bytes of no checkpoint, or of half of one, make of zipfile, torch.load and the parts that they are put into.
DAMAGE = (
    zipfile.BadZipFile, zlib.error, UnpicklingError, EOFError, OSError, RuntimeError, ArithmeticError, LookupError,
    TypeError, ValueError, AttributeError, MemoryError,
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
        self.failed = (self.path or folder("runs").absolute() / "fit").with_suffix(".failed")

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

        From here on `Watch` looks at each step. Raises ValueError for a damaged file, or one of another or of a longer
        run; OSError if it cannot be read.
        """
        Watch(self, model, optimizer, means)
        path = self.find(epochs)
        if path is None:
            return 0
        content = io.BytesIO(path.read_bytes())
        try:
            archive = zipfile.ZipFile(content)  # torch.load looks at no checksum, and unpacks as much as it is given
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size or archive.testzip():
                raise ValueError("a bomb, or a checksum that differs")
            content.seek(0)
            state = torch.load(content, map_location="cpu", weights_only=True)  # never unpickles: it may be anyone's
            there, length = state["settings"], len(state["means"]["train"])
            different = [  # shown short: what stands there may be anything
                f"{name} is {reprlib.repr(there.get(name))} there, {reprlib.repr(settings.get(name))} here"
                for name in sorted({**there, **settings})
                if there.get(name) != settings.get(name)
            ] + [f"it has {length} epochs, more than the {epochs} asked for"] * (length > epochs)
            if not different:
                model.load_state_dict(state["model"])
                tables = [state["means"], *state["optimizer"]["state"].values()]
                if sum(tensor.numel() for table in tables for tensor in table.values()) > path.stat().st_size:
                    raise ValueError("a small file can hold a tensor without end")
                optimizer.load_state_dict(state["optimizer"])
                means.update({part: [row.clone() for row in state["means"][part]] for part in ("train", "test")})
                torch.set_rng_state(state["rng"][0])
                torch.cuda.set_rng_state_all(state["rng"][1 : 1 + torch.cuda.device_count()])
        except DAMAGE as error:
            raise ValueError(f"checkpoint {path} is damaged: delete it and train again") from error
        if different:
            raise ValueError(f"checkpoint {path.name} is of another run: {', '.join(different)}")
        return length

    def save(self, settings: State, model: nn.Module, optimizer: Any, means: dict[str, list[Tensor]]) -> None:
        """Keep all that the run needs to go on to the same bits."""
        state = {
            "settings": settings,
            "means": {part: torch.stack(values) for part, values in means.items()},
            "rng": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
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
        self.failed, self.writable = self.folder / f"{name}.failed", True

    def finished(self, epochs: int) -> Path:
        """Return the name of the file of the run after so many epochs."""
        return self.folder / f"{self.name}-{epochs}.pt"

    def find(self, epochs: int) -> Path | None:
        """Return the file of the most epochs that are not more than those asked for, if there is one."""
        lengths = {length: path for length, path in self._files() if length <= epochs}
        path = lengths[max(lengths)] if lengths else None
        with suppress(OSError):  # it may be a disk that is only read
            if path == self.finished(epochs).with_suffix(".unfinished"):
                path = path.replace(self.finished(epochs))  # what a longer run left unfinished is now asked for
            self._tidy(max(lengths, default=0))  # whoever wrote it may have been killed before that
        return path

    def keep(self, state: State, epochs: int) -> None:
        """Write the state, and remove an earlier one that was not to be kept; if that cannot be done, say so once."""
        if not self.writable:
            return
        whole = "epochs" not in state["settings"] and str(epochs).rstrip("0") in ("1", "3")
        path = self.finished(epochs)
        try:
            _write(state, path if whole or epochs == self.asked else path.with_suffix(".unfinished"))
            self._tidy(epochs)
        except OSError as error:
            self._give_up(error)

    def lock(self) -> AbstractContextManager[Any]:
        """Wait until no other process trains this run; where there are no locks, go on: two only take their time."""
        path = self.folder / f"{self.name}.lock"
        with suppress(OSError, NotImplementedError):
            self.folder.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o666)  # the permissions of any new file: a class shares the folder
            # no soft lock in its place: that would take this very file for another's, and wait for ever
            return FileLock(path, mode=path.stat().st_mode & 0o777, fallback_to_soft=False).acquire()
        return nullcontext()

    def _give_up(self, error: Exception) -> None:
        """Train without keeping anything: a full disk must not cost what was trained."""
        self.writable = False
        say(f"{self.folder} cannot be written to ({_reason(error)}): what is trained from here on is not kept")

    def _tidy(self, epochs: int) -> None:
        """Remove the files of fewer epochs that were not to be kept."""
        for length, old in self._files():
            if length < epochs and old.suffix == ".unfinished":
                old.unlink(missing_ok=True)

    def _files(self) -> list[tuple[int, Path]]:
        """Return (epochs, file) of all that is there, unfinished before finished."""
        paths = [path for end in ("unfinished", "pt") for path in self.folder.glob(f"{self.name}-*.{end}")]
        return [
            (int(length), path)
            for path in paths
            if (length := path.stem.removeprefix(f"{self.name}-")).isdecimal() and path.is_file()
        ]


class Watch:
    """Stops a training at the first step with a sum that is not finite, and keeps what repeats that step.

    Looked at are the four terms before the loss is differentiated, and the gradient before Adam takes it: the weights
    that are kept are those that the step began with. To repeat it:

        step = torch.load(path, weights_only=True)
        model = PlanarVAE(**step["settings"]).to(step["x"].dtype)
        model.load_state_dict(step["model"])
        torch.set_rng_state(step["rng"][0])
        model.train(step["training"]).elbo_terms(step["x"])
    """

    def __init__(
        self, files: Checkpoint, model: Any, optimizer: torch.optim.Optimizer, means: dict[str, list[Tensor]]
    ) -> None:
        self.files, self.model, self.means, self.batch = files, model, means, 0
        model.elbo_terms = self.terms  # on this object only, until the training ends
        optimizer.register_step_pre_hook(
            lambda *_: self.check(
                {f"the gradient of {name}": w.grad for name, w in model.named_parameters() if w.grad is not None}
            )
        )

    def terms(self, x: Tensor) -> Any:
        """Return the model's terms for the images x. Raises FloatingPointError unless they are finite."""
        self.batch = self.batch + 1 if self.model.training else 0
        self.step = {
            "settings": self.model.settings, "training": self.model.training, "x": x,
            "rng": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
        }  # fmt: skip
        terms = type(self.model).elbo_terms(self.model, x)
        self.check({name: getattr(terms, name) for name in ("log_q0", "sum_ladj", "log_pz", "log_px_z")})
        return terms

    def check(self, found: dict[str, Tensor]) -> None:
        """Keep the step, and raise FloatingPointError that names the first that is not finite, unless all is."""
        if not bool(torch.stack([values.sum() for values in found.values()]).isfinite().all()):
            found = {f"the weight {name}": weight for name, weight in self.model.named_parameters()} | found
            first = next(name for name, values in found.items() if not bool(values.sum().isfinite()))
            last, kept = self.files.find(len(self.means["test"])), self.files.failed
            with suppress(OSError):  # on a full disk the message is all there is
                _write({**self.step, "model": self.model.state_dict()}, kept)
            raise FloatingPointError(
                f"the loss is not finite in epoch {len(self.means['test']) + 1}, "
                f"{f'batch {self.batch}' if self.batch else 'the test images'}: the first that is not is {first}. "
                f"Lower lr. The last good state is {last.name if last else 'the start'}; {kept.name}, if kept, "
                "repeats the step"
            )


def run_name(settings: State) -> str:
    """Return the stem of the run's files: what a reader looks for, then a hash of all settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    return f"K{settings['K']}-{settings['constraint']}-{digest.hexdigest()[:10]}"


def pixels_version(*parts: Tensor) -> list[str]:
    """Return digests of the pixels: two data sets of one name are two."""
    return [hashlib.sha256(part.cpu().contiguous().numpy().tobytes()).hexdigest()[:16] for part in parts]


class Code:
    """The source of functions, methods, classes and constants, captured once, when they were imported.

    They are passed themselves, so one that was moved or renamed is an ImportError or AttributeError here.
    """

    def __init__(self, *things: Any, **constants: float) -> None:
        named = {thing.__qualname__: thing for thing in things}
        self._captured = {name: bytecode(thing) for name, thing in {**named, **constants}.items()}
        self._modules = sorted({thing.__module__ for thing in things})
        lines = [f"{name}\n{bare(inspect.getsource(thing))}" for name, thing in sorted(named.items())]
        lines += [f"{name} = {value!r}" for name, value in sorted(constants.items())]
        self._version = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def version(self) -> str:
        """Return the digest of the source. Raise RuntimeError if something that was captured is other code by now."""
        for name, module in ((name, sys.modules[name]) for name in self._modules):
            for thing, code in self._captured.items():
                if thing.split(".")[0] in vars(module) and bytecode(attrgetter(thing)(module)) != code:
                    raise RuntimeError(
                        f"{thing} in {name} is not what was imported, and a model trained with it would be filed under "
                        "a wrong name: restart Python"
                    )
        return self._version


def bytecode(thing: Any) -> list[Any]:
    """Return what runs when a function, a decorated one, a property or a class is used; a number, as it is."""
    if thing is None or isinstance(thing, float):
        return [thing]
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
