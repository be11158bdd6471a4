"""Read the book in headless Chromium, without a network (`make book-test`, after `make book`).

    python tests/browser_book.py             every page
    python tests/browser_book.py index 03    the pages whose name holds one of these

It fails if a formula shows an error or is left unrendered, if a request fails or leaves this machine, if a link of the
book leads nowhere, if an equation that the text names is no link, if a search for "û", a function or a section finds
nothing, if the playground or a folded answer does not open, if a page scrolls sideways on a phone or on paper, or if a
text stands out from its ground by less than WCAG's level AA asks, in the light or in the dark. The pages are read from
their files, as after a double click; the search, from a server on loopback, too. A picture of each page, on a desktop,
a phone, and in the dark, and the core notebooks as PDFs, each and all on one page, go to build/browser/book/. A sheet
must show no figure split, nothing beyond its margins, and no heading alone at its foot.
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

import pypdfium2
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
from browser_panel import CHROMIUM_ARGS, OUT, ROOT, find_chromium, wait_until  # noqa: E402  (a script, not a package)
from playwright.sync_api import sync_playwright
from pypdfium2.raw import FPDF_PAGEOBJ_IMAGE, FPDF_PAGEOBJ_TEXT

SITE = ROOT / "build" / "book"
VIEWS = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
}
SEARCHES = {"û": "03", "planar_inverse": "planar_inverse", "gallery": "gallery", "What does each step do": "04"}
PLANE = "document.querySelector('.planar-plane').toDataURL()"
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

FIGURES = """() => [...document.querySelectorAll('article img')].filter(e => e.checkVisibility())
    .map(e => [e.src, e.getBoundingClientRect().width])"""
SIDES = ("top", "bottom", "left", "right")
CUT_OFF = """() => [...document.querySelectorAll('article pre, article table, article .math, article img')].filter(e =>
    e.checkVisibility() && (e.getBoundingClientRect().right > innerWidth + 2 ||
        (e.clientWidth && e.scrollWidth > e.clientWidth + 2)))
    .map(e => e.tagName + ' ' + e.textContent.trim().slice(0, 50))"""
FURNITURE = """() => ['.planar-playground', '.sidebar-drawer', '.toc-drawer', '.mobile-header', '.related-pages',
    '.notebook-links', '.copybtn', '.content-icon-container', '.skip-to-content'].filter(name =>
        [...document.querySelectorAll(name)].some(e => e.checkVisibility()))"""
UNLINKED = """() => {
    const numbers = new Set([...document.querySelectorAll('[id^=equation-]')].map(e => e.id.slice(9))), found = [];
    const walker = document.createTreeWalker(document.querySelector('article'), NodeFilter.SHOW_TEXT);
    for (let text; (text = walker.nextNode()); )
        if (!text.parentElement.closest('a, code, pre, h1, h2, h3, mjx-container, script, style, .planar-playground'))
            for (const mention of text.data.matchAll(/(equations? |Eqs?\\. )?\\(([1-9]\\d?)\\)/g))
                if (numbers.has(mention[2]) && !mention[1]?.startsWith('equation'))
                    found.push(text.data.slice(Math.max(0, mention.index - 20), mention.index + 10));
    return found; }"""
POOR_CONTRAST = """() => {
    const pen = document.createElement('canvas').getContext('2d', { willReadFrequently: true }), known = {};
    const read = (colour) => { pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
        return [...pen.getImageData(0, 0, 1, 1).data].map(c => c / 255); };
    const rgba = (colour) => known[colour] ??= read(colour);
    const over = (top, under) => under.map((c, i) => top[3] * top[i] + (1 - top[3]) * c);
    const ground = (e) => e ? over(rgba(getComputedStyle(e).backgroundColor), ground(e.parentElement)) : [1, 1, 1];
    const light = (colour) => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => sum + share * (
        colour[i] <= 0.04045 ? colour[i] / 12.92 : ((colour[i] + 0.055) / 1.055) ** 2.4), 0);
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), seen = new Set(), poor = {};
    let least = 21;
    for (let text; (text = walker.nextNode()); ) {
        const e = text.parentElement;
        if (!text.data.trim() || seen.has(e) || !e.checkVisibility({ visibilityProperty: true, opacityProperty: true }))
            continue;
        seen.add(e);
        const style = getComputedStyle(e), below = ground(e), size = parseFloat(style.fontSize);
        const [a, b] = [light(over(rgba(style.color), below)), light(below)];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        const asked = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
        least = Math.min(least, ratio);
        const colours = `${style.color} on ${below.map(c => Math.round(255 * c))}`;
        if (ratio < asked) poor[colours] = `${colours}, contrast ${ratio.toFixed(2)}: ${text.data.trim().slice(0, 40)}`;
    }
    return [least, Object.values(poor)]; }"""


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
        if tag == "img" and re.fullmatch(r"(\S+\.\w+)?", found.get("alt") or ""):  # a file's name says nothing
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
    page.set_default_timeout(120_000)  # a busy machine is not a broken book
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(f"script: {error}"))
    page.on("requestfailed", lambda asked: page.wrong.append(f"failed ({asked.failure}): {asked.url[-80:]}"))
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
        page, lowest, smallest = watched(browser.new_context(offline=True, **view)), 21.0, 99.0
        for path in pages:
            stem = str(path.relative_to(SITE).with_suffix("")).replace("/", "_")
            page.goto(path.as_uri())
            wait_until(lambda page=page: page.evaluate(MATHS_IS_SET), 60, f"the maths of {stem}")
            page.wait_for_timeout(200)
            if name == "desktop":
                formulas += page.locator("mjx-container").count()
                yield from (f"{stem}: {line}" for line in page.evaluate(BAD_MATHS))
                yield from (f"{stem}: no link: {line}" for line in page.evaluate(UNLINKED))
            least, poor = page.evaluate(POOR_CONTRAST)
            lowest = min(lowest, least)
            yield from (f"{stem}, {name}: {line}" for line in poor)
            yield from (f"{stem}, {name}: wider than its screen: {line}" for line in page.evaluate(TOO_WIDE))
            if name == "phone":
                for source, wide in page.evaluate(FIGURES):
                    with Image.open(unquote(source.removeprefix("file://"))) as figure:
                        letters = 10 / 72 * figure.info.get("dpi", (150,))[0] * wide / figure.size[0]
                    smallest = min(smallest, letters)
                    yield "" if letters > 7 else f"{stem}: letters of {letters:.1f} pixels on a phone: {source[-40:]}"
            page.screenshot(path=OUT / "book" / f"{stem}_{name}.png", full_page=name == "desktop" and stem != "print")
            yield from (f"{stem}: {line}" for line in page.wrong)
            page.wrong.clear()
        page.context.close()
        print(f"    {name}: {len(pages)} pages, the lowest contrast of a text {lowest:.1f}", flush=True)
        if name == "phone":
            print(f"    the smallest ten-point letters in a figure: {smallest:.1f} pixels", flush=True)
    print(f"    {formulas} formulae on {len(pages)} pages")


def print_pages(browser: Any, pages: list[Path]) -> Iterator[str]:
    """Print the core notebooks and the core path: all fits a page of A4, and the screen's furniture is gone."""
    page = watched(browser.new_context(offline=True, viewport={"width": 680, "height": 1000}))
    page.emulate_media(media="print", color_scheme="light")
    sheets = {}
    for path in (path for path in pages if re.match(r"\d\d_|print", path.name)):
        page.goto(path.as_uri())
        wait_until(lambda: page.evaluate(MATHS_IS_SET), 120, f"the maths of {path.stem}")
        wide = page.evaluate(TOO_WIDE) + page.evaluate(CUT_OFF)
        yield from (f"{path.stem} on paper: cut off: {line}" for line in wide)
        yield from (f"{path.stem} on paper: {line}" for line in page.evaluate(FURNITURE))
        file = OUT / "book" / f"{path.stem}.pdf"
        page.pdf(path=file, format="A4", margin=dict.fromkeys(SIDES, "15mm"), tagged=True, outline=True)
        sheets[path.stem] = len(pypdfium2.PdfDocument(file))
        yield from (f"{file.name}: {line}" for line in breaks(file))
        tall = page.evaluate("document.documentElement.scrollHeight") / 1000
        print(f"    {path.stem}: {sheets[path.stem]} sheets", flush=True)
        if sheets[path.stem] > 1.6 * tall + 3:
            yield f"{path.stem}: {sheets[path.stem]} sheets, much of them empty"
        yield from page.wrong
    page.context.close()
    parts = [count for stem, count in sheets.items() if re.match("0[0-7]_", stem)]
    if len(parts) == 8 and "print" in sheets and sheets["print"] < 0.95 * sum(parts):
        yield f"the core path has {sheets['print']} sheets, its notebooks {sum(parts)}"


