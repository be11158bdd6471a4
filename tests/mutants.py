"""`make mutants`: change one thing of the package at a time, and see that the tests which guard it fail.

Each mutant is one replacement of a text that stands in its file once, and the tests that must notice. Each runs in a
copy of its own. A mutant that no test notices is printed, and the exit code is 1.

    python tests/mutants.py [--jobs 2] [words that the mutant's file or text must hold]
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("planar_helpers", "tests", "notebooks", "pyproject.toml", "README.md", "environment.yml")
# what was imported before the fork is not rewritten for better messages, and no plugin that is not used is loaded
OPTIONS = ["-q", "-x", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
OPTIONS += [f"-pno:{plugin}" for plugin in ("cacheprovider", "xdist", "nbval", "unraisableexception")]
SECONDS = 120  # a mutant may loop for ever: that is noticed, too


class Mutant(NamedTuple):
    """One change, and the tests that must notice it, as arguments of pytest."""

    file: str
    old: str
    new: str
    tests: str


def mutants() -> list[Mutant]:
    """Read tests/mutants.json."""
    entries = json.loads((ROOT / "tests" / "mutants.json").read_text(encoding="utf-8"))
    return [Mutant(**entry) for entry in entries]


def run(mutant: Mutant) -> tuple[int, str, float]:
    """Return pytest's exit code, what it printed, and the seconds, for a copy of the project with the change made.

    Runs in a process of its own, forked from one that has imported PyTorch, but nothing of the project.
    """
    folder, begin = Path(tempfile.mkdtemp(prefix="mutant-")), time.monotonic()
    try:
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        path = folder / mutant.file
        text = path.read_text(encoding="utf-8")
        if mutant.old and text.count(mutant.old) != 1:
            return -1, f"the text stands {text.count(mutant.old)} times", 0.0
        path.write_text(text.replace(mutant.old, mutant.new) if mutant.old else text, encoding="utf-8")
        os.chdir(folder)
        os.environ |= {"PYTHONPATH": str(folder), "PLANAR_RUNS": str(folder / "runs")}
        sys.path.insert(0, str(folder))
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(SECONDS)
        import pytest

        options = [*OPTIONS, f"--rootdir={folder}"]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                code = int(pytest.main([*options, *shlex.split(mutant.tests)]))
            except _TooLong:
                code = 1
        signal.alarm(0)
        return code, printed.getvalue(), time.monotonic() - begin
    finally:
        os.chdir(ROOT)
        shutil.rmtree(folder, ignore_errors=True)


def together(selections: set[str]) -> list[str]:
    """Join the selections of each test file into one, to see once that all of them pass without a mutant."""
    words: dict[str, list[str]] = {}
    for selection in sorted(selections):
        file, _, expression = selection.partition(" -k ")
        words.setdefault(file, []).append(" ".join(shlex.split(expression)) if expression else "test")
    return [f"{file} -k {shlex.quote(' or '.join(f'({word})' for word in all_))}" for file, all_ in words.items()]


class _TooLong(BaseException):
    """Raised in a mutant that runs for longer than SECONDS; no test catches it by mistake."""


def _too_long(*_: object) -> None:
    raise _TooLong


def main() -> int:
    """Run all mutants, and the tests of each file that must notice them once without any, where they must pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutants whose file or text holds one of these words")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    chosen = [m for m in mutants() if not arguments.words or any(w in m.file + m.old + m.new for w in arguments.words)]
    clean = [Mutant("pyproject.toml", "", "", tests) for tests in together({m.tests for m in chosen})]
    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": "1"}
    # imported once, here, so that each fork has them: a mutant then costs its tests, not PyTorch's import
    import hypothesis  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import pytest  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch
    import torchvision.datasets  # noqa: F401
    import tqdm  # noqa: F401

    torch.set_num_threads(1)
    begin, failures, seconds = time.monotonic(), [], {}
    with multiprocessing.get_context("fork").Pool(arguments.jobs, maxtasksperchild=1) as pool:
        jobs = [*clean, *chosen]
        for number, (mutant, (code, printed, took)) in enumerate(zip(jobs, pool.imap(run, jobs), strict=True), 1):
            seconds[f"{mutant.file}: {mutant.old!r} ({mutant.tests})"] = took
            print(f"\r{number} of {len(clean) + len(chosen)}", end="", file=sys.stderr, flush=True)
            if not mutant.old and code != 0:
                failures.append(f"without any mutant, this fails: {mutant.tests}\n{printed[-1500:]}")
            if mutant.old and code not in (1, 2):
                why = printed if code == -1 else "no test noticed"
                failures.append(f"{mutant.file}: {why}: {mutant.old!r} -> {mutant.new!r}   ({mutant.tests})")
    print(file=sys.stderr)
    for failure in failures:
        print(failure)
    slowest = sorted(seconds, key=seconds.__getitem__)[-5:]
    print("the slowest:", *(f"  {seconds[name]:4.0f} s  {name}" for name in slowest), sep="\n")
    minutes = (time.monotonic() - begin) / 60
    print(f"{len(chosen)} mutants, {len(chosen) - len(failures)} noticed, {minutes:.1f} minutes")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
