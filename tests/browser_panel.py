"""Run notebooks in a real JupyterLab, in headless Chromium, and use their playgrounds.

    python tests/browser_panel.py              notebook 02 and its playground (`make browser`)
    python tests/browser_panel.py 03 05        these notebooks
    python tests/browser_panel.py --all        every notebook
    python tests/browser_panel.py --lab        `make lab`, as a reader uses it

The last runs `make lab` in a copy of the checkout whose path has a blank: opens 00 and 02, runs them, drags in the
playground, lets Jupyter save them by itself, shuts it down from its menu, and opens the lab again. It fails if git sees
a change, if a picture or a link of a copy is broken, if an edited copy is overwritten, or if one that was not edited
does not follow its original.

The others work on copies in a temporary folder, with temporary settings, at the quick budget. They fail if a cell shows
an error, if TeX is red or left unrendered, or if a drag leaves the picture or what Python reads as it was. Screenshots
go to build/browser/.
Needs Playwright (`pip install -e ".[browser]"`) and Chromium (in the PATH, or named in the variable CHROMIUM).
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))
import restate  # noqa: E402  (a script, not a package)

OUT = Path(os.environ.get("PLANAR_FIGURES") or ROOT / "build").absolute() / "browser"
CHROMIUM_ARGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
LAB_SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "docmanager-extension/plugin": {"autosaveInterval": 5},  # seconds, instead of 120
    "notebook-extension/tracker": {"windowingMode": "none"},  # else off-screen cells are not rendered
}
IDLE = ".jp-Notebook-ExecutionIndicator[data-status='idle']"
SCREEN = {"width": 1280, "height": 1600}

# Index and text of each cell that shows an error; the caller drops those that are meant to.
FIND_ERRORS = """() => [...document.querySelectorAll('.jp-Notebook .jp-Cell')].flatMap((cell, i) => {
    const error = cell.querySelector("[data-mime-type='application/vnd.jupyter.error']");
    return error ? [[i, error.innerText.trim().split('\\n').pop()]] : [];
})"""
FIND_BAD_TEX = """() => {
    const red = [...document.querySelectorAll('mjx-container *')].filter(
        e => getComputedStyle(e).color === 'rgb(255, 0, 0)' || e.tagName.toLowerCase() === 'mjx-merror');
    const raw = [...document.querySelectorAll('.jp-RenderedMarkdown')].map(e => {
        const copy = e.cloneNode(true);
        copy.querySelectorAll('code, mjx-container').forEach(c => c.remove());
        return copy.textContent;
    }).filter(t => /\\\\(begin|mathbf|frac|top|hat|log)|\\$\\$/.test(t));
    return [...red.map(e => 'red: ' + e.textContent), ...raw.map(t => 'not rendered: ' + t.trim().slice(0, 80))];
}"""
FIND_BROKEN_PICTURES = """() => [...document.querySelectorAll('.jp-RenderedMarkdown img, .jp-OutputArea img')]
    .filter(image => !image.naturalWidth).map(image => image.alt || image.src.slice(0, 80))"""
READ_PLANE = "document.querySelector('.planar-plane').toDataURL()"


def find_chromium() -> str:
    """Return the path of Chromium: from CHROMIUM, else from the PATH; exit with a clear line if there is none."""
    named = os.environ.get("CHROMIUM")
    if named and not Path(named).is_file():
        sys.exit(f"CHROMIUM must name Chromium's executable, got {named!r}, which does not exist")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = named or next(filter(None, map(shutil.which, names)), None)
    if not found:
        sys.exit(
            "Chromium is needed and was not found: install it (Debian: apt install chromium) or set CHROMIUM to it"
        )
    return found


def wait_until(condition: Any, seconds: float, what: str) -> None:
    """Call condition() until it is true; raise TimeoutError after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)


