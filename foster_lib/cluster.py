"""Runs on the workers of a Dask cluster (`ENGINE=dask`), see docs/cluster.md.

A run goes to a worker with the files that it reads and comes back with those that it made, by
value: the workers need this library and the data sets, but share no folder. Whoever started the
runs keeps everything that is finished, so a lost worker costs the run that it was at and no more:
Dask gives that run to another one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from foster_lib.errors import FosterError
from foster_lib.execution import Call, resolve_device, single_threaded
from foster_lib.paths import cache_dir, new_folder, results_dir, write_atomically

Files = dict[str, bytes]
"""Content by path within a folder; a file alone has the path ""."""


def on_cluster(
    calls: list[Call],
    *,
    device: str,
    label: str,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> None:
    """Make all calls on the workers of the cluster that `FOSTER_SCHEDULER` names, as `execution.parallel` does here.

    Each worker makes one call at a time; `device` is resolved there. A call asks for what `requirements` says.

    Raises
    ------
    FosterError
        Where there is no cluster, a run has cost several workers their lives, or a worker's code or data are others.
    """
    needs = requirements(device)
    waiting, running, ended, sent = list(calls), {}, set(), {}
    with connect() as client, _any_size(), tqdm(total=len(calls), desc=label, unit="run", disable=not progress) as bar:
        from distributed import CancelledError, KilledWorker, as_completed

        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        if not any(all(worker["resources"].get(name, 0) >= n for name, n in needs.items()) for worker in workers):
            say(f"no worker offers {needs or 'itself'} yet, the runs wait for one (see docs/cluster.md)")
        completed = as_completed()

        def submit_ready() -> None:
            for call in [call for call in waiting if all(one in ended for one in call.after)]:
                waiting.remove(call)
                for path in call.reads:
                    if path not in sent:  # kept by the scheduler: Dask can send it again when a worker is lost
                        sent[path] = client.submit(_deliver, _portable(path), _pack(path), pure=False)
                future = client.submit(
                    _work, call.function, call.item, device, [_portable(path) for path in call.makes],
                    *[sent[path] for path in call.reads], resources=needs, pure=False,
                )  # fmt: skip
                running[future] = call
                completed.add(future)

        submit_ready()
        for future in completed:
            call = running.pop(future)
            try:
                line, made = future.result()
            except KilledWorker as error:
                run = call.item
                raise FosterError(
                    f"{run.settings.dataset} {run.method} seed {run.seed}: several workers died over this run, most "
                    "likely for lack of memory. What is finished is kept; give the workers more and start again."
                ) from error
            except CancelledError as error:
                raise FosterError("the Dask scheduler was lost. What is finished is kept: start again.") from error
            for name, files in made.items():
                _unpack(name, files)
            ended.add(call)
            say(line)
            bar.update()
            submit_ready()


def connect() -> Any:
    """A client of the scheduler whose address, or scheduler file, is in `FOSTER_SCHEDULER`."""
    try:
        from distributed import Client
    except ImportError as error:
        raise FosterError("ENGINE=dask needs the package distributed: run `pip install distributed`.") from error
    where = os.environ.get("FOSTER_SCHEDULER")
    if not where:
        raise FosterError("ENGINE=dask needs a cluster: name its scheduler, e.g. SCHEDULER=tcp://host:8786.")
    try:
        return Client(where) if "://" in where else Client(scheduler_file=where)
    except (OSError, ValueError) as error:  # a timeout is an OSError
        raise FosterError(f"no Dask scheduler answers at {where} ({error}). See docs/cluster.md.") from error


def _any_size() -> AbstractContextManager:
    """Dask warns of 10 MB; a trajectory's checkpoints may have more, and travel once."""
    import dask

    return dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TB"})


def requirements(device: str) -> dict[str, float]:
    """What a run asks of a worker: `FOSTER_REQUIRES`, as "GPU=1 MEMORY=8e9"; by default one GPU on CUDA."""
    asked = os.environ.get("FOSTER_REQUIRES") or ("GPU=1" if device.startswith("cuda") else "")
    try:
        return {name: float(amount) for name, amount in (part.split("=") for part in asked.split())}
    except ValueError as error:
        raise FosterError(f"REQUIRES={asked!r} is no list of names and amounts, e.g. 'GPU=1 MEMORY=8e9'.") from error


# ---------------------------------------------------------------------------- on a worker


def _deliver(name: str, files: Files) -> tuple[str, Files]:
    return name, files


def _work(
    function: Callable[[Any, str, bool], str], item: Any, device: str, makes: list[str], *reads: tuple[str, Files]
) -> tuple[str, dict[str, Files]]:
    """Put what the call reads where it is looked for, make the call, and return its line and what it made."""
    for name, files in reads:
        _unpack(name, files)
    line = single_threaded(function, item, resolve_device(device), False)
    missing = [name for name in makes if not _local(name).exists()]
    if missing:  # their names are keys of code and data
        raise FosterError(f"{line}: a worker made no {missing[0]}. Its code or data are not those here: update it.")
    return line, {name: _pack(_local(name)) for name in makes}


# ------------------------------------------------- files, under names that hold on all machines


def _portable(path: Path) -> str:
    for folder, root in _roots().items():
        if path.is_relative_to(root):
            return f"{folder}/{path.relative_to(root).as_posix()}"
    raise FosterError(f"{path} lies neither in the results nor in the cache, so no worker can find it.")


def _local(name: str) -> Path:
    folder, _, rest = name.partition("/")
    return _roots()[folder] / rest


def _roots() -> dict[str, Path]:
    return {"results": results_dir(), "cache": cache_dir()}


def _pack(path: Path) -> Files:
    if path.is_dir():
        return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return {"": path.read_bytes()}


def _unpack(name: str, files: Files) -> None:
    """Write `files` unless they are there: in a shared folder they are."""
    path = _local(name)
    if path.exists() and _pack(path) == files:
        return
    if "" in files:
        write_atomically(path, lambda temporary: temporary.write_bytes(files[""]))
        return
    with new_folder(path) as working:
        for relative, content in files.items():
            (working / relative).parent.mkdir(parents=True, exist_ok=True)
            (working / relative).write_bytes(content)
