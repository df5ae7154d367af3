"""Batches, losses, the schedule, and the trainer's promises."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from foster_lib.batches import Batch
from foster_lib.errors import FosterError
from foster_lib.sasrec import build_model
from foster_lib.subsets import SyntheticBatch, sample_subset, synthetic_loss
from foster_lib.training import (
    RealSequences,
    TrainSettings,
    make_batch,
    sequence_loss,
    shuffle_ties,
    soft_cross_entropy,
    train,
    warmup_cosine,
)
from tests.conftest import SMALL

QUICK = TrainSettings(learning_rate=1e-2, epochs=3, patience=0)


@pytest.fixture
def model(catalogue):
    return build_model(catalogue, SMALL, seed=0)


@pytest.fixture
def data(split):
    return RealSequences(split.train, SMALL.length, batch_size=16)


def copy_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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


def test_full_data_training_over_subsets_learns_what_the_whole_catalogue_teaches(catalogue, split, data):
    """The full loss, measured after training on subsets, is near that after training on everything."""
    losses = []
    for subset in (0, 20):
        model = build_model(catalogue, SMALL, seed=0)
        train(model, replace(data, n_items=catalogue.n_items, subset=subset), replace(QUICK, epochs=15), seed=0)
        batches = list(data.batches(np.random.default_rng(0)))
        losses.append(np.mean([sequence_loss(model, batch, model.features()).item() for batch in batches]))
    untrained = build_model(catalogue, SMALL, seed=0).eval()
    start = np.mean([sequence_loss(untrained, batch, untrained.features()).item() for batch in batches])
    assert losses[1] - losses[0] < 0.25 * (start - losses[0])


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


# ------------------------------------------------------------------------------- schedule


def test_warmup_cosine_closed_form():
    """Linear rise, maximum after the warm-up, half way down in the middle of the rest, zero at the end."""
    assert warmup_cosine(0.05, 0.1) == pytest.approx(0.5)
    assert warmup_cosine(0.1, 0.1) == pytest.approx(1.0)
    assert warmup_cosine(0.55, 0.1) == pytest.approx(0.5)
    assert warmup_cosine(1.0, 0.1) == pytest.approx(0.0)
    assert warmup_cosine(0.0, 0.0) == pytest.approx(1.0)
    falling = [warmup_cosine(done, 0.1) for done in np.linspace(0.1, 1, 50)]
    assert (np.diff(falling) < 0).all()


def test_learning_rate_follows_the_schedule(model, data, monkeypatch):
    """Every step has learning_rate × warmup_cosine, the adapter's four times that; matrices alone decay."""
    seen, groups = [], []

    class Spy(torch.optim.AdamW):
        def step(self, *rest, **named):
            seen.append([group["lr"] for group in self.param_groups])
            groups[:] = self.param_groups
            return super().step(*rest, **named)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    log = train(model, data, replace(QUICK, weight_decay=0.3, adapter_rate=4.0), seed=0)
    order = np.random.default_rng(0)
    counts = [len(list(data.batches(order))) for _ in range(QUICK.epochs)]
    assert sum(counts) == log.steps
    done = [(epoch + (i + 0.5) / n) / QUICK.epochs for epoch, n in enumerate(counts) for i in range(n)]
    expected = [QUICK.learning_rate * warmup_cosine(fraction, QUICK.warmup) for fraction in done]
    assert len(seen) == log.steps
    own = {id(p) for p in model.adapter.parameters()}
    multiples = [4.0 if id(group["params"][0]) in own else 1.0 for group in groups]
    np.testing.assert_allclose(seen, np.outer(expected, multiples), atol=1e-12)
    for group in groups:
        assert len({id(p) in own for p in group["params"]}) == 1
        assert group["weight_decay"] == (0.3 if group["params"][0].dim() > 1 else 0.0)
        assert len({p.dim() > 1 for p in group["params"]}) == 1
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_gradients_are_clipped(model, data, monkeypatch):
    """No step sees a gradient longer than `clip`."""
    norms = []

    class Spy(torch.optim.AdamW):
        def step(self, *rest, **named):
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
            return super().step(*rest, **named)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    train(model, data, replace(QUICK, epochs=1, clip=0.01), seed=0)
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


# -------------------------------------------------------------------------------- trainer


def test_training_learns(model, data, task):
    """On sequences that follow a ring the loss halves and the next item is mostly found."""
    before = task.validate(model)
    log = train(model, data, replace(QUICK, epochs=30), seed=0, validate=task.validate)
    assert log.losses[-1] < 0.5 * log.losses[0]
    assert log.validation[0] == before
    assert task.validate(model) == max(log.validation.values()) > max(2 * before, 0.5)
    assert len(log.losses) == 30 and log.steps >= 30 and log.seconds > 0
    assert not model.training


