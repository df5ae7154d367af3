"""Studies: FOSTER with one thing changed at a time, and what the rows of Table 2 cost.

`studies.yaml` says what is changed. The runs of a study are the content-keyed runs of Table 2, so
FOSTER as the profile has it is never computed twice, and a study that was broken off goes on where it stopped.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import yaml

from foster_lib.config import SECTIONS, Profile, Settings, build
from foster_lib.errors import check_known
from foster_lib.evaluation import METRICS, paired_bootstrap
from foster_lib.execution import execute
from foster_lib.methods import METHODS, check_parameters, get_method
from foster_lib.paths import write_atomically, write_text
from foster_lib.records import read_ranks
from foster_lib.runs import Run, make_task, plan
from foster_lib.tables import _latex, _no_date, table2_folder, use_style

SPACE = Path(__file__).parent / "studies.yaml"
BASE, REFERENCES = "foster", ("full", "untrained")
HEAD, TAIL = 0.1, 0.5  # shares of the catalogue that count as popular and as rare, by interactions in training
KEYS = ["dataset", "split", "profile", "study", "sweep", "variant", "method", "value", "as_profile", "metric"]
COSTS = ["distil_seconds", "train_seconds", "total_seconds", "peak_memory_mib", "bytes"]
COLUMNS = [*KEYS, "mean", "std", "runs", "ratio_to_full", "recovered_gain", *COSTS]


@dataclass(frozen=True)
class Variant:
    """A change of the settings: `sequences`, sections of `Settings`, and `parameters` of the method.

    sweep : the axis that it belongs to, "reference" for unchanged rows; value : its label there
    """

    name: str
    method: str = BASE
    change: dict[str, Any] = field(default_factory=dict)
    sweep: str = ""
    value: str = ""


@dataclass(frozen=True)
class Study:
    """As `studies.yaml` has it; `laid_over` is a change of the profile that all variants share."""

    name: str
    spec: dict[str, Any]
    variants: list[Variant]
    laid_over: dict[str, Any]

    def runs(self, profile: Profile, datasets: list[str], seeds: list[int], split: str | None = None) -> Planned:
        """All variants with their runs."""
        planned = []
        for variant in self.variants:
            for run in plan(profile, datasets, [variant.method], seeds, split):
                settings = changed(changed(run.settings, "", self.laid_over), variant.method, variant.change)
                planned.append((variant, replace(run, settings=settings)))
        return planned


Planned = list[tuple[Variant, Run]]


def load_study(name: str, profile: Profile) -> Study:
    """Read a study; the profile `smoke` has values of its own. Unknown keys are errors."""
    space, smoke = yaml.safe_load(SPACE.read_text(encoding="utf-8")), profile.name == "smoke"
    check_known(name, space["studies"], "study")
    defaults = {"references": [], "targets": False, "run": True, "sweeps": [], "variants": [], "smoke": []}
    given, where = space["studies"][name], f"key in study '{name}':"
    _check(given, [*defaults, "title", "panels"], where)
    _check(given["panels"], space["labels"], where)
    spec = {**defaults, "labels": space["labels"], "notes": space["notes"], **given}
    rows = {*REFERENCES, BASE, *(profile.table2 if spec["references"] == "table2" else spec["references"])}
    found = [Variant(get_method(method).title, method, sweep="reference") for method in METHODS if method in rows]
    for variant in spec["variants"]:
        _check(variant, ("name", "method", "change"), where)
        found += [Variant(**variant)] if not smoke or variant["name"] in spec["smoke"] else []
    for sweep in spec["sweeps"]:
        _check(sweep, ("axis", "change", "methods", "values", "smoke"), where)
        section, _, key = sweep["change"].partition(".")
        for method, value in itertools.product(sweep["methods"], sweep["smoke" if smoke else "values"]):
            label, value = next(iter(value.items())) if isinstance(value, dict) else (str(value), value)
            title = f"{get_method(method).title}, {sweep['axis']}: {label}"
            found.append(Variant(title, method, {section: {key: value} if key else value}, sweep["axis"], label))
    for variant in found:
        _check(variant.change, ("parameters", "sequences", *SECTIONS), where)
        check_parameters(variant.method, variant.change.get("parameters", {}))
    return Study(name, spec, found, space["smoke"] if smoke else {})


def changed(settings: Settings, method: str, change: dict[str, Any]) -> Settings:
    """`settings` with `change` laid over them.

    A parameter that is set to the default it has anyway is left out, so that the key of the run stays the same.
    """
    for section, value in change.items():
        if section == "methods":
            for name, parameters in value.items():
                settings = changed(settings, name, {"parameters": parameters})
        elif section == "parameters":
            own, known = method.removesuffix("-kd"), get_method(method)
            defaults = {key: each.default for key, each in inspect.signature(known.function).parameters.items()}
            defaults |= {each.name: each.default for each in fields(known.settings)} if known.settings else {}
            before = settings.methods.get(own, {})
            kept = {key: v for key, v in value.items() if key in before or v != defaults.get(key)}
            settings = replace(settings, methods={**settings.methods, own: {**before, **kept}})
        else:
            if isinstance(value, dict):
                before = getattr(settings, section)
                value = build(type(before), {**asdict(before), **value}, f"{section} of a study")
            settings = replace(settings, **{section: value})
    return settings


def run_study(study: Study, planned: Planned, **options) -> tuple[Planned, pd.DataFrame]:
    """Run what is not finished (`options` of `execution.execute`), or leave it out if the study runs nothing;
    returns what there is, and its table.
    """
    if study.spec["run"]:
        execute({run.path: run for _, run in planned}.values(), **options)  # each once, however many variants name it
    planned = [(variant, run) for variant, run in planned if run.manifest()]
    return planned, study_table(study, planned)


def study_table(study: Study, planned: Planned) -> pd.DataFrame:
    """One row per variant and metric, `COLUMNS`: mean and standard deviation over seeds, of which each counts as the
    mean of its students. Metrics are those of the ranking, costs, and `target_figures` if the study asks for them.
    `as_profile` marks FOSTER as the profile has it; ratio and gain are those of `tables.long_table`.
    """
    manifests = {run.path: run.manifest() for _, run in planned}
    plain = [run for variant, run in planned if variant.sweep == "reference"]
    base = {run.path for run in plain if run.method == BASE}
    full = {(run.settings.dataset, run.seed): manifests[run.path] for run in plain if run.method == "full"}
    records = []
    for variant, run in planned:
        manifest, method = manifests[run.path], get_method(run.method)
        distil, train = (manifest["seconds"][stage] for stage in ("distillation", "training"))
        known = full.get((run.settings.dataset, run.seed))
        teacher = 0.0 if run.method == "full" or not method.needs_teacher else np.nan
        teacher = known["seconds"]["training"] if np.isnan(teacher) and known else teacher
        size = (
            4 * manifest["data"]["interactions"] if run.method == "full" else manifest["details"].get("bytes", np.nan)
        )
        # A further student of the same sequences found them made.
        costs = dict(zip(COSTS, (distil, train, teacher + distil + train, manifest["peak_memory_mib"], size)))
        costs |= {"distil_seconds": np.nan, "total_seconds": np.nan} if run.student else {}
        shared = {key: manifest[key] for key in ("dataset", "split", "profile", "method")} | {"seed": run.seed}
        shared |= {"study": study.name, "sweep": variant.sweep, "variant": variant.name, "value": variant.value}
        figures = manifest["test"] | costs | (target_figures(run) if study.spec["targets"] else {})
        shared |= costs | {"as_profile": run.path in base}
        records += [{**shared, "metric": metric, "figure": figure} for metric, figure in figures.items()]
    frame = pd.DataFrame(records)
    seeds = frame.groupby([*KEYS, "seed"], sort=False)["figure"].mean().groupby(KEYS, sort=False)
    table = seeds.agg(mean="mean", std="std", runs="count")
    table = table.join(frame.groupby(KEYS, sort=False)[COSTS].mean()).reset_index()
    group = ["dataset", "metric"]
    for method in REFERENCES:
        rows = table["metric"].isin(METRICS) & (table["sweep"] == "reference") & (table["method"] == method)
        table = table.join(table[rows].set_index(group)["mean"].rename(method), on=group)
    table["ratio_to_full"] = table["mean"] / table["full"]
    table["recovered_gain"] = (table["mean"] - table["untrained"]) / (table["full"] - table["untrained"])
    return table[COLUMNS]


def target_figures(run: Run) -> dict[str, float]:
    """Of what the targets of a run's sequences are made: number of distinct most probable items, and shares of the
    probability mass on the popular `HEAD` and the rare `TAIL` of the catalogue; shares only of full data's next items.
    """
    method = get_method(run.method)
    if not method.condenses and run.method != "full":
        return {}
    task, figures = make_task(run), {}
    mass = np.bincount(np.concatenate([sequence[1:] for sequence in task.train]), minlength=task.n_items)
    order = np.argsort(-np.bincount(np.concatenate(task.train), minlength=task.n_items), kind="stable")
    if method.condenses:
        stored = method.form.load(run.distilled_path)
        y = stored.target_probabilities(task.embeddings.cpu())[stored.mask]
        mass, figures["coverage"] = y.double().sum(0).numpy(), len(y.argmax(-1).unique())
    share, head, tail = mass[order] / mass.sum(), round(HEAD * task.n_items), round(TAIL * task.n_items)
    return figures | {"head_share": float(share[:head].sum()), "tail_share": float(share[-tail:].sum())}


def study_folder(name: str, profile: str, split: str = "") -> Path:
    """`results/<name>`, with the additions that Table 2 has for the smoke profile and other splits."""
    beside = table2_folder(profile, split)
    return beside.with_name(beside.name.replace("table2", name))


def write_study(study: Study, planned: Planned, table: pd.DataFrame, folder: Path) -> Path:
    """Write <study>.csv, .md, .tex, .png and .pdf; returns the Markdown's path."""
    write_atomically(folder / f"{study.name}.csv", lambda path: table.to_csv(path, index=False, float_format="%.6g"))
    markdown, latex = [f"# {study.spec['title']}", ""], []
    for keys, part in table.groupby(KEYS[:3], sort=False):
        title = "{}, {}, profile {}".format(*keys)
        readable = readable_table(study, [pair for pair in planned if pair[1].settings.dataset == keys[0]], part)
        markdown += [f"## {title}", "", readable.to_markdown(index=False, disable_numparse=True), ""]
        latex += [f"% {title}", _latex(readable).replace("†", r"$\dagger$"), ""]
    hardware = sorted({f"{m['hardware']} ({m['device']})" for _, run in planned if (m := run.manifest())})
    write_text(folder / f"{study.name}.tex", "\n".join(latex))
    figure = study_figure(study, table)
    for suffix in ("png", "pdf"):
        save = functools.partial(figure.savefig, dpi=160, metadata=_no_date(suffix))
        write_atomically(folder / f"{study.name}.{suffix}", save)
    plt.close(figure)
    markdown += [study.spec["notes"], "", f"Hardware: {'; '.join(hardware)}.", ""]
    return write_text(folder / f"{study.name}.md", "\n".join(markdown))


