"""Do the published figures still follow from this code? `python -m foster_lib.verify`

FOSTER's rows are made again from the committed synthetic sequences: a fresh student is trained on
them and evaluated. Of full-data training, which takes longer, the first seed is made again from
the data. Every metric is compared with the table in `results/`, within a tolerance taken from the
spread of the seeds. Rows whose manifests do not belong to this code and these settings are stale,
which counts as not held.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from foster_lib.config import load_profile
from foster_lib.errors import FosterError, check_known, complain
from foster_lib.evaluation import METRICS, rank_queries, recommender_scorer
from foster_lib.execution import Call, parallel, resolve_device
from foster_lib.methods import METHODS, get_method
from foster_lib.paths import shown
from foster_lib.recipes import train_full, train_student
from foster_lib.runs import Run, load_catalogue, load_once, make_task, plan
from foster_lib.splits import make_split
from foster_lib.tables import long_table, table2_folder

REMADE = ("full", "foster")
SPREADS, LEAST = 2.0, 0.001
"""The tolerance is this many standard deviations of the seeds, and no less than `LEAST`."""


@dataclass(frozen=True)
class Claim:
    """One comparison: what, the published figure, the figure found, and how far apart they may be."""

    what: str
    published: float
    found: float
    tolerance: float

    @property
    def held(self) -> bool:
        return abs(self.found - self.published) <= self.tolerance

    def line(self) -> str:
        verdict = "held    " if self.held else "NOT HELD"
        return f"{verdict}  {self.what}: found {self.found:.4f}, published {self.published:.4f} ± {self.tolerance:.4f}"


def verify(dataset: str, jobs: int, device: str, profile: str = "cpu") -> Iterator[str | Claim]:
    """Claims about one data set's rows of Table 2 of a profile; a text instead where a row is stale.

    Raises
    ------
    FosterError
        If the data set has no published table.
    """
    loaded, table = load_profile(profile), published(dataset, profile)
    names = table.index.unique("method")
    for method in names.difference(list(METHODS)):
        yield f"STALE     {dataset}, {method}: no method of this code has that name"
    rows = [method for method in METHODS if method in names]
    runs = {
        method: plan(loaded, [dataset], [method], loaded.seeds[: int(table.loc[method, "runs"].iloc[0])])
        for method in rows
    }
    stale = [method for method in rows if any(run.manifest() is None for run in runs[method])]
    for method in stale:
        yield f"STALE     {dataset}, {get_method(method).title}: made by another version of the code or the settings"
    for method in rows:
        if method not in stale:
            yield from _table_claims(dataset, method, table, runs[method])
    fresh = [method for method in REMADE if method in rows and method not in stale]
    again = {method: runs[method][:1] if method == "full" else runs[method] for method in fresh}
    found = remake([run for method in fresh for run in again[method]], jobs, device)
    for method in fresh:
        spread = table.loc[method, "std"]
        for metric in METRICS:
            before = np.mean([run.manifest()["test"][metric] for run in again[method]])
            after = np.mean([found[run.path.name][metric] for run in again[method]])
            tolerance = max(LEAST, SPREADS * float(np.nan_to_num(spread.get(metric, 0.0))))
            seeds = "seed 0" if method == "full" else f"{len(again[method])} students"
            yield Claim(
                f"{dataset}, {get_method(method).title} made again ({seeds}), {metric}", before, after, tolerance
            )


def published(dataset: str, profile: str) -> pd.DataFrame:
    """Rows of the committed table, by method and metric."""
    path = table2_folder(profile) / "table2.csv"
    try:
        table = pd.read_csv(path, usecols=["dataset", "profile", "method", "metric", "mean", "std", "runs"])
    except (OSError, ValueError) as error:
        raise FosterError(
            f"{path}: no readable table. Make it with `make reproduce-table2 PROFILE={profile}`."
        ) from error
    own = table[table["profile"] == profile]
    check_known(dataset, own["dataset"].unique(), f"data set of profile '{profile}' in {shown(path)}:")
    return own[own["dataset"] == dataset].set_index(["method", "metric"]).sort_index()


def remake(runs: list[Run], jobs: int, device: str) -> dict[str, dict[str, float]]:
    """Test metrics of runs that are computed anew, by the name of their manifest."""
    if runs:
        load_catalogue(runs[0].settings.dataset, runs[0].settings.encoder, device)
    lines: list[str] = []
    parallel([Call(_again, run) for run in runs], jobs=jobs, device=device, label="verifying", say=lines.append)
    return dict(json.loads(line) for line in lines)


def _again(run: Run, device: str, progress: bool) -> str:
    task, settings = make_task(run, device), run.settings
    label = f"{settings.dataset} {run.method} seed {run.seed}" if progress else ""
    if run.method == "full":
        with tempfile.TemporaryDirectory() as folder:
            model, _ = train_full(task, settings.full, run.seed, Path(folder) / "trajectory", label)
    else:
        stored = get_method(run.method).form.load(run.distilled_path)
        model, _ = train_student(task, stored, settings, run.student_seed, label)
    test = make_split(load_once(settings.dataset), settings.split).test
    return json.dumps([run.path.name, rank_queries(recommender_scorer(model), test, task.n_items).metrics()])


def _table_claims(dataset: str, method: str, table: pd.DataFrame, runs: list[Run]) -> Iterator[Claim]:
    """The table's figures are those of the manifests; only what differs is worth a line, and one for all that agree."""
    what = f"{dataset}, {get_method(method).title}, table against manifests"
    own, found = table.loc[method], long_table([run.manifest() for run in runs]).set_index("metric")
    # A spread is empty where there is one run; a missing line of the table is NaN, which is never held.
    own, found = (frame.reindex(METRICS)[["mean", "std"]].fillna({"std": 0.0}) for frame in (own, found))
    claims = [
        Claim(f"{what}, {column} of {metric}", own.loc[metric, column], found.loc[metric, column], 1e-5)
        for column in own
        for metric in METRICS
    ]
    yield from [claim for claim in claims if not claim.held] or [
        claim for claim in claims if claim.what.endswith("mean of ndcg@10")
    ]


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns 0 if all claims are held, 1 if not, 2 for an error."""
    parser = argparse.ArgumentParser(prog="python -m foster_lib.verify", description=__doc__.split("\n\n")[0])
    parser.add_argument("--datasets", default="ml-100k", help="names separated by spaces")
    parser.add_argument("--profile", default="cpu", help="whose settings and table; default: cpu, the published one")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    options = parser.parse_args(arguments)
    bad = total = 0
    try:
        for dataset in options.datasets.split():
            for claim in verify(dataset, options.jobs, resolve_device(options.device), options.profile):
                print(claim.line() if isinstance(claim, Claim) else claim, flush=True)
                total += 1
                bad += not (isinstance(claim, Claim) and claim.held)
    except FosterError as error:
        return complain(error)
    print(f"{total - bad} of {total} held" + ("" if not bad else f", {bad} not"))
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