@pytest.mark.parametrize(
    ("figures", "best"), [([0.1, 0.2, 0.5, 0.3], 2), ([0.9, 0.2, 0.5, 0.3], 0), ([0.1, 0.2, 0.2, 0.2], 1)]
)
def test_best_weights_are_kept(model, data, figures, best):
    """The weights of the (first) best validation come back, those before training included."""
    states = {}
    script = iter(figures)
    log = train(
        model,
        data,
        QUICK,
        seed=0,
        validate=lambda m: next(script),
        on_epoch=lambda epoch, m: states.update({epoch: copy_state(m)}),
    )
    assert log.best_epoch == best
    assert log.validation == dict(enumerate(figures))
    assert sorted(states) == [0, 1, 2, 3]
    assert same(copy_state(model), states[best])
    assert not same(states[0], states[1]) and not same(states[2], states[3])


def test_without_validation_the_last_weights_stay(model, data):
    """No validation: nothing is put back."""
    states = {}
    log = train(model, data, QUICK, seed=0, on_epoch=lambda epoch, m: states.update({epoch: copy_state(m)}))
    assert same(copy_state(model), states[3])
    assert log.validation == {}


@pytest.mark.parametrize(("patience", "epochs"), [(1, 1), (2, 2), (3, 3), (0, 6)])
def test_early_stopping(model, data, patience, epochs):
    """After `patience` validations without improvement training ends; 0 never stops."""
    figures = iter(range(100, 0, -1))
    settings = replace(QUICK, epochs=6, patience=patience)
    log = train(model, data, settings, seed=0, validate=lambda m: float(next(figures)))
    assert len(log.losses) == epochs


def test_early_stopping_counts_from_the_last_improvement(model, data):
    """An improvement sets the count back."""
    figures = iter([0.1, 0.0, 0.2, 0.1, 0.1, 0.9])
    log = train(model, data, replace(QUICK, epochs=8, patience=2), seed=0, validate=lambda m: next(figures))
    assert (log.best_epoch, len(log.losses)) == (2, 4)


def test_validation_interval(model, data):
    """Every second epoch and the last are validated."""
    log = train(model, data, replace(QUICK, epochs=5, validate_every=2), seed=0, validate=lambda m: 0.0)
    assert list(log.validation) == [0, 2, 4, 5]


def test_two_runs_are_bit_identical(catalogue, data):
    """Equal seeds give equal bits, dropout included, whatever the global random states; other seeds do not."""
    states, logs = [], []
    for run, seed in enumerate((3, 3, 4)):
        torch.manual_seed(run)
        np.random.seed(run)
        model = build_model(catalogue, SMALL, seed=0)
        logs.append(train(model, data, QUICK, seed=seed))
        states.append(copy_state(model))
    assert same(states[0], states[1]) and logs[0].losses == logs[1].losses
    assert not same(states[0], states[2])


def test_mixed_precision_multiplies_in_bfloat16_and_learns_in_float32(catalogue, data):
    """Off as a default; where it is on, the matrix products are bfloat16's and the weights stay float32."""

    class Watched:
        def __init__(self):
            self.kinds = set()

        def batches(self, generator):
            return data.batches(generator)

        def loss(self, model, batch):
            features = model.features()
            self.kinds.add((features @ features.T).dtype)
            return data.loss(model, batch)

    losses = {}
    for mixed in (False, True):
        model, watched = build_model(catalogue, SMALL, seed=0), Watched()
        log = train(model, watched, replace(QUICK, mixed_precision=mixed), seed=0)
        assert watched.kinds == {torch.bfloat16 if mixed else torch.float32}
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        losses[mixed] = log.losses
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.02)
    assert not QUICK.mixed_precision


def test_not_finite_loss_raises(model, data):
    """A NaN in the weights ends training with one clear error."""
    with torch.no_grad():
        model.positions[0, 0] = math.nan
    with pytest.raises(FosterError, match=r"the loss is nan at step 0 \(epoch 1\): training has diverged"):
        train(model, data, QUICK, seed=0)


def test_soft_synthetic_batch_trains(model):
    """A single batch of probabilities is fitted: the same trainer reads real and synthetic data."""
    generator = torch.Generator().manual_seed(0)
    n = model.catalogue.n_items
    p = torch.rand(4, 6, n, generator=generator).pow(20)
    mask = torch.arange(6).expand(4, 6) < torch.tensor([6, 3, 1, 5])[:, None]
    targets = (6 * torch.randn(15, n, generator=generator)).softmax(-1)
    everything = sample_subset(n, n, np.random.default_rng(0))
    anchors = torch.zeros(4, 6, dtype=torch.long)
    batch = SyntheticBatch(everything, anchors, mask, p / p.sum(-1, keepdim=True), torch.zeros(4, 6), targets)

    class Repeated:
        def batches(self, generator):
            yield batch

        def loss(self, model, batch):
            return synthetic_loss(model, batch)

    log = train(model, Repeated(), replace(QUICK, epochs=60), seed=0)
    assert log.steps == 60
    assert log.losses[-1] < 0.6 * log.losses[0]
