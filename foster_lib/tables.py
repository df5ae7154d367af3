"""Tables and figures, made from manifests only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import MaxNLocator

from foster_lib.evaluation import METRICS
from foster_lib.methods import METHODS, defaults, get_method
from foster_lib.new_items import new_test_targets, over_queries
from foster_lib.paths import results_dir, write_atomically, write_text
from foster_lib.records import read_ranks
from foster_lib.runs import Run
from foster_lib.significance import paired_bootstraps

COLUMNS = ["dataset", "split", "profile", "method", "sequences", "metric", "mean", "std", "runs"]
COLUMNS += ["ratio_to_full", "recovered_gain"]
HEADLINE = ("ndcg@10", "recall@10")
OF_THIS_MACHINE = ("quick", "smoke")
"""Profiles whose tables lie in a folder of their own: they must not take the place of the published ones."""
STEPS = ("outer_steps", "iterations")
"""What methods call the number of their steps on S."""
ERROR_BARS = {"lw": 1, "capsize": 2}
EVERYBODY = slice(None)
COSTS = ("Distil s", "Train s", "KiB")


def long_table(manifests: Iterable[dict]) -> pd.DataFrame:
    """One row per data set, method and metric, mean and standard deviation over seeds; several
    students on the sequences of a seed count as their mean.

    `ratio_to_full` is the mean divided by full data's; `recovered_gain` is
    (method − untrained) / (full − untrained). Both are empty where their reference was not run.
    `sequences` is 0 for methods that condense nothing.
    """
    records = [
        {
            **{name: manifest[name] for name in ("dataset", "split", "profile", "method")},
            "sequences": manifest.get("sequences", 0),
            "seed": manifest["seed"],
            "metric": metric,
            "value": manifest["test"][metric],
        }
        for manifest in manifests
        for metric in METRICS
    ]
    keys = COLUMNS[:6]
    seeds = pd.DataFrame(records).groupby([*keys, "seed"], sort=False)["value"].mean()  # over the students of a seed
    frame = seeds.groupby(keys, sort=False).agg(["mean", "std", "count"]).reset_index()
    frame = frame.rename(columns={"count": "runs"})
    group = ["dataset", "split", "profile", "metric"]
    for reference in ("full", "untrained"):
        values = frame[frame["method"] == reference].set_index(group)["mean"].rename(reference)
        frame = frame.join(values, on=group)
    frame["ratio_to_full"] = frame["mean"] / frame["full"]
    gain = (frame["full"] - frame["untrained"]).replace(0, np.nan)
    frame["recovered_gain"] = (frame["mean"] - frame["untrained"]) / gain
    asked = {name: place for place, name in enumerate(dict.fromkeys(frame["dataset"]))}
    order = {method: place for place, method in enumerate(METHODS)}
    frame = frame.assign(asked=frame["dataset"].map(asked), order=frame["method"].map(order))
    return frame.sort_values(["asked", "split", "order"], kind="stable")[COLUMNS].reset_index(drop=True)


def per_user(runs: Iterable[Run], metric: str, chosen: np.ndarray | slice = EVERYBODY) -> dict[str, np.ndarray]:
    """Test metric of each `chosen` user, averaged over seeds, by method (of one data set)."""
    collected: dict[str, list[np.ndarray]] = {}
    for run in runs:
        collected.setdefault(run.method, []).append(read_ranks(run.path).per_user(metric)[chosen])
    return {method: np.mean(values, axis=0) for method, values in collected.items()}


def comparisons(
    runs: Iterable[Run], method: str = "foster", metric: str = "ndcg@10", chosen: np.ndarray | slice = EVERYBODY
) -> pd.DataFrame:
    """`method` against every other row by paired bootstrap over the `chosen` users (seeds averaged)."""
    values = per_user(runs, metric, chosen)
    others = {other: each for other, each in values.items() if other != method and method in values}
    tests = paired_bootstraps(values[method], others) if others else {}
    rows = [{"against": other, **test} for other, test in tests.items()]
    return pd.DataFrame(rows, columns=["against", "difference", "low", "high", "p_value", "cohens_d"])


def readable_table(runs: list[Run], manifests: list[dict], chosen: np.ndarray | slice = EVERYBODY) -> pd.DataFrame:
    """Table 2 of one data set as people read it: a row per method, formatted text; `chosen` users are compared."""
    long = long_table(manifests).set_index(["method", "metric"])
    compared = comparisons(runs, chosen=chosen).set_index("against")
    rows = []
    for method in dict.fromkeys(long.index.get_level_values("method")):
        own = [manifest for manifest in manifests if manifest["method"] == method]
        row = {
            "Method": get_method(method).title,
            "Sequences": str(long.loc[(method, "ndcg@10"), "sequences"] or "all"),
        }
        if method in ("untrained", "text-knn"):
            row["Sequences"] = "–"
        for metric, title in zip(HEADLINE, ("NDCG@10", "Recall@10")):
            cell = long.loc[(method, metric)]
            spread = f" ± {cell['std']:.4f}" if cell["runs"] > 1 else ""
            row[title] = f"{cell['mean']:.4f}{spread}"
            # Empty where full data or the untrained model was not run.
            row[f"{title} / full"] = "–" if pd.isna(cell["ratio_to_full"]) else f"{cell['ratio_to_full']:.3f}"
            row[f"{title} gain"] = "–" if pd.isna(cell["recovered_gain"]) else f"{cell['recovered_gain']:.2f}"
        if method in compared.index:
            test = compared.loc[method]
            mark = "*" if test["low"] > 0 or test["high"] < 0 else ""
            row["FOSTER minus it, 95 %"] = f"{test['difference']:+.4f} [{test['low']:+.4f}, {test['high']:+.4f}]{mark}"
        else:
            row["FOSTER minus it, 95 %"] = ""
        first = [m for m in own if not m.get("student_number")]  # where the sequences were made
        row["Distil s"] = f"{np.mean([m['seconds']['distillation'] for m in first]):.0f}"
        row["Train s"] = f"{np.mean([m['seconds']['training'] for m in own]):.0f}"
        stored = [m["details"]["bytes"] for m in own if "bytes" in m["details"]]
        row["KiB"] = f"{np.mean(stored) / 1024:.0f}" if stored else "–"
        rows.append(row)
    return pd.DataFrame(rows)


def teachers_note(runs: list[Run]) -> str:
    """Which full-data training the labels of these runs cost."""
    count = max(run.settings.teachers for run in runs)
    if count == 1:
        return "the full-data training whose teacher"
    return f"{count} full-data trainings, which seeds share: the mean of their models labels what"


def table2_folder(profile: str, split: str = "leave-one-out") -> Path:
    """Where Table 2 of a profile and split lies; the headline split has the short name."""
    root = results_dir() / profile if profile in OF_THIS_MACHINE else results_dir()
    return root / ("table2" if split in ("", "leave-one-out") else f"table2-{split}")


def write_table2(runs: list[Run], folder: Path) -> Path:
    """Write table2.csv, .md, .tex, table2 and overview .png and .pdf of finished runs; returns the Markdown's path.

    Where users come back to items, new_items.csv and a second table count the users whose target was new to them.
    """
    manifests = {run.path: run.manifest() for run in runs}
    long = long_table(manifests.values())
    write_atomically(folder / "table2.csv", lambda path: long.to_csv(path, index=False, float_format="%.6g"))
    markdown, latex, of_new = ["# Table 2: test metrics, full-catalogue ranking", ""], [], []
    for dataset in dict.fromkeys(run.settings.dataset for run in runs):
        own = [run for run in runs if run.settings.dataset == dataset]
        chosen = [manifests[run.path] for run in own]
        table = readable_table(own, chosen)
        first = chosen[0]
        data = first["data"]
        markdown += [
            f"## {dataset}, {first['split']}, profile {first['profile']}",
            "",
            f"{data['users']:,} users, {data['items']:,} items, {data['interactions']:,} interactions. "
            f"Seeds: {', '.join(map(str, sorted({run.seed for run in own})))}"
            f"{students_note(own)}.",
            "",
            table.to_markdown(index=False, disable_numparse=True),
            "",
            f"Mean ± standard deviation over seeds{once_note(own)}. *gain*: (method − untrained) / (full − untrained). "
            "*FOSTER minus it*: difference in NDCG@10 with its 95 % interval by paired bootstrap over users, "
            "seeds averaged; * where the interval excludes 0. *Distil s*, *Train s*: one thread; "
            f"*Distil s* is on top of {teachers_note(own)} KD and FOSTER read.{steps_note(own)}",
            "",
            "Hardware: " + "; ".join(sorted({f"{m['hardware']} ({m['device']})" for m in chosen})) + ".",
            "",
        ]
        latex += [f"% {dataset}, {first['split']}, profile {first['profile']}", latex_table(table), ""]
        new = new_test_targets(own[0])
        if not new.all():
            over_new = over_queries(own, new)
            of_new.append(long_table(over_new))
            markdown += [
                f"### {dataset}: users whose test target was new to them",
                "",
                "Of the history only the target is ranked. Where a user comes back to an item, any row that scores "
                "histories highest finds it, so these users are left out here.",
                "",
                readable_table(own, over_new, new)
                .drop(columns=[*COSTS])
                .to_markdown(index=False, disable_numparse=True),
                "",
            ]
    if of_new:
        frame = pd.concat(of_new)
        write_atomically(folder / "new_items.csv", lambda path: frame.to_csv(path, index=False, float_format="%.6g"))
    write_text(folder / "table2.tex", "\n".join(latex))
    for name, figure in (("table2", table2_figure(long)), ("overview", overview_figure(long))):
        for suffix in ("png", "pdf"):
            write_atomically(
                folder / f"{name}.{suffix}", lambda path: figure.savefig(path, dpi=160, metadata=undated(suffix))
            )
        plt.close(figure)
    return write_text(folder / "table2.md", "\n".join(markdown))


def students_note(runs: list[Run]) -> str:
    """How many students were trained on each set of sequences, if more than one."""
    count = 1 + max(run.student for run in runs)
    return f"; {count} students on each set of sequences" if count > 1 else ""


def once_note(runs: list[Run]) -> str:
    """That some rows are of one seed only, if others that draw at random have several."""
    seeded = {method: set() for method in dict.fromkeys(run.method for run in runs) if get_method(method).seeded}
    for run in runs:
        seeded.get(run.method, set()).add(run.seed)
    counts = {len(seeds) for seeds in seeded.values()}
    text = "; where none is shown, one seed and one student, whose chance is not in the interval, which is over users"
    return text if 1 in counts and len(counts) > 1 else ""


def steps_note(runs: list[Run]) -> str:
    """How many steps each distillation takes."""
    steps = {}
    for run in runs:
        known = {**defaults(run.method), **run.parameters}
        name = next((name for name in STEPS if name in known), "")
        if name and get_method(run.method).condenses:
            steps[get_method(run.method).title] = known[name]
    listed = ", ".join(f"{title} {count:,}" for title, count in steps.items())
    return f" Steps on S: {listed}." if steps else ""


def table2_figure(long: pd.DataFrame) -> plt.Figure:
    """NDCG@10 and Recall@10 of every method with the spread over seeds; full data as a line."""
    use_style()
    datasets = list(dict.fromkeys(long["dataset"]))
    heights = [max(2.6, 0.6 + 0.2 * long.loc[long["dataset"] == name, "method"].nunique()) for name in datasets]
    figure, axes = plt.subplots(
        len(datasets),
        len(HEADLINE),
        figsize=(9, 0.9 + sum(heights)),
        height_ratios=heights,
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for row, dataset in zip(axes, datasets):
        for axis, metric in zip(row, HEADLINE):
            part = long[(long["dataset"] == dataset) & (long["metric"] == metric)]
            place = np.arange(len(part))[::-1]
            colours = _colours(part["method"])
            axis.barh(place, part["mean"], xerr=part["std"].fillna(0), color=colours, error_kw=ERROR_BARS)
            axis.set_yticks(place, [get_method(method).title for method in part["method"]])
            axis.set_ylim(-0.8, len(part) - 0.2)
            for reference in part.loc[part["method"] == "full", "mean"]:
                axis.axvline(reference, color="C0", ls="--", lw=1)
            axis.set_xlabel(f"{metric.upper().replace('RECALL', 'Recall')}, test ({dataset})")
    return figure


def overview_figure(long: pd.DataFrame) -> plt.Figure:
    """NDCG@10 of the rows that all data sets have, a panel each, with the spread over seeds; full data as a line."""
    use_style()
    ndcg = long[long["metric"] == "ndcg@10"]
    datasets = list(dict.fromkeys(ndcg["dataset"]))
    shared = [
        m for m in dict.fromkeys(ndcg["method"]) if ndcg.loc[ndcg["method"] == m, "dataset"].nunique() == len(datasets)
    ]
    figure, axes = plt.subplots(
        1,
        len(datasets),
        figsize=(2.4 + 1.9 * len(datasets), 0.9 + 0.26 * len(shared)),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    place = np.arange(len(shared))[::-1]
    for dataset, axis in zip(datasets, axes[0]):
        part = ndcg[ndcg["dataset"] == dataset].set_index("method").loc[shared]
        axis.barh(place, part["mean"], xerr=part["std"].fillna(0), color=_colours(shared), error_kw=ERROR_BARS)
        for reference in part.loc[part.index == "full", "mean"]:
            axis.axvline(reference, color="C0", ls="--", lw=1)
        axis.set(title=dataset, xlabel="NDCG@10, test")
        axis.xaxis.set_major_locator(MaxNLocator(3))
    axes[0, 0].set_yticks(place, [get_method(method).title for method in shared])
    return figure


def _colours(methods: Iterable[str]) -> list[str]:
    return ["C1" if method == "foster" else "C0" if method == "full" else "0.55" for method in methods]


def use_style() -> None:
    """One look for all figures: colour-blind-safe, readable in grey."""
    sns.set_theme(
        style="whitegrid", palette="colorblind", font_scale=0.9, rc={"axes.grid.axis": "x", "pdf.fonttype": 42}
    )


def latex_table(table: pd.DataFrame) -> str:
    """A table of formatted text as LaTeX: the first column is set to the left, the others to the right."""
    text = table.map(
        lambda cell: str(cell).replace("±", r"$\pm$").replace("–", "--").replace("−", "-").replace("%", r"\%")
    )
    text.columns = [column.replace("%", r"\%") for column in text.columns]
    return text.to_latex(index=False, escape=False, column_format="l" + "r" * (len(table.columns) - 1))


def undated(suffix: str) -> dict:
    """File metadata without a date, so that equal figures are equal files."""
    return {"CreationDate": None} if suffix == "pdf" else {"Software": None}
