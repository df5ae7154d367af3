"""Labels of several models in the terms of one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from foster_lib import coresets
from foster_lib.condense import BITS, condensed, divergence, least_squares, nearest_queries
from foster_lib.ensemble import Ensemble
from foster_lib.sasrec import adapt
from foster_lib.starts import start_sequences
from foster_lib.subsets import likeness_scores, sample_subset
from foster_lib.synthetic import SyntheticSequences

READINGS, LENGTH = 3, 6


@pytest.fixture(scope="module")
def models(task):
    """The teacher and two of its earlier checkpoints."""
    found = [task.teacher]
    for epoch in (5, 12):
        found.append(task.new_model(0).eval().requires_grad_(False))
        found[-1].load_state_dict(task.trajectory[epoch])
    return found


def taught_by(task, labeller):
    """The task with sequences of two windows, three readings and successors, labelled by `labeller`."""
    own = replace(task, synthetic_length=2 * LENGTH, readings=READINGS, successors=True)
    own.__dict__["labeller"] = labeller
    return own


@pytest.fixture(scope="module")
def taught(task, models):
    return taught_by(task, Ensemble(models))


@pytest.fixture(scope="module")
def exact(taught) -> SyntheticSequences:
    """Exact labels of sequences some of whose positions are empty."""
    chosen = coresets.k_means(taught, 6, 0)
    assert not chosen.mask.all()
    return coresets.with_exact_labels(taught, chosen)


@pytest.fixture(scope="module")
def small(task, taught, exact) -> SyntheticSequences:
    return condensed(exact, task.teacher.adapter_weights(), taught.embeddings)


def told(sequences: SyntheticSequences, embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
    """Log probabilities of all that S tells: labels of each reading, likeness, successors; each (…, |V|)."""
    f, everything = sequences.features(embeddings), sample_subset(len(embeddings), len(embeddings), None)
    logits = {}
    for number in range(sequences.readings):
        reading = sequences.reading(number)
        logits[f"reading {number}"] = reading.labels[reading.mask] @ f.T
    logits["likeness"] = likeness_scores(f, torch.arange(len(f)), sequences.alike, everything)
    logits["successors"] = F.pad(f, (0, 1), value=1.0) @ sequences.successors @ f.T
    return {name: scores.double().log_softmax(-1) for name, scores in logits.items()}


def distances(found: SyntheticSequences, exact: SyntheticSequences, embeddings: torch.Tensor) -> dict[str, float]:
    """Mean KL divergence of each part, by its formula."""
    parts, of_exact = told(found, embeddings), told(exact, embeddings)
    return {name: float((p.exp() * (p - parts[name])).sum(-1).mean()) for name, p in of_exact.items()}


def test_all_that_is_told_is_told_in_the_width_of_one(task, taught, exact, small):
    """Every part is many times nearer to the three models' than the one teacher's own is, or than no fit is."""
    d = task.model_settings.width
    assert exact.labels.shape[-1] == 3 * d and small.labels.shape[-1] == small.further_labels.shape[-1] == d
    assert small.successors.shape == (d + 1, d) and small.features(taught.embeddings).shape == (task.n_items, d)
    alone = coresets.with_exact_labels(taught_by(task, task.teacher), coresets.k_means(taught, 6, 0))
    unfitted = condensed(exact, task.teacher.adapter_weights(), taught.embeddings, steps=0)
    after, others = distances(small, exact, taught.embeddings), (alone, unfitted)
    assert len(after) == READINGS + 2
    for other in others:
        for name, distance in distances(other, exact, taught.embeddings).items():
            assert after[name] < 0.25 * distance, name


def test_nothing_but_labels_changes(exact, small):
    """The same items in the same orders, the same sharpness of likeness; empty positions have none."""
    for name in ("items", "mask", "targets", "orders", "alike"):
        assert torch.equal(getattr(small, name), getattr(exact, name)), name
    assert not small.labels[~small.mask].any() and not small.further_labels[~small.mask].any()
    assert small.bits == BITS == 8 and small.stored().bits == 8


def test_bytes_do_not_show(taught, exact, small):
    """Rounded to bytes, a sixth of the size, labels are nearly as near."""
    before, after = (distances(each, exact, taught.embeddings) for each in (small, small.stored()))
    for name in before:
        assert after[name] < before[name] + 2e-3, name
    adapters = sum(tensor.numel() for tensor in exact.adapter.values())
    assert adapters and small.size_in_bytes() < exact.size_in_bytes() / 3


def test_one_model_is_told_without_a_loss(task, taught):
    """Labels that are in these terms already are found by least squares and stay."""
    one = coresets.with_exact_labels(taught_by(task, task.teacher), coresets.k_means(taught, 6, 0))
    for steps in (0, 100):
        again = condensed(one, task.teacher.adapter_weights(), taught.embeddings, steps=steps)
        assert max(distances(again, one, taught.embeddings).values()) < 2e-3


def test_less_may_be_told(taught, exact):
    """One reading, no successors, no likeness: what is absent stays so."""
    less = replace(exact, further_labels=None, orders=None, successors=None, alike=None)
    found = condensed(less, taught.teacher.adapter_weights(), taught.embeddings, steps=20)
    assert found.further_labels is found.successors is found.alike is None and found.readings == 1


def test_the_teacher_is_left_alone_and_the_fit_repeats(taught, exact):
    """Weights given are copied; two fits are equal bit by bit, also where gradients are off."""
    given = taught.teacher.adapter_weights()
    first = condensed(exact, given, taught.embeddings, steps=10)
    with torch.no_grad():
        second = condensed(exact, given, taught.embeddings, steps=10)
    assert all(torch.equal(a, b) for a, b in zip(first.tensors().values(), second.tensors().values()))
    assert not any(tensor.requires_grad for tensor in first.tensors().values())
    assert all(torch.equal(given[name], tensor) for name, tensor in taught.teacher.adapter_weights().items())
    assert not torch.equal(first.adapter["linear.weight"], given["linear.weight"])


def test_rows_with_labels_have_condensed_ones(task, taught):
    """Of several models, coresets and FOSTER's start; of one model, its own exact ones."""
    for sequences in (coresets.kd(taught, 4, 0), start_sequences(taught, 4, 0)):
        assert sequences.bits == 8 and sequences.labels.shape[-1] == task.model_settings.width
    single = taught_by(task, task.teacher)
    assert coresets.kd(single, 4, 0).bits == 16
    exactly = coresets.with_exact_labels(single, coresets.k_means(single, 4, 0))
    assert torch.equal(coresets.kd(single, 4, 0).labels, exactly.labels)


