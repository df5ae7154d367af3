"""The command line from a CSV to recommendations, on the tiny data set with the `tiny` encoder."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from foster_lib.config import load_profile
from foster_lib.evaluation import recommender_scorer
from foster_lib.execution import execute
from foster_lib.methods import get_method
from foster_lib.recommender import Recommender, of_run
from foster_lib.runs import Run, make_task
from tests.conftest import make_tables
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
    changed = ("--set", "student.epochs=2", "--method", "k-means+labels", "--seed", 3)
    assert "reused" not in ok("distill", "shop", "--out", "two", "--profile", "mini", *changed)
    about = json.loads((shop / "two" / "recommender.json").read_text())
    assert about["settings"]["student"]["epochs"] == 2 and about["seed"] == 3 and about["method"] == "kd"


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


# ------------------------------------------------- methods whose sequences have a form of their own


FORMS = ["td3", "farzi", "foster-tied"]


@pytest.mark.parametrize("method", FORMS)
def test_every_form_is_exported(shop, tmp_path, method):
    """In these forms the target of a position is the mixture of the next position, tensor for tensor."""
    ok("distill", "shop", "--out", tmp_path / "out", "--profile", "mini", "--method", method)
    said = ok("export", tmp_path / "out", "--format", "parquet", "--out", tmp_path / "out.parquet", "--top", 3)
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert said.startswith(f"4 sequences, {len(rows)} positions")
    following = [(a, b) for a, b in zip(rows, rows[1:]) if a["sequence"] == b["sequence"]]
    assert len(following) == len(rows) - 4 > 0
    for a, b in following:
        assert a["target_item_ids"] == b["input_item_ids"] and b["position"] == a["position"] + 1
        assert a["target_probabilities"] == pytest.approx(b["input_probabilities"], rel=1e-4)

    run = Run(load_profile("mini").settings("shop"), method, 0)
    stored, recommender = get_method(method).form.load(run.distilled_path), Recommender.load(tmp_path / "out")
    inputs = stored.input_probabilities(recommender.embeddings)[stored.mask]
    targets = stored.target_probabilities(recommender.embeddings)[stored.mask]
    place = {item_id: index for index, item_id in enumerate(recommender.item_ids)}
    for name, expected in (("input", inputs), ("target", targets)):
        items = torch.tensor([[place[item_id] for item_id in row[f"{name}_item_ids"]] for row in rows])
        chances = torch.tensor([row[f"{name}_probabilities"] for row in rows])
        torch.testing.assert_close(chances, expected.topk(3).values)
        torch.testing.assert_close(chances, expected.gather(1, items))
    anchors = {row["anchor_item_id"] for row in rows}
    assert (None not in anchors) if method == "foster-tied" else anchors == {None}


@pytest.mark.parametrize("method", [*FORMS, "foster-decoded"])
def test_every_form_makes_a_recommender(shop, tmp_path, method):
    run = Run(load_profile("mini").settings("shop"), method, 0)
    ok("distill", "shop", "--out", tmp_path / "out", "--profile", "mini", "--method", method)
    assert json.loads(ok("evaluate", tmp_path / "out", "--data", "shop", "--json"))["out"] == run.manifest()["test"]
    assert len(json.loads(ok("recommend", tmp_path / "out", "i3", "i4", "-k", 7, "--json"))) == 7
    recommender, sequences = of_run(run)
    assert isinstance(sequences, get_method(method).form)
    saved = load_file(tmp_path / "out" / "weights.safetensors")
    torch.testing.assert_close(recommender.model.state_dict(), dict(saved), rtol=0, atol=0)


def test_a_further_student_has_a_seed_of_its_own(shop):
    settings = load_profile("mini").settings("shop")
    first, second = (Run(settings, "farzi", 1, student) for student in (0, 1))
    [manifest] = execute([second], say=lambda line: None, progress=False)
    assert of_run(second)[0].about["test"] == manifest["test"]
    assert (first.student_seed, second.student_seed) == (1001, 2001)


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
