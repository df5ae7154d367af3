"""Training in two processes is training in one: the command of the documentation, on the CPU with gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from foster_lib import distributed
from foster_lib.cli import changed_settings
from foster_lib.distributed import Team
from foster_lib.evaluation import recommender_scorer
from foster_lib.paths import ROOT
from foster_lib.runs import Run, make_task, trajectory_folder
from foster_lib.training import RealSequences, train

CHANGES = {
    "encoder.name": "tiny", "model.width": 16, "model.adapter_hidden": 8, "model.dropout": 0.2,
    "full.learning_rate": 0.003, "full.epochs": 6, "full.batch_size": 7, "full.muon_rate": 0.0,
}  # fmt: skip


def command_line(*more: str) -> list[str]:
    return ["toy", "--device", "cpu", *(f"--set={key}={value}" for key, value in CHANGES.items()), *more]


def in_two_processes(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "foster_lib.distributed", *arguments], env=environment, capture_output=True, text=True
    )


def test_two_processes_have_the_loss_curve_of_one(toy, capsys):
    """With dropout, ties drawn anew, batches that do not divide evenly, and validation; then it is reused."""
    run = Run(changed_settings("toy", "cpu", "", [f"{key}={value}" for key, value in CHANGES.items()]), "full", 0)
    task, settings = make_task(run), run.settings.full
    model = task.new_model(0)
    data = RealSequences(task.train, task.length, settings.batch_size, task.train_timestamps)
    alone = train(model, data, settings, seed=0, validate=task.validate)

    done = in_two_processes(*command_line())
    assert done.returncode == 0, done.stderr
    log = json.loads((trajectory_folder(run) / "log.json").read_text())
    assert log["processes"] == 2 and log["kept_epoch"] == alone.best_epoch
    np.testing.assert_allclose(log["losses"], alone.losses, rtol=0, atol=1e-5)
    assert alone.losses[0] - alone.losses[-1] > 0.05  # there was something to learn
    assert log["validation_curve"] == pytest.approx({str(e): v for e, v in alone.validation.items()}, abs=2e-5)
    assert len(list(trajectory_folder(run).glob("epoch-*.safetensors"))) == 7
    together = task.new_model(0)
    together.load_state_dict(load_file(trajectory_folder(run) / "best.safetensors"))
    scores = [recommender_scorer(m)(task.validation.histories) for m in (together, model)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-2)  # logits

    assert distributed.main(command_line()) == 0  # one process, without torchrun
    assert "trained already" in capsys.readouterr().out
    assert distributed.main(command_line("--set=full.epoch=3")) == 2
    assert "'epoch'" in capsys.readouterr().err


def test_with_muon_the_curves_differ_by_its_rounding(toy):
    """Muon rounds its steps to bfloat16, which makes a difference of last digits one of the third."""
    changes = CHANGES | {"full.muon_rate": 1.0}
    run = Run(changed_settings("toy", "cpu", "", [f"{key}={value}" for key, value in changes.items()]), "full", 0)
    task, settings = make_task(run), run.settings.full
    data = RealSequences(task.train, task.length, settings.batch_size, task.train_timestamps)
    alone = train(task.new_model(0), data, settings, seed=0, validate=task.validate)
    done = in_two_processes(*command_line("--set=full.muon_rate=1.0"))
    assert done.returncode == 0, done.stderr
    log = json.loads((trajectory_folder(run) / "log.json").read_text())
    np.testing.assert_allclose(log["losses"], alone.losses, rtol=1e-3)


@pytest.mark.parametrize("subset", [0, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_the_parts_add_up_to_the_whole(task, size, subset):
    """Value and gradient of the loss, also where there are more processes than sequences."""
    data = RealSequences(task.train, task.length, 7, n_items=task.n_items, subset=subset)
    batch = next(iter(data.batches(np.random.default_rng(0))))
    model = task.new_model(0).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    whole = data.loss(model, batch)
    parts = [Team(rank, size).part(batch) for rank in range(size)]
    total = sum(share * data.loss(model, own) for own, share in parts)
    assert total.item() == pytest.approx(whole.item(), abs=1e-5)
    for expected, found in zip(torch.autograd.grad(whole, parameters), torch.autograd.grad(total, parameters)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert sum(len(own.inputs) for own, share in parts if share) == len(batch.inputs)


def test_dropout_masks_are_those_of_one_process(task):
    """Rows of every process's hidden states are the rows of one process's, drawn from the same seed."""
    data = RealSequences(task.train, task.length, 7)
    batch = next(iter(data.batches(np.random.default_rng(0))))
    noisy = replace(task, model_settings=replace(task.model_settings, dropout=0.5))
    whole = noisy.new_model(0).train()
    with torch.no_grad():
        expected = whole(batch.inputs, whole.features())
        for rank in range(3):
            team = Team(rank, 3)
            model = distributed.share_dropout(noisy.new_model(0), team).train()
            own, _ = team.part(batch)
            torch.testing.assert_close(model(own.inputs, model.features()), expected[rank::3])
