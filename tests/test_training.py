"""The schedule, and the trainer's promises."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from foster_lib.errors import FosterError
from foster_lib.sasrec import build_model
from foster_lib.subsets import SyntheticBatch, sample_subset, synthetic_loss
from foster_lib.training import (
    TrainSettings,
    sequence_loss,
    train,
    warmup_cosine,
)
from tests.conftest import SMALL

QUICK = TrainSettings(learning_rate=1e-2, epochs=3, patience=0)


def copy_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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
