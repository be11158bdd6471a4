"""Write one page to print, without answers and without a network (`make handout N=02`).

Of a notebook: its boxed formulae, its "Your turn" and its questions, with room to write. Of 00: the table of symbols
and the formula sheet. Of an assignment, such as A1: the student copy.
"""

import argparse
import html
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]
import feedback  # noqa: E402

from planar_helpers import run  # noqa: E402

STYLE = (
    feedback.STYLE
    + """
@page { size: A4; margin: 16mm; } body { font-size: 11pt; margin: 0 auto; } h1 { font-size: 1.5em; }
h2 { font-size: 1.2em; margin-top: 1.4em; } pre { font-size: 9.5pt; white-space: pre-wrap; border: 1px solid #ccc; }
.ask > ol > li { margin-bottom: 5.5em; break-inside: avoid; } tr, pre, math { break-inside: avoid; }
table { font-size: 9.5pt; width: 100%; } .from { color: #666; font-size: 9pt; margin: 1em 0 0; }
"""
)
ASKED = ("Your turn", "Questions")
FOLDED = r"<details>\s*<summary>(.*?)</summary>(.*?)</details>"
ANSWERS = ("Answer", "Solution", "Their functions", "Data, and where things go")


def sections(cells: list[dict]) -> list[tuple[str, str]]:
    """Each "## " heading with its text; code is fenced, and what a student unfolds for an answer is left out."""
    text = ""
    for cell in cells:
        source = "".join(cell["source"])
        text += f"\n\n```python\n{source}\n```\n\n" if cell["cell_type"] == "code" else f"\n\n{source}\n\n"
    text = re.sub(FOLDED, lambda found: "" if found[1].startswith(ANSWERS) else found[2], text, flags=re.S)
    text = re.sub(r"^\*\*(Next|Deeper):?\*\*.*$|!\[.*?\]\(.*?\)", "", text, flags=re.M)
    parts = re.split(r"^## (.+)$", text, flags=re.M)
    return list(zip(["", *parts[1::2]], parts[::2], strict=True))


def shown(text: str) -> str:
    """Markdown as HTML: displayed formulae on lines of their own, links as plain words, a space after log."""
    text = re.sub(r"(?<!!)\[([^\]]+)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"\\(log|tanh|det)(?=\s*[a-zA-Z]|\\(?!left))", r"\\\1\\,", text)
    text = re.sub(r"\$\$(.+?)\$\$", lambda found: f"\n\n$$\n{bare(found[1])}\n$$\n\n", text, flags=re.S)
    prime = r"<msup>(<mi[^>]*>[^<]*</mi>)<mi>&#x02032;</mi></msup>"  # raised twice it would be a speck
    return re.sub(prime, r'\1<mo lspace="0" rspace="0">&#x02032;</mo>', feedback.markdown(text))


def bare(latex: str) -> str:
    """A displayed formula without its box, its number and what MathML does not know."""
    return re.sub(r"\\boxed|\\tag\{.*?\}|\\;|\\square", "", latex).strip()


def page(path: Path) -> str:
    """Return the HTML of a notebook's page. Raises ValueError for one in which nothing is asked."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    title = "".join(cells[0]["source"]).splitlines()[0].lstrip("# ")
    body = []
    if path.name.startswith("A"):
        body = [(f"<h2>{html.escape(name)}</h2>" if name else "") + shown(text) for name, text in sections(cells)]
    else:
        for name, text in sections(cells):
            boxed = re.findall(r"\$\$((?:(?!\$\$).)*?\\boxed.*?)\$\$", text, flags=re.S)
            body += [f'<p class="from">{html.escape(name)}</p>{shown(f"$${formula}$$")}' for formula in boxed]
        kept = ("Which symbol", "Formula sheet") if path.name.startswith("00") else ASKED
        for name, text in sections(cells):
            if name.startswith(kept):
                body.append(f'<section class="ask"><h2>{html.escape(name)}</h2>{shown(text)}</section>')
    if not body:
        raise ValueError(f'{path.name} has no formula in a box, no "Your turn" and no questions')
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    lines = "\n".join([f"<h1>{html.escape(title)}</h1>", *body])
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{lines}\n</body></html>\n'


def main(words: list[str] | None = None) -> int:
    """Write the page into build/handouts/, and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="02, D1 or A1")
    name = parser.parse_args(words).name
    notebooks = HERE.parent
    found = [p for folder in (notebooks, notebooks / "deeper", HERE) for p in sorted(folder.glob(f"{name}_*.ipynb"))]
    if len(found) != 1 or feedback.converter is None:
        need = f"N must be the number of one notebook, such as 02, D1 or A1, got {name!r}"
        parser.error(need if len(found) != 1 else 'formulas need latex2mathml: pip install -e ".[grade]"')
    target = run.folder("build") / "handouts" / f"{found[0].stem}.html"
    with run.replacing(target) as temporary:
        temporary.write_text(page(found[0]), encoding="utf-8", newline="\n")
    print(f"{target}: open it in a browser, and print")
    return 0


if __name__ == "__main__":
    sys.exit(main())
