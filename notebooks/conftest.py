"""How nbval checks the notebooks: progress bars are not compared, and a broken notebook stops at its first failure."""

from collections.abc import Iterator

import pytest

collect_ignore = ["execute.py"]
broken: set[str] = set()


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


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the cells after a failed one: they would only repeat its failure."""
    if str(item.path) in broken:
        pytest.skip("an earlier cell of this notebook failed")
