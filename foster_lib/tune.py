"""Search of the full-data reference on validation: `python -m foster_lib.tune`.

Writes one JSON per finished trial below `results/tuning/<data set>/` and the sorted table
`results/tuning/<data set>.csv`. The test set is not read. The best trial's settings are then
written by hand into `profiles/cpu.yaml`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from foster_lib.config import Profile, load_profile
from foster_lib.errors import FosterError, check_known
from foster_lib.execution import parallel, resolve_device
from foster_lib.paths import results_dir, write_atomically, write_text
from foster_lib.recipes import train_full
from foster_lib.records import environment
from foster_lib.runs import Run, make_task, trajectory_folder

SPACE = Path(__file__).parent / "search.yaml"


def trials(dataset: str) -> list[tuple[dict[str, Any], Run]]:
    """The changes of each trial of `search.yaml`, with the run they make."""
    space = yaml.safe_load(SPACE.read_text(encoding="utf-8"))
    check_known(dataset, space, "data set in search.yaml:")
    base = load_profile("cpu")
    found = []
    for change in space[dataset]:
        raw = {**base.raw, "per_dataset": {dataset: change}}
        profile = Profile("cpu", base.datasets, base.seeds, base.split, base.table2, raw)
        found.append((change, Run(profile.settings(dataset), "full", 0)))
    return found


def search(dataset: str, jobs: int, device: str) -> pd.DataFrame:
    """Run all trials that are not finished; the table of all of them, best first."""
    space = trials(dataset)
    pending = [(change, run) for change, run in space if not trial_path(run).is_file()]
    parallel(_run_trial, pending, jobs=jobs, device=device, label=f"tuning {dataset}")
    rows = [json.loads(trial_path(run).read_text(encoding="utf-8")) for _, run in space]
    columns = [
        "width",
        "dropout",
        "learning_rate",
        "weight_decay",
        "batch_size",
        "kept_epoch",
        "validation_ndcg@10",
        "seconds",
    ]
    table = pd.DataFrame(rows)[[*columns, "hardware"]].sort_values("validation_ndcg@10", ascending=False, kind="stable")
    write_atomically(results_dir() / "tuning" / f"{dataset}.csv", lambda path: table.to_csv(path, index=False))
    return table


def trial_path(run: Run) -> Path:
    return results_dir() / "tuning" / run.settings.dataset / f"{run.key}.json"


def _run_trial(trial: tuple[dict, Run], device: str, progress: bool) -> str:
    change, run = trial
    settings = run.settings
    label = f"{settings.dataset} {change}"
    folder = trajectory_folder(run)
    if not folder.is_dir():
        train_full(make_task(run, device), settings.full, run.seed, folder, label if progress else "")
    log = json.loads((folder / "log.json").read_text(encoding="utf-8"))
    figure = max(log["validation_curve"].values())
    result = {
        "width": settings.model.width,
        "dropout": settings.model.dropout,
        "learning_rate": settings.full.learning_rate,
        "weight_decay": settings.full.weight_decay,
        "batch_size": settings.full.batch_size,
        "kept_epoch": log["kept_epoch"],
        "validation_ndcg@10": round(figure, 5),
        "seconds": round(log["seconds"]),
        **environment(device),
    }
    write_text(trial_path(run), json.dumps(result, indent=1, sort_keys=True) + "\n")
    return f"{label}: validation NDCG@10 {figure:.4f} after {log['kept_epoch']} epochs, {log['seconds']:.0f} s"


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m foster_lib.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--datasets", default="ml-100k", help="names separated by spaces")
    parser.add_argument("--jobs", type=int, default=2, help="trials side by side")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    options = parser.parse_args(arguments)
    try:
        for dataset in options.datasets.split():
            print(search(dataset, options.jobs, resolve_device(options.device)).to_string(index=False))
    except FosterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