def readable_table(study: Study, planned: Planned, part: pd.DataFrame) -> pd.DataFrame:
    """The table of one data set as people read it: a row per variant, formatted text."""
    ranks: dict[str, list[np.ndarray]] = {}
    for variant, run in planned if study.spec["run"] else []:
        ranks.setdefault(variant.name, []).append(read_ranks(run.path).per_user("ndcg@10"))
    rows = []
    for (name, as_profile), own in part.groupby(["variant", "as_profile"], sort=False):
        row, own = {"Row": name + " †" * as_profile}, own.set_index("metric")
        for metric in dict.fromkeys(["ndcg@10", "recall@10", *study.spec["panels"]]):
            if metric not in COSTS:
                cell = own.reindex([metric]).iloc[0]
                row[study.spec["labels"][metric]] = _number(cell["mean"], 0 if metric == "coverage" else 4, cell["std"])
        first = own.loc["ndcg@10"]
        row |= {"NDCG@10 / full": _number(first["ratio_to_full"], 3), "gain": _number(first["recovered_gain"], 2)}
        if ranks:
            test = paired_bootstrap(*(np.mean(ranks[of], axis=0) for of in (get_method(BASE).title, name)))
            interval = f"{test['difference']:+.4f} [{test['low']:+.4f}, {test['high']:+.4f}]"
            row["FOSTER minus it, 95 %"] = "" if as_profile else interval + "*" * (test["low"] > 0 or test["high"] < 0)
        costs = zip(("Distil s", "Train s", "Total s", "MiB", "KiB"), first[COSTS] / (1, 1, 1, 1, 1024))
        rows.append(row | {title: _number(value, 0) for title, value in costs})
    return pd.DataFrame(rows)


