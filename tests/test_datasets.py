"""Loading, validation, the k-core, ordering and statistics of data sets."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from foster_lib.datasets import LONGEST_TEXT, Dataset, k_core, load_dataset
from foster_lib.errors import FosterError
from foster_lib.paths import sha256_file
from tests.conftest import ITEMS, USERS, make_tables, write_tables


def test_movielens_has_the_known_counts_after_the_5_core():
    """The embedded ml-100k needs no files: 943 users, 1,349 items, 99,287 interactions."""
    data = load_dataset("ml-100k")
    statistics = data.statistics()
    assert (statistics["users"], statistics["items"], statistics["interactions"]) == (943, 1349, 99287)
    assert statistics["repeats"] == 0
    assert data.texts[0] == "Toy Story (1995). Animation, Children's, Comedy"
    assert data.titles[0] == "Toy Story (1995)"
    assert all((np.diff(time) >= 0).all() for time in data.timestamps)


@pytest.mark.parametrize(
    ("name", "counts"),
    [("games", (50496, 16796, 452414)), ("foods", (14595, 8650, 150491)), ("yelp", (30431, 20033, 316354))],
)
def test_real_data_has_the_known_counts_after_the_5_core(name, counts):
    """Users, items and interactions of the real data sets, where they are at hand."""
    if not (Path(os.environ.get("FOSTER_DATA") or "/nonexistent") / name).is_dir():
        pytest.skip(f"FOSTER_DATA does not name a folder that holds '{name}'")
    data = load_dataset(name)
    assert (data.n_users, data.n_items, sum(map(len, data.sequences))) == counts


def test_loads_parquet_tables(tmp_path, tables):
    """Ids, texts, sequences and checksums of a small data set equal what the tables hold."""
    items, interactions = tables
    folder = write_tables(tmp_path, items, interactions)
    data = load_dataset("toy", tmp_path)
    assert (data.n_users, data.n_items) == (USERS, ITEMS)
    assert data.item_ids == items["item_id"].tolist()
    assert data.texts == (items["title"] + ". " + items["categories"]).tolist()
    assert data.user_ids == interactions["user_id"].drop_duplicates().tolist()
    for user, sequence, time in zip(data.user_ids, data.sequences, data.timestamps):
        rows = interactions[interactions["user_id"] == user].sort_values("timestamp")
        assert [data.item_ids[i] for i in sequence] == rows["item_id"].tolist()
        assert time.tolist() == rows["timestamp"].tolist()
    assert data.sha256 == {p.name: sha256_file(p) for p in folder.iterdir()}


def test_data_root_comes_from_the_environment(tmp_path, tables, monkeypatch):
    """FOSTER_DATA serves where no folder is given; an argument wins over it."""
    write_tables(tmp_path / "right", *tables)
    monkeypatch.setenv("FOSTER_DATA", str(tmp_path / "right"))
    assert load_dataset("toy").n_users == USERS
    monkeypatch.setenv("FOSTER_DATA", str(tmp_path / "wrong"))
    assert load_dataset("toy", tmp_path / "right").n_users == USERS


def test_row_order_only_renames_users(tmp_path, tables):
    """Shuffled rows give the same sequences by user, since all timestamps of a user differ."""
    items, interactions = tables
    write_tables(tmp_path / "a", items, interactions)
    write_tables(tmp_path / "b", items, interactions.sample(frac=1, random_state=1))
    a, b = load_dataset("toy", tmp_path / "a"), load_dataset("toy", tmp_path / "b")
    assert a.user_ids != b.user_ids
    of_b = dict(zip(b.user_ids, b.sequences))
    assert all(np.array_equal(sequence, of_b[user]) for user, sequence in zip(a.user_ids, a.sequences))


def test_equal_timestamps_keep_the_order_of_the_file(tmp_path):
    """Two hundred ties per user come out as they stand in the file, other users' rows between them."""
    rng = np.random.default_rng(0)
    items = pd.DataFrame({"item_id": [f"i{j}" for j in range(30)], "title": [f"t{j}" for j in range(30)]})
    rows = pd.DataFrame({"user_id": rng.choice(["a", "b", "c"], 600), "item_id": rng.choice(items["item_id"], 600)})
    rows["timestamp"] = 7
    write_tables(tmp_path, items, rows)
    data = load_dataset("toy", tmp_path, min_users=3)
    for user, sequence in zip(data.user_ids, data.sequences):
        assert [data.item_ids[i] for i in sequence] == rows.loc[rows["user_id"] == user, "item_id"].tolist()


