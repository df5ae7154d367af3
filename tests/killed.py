"""`reproduce table2` on tiny data in a process that can be killed at any moment, and run again.

The processes are forked from a server that has imported everything, and execute the cells of the real notebook
themselves instead of starting a kernel: an undisturbed run takes about two seconds.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a fork has no threads but its own
os.environ["MPLBACKEND"] = "Agg"

import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import nbformat
import torch
import yaml
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

import foster_lib.config
import foster_lib.tables
from foster_lib import execution, reproduce, runs
from foster_lib.encoder import TextEncoder
from foster_lib.sources import download as downloads
from tests.conftest import make_tables, write_tables
from tests.shop import PROFILE

ROWS = ["full", "untrained", "random", "foster"]
STAGES = ("embedding", "training", "distillation", "student", "writing")
WRITES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "tempfile.mkstemp", "tempfile.mkdtemp"}
"""Audit events of Python that change a folder."""

context = get_context("forkserver")
context.set_forkserver_preload(["tests.warm"])


def new_place(folder: Path) -> Path:
    """A folder with the tiny data set and its profile."""
    write_tables(folder / "data", *make_tables())
    (folder / "profiles").mkdir()
    profile = {**PROFILE, "datasets": ["toy"], "seeds": [0], "table2": ROWS}
    (folder / "profiles" / "mini.yaml").write_text(yaml.safe_dump(profile))
    return folder


def start(folder: Path, *arguments: str, **how):
    """Begin a run in `folder`: the process, and the end of a pipe that says which stages begin."""
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(folder, arguments, there), kwargs=how)
    process.start()
    there.close()
    return process, here


def finish(process, pipe, seconds: float = 120) -> list[tuple[str, float, float, int]]:
    """Wait for a run: the stages, each with its time, processor time and number of write events."""
    log = []
    try:
        while pipe.poll(seconds):
            log.append(pipe.recv())
    except EOFError:
        pass
    process.join(seconds)
    return log


def download(address: str, folder: Path) -> None:
    """Fetch the category Toys from a server of `tests.test_download`."""
    downloads.ADDRESSES["amazon-2018"] = (address + "{}_5.gz", address + "meta_{}.gz")
    downloads.fetch("amazon-2018", "Toys", folder, progress=False)


def _run(folder, arguments, pipe, library: bool = False, threads: int = 1, dies_at: int = 0) -> None:
    """`library`: without the notebook; `dies_at`: SIGKILL before the n-th write event."""
    for name in ("data", "results", "cache"):
        os.environ[f"FOSTER_{name.upper()}"] = str(folder / name)
    foster_lib.config.PROFILES = folder / "profiles"
    torch.set_num_threads(threads)
    reproduce._execute = _execute_here
    log = open(folder / "log.txt", "a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    events = 0

    def count(event: str, details: tuple) -> None:
        nonlocal events
        if event in WRITES and str(details[0]).startswith(str(folder)):
            events += 1
            if events == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def announced(stage: str, place, name: str) -> None:
        function = getattr(place, name)

        def announce(*arguments, **options):
            pipe.send((stage, time.perf_counter(), time.process_time(), events))
            return function(*arguments, **options)

        setattr(place, name, announce)

    sys.addaudithook(count)
    announced("embedding", TextEncoder, "embed")
    announced("training", runs, "train_full")
    announced("distillation", runs, "apply_method")
    announced("student", runs, "train_student")
    announced("writing", runs, "write_manifest")
    announced("writing", foster_lib.tables, "write_table2")
    announced("end", os, "_exit")
    if library:
        profile = foster_lib.config.load_profile("mini")
        planned = runs.plan(profile, ["toy"], ROWS, [0])
        execution.execute(planned)
        foster_lib.tables.write_table2(planned, foster_lib.tables.table2_folder("mini"))
        os._exit(0)
    os._exit(reproduce.main(["table2", "--profile", "mini", "--jobs", "1", *arguments]))


def _execute_here(source: Path, target: Path, parameters: dict) -> None:
    """In the place of papermill and a kernel."""
    book = parameterize_notebook(load_notebook_node(str(source)), parameters)
    space: dict = {}
    for cell in book.cells:
        if cell.cell_type == "code":
            exec(cell.source, space)
    nbformat.write(book, target)
