"""The static site: what it shows, that it is safe and self-contained, and that a failure leaves the old one."""

import base64
import http.server
import io
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from foster_lib import site as site_module
from foster_lib.errors import FosterError
from foster_lib.paths import ROOT
from foster_lib.site import main, write_site
from foster_lib.site_template.text import formula

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"
README = """# A project & more

![figure](results/table2/table2.png)

Sentence one. See [the paper](https://example.org/paper). Sentence three.

## Results

<!-- a mark for tools -->
| | NDCG |
|---|---|
| Full | 0.1 ± 0.0 |

All in [table2](results/table2/table2.md), from [the tour](notebooks/quickstart.ipynb).

## Claims

| claim | figure |
|---|---|
| it works | 0.4242 |

## Other

Not on the site.
"""
TABLE = """# Table 2: metrics

| a | b | c | d | e | f | g |
|:--|:--|:--|:--|:--|:--|:--|
| 1 | 2 | 3 | 4 | 5 | 6 | 0.777 [-0.1, +0.2]* |
"""


def png(width=20, height=10):
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


def picture():
    return new_output("display_data", data={"image/png": base64.b64encode(png()).decode(), "text/plain": "<Figure>"})


def write(path: Path, *cells, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells), metadata=metadata), path)


def executed(source, *outputs, **metadata):
    return new_code_cell(source, outputs=list(outputs), execution_count=1, metadata=metadata)


@pytest.fixture
def project(tmp_path):
    """Three notebooks, a README and a table, with hostile titles and texts."""
    root = tmp_path / "project"
    parameters = executed('profile: str = "smoke"  # which', tags=["parameters"])
    write(
        root / "notebooks/quickstart.ipynb",
        new_markdown_cell(f"# The `tour` {EVIL} of $x_1$\n\n**Question.** Why *this*, $\\lambda$?\n\nMore."),
        parameters,
        new_markdown_cell(
            "## Part one\n\n$$\\frac{a}{b}\\quad c$$\n\nSee [next](learn_1.ipynb#there), [code](../README.md)."
        ),
        executed(
            f'axis.set(title="left panel")\nx = "{EVIL}"',
            new_output("stream", name="stdout", text=f"first {EVIL}\n"),
            new_output("stream", name="stdout", text="second\n"),
            new_output("display_data", data={"text/markdown": f"| title |\n|---|\n| {EVIL} |", "text/plain": "-"}),
            new_output("display_data", data={"text/html": EVIL, "text/plain": f"plain {EVIL}"}),
            new_output("display_data", data={site_module.WIDGET: {"model_id": "1"}, "text/plain": "Batches: 0%"}),
            picture(),
        ),
    )
    write(root / "notebooks/learn_1.ipynb", new_markdown_cell("# Learn 1\n\nWhat is learned?"), executed("pass"))
    write(root / "notebooks/table2.ipynb", new_markdown_cell("# Table 2\n\nHow well?"), parameters)
    write(
        root / "results/notebooks/table2.ipynb",
        new_markdown_cell("# Table 2\n\nHow well?"),
        parameters,
        executed('profile = "cpu"', tags=["injected-parameters"]),
        papermill={"end_time": "2026-01-02T03:04:05"},
    )
    (root / "README.md").write_text(README)
    (root / "results/table2/more").mkdir(parents=True)
    (root / "results/table2/table2.md").write_text(TABLE)
    for name in ("table2.png", "more/curve.png"):
        (root / "results/table2" / name).write_bytes(png())
    return root


def make(project):
    write_site(project / "site", project, project / "results")
    return project / "site"


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


def soups(folder):
    return {path.name: BeautifulSoup(path.read_text(), "lxml") for path in folder.glob("*.html")}


