"""Searches on validation: `python -m foster_lib.tune`, of the full-data reference and of the methods.

`search.yaml` holds the trials of each data set. A trial is one full-data training, or one method's
sequences and the students that are trained on them. It leaves one JSON below
`results/tuning/<data set>/`; the sorted table is `results/tuning/<data set>-<method>.csv`. The test
set is not read. Where users have many interactions, several validation targets each are held out
(`targets`): one target of 943 users gives NDCG@10 a standard error of 0.007, more than settings
differ by. The best trial's settings are then written by hand into `profiles/cpu.yaml`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from foster_lib.config import Profile, load_profile
from foster_lib.errors import FosterError, check_known, complain
from foster_lib.evaluation import rank_queries
from foster_lib.execution import Call, parallel, resolve_device
from foster_lib.methods import base_name, get_method
from foster_lib.paths import cache_dir, results_dir, write_atomically, write_text
from foster_lib.recipes import train_full, train_student
from foster_lib.records import environment
from foster_lib.runs import Run, apply_method, load_catalogue, load_once, make_task
from foster_lib.splits import wide_validation
from foster_lib.task import Task

SPACE = Path(__file__).parent / "search.yaml"
FULL = ("learning_rate", "muon_rate", "weight_decay", "batch_size", "subset", "epochs", "mixed_precision")
"""Of the full-data training, what the table of its trials shows."""

STUDENTS = 2
"""Students per trial of a method; their seeds differ by about as much as settings do."""


@dataclass(frozen=True)
class Trial:
    """What a trial changes in the profile `cpu`, and the run that it stands for."""

    change: dict[str, Any]
    targets: int
    run: Run

    @property
    def path(self) -> Path:
        name = f"{self.run.method}-{self.run.key}-{self.targets}.json"
        return results_dir() / "tuning" / self.run.settings.dataset / name

    @property
    def trajectory(self) -> Path:
        """Full-data training on what this trial may learn from; a method's teacher and checkpoints."""
        return cache_dir() / "trajectories" / f"{replace(self.run, method='full').key}-{self.targets}"

    def task(self, device: str) -> Task:
        split = wide_validation(load_once(self.run.settings.dataset), self.targets)
        return replace(
            make_task(self.run, device),
            train=split.train,
            train_timestamps=split.train_timestamps,
            validation=split.validation,
            trajectory_folder=self.trajectory,
        )


def trials(dataset: str, method: str) -> list[Trial]:
    """All trials of `search.yaml` for a data set and a method (`full`: the reference)."""
    space = yaml.safe_load(SPACE.read_text(encoding="utf-8"))
    check_known(dataset, space, "data set in search.yaml:")
    check_known(method, ["full", *space[dataset].get("methods", {})], f"method of {dataset} in search.yaml:")
    base = load_profile("cpu")
    changes = space[dataset]["trials"] if method == "full" else space[dataset]["methods"][method]
    found = []
    for change in changes:
        own = change if method == "full" else {"methods": {base_name(method): change}}
        before = base.raw.get("per_dataset", {}).get(dataset, {}) if method != "full" else {}
        raw = {**base.raw, "per_dataset": {dataset: {**before, **own}}}
        profile = Profile("cpu", base.datasets, base.seeds, base.split, base.table2, raw)
        settings = replace(profile.settings(dataset), teachers=1)  # one serves the search
        found.append(Trial(change, space[dataset]["targets"], Run(settings, method, 0)))
    return found


