"""Batches of real sequences, and the loss on them."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from foster_lib.batches import Batch
from foster_lib.training import RealSequences, make_batch, sequence_loss, shuffle_ties, soft_cross_entropy
from tests.conftest import SMALL

# -------------------------------------------------------------------------------- batches


def test_make_batch_is_left_aligned():
    """Oldest item at position 0, zeros behind, targets in the order in which the mask reads them."""
    batch = make_batch([np.array([7, 3, 9, 4]), np.array([5, 6])])
    assert batch.inputs.tolist() == [[7, 3, 9], [5, 0, 0]]
    assert batch.mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.targets.tolist() == [3, 9, 4, 6]


def test_an_epoch_reads_every_transition_once(split, data):
    """All (input, target) pairs of the sequences, in batches of at most 16 windows of at most L."""
    expected = sorted(pair for s in split.train for pair in zip(s[:-1].tolist(), s[1:].tolist()))
    generator = np.random.default_rng(0)
    for _ in range(3):
        found = []
        for batch in data.batches(generator):
            assert len(batch.inputs) <= 16 and batch.inputs.shape[1] <= SMALL.length
            found += zip(batch.inputs[batch.mask].tolist(), batch.targets.tolist())
        assert sorted(found) == expected


def test_epochs_differ_and_seeds_repeat(data):
    """Two epochs have another order, the same seed has the same."""
    generator = np.random.default_rng(0)
    first, second = ([b.targets.tolist() for b in data.batches(generator)] for _ in range(2))
    assert first != second
    assert [b.targets.tolist() for b in data.batches(np.random.default_rng(0))] == first


def test_steps_counts_the_batches_of_short_sequences():
    """Where no sequence is longer than a window, `steps` is the exact number of batches."""
    data = RealSequences([np.arange(5)] * 33, length=6, batch_size=16)
    assert len(list(data.batches(np.random.default_rng(0)))) == 3


def test_ties_are_shuffled_within_equal_timestamps():
    """Items of one timestamp come in all their orders, equally often; time is never violated."""
    sequence, time = np.array([5, 6, 7, 8, 9]), np.array([1, 2, 2, 2, 4])
    generator = np.random.default_rng(0)
    orders = Counter(tuple(shuffle_ties(sequence, time, generator).tolist()) for _ in range(1200))
    assert len(orders) == 6 and min(orders.values()) > 140
    assert all(order[0] == 5 and order[-1] == 9 for order in orders)


def test_an_epoch_draws_its_own_order_of_ties():
    """With timestamps the windows hold shuffled ties; without, the order of the file; items stay with their user."""
    sequences = [np.arange(12), np.arange(20, 32)]
    times = [np.zeros(12), np.arange(12)]
    data = RealSequences(sequences, 12, batch_size=1, timestamps=times)
    rows = {int(b.inputs.min()) >= 20: b for b in data.batches(np.random.default_rng(0))}
    assert rows[True].inputs[0].tolist() == list(range(20, 31))
    shuffled = [*rows[False].inputs[0].tolist(), int(rows[False].targets[-1])]
    assert sorted(shuffled) == list(range(12)) and shuffled != list(range(12))
    plain = RealSequences(sequences, 12, batch_size=1)
    assert {tuple(b.inputs[0].tolist()) for b in plain.batches(np.random.default_rng(0))} == {
        tuple(range(11)),
        tuple(range(20, 31)),
    }


# ----------------------------------------------------------------------------------- loss


def test_sequence_loss_equals_naive_cross_entropy(model, data):
    """Mean over the positions with a target of −log softmax over all items, in float64."""
    model.eval()
    batch = next(iter(data.batches(np.random.default_rng(0))))
    features = model.features()
    logits = model.scores(model(batch.inputs, features), features).detach().double().numpy()
    losses, targets = [], iter(batch.targets.tolist())
    for row in range(len(batch.inputs)):
        for position in range(batch.inputs.shape[1]):
            if batch.mask[row, position]:
                z = logits[row, position]
                losses.append(math.log(sum(math.exp(v) for v in z)) - z[next(targets)])
    assert next(targets, None) is None
    assert sequence_loss(model, batch, features).item() == pytest.approx(np.mean(losses), abs=1e-5)


def test_loss_over_an_item_subset(model, split):
    """Every target is in the subset, the drawn items stand for the others: the mean over draws is the full loss."""
    model.eval()
    n = model.catalogue.n_items
    plain = RealSequences(split.train[:3], SMALL.length, 16)
    sampled = RealSequences(split.train[:3], SMALL.length, 16, n_items=n, subset=12)
    expected, losses, sizes = [], [], set()
    with torch.no_grad():
        for seed in range(200):
            (batch,) = plain.batches(np.random.default_rng(seed))
            expected.append(plain.loss(model, batch).item())
            (batch,) = sampled.batches(np.random.default_rng(seed))
            place, inside = batch.subset.positions(batch.targets)
            assert inside.all() and batch.to("cpu").subset.n_items == n
            sizes.add(len(batch.subset.items))
            losses.append(sampled.loss(model, batch).item())
    assert max(sizes) < n and np.std(losses) > 0
    assert np.mean(losses) == pytest.approx(np.mean(expected), rel=0.02)
    (batch,) = RealSequences(split.train[:3], SMALL.length, 16, n_items=n, subset=n).batches(np.random.default_rng(0))
    assert batch.subset is None


def test_soft_cross_entropy_equals_its_formula():
    """−Σ y log softmax, averaged, and its gradient (softmax − y) / T."""
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(6, 9)) * 3, rng.dirichlet(np.ones(9), size=6)
    logits = torch.tensor(z, dtype=torch.float32, requires_grad=True)
    loss = soft_cross_entropy(logits, torch.tensor(y, dtype=torch.float32))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    assert loss.item() == pytest.approx(-(y * np.log(p)).sum(1).mean(), abs=1e-5)
    loss.backward()
    np.testing.assert_allclose(logits.grad.numpy(), (p - y) / 6, atol=1e-6)


def test_one_hot_targets_equal_indices(model, data):
    """Soft targets that are one-hot, and inputs that are one-hot, give the hard loss and its gradient."""
    model.eval()
    hard = next(iter(data.batches(np.random.default_rng(1))))
    n = model.catalogue.n_items
    one_hot = torch.nn.functional.one_hot
    soft = Batch(one_hot(hard.inputs, n).float(), one_hot(hard.targets, n).float(), hard.mask)
    gradients = []
    for batch in (hard, soft):
        model.zero_grad()
        loss = sequence_loss(model, batch, model.features())
        loss.backward()
        gradients.append((loss.detach(), *(p.grad.clone() for p in model.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_padding_does_not_change_the_loss(model):
    """A batch with a longer companion has the mean of the parts' losses, weighted by their targets."""
    model.eval()
    a, b = np.array([1, 2, 3]), np.array([9, 8, 7, 6, 5, 4])
    both, alone_a, alone_b = (
        sequence_loss(model, make_batch(pieces), model.features()).item() for pieces in ([a, b], [a], [b])
    )
    assert both == pytest.approx((2 * alone_a + 5 * alone_b) / 7, abs=1e-5)
