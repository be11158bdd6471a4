"""Sphinx's settings for the book; `build.py` lays out the pages, and calls it."""

import html
import importlib.metadata
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from PIL import Image
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

project = "planar_helpers: the planar-flow VAE, derived, trained and measured"
copyright = "the authors. Prose: CC BY 4.0. Code: MIT."  # noqa: A001  (Sphinx's name)
extensions = ["myst_nb", "sphinx_copybutton"]
html_theme = "furo"
html_title = "The planar flow"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_copy_source = False
exclude_patterns = ["figures/results", "playground.html", "**/README-*"]
nb_execution_mode = "off"
nb_mime_priority_overrides = [("html", "text/html", 0)]  # the playground's page form
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]
copybutton_prompt_text = ">>> "
python_use_unqualified_type_names = True
add_module_names = False
mathjax_path = "tex-svg-full.js"  # one file, with every package of TeX in it: nothing is fetched
mathjax3_config = {"tex": {"tags": "none"}, "options": {"enableMenu": False}}

NOTEBOOK = r"(?<![\w.:/–−-])(?:0\d|D[1-9]|(?<=otebook )10)(?![\w/:–-]|\.\d)"
MENTION = re.compile(rf"(?P<notebook>{NOTEBOOK})|(?P<equation>\([1-9]\d?\))|[“\"](?P<section>[^“”\"]+)[”\"]")
equations: dict[str, set[str]] = {}  # by page: the numbers that its displays bear
sections: dict[str, list[str]] = {}  # by title: where, as page#place


def write_maths_plainly(app: Sphinx, doctree: nodes.document) -> None:
    """Hand displays over as they are: Sphinx would wrap them in `split`, where \\tag is an error."""
    for node in list(doctree.findall(nodes.math_block)):
        text = node.astext()
        shown = text if text.lstrip().startswith("\\begin{align") else f"\\[{text}\\]"
        numbers = set(re.findall(r"\\tag\{(\d+)\}", text)) - equations.setdefault(app.env.docname, set())
        equations[app.env.docname] |= numbers
        places = "".join(f'<span id="equation-{number}"></span>' for number in sorted(numbers))
        raw = f'{places}<div class="math notranslate nohighlight">{html.escape(shown)}</div>'
        node.replace_self(nodes.raw("", raw, format="html"))
    for section in doctree.findall(nodes.section):
        sections.setdefault(section[0].astext(), []).append(f"{app.env.docname}#{section['ids'][0]}")


def describe_pictures(app: Sphinx, doctree: nodes.document) -> None:
    """Give each figure, where it is drawn and in the gallery, the text that its cell holds for it."""
    for cell in doctree.findall(lambda node: isinstance(node, nodes.container) and "cell_metadata" in node):
        for picture in cell.findall(nodes.image):
            picture["alt"] = cell["cell_metadata"].get("alt", "")
    if app.env.docname == "figures/README":
        texts = {}
        for path in Path(app.srcdir).rglob("*.ipynb"):
            names = []  # saved, and not shown yet
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
                names += re.findall(r'save_figure\(\w+, "(\w+)"', "".join(cell["source"]))
                if "alt" in cell["metadata"]:
                    texts |= dict.fromkeys(names, cell["metadata"]["alt"])
                    names = []
        for picture in doctree.findall(nodes.image):
            picture["alt"] = texts.get(Path(picture["uri"]).stem, "")


def drop_links_to_folders(app: Sphinx, doctree: nodes.document) -> None:
    """Leave as plain text what links to a folder, which the book does not hold."""
    here = (Path(app.srcdir) / app.env.docname).parent
    for node in list(doctree.findall(pending_xref)):
        if (here / node.get("reftarget", "")).is_dir():
            node.replace_self(node.children)


def link_names(app: Sphinx, doctree: nodes.document) -> None:
    """Make a link of every function and class of the package that a text names in code type."""
    where = json.loads((Path(app.srcdir) / "names.json").read_text(encoding="utf-8"))
    for node in list(doctree.findall(nodes.literal)):
        name = node.astext().split("(")[0].split(".")[-1]
        inside = isinstance(node.parent, nodes.reference | nodes.title) or app.env.docname.startswith("api/")
        if name not in where or inside:
            continue
        target = app.builder.get_relative_uri(app.env.docname, where[name])
        link = nodes.reference("", "", refuri=f"{target}#planar_helpers.{where[name][4:]}.{name}", internal=True)
        node.replace_self(link)
        link += node


