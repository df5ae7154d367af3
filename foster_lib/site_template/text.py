"""Markdown with LaTeX to HTML that needs no script, runs none, and loads nothing from elsewhere."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit
from xml.etree import ElementTree

from latex2mathml.converter import convert
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from foster_lib.errors import FosterError

# latex2mathml lets some LaTeX through as text, and some MathML is more than browsers read (MathML Core).
NAMES = {r"\|": "‖", r"\Vert": "‖", r"\arg": "arg"}
CHILDREN = {"mfrac": 2, "msub": 2, "msup": 2, "munder": 2, "mover": 2, "mroot": 2, "msubsup": 3, "munderover": 3}
COMMENT = re.compile(r"\s*<!--.*?-->\s*", re.S)
SPACES = {"negativethinmathspace": "-0.167em", "negativemediummathspace": "-0.222em"}


def formula(latex: str, place: str, display: str = "inline") -> str:
    """LaTeX as MathML.

    Parameters
    ----------
    latex
        The formula without its dollars.
    place
        Notebook and cell, for the error message.
    display
        "inline" or "block".

    Raises
    ------
    FosterError
        If any part is unknown or incomplete; names place and formula.
    """
    latex = " ".join(latex.split())
    try:
        if (marks := re.sub(r"\\.", "", latex)).count("{") != marks.count("}"):
            raise ValueError("braces that do not pair up")
        # \mathbb E and \mathbb{E} are the same to LaTeX, but not to latex2mathml.
        math = ElementTree.fromstring(convert(re.sub(r"(\\mathbb)\s+(\w)", r"\1{\2}", latex), display=display))
        for part in math.iter():
            _mend(part)
    except Exception as error:  # latex2mathml has two dozen exceptions without a common class
        reason = error if type(error) is ValueError else type(error).__name__
        raise FosterError(f"{place}: formula ${latex}$ cannot be shown: {reason}. Write it differently.") from error
    math.set("alttext", latex)
    return ElementTree.tostring(math, encoding="unicode", short_empty_elements=False)


def _mend(part: ElementTree.Element) -> None:
    """Make an element one that browsers read, or raise `ValueError`."""
    part.tag = part.tag.rpartition("}")[2]  # no XML namespaces in HTML
    if part.tag in ("mo", "mi") and len(part):  # \mathrel{-} is an operator within an operator
        text = "".join(part.itertext())
        part[:] = []
        part.text = text
    part.text = NAMES.get(part.text, part.text)
    if unknown := re.search(r"\\([A-Za-z]+|.)?|&", part.text or ""):
        raise ValueError(f"{unknown[0]} is unknown here")
    if len(part) != CHILDREN.get(part.tag, len(part)):
        raise ValueError(f"a part is missing ({part.tag})")
    if part.get("mathvariant", "normal") != "normal":
        raise ValueError(f"no letter {part.text} in the style {part.get('mathvariant')}")
    if part.tag in ("mo", "mi") and re.fullmatch(r"[A-Za-z]{2,}", part.text or ""):  # log, softmax: spaces as in LaTeX
        part.tag = "mo"
        part.attrib |= {"lspace": "0.1em", "rspace": "0.1em"}
    if part.tag == "mspace":
        part.set("width", SPACES.get(part.get("width"), part.get("width", "0")))


class Renderer(IPythonRenderer):
    """nbconvert's renderer, except that HTML within is shown and not obeyed, and links stay within the site.

    Parameters
    ----------
    links
        Address of each file (path from the root) that the site shows; links to other files become plain text.
    picture
        Keeps the picture at a path from the root as a file of the site; returns the attributes of its `img`, or
        None if there is no such file.
    place
        What error messages name.
    folder
        Where relative links start, from the root.
    shift
        How many levels headings go down.
    """

    def __init__(
        self, links: Mapping[str, str], picture: Callable[..., dict | None], place: str, folder: str, shift: int
    ):
        super().__init__(escape=True, allow_harmful_protocols=False, exclude_anchor_links=True)
        self.links, self.picture, self.place, self.folder, self.shift = links, picture, place, folder, shift

    def heading(self, text: str, level: int, **attributes: Any) -> str:
        return super().heading(text, min(level + self.shift, 6), **attributes)

    def inline_math(self, body: str) -> str:
        return f'<span class="formula">{formula(body, self.place)}</span>'

    def block_math(self, body: str) -> str:
        return f'<span class="scroll" tabindex="0">{formula(body, self.place, "block")}</span>'

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(rf"\begin{{{name}}}{body}\end{{{name}}}")

    def block_html(self, html: str) -> str:
        return "" if COMMENT.fullmatch(html) else super().block_html(html)

    def inline_html(self, html: str) -> str:
        return "" if COMMENT.fullmatch(html) else super().inline_html(html)

    def table(self, text: str) -> str:
        text = text.replace(" ± ", "\u00a0±\u00a0")  # a number stays with its spread
        wide = " wide" if text.count("<th") > 6 else ""
        return f'<div class="scroll{wide}" role="region" aria-label="table" tabindex="0"><table>{text}</table></div>\n'

    def link(self, text: str, url: str, title: str | None = None) -> str:
        if not urlsplit(url).scheme:
            url = self.links.get(self._path(url.partition("#")[0]), "")
        return super().link(text, url, title) if url else text

    def image(self, text: str, url: str, title: str | None = None) -> str:
        attributes = None if urlsplit(url).scheme else self.picture(self._path(url), text, self.place)
        if attributes is None:
            raise FosterError(f"{self.place}: picture {url} is no file of this project. Put it beside the text.")
        return f"<img{self.render_attrs(attributes)}>"

    def _path(self, url: str) -> str:
        return posixpath.normpath(posixpath.join(self.folder, url))


def to_html(text: str, renderer: Renderer) -> str:
    """Markdown, GitHub's tables and LaTeX included, as HTML."""
    return MarkdownWithMath(renderer=renderer).render(text)
