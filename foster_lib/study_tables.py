"""What a study found, as people read it: its table and its figure."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import EngFormatter, LogLocator

from foster_lib.methods import get_method
from foster_lib.paths import write_atomically
from foster_lib.records import read_ranks
from foster_lib.runs import Run
from foster_lib.significance import paired_bootstraps
from foster_lib.tables import undated, use_style

BASE = "foster"
STALE = " (stale)"
"""Ends the name of a row that another version of the code has made."""
COSTS = ["distil_seconds", "train_seconds", "total_seconds", "peak_memory_mib", "bytes"]
"""What a row costs: columns of `studies.study_table`, and metrics of their own in it."""


def readable_table(spec: dict[str, Any], part: pd.DataFrame, runs: list[tuple[str, Run]]) -> pd.DataFrame:
    """The table of one data set as people read it: a row per variant, formatted text; a line where a part begins.

    Parameters
    ----------
    spec : dict
        The study as `studies.yaml` has it: its panels, further columns and their labels.
    part : DataFrame
        The rows of `studies.study_table`.
    runs : list
        Runs by name of variant: FOSTER, see `_foster_against`, is compared with each, user by user. Without them
        there is no comparison.
    """
    tests = _foster_against(runs, part)
    rows, groups = [], list(part.groupby(["variant", "as_profile"], sort=False))
    above = headings(spec, [name for (name, _), _ in groups])
    for heading, ((name, as_profile), own) in zip(above, groups):
        if heading:
            rows.append({"Row": f"{heading}:"})
        row, own = {"Row": name + " †" * as_profile}, own.set_index("metric")
        for metric in dict.fromkeys(["ndcg@10", "recall@10", *spec["panels"], *spec["columns"]]):
            if metric not in COSTS:
                cell = own.reindex([metric]).iloc[0]
                row[spec["labels"][metric]] = number(cell["mean"], 0 if metric == "coverage" else 4, cell["std"])
        first = own.loc["ndcg@10"]
        row |= {"NDCG@10 / full": number(first["ratio_to_full"], 3), "gain": number(first["recovered_gain"], 2)}
        if tests:
            row["FOSTER minus it, 95 %"] = ""
        if (test := tests.get(name)) and not as_profile:
            interval = f"{test['difference']:+.4f} [{test['low']:+.4f}, {test['high']:+.4f}]"
            row["FOSTER minus it, 95 %"] = interval + "*" * (test["low"] > 0 or test["high"] < 0)
        costs = zip(("Distil s", "Train s", "Total s", "MiB", "KiB"), first[COSTS] / (1, 1, 1, 1, 1024))
        rows.append(row | {title: number(value, 0) for title, value in costs})
    return pd.DataFrame(rows).fillna("")


def headings(spec: dict[str, Any], names: Iterable[str]) -> list[str]:
    """For each row the part of the study that begins with it, or nothing: the first of a part's rows that is there."""
    part, parts = "", {}
    for variant in spec["variants"]:
        parts[variant["name"]] = part = variant.get("part", part)
    own = [parts.get(name.removesuffix(STALE), "") for name in names]
    return [part if part != before else "" for before, part in zip(["", *own], own)]


def _foster_against(runs: list[tuple[str, Run]], part: pd.DataFrame) -> dict[str, dict[str, float]]:
    """`paired_bootstraps` of FOSTER against each row: at the row's value of the sweep where FOSTER has it, otherwise
    FOSTER as the study has it but for the number of sequences, of which there are as many.
    """
    foster = next((run.settings for name, run in runs if name == get_method(BASE).title), None)
    points = part.drop_duplicates("variant").set_index("variant")[["sweep", "value"]].apply(tuple, axis=1).to_dict()
    ranks: dict[str, list[np.ndarray]] = {}
    counts: dict[str, int] = {}
    ours: dict[int, str] = {}
    at_point: dict[tuple[str, str], str] = {}
    for name, run in runs:
        ranks.setdefault(name, []).append(read_ranks(run.path).per_user("ndcg@10"))
        count = counts[name] = run.settings.sequences
        if foster and run.method == BASE and run.settings == replace(foster, sequences=count):
            ours.setdefault(count, name)
        if run.method == BASE and name in points and points[name][0] not in ("", "reference"):
            at_point[points[name]] = name
    values = {name: np.mean(each, axis=0) for name, each in ranks.items()}
    rivals: dict[str, dict[str, np.ndarray]] = {}
    for name in values:
        rival = ours.get(counts[name])
        if name not in at_point.values():
            rival = at_point.get(points.get(name), rival)
        if rival and rival != name:
            rivals.setdefault(rival, {})[name] = values[name]
    return {row: test for rival, rows in rivals.items() for row, test in paired_bootstraps(values[rival], rows).items()}