def breaks(file: Path) -> Iterator[str]:
    """What a PDF shows beyond its margins, which split figures do, too, and headings alone at the foot of a page."""
    document, margin = pypdfium2.PdfDocument(file), 15 / 25.4 * 72
    for number, sheet in enumerate(document, 1):
        width, height = sheet.get_size()
        for item in sheet.get_objects(filter=[FPDF_PAGEOBJ_TEXT, FPDF_PAGEOBJ_IMAGE]):
            left, bottom, right, top = item.get_bounds()
            if left < margin - 3 or right > width - margin + 3:
                yield f"sheet {number}: cut off at the side"
            if item.type == FPDF_PAGEOBJ_IMAGE and (bottom < margin - 3 or top > height - margin + 3):
                yield f"sheet {number}: a split figure"
    for heading in document.get_toc():
        place = heading.get_dest()
        if place.get_view()[1][1] < margin + 32:  # room for the heading, and for no line below it
            yield f"sheet {place.get_index() + 1}: a heading alone at the foot: {heading.get_title()}"


def search(page: Any, address: str, word: str) -> list[str]:
    """The titles that a search finds."""
    page.goto(f"{address}/search.html?q={word}")
    page.wait_for_selector("#search-results ul.search li", timeout=60_000)
    page.wait_for_load_state("networkidle")  # the excerpts: to leave before they are there would cancel them
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
            for word, title in SEARCHES.items():
                found = search(page, address, word)
                print(f"    {address[:5]} search for {word}: {len(found)} found, first {found[:2]}")
                if not any(title in one for one in found):
                    yield f"a search for {word} finds {found[:5]}"
            if address.startswith("file:"):
                page.wrong.clear()  # a page may not read files: the search from a file shows no excerpts
        page.goto((SITE / "index.html").as_uri())
        page.wait_for_timeout(2500)
        before = page.evaluate(PLANE)
        page.get_by_role("button", name="Slide").click()
        wait_until(lambda: page.evaluate(PLANE) != before, 20, "the playground of the front page to move")
        path, core = [], sorted(each.stem for each in (SITE / "notebooks").glob("[0-9]*.html"))
        while len(path) < len(core):
            page.locator(".related-pages a.next-page").click()
            page.wait_for_load_state()
            path.append(Path(page.url).stem)
            if "of reading" not in page.locator("article").inner_text():
                yield f"{path[-1]} does not say how long it takes"
        if path != core:
            yield f"who follows Next from the front page comes through {path}"
        page.locator(".related-pages a.prev-page").click()
        page.wait_for_load_state()
        if Path(page.url).stem != core[-2]:
            yield f"Previous leads from {core[-1]} to {page.url}"
        page.goto(f"http://127.0.0.1:{server.server_port}/notebooks/{core[3]}.html")
        with page.expect_download() as taken:
            page.get_by_role("link", name="Download this notebook").click()
        if taken.value.path().read_bytes() != (ROOT / "notebooks" / f"{core[3]}.ipynb").read_bytes():
            yield "the notebook that one can download is not the committed one"
        page.evaluate(MATHS_IS_SET)
        page.locator("article a[href='#equation-5']").first.click()
        shown = "0 < document.querySelector('#equation-5 + .math').getBoundingClientRect().y"
        try:
            wait_until(lambda: page.evaluate(f"{shown} && {shown[4:]} < innerHeight / 2"), 10, "the equation")
        except TimeoutError:
            yield "a link to an equation does not bring it into view"
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
        for check in (
            broken_links(pages), read_pages(browser, pages), print_pages(browser, pages), use_the_book(browser),
        ):  # fmt: skip
            for line in filter(None, check):
                print(f"    WRONG: {line}", flush=True)
                wrong.append(line)
        browser.close()
    outcome = f"{len(wrong)} things wrong" if wrong else "as it should be"
    print(f"book: {outcome}, {time.monotonic() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
