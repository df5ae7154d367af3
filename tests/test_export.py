"""Every export is read back by the library it is for, with titles that break careless writers."""

import csv
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.special
import torch
import yaml

import foster_lib.export
from foster_lib.coresets import kd, random
from foster_lib.errors import FosterError
from foster_lib.export import FORMATS, decode, export
from foster_lib.farzi import LatentSequences

NASTY = [
    "tab\there, \"quotes\" and 'more'",
    "two\nlines\r\nand three",
    '"starts with a quote',
    "None",
    "NA",
    "  blanks  at the ends ",
    "日本語 ✓ — Ünïcode 👩‍👩‍👧",
    "next\x85line\u2028separator\u2029paragraph",
    "back\\slash \\n, comma; semicolon | pipe",
    "nul\x00 and bell\x07",
    "---\nyaml: [breaks",
    "<b>html</b> & 'more' `code` **bold** # %40",
]
IDS = ["NA", "", "100%", 'with "quote"', "tab\tid", "007", "7", "None", "日本", "a b", "%4E%41", "line\nid"]


def ids_and_titles(count):
    """`count` ids and titles, all different; the nasty ones first."""
    ids = IDS + [f"i{j}" for j in range(len(IDS), count)]
    return ids, NASTY + [f"title {j}" for j in range(len(NASTY), count)]


@pytest.fixture(scope="module")
def mixtures(task):
    """Four sequences whose inputs are mixtures and whose targets are probabilities, as FOSTER's."""
    labelled = kd(task, 4, seed=0)
    generator = torch.Generator().manual_seed(0)
    k = labelled.labels.shape[-1]
    queries = 3 * torch.randn(*labelled.items.shape, k, generator=generator)
    return replace(labelled, queries=queries, bonus=torch.ones(labelled.items.shape))


@pytest.fixture(scope="module")
def decoded(task, mixtures):
    ids, titles = ids_and_titles(task.n_items)
    about = {"dataset": 'shop: "A"', "method": "foster", "seed": 0}
    return decode(mixtures, task.embeddings, ids, titles, top=5, about=about)


def test_decoding_agrees_with_all_probabilities_at_once(task, mixtures, decoded):
    real = mixtures.mask.reshape(-1)
    for items, chances, full in (
        (decoded.inputs, decoded.input_probabilities, mixtures.input_probabilities(task.embeddings)),
        (decoded.targets, decoded.target_probabilities, mixtures.target_probabilities(task.embeddings)),
    ):
        expected = full.reshape(-1, task.n_items)[real].sort(descending=True)
        np.testing.assert_allclose(chances, expected.values[:, :5], rtol=1e-5)
        np.testing.assert_array_equal(items, expected.indices[:, :5])
    rows = mixtures.mask.nonzero()
    np.testing.assert_array_equal(np.stack([decoded.sequence, decoded.position], 1), rows)
    np.testing.assert_array_equal(decoded.anchors, mixtures.items[mixtures.mask])
    assert (decoded.inputs[:, 0] != decoded.anchors).any()  # otherwise the test could not tell them apart
    assert decoded.ends().sum() == 4


def test_decoding_knows_the_forms_of_other_methods(task):
    """By hand from the factors: in Farzi's latent D and decoder M, P = softmax(D · M)."""
    generator = torch.Generator().manual_seed(0)
    latent = 2 * torch.randn(3, task.length + 1, 5, generator=generator)
    decoder = torch.randn(5, task.n_items, generator=generator)
    found = decode(
        LatentSequences.from_factors(latent=latent, decoder=decoder),
        task.embeddings,
        *ids_and_titles(task.n_items),
        top=4,
    )
    p = scipy.special.softmax((latent @ decoder).numpy(), axis=-1)
    order = np.argsort(-p, axis=-1)[..., :4]
    np.testing.assert_array_equal(found.sequence, np.repeat(range(3), task.length))
    np.testing.assert_array_equal(found.position, np.tile(range(task.length), 3))
    np.testing.assert_array_equal(found.inputs, order[:, :-1].reshape(-1, 4))
    np.testing.assert_array_equal(found.targets, order[:, 1:].reshape(-1, 4))
    best = np.take_along_axis(p, order, -1)
    np.testing.assert_allclose(found.input_probabilities, best[:, :-1].reshape(-1, 4), rtol=1e-5)
    np.testing.assert_allclose(found.target_probabilities, best[:, 1:].reshape(-1, 4), rtol=1e-5)
    assert foster_lib.export.position_table(found)["anchor_item_id"].null_count == len(found)


def test_real_items_are_certain(task):
    chosen = random(task, 3, seed=0)
    table = foster_lib.export.position_table(decode(chosen, task.embeddings, *ids_and_titles(task.n_items), top=5))
    rows = table.to_pylist()
    assert len(rows) == int(chosen.mask.sum())
    for row in rows:
        assert row["input_item_ids"] == [row["item_id"]] == [row["anchor_item_id"]]
        assert row["input_probabilities"] == row["target_probabilities"] == [1.0]
    following = [(a, b) for a, b in zip(rows, rows[1:]) if a["sequence"] == b["sequence"]]
    assert following and all(a["target_item_id"] == b["item_id"] for a, b in following)


