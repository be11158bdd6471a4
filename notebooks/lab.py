"""Open JupyterLab on copies of the notebooks, in my_notebooks/ (`make lab`): the originals stay as they are.

A copy that you have edited or run is yours, and is never overwritten; one that you have not is brought up to date when
its original changes. Figures and links in the copies work. To start over with a notebook, delete its copy.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINE = ROOT / "my_notebooks"


def digest(path: Path) -> str:
    """A file's fingerprint."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def copy_notebooks(source: Path, mine: Path) -> list[str]:
    """Copy what is new, or changed and not edited; return the edited copies whose originals have changed since."""
    mine.mkdir(parents=True, exist_ok=True)
    ledger = mine / ".copied.json"  # name -> fingerprint of the copy as it was made
    made = json.loads(ledger.read_text(encoding="utf-8")) if ledger.is_file() else {}
    kept = []
    for path in sorted(source.rglob("*.ipynb")):
        name = path.relative_to(source).as_posix()
        copy = mine / name
        if ".ipynb_checkpoints" in path.parts:
            continue
        if copy.exists() and digest(copy) != made.get(name):
            kept += [name] if made.get(f"{name}, original") != digest(path) else []
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        made[name], made[f"{name}, original"] = digest(copy), digest(path)
    ledger.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return kept


def main() -> int:
    """Make the copies and open the first in JupyterLab, whose kernel is this interpreter."""
    try:
        kept = copy_notebooks(ROOT / "notebooks", MINE)
    except OSError as error:
        print(
            f"my_notebooks/ cannot be written ({error.strerror}): copy the checkout to a folder of yours",
            file=sys.stderr,
        )
        return 1
    for name in kept:
        print(f"my_notebooks/{name} is your edited copy and stays; its original has changed since", flush=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel beside this interpreter, not one from the home
        "PLANAR_BUDGET": os.environ.get("PLANAR_BUDGET") or "quick",
        "PLANAR_FIGURES": os.environ.get("PLANAR_FIGURES") or str(ROOT / "build" / "my_figures"),
    }
    environment.pop("MPLBACKEND", None)  # each kernel shows its figures
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={ROOT}", str(MINE / "00_start_here.ipynb")]
    server = subprocess.Popen([*command, *sys.argv[1:]], env=environment, cwd=ROOT)
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())  # Ctrl-C reaches it by itself
    while True:
        try:
            return server.wait()
        except KeyboardInterrupt:  # it asks what to do
            continue


if __name__ == "__main__":
    sys.exit(main())