def test_text_joins_the_fields_that_exist(tmp_path, tables):
    """HTML is unescaped, blank parts are left out, a missing title falls back to the text."""
    items, interactions = tables
    items["brand"] = ""
    items.loc[0, ["title", "categories", "brand"]] = ["Tom &amp; Jerry ", "  ", "Acme"]
    items.loc[1, ["title", "categories"]] = [None, "books"]
    write_tables(tmp_path, items, interactions)
    data = load_dataset("toy", tmp_path)
    assert data.texts[:2] == ["Tom & Jerry. Acme", "books"]
    assert data.titles[:2] == ["Tom & Jerry", "books"]
    assert load_dataset("toy", tmp_path, text_fields=("categories", "title")).texts[2].startswith("food. ")


# --------------------------------------------------------------------------------- k-core


def naive_core(rows: list[tuple], k: int) -> list[tuple]:
    """Remove one offending row at a time until none is left: the k-core is unique, any order finds it."""
    rows = list(rows)
    while True:
        for row in rows:
            if sum(r[0] == row[0] for r in rows) < k or sum(r[1] == row[1] for r in rows) < k:
                rows.remove(row)
                break
        else:
            return rows


@pytest.mark.parametrize("seed", range(4))
def test_k_core_equals_one_by_one_removal(seed):
    """The same rows survive as in a naive peeling, in the same order; a second pass changes nothing."""
    rng = np.random.default_rng(seed)
    rows = [(f"u{u}", f"i{i}", t) for t, (u, i) in enumerate(zip(rng.integers(12, size=45), rng.integers(12, size=45)))]
    core = k_core(pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]), 3)
    assert list(core.itertuples(index=False, name=None)) == naive_core(rows, 3)
    pd.testing.assert_frame_equal(k_core(core, 3), core)


def test_k_core_cascades():
    """A chain in which each removal starves the next node empties completely, a clique survives."""
    chain = [(f"u{n // 2}", f"i{(n + 1) // 2}") for n in range(20)]
    clique = [(f"v{a}", f"j{b}") for a in range(2) for b in range(2)]
    core = k_core(pd.DataFrame(chain + clique, columns=["user_id", "item_id"]), 2)
    assert list(core.itertuples(index=False, name=None)) == clique


def test_k_core_drops_unused_items_from_the_catalogue(tmp_path, tables):
    """Items and users that fall out leave no gap in the numbering."""
    items, interactions = tables
    extra = pd.DataFrame({"item_id": ["rare", "never"], "title": ["x", "y"], "categories": ["", ""]})
    rare = pd.DataFrame({"user_id": ["u0", "new"], "item_id": ["rare", "i3"], "timestamp": [1, 2]})
    write_tables(tmp_path, pd.concat([extra, items]), pd.concat([rare, interactions]))
    data = load_dataset("toy", tmp_path)
    assert data.item_ids == items["item_id"].tolist()
    assert "new" not in data.user_ids
    used = np.unique(np.concatenate(data.sequences))
    assert used.tolist() == list(range(ITEMS))


# ----------------------------------------------------------------------------- statistics


def test_statistics_by_hand():
    """Ten interactions of three users with four items, worked out on paper."""
    sequences = [np.array([0, 1, 1]), np.array([2, 0]), np.array([3, 2, 3, 1, 3])]
    ids, texts = list("abcd"), ["one two", "one", "a b c", "a b"]
    data = Dataset("hand", ids, ids, texts, list("xyz"), sequences, sequences)
    assert data.statistics() == {
        "users": 3,
        "items": 4,
        "interactions": 10,
        "density_percent": 83.333,
        "mean_length": 3.33,
        "median_length": 3.0,
        "max_length": 5,
        "repeats": 3,
        "mean_text_words": 2.0,
    }


# --------------------------------------------------------------------------------- errors


def change(table: str, row: int, column: str, value):
    def apply(items, interactions):
        frame = {"items": items, "interactions": interactions}[table]
        if isinstance(value, float):
            frame[column] = frame[column].astype(float)
        frame.loc[row, column] = value
        return items, interactions

    return apply