def scratch_settings(folder: Path) -> dict[str, str]:
    """Write JupyterLab's settings to a folder, and return an environment in which nothing of the user's is touched."""
    settings = folder / "settings"
    for name, values in LAB_SETTINGS.items():
        path = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    return {
        "JUPYTERLAB_SETTINGS_DIR": str(settings),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "IPYTHONDIR": str(folder / "ipython"),
        "PLANAR_BUDGET": "quick",
    }


@contextlib.contextmanager
def serving(folder: Path, command: list[str], environment: dict[str, str]) -> Iterator[tuple[str, subprocess.Popen]]:
    """Start a command that ends in a JupyterLab, on a free port; yield its address and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *command, "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root",
        "--IdentityProvider.token=", "--ServerApp.port_retries=0",
    ]  # fmt: skip
    log_path = folder / "server.log"
    with open(log_path, "wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        try:
            wait_until(lambda: server.poll() is not None or answers(f"{address}/api"), 120, "JupyterLab to start")
        except TimeoutError as error:
            raise RuntimeError(f"{error}; its log ends:\n{log_path.read_text()[-1500:]}") from error
        if server.poll() is not None:
            raise RuntimeError(f"JupyterLab did not start; its log ends:\n{log_path.read_text()[-1500:]}")
        yield address, server
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)  # it shuts its kernels down first
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@contextlib.contextmanager
def lab_server(folder: Path) -> Iterator[str]:
    """Serve folder/notebooks with JupyterLab; yield its address."""
    own = scratch_settings(folder) | {
        "JUPYTER_PREFER_ENV_PATH": "1", "PYTHONPATH": str(ROOT), "PLANAR_FIGURES": str(OUT / "figures"),
    }  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"} | own
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={folder / 'notebooks'}"]
    with serving(folder, command, environment) as (address, _):
        yield address


def answers(address: str) -> bool:
    """Whether a server answers there."""
    try:
        with urllib.request.urlopen(address, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def run_notebook(page: Any, address: str, path: Path, seconds: float, place: str = "") -> None:
    """Open a notebook, restart its kernel, run all its cells, and wait for the last."""
    page.goto(f"{address}/lab/tree/{place}{path.name}?reset")
    page.wait_for_selector(IDLE, timeout=120_000)
    page.wait_for_timeout(4000)  # a restart while the page still connects to the new kernel can lose its messages
    page.wait_for_selector(IDLE, timeout=120_000)
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_role("menuitem", name="Restart Kernel and Run All Cells…").click()
    page.get_by_role("button", name="Confirm Kernel Restart").click()
    waiting = page.locator(".jp-InputPrompt", has_text="[*]")
    waiting.first.wait_for(timeout=60_000)
    wait_until(lambda: waiting.count() == 0 and page.locator(IDLE).count() == 1, seconds, f"{path.stem} to run")
    page.wait_for_timeout(1500)  # let the last pictures and formulas be drawn


def scan(page: Any, path: Path) -> list[str]:
    """Return what is wrong on the page: cells with errors that are not meant to fail, bad TeX."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    meant = {i for i, cell in enumerate(cells) if "raises-exception" in cell["metadata"].get("tags", [])}
    errors = [f"cell {i}: {text}" for i, text in page.evaluate(FIND_ERRORS) if i not in meant]
    return errors + page.evaluate(FIND_BAD_TEX)


