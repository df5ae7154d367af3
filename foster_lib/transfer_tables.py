"""Table 5 as people read it: its frame, its files and its figure."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from foster_lib.evaluation import METRICS, paired_bootstrap
from foster_lib.paths import write_atomically, write_text
from foster_lib.records import read_ranks
from foster_lib.study_tables import number, save_figure
from foster_lib.tables import latex_table, use_style
from foster_lib.transfer import Transfer

KEYS = ["dataset", "split", "profile", "student", "trained_on", "method", "reading", "metric"]
COLUMNS = [*KEYS, "mean", "std", "runs", "ratio_to_full", "recovered_gain", "train_seconds", "bytes"]
TITLE = "Table 5: sequences distilled with SASRec, read by others"
NOTES = """\
Test set, full-catalogue ranking; mean ± standard deviation over seeds. A student is a recommender and the encoder of
its item texts; the sequences were distilled with the student of the first rows. Reference and start are each
student's own: */ full* divides by the same recommender trained on all data, *gain* is
(row − untrained) / (full − untrained). *FOSTER minus it*: difference in NDCG@10 of the same student trained on FOSTER's
sequences in their soft form, with its 95 % interval by paired bootstrap over users, seeds averaged; * where the
interval excludes 0. *Train s*: one thread. *KiB*: what the student reads."""


def transfer_table(planned: list[Transfer]) -> pd.DataFrame:
    """One row per student, what it is trained on, and metric: `COLUMNS`."""
    records = []
    for item in planned:
        manifest = item.manifest()
        shared = {"dataset": manifest["dataset"], "split": manifest["split"], "profile": manifest["profile"]}
        shared |= {"student": item.student.title(item.base.settings), "trained_on": item.trained_on}
        shared |= {"method": item.base.method, "reading": item.reading, "seed": item.base.seed}
        shared |= {"train_seconds": manifest["seconds"]["training"], "bytes": manifest["details"].get("bytes", np.nan)}
        records += [{**shared, "metric": metric, "figure": manifest["test"][metric]} for metric in METRICS]
    frame = pd.DataFrame(records).groupby(KEYS, sort=False)
    table = frame["figure"].agg(mean="mean", std="std", runs="count")
    table = table.join(frame[["train_seconds", "bytes"]].mean()).reset_index()
    group = ["dataset", "student", "metric"]
    for method in ("full", "untrained"):
        own = table[table["method"] == method].set_index(group)["mean"].rename(method)
        table = table.join(own, on=group)
    table["ratio_to_full"] = table["mean"] / table["full"]
    table["recovered_gain"] = (table["mean"] - table["untrained"]) / (table["full"] - table["untrained"])
    return table[COLUMNS]


def readable_table(table: pd.DataFrame, planned: list[Transfer]) -> pd.DataFrame:
    """The table of one data set, formatted text."""
    ranks: dict[tuple[str, str], list[np.ndarray]] = {}
    for item in planned:
        name = item.student.title(item.base.settings), item.trained_on
        ranks.setdefault(name, []).append(read_ranks(item.path).per_user("ndcg@10"))
    rows = []
    for (student, trained_on), own in table.groupby(["student", "trained_on"], sort=False):
        row, own = {"Student": student, "Trained on": trained_on}, own.set_index("metric")
        for metric, title in (("ndcg@10", "NDCG@10"), ("recall@10", "Recall@10")):
            row[title] = number(own.loc[metric, "mean"], 4, own.loc[metric, "std"])
        first = own.loc["ndcg@10"]
        row |= {"NDCG@10 / full": number(first["ratio_to_full"], 3), "gain": number(first["recovered_gain"], 2)}
        ours = ranks.get((student, "FOSTER"))
        row["FOSTER minus it, 95 %"] = ""
        if ours and trained_on != "FOSTER":
            test = paired_bootstrap(*(np.mean(each, axis=0) for each in (ours, ranks[student, trained_on])))
            interval = f"{test['difference']:+.4f} [{test['low']:+.4f}, {test['high']:+.4f}]"
            row["FOSTER minus it, 95 %"] = interval + "*" * (test["low"] > 0 or test["high"] < 0)
        rows.append(row | {"Train s": number(first["train_seconds"], 0), "KiB": number(first["bytes"] / 1024, 1)})
    return pd.DataFrame(rows)


def transfer_figure(table: pd.DataFrame) -> plt.Figure:
    """NDCG@10 of every student, a marker for each thing it is trained on; error bars over seeds."""
    use_style()
    part = table[table["metric"] == "ndcg@10"]
    datasets, students = part["dataset"].unique(), part["student"].unique()
    size = (8, (0.6 + 0.6 * len(students)) * len(datasets) + 1.0)
    figure, axes = plt.subplots(len(datasets), 1, figsize=size, squeeze=False, layout="constrained")
    shades = {"untrained": "0.6", "full": "0.15"}
    for axis, dataset in zip(axes[:, 0], datasets):
        rows = list(part[part["dataset"] == dataset].groupby("trained_on", sort=False))
        for count, (trained_on, own) in enumerate(rows):
            place = -np.array([list(students).index(student) for student in own["student"]])
            place = place + 0.5 - (count + 1) / (len(rows) + 1)
            colour = shades.get(own["method"].iloc[0], f"C{count}")
            look = {"fmt": "xDso^v<>"[count % 8], "color": colour, "capsize": 2, "ms": 5, "label": trained_on}
            axis.errorbar(own["mean"], place, xerr=own["std"].fillna(0), **look)
        axis.set_yticks(-np.arange(len(students)), students)
        axis.set_ylim(0.5 - len(students), 0.5)
        for edge in range(1, len(students)):
            axis.axhline(0.5 - edge, color="0.85", lw=0.8)
        axis.set_xlabel(f"NDCG@10, test ({dataset})")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def write_table5(planned: list[Transfer], table: pd.DataFrame, folder: Path) -> Path:
    """Write table5.csv, .md, .tex, .png and .pdf; returns the Markdown's path."""
    write_atomically(folder / "table5.csv", lambda path: table.to_csv(path, index=False, float_format="%.6g"))
    markdown, latex = [f"# {TITLE}", ""], []
    for keys, part in table.groupby(KEYS[:3], sort=False):
        title = "{}, {}, profile {}".format(*keys)
        readable = readable_table(part, [item for item in planned if item.base.settings.dataset == keys[0]])
        markdown += [f"## {title}", "", readable.to_markdown(index=False, disable_numparse=True), ""]
        latex += [f"% {title}", latex_table(readable), ""]
    write_text(folder / "table5.tex", "\n".join(latex))
    save_figure(transfer_figure(table), folder / "table5")
    hardware = sorted({f"{m['hardware']} ({m['device']})" for item in planned if (m := item.manifest())})
    markdown += [NOTES, "", f"Hardware: {'; '.join(hardware)}.", ""]
    return write_text(folder / "table5.md", "\n".join(markdown))
