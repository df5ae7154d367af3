"""Muon for weight matrices, AdamW for all else."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from foster_lib.optimizers import MuonAdamW, build_optimizer
from foster_lib.sasrec import build_model
from foster_lib.training import RealSequences, TrainSettings, train
from tests.conftest import SMALL

RATE, ADAPTER, DECAY, MUON = 0.01, 4.0, 0.3, 3.0


@pytest.fixture
def model(catalogue):
    torch.manual_seed(0)
    model = build_model(catalogue, replace(SMALL, adapter_hidden=24, dropout=0.0), seed=0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def moved(model, muon_rate: float, decay: float = 0.0) -> dict[str, torch.Tensor]:
    """What one step changes, by name."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    build_optimizer(model, RATE, ADAPTER, decay, muon_rate).step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dim() == 2 and name != "positions"


def test_every_parameter_is_moved_by_one_of_the_two(model):
    optimizer = build_optimizer(model, RATE, ADAPTER, DECAY, MUON)
    assert isinstance(optimizer, MuonAdamW)
    found = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, found)) == sorted(map(id, model.parameters()))
    by_muon = {id(p) for group in optimizer.parts[0].param_groups for p in group["params"]}
    assert by_muon == {id(p) for name, p in model.named_parameters() if is_matrix(name, p)}


def test_a_matrix_learns_in_all_directions_at_one_speed(model):
    """All singular values of a step are about 0.2 sqrt(larger side) times the rate; Adam's differ by far more."""
    for name, step in moved(model, MUON).items():
        if is_matrix(name, step):
            rate = RATE * MUON * (ADAPTER if name.startswith("adapter.") else 1.0)
            speeds = torch.linalg.svdvals(step) / (rate * 0.2 * math.sqrt(max(step.shape)))
            assert 0.6 < speeds.min() and speeds.max() < 1.3, name


def test_all_else_moves_as_adamw_moves_it(model, catalogue):
    twin = build_model(catalogue, model.settings, seed=0)
    for parameter, own in zip(twin.parameters(), model.parameters()):
        parameter.grad = own.grad.clone()
    mixed, alone = moved(model, MUON, DECAY), moved(twin, 0.0, DECAY)
    assert all(torch.equal(mixed[name], alone[name]) != is_matrix(name, mixed[name]) for name in mixed)


def test_what_another_has_trained_keeps_adam(catalogue):
    """A tuned encoder, and the tables of position and of ids."""
    module = torch.nn.Module()
    module.catalogue, module.adapter = torch.nn.Linear(3, 4), torch.nn.Linear(4, 5)
    module.positions = torch.nn.Parameter(torch.zeros(6, 7))
    muon, adam = build_optimizer(module, RATE, ADAPTER, DECAY, MUON).parts
    assert [p for group in muon.param_groups for p in group["params"]] == [module.adapter.weight]
    assert sum(len(group["params"]) for group in adam.param_groups) == 4


def test_the_schedule_reaches_both(task):
    """The loss falls with either; equal seeds give equal weights; the rates end near zero."""
    states, losses = [], []
    for muon_rate in (0.0, 1.0, 1.0):
        model = task.new_model(0)
        settings = TrainSettings(learning_rate=3e-3, epochs=6, patience=0, muon_rate=muon_rate)
        losses.append(train(model, RealSequences(task.train, task.length, 16), settings, seed=0).losses)
        states.append(model.state_dict())
    assert all(torch.equal(states[1][name], states[2][name]) for name in states[1])
    assert not torch.equal(states[0]["adapter.linear.weight"], states[1]["adapter.linear.weight"])
    for course in losses:
        assert course[-1] < course[0] - 0.2
    late = np.abs(np.diff(losses[1]))
    assert late[-1] < late[0]