def use_playground(page: Any, stem: str) -> list[str]:
    """Move u in the playground by a key and by the mouse, and return what did not follow: its picture, or Python."""
    handle = page.locator("[data-handle=u]").first
    if handle.count() == 0:
        return ["the playground is missing"]
    panel = page.locator(".planar").first
    panel.scroll_into_view_if_needed()
    page.wait_for_timeout(1000)
    panel.screenshot(path=OUT / f"{stem}_playground_before.png")
    wrong = []
    for way in ("ArrowRight", "mouse"):
        before, start = page.evaluate(READ_PLANE), time.monotonic()
        if way == "mouse":
            box = handle.bounding_box()
            page.mouse.move(box["x"] + 15, box["y"] + 15)
            page.mouse.down()
            page.mouse.move(box["x"] + 15, box["y"] - 45, steps=4)
            page.mouse.up()
        else:
            handle.focus()
            page.keyboard.press(way)
        try:
            wait_until(lambda old=before: page.evaluate(READ_PLANE) != old, 10, "the picture")
            print(f"    u moved by {way}, new picture after {time.monotonic() - start:.2f} s")
        except TimeoutError:
            wrong.append(f"{way} left the picture as it was")
    reader = page.locator(".jp-CodeCell:has-text('playground.w')").first
    old = reader.locator(".jp-OutputArea-output").inner_text()

    def answered() -> bool:  # the drag may still be on its way to a busy kernel: ask again
        reader.locator(".cm-content").click()
        page.keyboard.press("Shift+Enter")
        page.wait_for_timeout(1000)
        return reader.locator(".jp-OutputArea-output").inner_text() not in (old, "")

    try:
        wait_until(answered, 30, "Python's answer")
    except TimeoutError:
        wrong.append(f"u was dragged, and Python still says {old.strip()!r}")
    panel.screenshot(path=OUT / f"{stem}_playground_after.png")
    return wrong


