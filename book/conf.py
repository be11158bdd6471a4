"""Sphinx's settings for the book; `build.py` lays out the pages, and calls it."""

import html
import importlib.metadata
import json
import shutil
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

project = "planar_helpers: the planar-flow VAE, derived, trained and measured"
copyright = "Prose: CC BY 4.0. Code: MIT."  # noqa: A001  (Sphinx's name)
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


def write_maths_plainly(app: Sphinx, doctree: nodes.document) -> None:
    """Hand displays over as they are: Sphinx would wrap them in `split`, where \\tag is an error."""
    for node in list(doctree.findall(nodes.math_block)):
        text = node.astext()
        shown = text if text.lstrip().startswith("\\begin{align") else f"\\[{text}\\]"
        raw = f'<div class="math notranslate nohighlight">{html.escape(shown)}</div>'
        node.replace_self(nodes.raw("", raw, format="html"))


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


def offer_the_notebook(app: Sphinx, page: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    """Above a notebook's page: where to get it."""
    path = Path(app.srcdir) / f"{page}.ipynb"
    if path.is_file():
        up = "../" * page.count("/")
        link = f'<a href="{up}_notebooks/{path.name}" download>Download this notebook</a>'
        run = f'<a href="{up}README.html#three-doors">how to run it</a>'
        context["body"] = f'<p class="notebook-links">{link}, and see {run}.</p>\n{context["body"]}'


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
    app.connect("doctree-read", drop_links_to_folders)
    app.connect("doctree-read", link_names)
    app.connect("html-page-context", offer_the_notebook)
    app.connect("build-finished", copy_notebooks)
