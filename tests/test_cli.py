"""The command line from a CSV to recommendations, on the tiny data set with the `tiny` encoder."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

import foster_lib.config
import foster_lib.recommender
from foster_lib.cli import app
from foster_lib.config import load_profile
from foster_lib.evaluation import recommender_scorer
from foster_lib.recommender import Recommender
from foster_lib.runs import Run, load_catalogue, load_once, make_task
from tests.conftest import make_tables

PROFILE = {
    "sequences": 4,
    "encoder": {"name": "tiny"},
    "model": {"width": 16, "adapter_hidden": 8, "layers": 1, "heads": 2, "length": 6},
    "full": {"learning_rate": 1e-2, "epochs": 10, "batch_size": 16},
    "student": {"learning_rate": 2e-2, "epochs": 10, "validate_every": 5},
    "methods": {"foster": {"iterations": 2, "subset": 16, "windows": 4, "pool": 1}},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a CSV of orders and one of products, and what prepare, distill and train make of them."""
    folder = tmp_path_factory.mktemp("shop")
    items, interactions = make_tables()
    items.loc[0, "title"] = "Büro, \"groß\"\tund 'klein'"
    items.loc[1:2, "title"] = "the same"
    items.rename(columns={"item_id": "sku"}).to_csv(folder / "products.csv", index=False)
    interactions.rename(columns={"user_id": "customer"}).to_csv(folder / "orders.csv", index=False)
    (folder / "profiles").mkdir()
    (folder / "profiles" / "mini.yaml").write_text(yaml.safe_dump(PROFILE))
    with pytest.MonkeyPatch.context() as patch:
        _settle(patch, folder)
        ok("prepare", "shop", "--out", "data", "--interactions", "orders.csv", "--items", "products.csv", "--columns",
           "user=customer", "--item-columns", "item=sku")  # fmt: skip
        ok("distill", "data/shop", "--out", "shop4", "--profile", "mini")
        ok("train", "data/shop", "--out", "full", "--profile", "mini")
    return folder


def _settle(patch, folder):
    """Work in `folder`, with the profile `mini` and without a network."""
    patch.chdir(folder)
    patch.setattr(foster_lib.config, "PROFILES", folder / "profiles")
    patch.setattr(socket.socket, "connect", _no_network)
    patch.setenv("FOSTER_DATA", str(folder / "data"))
    patch.setenv("FOSTER_RESULTS", str(folder / "results"))
    patch.setenv("FOSTER_CACHE", str(folder / "cache"))
    load_once.cache_clear()
    load_catalogue.cache_clear()


def _no_network(self, address):
    raise AssertionError(f"the network was asked: {address}")


