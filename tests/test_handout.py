"""A page to print: all that is asked, nothing that answers, no network."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "notebooks"), str(ROOT / "notebooks" / "assignments")]
import handout  # noqa: E402  (a script, not a package)
import restate  # noqa: E402

ASSIGNMENTS = sorted((ROOT / "notebooks" / "assignments").glob("A*.ipynb"))


def prose(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def words(text: str) -> str:
    """Letters and digits alone, so that Markdown and HTML compare."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"<[^>]*>|&\w+;|&#\w+;", "", text).lower())


@pytest.mark.parametrize("path", [*restate.series(), *ASSIGNMENTS], ids=lambda path: path.stem)
def test_a_page_asks_all_and_answers_nothing(path: Path) -> None:
    page, text = handout.page(path), prose(path)
    assert not re.search(r"<script|<link|<img|src=|https?:(?!//www.w3.org/)|<details|&lt;/?details", page)
    answers = re.findall(r"<summary>(?:Answer|Solution)\w*</summary>(.*?)</details>", text, flags=re.S)
    for answer in answers:
        for sentence in re.findall(r"[A-Z][a-z ,]{30,}", re.sub(r"\$.*?\$|`.*?`", "", answer, flags=re.S)):
            assert words(sentence) not in words(page), f"the page tells: {sentence}"
    questions = re.search(r"^## Questions.*?\n(.*)", text, flags=re.M | re.S)
    if path.name[0] != "A" and questions:
        asked = len(re.findall(r"^\d+\. ", questions[1], flags=re.M))
        assert asked > 0 and len(re.findall(r"<li>", page[page.index("<h2>Questions") :])) >= asked


def test_00_prints_its_two_tables_and_not_the_tests() -> None:
    page = handout.page(ROOT / "notebooks" / "00_start_here.ipynb")
    assert page.count("<table>") == 2 and "sum_ladj" in page and "ELBO" in page
    assert "test_planar" not in page and "PLANAR_DATA" not in page


def test_the_command_writes_the_page_or_says_what_it_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(handout.run, "folder", lambda kind: tmp_path / kind)
    monkeypatch.setattr(handout.feedback, "converter", handout.feedback.converter or object())
    assert handout.main(["02"]) == 0
    assert (tmp_path / "build" / "handouts" / "02_planar_flow.html").is_file()
    for wrong in ("", "77", "A9", "0"):
        with pytest.raises(SystemExit):
            handout.main([wrong])
        assert "N must be the number of one notebook" in capsys.readouterr().err
