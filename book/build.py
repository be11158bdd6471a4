"""Build the book, a site of static pages from the committed notebooks, figures and docstrings (`make book`).

    python book/build.py            into build/book/; open build/book/index.html by a double click
    python book/build.py --serve    the same, then served on this machine only

Nothing is executed and nothing is fetched. Needs the packages of the extra "book", and neither torch nor the package.
"""

import argparse
import ast
import functools
import http.server
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SOURCE, SITE = ROOT / "build" / "book-source", ROOT / "build" / "book"
PAGES = ("README.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml", "constraints.txt", "Makefile", "tests/README.md")
TO_THE_PLAYGROUND = r"\]\((#the-playground|\.\./\.\./deployments/github-pages)\)"
STEP = {"w": [[1.8126, 0.8452]], "u": [[1.2688, 0.5917]], "b": [0]}
START = {**STEP, "constraint": "shifted", "base": "gaussian", "target": 0, "t": 0}


def playground() -> str:
    """The playground for a page, as `Playground.html` writes it."""
    folder = ROOT / "planar_helpers"
    sheet, module, page = (
        (folder / f"playground.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html")
    )
    return page.replace("{sheet}", sheet).replace("{state}", json.dumps(START)).replace("{module}", module)


def escaped(text: str) -> str:
    """Prose for Markdown: signs that it would take for its own, less those between backquotes; notebooks linked."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_|<>\[\]#~$\\])", r"\\\1", part) for part in parts[::2]]
    text = "`".join(parts)
    return re.sub(r"notebooks/(\d\d(?:\\_\w+?)+)(?=[,.\s]|$)", lambda m: _link(m[1].replace("\\", "")), text)


def _link(stem: str) -> str:
    return f"[{stem[:2]}](../notebooks/{stem}.ipynb)"


def docstring(text: str) -> str:
    """A docstring as Markdown: what is indented, and examples, become blocks of their own."""
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.splitlines()
        if lines and lines[0].startswith(">>>"):
            blocks.append("\n".join(["```python", *lines, "```"]))
        elif lines and all(line.startswith("    ") for line in lines):
            blocks.append("\n".join(["```text", *(line[4:] for line in lines), "```"]))
        else:  # prose, perhaps with indented formulas right below it
            prose = [line for line in lines if not line.startswith("    ")]
            blocks.append(escaped("\n".join(prose)))
            if len(prose) < len(lines):
                blocks.append("\n".join(["```text", *(line[4:] for line in lines if line.startswith("    ")), "```"]))
    return "\n\n".join(blocks)


def entry(node: ast.FunctionDef | ast.ClassDef, module: str, owner: str = "") -> str:
    """One function, class or method, in a directive that search and links know."""
    name = f"planar_helpers.{module}.{owner}{node.name}"
    body = docstring(ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef):
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and ast.get_docstring(n)]
        inner = [entry(method, module, f"{node.name}.") for method in methods if not method.name.startswith("_")]
        return f":::::{{py:class}} {name}\n{body}\n\n" + "\n\n".join(inner) + "\n:::::"
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    kind = "method" if owner else "function"
    return f"::::{{py:{kind}}} {name}({ast.unparse(node.args)}){result}\n{body}\n::::"


def write_api() -> dict[str, str]:
    """Write a page for each module; return where each public name is."""
    where = {}
    (SOURCE / "api").mkdir()
    for path in sorted((ROOT / "planar_helpers").glob("[a-z]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
        where |= {n.name: f"api/{path.stem}" for n in public}
        text = f"# `planar_helpers.{path.stem}`\n\n{docstring(ast.get_docstring(tree) or '')}\n\n"
        page = text + "\n\n".join(entry(n, path.stem) for n in public) + "\n"
        (SOURCE / "api" / f"{path.stem}.md").write_text(page, encoding="utf-8")
    return where


def stage() -> None:
    """Lay out what Sphinx reads: notebooks, figures, README and the book's own pages, at one root."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    for name in ("notebooks", "figures"):
        shutil.copytree(ROOT / name, SOURCE / name, ignore=shutil.ignore_patterns("__pycache__", ".*", "solutions"))
    (SOURCE / "tests").mkdir()
    for name in PAGES:
        shutil.copy(ROOT / name, SOURCE / name)
    shutil.copytree(HERE / "static", SOURCE / "static")
    (SOURCE / "playground.html").write_text(playground(), encoding="utf-8")
    (SOURCE / "names.json").write_text(json.dumps(write_api()), encoding="utf-8")
    for name in ("index.md", "references.md"):
        shutil.copy(HERE / name, SOURCE)
    readme = (SOURCE / "README.md").read_text(encoding="utf-8")  # what leads to the playground leads to the front page
    (SOURCE / "README.md").write_text(re.sub(TO_THE_PLAYGROUND, "](index.md)", readme), encoding="utf-8")


def serve() -> None:
    """Serve the site to this machine until Ctrl-C."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        print(f"the book: http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def main() -> int:
    """Build; return Sphinx's exit code, which is not 0 if it had anything to warn of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help="serve the site on this machine afterwards")
    parser.add_argument("--packages", action="store_true", help="only name the packages that it needs, one a line")
    arguments = parser.parse_args()
    if arguments.packages:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        print("\n".join(project["optional-dependencies"]["book"]))
        return 0
    import core_path  # here, so that --packages needs none of them
    from sphinx.cmd.build import build_main

    stage()
    shutil.rmtree(SITE, ignore_errors=True)
    doctrees = ROOT / "build" / "book-doctrees"
    shutil.rmtree(doctrees, ignore_errors=True)
    code = build_main(["-W", "--keep-going", "-q", "-c", str(HERE), "-d", str(doctrees), str(SOURCE), str(SITE)])
    if code == 0:
        core_path.write(SITE)
        print(f"the book: {(SITE / 'index.html').relative_to(ROOT)}")
        if arguments.serve:
            serve()
    return code


if __name__ == "__main__":
    sys.exit(main())