def take_screenshots(page: Any, stem: str) -> int:
    """Save the whole notebook, one screen after the other; return how many."""
    for old in OUT.glob(f"{stem}_screen_*.png"):
        old.unlink()
    outer = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-WindowedPanel-outer").first
    height, step = outer.evaluate("e => [e.scrollHeight, e.clientHeight]")
    number = -(-height // step)
    for i in range(number):
        outer.evaluate(f"e => e.scrollTo(0, {i * step})")
        page.wait_for_timeout(150)
        outer.screenshot(path=OUT / f"{stem}_screen_{i + 1:02}.png")
    return number


def git(root: Path, *words: str) -> str:
    """What git says in a folder."""
    identity = ["-c", "user.name=reader", "-c", "user.email=reader@example.org"]
    return subprocess.run(["git", *identity, *words], cwd=root, check=True, capture_output=True).stdout.decode("utf-8")


def checkout(root: Path) -> None:
    """Make a repository of this checkout's files as they are now, committed or not, and commit them."""
    for name in filter(None, git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "a reader's checkout")


def broken_links(path: Path) -> list[str]:
    """Targets of a notebook's links and pictures that are not there."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", prose) if not re.match(r"https?:|attachment:|data:", t)]
    return [f"{path.name} links to {target}" for target in targets if not (path.parent / target).exists()]


def use_the_lab(browser: Any, root: Path, folder: Path, seconds: float) -> Iterator[str]:
    """Open `make lab` twice in a checkout, as a reader would; yield what is wrong."""
    mine, stems = root / "my_notebooks", ("00_start_here", "02_planar_flow")
    kept = {name: value for name, value in os.environ.items() if name != "PLANAR_FIGURES"}
    environment = kept | scratch_settings(folder)
    command = [sys.executable, str(root / "notebooks" / "lab.py")]
    with serving(folder, command, environment) as (address, server):
        for stem in stems:
            page, copy, start = browser.new_page(viewport=SCREEN), mine / f"{stem}.ipynb", time.monotonic()
            before = copy.read_bytes()
            run_notebook(page, address, copy, seconds, place="my_notebooks/")
            print(f"    {stem} ran in {time.monotonic() - start:.0f} s")
            yield from scan(page, copy)
            yield from (f"{stem}: no picture at {source}" for source in page.evaluate(FIND_BROKEN_PICTURES))
            if "Playground(" in copy.read_text(encoding="utf-8"):
                yield from use_playground(page, stem)
            wait_until(
                lambda copy=copy, before=before: copy.read_bytes() != before, 60, f"{stem} to be saved by itself"
            )
            if stem != stems[-1]:
                page.close()
        page.get_by_role("menuitem", name="File", exact=True).click()
        page.get_by_role("menuitem", name="Shut Down", exact=True).click()
        page.get_by_role("button", name="Shut Down").click()
        wait_until(lambda: server.poll() is not None, 60, "JupyterLab to shut down from its menu")
        page.close()
        if server.returncode:
            yield f"the lab ended with exit code {server.returncode}"
    for path in sorted(mine.glob("*.ipynb")):
        yield from broken_links(path)
    yield from (f"git sees: {line}" for line in git(root, "status", "--porcelain").splitlines())
    edited = (mine / "02_planar_flow.ipynb").read_bytes()
    for stem in ("02_planar_flow", "03_u_hat_constraint"):
        original = root / "notebooks" / f"{stem}.ipynb"
        original.write_bytes(original.read_bytes() + b"\n")
    with serving(folder, command, environment):
        if (mine / "02_planar_flow.ipynb").read_bytes() != edited:
            yield "the edited copy of 02 was overwritten"
        if not (mine / "03_u_hat_constraint.ipynb").read_bytes().endswith(b"}\n\n"):
            yield "the copy of 03, which nobody edited, does not follow its original"
        if "02_planar_flow.ipynb is your edited copy" not in (folder / "server.log").read_text(encoding="utf-8"):
            yield "that 02's original has changed is not said"


def main() -> int:
    """Run the notebooks named (02 by default); return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="stems or numbers, such as 07; 02 by default")
    parser.add_argument("--all", action="store_true", help="every notebook")
    parser.add_argument("--lab", action="store_true", help="`make lab`, as a reader uses it")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one notebook to run (default 900)")
    arguments = parser.parse_args()
    names = tuple(arguments.names or ["02"])
    paths = restate.series()
    paths = [path for path in paths if arguments.all or path.stem.startswith(names)]
    if not paths:
        parser.error(f"names must be of notebooks in notebooks/, got {list(names)}")
    chromium = find_chromium()
    try:
        from playwright.sync_api import Error as PlaywrightError
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        sys.exit('Playwright is needed and was not found: pip install -e ".[browser]"')

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a kill stops the server, too
    OUT.mkdir(parents=True, exist_ok=True)
    failed = []
    with tempfile.TemporaryDirectory(prefix="planar-browser-") as temporary:
        folder = Path(temporary)
        if arguments.lab:
            root = folder / "my course" / "planar"
            root.mkdir(parents=True)
            checkout(root)
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=CHROMIUM_ARGS)
                for line in use_the_lab(browser, root, folder, arguments.timeout):
                    print(f"    WRONG: {line}")
                    failed.append(line)
                browser.close()
            print("make lab: " + (f"{len(failed)} things wrong" if failed else "as it should be"))
            return 1 if failed else 0
        (folder / "notebooks").mkdir()
        copies = [Path(shutil.copy(path, folder / "notebooks")) for path in paths]
        with lab_server(folder) as address, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=CHROMIUM_ARGS)
            for path in copies:
                print(f"{path.stem}:", flush=True)
                page = browser.new_page(viewport=SCREEN)
                start = time.monotonic()
                try:
                    run_notebook(page, address, path, arguments.timeout)
                    print(f"    ran in {time.monotonic() - start:.0f} s")
                    wrong = scan(page, path)
                    if "Playground(" in path.read_text(encoding="utf-8"):
                        wrong += use_playground(page, path.stem)
                    print(f"    {take_screenshots(page, path.stem)} screenshots in {OUT}/")
                except (PlaywrightError, TimeoutError) as error:
                    page.screenshot(path=OUT / f"{path.stem}_failed.png")
                    wrong = [str(error).splitlines()[0]]
                page.close()
                for line in wrong:
                    print(f"    WRONG: {line}")
                failed += [path.stem] if wrong else []
            browser.close()
    print(
        f"{len(paths) - len(failed)} of {len(paths)} notebooks as they should be"
        + (f"; not: {failed}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
