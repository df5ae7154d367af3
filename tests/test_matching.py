"""Matching objectives: float64 differences, torch's own optimisers, and losses that must vanish."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from foster_lib import coresets, subsets
from foster_lib.distribution_matching import distribution_loss, distribution_matching, sequence_means
from foster_lib.encoder import FrozenCatalogue
from foster_lib.errors import FosterError
from foster_lib.matching import (
    descend,
    draw_real,
    gradient_distance,
    gradient_loss,
    gradient_matching,
    matrices,
    start_sequences,
    trajectory_distance,
    trajectory_matching,
    unroll,
)
from foster_lib.starts import kd_start
from foster_lib.subsets import Subset, SyntheticBatch, real_loss, sample_subset, synthetic_loss
from foster_lib.synthetic import SyntheticSequences
from foster_lib.training import make_batch, soft_cross_entropy

METHODS = {
    gradient_matching: {"iterations": 4, "subset": 20, "windows": 4, "reset_every": 2, "network_steps": 1},
    distribution_matching: {"iterations": 4, "subset": 20, "windows": 4},
    trajectory_matching: {"iterations": 3, "subset": 20, "steps": 2},
}
RATES = (0.05, 0.05)


@pytest.fixture
def double(task, monkeypatch):
    """A float64 model, the logits (x, y) of a random S of 3 sequences, and S as a function of them."""
    monkeypatch.setattr(
        subsets, "soft_cross_entropy", lambda logits, y: -(y * logits.log_softmax(-1)).sum(-1).mean()
    )  # the library's computes in float32
    own = replace(task, catalogue=FrozenCatalogue(task.embeddings.clone()))  # the tests' is shared
    model = own.new_model(1).double().eval()
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(3, task.length, dtype=torch.bool)
    mask[1, 4:] = False
    anchors = torch.randint(task.n_items, mask.shape, generator=generator)
    subset = Subset.uniform(torch.arange(0, task.n_items, 2), task.n_items)
    size = len(subset.items)
    x = torch.randn(3, task.length, size + 1, generator=generator, dtype=torch.float64).mul(2).requires_grad_()
    y = torch.randn(int(mask.sum()), size, generator=generator, dtype=torch.float64).mul(2).requires_grad_()

    def batch_of(x, y):
        p = x.softmax(-1)
        return SyntheticBatch(subset, anchors, mask, p[..., :-1], p[..., -1], y.softmax(-1))

    return model, (x, y), batch_of


def check_by_differences(function, tensors, step=1e-5):
    """Autograd's gradient of `function(*tensors)` against a central difference along a random direction."""
    gradients = torch.autograd.grad(function(*tensors), tensors)
    generator = torch.Generator().manual_seed(7)
    directions = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors]
    high, low = (
        function(*((t + sign * step * d).detach().requires_grad_() for t, d in zip(tensors, directions)))
        for sign in (1, -1)
    )
    slope = sum((g * d).sum() for g, d in zip(gradients, directions))
    assert abs(float(slope)) > 1e-6
    assert float((high - low).detach() / (2 * step)) == pytest.approx(float(slope), rel=1e-6)


# -------------------------------------------------------------------------------- gradient


@pytest.mark.parametrize("by_row", [False, True])
def test_gradient_distance_against_loops(by_row):
    """One cosine per layer or per row; 0 for the same direction at any length, 2 for the opposite."""
    generator = torch.Generator().manual_seed(0)
    a, b = ([torch.randn(3, 4, generator=generator), torch.randn(2, 5, generator=generator)] for _ in range(2))
    total = 0.0
    for left, right in zip(a, b):
        pairs = zip(left.numpy(), right.numpy()) if by_row else [(left.numpy().ravel(), right.numpy().ravel())]
        total += sum(1 - u @ v / np.sqrt((u @ u) * (v @ v)) for u, v in pairs)
    assert float(gradient_distance(a, b, by_row)) == pytest.approx(total, abs=1e-6)
    assert float(gradient_distance(a, [3 * t for t in a], by_row)) == pytest.approx(0, abs=1e-6)
    assert float(gradient_distance(a, [-t for t in a], by_row)) == pytest.approx(10 if by_row else 4, abs=1e-6)
    assert float(gradient_distance([0 * a[0], a[1]], [b[0], a[1]], by_row)) == pytest.approx(0, abs=1e-6)


def test_gradient_matching_against_finite_differences(double, task):
    """The derivative of a distance between gradients, in float64."""
    model, tensors, batch_of = double
    generator = torch.Generator().manual_seed(3)
    real = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in matrices(model)]
    for by_row in (False, True):
        check_by_differences(lambda x, y: gradient_loss(model, batch_of(x, y), real, by_row), tensors)


def test_gradients_of_the_same_data_match(double):
    """Zero when S is what the real gradient was taken on."""
    model, (x, y), batch_of = double
    real = torch.autograd.grad(synthetic_loss(model, batch_of(x, y).detached()), matrices(model))
    assert float(gradient_loss(model, batch_of(x, y), real).detach()) == pytest.approx(0, abs=1e-12)
    assert float(gradient_loss(model, batch_of(x * 0.5, y), real).detach()) > 1e-3