def test_a_wrong_catalogue_is_refused(task, mixtures):
    ids, titles = ids_and_titles(task.n_items)
    for embeddings in (task.embeddings[:3], task.embeddings[:, :8]):
        with pytest.raises(FosterError, match="other items or another encoder"):
            decode(mixtures, embeddings, ids[: len(embeddings)], titles[: len(embeddings)])
    with pytest.raises(FosterError, match="--top is 0"):
        decode(mixtures, task.embeddings, ids, titles, top=0)
    assert decode(mixtures, task.embeddings, ids, titles, top=999).inputs.shape[1] == task.n_items


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_is_overwritten_or_left_behind(decoded, tmp_path, monkeypatch, kind):
    target = export(decoded, kind, tmp_path / "out")
    with pytest.raises(FosterError, match="out exists already.*--overwrite"):
        export(decoded, kind, target)
    export(decoded, kind, target, overwrite=True)

    def no_space(*arguments, **options):
        raise OSError(28, "No space left on device")

    for name in ("pq", "csv", "json", "yaml"):
        for function in ("write_table", "writer", "dumps", "safe_dump"):
            if hasattr(getattr(foster_lib.export, name), function):
                monkeypatch.setattr(getattr(foster_lib.export, name), function, no_space)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((FosterError, OSError), match="No space left"):
        export(decoded, kind, tmp_path / "new")
    assert sorted(tmp_path.rglob("*")) == before


# --------------------------------------------------------------------------- parquet


def test_parquet_by_pandas(decoded, tmp_path):
    frame = pd.read_parquet(export(decoded, "parquet", tmp_path / "sequences.parquet"))
    assert len(frame) == len(decoded) and not frame.isna().any().any()
    np.testing.assert_array_equal(frame["title"], [decoded.titles[i] for i in decoded.inputs[:, 0]])
    np.testing.assert_array_equal(frame["target_item_id"], [decoded.item_ids[i] for i in decoded.targets[:, 0]])
    for row, chances in zip(frame.itertuples(), decoded.target_probabilities):
        assert row.target_titles[0] == row.target_title and len(row.target_titles) == 5
        np.testing.assert_array_equal(row.target_probabilities, chances)
    titles = {title for titles in frame["input_titles"] for title in titles}
    assert len(titles & set(NASTY)) > 8  # the nasty ones are really among them


# --------------------------------------------------------------------------- RecBole


def read_atomic(path):
    """An atomic file as RecBole 1.2.1 reads it (`recbole.data.dataset.Dataset._load_feat`): columns of typed values.

    RecBole itself needs NumPy 1, see `test_recbole_by_its_own_reader`.
    """
    with open(path, encoding="utf-8") as file:
        header = file.readline()[:-1].split("\t")
    types = dict(column.split(":") for column in header)
    assert set(types.values()) <= {"token", "token_seq", "float", "float_seq"}
    dtype = {column: float if column.endswith(":float") else str for column in header}
    frame = pd.read_csv(path, delimiter="\t", usecols=header, dtype=dtype, encoding="utf-8", engine="python")
    assert not frame.isna().any().any()
    frame.columns = list(types)
    for name, kind in types.items():
        if kind == "token_seq":
            frame[name] = [list(filter(None, text.split(" "))) for text in frame[name]]
    return frame


def plain(text):
    """What is left of a title: its words."""
    return "".join(c if c.isprintable() or c == "\u200d" else " " for c in text).split()


def check_recbole(decoded, inter, item):
    """`inter` and `item` (columns of strings, floats, lists of words) hold the decoded sequences and the catalogue."""
    assert len(item) == len(set(item["item_id"])) == len(decoded.item_ids)
    assert [list(words) for words in item["title"]] == [plain(title) for title in decoded.titles]
    place = {item_id: index for index, item_id in enumerate(item["item_id"])}
    assert [place.get(item_id) for item_id in decoded.item_ids if item_id in ("007", "7", "日本", "a b")] == [
        5,
        6,
        8,
        9,
    ]
    for sequence in range(4):
        mine = inter[inter["user_id"] == f"s{sequence}"]
        own = decoded.sequence == sequence
        expected = [*decoded.inputs[own, 0], decoded.targets[own, 0][-1]]
        assert [place[item_id] for item_id in mine["item_id"]] == expected
        assert mine["timestamp"].tolist() == list(range(len(expected)))
    assert inter["user_id"].nunique() == 4


def test_recbole_by_the_rules_of_its_reader(decoded, tmp_path):
    folder = export(decoded, "recbole", tmp_path / "shop4")
    assert sorted(path.name for path in folder.iterdir()) == ["shop4.inter", "shop4.item"]
    check_recbole(decoded, read_atomic(folder / "shop4.inter"), read_atomic(folder / "shop4.item"))
    with open(folder / "shop4.item", encoding="utf-8", newline="") as file:
        assert len(file.read().splitlines()) == 1 + len(decoded.item_ids)  # one line each, for line-wise readers too
    with open(folder / "shop4.item", encoding="utf-8", newline="") as file:
        assert {len(row) for row in csv.reader(file, delimiter="\t")} == {2}


