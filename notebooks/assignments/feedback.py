"""One page of HTML for a student: what was asked, what was handed in, what was said, how many points.

The page needs no network: its mathematics is MathML, which browsers draw themselves. What a student wrote is shown as
text, never as markup.
"""

import html
import re
from typing import Any

import mistune

try:
    from latex2mathml import converter
except ModuleNotFoundError:  # an extra: pip install -e ".[grade]"
    converter = None

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
pre { background: #f6f6f6; padding: .6rem; overflow-x: auto; } table { border-collapse: collapse; }
td, th { border: 1px solid #ccc; padding: .2rem .6rem; } .right { color: #1a6; } .wrong { color: #b22; }
.said { border-left: 4px solid; padding-left: .8rem; } math[display=block] { margin: .8rem 0; }
"""


class _Page(mistune.HTMLRenderer):
    """Markdown whose formulas become MathML, and whose HTML is shown as text."""

    def inline_math(self, text: str) -> str:
        return formula(text)

    def block_math(self, text: str) -> str:
        return formula(text, "block")


def formula(text: str, display: str = "inline") -> str:
    """Return LaTeX as MathML; what the converter does not know stays LaTeX."""
    if converter is None:
        return f"<code>{html.escape(text)}</code>"
    try:
        return converter.convert(text.strip(), display=display)
    except Exception:  # noqa: BLE001  (a student's formula may hold anything)
        return f"<code>{html.escape(text)}</code>"


def markdown(text: str) -> str:
    """Return Markdown as HTML."""
    text = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    return str(mistune.create_markdown(renderer=_Page(escape=True), plugins=["math", "table"])(text))


def page(student: str, assignment: str, master: dict[str, Any] | None, result: dict[str, Any], note: str) -> str:
    """Return the page of one submission."""
    cells = result["cells"]
    total, of = sum(v["points"] or 0 for v in cells.values()), sum(v["of"] for v in cells.values())
    waiting = sum(v["points"] is None for v in cells.values())
    parts = [f"<h1>{html.escape(assignment)}: {html.escape(student)}</h1>"]
    parts.append(
        f"<p><strong>{total:g} of {of:g} points</strong>"
        + f", {waiting} answer{'s' * (waiting > 1)} to be marked" * bool(waiting)
    )
    parts.append(f"</p><p>Your notebook {html.escape(result['status'])}. {html.escape(note)}</p>")
    if result["notes"]:
        parts.append("<ul>" + "".join(f"<li>{html.escape(each)}</li>" for each in result["notes"]) + "</ul>")
    text = ""
    for cell in (master or {"cells": []})["cells"]:
        marks = cell["metadata"].get("nbgrader", {})
        if cell["cell_type"] == "markdown" and not marks:
            text = "".join(cell["source"])
        if marks.get("grade") and marks["grade_id"] in cells:
            parts += [
                markdown(text) if text.startswith("## ") else "",
                _verdict(cells[marks["grade_id"]], cell["cell_type"] == "code"),
            ]
            text = ""
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{html.escape(assignment)} {html.escape(student)}</title>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n'


def _verdict(verdict: dict[str, Any], code: bool) -> str:
    points, text = verdict["points"], verdict["text"]
    shown = f"<pre>{html.escape(text)}</pre>" if code or not text else markdown(text)
    given = "to be marked" if points is None else f"{points:g} of {verdict['of']:g} points"
    kind = "right" if points == verdict["of"] else "wrong"
    said = html.escape(verdict["says"]) or ("Right." if points == verdict["of"] else "")
    return f'<h3>Your answer</h3>{shown}<p class="said {kind}"><strong>{given}.</strong> {said}</p>'