def search(dataset: str, method: str, jobs: int, device: str) -> pd.DataFrame:
    """Run all trials that are not finished; the table of all of them, best first."""
    space = trials(dataset, method)
    pending = [trial for trial in space if _recorded(trial) is None]
    for trial in pending[:1]:
        load_catalogue(dataset, trial.run.settings.encoder, device)  # embed once, before fanning out
    teacher: tuple[Call, ...] = ()
    needs_teacher = method != "full" and get_method(method).needs_teacher
    if needs_teacher and pending and not pending[0].trajectory.is_dir():
        teacher = (Call(_train_teacher, pending[0]),)
    calls = [Call(_try_full if method == "full" else _try_method, trial, after=teacher) for trial in pending]
    parallel([*teacher, *calls], jobs=jobs, device=device, label=f"tuning {method} on {dataset}")
    table = pd.json_normalize([_recorded(trial) for trial in space])
    table = table[[column for column in table if not column.startswith(("packages", "git", "python", "created"))]]
    table = table.sort_values("validation_ndcg@10", ascending=False, kind="stable")
    path = results_dir() / "tuning" / f"{dataset}-{method}.csv"
    write_atomically(path, lambda temporary: table.to_csv(temporary, index=False))
    return table


def _try_full(trial: Trial, device: str, progress: bool) -> str:
    """Train on everything."""
    settings = trial.run.settings
    label = f"{settings.dataset} {trial.change}"
    task = trial.task(device)
    _, log = train_full(task, settings.full, trial.run.seed, trial.trajectory, label if progress else "")
    figures = {
        **{name: getattr(settings.model, name) for name in ("width", "adapter_hidden", "length", "dropout")},
        **{name: getattr(settings.full, name) for name in FULL},
        "kept_epoch": log.best_epoch,
        "validation_ndcg@10": round(log.validation[log.best_epoch], 5),
        "seconds": round(log.seconds),
    }
    return _record(trial, figures, device)


def _train_teacher(trial: Trial, device: str, progress: bool) -> str:
    """The full-data training that a method's trials share."""
    label = f"{trial.run.settings.dataset}, teacher of the search"
    train_full(trial.task(device), trial.run.settings.full, 0, trial.trajectory, label if progress else "")
    return f"{label}: trained"


def _try_method(trial: Trial, device: str, progress: bool) -> str:
    """Make a method's sequences and train students on them."""
    run, task = trial.run, trial.task(device)
    outcome, distillation = apply_method(run, task)
    seconds = {"distillation": round(distillation)}
    if get_method(run.method).condenses:
        seeds = [replace(run, student=number).student_seed for number in range(STUDENTS)]
        logs = [train_student(task, outcome.stored(), run.settings, seed)[1] for seed in seeds]
        values = [log.validation[log.best_epoch] for log in logs]
        seconds["training"] = round(sum(log.seconds for log in logs))
    else:
        values = [_validated(task, outcome)]
    figures = {
        "change": json.dumps(trial.change),
        "validation_ndcg@10": round(float(np.mean(values)), 5),
        "values": [round(value, 5) for value in values],
        "seconds": seconds,
    }
    return _record(trial, figures, device)


def _validated(task: Task, score: Callable) -> float:
    return rank_queries(score, task.validation, task.n_items).metrics()["ndcg@10"]


def _record(trial: Trial, figures: dict[str, Any], device: str) -> str:
    result = {"method": trial.run.method, "targets": trial.targets, **figures, **environment(device)}
    write_text(trial.path, json.dumps(result, indent=1) + "\n")
    what = f"{trial.run.settings.dataset} {trial.run.method} {trial.change}"
    return f"{what}: validation NDCG@10 {figures['validation_ndcg@10']:.4f}"


def _recorded(trial: Trial) -> dict[str, Any] | None:
    """What a finished trial has recorded; None if there is nothing, or it is damaged."""
    try:
        result = json.loads(trial.path.read_text(encoding="utf-8"))
        return result if "validation_ndcg@10" in result else None
    except (OSError, ValueError, TypeError):
        return None


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m foster_lib.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--datasets", default="ml-100k", help="names separated by spaces")
    parser.add_argument("--methods", default="full", help="names separated by spaces; full: the full-data reference")
    parser.add_argument("--jobs", type=int, default=2, help="trials side by side")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    options = parser.parse_args(arguments)
    try:
        for dataset in options.datasets.split():
            for method in options.methods.split():
                print(search(dataset, method, options.jobs, resolve_device(options.device)).to_string(index=False))
    except FosterError as error:
        return complain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
