"""A site that cannot be made: what is wrong is named, and the old one stays."""

import base64
import re
import shutil
from pathlib import Path

import pytest
from nbformat.v4 import new_markdown_cell

from foster_lib.errors import FosterError
from foster_lib.site import main, write_site
from tests.site_project import README, assert_sound, executed, make, picture, png, write, write_project


@pytest.fixture
def project(tmp_path):
    return write_project(tmp_path / "project")


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