# ---------------------------------------------------------------------------- distribution


def test_sequence_means_against_loops():
    """Every sequence weighs the same, whatever its length."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, 2, generator=generator)
    mask = torch.arange(5)[None] < torch.tensor([[5], [1], [3]])
    y, features = torch.rand(9, 4, generator=generator), torch.randn(4, 2, generator=generator)
    rows = iter(y)
    means, joints = [], []
    for h, real in zip(hidden, mask):
        pairs = [(h[t], next(rows) @ features) for t in range(5) if real[t]]
        means.append(torch.stack([state for state, _ in pairs]).mean(0))
        joints.append(torch.stack([torch.outer(state, target) for state, target in pairs]).mean(0))
    marginal, joint = sequence_means(hidden, mask, y, features)
    torch.testing.assert_close(marginal, torch.stack(means).mean(0))
    torch.testing.assert_close(joint, torch.stack(joints).mean(0))


def test_distribution_distance_is_zero_for_the_same_windows(task):
    """S = the real windows with the teacher's labels, inputs sharp: nothing is left to match."""
    pieces = coresets.candidates(task)[:8]
    start = coresets.with_labels(task, SyntheticSequences.from_windows(pieces, task.length))
    everything = sample_subset(task.n_items, 10**6, np.random.default_rng(0))
    real, model = make_batch(pieces), task.new_model(0).eval()
    targets = start.target_probabilities(task.embeddings)[start.mask]
    own = torch.ones(start.items.shape)
    batch = SyntheticBatch(everything, start.items, start.mask, torch.zeros(*own.shape, task.n_items), own, targets)
    assert float(distribution_loss(model, batch, real, targets, 1.0).detach()) == pytest.approx(0, abs=1e-10)
    other = make_batch(coresets.candidates(task)[8:16])
    shuffled = targets.roll(1, 0)
    assert (
        float(distribution_loss(model, batch, real, shuffled, 1.0).detach()) > 1e-5
    )  # the joint means see the targets
    assert float(distribution_loss(model, batch, real, shuffled, 0.0).detach()) == pytest.approx(0, abs=1e-10)
    elsewhere = torch.full((len(other.targets), task.n_items), 1 / task.n_items)
    assert float(distribution_loss(model, batch, other, elsewhere, 0.0).detach()) > 1e-3


def test_without_joint_means_labels_stay(task):
    """Mean hidden states depend on inputs alone."""
    start = kd_start(task, 3, seed=0)
    result = distribution_matching(task, 3, 0, conditional=0.0, **METHODS[distribution_matching])
    assert torch.equal(result.labels, start.labels)
    both = distribution_matching(task, 3, 0, **METHODS[distribution_matching])
    assert not torch.equal(both.labels, start.labels) and not torch.equal(both.queries, result.queries)


# ------------------------------------------------------------------------------ trajectory


def steps_of(optimizer, model, batch, steps):
    """Weights after `steps` steps of one of torch's optimisers on L_syn."""
    for _ in range(steps):
        optimizer.zero_grad()
        synthetic_loss(model, batch).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("adam", [False, True])
def test_unrolled_steps_are_torchs_and_reach_distance_zero(double, adam):
    """θ_N(S) equals N steps of torch.optim; a target made by such steps is at distance 0, the start at 1."""
    model, (x, y), batch_of = double
    begin = {name: p.detach().clone() for name, p in model.named_parameters()}
    rate = 0.005 if adam else 0.1
    kind, constants = (torch.optim.Adam, {"eps": 1e-12}) if adam else (torch.optim.SGD, {})
    optimizer = kind(model.parameters(), lr=rate, **constants)
    target = steps_of(optimizer, model, batch_of(x, y).detached(), 3)
    end = unroll(model, begin, batch_of(x, y), 3, torch.tensor(rate, dtype=torch.float64), adam, epsilon=1e-12)
    for name in target:
        torch.testing.assert_close(end[name], target[name], rtol=0, atol=1e-7)
    assert float(trajectory_distance(end, target, begin).detach()) < 1e-8
    assert float(trajectory_distance(begin, target, begin)) == 1


