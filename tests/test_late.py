"""Late resets: the same algorithm on a trajectory that is read from its end."""

from __future__ import annotations

import pytest
import torch

from foster_lib import foster as algorithm
from foster_lib.foster import foster
from foster_lib.late import foster_late

FAST = {"iterations": 3, "subset": 16, "windows": 4, "pool": 1, "reset_every": 1, "fresh": 0.0}


@pytest.fixture
def reset_to(monkeypatch):
    """The checkpoints that students were reset to, as they lie in memory."""
    seen = []

    class Watched(algorithm.Rollout):
        def reset(self, checkpoint):
            seen.append(checkpoint)
            super().reset(checkpoint)

    monkeypatch.setitem(algorithm.HYPERGRADIENTS, "adjoint", Watched)
    return seen


def test_resets_go_to_the_last_checkpoints(task, reset_to):
    places = {id(checkpoint): place for place, checkpoint in enumerate(task.trajectory)}
    last = len(places) - 1
    assert last >= 2
    foster_late(task, 2, 0, **FAST, checkpoints=1)
    assert {places[id(checkpoint)] for checkpoint in reset_to} == {last}
    reset_to.clear()
    foster_late(task, 2, 0, **{**FAST, "iterations": 20}, checkpoints=2)
    assert {places[id(checkpoint)] for checkpoint in reset_to} == {last, last - 1}
    reset_to.clear()
    foster(task, 2, 0, **FAST, checkpoints=1)  # the task itself is as before
    assert {places[id(checkpoint)] for checkpoint in reset_to} == {0}


def test_fresh_starts_are_as_before(task):
    """Where no reset goes to a checkpoint, it does not matter which are early."""
    fresh = {**FAST, "fresh": 1.0}
    late, early = foster_late(task, 2, 0, **fresh), foster(task, 2, 0, **fresh)
    assert all(torch.equal(late.tensors()[name], tensor) for name, tensor in early.tensors().items())
