"""Studies: FOSTER with one thing changed at a time, and what the rows of Table 2 cost.

`studies.yaml` says what is changed. The runs of a study are the content-keyed runs of Table 2, so
FOSTER as the profile has it is never computed twice, and a study that was broken off goes on where it stopped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from foster_lib.collapse import collapse_figures
from foster_lib.config import BUDGET, SECTIONS, Profile, Settings, build
from foster_lib.errors import FosterError, check_known
from foster_lib.evaluation import METRICS
from foster_lib.execution import execute
from foster_lib.methods import METHODS, base_name, check_parameters, defaults, get_method, row_name
from foster_lib.paths import write_atomically, write_text
from foster_lib.runs import Run, plan
from foster_lib.study_tables import BASE, COSTS, STALE, readable_table, save_figure, study_figure
from foster_lib.tables import latex_table, table2_folder

SPACE = Path(__file__).parent / "studies.yaml"
REFERENCES = ("full", "untrained")
KEYS = ["dataset", "split", "profile", "study", "sweep", "variant", "method", "value", "as_profile", "metric"]
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
    """As `studies.yaml` has it; `laid_over` is a change of the profile that all rows share, the references too."""

    name: str
    spec: dict[str, Any]
    variants: list[Variant]
    laid_over: dict[str, Any]

    def runs(
        self, profile: Profile, datasets: list[str], seeds: list[int], split: str | None = None, methods: str = ""
    ) -> Planned:
        """All variants with their runs; those that are no references only of `chosen_methods`."""
        planned, wanted = [], chosen_methods(methods, (v.method for v in self.variants if v.sweep != "reference"))
        for variant in self.variants:
            if variant.sweep != "reference" and variant.method not in wanted:
                continue
            for dataset in datasets:
                if variant.method == "teachers" and profile.settings(dataset).teachers == 1:
                    continue
                if variant.sweep != "reference" and variant.name not in self.rows(dataset):
                    continue
                for run in plan(profile, [dataset], [variant.method], seeds, split):
                    settings = changed(changed(run.settings, "", self.laid_over), variant.method, variant.change)
                    planned.append((variant, replace(run, settings=settings)))
        return planned

    def rows(self, dataset: str) -> list[str]:
        """The names of its variants on that data set; references are not among them."""
        return self.spec["rows"].get(dataset) or [v.name for v in self.variants if v.sweep != "reference"]


Planned = list[tuple[Variant, Run]]


def load_study(name: str, profile: Profile, sequences: int = 0) -> Study:
    """Read a study; the profile `smoke` has values of its own. Unknown keys are errors.

    sequences : in the place of those that the study, or the profile, has for all its rows; 0: these
    """
    space, smoke = yaml.safe_load(SPACE.read_text(encoding="utf-8")), profile.name == "smoke"
    check_known(name, space["studies"], "study")
    blank = {name: [] for name in ("references", "columns", "sweeps", "variants", "smoke")}
    blank |= {"collapse": False, "run": True, "settings": {}, "note": "", "rows": {}}
    given, where = space["studies"][name], f"key in study '{name}':"
    _check(given, [*blank, "title", "panels"], where)
    _check([*given["panels"], *given.get("columns", [])], space["labels"], where)
    spec = {**blank, "labels": space["labels"], "notes": space["notes"], **given}
    rows = {*REFERENCES, BASE, *spec["references"]}
    found = [
        Variant(get_method(method).title, method, sweep="reference")
        for method in METHODS
        if method in rows or spec["references"] == "table2"
    ]
    for variant in spec["variants"]:
        _check(variant, ("name", "method", "change", "part"), where)
        fields = {key: value for key, value in variant.items() if key != "part"}
        found += [Variant(**fields)] if not smoke or variant["name"] in spec["smoke"] else []
    for sweep in spec["sweeps"]:
        _check(sweep, ("axis", "change", "methods", "values", "smoke"), where)
        section, _, key = sweep["change"].partition(".")
        for method, value in itertools.product(sweep["methods"], sweep["smoke" if smoke else "values"]):
            label, value = next(iter(value.items())) if isinstance(value, dict) else (str(value), value)
            title = f"{get_method(method).title}, {sweep['axis']}: {label}"
            found.append(Variant(title, method, {section: {key: value} if key else value}, sweep["axis"], label))
    for dataset, rows in spec["rows"].items():
        _check(rows, [variant["name"] for variant in spec["variants"]], f"row of study '{name}' on {dataset}:")
    changes = ("sequences", *BUDGET[2:], *SECTIONS)
    _check(spec["settings"], changes, where)
    for variant in found:
        _check(variant.change, ("parameters", *changes), where)
        check_parameters(variant.method, variant.change.get("parameters", {}))
    if smoke:
        spec["note"] = ""  # it tells of settings, of which that profile has its own
    asked = {"sequences": sequences} if sequences else {}
    spec["title"] = spec["title"].format(**{**spec["settings"], **asked})
    return Study(name, spec, found, {**spec["settings"], **(space["smoke"] if smoke else {}), **asked})


def smoke_settings(settings: Settings, profile: Profile) -> Settings:
    """`settings`, in the profile `smoke` as small as all studies have them there."""
    small = yaml.safe_load(SPACE.read_text(encoding="utf-8"))["smoke"] if profile.name == "smoke" else {}
    return changed(settings, "", small)


def chosen_seeds(seeds: str | int, profile: Profile) -> list[int]:
    """The seeds of a notebook's parameter, numbers separated by spaces; empty: the profile's."""
    try:
        return list(dict.fromkeys(int(seed) for seed in str(seeds).split())) or profile.seeds
    except ValueError:
        raise FosterError(f"seeds are whole numbers separated by spaces, not '{seeds}'.") from None


def chosen_methods(methods: str, known: Iterable[str]) -> list[str]:
    """Those of a notebook's parameter that are among `known`; empty or all: all of `known`.

    A notebook that comes with others, and shows few rows of Table 2, ignores the other names; where none of its own
    is named it shows all. A name that no row has is an error.
    """
    known, named = list(dict.fromkeys(known)), [row_name(method) for method in methods.split()]
    for method in named:
        if method != "all":
            get_method(method)
    return [method for method in known if method in named] or known


def changed(settings: Settings, method: str, change: dict[str, Any]) -> Settings:
    """`settings` with `change` laid over them.

    A parameter that is set to the default it has anyway is left out, so that the key of the run stays the same; one
    that is null is as the method has it, whatever the profile says.
    """
    for section, value in change.items():
        if section == "methods":
            for name, parameters in value.items():
                settings = changed(settings, name, {"parameters": parameters})
        elif section == "parameters":
            own, known = base_name(method), defaults(method)
            before = settings.methods.get(own, {})
            kept = {key: v for key, v in value.items() if key in before or v != known.get(key)}
            merged = {key: v for key, v in {**before, **kept}.items() if v is not None}
            settings = replace(settings, methods={**settings.methods, own: merged})
        else:
            if isinstance(value, dict):
                before = getattr(settings, section)
                value = build(type(before), {**asdict(before), **value}, f"{section} of a study")
            if section == "model":  # a synthetic sequence keeps its number of windows
                windows = settings.sequence_length // settings.model.length
                settings = replace(settings, sequence_length=windows * value.length)
                if settings.order == "cut":  # as many cuts as there can be
                    settings = replace(settings, readings=math.gcd(settings.readings, value.length))
            settings = replace(settings, **{section: value})
    return settings


def run_study(study: Study, planned: Planned, **options) -> tuple[Planned, pd.DataFrame]:
    """Run what is not finished (`options` of `execution.execute`), or leave it out if the study runs nothing;
    returns what there is, and its table.
    """
    if study.spec["run"]:
        distinct = {run.path: run for _, run in planned}.values()  # each once, however many variants name it
        execute(distinct, sequences=study.spec["collapse"], **options)
    planned = [(variant, run) for variant, run in planned if run.manifest() or run.stale()]
    return planned, study_table(study, planned)


def study_table(study: Study, planned: Planned) -> pd.DataFrame:
    """One row per variant and metric, `COLUMNS`: mean and standard deviation over seeds, of which each counts as the
    mean of its students. Metrics are those of the ranking, costs, and `collapse_figures` if the study asks for them.
    Runs that only another version of the code has made are marked `STALE`. `as_profile` marks FOSTER as the profile has
    it; ratio and gain are those of `tables.long_table`.
    """
    manifests = {run.path: run.manifest() or run.stale() for _, run in planned}
    plain = [run for variant, run in planned if variant.sweep == "reference"]
    base = {run.path for run in plain if run.method == BASE}
    full = {(run.settings.dataset, run.seed): manifests[run.path] for run in plain if run.method == "full"}
    records = []
    for variant, run in planned:
        manifest, method = manifests[run.path], get_method(run.method)
        distil, train = (manifest["seconds"][stage] for stage in ("distillation", "training"))
        teacher = 0.0 if run.method == "full" else teacher_seconds(run, full)
        size = (
            4 * manifest["data"]["interactions"] if run.method == "full" else manifest["details"].get("bytes", np.nan)
        )
        if run.student:  # it found the sequences made: what they took stands in the first one's manifest
            first = manifests.get(run.first.path)
            distil = first["seconds"]["distillation"] if first else np.nan
        costs = dict(zip(COSTS, (distil, train, teacher + distil + train, manifest["peak_memory_mib"], size)))
        shared = {key: manifest[key] for key in ("dataset", "split", "profile", "method")} | {"seed": run.seed}
        shared |= {"study": study.name, "sweep": variant.sweep, "value": variant.value}
        shared["variant"] = variant.name + STALE * (manifest["code"] != run.code)
        figures = manifest["test"] | costs | (collapse_figures(run) if study.spec["collapse"] else {})
        figures["kl_to_teacher"] = manifest["details"].get("kl_to_teacher", np.nan)
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


def teacher_seconds(run: Run, full: dict[tuple[str, int], dict[str, Any]]) -> float:
    """What the training of the full-data models took that `run` reads; NaN if the manifest of none is in `full`."""
    found = [full.get((run.settings.dataset, teacher.seed)) for teacher in run.teachers]
    known = [manifest["seconds"]["training"] for manifest in found if manifest]
    if not found:
        return 0.0
    return len(found) * float(np.mean(known)) if known else np.nan


def study_folder(name: str, profile: str, split: str = "") -> Path:
    """`results/<name>`, with the additions that Table 2 has for the profiles quick and smoke and for other splits."""
    beside = table2_folder(profile, split)
    return beside.with_name(beside.name.replace("table2", name))


def write_study(study: Study, planned: Planned, table: pd.DataFrame, folder: Path) -> Path:
    """Write <study>.csv, .md, .tex, .png and .pdf; returns the Markdown's path.

    Of the notes in `studies.yaml` those are kept whose word stands in the head of a column.
    """
    write_atomically(folder / f"{study.name}.csv", lambda path: table.to_csv(path, index=False, float_format="%.6g"))
    markdown, latex, head = [f"# {study.spec['title']}", ""], [], ""
    for keys, part in table.groupby(KEYS[:3], sort=False):
        title = "{}, {}, profile {}".format(*keys)
        runs = [(variant.name, run) for variant, run in planned if run.settings.dataset == keys[0]]
        readable = readable_table(study.spec, part, runs if study.spec["run"] else [])
        head = " | ".join(readable.columns)
        markdown += [f"## {title}", "", readable.to_markdown(index=False, disable_numparse=True), ""]
        latex += [f"% {title}", latex_table(readable).replace("†", r"$\dagger$"), ""]
    hardware = sorted({f"{m['hardware']} ({m['device']})" for _, run in planned if (m := run.manifest())})
    write_text(folder / f"{study.name}.tex", "\n".join(latex))
    save_figure(study_figure(study.spec, table), folder / study.name)
    notes = " ".join(note for word, note in study.spec["notes"].items() if word in head)
    if table["variant"].str.endswith(STALE).any():
        notes = f"*{STALE.strip(' ()')}*: made by another version of the code. {notes}"
    notes = f"{study.spec['note']} {notes}".strip()
    markdown += [notes, "", f"Hardware: {'; '.join(hardware)}.", ""]
    return write_text(folder / f"{study.name}.md", "\n".join(markdown))


def _check(given: Any, valid: Any, what: str) -> None:
    for key in given:
        check_known(key, valid, what)
