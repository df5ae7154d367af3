"""Static site: `python -m foster_lib.site` turns README, tables and executed notebooks into plain HTML in `site/`.

No JavaScript and nothing from the network: formulas become MathML while the site is made, pictures become files.
nbconvert converts the notebooks; templates, style and the conversion of Markdown are in `site_template/`.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import warnings
from base64 import b64decode
from pathlib import Path
from typing import Any

import nbformat
from bs4 import BeautifulSoup
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from nbconvert import TemplateExporter
from nbconvert.filters import Highlight2HTML
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from PIL import Image

from foster_lib.errors import FosterError, complain
from foster_lib.paths import ROOT, results_dir, shown, unfinished
from foster_lib.site_template import TEMPLATES, style_sheet
from foster_lib.site_template.text import Renderer, to_html

GENERATOR = "foster_lib.site"
WIDGET = "application/vnd.jupyter.widget-view+json"
HEADING = re.compile(r"^#+ .*", re.M)
SHOWN = {
    **{"table1": "table1_datasets", "table2": "table2", "efficiency": "table3_efficiency"},
    **{"ablation": "table4_ablation", "table5": "table5_transfer", "ideas": "table6_key_ideas"},
    **{"few": "table7_two_sequences", "budget": "fig_budget", "length": "fig_budget", "student": "fig_student"},
    **{name: f"fig_{name}" for name in ("subset", "reset", "regulariser", "scaling", "sequences")},
}
"""Results that the index shows as far as they are there, in this order, and the notebook that each comes from."""


class Site:
    """All files of the site by name; nothing is written before everything is converted.

    `root` holds README.md and notebooks/, `results` tables, figures and executed notebooks.
    """

    def __init__(self, root: Path, results: Path):
        self.root, self.results = root, results
        self.files: dict[str, str | bytes] = {}
        names = [path.stem for path in (root / "notebooks").glob("*.ipynb")]
        if not names:
            raise FosterError(f"{root / 'notebooks'}: no notebooks. Restore them with `git checkout notebooks`.")
        order = ("quickstart", "learn", "table")  # the tour, the lessons, the tables; then what is left
        self.names = sorted(names, key=lambda name: (*(not name.startswith(part) for part in order), name))
        self.tables = [path for name in SHOWN for path in sorted(results.glob(f"{name}*/{name}.md"))]
        self.links = {f"notebooks/{name}.ipynb": f"{name}.html" for name in self.names}
        for path in self.tables:
            self.links[f"results/{path.relative_to(results).as_posix()}"] = f"index.html#{path.parent.name}"
        self.templates = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
        self.exporter = TemplateExporter(template_file=str(TEMPLATES / "cells.html.j2"))
        self.exporter.register_preprocessor(CoalesceStreamsPreprocessor, enabled=True)
        self.exporter.register_filter("highlight_code", Highlight2HTML(pygments_lexer="ipython3"))
        self.exporter.register_filter("markdown", lambda text, place: self.html(text, place, "notebooks"))

    def build(self) -> dict[str, str | bytes]:
        """Content of all files."""
        pages = [self.notebook(name) for name in self.names]
        for before, page, after in zip([None, *pages], pages, [*pages[1:], None]):
            self._page("notebook.html.j2", page["href"], page["title"], page=page, previous=before, next=after)
        self._index(pages)
        self.files["style.css"] = style_sheet()
        return self.files

    def notebook(self, name: str) -> dict[str, Any]:
        """A notebook converted: title, question, first picture, whose figures it holds, HTML."""
        committed, executed = (folder / "notebooks" / f"{name}.ipynb" for folder in (self.root, self.results))
        path, source = committed, read_notebook(committed, f"Restore it with `git checkout {shown(committed)}`.")
        node = source
        if executed.is_file():
            path = executed
            node = read_notebook(executed, "Delete it, then the committed one is shown, or run the notebook again.")
        pictures = self._prepare(node, name, shown(path))
        texts = [(cell.source, cell.metadata.place) for cell in node.cells if cell.cell_type == "markdown"]
        text, place = texts[0] if texts else ("", "")
        title = HEADING.search(text)
        question = next((block for block in text.split("\n\n") if block.strip() and not HEADING.match(block)), "")
        return {
            "href": f"{name}.html",
            "title": self.plain(title[0], place) if title else name,
            "question": self.html(question.strip().removeprefix("**Question.** "), place, "notebooks"),
            "picture": pictures[0] if pictures else None,
            "source": shown(path),
            "figures": figures_of(node, source),
            "html": self.exporter.from_notebook_node(node)[0],
        }

    def html(self, text: str, place: str, folder: str = "", shift: int = 0) -> str:
        """Markdown as HTML; error messages name `place`, relative links start in `folder`."""
        return to_html(text, Renderer(self.links, self._file, place, folder, shift))

    def plain(self, line: str, place: str) -> str:
        """A line of Markdown without its marks."""
        return BeautifulSoup(self.html(line, place), "html.parser").get_text().strip()

    def picture(self, name: str, content: bytes | str, alt: str, place: str) -> dict[str, Any]:
        """Keep a picture (text: in base64) as a file; returns the attributes of its `img`."""
        try:
            content = b64decode(content) if isinstance(content, str) else content
            with Image.open(io.BytesIO(content)) as image:
                width, height = image.size
                image.load()
        except Exception as error:  # Pillow raises a different exception for each kind of damage
            raise FosterError(f"{place}: a picture is damaged ({name}). Make it again, or restore the file.") from error
        self.files[f"images/{name}"] = content
        return {"src": f"images/{name}", "alt": alt, "width": width, "height": height}

    def _file(self, path: str, alt: str, place: str) -> dict[str, Any] | None:
        file = self.root / path
        return self.picture(path.replace("/", "-"), file.read_bytes(), alt, place) if file.is_file() else None

    def _prepare(self, node: nbformat.NotebookNode, name: str, path: str) -> list[dict[str, Any]]:
        """Number the cells, turn pictures into files, drop progress bars; returns the pictures."""
        heading, pictures = name, []
        for number, cell in enumerate(node.cells):
            place = cell.metadata.place = f"{path}, cell {number}"
            if cell.cell_type == "markdown" and (headings := HEADING.findall(cell.source)):
                heading = self.plain(headings[-1], place)
            if cell.cell_type != "code":
                continue
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
            panels = re.findall(r'title(?:=|\()\s*"([^"{$\\]+)"', cell.source)
            for output in cell.outputs:
                if kind := next((kind for kind in ("png", "jpeg") if f"image/{kind}" in output.get("data", {})), None):
                    alt = f"Figure {len(pictures) + 1}: {'; '.join([heading, *panels])}"
                    file = f"{name}-{len(pictures) + 1}.{kind}"
                    output.metadata.picture = self.picture(file, output.data[f"image/{kind}"], alt, place)
                    pictures.append(output.metadata.picture)
        return pictures

    def _index(self, pages: list[dict[str, Any]]) -> None:
        text, place = (self.root / "README.md").read_text(encoding="utf-8"), shown(self.root / "README.md")
        title = HEADING.search(text)
        intro = next((block for block in text.split("\n\n") if re.match(r"\s*[^\s#!|<`]", block)), "")
        sections = []
        for name in ("Results", "Claims"):
            found = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
            if not found:
                raise FosterError(f"{place}: no section '## {name}', which the site shows. Write it.")
            sections.append(
                {"id": name.lower(), "title": name, "html": self.html(found[1], place), "pictures": [], "notebook": ""}
            )
        sections += [self._table(path) for path in self.tables]
        title = self.plain(title[0], place) if title else self.root.name
        self._page("index.html.j2", "index.html", title, pages=pages, sections=sections, intro=self.html(intro, place))

    def _table(self, path: Path) -> dict[str, Any]:
        first, _, text = path.read_text(encoding="utf-8").partition("\n")
        title, pictures = self.plain(first, shown(path)), []
        for file in sorted(path.parent.rglob("*.png")):
            name, alt = "-".join(file.relative_to(self.results).parts), f"{title} ({file.stem})"
            pictures.append(self.picture(name, file.read_bytes(), alt, shown(file)))
        notebook = SHOWN[path.stem]
        return {
            "id": path.parent.name,
            "title": title,
            "html": self.html(text, shown(path), shift=1),
            "pictures": pictures,
            "notebook": f"{notebook}.html" if notebook in self.names else "",
        }

    def _page(self, template: str, name: str, title: str, **values: Any) -> None:
        self.files[name] = self.templates.get_template(template).render(values, title=title, generator=GENERATOR)


def read_notebook(path: Path, remedy: str) -> nbformat.NotebookNode:
    """A valid notebook; `FosterError` names the file and the remedy if it is none."""
    try:
        text = path.read_text(encoding="utf-8")
        with warnings.catch_warnings(action="ignore"):  # of cells without id, beside the error for the same cells
            nbformat.validate(json.loads(text))
            return nbformat.reads(text, as_version=4)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, nbformat.ValidationError) as error:
        reason = str(error).strip().partition("\n")[0][:100]
        raise FosterError(f"{shown(path)}: no readable notebook ({reason}). {remedy}") from error


def figures_of(node: nbformat.NotebookNode, committed: nbformat.NotebookNode) -> str:
    """One sentence: which run and which profile the outputs of a notebook come from."""
    code = [cell for cell in node.cells if cell.cell_type == "code"]
    if not any(cell.execution_count for cell in code):
        return "Never run, so there are no figures."
    tagged = [
        cell.source for cell in code if {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", []))
    ]
    profile = re.findall(r"""^profile\b[^=\n]*=\s*["'](\w+)["']""", "\n".join(tagged), re.M)
    settings = f"profile {profile[-1]}" if profile else "the notebook's default settings"
    if profile[-1:] == ["smoke"]:
        settings += ", which shows that everything works; its metrics mean nothing"
    if node is committed:
        return f"Committed outputs, {settings}."
    own = [cell.source for cell in code if "injected-parameters" not in cell.metadata.get("tags", [])]
    changed = own != [cell.source for cell in committed.cells if cell.cell_type == "code"]
    day = node.metadata.get("papermill", {}).get("end_time", "unknown day")[:10]
    return f"Run of {day}, {settings}{'; the notebook has changed since' if changed else ''}."


def write_site(out: Path, root: Path = ROOT, results: Path | None = None) -> list[str]:
    """Make the site and put it in the place of the old one at once; returns the names of the pages.

    Raises
    ------
    FosterError
        If a source is missing or damaged, or `out` holds something else. The old site then stays as it is.
    """
    out = Path(out).resolve()
    index = out / "index.html"
    ours = index.is_file() and f'content="{GENERATOR}"' in index.read_text(encoding="utf-8", errors="replace")
    if out.exists() and not ours and not (out.is_dir() and not any(out.iterdir())):
        raise FosterError(f"{out}: holds something else than a site of this project. Name another folder with --out.")
    try:
        files = Site(root, results or results_dir()).build()
        with unfinished(out, folder=True) as temporary:
            new, old = temporary / "new", temporary / "old"
            for name, content in files.items():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                (new / name).write_bytes(content.encode() if isinstance(content, str) else content)
            if out.exists():
                out.rename(old)
            try:
                new.rename(out)
            finally:
                if old.exists() and not out.exists():
                    old.rename(out)
    except OSError as error:
        remedy = "Restore the file, free some space, or name another folder with --out; an old site is unchanged."
        raise FosterError(f"{error.filename or out}: {error.strerror or error}. {remedy}") from error
    return [name for name in files if name.endswith(".html")]


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m foster_lib.site", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="folder to write, default: site/")
    out = parser.parse_args(arguments).out
    try:
        pages = write_site(out)
    except FosterError as error:
        return complain(error)
    print(f"site: {len(pages)} pages; open {out / 'index.html'} in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
