"""What `efficiency` has measured, as people read it: Table 3's steps, and validation along the distillations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from foster_lib.efficiency import COSTS, PARTS, Course, StepCost, read_measurement
from foster_lib.methods import get_method
from foster_lib.paths import write_atomically, write_text
from foster_lib.study_tables import number, save_figure
from foster_lib.tables import latex_table, use_style

ITEMS, UNROLLED = (" and ".join(map(str, PARTS[method][1])) for method in ("td3", "trajectory-matching"))
NOTES = (
    "*Step s*: median seconds of a step on one thread. *Step MiB*: the most bytes that tensors of one step take at "
    "once, what is there before it aside. *GFLOP*: matrix products of a step. *times FOSTER*: the same, divided by "
    "FOSTER's. *Steps*: of the distillation whose course is measured; in brackets those of Table 2, where not so "
    "many fitted into the time limit. *Distil s*: seconds of these, set-up included. *End*, *Best*: NDCG@10 on "
    "validation of a student on what there is then; *s to best*: seconds of distilling until the best of the moments "
    "looked at. All on top of full-data training, which every row here reads. "
    "† would not fit into memory with a large catalogue: measured in part, memory and operations are continued "
    "linearly, seconds in proportion to operations. TD3 and Farzi embed the whole catalogue in each step: measured "
    f"with {ITEMS} of its items; trajectory matching keeps a graph of each step of the student that it unrolls: with "
    f"{UNROLLED} of them."
)


def efficiency_table(wanted: list[StepCost | Course]) -> pd.DataFrame:
    """One row per data set, state of the encoder and method, from the measurements that are there.

    Columns: `step_seconds`, `step_mib`, `setup_mib`, `gigaflop` of a step; `projected`: whether these were measured in
    part (`PARTS`) and continued linearly to the whole; `steps`, `planned_steps`, `distil_seconds`, `best`, `end`
    and `seconds_to_best` of the course; `memory_ratio` and `time_ratio`: the step's memory and seconds divided by
    FOSTER's.
    """
    rows: dict[tuple, dict[str, Any]] = {}
    partly: dict[tuple, dict[int, dict[str, Any]]] = {}
    for each in wanted:
        record = read_measurement(each.path)
        if record is None:
            continue
        key = (record["dataset"], record["tuned_layers"], record["method"])
        row = rows.setdefault(key, dict(zip(("dataset", "tuned_layers", "method"), key)) | {"projected": False})
        if isinstance(each, Course):
            best, last = max(record["course"], key=lambda moment: moment["ndcg@10"]), record["course"][-1]
            row |= {"steps": record["steps"], "planned_steps": record["planned_steps"]}
            row |= {"distil_seconds": last["seconds"], "best": best["ndcg@10"], "end": last["ndcg@10"]}
            row |= {"seconds_to_best": best["seconds"]}
        elif each.part:
            partly.setdefault(key, {})[each.part] = record
        else:
            row |= {name: record[name] for name in COSTS}
    for key, found in partly.items():
        if len(found) == len(PARTS[key[2]][1]):
            rows[key] |= whole_step(found) | {"projected": True}
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame(list(rows.values())).sort_values(["dataset", "tuned_layers"], kind="stable")
    ours = table[table["method"] == "foster"].set_index(["dataset", "tuned_layers"])
    for name, cost in (("memory_ratio", "step_mib"), ("time_ratio", "step_seconds")):
        table[name] = table[cost] / table.join(ours[cost].rename("ours"), on=["dataset", "tuned_layers"])["ours"]
    return table.reset_index(drop=True)


def whole_step(found: dict[int, dict[str, Any]]) -> dict[str, float]:
    """What a whole step costs, from the records of two parts.

    Memory and operations lie on the line through both. So would seconds, but few steps were timed, and a line carries
    their noise far: they are those of the larger part, times how many more operations the whole has.
    """
    larger = found[max(found)]
    costs = {name: projected({part: record[name] for part, record in found.items()}, larger["whole"]) for name in COSTS}
    return costs | {"step_seconds": larger["step_seconds"] * costs["gigaflop"] / larger["gigaflop"]}


def projected(found: dict[int, float], whole: int) -> float:
    """The line through two measurements, by the parts that they are of, at the whole."""
    (low, at_low), (high, at_high) = sorted(found.items())
    return at_low + (at_high - at_low) / (high - low) * (whole - low)


def write_efficiency(wanted: list[StepCost | Course], folder: Path) -> Path:
    """Write steps.csv, .md, .tex, and of the courses steps.png and .pdf; returns the Markdown's path."""
    table = efficiency_table(wanted)
    write_atomically(folder / "steps.csv", lambda path: table.to_csv(path, index=False, float_format="%.6g"))
    markdown, latex = ["# Table 3: what distilling costs, method by method", ""], []
    for (dataset, tuned), part in table.groupby(["dataset", "tuned_layers"], sort=False):
        title = f"{dataset}, " + ("the encoder's last layer tuned" if tuned else "frozen encoder")
        readable = pd.DataFrame([_readable(row) for row in part.to_dict("records")]).dropna(axis=1, how="all")
        markdown += [f"## {title}", "", readable.fillna("–").to_markdown(index=False, disable_numparse=True), ""]
        latex += [f"% {title}", latex_table(readable.fillna("–")).replace("†", r"$\dagger$"), ""]
    records = [record for each in wanted if (record := read_measurement(each.path))]
    hardware = sorted({f"{record['hardware']} ({record['device']})" for record in records})
    days = sorted({record["created"][:10] for record in records})
    markdown += [
        NOTES,
        "",
        f"Hardware: {'; '.join(hardware)}. Measured {' to '.join(dict.fromkeys((days[0], days[-1])))}.",
        "",
    ]
    write_text(folder / "steps.tex", "\n".join(latex))
    save_figure(course_figure(wanted), folder / "steps")
    return write_text(folder / "steps.md", "\n".join(markdown))


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    mark = " †" * row["projected"]
    shown = {"Method": get_method(row["method"]).title + mark}
    for title, name, digits in (
        ("Step s", "step_seconds", 2),
        ("times FOSTER", "time_ratio", 1),
        ("Step MiB", "step_mib", 0),
        ("memory, times FOSTER", "memory_ratio", 1),
        ("GFLOP", "gigaflop", 0),
    ):
        shown[title] = number(row[name], digits)
    if pd.isna(row.get("end")):
        return shown | dict.fromkeys(("Steps", "Distil s", "End", "Best", "s to best"))
    fewer = f" ({row['planned_steps']:.0f})" if row["steps"] < row["planned_steps"] else ""
    return shown | {
        "Steps": f"{row['steps']:.0f}{fewer}",
        "Distil s": number(row["distil_seconds"], 0),
        "End": number(row["end"], 4),
        "Best": number(row["best"], 4),
        "s to best": number(row["seconds_to_best"], 0),
    }