def study_figure(study: Study, table: pd.DataFrame) -> plt.Figure:
    """A row per data set and a column per panel: curves over the values of each sweep, or a dot per variant."""
    use_style()
    sweeps = [sweep for sweep in table["sweep"].unique() if sweep not in ("", "reference")]
    columns, datasets = list(itertools.product(study.spec["panels"], sweeps or [""])), list(table["dataset"].unique())
    size = (3.4 * len(columns), 3.2) if sweeps else (2.4 + 2.8 * len(columns), 0.8 + 0.25 * table["variant"].nunique())
    options = {"squeeze": False, "layout": "constrained", "sharey": False if sweeps else "row"}
    figure, axes = plt.subplots(len(datasets), len(columns), figsize=(size[0], size[1] * len(datasets)), **options)
    for (row, dataset), (column, (panel, sweep)) in itertools.product(enumerate(datasets), enumerate(columns)):
        axis, part = axes[row, column], table[(table["dataset"] == dataset) & (table["metric"] == panel)]
        (_curves if sweep else _dots)(axis, part, sweep)
        (axis.set_ylabel if sweep else axis.set_xlabel)(f"{study.spec['labels'][panel]}\n({dataset})")
    if sweeps:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def _curves(axis: plt.Axes, part: pd.DataFrame, sweep: str) -> None:
    own = part[part["sweep"] == sweep]
    labels = list(own["value"].unique())  # equal steps on the axis: values are far apart, and some are words
    for (method, line), form in zip(own.groupby("method", sort=False), ("C0o-", "C1s--", "C2^:", "C3D-.")):
        place = [labels.index(value) for value in line["value"]]
        axis.errorbar(place, line["mean"], line["std"].fillna(0), fmt=form, capsize=3, label=get_method(method).title)
        ringed = [labels.index(value) for value in line.loc[line["as_profile"], "value"]]
        axis.plot(ringed, line.loc[line["as_profile"], "mean"], "o", mfc="none", mec="0.15", ms=13)
    for method, style, shade in (("full", (0, (6, 2)), "0.15"), ("kd", ":", "0.45")):
        line = part[(part["sweep"] == "reference") & (part["method"] == method) & ~own["method"].eq(method).any()]
        line = line[~line["metric"].isin(COSTS) | (method != "full")]  # full data has nothing to distil
        for value in line["mean"]:
            axis.axhline(value, ls=style, color=shade, lw=1.3, label=get_method(method).title)
    axis.set_xticks(range(len(labels)), labels)
    axis.grid(True, axis="y")
    axis.set_xlabel(sweep)


def _dots(axis: plt.Axes, part: pd.DataFrame, _: str) -> None:
    metric = part["metric"].iloc[0]
    part = part.assign(place=np.arange(len(part))[::-1])
    if metric in COSTS:
        part["mean"] = part["mean"].clip(lower=0.01)  # what takes no time, on a logarithmic axis
    for as_profile, look in ((False, {"fmt": "o", "color": "C0"}), (True, {"fmt": "D", "color": "C1", "ms": 7})):
        own = part[part["as_profile"] == as_profile]
        axis.errorbar(own["mean"], own["place"], xerr=own["std"].fillna(0), capsize=3, **look)
    axis.set_yticks(part["place"], part["variant"])
    axis.grid(True, axis="y", alpha=0.4)
    axis.margins(0.08)
    if metric in COSTS and metric != "peak_memory_mib":
        axis.set_xscale("log")


def _number(value: float, digits: int, spread: float = np.nan) -> str:
    both = [f"{each:.{digits}f}" for each in (value, spread) if not pd.isna(each)]
    return " ± ".join(both) or "–"


def _check(given: Any, valid: Any, what: str) -> None:
    for key in given:
        check_known(key, valid, what)
