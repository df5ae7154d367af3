"""What the documentation shows is true: the method in one file runs, options exist, no module is left out."""

from __future__ import annotations

import re

import numpy as np
import pytest
import typer

from foster_lib.cli import app
from foster_lib.paths import ROOT
from foster_lib.prepare import _parser


def test_the_worked_example_of_a_method(task):
    """The code of docs/new_method.md, as it stands there, keeps the users who were active last."""
    text = (ROOT / "docs" / "new_method.md").read_text(encoding="utf-8")
    space: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], space)
    made = space["recent"](task, sequences=4, seed=0, skip=1)
    latest = np.argsort([-times[-1] for times in task.train_timestamps], kind="stable")[1:5]
    for row, user in enumerate(latest):
        window = task.train[user][-task.length - 1 :]
        assert made.items[row][made.mask[row]].tolist() == window[:-1].tolist()
        assert made.targets[row][made.mask[row]].tolist() == window[1:].tolist()


@pytest.mark.parametrize("page", ["README.md", "docs/your_own_data.md", "docs/new_method.md"])
def test_commands_have_the_options_that_are_shown(page):
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    commands = typer.main.get_command(app).commands
    known = {name: {option for each in command.params for option in each.opts} for name, command in commands.items()}
    known["prepare"] = set(_parser()._option_string_actions)
    shown = re.findall(r"python -m foster_lib (\w+)([^\n`]*)", text)
    assert page != "docs/your_own_data.md" or {name for name, _ in shown} == set(known)
    for name, rest in shown:
        assert set(re.findall(r"(?<!\S)--?[a-z][\w-]*", rest)) <= known[name] | {"--help"}, (name, rest)


def test_every_module_has_its_place_in_the_reading_order():
    text = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`(\w+)/?`", "".join(line.split("|")[1] for line in text.splitlines() if "|" in line)))
    package = ROOT / "foster_lib"
    modules = {path.stem for path in package.glob("*.py") if not path.stem.startswith("__")}
    folders = {path.parent.name for path in package.glob("*/*") if not path.parent.name.startswith("__")}
    assert listed == modules | folders
