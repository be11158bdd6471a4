"""Execute the notebooks, side by side, one thread each: copies under build/ (`make figures`), or in place.

In place (`make notebooks`) is for committing: at the full budget, on MNIST, and cleaned so that a second run gives
the same bytes. A notebook is written only when it has run to its end. What the user's own surroundings hold, settings
of Matplotlib and IPython, kernels, a search path, reaches no kernel.
"""

import argparse
import atexit
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]  # the package beside the notebooks, installed or not
import restate  # noqa: E402
import stored  # noqa: E402

from planar_helpers import run  # noqa: E402

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
KEPT = ("tags", "alt", "nbgrader")  # of a cell's metadata
WIDGET = "application/vnd.jupyter.widget-view+json"
OWN = "planar-kernel-"  # a kernel's temporary folder
FAILED = (CellExecutionError, RuntimeError)  # the latter: a kernel that died, before its first answer or later
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
FIRST = ("08", "07", "00", "09", "04", "06")  # the longest first, so that side by side all end together


class Lost(Exception):
    """A notebook came out with fewer figures than are stored in it."""


class OwnKernel(NotebookClient):
    """Runs the notebook under this very interpreter, whatever kernels are installed in the user's home."""

    def create_kernel_manager(self) -> AsyncKernelManager:
        """Return a manager that knows no kernel but ipykernel's own."""
        own = KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True)
        connection = str(Path(self.resources["folder"]) / "kernel.json")
        self.km = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=own, connection_file=connection)
        return self.km


class Progress:
    """What is running, cell by cell: on a terminal a line for each running notebook, in a log a line now and then."""

    def __init__(self, total: int) -> None:
        self.total, self.begun, self.lines, self.said = total, 0, {}, {}
        self.terminal, self.lock = sys.stdout.isatty(), threading.Lock()

    def begin(self, stem: str) -> str:
        """Count a notebook that starts, and return its name for the other lines."""
        with self.lock:
            self.begun += 1
            name = f"[{self.begun}/{self.total}] {stem}"
        self.say(name, "starts")
        return name

    def say(self, name: str, text: str, last: bool = False) -> None:
        """Show where a notebook stands; the last line of each stays."""
        with self.lock:
            if not self.terminal:
                if last or time.monotonic() - self.said.get(name, -60) >= 30:
                    self.said[name] = time.monotonic()
                    print(f"{name}: {text}", flush=True)
                return
            up = f"\x1b[{len(self.lines)}A" if self.lines else ""
            self.lines[name] = text
            stays = f"\x1b[K{name}: {self.lines.pop(name)}\n" if last else ""
            running = "".join(f"\x1b[K{each}: {where}\n" for each, where in self.lines.items())
            print(f"{up}{stays}{running}\x1b[J", end="", flush=True)


def surroundings(folder: str) -> dict[str, str]:
    """The environment of a kernel: the user's, less what would change the outputs; folders as absolute paths."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONWARNINGS", "PYTHONSTARTUP")}
    for kind in ("data", "runs", "figures", "results"):
        if kept.get(f"PLANAR_{kind.upper()}"):
            kept[f"PLANAR_{kind.upper()}"] = str(run.folder(kind).absolute())  # the kernel works in another folder
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **kept, **dict.fromkeys(THREADS, "1"), "PYTHONPATH": search, "PYTHONUTF8": "1", "IPYTHONDIR": folder,
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }  # fmt: skip


def execute(path: Path, progress: Progress, running: list[NotebookClient]) -> nbformat.NotebookNode:
    """Run one notebook in its own folder and return it, clean: no timestamps, progress bars or widget state."""
    notebook = nbformat.read(path, as_version=4)
    before, name, start = figures_in(notebook), progress.begin(path.stem), time.monotonic()
    with tempfile.TemporaryDirectory(prefix=OWN) as folder:
        client = OwnKernel(
            notebook,
            timeout=None,
            resources={"metadata": {"path": str(path.parent)}, "folder": folder},
            record_timing=False,
            store_widget_state=False,
            coalesce_streams=True,
            extra_arguments=["--log-level=ERROR"],  # not its notice that it listens on this machine
            on_cell_start=lambda cell, cell_index: progress.say(
                name, f"cell {cell_index + 1} of {len(notebook.cells)}"
            ),
        )
        running.append(client)
        try:
            client.execute(env=surroundings(folder))
        except FAILED as error:
            progress.say(name, f"failed after {time.monotonic() - start:.0f} s\n{error}", last=True)
            raise
        finally:
            running.remove(client)
            atexit.unregister(client._cleanup_kernel)  # it prints a traceback for a kernel that never answered
    clean(notebook)
    if figures_in(notebook) < before:
        progress.say(name, "failed: figures were lost", last=True)
        raise Lost(
            f"{path.name} holds {before} figures and this run gave {figures_in(notebook)}; if one was taken out on "
            "purpose, clear the notebook's outputs first"
        )
    progress.say(name, f"{time.monotonic() - start:.0f} s", last=True)
    return notebook


def clean(notebook: nbformat.NotebookNode) -> None:
    """Drop what differs from run to run; give each image the alternative text that its cell's metadata holds."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({key: cell.metadata[key] for key in KEPT if cell.metadata.get(key)})
        if cell.cell_type == "code":
            for output in cell.outputs:
                if "text/html" in output.get("data", {}):
                    output.data.pop(WIDGET, None)  # the page form stays
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and not is_widget(o)]
            for output in cell.outputs if "alt" in cell.metadata else []:
                for kind in output.get("data", {}):
                    if kind.startswith("image/"):
                        output.metadata[kind] = {**output.metadata.get(kind, {}), "alt": cell.metadata.alt}