def test_hard_labels_of_several_models(taught):
    """They stand in the condensed features: the next item is the most probable one."""
    hard = start_sequences(taught, 4, 0, labels="hard")
    y = hard.target_probabilities(taught.embeddings)[hard.mask]
    assert (y.argmax(-1) == hard.targets[hard.mask]).all()


def test_least_squares_against_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 4)), rng.normal(size=(50, 7))
    expected = np.linalg.lstsq(np.vstack([a, 0.1 * np.eye(4)]), np.vstack([b, np.zeros((4, 7))]), rcond=None)[0]
    found = least_squares(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_nearest_queries_leave_probabilities_as_they_are(task):
    """Of features that the others are linear in, a constant besides: the softmax does not see it."""
    g = torch.Generator().manual_seed(0)
    f = 10 * adapt(task.embeddings, task.teacher.adapter_weights())
    known = f @ torch.randn(f.shape[1], 9, generator=g) + torch.randn(9, generator=g)
    z = torch.randn(2, 5, 9, generator=g)
    expected, found = (z @ known.T).softmax(-1), (nearest_queries(z, known, f) @ f.T).softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-2)


def test_divergence_by_its_formula():
    """KL(p ‖ q) = Σ p log p/q, p first, mean over rows; no NaN where p is 0."""
    p, q = (torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    a, b = p.double().softmax(-1), q.double().softmax(-1)
    assert float(divergence(p, q)) == pytest.approx(float((a * (a / b).log()).sum(-1).mean()), rel=1e-5)
    p[0, 0] = q[0, 0] = -1e4
    assert torch.isfinite(divergence(p, q))
