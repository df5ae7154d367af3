"""Where FOSTER may start."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from foster_lib import coresets, foster, starts
from foster_lib.errors import FosterError


@pytest.fixture
def long(task):
    """Sequences of two windows."""
    return replace(task, synthetic_length=2 * task.length)


def test_packed_histories_stand_at_the_windows_starts(task):
    """A sequence of three windows of L: each window holds a whole history of its own, labelled as if it stood alone."""
    long = replace(task, synthetic_length=3 * task.length, train=[sequence[-4:] for sequence in task.train])
    packed = starts.start_sequences(long, 2, 0, fill=False)
    assert packed.items.shape == (2, 3 * task.length) and packed.mask.sum() == 2 * 3 * 3
    histories = {tuple(sequence) for sequence in long.train}
    teacher = task.teacher
    features = teacher.features()
    for row in range(2):
        for start in range(0, 3 * task.length, task.length):
            part = slice(start, start + 3)
            items, targets = packed.items[row, part].tolist(), packed.targets[row, part].tolist()
            assert items[1:] == targets[:2] and (*items, targets[2]) in histories
            alone = teacher.log_scale.exp() * teacher(torch.tensor([items]), features)[0]
            torch.testing.assert_close(packed.labels[row, part], alone, atol=1e-4, rtol=1e-4)
    with pytest.raises(FosterError, match="users"):
        starts.packed_medoids(long, 40, 0)


def test_one_window_a_sequence_is_k_means(task):
    one, plain = starts.packed_medoids(task, 4, seed=0), coresets.k_means(task, 4, seed=0)
    assert torch.equal(one.items, plain.items) and torch.equal(one.mask, plain.mask)


@torch.no_grad()
def test_a_history_is_continued_by_what_the_teacher_expects(task):
    """Against one item after another, of one window at a time; what was there stays."""
    long = replace(task, synthetic_length=2 * task.length, train=[s[-2 - u % 3 :] for u, s in enumerate(task.train)])
    before = starts.packed_medoids(long, 3, 0)
    after = starts.continued(long, before)
    assert after.mask.all() and not before.mask.all()
    assert torch.equal(after.items[before.mask], before.items[before.mask])
    assert torch.equal(after.targets[before.mask], before.targets[before.mask])
    teacher, features = task.teacher, task.teacher.features()
    for row in range(3):
        for place in range(0, 2 * task.length, task.length):
            part = slice(place, place + task.length)
            size = int(before.mask[row, part].sum())
            items = [*before.items[row, part][:size].tolist(), int(before.targets[row, part][size - 1])]
            while len(items) <= task.length:
                scores = teacher.scores(teacher(torch.tensor([items]), features)[:, -1], features)[0]
                items.append(max((j for j in range(task.n_items) if j not in items), key=lambda j: scores[j]))
            assert after.items[row, part].tolist() == items[:-1] and after.targets[row, part].tolist() == items[1:]


def test_the_start_is_a_row_of_its_own(long):
    row, start = starts.kd_start(long, 3, 1), starts.start_sequences(long, 3, 1, "k-means", "teacher", True)
    assert torch.equal(row.items, start.items) and torch.equal(row.labels, start.labels) and row.mask.all()


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