def assert_sound(folder):
    """Links and pictures lead to files, nothing is loaded from elsewhere, nothing can run; returns the pages."""
    pages = soups(folder)
    for name, soup in pages.items():
        assert not soup.find_all(["script", "iframe", "object", "embed", "form"]), name
        for tag in soup.find_all(True):
            assert not [key for key in tag.attrs if key.startswith("on")], (name, tag)
        for image in soup.find_all("img"):
            assert (folder / image["src"]).is_file() and image["alt"].strip(), (name, image)
            assert Image.open(folder / image["src"]).size == (int(image["width"]), int(image["height"]))
        for link in soup.find_all("link"):
            assert link["href"] == "data:," or (folder / link["href"]).is_file(), (name, link)
        for link in soup.find_all("a"):
            path, _, fragment = link["href"].partition("#")
            if not path.startswith("https://"):
                target = pages[path or name]
                assert not fragment or target.find(id=fragment), (name, link)
        assert soup.find("meta", attrs={"name": "viewport"}) and soup.title.string.strip()
        assert (folder / name).stat().st_size < 1.5e6
        identifiers = [tag["id"] for tag in soup.find_all(id=True)]
        assert len(identifiers) == len(set(identifiers)), name
    style = (folder / "style.css").read_text()
    assert "url(" not in style and "@import" not in style
    return pages


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


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        '{"cells": []}',
        '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{}]}',
        b"\xff\xfe",
    ],
)
@pytest.mark.parametrize("folder", ["notebooks", "results/notebooks"])
def test_a_damaged_notebook_is_named_and_the_old_site_stays(project, damage, folder, monkeypatch, capsys):
    out = make(project)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    broken = project / folder / "table2.ipynb"
    broken.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    monkeypatch.setattr(write_site, "__defaults__", (project, project / "results"))
    assert main(["--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and f"{folder}/table2.ipynb" in message
    assert re.search("Restore|Delete", message)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert not [path for path in project.iterdir() if path.name.startswith(".site")]


def test_missing_or_damaged_sources_are_named(project):
    notebook = project / "notebooks/learn_1.ipynb"
    output = picture()
    output.data["image/png"] = base64.b64encode(png()[:55]).decode()
    write(notebook, new_markdown_cell("# T"), executed("pass", output))
    with pytest.raises(FosterError, match=r"learn_1\.ipynb, cell 1: a picture is damaged"):
        make(project)
    write(notebook, new_markdown_cell("# T\n\n![far](https://example.org/picture.png)"))
    with pytest.raises(FosterError, match=r"learn_1\.ipynb, cell 0: picture https://example.org/picture.png"):
        make(project)
    write(notebook, new_markdown_cell("# T\n\n![near](../results/table2/table2.png)"))
    assert_sound(make(project))
    (project / "README.md").write_text(README.replace("## Claims", "## Boasts"))
    with pytest.raises(FosterError, match="README.md: no section '## Claims'"):
        make(project)
    (project / "README.md").unlink()
    with pytest.raises(FosterError, match="README.md: No such file"):
        make(project)
    shutil.rmtree(project / "notebooks")
    with pytest.raises(FosterError, match="no notebooks"):
        make(project)


def test_a_new_site_replaces_the_old_one_whole(project):
    out = make(project)
    (out / "left-over.html").write_text("old")
    (project / "notebooks/learn_1.ipynb").unlink()
    write(project / "notebooks/quickstart.ipynb", new_markdown_cell("# Other"))
    make(project)
    assert {path.name for path in out.glob("*.html")} == {"index.html", "quickstart.html", "table2.html"}
    assert not [path for path in project.iterdir() if path.name.startswith(".site")]


def test_a_failing_swap_leaves_the_old_site(project, monkeypatch):
    out = make(project)
    (out / "mark").write_text("old")
    rename = Path.rename

    def fail(self, target):
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(FosterError, match="No space left on device"):
        make(project)
    assert (out / "mark").read_text() == "old"
    assert not [path for path in project.iterdir() if path.name.startswith(".site")]


def test_another_folder_is_not_replaced(project):
    out = project / "site"
    out.mkdir()
    assert (make(project) / "index.html").is_file()  # an empty one is
    shutil.rmtree(out)
    out.mkdir()
    (out / "index.html").write_text("a page of somebody else")
    with pytest.raises(FosterError, match="something else"):
        make(project)
    assert (out / "index.html").read_text() == "a page of somebody else"
    with pytest.raises(FosterError, match="something else"):
        write_site(project / "README.md", project, project / "results")
    assert (project / "README.md").read_text() == README


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


CHECK = """<!DOCTYPE html><meta charset="utf-8"><link rel="icon" href="data:,"><body style="margin:0"><script>
(async () => {
  const found = {};
  for (const name of %s) {
    const frame = document.createElement("iframe");
    frame.style = "width:390px;height:800px;border:0";
    frame.src = name;
    await new Promise(done => { frame.onload = done; document.body.append(frame); });
    const page = frame.contentDocument;
    found[name] = {
      width: page.documentElement.scrollWidth,
      broken: [...page.images].filter(image => !(image.complete && image.naturalWidth > 0)).map(image => image.src),
      images: page.images.length,
      font: frame.contentWindow.getComputedStyle(page.body).maxWidth,
    };
    frame.remove();
  }
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
})();
</script>"""


@pytest.fixture
def browser():
    """Headless Chromium's path."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if shutil.which(name):
            return shutil.which(name)
    pytest.skip("no Chromium found; on Debian: apt-get install chromium")


def test_a_phone_shows_every_page(real, project, browser, tmp_path):
    """In a frame 390 px wide: no page scrolls sideways, all pictures load, the console is silent."""
    long = "+".join(f"x_{{{number}}}" for number in range(60))
    texts = [f"Long ${long}$ and {'word' * 40} and `{'code' * 40}`.", f"$${long}$$", f"# {'heading' * 20}"]
    write(project / "notebooks/learn_1.ipynb", new_markdown_cell("# Long\n\n" + "\n\n".join(texts)))
    make(project)
    (tmp_path / "real").symlink_to(real)
    folders = ("real", "project/site")
    names = [path.relative_to(tmp_path).as_posix() for name in folders for path in (tmp_path / name).glob("*.html")]
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def do_GET(self):
            if self.path != "/check":
                return super().do_GET()
            content = (CHECK % json.dumps(names)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(content)

        def log_request(self, code="-", size="-"):
            asked.append((self.path, int(code)))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--no-first-run", "--disable-background-networking", "--hide-scrollbars"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        command += [f"--user-data-dir={tmp_path / 'browser'}", "--enable-logging=stderr", "--window-size=1200,900"]
        command += ["--virtual-time-budget=60000", "--dump-dom", f"http://127.0.0.1:{server.server_address[1]}/check"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        server.shutdown()
    result = BeautifulSoup(done.stdout, "html.parser").find(id="result")
    assert result, done.stderr[-2000:]
    found = json.loads(result.string)
    assert set(found) == set(names)
    assert {name: page["width"] for name, page in found.items() if page["width"] > 390} == {}
    assert {name: page["broken"] for name, page in found.items() if page["broken"]} == {}
    assert sum(page["images"] for page in found.values()) > len(names)
    assert {page["font"] for page in found.values()} == {"960px"}  # the style sheet is applied
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert [request for request in asked if request[1] not in (200, 304)] == []