def test_recbole_by_its_own_reader(decoded, tmp_path, monkeypatch):
    try:
        from recbole.config import Config
        from recbole.data import create_dataset
    except (ImportError, AttributeError) as error:
        pytest.skip(f"RecBole is installed for its data files only and cannot be imported: {error}")
    monkeypatch.setattr("sys.argv", ["test"])
    monkeypatch.chdir(tmp_path)
    export(decoded, "recbole", tmp_path / "shop4")
    settings = {
        "data_path": str(tmp_path),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "title"]},
        "train_neg_sample_args": None,
    }
    try:
        data = create_dataset(Config(model="SASRec", dataset="shop4", config_dict=settings))
    except AttributeError as error:
        pytest.skip(f"RecBole 1.2.1 needs NumPy 1 and pandas 2: {error}")
    inter, item = data.inter_feat, data.item_feat
    inter = pd.DataFrame(
        {
            "user_id": data.id2token("user_id", inter["user_id"]),
            "item_id": data.id2token("item_id", inter["item_id"]),
            "timestamp": np.asarray(inter["timestamp"]),
        }
    )
    words = [[word for word in data.id2token("title", np.asarray(row)) if word != "[PAD]"] for row in item["title"]]
    item = pd.DataFrame({"item_id": data.id2token("item_id", item["item_id"]), "title": words})
    order = [foster_lib.export._token(item_id) for item_id in decoded.item_ids]
    item = item.set_index("item_id").loc[order].reset_index()  # RecBole numbers by first interaction
    check_recbole(decoded, inter, item)


# --------------------------------------------------------------------- Hugging Face


def test_huggingface_folder_by_its_specification(decoded, tmp_path, monkeypatch):
    """The card's YAML header names configurations and files, which are there and hold everything."""
    monkeypatch.setattr(foster_lib.export, "SHARD_ROWS", 16)
    folder = export(decoded, "huggingface", tmp_path / "dataset")
    start, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(header)
    assert start == "" and 'shop: "A"' in text and card["tags"]
    configs = {config["config_name"]: config for config in card["configs"]}
    assert set(configs) == {"positions", "items"} and configs["positions"]["default"] is True
    read = {}
    for name, config in configs.items():
        [data] = config["data_files"]
        files = sorted(folder.glob(data["path"]))
        assert data["split"] == "train" and len(files) > 1
        assert [file.name for file in files] == [
            f"train-{i:05d}-of-{len(files):05d}.parquet" for i in range(len(files))
        ]
        read[name] = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert read["positions"] == foster_lib.export.position_table(decoded).to_pylist()
    assert [row["title"] for row in read["items"]] == decoded.titles
    assert [row["item_id"] for row in read["items"]] == decoded.item_ids


def test_huggingface_folder_by_datasets(decoded, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(foster_lib.export, "SHARD_ROWS", 16)
    folder = str(export(decoded, "huggingface", tmp_path / "dataset"))
    positions = datasets.load_dataset(folder, split="train", cache_dir=str(tmp_path / "cache"))
    assert positions.to_list() == foster_lib.export.position_table(decoded).to_pylist()
    items = datasets.load_dataset(folder, "items", split="train", cache_dir=str(tmp_path / "cache"))
    assert items["title"][:] == decoded.titles and items["item_id"][:] == decoded.item_ids


# ----------------------------------------------------------------------- JSON lines


def test_jsonl_prompts(decoded, tmp_path):
    text = export(decoded, "jsonl", tmp_path / "prompts.jsonl").read_text(encoding="utf-8")
    prompts = [json.loads(line) for line in text.splitlines()]  # splits at Unicode's line ends too
    assert len(prompts) == len(decoded)
    for row, prompt in enumerate(prompts):
        question, answer = prompt["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        same = (decoded.sequence == decoded.sequence[row]) & (decoded.position <= decoded.position[row])
        listed = [line.split(". ", 1)[1] for line in question["content"].splitlines()[1:-1]]
        assert [title.split() for title in listed] == [plain(decoded.titles[i]) for i in decoded.inputs[same, 0]]
        best = decoded.targets[row, 0]
        assert answer["content"].split() == plain(decoded.titles[best])
        assert [item["title"] for item in prompt["next"]] == [decoded.titles[i] for i in decoded.targets[row]]
        assert prompt["next"][0]["item_id"] == decoded.item_ids[best]
        chances = [item["probability"] for item in prompt["next"]]
        np.testing.assert_allclose(chances, decoded.target_probabilities[row], atol=1e-6)
        assert prompt["weight"] == chances[0]
        assert (prompt["sequence"], prompt["position"]) == (decoded.sequence[row], decoded.position[row])
