"""Every kind of bad input ends in one line that names the place and the remedy, exit status 2, and leaves nothing."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from foster_lib import reproduce, site, statistics, tune, verify
from tests.bad_cases import CASES, DISTIL, EXPORT, PREPARE, TRAIN, named
from tests.shop import call, make_shop, settle

MODULES = {"reproduce": reproduce, "site": site, "statistics": statistics, "tune": tune, "verify": verify}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A shop, and what prepare, distill and train make of it."""
    with pytest.MonkeyPatch.context() as patch:
        return make_shop(patch, tmp_path_factory.mktemp("shop"))


@pytest.fixture
def shop(made, tmp_path, monkeypatch):
    """A copy of it to damage, with notebooks of its own."""
    shutil.copytree(made, tmp_path / "shop")
    settle(monkeypatch, tmp_path / "shop")
    (tmp_path / "shop" / "notebooks").mkdir()
    cell = nbformat.v4.new_code_cell('profile: str = "smoke"\nseed: int = 0', metadata={"tags": ["parameters"]})
    book = nbformat.v4.new_notebook(
        cells=[cell], metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    nbformat.write(book, tmp_path / "shop" / "notebooks" / "table2.ipynb")
    monkeypatch.setattr(reproduce, "NOTEBOOKS", tmp_path / "shop" / "notebooks")
    return tmp_path / "shop"


def tree(shop: Path) -> dict[str, object]:
    """All files that are no cache, with their content; temporary ones would be among them."""
    paths = {path.relative_to(shop).as_posix(): path for path in shop.rglob("*")}
    return {
        name: os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for name, path in paths.items()
        if not name.startswith("cache")
    }


def run(command: list[str], capsys) -> tuple[int, str]:
    """Exit status and standard error."""
    if command[0] in MODULES:
        code = MODULES[command[0]].main(command[1:])
        return code, capsys.readouterr().err
    result = call(*command)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr + capsys.readouterr().err


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(shop, case, capsys, monkeypatch):
    damage, command, pattern = CASES[case]
    damage(shop)
    if (shop / "results2").exists():
        monkeypatch.setenv("FOSTER_RESULTS", str(shop / "results2"))
    before = tree(shop)
    code, errors = run(command, capsys)
    complaints = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and "Traceback" not in errors, errors
    assert len(complaints) == 1 and errors.endswith(complaints[0] + "\n") and len(complaints[0]) < 2100, errors
    assert re.search(pattern, complaints[0]), complaints[0]
    assert tree(shop) == before


def test_there_are_many_kinds_of_bad_input():
    assert len(CASES) > 120


# ---------------------------------------------------------------------------------- full disks


@contextlib.contextmanager
def full_disk(size: int):
    """No file can grow beyond `size`: what a write to a full disk raises, in Python, Arrow and safetensors alike."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FULL = {
    "prepare": (named(PREPARE, new="full"), 1000),
    "embeddings": ([*TRAIN, "--set", "full.epochs=3"], 1000),
    "checkpoints": ([*TRAIN, "--set", "full.epochs=3"], 6000),
    "sequences": ([*DISTIL, "--method", "random", "--sequences", "3"], 300),
    "ranks": (["distill", "data/shop", "--out", "new", "--profile", "mini", "--method", "random", "--seed", "5"], 1500),
    "recommender": (["distill", "data/shop", "--out", "new", "--profile", "mini"], 4000),
    "parquet": (EXPORT, 1000),
    "recbole": (["export", "shop4", "--format", "recbole", "--out", "new"], 100),
    "huggingface": (["export", "shop4", "--format", "huggingface", "--out", "new"], 1000),
    "jsonl": (["export", "shop4", "--format", "jsonl", "--out", "new"], 1000),
    "table": (["statistics", "--datasets", "shop", "--encoder", "tiny"], 100),
}


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(shop, what, capsys):
    """Whole files of earlier stages may stay; with space, the same command then succeeds."""
    command, size = FULL[what]
    if what == "embeddings":
        shutil.rmtree(shop / "cache")
    with full_disk(size):
        code, errors = run(command, capsys)
    assert code == 2 and re.search(r"error: .*cannot be written \(.*(File too large|os error 27)", errors), errors
    assert "Traceback" not in errors
    assert not [path for path in shop.rglob(".partial-*")] and not (shop / "new").exists()
    assert run(command, capsys)[0] == 0


# -------------------------------------------------------------------------------- odd, but fine


def test_odd_characters_are_no_mistake(shop, capsys):
    """A byte order mark, CRLF, quotes, line ends, emoji, right-to-left, NUL; ids with blanks and signs."""
    odd = ['Tea\r\n"pot"', "שלום\u202e kettle", "🫖" * 50, "e\u0301clair", "zero\u200bwidth", "nul\0l"]
    odd += ["<script>alert(1)</script>", "NULL and void", "=SUM(A1)", "x" * 100_000]
    items, interactions = pd.read_csv(shop / "products.csv"), pd.read_csv(shop / "orders.csv")
    names = {f"i{number}": f"id {number},;%/ü" for number in range(40)}
    items["title"] = [odd[row] if row < len(odd) else title for row, title in enumerate(items["title"])]
    items["sku"], interactions["item_id"] = items["sku"].map(names), interactions["item_id"].map(names)
    items.to_csv(shop / "products.csv", index=False, encoding="utf-8-sig", lineterminator="\r\n")
    interactions.to_csv(shop / "orders.csv", index=False, encoding="utf-8-sig", lineterminator="\r\n")
    assert run(PREPARE, capsys)[0] == 0
    table = pd.read_parquet(shop / "data/new/items.parquet").set_index("item_id")
    assert table.loc["id 0,;%/ü", "title"] == 'Tea "pot"' and len(table) == 40
    assert table.loc["id 9,;%/ü", "title"].startswith("xxx") and "\0" not in "".join(table["title"])
    assert run(["distill", "data/new", "--out", "new", "--profile", "mini"], capsys)[0] == 0
    assert run(["recommend", "new", "🫖" * 50, "id 0,;%/ü"], capsys)[0] == 0
