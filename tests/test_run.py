"""Seed, device and budget; where each folder lies; one line that never raises; files that arrive whole."""

import io
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import planar_helpers
from planar_helpers import run
from planar_helpers.run import budget, by_budget, folder, pick_device, replacing, say, seed_all


@pytest.fixture(autouse=True)
def _no_folder_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("DATA", "RUNS", "FIGURES", "RESULTS", "BUILD"):
        monkeypatch.delenv(f"PLANAR_{kind}", raising=False)


def test_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    for unset in (None, ""):
        monkeypatch.delenv("PLANAR_BUDGET", raising=False) if unset is None else monkeypatch.setenv("PLANAR_BUDGET", "")
        assert budget() == "quick" and by_budget(1, 2) == 1
    monkeypatch.setenv("PLANAR_BUDGET", "full")
    assert budget() == "full" and by_budget(1, 2) == 2
    monkeypatch.setenv("PLANAR_BUDGET", "Full")
    with pytest.raises(ValueError, match="PLANAR_BUDGET must be one of"):
        budget()


def test_device_and_seed() -> None:
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    seed_all(3)
    first = torch.rand(3), np.random.rand()  # noqa: NPY002
    seed_all(3)
    assert torch.equal(first[0], torch.rand(3)) and first[1] == np.random.rand()  # noqa: NPY002


def test_folders_lie_in_the_checkout_and_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkout = Path(planar_helpers.__file__).parent.parent
    monkeypatch.chdir(tmp_path)
    for kind in ("data", "runs", "figures", "build"):
        assert folder(kind) == checkout / kind
    assert folder("results") == checkout / "figures" / "results"
    monkeypatch.setenv("PLANAR_BUILD", "elsewhere")
    assert folder("build") == checkout / "build"
    monkeypatch.setenv("PLANAR_FIGURES", str(tmp_path / "ä b"))
    assert folder("figures") == tmp_path / "ä b" and folder("results") == tmp_path / "ä b" / "results"
    for kind in ("data", "runs", "results"):
        monkeypatch.setenv(f"PLANAR_{kind.upper()}", f"~/{kind}")
        assert folder(kind) == Path.home() / kind
        monkeypatch.setenv(f"PLANAR_{kind.upper()}", "")
    assert folder("runs") == checkout / "runs" and folder("results") == tmp_path / "ä b" / "results"
    with pytest.raises(ValueError, match="kind must be one of"):
        folder("figure")
    assert list(tmp_path.iterdir()) == []  # nothing was created


def test_an_installed_copy_writes_under_the_working_directory(tmp_path: Path) -> None:
    installed = tmp_path / "site-packages" / "planar_helpers"
    installed.mkdir(parents=True)
    for name in ("__init__.py", "run.py"):
        shutil.copy(Path(run.__file__).with_name(name), installed)
    (tmp_path / "site-packages" / "notebooks").mkdir()  # somebody else's: a checkout has pyproject.toml, too
    code = "from planar_helpers import run; print(*(run.folder(kind) for kind in run.FOLDERS), run.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(installed.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = ["data", "runs", "figures", str(Path("figures", "results")), "build", str(installed / "run.py")]
    assert done.stdout.split() == expected


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "gbk", "ascii"])
def test_a_line_never_raises(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    say("only û, and Привет")
    stream.flush()
    assert raw.getvalue().startswith(b"only ") and raw.getvalue().endswith(b"\n")
    assert (raw.getvalue().decode(encoding) == "only û, and Привет\n") == (encoding == "utf-8")
    stream.close()
    say("a closed stream")
    monkeypatch.setattr(sys, "stdout", None)
    say("no stream")
    other = io.StringIO()
    say("û", other)
    assert other.getvalue() == "û\n"


@pytest.mark.parametrize("name", ["model.pt", "no suffix", "ä ö 图.tar.gz"])
@pytest.mark.parametrize("there", [False, True])
def test_a_file_is_replaced_whole(tmp_path: Path, name: str, there: bool) -> None:
    path = tmp_path / "new folder" / "deeper" / name
    if there:
        path.parent.mkdir(parents=True)
        path.write_text("old")
    with replacing(str(path)) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == path.suffix and temporary != path
        temporary.write_text("new")
        assert path.read_text() == "old" if there else not path.exists()
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError), replacing(path) as temporary:  # a folder stands where the file is to go
        temporary.write_text("new")
    assert list(tmp_path.iterdir()) == [path]


def test_the_working_directory_may_change_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    with replacing("file.txt") as temporary:
        temporary.write_text("new")
        os.chdir("other")
    assert (tmp_path / "file.txt").read_text() == "new" and list((tmp_path / "other").iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_of_ordinary_files(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


def test_the_folder_of_a_user_who_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANAR_RUNS", "~nosuchuser/x")
    with pytest.raises(ValueError, match="PLANAR_RUNS must name a folder, got '~nosuchuser/x': there is no such user"):
        folder("runs")
    monkeypatch.setenv("PLANAR_RUNS", "~/x")
    assert folder("runs") == Path.home() / "x"


def test_what_a_killed_process_left_goes_a_day_later(tmp_path: Path) -> None:
    old, young, mine = (tmp_path / name for name in (f".{'0a' * 8}.pt", f".{'0b' * 8}.json", ".hidden"))
    for path, hours in ((old, 25), (young, 23), (mine, 1000)):
        path.touch()
        os.utime(path, (path.stat().st_mtime - hours * 3600,) * 2)
    with replacing(tmp_path / "file") as temporary:
        temporary.touch()
    assert {path.name for path in tmp_path.iterdir()} == {mine.name, young.name, "file"}