def study_figure(spec: dict[str, Any], table: pd.DataFrame) -> plt.Figure:
    """A row per data set and sweep, a column per panel: curves over the values of a sweep, or a dot per variant."""
    use_style()
    sweeps = [sweep for sweep in table["sweep"].unique() if sweep not in ("", "reference")]
    columns, rows = spec["panels"], list(itertools.product(table["dataset"].unique(), sweeps or [""]))
    size = (3.4 * len(columns), 3.2)
    if not sweeps:
        names = table["variant"].unique()
        size = (2.4 + 2.8 * len(columns), 0.8 + 0.25 * (len(names) + sum(map(bool, headings(spec, names)))))
    options = {"squeeze": False, "layout": "constrained", "sharey": False if sweeps else "row"}
    figure, axes = plt.subplots(len(rows), len(columns), figsize=(size[0], size[1] * len(rows)), **options)
    for (row, (dataset, sweep)), (column, panel) in itertools.product(enumerate(rows), enumerate(columns)):
        axis, part = axes[row, column], table[(table["dataset"] == dataset) & (table["metric"] == panel)]
        if sweep:
            _curves(axis, part, sweep)
        else:
            _dots(axis, part, headings(spec, part["variant"]))
        (axis.set_ylabel if sweep else axis.set_xlabel)(f"{spec['labels'][panel]}\n({dataset})")
    if sweeps:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write `path`.png and .pdf, and close the figure; equal figures are equal files."""
    for suffix in ("png", "pdf"):
        save = functools.partial(figure.savefig, dpi=160, metadata=undated(suffix))
        write_atomically(path.with_name(f"{path.name}.{suffix}"), save)
    plt.close(figure)


def _curves(axis: plt.Axes, part: pd.DataFrame, sweep: str) -> None:
    own = part[part["sweep"] == sweep]
    labels = list(own["value"].unique())  # equal steps on the axis: values are far apart, and some are words
    for (method, line), form in zip(own.groupby("method", sort=False), ("C0o-", "C1s--", "C2^:", "C3D-.")):
        line = line.dropna(subset="mean")  # it goes on beyond what was not measured
        place = [labels.index(value) for value in line["value"]]
        axis.errorbar(place, line["mean"], line["std"].fillna(0), fmt=form, capsize=3, label=get_method(method).title)
        ringed = [labels.index(value) for value in line.loc[line["as_profile"], "value"]]
        axis.plot(ringed, line.loc[line["as_profile"], "mean"], "o", mfc="none", mec="0.15", ms=13)
    for method, style, shade in (("full", (0, (6, 2)), "0.15"), ("kd", ":", "0.45")):
        line = part[(part["sweep"] == "reference") & (part["method"] == method) & ~own["method"].eq(method).any()]
        line = line[~line["metric"].isin(COSTS) | (method != "full")]  # full data has nothing to distil
        for value in line["mean"].dropna():
            axis.axhline(value, ls=style, color=shade, lw=1.3, label=get_method(method).title)
    axis.set_xticks(range(len(labels)), labels)
    axis.grid(True, axis="y")
    axis.set_xlabel(sweep)


def _dots(axis: plt.Axes, part: pd.DataFrame, above: list[str]) -> None:
    """A dot per row of `part`; above some of them a line for its heading."""
    metric = part["metric"].iloc[0]
    below = np.arange(len(part)) + np.cumsum([bool(heading) for heading in above])
    part = part.assign(place=below[-1] - below)
    if metric in COSTS:
        part["mean"] = part["mean"].clip(lower=0.01)  # what takes no time, on a logarithmic axis
    for as_profile, look in ((False, {"fmt": "o", "color": "C0"}), (True, {"fmt": "D", "color": "C1", "ms": 7})):
        own = part[part["as_profile"] == as_profile]
        axis.errorbar(own["mean"], own["place"], xerr=own["std"].fillna(0), capsize=3, **look)
    begins = {place + 1: heading for place, heading in zip(part["place"], above) if heading}
    axis.set_yticks([*part["place"], *begins], [*part["variant"], *begins.values()])
    for label in axis.get_yticklabels()[len(part) :]:
        label.set_fontweight("bold")
    axis.grid(True, axis="y", alpha=0.4)
    axis.margins(x=0.08)
    axis.set_ylim(-0.8, below[-1] + 0.8)
    if metric == "kl_to_teacher" or (metric in COSTS and metric != "peak_memory_mib"):
        axis.set_xscale("log")
        narrow = part["mean"].max() < 100 * part["mean"].min()
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
        axis.xaxis.set_major_formatter(EngFormatter(sep="") if metric == "bytes" else "{x:g}")  # 20k, not 20000
        axis.xaxis.set_minor_formatter("")


def number(value: float, digits: int, spread: float = np.nan) -> str:
    """`value ± spread` with so many digits; a dash for what is not a number."""
    both = [f"{each:.{digits}f}" for each in (value, spread) if not pd.isna(each)]
    return " ± ".join(both) or "–"
