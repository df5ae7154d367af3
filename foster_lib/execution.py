"""Many runs: what is finished is reused, the rest goes side by side, here or on a cluster."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from foster_lib.errors import FosterError, check_known
from foster_lib.methods import get_method
from foster_lib.paths import results_dir, shown
from foster_lib.records import defect
from foster_lib.runs import Run, load_catalogue, run_one, train_full_run, trained, trajectory_folder


def execute(
    runs: Iterable[Run],
    *,
    jobs: int = 1,
    device: str = "auto",
    fresh: bool = False,
    engine: str | None = None,
    sequences: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> list[dict]:
    """Execute runs, `jobs` at a time, and return their manifests in order.

    Finished runs are reused (not with `fresh`), if `sequences` only those whose sequences are still there. Full-data
    training comes before the methods that read its teacher and trajectory. Every run uses one thread, so results
    do not depend on `jobs`. `say` gets a line per finished run; `progress` shows bars as well. `engine` (default:
    `FOSTER_ENGINE`, else "local"): "dask" sends the runs to a cluster, see `cluster`, which has its own `jobs`.
    """
    runs, engine = list(runs), engine or os.environ.get("FOSTER_ENGINE") or "local"
    check_known(engine, ("local", "dask"), "engine")
    if engine == "local":
        device = resolve_device(device)
    pending = [run for run in runs if fresh or run.manifest() is None]
    # Further students read what the first one's run stored; it runs again where that is lost.
    known = {run.path for run in pending}
    readers = runs if sequences else [run for run in pending if run.student]
    lost = [run.first for run in readers if get_method(run.method).condenses and not run.distilled_path.is_file()]
    pending += {run.path: run for run in lost if run.path not in known}.values()
    if len(pending) < len(runs):
        say(f"{len(runs) - len(pending)} of {len(runs)} runs are reused from {shown(results_dir() / 'runs')}")
    for run in runs:
        if not fresh and (why := defect(run.path)):
            say(f"{shown(run.path)} cannot be used, its run is made again: {why}")
    teachers = {  # further students read the sequences, not the teachers
        trajectory_folder(teacher): teacher for run in pending if not run.student for teacher in run.teachers
    }
    training = partial(train_full_run, fresh=fresh)
    trainings = {
        folder: Call(training, run, makes=(folder,)) for folder, run in teachers.items() if fresh or not trained(run)
    }
    distilled: list[Call] = []
    makers: dict[Path, Call] = {}  # of sequences: all other students read what the first one's run has stored
    for run in sorted(pending, key=_expected_cost, reverse=True):
        maker = makers.get(run.distilled_path)
        needs = [] if run.student else [trainings.get(folder) for folder in _reads(run)]
        function, reads = run_one if fresh else run_unfinished, _reads(run)
        if maker and not run.student:  # of another recipe
            function = partial(run_one, fresh=False) if fresh else run_unfinished
            reads = (*reads, run.distilled_path, run.distilled_path.with_suffix(".json"))
        call = Call(function, run, tuple(each for each in (*needs, maker) if each), reads=reads, makes=_makes(run))
        distilled.append(call)
        if not run.student:
            makers.setdefault(run.distilled_path, call)
    calls = [*trainings.values(), *distilled]
    if engine == "dask":
        from foster_lib.cluster import on_cluster  # Dask is needed by those who use it

        on_cluster(calls, device=device, label="runs", progress=progress, say=say)
    else:
        for run in {run.settings.dataset: run for run in pending}.values():
            load_catalogue(run.settings.dataset, run.settings.encoder, device)  # embed once, before fanning out
        parallel(calls, jobs=jobs, device=device, label="runs", progress=progress, say=say)
    return [run.manifest() for run in runs]


def run_unfinished(run: Run, device: str, progress: bool) -> str:
    """`run_one`, unless another process has finished the run since it was planned."""
    if run.manifest() is not None and all(path.is_file() for path in _makes(run)):
        return f"{run.settings.dataset} {run.method} seed {run.seed}: finished by another process meanwhile"
    return run_one(run, device, progress, fresh=False)


def _reads(run: Run) -> tuple[Path, ...]:
    """What others have made and a run reads."""
    if run.student:
        return (run.distilled_path,)
    return tuple(trajectory_folder(teacher) for teacher in run.teachers)


def _makes(run: Run) -> tuple[Path, ...]:
    sequences = [] if run.student or not get_method(run.method).condenses else [run.distilled_path]
    return (*sequences, *(path.with_suffix(".json") for path in sequences), run.path.with_suffix(".parquet"), run.path)


@dataclass(frozen=True, eq=False)
class Call:
    """`function(item, device, progress)`, to be called when the calls `after` have ended.

    reads, makes : files and folders below the results and the cache, which travel to and from a cluster's worker
    """

    function: Callable[[Any, str, bool], str]
    item: Any
    after: tuple[Call, ...] = ()
    reads: tuple[Path, ...] = ()
    makes: tuple[Path, ...] = ()


def parallel(
    calls: list[Call],
    *,
    jobs: int,
    device: str,
    label: str,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> None:
    """Make all calls, `jobs` at a time, one thread each, in their order as far as `after` allows.

    Where one call too many is left that others wait for, it begins beside the others: nothing else could run while it
    ran on its own. The line that each call returns is said when it ends; a single job shows its own progress bar.
    """
    if jobs < 1:
        raise FosterError(f"jobs is {jobs}: at least 1 is needed.")
    if jobs == 1 or len(calls) < 2:
        for call in calls:
            say(single_threaded(call.function, call.item, device, progress))
        return
    waiting, running, ended = list(calls), {}, set()
    awaited = {need for call in calls for need in call.after}
    # Fresh interpreters: a fork would copy the threads' locks of torch in an unknown state.
    with (
        ProcessPoolExecutor(min(jobs + 1, len(calls)), get_context("spawn"), initializer=_end_with_parent) as pool,
        tqdm(total=len(calls), desc=label, unit="run", disable=not progress) as bar,
    ):
        try:
            while waiting or running:
                ready = [call for call in waiting if ended.issuperset(call.after)]
                chosen = ready[: max(0, jobs - len(running))]
                gates = [call for call in ready if call in awaited]
                if chosen and chosen == gates[:-1]:  # three share two cores for less time than two and then one take
                    chosen = gates
                for call in chosen:
                    waiting.remove(call)
                    running[pool.submit(single_threaded, call.function, call.item, device, False)] = call
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    ended.add(running.pop(future))
                    say(future.result())
                    bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def resolve_device(device: str) -> str:
    """`auto` is CUDA where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_known(device.partition(":")[0], ("cpu", "cuda"), "device")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise FosterError(f"device '{device}' was asked for, but PyTorch sees no GPU. Use DEVICE=cpu or DEVICE=auto.")
    return device


def _expected_cost(run: Run) -> int:
    """Longest first, so that no worker finishes alone; a second student after the first."""
    return get_method(run.method).condenses + 2 * (run.method == "foster") - 10 * run.student


def _end_with_parent() -> None:
    """Without its parent, a worker would wait for work for ever."""

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def single_threaded(function: Callable, item: Any, device: str, progress: bool) -> str:
    """Make a call on one thread."""
    torch.set_num_threads(1)
    with threadpool_limits(1):
        return function(item, device, progress)
