"""kill -9 where several processes are at work: `make figures`, a notebook's training, a sweep on two cores.

A life is killed at one of its writes, counted over all of its processes: the process that writes dies there, or the
one that was started dies about then. The others must end by themselves; the same command then gives the same bytes.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "notebooks")]
import execute  # noqa: E402
from processes import checkout, figures, files, leftovers, live  # noqa: E402

from planar_helpers import __main__ as command_line  # noqa: E402
from planar_helpers import sweep  # noqa: E402, F401
from planar_helpers.run import replacing  # noqa: E402

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs fork, signals and /proc as Linux has them"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
KILLS = int(os.environ.get("PLANAR_KILLS", "0")) // 12 or 1
SEED = int(os.environ.get("PLANAR_STRESS_SEED", "0"))
Tally = Callable[[str, int, str], None]

# --- what is killed -------------------------------------------------------------------------------------------------

TRAINS = """
from planar_helpers import data, results, train
images = data.load_images("digits")
images = images._replace(train=images.train[:240], test=images.test[:40])
model, history = train.train_or_load(images, 12, K=1, hidden=8)
"""
STORES = """
path = results.save_numbers("01_trained", {"ELBO": (history.test.elbo[-1].item(), 0.1)}, images.name)
"""
DRAWS = """
import matplotlib.pyplot as plt
fig, ax = plt.subplots()
ax.plot(history.test.elbo)
path = results.save_figure(fig, "01_trained")
plt.show()
"""


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with a series of two notebooks: one trains, stores and draws."""
    series = {"01_trained": (TRAINS, STORES, DRAWS), "02_counts": ("print(sum(range(10)))",)}
    return checkout(tmp_path_factory.mktemp("course"), series)


def swept(jobs: int) -> Callable[[], None]:
    """A sweep of four runs, so many at a time."""

    def start() -> None:
        command_line.stop_on_signals("planar")
        words = f"sweep --data digits --hidden 8 --K 0,1 --seed 0,1 --epochs 3 --jobs {jobs}"
        sys.exit(command_line.main(words.split()))

    return start


def whole(home: Path) -> dict[str, Any]:
    """All files but those with a temporary name."""
    found = files(home)
    return {name: content for name, content in found.items() if name not in leftovers(found) and "tmp/" not in name}


def kernels(home: Path) -> list[Path]:
    return [*(home / "tmp").glob("planar-kernel-*")]


def a_day_later(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that what killed processes left goes with the first write in its folder, or the first kernel."""
    left = [home / name for name in leftovers(files(home))]
    for path in [*left, *kernels(home)]:
        os.utime(path, (time.time() - 2 * 86400,) * 2)
    for folder in {path.parent for path in left}:
        with replacing(folder / "another") as temporary:
            temporary.touch()
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "tempdir", str(home / "tmp"))
        execute.clear_away()
    assert not leftovers(files(home)) and not kernels(home)


@pytest.mark.parametrize("what", ["make figures and its kernels", "a sweep in two processes"])
def test_all_processes_end_and_the_same_command_gives_the_same_bytes(
    course: Path, tmp_path: Path, what: str, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a sweep in one process takes no time to start: its bytes are those to compare with
    start, alone = (figures(course),) * 2 if what.startswith("make") else (swept(2), swept(1))
    (tmp_path / "reference").mkdir()
    reference = live(alone, tmp_path / "reference")
    assert reference.code == 0, reference.said
    expected = whole(tmp_path / "reference" / "home")
    assert {Path(name).suffix for name in expected} >= {".json", ".pt"} and len(expected) > 5, sorted(expected)
    generator = random.Random(f"{SEED}, {what}")
    killed, lives = 0, 0
    while killed < KILLS:
        lives += 1
        assert lives <= 3 * KILLS, "too few lives were killed"
        base = tmp_path / f"life {lives}"
        base.mkdir()
        number = generator.randint(1, reference.writes)
        ended = live(start, base, **{("end_at", "die_at")[killed % 2]: number})
        assert ended.code in (0, 1, -signal.SIGKILL) and "Traceback" not in ended.said, ended
        killed += ended.code != 0
        again = live(alone, base)
        assert again.code == 0, again.said
        found = whole(base / "home")
        assert found.keys() == expected.keys(), (number, sorted(found))
        assert found == expected, [name for name in found if found[name] != expected[name]]
        a_day_later(base / "home", monkeypatch)
        shutil.rmtree(base)
    tally("kill −9 survived, several processes", killed, f"seed {SEED}, {what}: {reference.writes} writes")