@pytest.fixture
def shop(place, monkeypatch):
    _settle(monkeypatch, place)
    return place


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ok(*arguments):
    result = call(*arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_evaluation_is_that_of_the_run(shop):
    settings = load_profile("mini").settings("shop")
    for folder, method in (("shop4", "foster"), ("full", "full")):
        rows = json.loads(ok("evaluate", folder, "--data", "data/shop", "--json"))
        assert set(rows) == {folder, "untrained", "popularity", "item-knn"}
        about = json.loads((shop / folder / "recommender.json").read_text())
        assert rows[folder] == about["test"] == Run(settings, method, 0).manifest()["test"]
        assert rows[folder] != rows["untrained"]
    assert "60 users, 40 items" in ok("evaluate", "full")


def test_runs_are_those_of_table_2_and_a_second_call_reuses_them(shop):
    settings = load_profile("mini").settings("shop")
    for method in ("foster", "full"):
        assert Run(settings, method, 0).manifest() is not None
    before = (shop / "shop4" / "weights.safetensors").read_bytes()
    said = ok("distill", "data/shop", "--out", "again", "--profile", "mini")
    assert "1 of 1 runs are reused" in said
    assert (shop / "again" / "weights.safetensors").read_bytes() == before
    assert "reused" not in ok("distill", "shop", "--out", "five", "--profile", "mini", "--sequences", 5)
    assert json.loads((shop / "five" / "sequences.json").read_text())["sequences"] == 5
    changed = ("--set", "student.epochs=2", "--method", "random", "--seed", 3)
    assert "reused" not in ok("distill", "shop", "--out", "two", "--profile", "mini", *changed)
    about = json.loads((shop / "two" / "recommender.json").read_text())
    assert about["settings"]["student"]["epochs"] == 2 and about["seed"] == 3 and about["method"] == "random"


def test_the_saved_model_scores_as_the_trained_one(shop):
    run = Run(load_profile("mini").settings("shop"), "foster", 0)
    teacher, loaded = make_task(run).teacher, Recommender.load(shop / "full")
    histories = [np.array([3, 4, 5]), np.arange(9)]
    torch.testing.assert_close(
        recommender_scorer(loaded.model)(histories), recommender_scorer(teacher)(histories), rtol=0, atol=0
    )
    student = Recommender.load(shop / "shop4")
    assert not torch.equal(
        recommender_scorer(student.model)(histories), recommender_scorer(loaded.model)(histories)
    )  # trained on the sequences, not the teacher


def test_weights_that_were_not_published_are_trained_again(shop, tmp_path, monkeypatch):
    """A manifest without the weights in the cache, as in a clone of this repository."""
    monkeypatch.setenv("FOSTER_CACHE", str(tmp_path / "empty"))
    published = Run(load_profile("mini").settings("shop"), "full", 0).path
    before = published.read_bytes()
    ok("train", "shop", "--out", tmp_path / "full", "--profile", "mini")
    ours, theirs = (load_file(folder / "full" / "weights.safetensors") for folder in (tmp_path, shop))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert published.read_bytes() == before
    Run(load_profile("mini").settings("shop"), "foster", 0).distilled_path.unlink()
    ok("distill", "shop", "--out", tmp_path / "shop4", "--profile", "mini")
    assert (tmp_path / "shop4" / "sequences.safetensors").is_file()


def test_recommendations_by_id_and_title(shop):
    best = json.loads(ok("recommend", "shop4", "i3", "i4", "-k", 7, "--json"))
    assert [row["rank"] for row in best] == list(range(1, 8)) and len({row["item_id"] for row in best}) == 7
    assert not {"i3", "i4"} & {row["item_id"] for row in best}
    chances = [row["probability"] for row in best]
    assert chances == sorted(chances, reverse=True) and 0 < sum(chances) < 1

    titles = make_tables()[0]["title"]
    assert json.loads(ok("recommend", "shop4", titles[3].upper(), titles[4], "-k", 7, "--json")) == best
    assert ok("recommend", "shop4", "büro, \"GROSS\" und 'klein'") == ok("recommend", "shop4", "i0")
    everything = json.loads(ok("recommend", "shop4", "i5", "-k", 1000, "--json"))
    assert len(everything) == 39 and sum(row["probability"] for row in everything) == pytest.approx(1, abs=1e-4)
    odd = next(row for row in everything if row["item_id"] == "i0")
    assert odd["title"] == "Büro, \"groß\" und 'klein'"  # `prepare` takes the tab out
    assert len(ok("recommend", "shop4", "i5", "-k", 3).splitlines()) == 3


def test_recommendations_are_the_models_order(shop):
    recommender = Recommender.load(shop / "shop4")
    history = [recommender.find(item) for item in ("i7", "i8", "i9")]
    scores = recommender_scorer(recommender.model)([np.array(history)])[0].clone()
    scores[history] = -torch.inf
    expected = [recommender.item_ids[i] for i in scores.argsort(descending=True)[:5]]
    assert recommender.recommend(["i7", "i8", "i9"], 5)["item_id"].tolist() == expected


def test_everything_is_plain_files_and_nothing_is_half_written(shop):
    assert files_below(shop / "full") == {"weights.safetensors", "items.parquet", "recommender.json"}
    assert files_below(shop / "shop4") == files_below(shop / "full") | {"sequences.safetensors", "sequences.json"}
    suffixes = {path.suffix for path in shop.rglob("*") if path.is_file()}
    assert suffixes == {".csv", ".yaml", ".parquet", ".safetensors", ".json"}
    assert not [path for path in shop.rglob(".*")]
    items = pd.read_parquet(shop / "shop4" / "items.parquet")
    assert list(items.columns) == ["item_id", "title", "text"] and len(items) == 40


def test_exports_by_name(shop, tmp_path):
    for kind in ("parquet", "recbole", "huggingface", "jsonl"):
        said = ok("export", "shop4", "--format", kind, "--out", tmp_path / kind, "--top", 3)
        assert said.startswith("4 sequences")
    assert files_below(tmp_path) == {
        "parquet",
        "jsonl",
        "recbole/recbole.inter",
        "recbole/recbole.item",
        "huggingface/README.md",
        "huggingface/items/train-00000-of-00001.parquet",
        "huggingface/positions/train-00000-of-00001.parquet",
    }


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
    "heads": (["train", "shop", "--out", "new", "--set", "model.heads=3"], "width=16 does not divide into .*heads=3"),
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
    assert call("recommend", tmp_path / "shop4", "i1").exit_code == 0


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


@pytest.mark.parametrize("command", ["", "prepare", "train", "distill", "evaluate", "recommend", "export"])
def test_help_has_examples(command, capsys):
    result = call(*([command] if command else []), "--help")
    text = result.stdout or capsys.readouterr().out
    assert (
        result.exit_code == 0
        and "examples" in text
        and f"python -m foster_lib{command and '.' if command == 'prepare' else ' '}{command}" in text
    )


def test_a_mistyped_option_needs_no_pytorch():
    code = "import sys, foster_lib.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    result = subprocess.run([sys.executable, "-m", "foster_lib", "distil"], capture_output=True, text=True)
    assert result.returncode == 2 and "Did you mean 'distill'" in result.stderr and "Traceback" not in result.stderr