def is_widget(output: nbformat.NotebookNode) -> bool:
    """Whether an output is a live widget, whose stored form GitHub cannot show."""
    return WIDGET in output.get("data", {})


def figures_in(notebook: nbformat.NotebookNode) -> int:
    """How many pictures the outputs hold."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum(kind.startswith("image/") for output in outputs for kind in output.get("data", {}))


@contextmanager
def stopping(pool: ThreadPoolExecutor, running: list[NotebookClient]) -> Iterator[None]:
    """If the block is interrupted, stop the kernels that still run, so that nothing is left behind."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for client in list(running):
            process = getattr(getattr(client.km, "provisioner", None), "process", None)
            if process is not None:
                process.kill()
        raise


def clear_away() -> None:
    """Remove the temporary folders that a killed run left a day ago."""
    for folder in Path(tempfile.gettempdir()).glob(f"{OWN}*"):
        with suppress(OSError):  # another run may remove it, too
            if folder.stat().st_mtime < time.time() - 24 * 3600:
                shutil.rmtree(folder)


def execute_all(paths: list[Path], target: Path, jobs: int) -> tuple[dict[str, float], list[str]]:
    """Run the notebooks, `jobs` at a time; return the minutes of those that ran to their end, and what was wrong."""
    progress, running, minutes, wrong = Progress(len(paths)), [], {}, []

    def one(path: Path) -> None:
        start = time.monotonic()
        try:
            notebook = execute(path, progress, running)
        except FAILED:
            wrong.append(f"{path.stem} failed")
        except Lost as error:
            wrong.append(str(error))
        else:
            with run.replacing(target / path.relative_to(HERE)) as temporary:
                temporary.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8", newline="\n")
            minutes[path.stem] = (time.monotonic() - start) / 60

    with ThreadPoolExecutor(jobs) as pool, stopping(pool, running):
        for future in [pool.submit(one, path) for path in paths]:
            future.result()
    return minutes, wrong


def main() -> int:
    """Run the notebooks named (all by default); return 1 if one fails, or if a stored number is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="stems or numbers, such as 07; all by default")
    parser.add_argument("--in-place", action="store_true", help="write back into notebooks/, for committing")
    parser.add_argument("--jobs", type=int, default=2, help="how many notebooks at a time (default 2)")
    parser.add_argument(
        "--record", action="store_true", help="record the minutes, with runs/ empty, so that trainings count"
    )
    parser.add_argument("--minutes", action="store_true", help="only state the recorded minutes where they are quoted")
    arguments = parser.parse_args()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a console that knows no û still shows the rest
    if arguments.minutes:
        return restate.main([])
    names = tuple(name for words in arguments.names for name in words.split(","))
    masters = sorted((HERE / "assignments" / "solutions").glob("A*.ipynb")) if names else []  # run only if named
    paths = [path for path in restate.series() + masters if not names or path.stem.startswith(names)]
    unknown = [name for name in names if not any(path.stem.startswith(name) for path in paths)]
    if unknown or arguments.jobs < 1:
        parser.error(
            f"names must be of notebooks in {HERE.name}/, and jobs at least 1, got {unknown or arguments.jobs}"
        )
    paths.sort(key=lambda path: FIRST.index(path.name[:2]) if path.name[:2] in FIRST else len(FIRST))
    try:
        full = run.budget() == "full"
        surroundings("")  # the folders
    except ValueError as error:
        parser.error(str(error))
    if arguments.in_place and full and not on_mnist():
        print("MNIST is needed in place: the outputs of the digits would replace the committed ones", file=sys.stderr)
        return 2
    target = HERE if arguments.in_place else copies()
    begin, clock, (before, whose) = (
        time.monotonic(),
        time.time(),
        stored.committed_numbers(ROOT / "figures" / "results"),
    )
    clear_away()
    minutes, wrong = execute_all(paths, target, arguments.jobs)
    total = (time.monotonic() - begin) / 60
    if full:
        lines, missed = stored.compare_numbers(before, stored.stored_numbers(since=clock))
        print("\n".join([*lines, f"  (compared with {whose})"]))
        wrong += [f"{missed} stored numbers missed their tolerance"] * bool(missed)
    of_the_series = {path.stem: minutes[path.stem] for path in restate.series() if path.stem in minutes}
    if arguments.record and of_the_series:
        restate.record(run.budget(), of_the_series, total, arguments.jobs)
    if arguments.record or arguments.in_place:
        restate.main([])
    print(f"done in {total:.1f} minutes: {len(minutes)} of {len(paths)} notebooks, in {shown(target)}")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def on_mnist() -> bool:
    """Whether the notebooks would find MNIST."""
    from planar_helpers.data import load_images  # heavy, and needed here only

    return load_images().name.startswith("MNIST")


def copies() -> Path:
    """Where executed copies go: build/notebooks, or a folder beside the figures if PLANAR_FIGURES moves them."""
    return (
        run.folder("figures").absolute() / "notebooks"
        if os.environ.get("PLANAR_FIGURES")
        else ROOT / "build" / "notebooks"
    )


def shown(path: Path) -> str:
    """The path as the user would type it at the root."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    from planar_helpers.__main__ import stop_on_signals

    stop_on_signals("execute.py")  # the trainings go on from their last epochs
    sys.exit(main())
