"""The static site: what it shows, and that it is safe and self-contained."""

import re
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell

from foster_lib.errors import FosterError
from foster_lib.paths import ROOT
from foster_lib.site import write_site
from foster_lib.site_template.text import formula
from tests.site_project import EVIL, assert_sound, make, png, soups, write, write_project


@pytest.fixture
def project(tmp_path):
    return write_project(tmp_path / "project")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The site of this repository."""
    out = tmp_path_factory.mktemp("real") / "site"
    write_site(out)
    return out


@pytest.fixture(scope="module")
def real_pages(real):
    """Its pages by name, parsed and found sound."""
    return assert_sound(real)


def test_links_resolve_and_pictures_exist(project):
    pages = assert_sound(make(project))
    assert set(pages) == {"index.html", "quickstart.html", "learn_1.html", "table2.html"}
    assert len(pages["quickstart.html"].find_all("img")) == 1
    assert "left panel" in pages["quickstart.html"].img["alt"] and "Part one" in pages["quickstart.html"].img["alt"]
    section = pages["quickstart.html"].find(string=re.compile("See")).parent
    assert [link["href"] for link in section.find_all("a")] == ["learn_1.html"]  # the README is not on the site
    steps = pages["learn_1.html"].find("nav").find_all("a")
    assert [link["href"] for link in steps] == ["quickstart.html", "index.html", "table2.html"]


def test_index_shows_readme_tables_figures_and_notebooks(project):
    index = soups(make(project))["index.html"]
    assert index.h1.string == "A project & more"
    assert index.header.p.get_text() == "Sentence one. See the paper. Sentence three."
    cards = index.find("ol", class_="cards").find_all("li")
    assert [card.h3.a["href"] for card in cards] == ["quickstart.html", "learn_1.html", "table2.html"]
    assert cards[0].div.p.get_text().startswith("Why this, λ") and cards[1].div.p.string == "What is learned?"
    assert len(cards[0].find_all("img")) == 1 and not cards[1].find("img")
    text = index.get_text()
    assert "mark for tools" not in text and "0.1\u00a0±\u00a00.0" in text
    assert "0.4242" in text and "0.777 [-0.1, +0.2]*" in text and "Not on the site" not in text
    assert [image["src"] for image in index.find(id="table2").find_all("img")] == [
        "images/table2-more-curve.png",
        "images/table2-table2.png",
    ]
    assert all("scroll" in table.parent["class"] for table in index.find_all("table"))
    assert "wide" in index.find(id="table2").table.parent["class"]
    assert {link["href"] for link in index.find(id="results").find_all("a")} == {"index.html#table2", "quickstart.html"}


def test_tables_and_figures_come_in_order_and_name_their_notebook(project):
    for name in ("ablation", "table2-temporal", "other", "sequences"):
        (project / "results" / name).mkdir()
        stem = name.partition("-")[0]
        (project / f"results/{name}/{stem}.md").write_text(f"# About {name}\n\nText.\n")
        (project / f"results/{name}/{stem}.png").write_bytes(png())
    index = assert_sound(make(project))["index.html"]
    sections = [section["id"] for section in index.find_all("section")]
    assert sections == ["results", "claims", "table2", "table2-temporal", "ablation", "sequences"]
    assert index.find(id="ablation").figcaption.string == "About ablation (ablation)"
    assert index.find(id="table2-temporal").find(class_="note").a["href"] == "table2.html"
    assert not index.find(id="ablation").find(class_="note")  # its notebook is not there


def test_hostile_titles_and_texts_are_shown_not_obeyed(project):
    pages = assert_sound(make(project))
    for part in (pages["quickstart.html"].h1, pages["quickstart.html"].title, pages["learn_1.html"].nav):
        assert EVIL in part.get_text()
    page = pages["quickstart.html"]
    for place in ("pre.stdout", "div.output td", ".highlight pre"):
        assert any(EVIL in found.get_text() for found in page.select(place)), place
    assert "plain <script>" in page.get_text()
    assert "Batches" not in page.get_text()  # progress bars are not part of the story
    assert len(page.select("pre.stdout")) == 1  # pieces of one stream are one text


def test_a_link_with_a_script_leads_nowhere(project):
    cell = new_markdown_cell("# Title\n\n[click](javascript:alert(1)) [other](data:text/html,hi)")
    write(project / "notebooks/learn_1.ipynb", cell)
    page = (make(project) / "learn_1.html").read_text()
    assert "javascript:" not in page and "text/html" not in page


def test_a_notebook_says_which_run_its_figures_are_of(project):
    pages = soups(make(project))
    notes = {name: soup.find(class_="note").get_text() for name, soup in pages.items()}
    assert notes["quickstart.html"].startswith("Committed outputs, profile smoke")
    assert notes["learn_1.html"].startswith("Committed outputs, the notebook's default settings.")
    assert notes["table2.html"].startswith("Run of 2026-01-02, profile cpu. ")
    assert notes["table2.html"].endswith("results/notebooks/table2.ipynb")
    write(project / "notebooks/table2.ipynb", new_markdown_cell("# Table 2"), new_code_cell("print('new')"))
    (project / "results/notebooks/table2.ipynb").rename(project / "executed.ipynb")
    assert "Never run" in soups(make(project))["table2.html"].find(class_="note").get_text()
    (project / "executed.ipynb").rename(project / "results/notebooks/table2.ipynb")
    assert "changed since" in soups(make(project))["table2.html"].find(class_="note").get_text()


def test_formulas_become_mathml(project):
    page = soups(make(project))["quickstart.html"]
    block = page.find("math", display="block")
    assert block["alttext"] == r"\frac{a}{b}\quad c" and [part.get_text() for part in block.mfrac.find_all("mi")] == [
        "a",
        "b",
    ]
    assert page.h1.find("msub").get_text() == "x1"
    assert "$" not in page.get_text()


@pytest.mark.parametrize("latex", [r"\nosuchcommand x", r"\frac{a}", r"\left( a", r"{a"])
def test_unreadable_latex_is_an_error_with_its_place(project, latex):
    write(project / "notebooks/learn_1.ipynb", new_markdown_cell("# T"), new_markdown_cell(f"Here $a + {latex}$."))
    with pytest.raises(FosterError, match=r"learn_1\.ipynb, cell 1") as caught:
        make(project)
    assert latex in str(caught.value)
    assert not (project / "site").exists()


def test_every_formula_of_the_notebooks_is_on_its_page(real_pages):
    """Counted independently: what stands between dollars in the Markdown cells, in order."""
    total = 0
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]
        text = re.sub(r"`[^`\n]*`", "", "\n\n".join(cells))
        found = [a or b for a, b in re.findall(r"\$\$(.+?)\$\$|\$(.+?)\$", text, re.S)]
        page = real_pages[f"{path.stem}.html"]
        shown = [math["alttext"] for math in page.find("main").select(".text math")]
        assert shown == [" ".join(latex.split()) for latex in found], path.name
        assert "\\" not in "".join(math.get_text() for math in page.find_all("math"))
        total += len(shown)
    assert total > 100


def test_operators_and_spaces_keep_their_meaning():
    softmax = BeautifulSoup(formula(r"\operatorname{softmax}_j(s\;h)", "here"), "lxml")
    assert softmax.find("msub").find(True).get_text() == "softmax"
    minimum = BeautifulSoup(formula(r"\min_S L", "here", "block"), "lxml")
    assert minimum.find(["munder", "msub"]).get_text() == "minS"


def test_the_site_of_this_repository_is_complete(real_pages):
    pages = dict(real_pages)
    index = pages.pop("index.html")
    assert set(pages) == {f"{path.stem}.html" for path in (ROOT / "notebooks").glob("*.ipynb")}
    claims = re.search(r"^## Claims\n(.*?)(?=^## |\Z)", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    rows = [line for line in claims.splitlines() if line.startswith("|")]
    assert len(index.find(id="claims").find_all("tr")) == len(rows) - 1  # without the line under the head
    for name, soup in pages.items():
        source = ROOT / soup.find(class_="note").code.string
        assert source.stem == Path(name).stem
        outputs = [output for cell in nbformat.read(source, 4).cells for output in cell.get("outputs", [])]
        assert len(soup.find_all("img")) == sum("image/png" in output.get("data", {}) for output in outputs), name
