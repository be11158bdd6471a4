"""How nbval checks the notebooks (`make test`): in surroundings of its own, stopping a notebook at its first failure.

pytest --nbval-lax --nbval-current-env notebooks
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
collect_ignore = ["execute.py", "restate.py", "stored.py", "lab.py"]
# Of the assignments the masters are run; a student's copy fails until it is filled in.
collect_ignore += [
    str(path) for suffix in ("py", "ipynb") for path in (ROOT / "notebooks/assignments").glob(f"*.{suffix}")
]
broken: set[str] = set()
# What a kernel is started with, whatever the user's own variables say. Tests never write into the gallery.
KERNEL = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHONUTF8": "1",
}
UNLESS_SET = {"PLANAR_BUDGET": "quick", "PLANAR_FIGURES": str(ROOT / "build" / "test-figures")}

FOLDERS = ("PLANAR_DATA", "PLANAR_RUNS", "PLANAR_FIGURES", "PLANAR_RESULTS")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to compare every output, and say how the notebooks are tested if they were not asked for by their name."""
    lax, strict = config.getoption("nbval_lax", None), config.getoption("nbval", None)
    here = [Path(word.split("::")[0]).resolve() for word in config.args]
    if strict and not lax:
        raise pytest.UsageError("notebooks print what differs between machines: use --nbval-lax, not --nbval")
    if not lax and here and all(ROOT / "notebooks" in (path, *path.parents) for path in here):
        raise pytest.UsageError(
            "nothing here is tested without nbval: pytest --nbval-lax --nbval-current-env notebooks"
        )
    if lax:
        config.option.nbval_current_env = True  # this interpreter, whatever kernels are installed in the home


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Leave stderr, where progress bars go, out of every comparison."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Remember which notebooks have failed."""
    report = yield
    if report.failed:
        broken.add(str(item.path))
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Skip the cells after a failed one: they would only repeat its failure; start each kernel in its surroundings."""
    if str(item.path) in broken:
        pytest.skip("an earlier cell of this notebook failed")
    before = dict(os.environ)
    os.environ.update(KERNEL | {name: value for name, value in UNLESS_SET.items() if not before.get(name)})
    for name in FOLDERS:
        if os.environ.get(name):
            os.environ[name] = str(Path(os.environ[name]).expanduser().absolute())  # a kernel works in another folder
    try:
        return (yield)
    finally:
        os.environ.clear()
        os.environ.update(before)
