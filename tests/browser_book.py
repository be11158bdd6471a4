"""Read the book in headless Chromium, without a network (`make book-test`, after `make book`).

    python tests/browser_book.py             every page
    python tests/browser_book.py index 03    the pages whose name holds one of these

It fails if a formula shows an error or is left unrendered, if a request fails or leaves this machine, if a link of the
book leads nowhere, if a search for "û" or a function finds nothing, if the playground or a folded answer does not open,
or if a page scrolls sideways on a phone. The pages are read from their files, as after a double click; the search, from
a server on loopback, too. A picture of each page, on a desktop, a phone, and in the dark, goes to build/browser/book/.
"""

import functools
import http.server
import re
import sys
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

sys.path.insert(0, str(Path(__file__).resolve().parent))
from browser_panel import CHROMIUM_ARGS, OUT, ROOT, find_chromium, wait_until  # noqa: E402  (a script, not a package)
from playwright.sync_api import sync_playwright

SITE = ROOT / "build" / "book"
VIEWS = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
}
MATHS_IS_SET = "window.MathJax?.startup?.promise?.then(() => true)"
BAD_MATHS = """() => {
    const wrong = [...document.querySelectorAll('[data-mml-node=merror], mjx-merror')].map(e => 'error: ' +
        (e.getAttribute('title') || e.dataset.mjxError || e.textContent));
    const raw = [...document.querySelectorAll('article p, article li, article td, .math')].map(e => {
        const copy = e.cloneNode(true);
        copy.querySelectorAll('code, pre, mjx-container, script, style').forEach(c => c.remove());
        return copy.textContent; }).filter(t => /\\\\(begin|mathbf|frac|hat|log|tag)|\\$\\$/.test(t));
    return [...wrong, ...raw.map(t => 'not rendered: ' + t.trim().slice(0, 60))]; }"""
TOO_WIDE = """() => document.documentElement.scrollWidth <= innerWidth ? [] :
    [...document.querySelectorAll('article *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)
        .slice(0, 3).map(e => e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 40))"""


class Page(HTMLParser):
    """What a page offers and asks for: its anchors, its links, pictures without a text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.anchors, self.links, self.silent = path, set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Note what this tag says."""
        found = dict(attributes)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        self.links += [found[key] for key in ("href", "src") if found.get(key)]
        if tag == "img" and not found.get("alt"):
            self.silent.append(found.get("src"))


def broken_links(pages: list[Path]) -> Iterator[str]:
    """Every link within the book leads to a file, and to an anchor that is in it; every picture has a text."""
    read = {path: Page(path) for path in SITE.rglob("*.html")}
    count = 0
    for path in pages:
        yield from (f"{path.name}: no alternative text for {source}" for source in read[path].silent)
        for link in read[path].links:
            address, anchor = urldefrag(unquote(link))
            if re.match(r"[a-z]+:", address) or link.startswith("#planar="):
                continue
            target = (path.parent / address.split("?")[0]).resolve() if address else path
            count += 1
            if not target.exists():
                yield f"{path.name}: {link} leads nowhere"
            elif anchor and target in read and anchor not in read[target].anchors:
                yield f"{path.name}: {link}: {target.name} has no such place"
    print(f"    {count} links within the book, {len(read)} pages")


def watched(context: Any) -> Any:
    """A page of that context, whose failed, foreign and erroneous doings are kept."""
    page = context.new_page()
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(f"script: {error}"))
    page.on("requestfailed", lambda asked: page.wrong.append(f"failed: {asked.url[-80:]}"))
    page.on(
        "request",
        lambda asked: (
            asked.url.startswith(("file:", "data:", "blob:", "http://127.0.0.1")) or page.wrong.append(asked.url)
        ),
    )
    return page


def read_pages(browser: Any, pages: list[Path]) -> Iterator[str]:
    """Open each page on a desktop, a phone, and in the dark."""
    formulas = 0
    for name, view in VIEWS.items():
        page = watched(browser.new_context(offline=True, **view))
        for path in pages:
            stem = str(path.relative_to(SITE).with_suffix("")).replace("/", "_")
            page.goto(path.as_uri())
            wait_until(lambda page=page: page.evaluate(MATHS_IS_SET), 60, f"the maths of {stem}")
            page.wait_for_timeout(200)
            if name == "desktop":
                formulas += page.locator("mjx-container").count()
                yield from (f"{stem}: {line}" for line in page.evaluate(BAD_MATHS))
            yield from (f"{stem}, {name}: wider than its screen: {line}" for line in page.evaluate(TOO_WIDE))
            page.screenshot(path=OUT / "book" / f"{stem}_{name}.png", full_page=name == "desktop")
            yield from (f"{stem}: {line}" for line in page.wrong)
            page.wrong.clear()
        page.context.close()
    print(f"    {formulas} formulae on {len(pages)} pages")


def search(page: Any, address: str, word: str) -> list[str]:
    """The titles that a search finds."""
    page.goto(f"{address}/search.html?q={word}")
    page.wait_for_selector("#search-results ul.search li", timeout=20_000)
    page.wait_for_timeout(1500)
    return page.locator("#search-results ul.search li > a").all_inner_texts()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server that says nothing of each request."""

    def log_message(self, *words: Any) -> None:
        """Say nothing."""


def use_the_book(browser: Any) -> Iterator[str]:
    """Search from a file and from a server; play on the front page; unfold an answer."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        page = watched(browser.new_context(**VIEWS["desktop"]))
        for address in (SITE.as_uri(), f"http://127.0.0.1:{server.server_port}"):
            for word, title in (("û", "03"), ("planar_inverse", "planar_inverse"), ("gallery", "gallery")):
                found = search(page, address, word)
                print(f"    {address[:5]} search for {word}: {len(found)} found, first {found[:2]}")
                if not any(title in one for one in found):
                    yield f"a search for {word} finds {found[:5]}"
            if address.startswith("file:"):
                page.wrong.clear()  # a page may not read files: the search from a file shows no excerpts
        page.goto((SITE / "index.html").as_uri())
        page.wait_for_timeout(2500)
        before = page.evaluate("document.querySelector('.planar-plane').toDataURL()")
        page.get_by_role("button", name="Slide").click()
        page.wait_for_timeout(2500)
        if page.evaluate("document.querySelector('.planar-plane').toDataURL()") == before:
            yield "the playground of the front page does not move"
        page.goto((SITE / "notebooks" / "03_u_hat_constraint.html").as_uri())
        if page.locator("details").count():
            page.locator("details > summary").first.click()
            if not page.locator("details").first.evaluate("e => e.open && e.offsetHeight > 60"):
                yield "a folded answer does not open"
        yield from page.wrong
    finally:
        server.shutdown()
        server.server_close()


def main() -> int:
    """Run the checks; return 1 if anything is wrong."""
    if not (SITE / "index.html").is_file():
        sys.exit("the book is not built: run make book first")
    (OUT / "book").mkdir(parents=True, exist_ok=True)
    words = sys.argv[1:]
    pages = [p for p in sorted(SITE.rglob("*.html")) if not words or any(word in str(p) for word in words)]
    pages = [p for p in pages if p.name not in ("search.html", "genindex.html")]
    start, wrong = time.monotonic(), []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), headless=True, args=CHROMIUM_ARGS)
        for check in (broken_links(pages), read_pages(browser, pages), use_the_book(browser)):
            for line in check:
                print(f"    WRONG: {line}", flush=True)
                wrong.append(line)
        browser.close()
    outcome = f"{len(wrong)} things wrong" if wrong else "as it should be"
    print(f"book: {outcome}, {time.monotonic() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
