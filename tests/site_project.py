"""A small project with a site, and what every page of a site has to keep."""

import base64
import io
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from foster_lib import site as site_module
from foster_lib.site import write_site

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


def write_project(root: Path) -> Path:
    """Three notebooks, a README and a table, with hostile titles and texts."""
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
