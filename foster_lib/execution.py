"""Many runs: what is finished is reused, the rest goes side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from joblib import Parallel, delayed
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from foster_lib.errors import FosterError, check_known
from foster_lib.methods import get_method
from foster_lib.paths import results_dir, shown
from foster_lib.runs import Run, load_catalogue, run_one, train_full_run, trajectory_folder


def execute(
    runs: Iterable[Run],
    *,
    jobs: int = 1,
    device: str = "auto",
    fresh: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> list[dict]:
    """Execute runs, `jobs` at a time, and return their manifests in order.

    Finished runs are reused (not with `fresh`). Full-data training comes first, because other
    methods read its teacher and trajectory. Every run uses one thread, so results do not depend
    on `jobs`. `say` gets a line per finished run; `progress` shows bars as well.
    """
    runs, device = list(runs), resolve_device(device)
    pending = [run for run in runs if fresh or run.manifest() is None]
    if len(pending) < len(runs):
        say(f"{len(runs) - len(pending)} of {len(runs)} runs are reused from {shown(results_dir() / 'runs')}")
    teachers = {
        trajectory_folder(run): replace(run, method="full") for run in pending if get_method(run.method).needs_teacher
    }
    teachers = [run for folder, run in teachers.items() if fresh or not folder.is_dir()]
    for run in {run.settings.dataset: run for run in pending}.values():
        load_catalogue(run.settings.dataset, run.settings.encoder, device)  # embed once, before fanning out
    longest_first = sorted(pending, key=_expected_cost, reverse=True)
    parallel(train_full_run, teachers, jobs=jobs, device=device, label="full data", progress=progress, say=say)
    parallel(run_one, longest_first, jobs=jobs, device=device, label="runs", progress=progress, say=say)
    return [run.manifest() for run in runs]


def parallel(
    function: Callable[[Any, str, bool], str],
    work: list,
    *,
    jobs: int,
    device: str,
    label: str,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> None:
    """Call `function(item, device, progress)` for each item, `jobs` at a time, one thread each.

    The line that each call returns is said when it ends; a single job shows its own progress bar.
    """
    workers = min(jobs, len(work))
    if workers == 0:
        return
    calls = (delayed(_single_threaded)(function, item, device, progress and workers == 1) for item in work)
    done = Parallel(n_jobs=workers, return_as="generator_unordered")(calls)
    for line in tqdm(done, total=len(work), desc=label, unit="run", disable=not progress):
        say(line)


def resolve_device(device: str) -> str:
    """`auto` is CUDA where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_known(device.partition(":")[0], ("cpu", "cuda"), "device")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise FosterError(f"device '{device}' was asked for, but PyTorch sees no GPU. Use DEVICE=cpu or DEVICE=auto.")
    return device


def _expected_cost(run: Run) -> int:
    """Longest first, so that no worker finishes alone."""
    return get_method(run.method).condenses + 2 * (run.method == "foster")


def _single_threaded(function: Callable, item: Any, device: str, progress: bool) -> str:
    torch.set_num_threads(1)
    with threadpool_limits(1):
        return function(item, device, progress)