def link_mentions(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Make a link of each notebook, equation and section that the prose names: 03, Eq. (5), 04 (1), “Which m?”."""
    pages = {path.name.split("_")[0]: path for path in Path(app.srcdir).rglob("*.ipynb")}
    notebooks = {number: str(path.relative_to(app.srcdir).with_suffix("")) for number, path in pages.items()}
    opener = re.search(NOTEBOOK, next((part.astext() for part in doctree.findall(nodes.paragraph)), ""))
    silent = nodes.reference | pending_xref | nodes.title | nodes.literal | nodes.FixedTextElement | nodes.raw

    def place(found: re.Match, before: str) -> str:
        """Where a mention leads, as page#place; "" if nowhere."""
        if found["notebook"]:
            return notebooks.get(found["notebook"], "")
        if found["section"]:
            places = sections.get(found["section"], [])
            own = [each for each in places if each.startswith(f"{page}#")]
            return (own or places)[0] if len(own or places) == 1 else ""
        if re.search(r"equations? $|equations \(\d+\) (and|to) $", before) or "Rezende" in before[-40:]:
            return ""  # the paper's
        other = re.search(rf"({NOTEBOOK})(?:['’]s)?,? (?:Eqs?\. )?$", before)
        number = found["equation"].strip("()")
        where = notebooks.get(other[1], "") if other else page
        if not other and number not in equations.get(page, ()) and opener and "/deeper/" in page:
            where = notebooks[opener[0]]  # of the notebook that this one stands beside
        return f"{where}#equation-{number}" if number in equations.get(where, ()) else ""

    def linked(text: nodes.Text) -> Iterator[nodes.Node]:
        """The parts of a text, some of them links now."""
        earlier = "".join(part.astext() for part in text.parent[: text.parent.index(text)])
        end = 0
        for found in MENTION.finditer(text):
            where, _, anchor = place(found, earlier + text[: found.start()]).partition("#")
            if where and (where != page or anchor):
                to = app.builder.get_relative_uri(page, where) if where != page else ""
                yield nodes.Text(text[end : found.start()])
                end = found.end()
                yield nodes.reference("", found[0], refuri=f"{to}#{anchor}" if anchor else to, internal=True)
        yield nodes.Text(text[end:])

    for text in list(doctree.findall(nodes.Text)):
        above = text.parent
        while above is not None and not isinstance(above, silent):
            above = above.parent
        if above is None and MENTION.search(text):
            text.parent.replace(text, list(linked(text)))


def offer_the_notebook(app: Sphinx, page: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    """Above a notebook's page: where to get it."""
    path = Path(app.srcdir) / f"{page}.ipynb"
    if path.is_file():
        up = "../" * page.count("/")
        link = f'<a href="{up}_notebooks/{path.name}" download>Download this notebook</a>'
        run = f'<a href="{up}README.html#three-doors">how to run it</a>'
        context["body"] = f'<p class="notebook-links">{link}, and see {run}.</p>\n{context["body"]}'


def size_pictures(app: Sphinx, page: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    """Say how large each picture is: the page does not jump while they load, and on a phone wide ones scroll."""
    for node in doctree.findall(nodes.image) if doctree else ():
        with Image.open(Path(app.srcdir) / next(iter(node["candidates"].values()))) as picture:
            width, height = picture.size
            inches = width / picture.info.get("dpi", (150,))[0]
        source = f'src="{node["uri"]}"'
        size = f' width="{width}" height="{height}"' + (f' style="--inches: {inches:.1f}"' if inches > 6.7 else "")
        context["body"] = re.sub(re.escape(source) + "(?! width)", source + size, context["body"])


def copy_notebooks(app: Sphinx, error: Exception | None) -> None:
    """Put the notebooks beside the pages."""
    if error is None:
        (Path(app.outdir) / "_notebooks").mkdir(exist_ok=True)
        for path in (Path(app.srcdir) / "notebooks").rglob("*.ipynb"):
            shutil.copy(path, Path(app.outdir) / "_notebooks")


def add_mathjax(app: Sphinx) -> None:
    """Take MathJax, in one file, out of the package that brings it."""
    found = [f for f in importlib.metadata.files("sphinx-mathjax-offline") or [] if f.name == mathjax_path]
    if not found:
        raise RuntimeError(f'the package sphinx-mathjax-offline lacks {mathjax_path}: pip install -e ".[book]"')
    static = Path(app.outdir) / "_static"
    static.mkdir(parents=True, exist_ok=True)
    shutil.copy(found[0].locate(), static / mathjax_path)
    licence = "MathJax 3, Apache License 2.0\n"
    (static / "MATHJAX-LICENSE.txt").write_text(licence, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Connect the above."""
    app.set_html_assets_policy("always")
    app.connect("builder-inited", add_mathjax)
    app.connect("doctree-read", write_maths_plainly)
    app.connect("doctree-read", describe_pictures)
    app.connect("doctree-read", drop_links_to_folders)
    app.connect("doctree-read", link_names)
    app.connect("doctree-resolved", link_mentions)
    app.connect("html-page-context", offer_the_notebook)
    app.connect("html-page-context", size_pictures)
    app.connect("build-finished", copy_notebooks)