DEFECTS = {
    "no title column": (lambda i, x: (i.drop(columns="title"), x), r"items\.parquet: column 'title' is missing"),
    "no item_id column": (lambda i, x: (i.drop(columns="item_id"), x), r"items\.parquet: column 'item_id' is missing"),
    "no time column": (
        lambda i, x: (i, x.drop(columns="timestamp")),
        r"interactions\.parquet: column 'timestamp' is missing",
    ),
    "no user column": (
        lambda i, x: (i, x.rename(columns={"user_id": "user"})),
        r"interactions\.parquet: column 'user_id' is missing \(found: user, item_id",
    ),
    "missing item id": (change("items", 3, "item_id", None), r"items\.parquet, row 3: item_id is empty"),
    "duplicate item id": (change("items", 7, "item_id", "i2"), r"row 7: item_id 'i2' appears twice"),
    "empty text": (
        lambda i, x: (i.assign(title=i["title"].where(i.index != 5, " "), categories=""), x),
        r"items\.parquet, row 5: item 'i5' has no text in title, categories, brand",
    ),
    "unknown item": (change("interactions", 11, "item_id", "ghost"), r"row 11: item 'ghost' is not in items\.parquet"),
    "missing user id": (change("interactions", 4, "user_id", None), r"interactions\.parquet, row 4: user_id is empty"),
    "missing item of a row": (change("interactions", 4, "item_id", None), r"row 4: item_id is empty"),
    "NaN timestamp": (change("interactions", 9, "timestamp", float("nan")), r"row 9: timestamp is .*nan"),
    "negative timestamp": (change("interactions", 2, "timestamp", -1), r"row 2: timestamp is .*-1.*not negative"),
    "infinite timestamp": (change("interactions", 2, "timestamp", float("inf")), r"row 2: timestamp is .*inf"),
    "timestamp above int64": (change("interactions", 2, "timestamp", 2.0**63), r"row 2: timestamp is .*below 2.63"),
    "word as timestamp": (
        lambda i, x: (i, x.assign(timestamp=["noon", *x["timestamp"].astype(str)[1:]])),
        r"row 0: timestamp is 'noon'",
    ),
    "no interactions": (lambda i, x: (i, x.iloc[:0]), r"only 0 users are left after the 5-core"),
    "too few users": (
        lambda i, x: (i, x[x["user_id"].isin([f"u{u}" for u in range(19)])]),
        r"interactions\.parquet: only \d+ users are left after the 5-core, at least 20 are needed",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_is_one_clear_error(tmp_path, defect):
    """Every defect names its file, and row where there is one, in a single FosterError."""
    damage, message = DEFECTS[defect]
    write_tables(tmp_path, *damage(*make_tables()))
    with pytest.raises(FosterError, match=message):
        load_dataset("toy", tmp_path)


def test_unset_foster_data(monkeypatch):
    """Without FOSTER_DATA the error names the variable and the data set that needs no files."""
    monkeypatch.delenv("FOSTER_DATA", raising=False)
    with pytest.raises(FosterError, match=r"'toy' needs the environment variable FOSTER_DATA.*'ml-100k' needs no"):
        load_dataset("toy")


def test_missing_folder_and_file(tmp_path, tables):
    """A missing folder and a missing file are named in full."""
    with pytest.raises(FosterError, match=r"toy/items\.parquet is missing"):
        load_dataset("toy", tmp_path)
    (write_tables(tmp_path, *tables) / "interactions.parquet").unlink()
    with pytest.raises(FosterError, match=r"toy/interactions\.parquet is missing"):
        load_dataset("toy", tmp_path)


@pytest.mark.parametrize("file", ["items.parquet", "interactions.parquet"])
def test_truncated_parquet(tmp_path, tables, file):
    """Half a file is reported as unreadable, not as an error of the parquet library."""
    path = write_tables(tmp_path, *tables) / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(FosterError, match=rf"{file} is not a readable parquet file"):
        load_dataset("toy", tmp_path)


def test_missing_recbole(monkeypatch):
    """Without the package that carries MovieLens the error says what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FosterError, match=r"recbole, which is not installed: run `pip install"):
        load_dataset("ml-100k")


def test_content_follows_what_is_learned_from_and_not_the_files(tmp_path, tables):
    """Other columns, other files: same content; another text, time or order: not."""
    items, interactions = tables

    def content(name, items=items, interactions=interactions):
        write_tables(tmp_path / name, items, interactions)
        return load_dataset("toy", tmp_path / name).content

    before = content("before")
    assert before == content("column", items=items.assign(price=1.0))
    assert before == content("stars", interactions=interactions.assign(stars=5))
    assert before != content("text", items=items.assign(categories=["Other", *items["categories"][1:]]))
    swapped = interactions.assign(timestamp=interactions["timestamp"].max() - interactions["timestamp"])
    assert before != content("order", interactions=swapped)
    assert before != content("time", interactions=interactions.assign(timestamp=interactions["timestamp"] * 2))


def test_a_text_without_end_is_cut(tmp_path, tables):
    items, interactions = tables
    write_tables(tmp_path, items.assign(title=["a " * 10_000_000, *items["title"][1:]]), interactions)
    data = load_dataset("toy", tmp_path)
    assert max(map(len, data.texts)) <= 2 * LONGEST_TEXT and len(data.titles[0]) <= LONGEST_TEXT
