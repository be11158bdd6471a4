"""Put the core path on one page to print: notebooks 00 to 07 and the core of 08, taken from the built book.

Ids get their notebook's number in front, and links between the notebooks become links within the page. What was folded
stands open, but for answers and solutions: those are at the end, so that nobody reads one by accident.
"""

import posixpath
import re
from pathlib import Path

from bs4 import BeautifulSoup, Tag
from PIL import Image

TITLE = "The planar flow: the core path"
LEAD = """
<p>Notebooks 00 to 07 and the core of 08, on one page to print or to keep as a PDF. Answers are at the end.</p>
<p class="print-button"><button type="button" disabled onclick="print()">Print</button>
<a href="index.html">Back to the book</a></p>
<script>addEventListener("load", () => MathJax.startup.promise.then(() =>
  document.querySelector(".print-button button").disabled = false));</script>
"""
SCREEN_ONLY = ".notebook-links, .headerlink, .planar-playground, script, style"


def tag(html: str) -> Tag:
    """Return the one element of a piece of HTML."""
    return BeautifulSoup(html, "html.parser").contents[0]


def keep_the_core(article: Tag) -> None:
    """Drop what is not the core of a notebook that says where its core ends, but for "What was shown"."""
    end = article.find(string=re.compile("Here the core ends"))
    for section in end.find_parent("section").find_next_siblings("section") if end else ():
        if section["id"] != "what-was-shown":
            section.decompose()


def move_answers(article: Tag, number: str) -> list[Tag]:
    """Open what is folded; take the answers out, leaving a link to each, and return them."""
    answers = []
    for fold in article.find_all("details"):
        word = fold.summary.get_text(strip=True)
        if word not in ("Answer", "Solution"):
            fold["open"] = ""
            continue
        question = fold.find_previous("ol").get("start", "1") if word == "Answer" else ""
        here = f"{number}-{word.lower()}{question}"
        link = f'<p class="to-answer" id="from-{here}"><a href="#{here}">{word}, at the end</a></p>'
        fold.replace_with(tag(link))
        name = f"Question {question}" if question else "Your turn"
        fold.summary.replace_with(tag(f'<h3><a href="#from-{here}">{name}</a></h3>'))
        fold.name, fold.attrs = "section", {"id": here}
        answers.append(fold)
    return answers


def stop_the_animations(article: Tag, folder: Path) -> None:
    """Show the last frame, where all has happened, instead of the first: paper does not move."""
    for picture in article.find_all("img"):
        path = folder / Path(picture["src"]).name
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                image.seek(image.n_frames - 1)
                image.convert("RGB").save(path.with_name(f"{path.stem}_last.png"))
                picture["src"] = picture["src"].replace(path.name, f"{path.stem}_last.png")


def link_within(part: Tag, anchors: dict[str, set[str]]) -> None:
    """Lead every link and picture of a notebook's page to where it is, seen from the page to print."""
    for key in ("href", "src"):
        for element in part.find_all(attrs={key: True}):
            if re.match(r"[a-z]+:", element[key]):
                continue
            path, _, anchor = element[key].partition("#")
            name = Path(path).name[:2]
            path = posixpath.normpath(posixpath.join("notebooks", path))
            if re.fullmatch(rf"notebooks/{name}_\w+\.html", path) and anchor in anchors.get(name, ()):
                element[key] = f"#{name}-{anchor}" if anchor else f"#{name}"
            else:
                element[key] = f"{path}#{anchor}" if anchor else path


def in_a_frame(path: Path, article: Tag) -> str:
    """Put an article into the head, the styles and the maths of a notebook's page, and nothing else of it."""
    page = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
    page.title.string = TITLE
    for element in page.head.select("link[rel=next], link[rel=prev]"):
        element.decompose()
    mathjax = page.select_one("script[src*=tex-svg]")
    settings = page.find("script", string=re.compile("window.MathJax"))
    for element in page.head.find_all(href=True):
        element["href"] = element["href"].removeprefix("../")
    mathjax["src"] = mathjax["src"].removeprefix("../")
    page.body.clear()
    page.body.append(tag('<div class="content core-path"></div>'))
    page.body.div.extend([article, settings, mathjax])
    return str(page)


def write(site: Path) -> None:
    """Write print.html into the built site."""
    paths = sorted((site / "notebooks").glob("0[0-8]_*.html"))
    whole = tag('<article role="main"></article>')
    whole.append(tag(f"<h1>{TITLE}</h1>"))
    whole.extend(BeautifulSoup(LEAD, "html.parser").contents[:])
    contents, notebooks, answers = tag("<ul></ul>"), [], tag('<section class="notebook" id="answers"></section>')
    answers.append(tag("<h1>Answers</h1>"))
    anchors = {}
    for path in paths:
        number = path.name[:2]
        article = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser").article
        for element in article.select(SCREEN_ONLY):
            element.decompose()
        keep_the_core(article)
        stop_the_animations(article, site / "_images")
        anchors[number] = {"", *(element["id"] for element in article.find_all(id=True))}
        for element in article.find_all(id=True):
            element["id"] = f"{number}-{element['id']}"
        for element in article.find_all("a", href=re.compile("^#")):
            element["href"] = f"{path.name}{element['href']}"
        title = article.h1.get_text()
        contents.append(tag(f'<li><a href="#{number}">{title}</a></li>'))
        article.name, article.attrs = "section", {"class": "notebook", "id": number}
        notebooks.append(article)
    for number, article in zip(anchors, notebooks, strict=True):
        link_within(article, anchors)
        found = move_answers(article, number)
        answers.extend([tag(f"<h2>{article.h1.get_text()}</h2>"), *found] if found else [])
    contents.append(tag('<li><a href="#answers">Answers</a></li>'))
    whole.extend([contents, *notebooks, answers])
    (site / "print.html").write_text(in_a_frame(paths[0], whole), encoding="utf-8")
