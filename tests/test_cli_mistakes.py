"""What goes wrong with the command line: mistakes, damaged folders, taken folders, full disks."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

import foster_lib.recommender
from foster_lib.config import load_profile
from foster_lib.recommender import Recommender
from foster_lib.runs import Run, load_once
from tests.shop import call, files_below, make_shop, ok, settle


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A shop, and what prepare, distill and train make of it."""
    with pytest.MonkeyPatch.context() as patch:
        return make_shop(patch, tmp_path_factory.mktemp("shop"))


@pytest.fixture
def shop(place, monkeypatch):
    settle(monkeypatch, place)
    return place


MISTAKES = {
    "no data set": (["train", "nothing", "--out", "new"], r"nothing.items\.parquet is missing.*FOSTER_DATA"),
    "no such folder": (["train", "data/nothing", "--out", "new"], "data/nothing is no folder.*prepare"),
    "unknown profile": (["train", "shop", "--out", "new", "--profile", "mni"], "profile 'mni'.*Did you mean 'mini'"),
    "unknown split": (["train", "shop", "--out", "new", "--split", "temporl"], "split 'temporl'.*'temporal'"),
    "unknown method": (["distill", "shop", "--out", "new", "--method", "foser"], "'foser'.*Did you mean 'foster'"),
    "no sequences": (["distill", "shop", "--out", "new", "--method", "popularity"], "makes no sequences.*foster"),
    "too many": (["distill", "shop", "--out", "new", "--method", "random", "--sequences", "99"], "99 .* 60 users"),
    "none": (["distill", "shop", "--out", "new", "--sequences", "0"], "sequences is 0"),
    "unknown section": (["train", "shop", "--out", "new", "--set", "ful.epochs=3"], "'ful'.*Did you mean 'full'"),
    "unknown setting": (["train", "shop", "--out", "new", "--set", "full.epoch=3"], "'epoch'.*Did you mean 'epochs'"),
    "unknown parameter": (
        ["distill", "shop", "--out", "new", "--set", "methods.foster.iters=3"],
        "method 'foster': 'iters'",
    ),
    "no number": (["train", "shop", "--out", "new", "--set", "full.epochs=many"], "epochs must be a number"),
    "no value": (
        ["train", "shop", "--out", "new", "--set", "full.epochs"],
        "--set full.epochs: write it as full.epochs=12",
    ),
    "too deep": (["train", "shop", "--out", "new", "--set", "sequences.x=1"], "--set sequences.x=1: write it"),
    "not deep enough": (["train", "shop", "--out", "new", "--set", "full=1"], "--set full=1: write it"),
    "no YAML": (["train", "shop", "--out", "new", "--set", "full.epochs=[1"], "cannot be read as YAML"),
    "no parameter": (
        ["distill", "shop", "--out", "new", "--set", "methods.foster.iterations=all"],
        "methods.foster: iterations must be a number",
    ),
    "heads": (["train", "shop", "--out", "new", "--set", "model.heads=3"], "width 16 is no multiple of heads 3"),
    "no GPU": (["train", "shop", "--out", "new", "--device", "gpu"], "unknown device 'gpu'"),
    "there already": (["train", "shop", "--out", "full"], "full exists already.*--overwrite"),
    "no recommender": (["recommend", "data", "i1"], "recommender.json is missing"),
    "unknown item": (["recommend", "shop4", "the sane"], "'the sane'.*Did you mean 'the same'"),
    "ambiguous title": (["recommend", "shop4", "the same"], r"2 items have the title.*\(i1, i2\)"),
    "no recommendation": (["recommend", "shop4", "i1", "-k", "0"], "at least one"),
    "no sequences there": (["export", "full", "--format", "jsonl", "--out", "new"], "full holds no sequences"),
    "export is there": (["export", "shop4", "--format", "jsonl", "--out", "orders.csv"], "orders.csv exists already"),
    "no positions": (["export", "shop4", "--format", "jsonl", "--out", "new", "--top", "0"], "--top is 0"),
    "prepared already": (
        ["prepare", "shop", "--out", "data", "--interactions", "orders.csv", "--items", "products.csv"],
        "exists already.*--overwrite",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(shop, mistake, capsys):
    arguments, pattern = MISTAKES[mistake]
    if "--profile" not in arguments and arguments[0] in ("train", "distill"):
        arguments = [*arguments, "--profile", "mini"]
    before = {path for path in files_below(shop) if not path.startswith("cache")}
    result = call(*arguments)
    message = result.stderr or capsys.readouterr().err
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    last = [line for line in message.splitlines() if "it/s" not in line and line.startswith("error: ")]
    assert len(last) == 1 and message.endswith(last[0] + "\n"), message
    assert "Traceback" not in message
    assert pd.Series(last).str.contains(pattern).all(), message
    assert {path for path in files_below(shop) if not path.startswith("cache")} == before


def test_damage_is_named(shop, tmp_path):
    ok("distill", "shop", "--out", tmp_path / "shop4", "--profile", "mini")

    def damaged(name, text, pattern):
        path = tmp_path / "shop4" / name
        whole = path.read_bytes()
        path.write_text(text)
        result = call("recommend", tmp_path / "shop4", "i1")
        path.write_bytes(whole)
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.output
        assert pd.Series([result.stderr]).str.contains(pattern).all(), result.stderr

    damaged("recommender.json", "{", "recommender.json is damaged")
    damaged("recommender.json", '{"format": "else", "settings": {}, "sha256": {}}', "format is 'else'")
    whole = json.loads((tmp_path / "shop4" / "recommender.json").read_text())
    del whole["settings"]["model"]
    damaged("recommender.json", json.dumps(whole), "settings are incomplete .'model'")
    whole["settings"]["model"] = {"widht": 3}
    damaged("recommender.json", json.dumps(whole), "'widht'.*Did you mean 'width'")
    whole["settings"]["model"] = {"width": 8, "layers": 1}
    damaged("recommender.json", json.dumps(whole), "does not fit")
    damaged("weights.safetensors", "half", "is damaged")
    damaged("items.parquet", "half", "is damaged")
    del whole["settings"], whole["seed"]
    damaged("recommender.json", json.dumps(whole), "recommender.json is damaged .no seed, settings.")
    assert call("recommend", tmp_path / "shop4", "i1").exit_code == 0


def test_sequences_of_an_unknown_method_are_not_read(shop, tmp_path):
    """The method says which form they have: without it the tensors could be taken for something else."""
    ok("distill", "shop", "--out", tmp_path / "shop4", "--profile", "mini", "--method", "td3")
    description = tmp_path / "shop4" / "sequences.json"
    whole = json.loads(description.read_text())
    for text, pattern in (
        ("{", "sequences.json does not name the method .*Distil again"),
        (json.dumps({**whole, "method": "tdd3"}), "unknown method 'tdd3'.*Did you mean 'td3'"),
        (json.dumps({name: value for name, value in whole.items() if name != "method"}), "does not name the method"),
        (json.dumps({**whole, "method": "foster"}), "not synthetic sequences"),
        (None, "does not name the method .*No such file"),
    ):
        description.unlink() if text is None else description.write_text(text)
        result = call("export", tmp_path / "shop4", "--format", "parquet", "--out", tmp_path / "out")
        assert result.exit_code == 2 and re.search(pattern, result.stderr), result.stderr
        assert result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_changed_data_are_not_evaluated(shop, tmp_path):
    """Its test items may have been trained on."""
    interactions = pd.read_parquet(shop / "data" / "shop" / "interactions.parquet")
    (tmp_path / "shop").mkdir()
    pd.read_parquet(shop / "data" / "shop" / "items.parquet").to_parquet(tmp_path / "shop" / "items.parquet")
    interactions[:-1].to_parquet(tmp_path / "shop" / "interactions.parquet", index=False)
    load_once.cache_clear()
    result = call("evaluate", "full", "--data", tmp_path / "shop")
    assert result.exit_code == 2 and "interactions.parquet of data set 'shop' changed" in result.stderr


def test_overwrite_replaces_its_own_files_only(shop, tmp_path):
    ok("distill", "shop", "--out", tmp_path / "out", "--profile", "mini")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    ok("train", "shop", "--out", tmp_path / "out", "--profile", "mini", "--overwrite")
    assert files_below(tmp_path / "out") == files_below(shop / "full") | {"notes.txt"}
    assert Recommender.load(tmp_path / "out").about["method"] == "full"


def test_a_full_disk_leaves_the_old_result(shop, tmp_path, monkeypatch):
    ok("train", "shop", "--out", tmp_path / "out", "--profile", "mini")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files_below(tmp_path / "out")}

    def no_space(tensors, path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(foster_lib.recommender, "save_file", no_space)
    for out in ("out", "new"):
        result = call("train", "shop", "--out", tmp_path / out, "--profile", "mini", "--overwrite")
        assert result.exit_code == 2 and "No space left on device" in result.stderr
    assert {f"out/{name}" for name in before} == files_below(tmp_path)
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in before.items())


def test_an_interrupted_move_leaves_a_folder_that_is_refused(shop, tmp_path, monkeypatch):
    """New weights beside an old description would be worse than none."""
    ok("distill", "shop", "--out", tmp_path / "out", "--profile", "mini")
    move = Path.replace

    def fails(path, target):
        if path.name == "weights.safetensors":
            raise OSError(5, "Input/output error")
        return move(path, target)

    monkeypatch.setattr(Path, "replace", fails)
    result = call("train", "shop", "--out", tmp_path / "out", "--profile", "mini", "--overwrite")
    assert result.exit_code == 2 and "Input/output error" in result.stderr
    assert "recommender.json is missing" in call("recommend", tmp_path / "out", "i1").stderr


def test_a_taken_folder_is_noticed_before_anything_is_computed(shop):
    manifest = Run(load_profile("mini").settings("shop"), "full", 0).path
    before = manifest.stat().st_mtime_ns
    assert call("train", "shop", "--out", "full", "--profile", "mini", "--fresh").exit_code == 2
    assert manifest.stat().st_mtime_ns == before
