"""Where FOSTER may start."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from foster_lib import foster, starts
from foster_lib.errors import FosterError


@pytest.fixture
def long(task):
    """Sequences of two windows."""
    return replace(task, synthetic_length=2 * task.length)


def test_random_histories_are_a_user_each(long):
    chosen = starts.random_histories(long, 3, 0)
    length = long.length
    assert chosen.items.shape == (3, 2 * length)
    latest = {tuple(sequence[-(length + 1) :].tolist()) for sequence in long.train}
    seen = set()
    for row in range(3):
        for place in range(0, 2 * length, length):
            size = int(chosen.mask[row, place : place + length].sum())
            history = (*chosen.items[row, place : place + size].tolist(), int(chosen.targets[row, place + size - 1]))
            assert history in latest
            seen.add(history)
    assert len(seen) > 3
    assert not torch.equal(chosen.items, starts.random_histories(long, 3, 1).items)


def test_noise_fills_every_position_with_any_item(long):
    drawn = starts.noise(long, 40, 0)
    assert drawn.mask.all() and len(drawn.items.unique()) > 0.9 * long.n_items
    assert torch.equal(drawn.items, starts.noise(long, 40, 0).items)


def test_hard_labels_peak_at_the_next_item_and_know_nothing_else(long):
    chosen = starts.random_histories(long, 3, 0)
    hard = starts.hard_labels(long, chosen)
    y = hard.target_probabilities(long.embeddings)
    assert (y.argmax(-1) == chosen.targets)[chosen.mask].float().mean() > 0.9  # two items may share their text
    same = chosen.targets[chosen.mask]
    first = int(same[0])
    assert torch.equal(hard.labels[chosen.targets == first].unique(dim=0), hard.labels[chosen.targets == first][:1])


def test_foster_begins_where_it_is_told(long, monkeypatch):
    seen = []
    monkeypatch.setattr(foster, "distill", lambda task, start, *rest, **named: seen.append(start) or (start, {}))
    for items in starts.ITEMS:
        for labels in starts.LABELS:
            foster.foster(long, 2, 0, start_items=items, start_labels=labels)
    assert len({start.items.numpy().tobytes() for start in seen}) == 3
    assert len({start.labels.numpy().tobytes() for start in seen}) == 6
    with pytest.raises(FosterError, match="start_items 'k-mean'.*Did you mean 'k-means'"):
        foster.foster(long, 2, 0, start_items="k-mean")
