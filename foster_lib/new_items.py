"""Table 2 of the users whose test target was new to them.

The ranking leaves out a user's history, but not the target. Where users come back to items, as on Yelp, such a target
is the only item of its history that is left, and whoever scores histories highest finds it without knowing anything
else. This table counts the other users alone.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from foster_lib.methods import get_method
from foster_lib.records import read_ranks
from foster_lib.runs import Run, load_once
from foster_lib.significance import paired_bootstraps
from foster_lib.splits import Queries, make_split

METRICS = {"ndcg@10": "NDCG@10", "recall@10": "Recall@10"}
COLUMNS = ["method", "metric", "mean", "std", "ratio_to_full", "recovered_gain", "difference", "low", "high"]


def new_targets(queries: Queries) -> np.ndarray:
    """Whether a query's target is not in its history: (queries,) bool."""
    return np.array([target not in history for history, target in zip(queries.histories, queries.targets)], bool)


def new_items(runs: list[Run]) -> pd.DataFrame | None:
    """Metrics over the test targets that were new, of finished runs on one data set: `COLUMNS`. None if all were.

    Mean and standard deviation over seeds, of which each counts as the mean of its students; ratio and gain as in
    `tables.long_table`; `difference` is FOSTER minus the row with its 95 % interval by paired bootstrap over users.
    """
    new = new_targets(make_split(load_once(runs[0].settings.dataset), runs[0].settings.split).test)
    if new.all():
        return None
    frames = []
    for metric in METRICS:
        seeds: dict[str, dict[int, list[np.ndarray]]] = {}
        for run in runs:
            of_user = read_ranks(run.path).per_user(metric)[new]
            seeds.setdefault(run.method, {}).setdefault(run.seed, []).append(of_user)
        users = {method: np.mean(sum(of.values(), []), axis=0) for method, of in seeds.items()}
        of_seed = {method: [np.mean(own) for own in of.values()] for method, of in seeds.items()}
        frame = pd.DataFrame({"method": list(seeds), "metric": metric})
        frame["mean"] = [np.mean(each) for each in of_seed.values()]
        frame["std"] = [np.std(each, ddof=1) if len(each) > 1 else np.nan for each in of_seed.values()]
        full, untrained = (frame["mean"][frame["method"] == name].mean() for name in ("full", "untrained"))
        frame["ratio_to_full"] = frame["mean"] / full
        frame["recovered_gain"] = (frame["mean"] - untrained) / (full - untrained)
        others = {method: each for method, each in users.items() if method != "foster" and "foster" in users}
        tests = pd.DataFrame(paired_bootstraps(users["foster"], others) if others else {}).T
        frame = frame.join(tests.reindex(columns=["difference", "low", "high"]), on="method")
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)[COLUMNS]


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """`new_items` as people read it: a row per method, formatted text."""
    rows = []
    for method, own in table.groupby("method", sort=False):
        row = {"Method": get_method(method).title}
        for _, cell in own.iterrows():
            title = METRICS[cell["metric"]]
            row[title] = f"{cell['mean']:.4f}" + ("" if pd.isna(cell["std"]) else f" ± {cell['std']:.4f}")
            row[f"{title} / full"] = f"{cell['ratio_to_full']:.3f}"
            row[f"{title} gain"] = f"{cell['recovered_gain']:.2f}"
        first = own.iloc[0]
        mark = "*" if first["low"] > 0 or first["high"] < 0 else ""
        test = f"{first['difference']:+.4f} [{first['low']:+.4f}, {first['high']:+.4f}]{mark}"
        row["FOSTER minus it, 95 %"] = "" if pd.isna(first["difference"]) else test
        rows.append(row)
    return pd.DataFrame(rows).replace({"nan": "–"})
