"""Runs on a real Dask cluster: a scheduler and two workers on this machine, which share no folder."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from foster_lib.cluster import requirements
from foster_lib.config import EncoderSettings, Settings, StudentSettings
from foster_lib.errors import FosterError
from foster_lib.execution import execute
from foster_lib.paths import ROOT
from foster_lib.runs import Run
from foster_lib.training import TrainSettings
from tests.conftest import SMALL

dask = pytest.importorskip("dask", reason="the package dask is not installed")
distributed = pytest.importorskip("distributed", reason="the package distributed is not installed")


@pytest.fixture
def settings(toy):
    """Training on everything lasts seconds, long enough to be interrupted."""
    return Settings(
        "toy", "cpu", "leave-one-out", 4, EncoderSettings("tiny"), SMALL,
        full=TrainSettings(learning_rate=1e-3, epochs=24, batch_size=8, patience=0, validate_every=12),
        student=StudentSettings(epochs=4, validate_every=2),
    )  # fmt: skip


@pytest.fixture
def cluster(toy, monkeypatch):
    """The scheduler, a client to watch it with, and two workers as a user starts them: {address: (name, process)}."""
    processes = {}
    try:
        with (
            distributed.LocalCluster(n_workers=0, dashboard_address=None) as scheduler,
            distributed.Client(scheduler) as watch,
        ):
            command = [
                sys.executable,
                "-m",
                "distributed.cli.dask_worker",
                scheduler.scheduler_address,
                "--nthreads",
                "1",
            ]
            command += ["--no-nanny", "--no-dashboard", "--local-directory", str(toy), "--death-timeout", "60"]
            for name in ("one", "two"):
                own = {"FOSTER_RESULTS": str(toy / name / "results"), "FOSTER_CACHE": str(toy / name / "cache")}
                path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
                with open(toy / f"{name}.log", "w") as log:
                    options = {"env": os.environ | own | path, "stdout": log, "stderr": log}
                    processes[name] = subprocess.Popen([*command, "--name", name], **options)
            watch.wait_for_workers(2, timeout=120)
            monkeypatch.setenv("FOSTER_SCHEDULER", scheduler.scheduler_address)
            workers = watch.scheduler_info(n_workers=-1)["workers"]
            yield watch, {address: (info["name"], processes[info["name"]]) for address, info in workers.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def _kill_a_worker_that_trains(client, workers: dict, folder, killed: list) -> None:
    """Wait until a worker has written an epoch of full-data training; then SIGKILL, as an out-of-memory killer does."""
    while not killed:
        time.sleep(0.02)
        for address, tasks in client.processing().items():
            name, process = workers[address]
            if tasks and any((folder / name / "cache" / "trajectories").rglob("epoch-001.safetensors")):
                process.kill()
                killed.append(name)
                return


def test_a_killed_worker_loses_and_doubles_nothing(settings, cluster, toy, monkeypatch):
    """The run that it was at is made by the other one; every figure is that of one process."""
    client, workers = cluster
    runs = [Run(settings, method, seed) for seed in (0, 1) for method in ("full", "kd", "random")]
    runs += [Run(settings, "untrained", 0), Run(settings, "random", 0, student=1)]  # the last reads what another made
    killed, said = [], []
    thread = threading.Thread(target=_kill_a_worker_that_trains, args=(client, workers, toy, killed), daemon=True)
    thread.start()
    manifests = execute(runs, engine="dask", progress=False, say=said.append)
    thread.join(10)
    [dead] = killed
    assert len(client.processing()) == 1  # worker

    # Nothing lost: every run has its manifest here, in the order asked for, and its sequences.
    assert [(m["method"], m["seed"], m["key"]) for m in manifests] == [(r.method, r.seed, r.key) for r in runs]
    assert all(run.distilled_path.is_file() for run in runs if run.method in ("kd", "random"))
    # Nothing doubled: a line for each run and training, no run finished by both workers.
    assert len(said) == len(set(said)) == len({run.path for run in runs}) + 2
    made = {
        name: {path.name for path in (toy / name).rglob("*-seed*.json") if "runs" in path.parts}
        for name in ("one", "two")
    }
    assert not made["one"] & made["two"]
    assert made["one"] | made["two"] == {run.path.name for run in runs}
    trained = {name: {p.parent.name for p in (toy / name).rglob("best.safetensors")} for name in ("one", "two")}
    assert len(trained["one"] | trained["two"]) == 2, f"{dead} was killed while it trained"

    assert execute(runs, engine="dask", progress=False, say=said.append) == manifests  # all reused
    monkeypatch.setenv("FOSTER_RESULTS", str(toy / "serial"))
    monkeypatch.setenv("FOSTER_CACHE", str(toy / "serial-cache"))
    serial = execute(runs, progress=False, say=said.append)
    assert [m["test"] for m in serial] == [m["test"] for m in manifests]

    # A mistake in a run comes back in its own words.
    wrong = replace(settings, encoder=EncoderSettings("no-such-folder"))
    with pytest.raises(FosterError, match="no-such-folder"):
        execute([Run(wrong, "untrained", 0)], engine="dask", progress=False, say=said.append)


def test_without_a_cluster_one_sentence_says_what_to_do(settings, monkeypatch):
    run = [Run(settings, "untrained", 0)]
    monkeypatch.delenv("FOSTER_SCHEDULER", raising=False)
    with pytest.raises(FosterError, match="name its scheduler"):
        execute(run, engine="dask")
    monkeypatch.setenv("FOSTER_SCHEDULER", "tcp://127.0.0.1:9")
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        with pytest.raises(FosterError, match="no Dask scheduler answers at tcp://127.0.0.1:9"):
            execute(run, engine="dask")
    with pytest.raises(FosterError, match="unknown engine 'dusk'. Did you mean 'dask'"):
        execute(run, engine="dusk")


def test_requirements_of_a_run(monkeypatch):
    assert requirements("auto") == requirements("cpu") == {} and requirements("cuda") == {"GPU": 1}
    monkeypatch.setenv("FOSTER_REQUIRES", "GPU=2 MEMORY=8e9")
    assert requirements("cuda") == {"GPU": 2, "MEMORY": 8e9}
    monkeypatch.setenv("FOSTER_REQUIRES", "a GPU")
    with pytest.raises(FosterError, match="GPU=1 MEMORY=8e9"):
        requirements("cuda")