@pytest.mark.parametrize("adam", [False, True])
def test_trajectory_matching_against_finite_differences(double, adam):
    """Through two unrolled steps, with respect to inputs, labels and step size, in float64."""
    model, (x, y), batch_of = double
    begin = {name: p.detach() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    target = {n: w + 0.01 * torch.randn(w.shape, generator=generator, dtype=w.dtype) for n, w in begin.items()}
    rate = torch.tensor(0.01 if adam else 0.5, dtype=torch.float64).requires_grad_()

    def distance(x, y, rate):
        return trajectory_distance(unroll(model, begin, batch_of(x, y), 2, rate, adam), target, begin)

    # Adam's first step is almost a sign: entries with tiny gradients bend within the difference.
    check_by_differences(distance, (x, y, rate), step=3e-8 if adam else 1e-5)


def test_a_short_trajectory_is_refused(task):
    with pytest.raises(FosterError, match="checkpoints of 40 epochs, the full-data run has 30"):
        trajectory_matching(task, 3, seed=0, checkpoints=1, expert_epochs=40)


# ---------------------------------------------------------------------- learning and starts


@pytest.mark.parametrize("kind", ["gradient", "distribution", "trajectory"])
def test_each_objective_falls(task, kind):
    """With model, windows and subset held fixed, descending an objective lowers it clearly."""
    everything = sample_subset(task.n_items, 10**6, np.random.default_rng(0))
    real, _, targets = draw_real(task, 16, 10**6, True, np.random.default_rng(0))
    model = task.new_model(0).eval()
    model.load_state_dict(task.trajectory[2])
    names = dict(model.named_parameters())
    begin, target = ({n: task.trajectory[epoch][n] for n in names} for epoch in (2, 3))
    gradients = torch.autograd.grad(real_loss(model, real, everything, task.teacher), matrices(model))

    def objective(synthetic, generator):
        batch = synthetic.batch(everything)
        if kind == "gradient":
            return gradient_loss(model, batch, gradients)
        if kind == "distribution":
            return distribution_loss(model, batch, real, targets, 1.0)
        return trajectory_distance(unroll(model, begin, batch, 3, torch.tensor(5e-3), True), target, begin)

    _, losses = descend(
        task,
        kd_start(task, 3, seed=0),
        objective,
        iterations=40,
        seed=0,
        rates=RATES,
    )
    assert losses[-1] < {"gradient": 0.8, "distribution": 0.8, "trajectory": 0.97}[kind] * losses[0]


def test_the_learned_step_size_moves(task):
    """What is learned beside S follows its own gradient."""
    beside = torch.tensor(1.0).requires_grad_()
    start = kd_start(task, 3, seed=0)
    descend(
        task,
        start,
        lambda synthetic, _: (beside - 2).square() + 0 * synthetic.z_y.sum(),
        iterations=20,
        seed=0,
        also=[beside],
        rates=RATES,
    )
    assert 1.15 < float(beside.detach()) < 1.25  # 20 steps of Adam at rate 0.01 towards 2


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_methods_start_where_foster_does_and_are_reproducible(task, method):
    """Anchors and positions are those of FOSTER's start, with a history in each of two windows; the result follows the
    seed alone.
    """
    task = replace(task, synthetic_length=2 * task.length)
    start = kd_start(task, 3, seed=0)
    torch.manual_seed(0)
    first = method(task, sequences=3, seed=0, **METHODS[method])
    torch.manual_seed(1)
    second = method(task, sequences=3, seed=0, **METHODS[method])
    assert torch.equal(first.items, start.items) and torch.equal(first.mask, start.mask)
    assert torch.equal(first.labels, second.labels) and torch.equal(first.queries, second.queries)
    assert not torch.equal(first.labels, start.labels)
    assert not torch.equal(first.labels, method(task, sequences=3, seed=1, **METHODS[method]).labels)
    untouched = method(task, sequences=3, seed=0, **{**METHODS[method], "iterations": 0})
    assert torch.equal(untouched.labels, start.labels)


def test_start_without_a_teacher(task, tmp_path):
    """Real sequences, each label peaked at the real next item; no teacher is read."""
    for path in task.trajectory_folder.glob("epoch-*"):
        (tmp_path / path.name).symlink_to(path)
    alone = replace(task, trajectory_folder=tmp_path)
    start = start_sequences(alone, 5, 0, "real")
    assert torch.equal(start.items, coresets.random(task, 5, 0).items)
    best = start.target_probabilities(task.embeddings)[start.mask].argmax(-1)
    assert torch.equal(best, start.targets[start.mask])
    for method, parameters in METHODS.items():
        assert method(alone, 3, 0, start="real", **parameters).labels is not None
    with pytest.raises(FosterError, match="no full-data model"):
        start_sequences(alone, 5, 0, "teacher")
    with pytest.raises(FosterError, match="unknown start"):
        start_sequences(task, 5, 0, "teachers")


def test_real_targets_over_the_subset(task):
    """Hard targets join the subset; soft ones are the teacher's softmax over it."""
    real, subset, hard = draw_real(task, 4, 5, False, np.random.default_rng(0))
    assert torch.equal(subset.items[hard.argmax(-1)], real.targets) and (hard.sum(-1) == 1).all()
    assert ((subset.log_weight == 0) == torch.isin(subset.items, real.targets)).all()
    real, subset, soft = draw_real(task, 4, 20, True, np.random.default_rng(0))
    model = task.new_model(0).eval()
    hidden = model(real.inputs, model.features())[real.mask]
    ours = soft_cross_entropy(model.scores(hidden, model.features(subset.items)), soft)
    torch.testing.assert_close(ours, real_loss(model, real, subset, task.teacher))


def test_divergence_is_named(task):
    with pytest.raises(FosterError, match="lower the learning rates"):
        trajectory_matching(task, 3, 0, **{**METHODS[trajectory_matching], "rate": 1e30})