def course_figure(wanted: list[StepCost | Course]) -> plt.Figure:
    """Validation NDCG@10 against seconds of distilling, a panel per data set."""
    use_style()
    courses = [
        (each.run, record) for each in wanted if isinstance(each, Course) and (record := read_measurement(each.path))
    ]
    datasets = list(dict.fromkeys(run.settings.dataset for run, _ in courses))
    figure, axes = plt.subplots(
        1, max(1, len(datasets)), figsize=(4.8 * max(1, len(datasets)), 3.6), squeeze=False, layout="constrained"
    )
    forms = ("o-", "s--", "^:", "D-.", "v-", "P--", "X:")
    order = list(dict.fromkeys(run.method for run, _ in courses))
    for dataset, axis in zip(datasets, axes[0]):
        for run, record in courses:
            if run.settings.dataset == dataset:
                place = order.index(run.method)
                seconds, values = zip(*((moment["seconds"], moment["ndcg@10"]) for moment in record["course"]))
                axis.plot(seconds, values, forms[place], color=f"C{place}", ms=5, label=get_method(run.method).title)
        axis.set_xscale("log")
        axis.grid(True, axis="y")
        axis.set(xlabel="seconds of distilling", ylabel=f"NDCG@10, validation\n({dataset})")
    if datasets:
        entries, columns = axes[0, 0].get_legend_handles_labels(), min(3, 2 * len(datasets))
        figure.legend(*entries, loc="outside upper center", ncols=columns, frameon=False)
    return figure
