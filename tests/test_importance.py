"""Subsets by importance against expectations by hand, and inside FOSTER."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from foster_lib import coresets
from foster_lib.errors import FosterError
from foster_lib.foster import FosterSettings, Synthesizer, distill
from foster_lib.importance import ImportanceSampler, expected_draws, label_mass
from foster_lib.penalty import Pair
from foster_lib.subsets import sample_subset
from foster_lib.training import make_batch

FAST = FosterSettings(iterations=4, subset=12, importance=0.5, windows=4, pool=1, inner_steps=2)
MASS = torch.tensor([40.0, 0, 0, 1, 0, 3, 0, 0, 6, 0])


@pytest.fixture
def start(task):
    return coresets.kd(task, 3, seed=0)


@pytest.mark.parametrize(("share", "size"), [(0.0, 4), (0.0, 8), (0.3, 4), (0.3, 8), (0.8, 4), (1.0, 4)])
def test_a_weighted_sum_estimates_that_of_the_catalogue(share, size):
    """Each weight is 1 in the mean, 0 where an item was not drawn; with share 1 those without mass never are."""
    generator, total = np.random.default_rng(0), np.zeros(10)
    sampler = ImportanceSampler(MASS, size, share)
    for _ in range(8000):
        subset = sampler.draw(generator)
        items = subset.items.numpy()
        assert (np.diff(items) > 0).all() and len(items) <= size
        total[items] += subset.log_weight.exp().numpy()
    reachable = (MASS.numpy() > 0) | (share < 1)
    np.testing.assert_allclose(total / 8000, reachable.astype(float), atol=0.12)


def test_expected_draws_are_in_proportion_but_never_more_than_one():
    q = np.array([0.5, 0.2, 0.2, 0.05, 0.05])
    np.testing.assert_allclose(expected_draws(q, 1), q)
    # The first takes one of the three draws; the next two would then have 0.8 each.
    np.testing.assert_allclose(expected_draws(q, 3), [1, 0.8, 0.8, 0.2, 0.2])
    # Four: the second and third reach 1 as well, and the last two share what is left.
    np.testing.assert_allclose(expected_draws(q, 4), [1, 1, 1, 0.5, 0.5])
    np.testing.assert_allclose(expected_draws(q, 9), np.ones(5))


def test_what_has_most_mass_is_always_there_and_stands_for_itself():
    sampler = ImportanceSampler(MASS, 4, 0.8)
    for seed in range(50):
        subset = sampler.draw(np.random.default_rng(seed))
        assert 0 in subset.items and float(subset.log_weight[subset.items == 0]) == 0.0


def test_without_a_share_all_items_are_alike():
    """As uniform draws are, but for the strata: one of the first two items, one of the next two, ..."""
    generator, counts = np.random.default_rng(0), np.zeros(10)
    sampler = ImportanceSampler(MASS, 5, 0.0)
    for _ in range(2000):
        subset = sampler.draw(generator)
        torch.testing.assert_close(subset.log_weight.exp(), torch.full((5,), 2.0))
        assert (subset.items.numpy() // 2).tolist() == [0, 1, 2, 3, 4]
        counts[subset.items.numpy()] += 1
    np.testing.assert_allclose(counts / 2000, 0.5, atol=0.05)


@pytest.mark.parametrize("size", [10, 1000])
def test_all_items_are_drawn_where_there_are_no_more(size):
    subset = ImportanceSampler(MASS, size, 0.5).draw(np.random.default_rng(0))
    assert subset.items.tolist() == list(range(10)) and subset.log_weight.eq(0).all()


def test_label_mass_is_the_sum_of_the_softmaxes():
    generator = torch.Generator().manual_seed(0)
    labels, f = torch.randn(7, 5, generator=generator), torch.randn(30, 5, generator=generator)
    expected = (labels.double() @ f.double().T).softmax(-1).sum(0)
    for at_once in (2, 7, 100):
        torch.testing.assert_close(label_mass(labels, f, at_once), expected, rtol=1e-5, atol=1e-6)


def test_foster_draws_what_its_labels_hold(task, start):
    """More of the labels' probability than uniform draws of as many items, which stand for the whole catalogue."""
    synthetic = Synthesizer(start, task.embeddings, FAST)
    y = start.target_probabilities(task.embeddings)[start.mask]
    generator, held, uniform = np.random.default_rng(0), [], []
    for _ in range(300):
        subset = synthetic.draw(generator)
        assert len(subset.items) <= FAST.subset
        held.append(float(y[:, subset.items].sum(-1).mean()))
        uniform.append(float(y[:, sample_subset(task.n_items, FAST.subset, generator).items].sum(-1).mean()))
    assert np.mean(held) > 1.3 * np.mean(uniform)


def test_the_real_loss_reads_the_same_items(task, start):
    """No others: a step costs the same for any catalogue."""
    synthetic = Synthesizer(start, task.embeddings, FAST)
    subset, windows = synthetic.draw(np.random.default_rng(0)), make_batch(task.windows[:5])
    assert FAST.judged(subset, windows, task.teacher) is subset
    assert torch.isin(windows.targets, FAST.judged(subset, windows, None).items).all()


def test_all_items_by_importance_are_all_items(task, start):
    """With N = |V| the gradient is that of the full softmax, whatever the share."""
    gradients = []
    for share in (0.0, 0.7):
        synthetic = Synthesizer(start, task.embeddings, replace(FAST, subset=10**6, importance=share))
        subset = synthetic.draw(np.random.default_rng(1))
        pair = Pair(task, FAST, 0)
        pair.reset(task.trajectory[0])
        windows = make_batch(task.windows[:4])
        gradients.append(pair.gradient(synthetic, synthetic.batch(subset), lambda: windows, task.teacher)[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_distilling_with_importance_moves_the_sequences(task, start):
    found = distill(task, start, FAST, seed=0)[0]
    again = distill(task, start, FAST, seed=0)[0]
    uniform = distill(task, start, replace(FAST, importance=0.0), seed=0)[0]
    assert torch.equal(found.labels, again.labels)
    assert not torch.equal(found.labels, start.labels) and not torch.equal(found.labels, uniform.labels)


def test_each_reading_has_its_own_draws(task):
    start = coresets.kd(replace(task, readings=3), 3, seed=0)
    synthetic = Synthesizer(start, task.embeddings, FAST)
    assert len(synthetic.samplers) == start.readings
    for number, sampler in enumerate(synthetic.samplers):
        reading = start.reading(number)
        mass = label_mass(reading.labels[reading.mask], synthetic.f)
        expected = ImportanceSampler(mass, FAST.subset, FAST.importance).expected
        np.testing.assert_array_equal(sampler.expected, expected)
    synthetic.number = 2
    drawn, expected = (each.draw(np.random.default_rng(0)).log_weight for each in (synthetic, synthetic.samplers[2]))
    assert torch.equal(drawn, expected)
    assert not torch.equal(drawn, synthetic.samplers[0].draw(np.random.default_rng(0)).log_weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"importance": 1.5}, "from 0 to 1, not 1.5"), ({"importance": 0.5, "probable": True}, "set one of the two")],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(FosterError, match=message):
        FosterSettings(**change)
