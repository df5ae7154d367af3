"""Killed at any moment and run again, in two processes, on two threads, without the notebook: the same table."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from foster_lib.execution import _end_with_parent
from foster_lib.paths import ROOT
from tests.killed import STAGES, context, download, finish, new_place, start
from tests.test_download import server as server

BITS = (".csv", ".parquet", ".safetensors", ".png")
"""Files that hold no times: they are the same after every run, bit by bit."""

KILLS = 20


def outcome(folder: Path) -> dict[str, bytes]:
    """Names of all files of results and cache, those of a failed or killed run among them, and what must be equal."""
    files = [path for part in ("results", "cache") for path in (folder / part).rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.suffix in BITS else b""
        for path in [*files, *folder.rglob(".*")]
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run that nothing disturbs leaves, and its stages."""
    folder = new_place(tmp_path_factory.mktemp("undisturbed"))
    process, pipe = start(folder)
    log = finish(process, pipe)
    assert process.exitcode == 0, (folder / "log.txt").read_text()
    return outcome(folder), log


def again(folder: Path, **how) -> dict[str, bytes]:
    process, pipe = start(folder, **how)
    finish(process, pipe)
    assert process.exitcode == 0, (folder / "log.txt").read_text()
    return outcome(folder)


def moments() -> list[tuple[str, float]]:
    """Half of them at a share of a stage's time, half before one of the events that change a folder."""
    draw = random.Random(0)
    timed = [(stage, draw.random() * 0.8) for stage in STAGES for _ in range(KILLS // 10)]
    return timed + [("event", (number + draw.random()) / (KILLS // 2)) for number in range(KILLS // 2)]


@pytest.mark.parametrize(("stage", "share"), moments())
def test_killed_and_run_again(undisturbed, tmp_path, stage, share):
    """The table and everything below it are those of an undisturbed run; nothing unfinished is left."""
    expected, log = undisturbed
    folder = new_place(tmp_path / "place")
    if stage == "event":
        process, pipe = start(folder, dies_at=1 + int(share * log[-1][-1]))
        finish(process, pipe)
    else:
        # Of the writing stages, the last: the table's.
        numbers = [number for number, entry in enumerate(log) if entry[0] == stage]
        number = numbers[-1 if stage == "writing" else 0]
        delay = share * (log[number + 1][1] - log[number][1])
        while (process := killed_at(folder, number, delay)).exitcode == 0:  # it was faster than the undisturbed one
            delay, folder = delay / 2, new_place(tmp_path / f"{delay}")
    assert process.exitcode == -signal.SIGKILL
    assert again(folder) == expected


def killed_at(folder: Path, number: int, delay: float):
    """A process that is killed `delay` seconds after the beginning of its stage `number`."""
    process, pipe = start(folder)
    for _ in range(number + 1):
        pipe.recv()
    time.sleep(delay)
    process.kill()
    process.join()
    return process


def test_the_stages_are_those_of_a_run(undisturbed):
    """Each is entered, in this order; there are many events to be killed before."""
    _, log = undisturbed
    entered = [stage for stage, *_ in log]
    assert list(dict.fromkeys(entered)) == [*STAGES, "end"] and log[-1][-1] > 100


@pytest.mark.parametrize("how", [{"library": True}, {"threads": 2}, {"library": True, "threads": 2}])
def test_notebook_library_and_threads_give_the_same_bits(undisturbed, tmp_path, how):
    """In another process; without the notebook only the notebook's own two files are missing."""
    expected, _ = undisturbed
    own = [name for name in expected if name.startswith("results/notebooks/")] if "library" in how else []
    assert again(new_place(tmp_path / "place"), **how) == {
        name: content for name, content in expected.items() if name not in own
    }


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_two_runs_at_once_on_one_folder(undisturbed, tmp_path, delay):
    """Both finish with the same table; so does a third one that computes everything again beside a reader."""
    folder = new_place(tmp_path / "place")
    for arguments in ((), ("--fresh",)):
        runs = [start(folder)]
        time.sleep(delay)
        runs.append(start(folder, *arguments))
        for process, pipe in runs:
            finish(process, pipe)
        assert [process.exitcode for process, _ in runs] == [0, 0], (folder / "log.txt").read_text()
        assert outcome(folder) == undisturbed[0]


@pytest.mark.parametrize("number", range(5))
def test_a_killed_download_goes_on(server, tmp_path, number):
    """What came is kept and nothing of it asked for again; two processes that go on at once do not mix their pieces."""
    body = server.files["/Toys_5.gz"] = random.Random(number).randbytes(400_000)
    server.pause, part = 0.003, tmp_path / "Toys_5.gz.part"
    process = context.Process(target=download, args=(server.address, tmp_path))
    process.start()
    while process.is_alive() and not (part.is_file() and part.stat().st_size):
        time.sleep(0.002)
    time.sleep(random.Random(number).random() * 0.2)
    process.kill()
    process.join()
    have = part.stat().st_size
    assert process.exitcode == -signal.SIGKILL and 0 < have < len(body) and part.read_bytes() == body[:have]
    both = [context.Process(target=download, args=(server.address, tmp_path)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        name[1:]: content for name, content in server.files.items()
    }
    asked = [(span, status) for path, span, status in server.log if path == "/Toys_5.gz"]
    assert asked == [(None, 200), (f"bytes={have}-", 206)]


def _worker(pipe) -> None:
    _end_with_parent()
    pipe.send(os.getpid())
    time.sleep(60)


def _parent_of_worker(pipe) -> None:
    get_context("fork").Process(target=_worker, args=(pipe,)).start()
    time.sleep(60)


def test_workers_end_with_the_process_that_started_them():
    here, there = context.Pipe(duplex=False)
    parent = context.Process(target=_parent_of_worker, args=(there,))
    parent.start()
    assert here.poll(60)
    worker = here.recv()
    parent.kill()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker waits for ever")


@pytest.mark.skipif("FOSTER_KILLS" not in os.environ, reason="FOSTER_KILLS=20 kills `make reproduce-table2` itself")
def test_the_command_itself(tmp_path):
    """Notebook, kernel and all on MovieLens-100K, profile smoke: about a minute for each kill."""
    command = [sys.executable, "-m", "foster_lib.reproduce", "table2", "--profile", "smoke"]

    def run(folder: Path, seconds: float | None = None) -> dict[str, bytes]:
        places = {f"FOSTER_{name.upper()}": str(folder / name) for name in ("results", "cache")}
        environment = {**os.environ, **places, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        with open(tmp_path / "log.txt", "a") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            assert process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            assert process.wait() == -signal.SIGKILL
        return outcome(folder)

    began = time.monotonic()
    expected, seconds, draw = run(tmp_path / "undisturbed"), time.monotonic() - began, random.Random(0)
    for number in range(int(os.environ["FOSTER_KILLS"])):
        run(tmp_path / str(number), draw.random() * seconds)
        assert run(tmp_path / str(number)) == expected
