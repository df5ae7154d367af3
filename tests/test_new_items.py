"""The table of the users whose test target was new to them, against plain loops over the stored ranks."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from foster_lib.execution import execute
from foster_lib.new_items import new_targets, new_test_targets, over_queries
from foster_lib.runs import Run, load_once
from foster_lib.splits import Queries
from foster_lib.tables import comparisons, long_table, readable_table, write_table2
from tests.conftest import forget_data, make_tables, write_tables

ROWS = [("full", 0, 0), ("untrained", 0, 0), ("popularity", 0, 0)]
ROWS += [(method, seed, student) for method in ("random", "foster") for seed in (0, 1) for student in (0, 1)]
FOSTER = {"iterations": 1, "subset": 16, "windows": 4, "pool": 1}


def test_new_targets():
    histories = [np.array([3, 1]), np.array([3, 1]), np.array([], int)]
    queries = Queries(np.arange(3), histories, np.array([1, 2, 1]))
    assert new_targets(queries).tolist() == [False, True, True]


@pytest.fixture
def runs(toy, settings):
    """Finished runs on data where every third user comes back to the first item."""
    items, interactions = make_tables()
    by_user = interactions.sort_values("timestamp", kind="stable").groupby("user_id", sort=False)
    interactions = pd.concat(
        own.assign(item_id=[*own["item_id"][:-1], own["item_id"].iloc[0]]) if number % 3 == 0 else own
        for number, (_, own) in enumerate(by_user)
    )
    write_tables(toy, items, interactions)
    forget_data()
    small = replace(settings, methods={"foster": FOSTER})
    found = [Run(small, method, seed, student) for method, seed, student in ROWS]
    execute(found, progress=False, say=lambda line: None)
    return found


def users_that_come_back(toy) -> set[int]:
    """Their places in the data set, whose users are numbered as they first appear in the file."""
    table = pd.read_parquet(toy / "toy" / "interactions.parquet").sort_values("timestamp", kind="stable")
    histories = {user: own["item_id"].tolist() for user, own in table.groupby("user_id")}
    order = load_once("toy").user_ids
    return {place for place, user in enumerate(order) if histories[user][-1] in histories[user][:-1]}


def test_the_table_by_hand(toy, runs):
    back, sums = users_that_come_back(toy), {}
    assert 10 <= len(back) < 60
    for run in runs:
        ranks = pd.read_parquet(run.path.with_suffix(".parquet"))
        values = []
        for user, higher, tied in ranks[["user", "higher", "tied"]].itertuples(index=False):
            if user not in back:
                places = range(higher + 1, higher + tied + 2)
                values.append(sum(1 / math.log2(place + 1) for place in places if place <= 10) / len(places))
        sums.setdefault(run.method, {}).setdefault(run.seed, []).append(sum(values) / len(values))
    new = new_test_targets(runs[0])
    manifests = over_queries(runs, new)
    table = long_table(manifests).set_index(["method", "metric"])
    compared = comparisons(runs, chosen=new).set_index("against")
    seeds = {method: [sum(own) / len(own) for own in of.values()] for method, of in sums.items()}
    means = {method: sum(values) / len(values) for method, values in seeds.items()}
    for method, mean in means.items():
        row = table.loc[(method, "ndcg@10")]
        assert row["mean"] == pytest.approx(mean)
        assert row["ratio_to_full"] == pytest.approx(mean / means["full"])
        gain = (mean - means["untrained"]) / (means["full"] - means["untrained"])
        assert row["recovered_gain"] == pytest.approx(gain)
        if method == "foster":
            assert method not in compared.index
        else:
            test = compared.loc[method]
            assert test["difference"] == pytest.approx(means["foster"] - mean)
            assert test["low"] <= test["difference"] <= test["high"]
    first, second = seeds["random"]
    assert table.loc[("random", "ndcg@10"), "std"] == pytest.approx(abs(first - second) / math.sqrt(2))
    shown = readable_table(runs, manifests, new).set_index("Method")
    first = compared.loc["random"]
    assert shown.loc["Random", "FOSTER minus it, 95 %"].startswith(f"{first['difference']:+.4f} [{first['low']:+.4f}")
    assert "±" in shown.loc["FOSTER", "NDCG@10"] and "±" not in shown.loc["Popularity", "NDCG@10"]


def test_table_2_has_it_where_users_come_back(toy, runs, settings):
    text = write_table2(runs, toy / "table2").read_text()
    assert "### toy: users whose test target was new to them" in text
    written = pd.read_csv(toy / "table2" / "new_items.csv")
    over_new = long_table(over_queries(runs, new_test_targets(runs[0])))
    np.testing.assert_allclose(written["mean"], over_new["mean"], rtol=1e-5)
    assert set(written["method"]) == {method for method, _, _ in ROWS} and set(written["dataset"]) == {"toy"}


def test_there_is_none_where_nobody_comes_back(toy, settings):
    items, interactions = make_tables()
    write_tables(toy, items, interactions.drop_duplicates(["user_id", "item_id"]))
    forget_data()
    run = Run(settings, "popularity", 0)
    execute([run], progress=False, say=lambda line: None)
    assert new_test_targets(run).all()
    text = write_table2([run], toy / "table2").read_text()
    assert "new to them" not in text and not (toy / "table2" / "new_items.csv").exists()
