"""GORACS: transport against linear programming, bounds against brute force, toy selections."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from foster_lib import goracs as module
from foster_lib.coresets import candidates
from foster_lib.encoder import FrozenCatalogue
from foster_lib.goracs import exchange, exchange_bounds, goracs, greedy_start, newcomer_terms, outsiders, transport
from foster_lib.splits import Queries
from tests.test_selection import rows


def random_cost(seed, shape=(12, 9)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(shape[0], 2)), rng.normal(size=(shape[1], 2))
    return np.linalg.norm(a[:, None] - b, axis=-1) - 0.1 * rng.random((shape[0], 1))


def linear_program(cost) -> float:
    """min Σ π_ij c_ij over couplings π of the uniform masses, by scipy's solver."""
    n, m = cost.shape
    rows_ = np.kron(np.eye(n), np.ones(m))
    columns = np.kron(np.ones(n), np.eye(m))
    masses = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    return linprog(cost.ravel(), A_eq=np.vstack([rows_, columns]), b_eq=masses).fun


# ------------------------------------------------------------------------------ transport


@pytest.mark.parametrize("seed", range(4))
def test_transport_equals_linear_program(seed):
    """The value is that of the linear program; the potentials attain it in the dual."""
    cost, chosen = random_cost(seed), np.array([7, 0, 3, 11])
    value, potentials = transport(cost, chosen)
    assert value == pytest.approx(linear_program(cost[chosen]), abs=1e-10)
    dual = potentials.mean() + (cost[chosen] - potentials[:, None]).min(0).mean()
    assert dual == pytest.approx(value, abs=1e-10)


def test_transport_of_one_and_of_equal_sets():
    """One row receives everything; equal point sets are moved for nothing."""
    cost = random_cost(0)
    assert transport(cost, np.array([2]))[0] == pytest.approx(cost[2].mean())
    points = np.random.default_rng(1).normal(size=(5, 2))
    same = np.linalg.norm(points[:, None] - points, axis=-1)
    assert transport(same, np.arange(5))[0] == pytest.approx(0, abs=1e-12)


# ------------------------------------------------------------------------------- greedy


def test_greedy_equals_naive():
    """Every step minimises Σ_j min_{i ∈ S} c_ij among the rows left."""
    cost, chosen = random_cost(2), []
    for _ in range(5):
        left = [i for i in range(12) if i not in chosen]
        chosen.append(min(left, key=lambda i: cost[[*chosen, i]].min(0).sum()))
    assert greedy_start(cost, 5).tolist() == chosen
    assert sorted(greedy_start(cost, 12).tolist()) == list(range(12))


# ------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize(("m", "n"), [(9, 4), (8, 4), (7, 2), (3, 5), (6, 1)])
def test_newcomer_term_is_the_maximum(m, n):
    """No y is better than the order statistic: the concave function is scanned at all its kinks."""
    difference = np.random.default_rng(m * n).normal(size=(6, m))
    for row, found in zip(difference, newcomer_terms(difference, n)):
        assert found == pytest.approx(max(y / n + np.minimum(row - y, 0).mean() for y in row))
        for y in np.linspace(row.min() - 1, row.max() + 1, 101):
            assert y / n + np.minimum(row - y, 0).mean() <= found + 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_exchange_bounds_are_lower_bounds(seed):
    """No exchange transports for less than its bound; the bound of putting a member back is the value."""
    cost = random_cost(seed)
    chosen = np.array([1, 4, 6, 8])
    outer = np.setdiff1d(np.arange(12), chosen)
    value, potentials = transport(cost, chosen)
    bounds = exchange_bounds(cost, chosen, potentials, outer)
    actual = np.array([[transport(cost, np.append(np.delete(chosen, i), o))[0] for o in outer] for i in range(4)])
    assert (bounds <= actual + 1e-9).all()
    assert np.corrcoef(bounds.ravel(), actual.ravel())[0, 1] > 0.8
    back = exchange_bounds(cost, chosen, potentials, chosen)
    np.testing.assert_allclose(np.diag(back), value, atol=1e-9)


def test_outsiders_are_the_promising_rows():
    """Rows on top of unserved targets come first; members never come."""
    points = np.array([[0.0], [10.0], [10.5], [50.0], [0.2]])
    targets = np.array([[0.0], [0.1], [10.0], [10.4]])
    cost = np.abs(points - targets.T)
    chosen = np.array([0, 4])
    found = outsiders(cost, chosen, transport(cost, chosen)[1], 2)
    assert set(found.tolist()) == {1, 2}


# ------------------------------------------------------------------------------ exchange


@pytest.mark.parametrize("seed", range(6))
def test_exchange_ends_where_no_exchange_pays(seed):
    """Values fall; with all outsiders listed, brute force finds no better exchange; near the best of all sets."""
    cost = random_cost(seed)
    start = greedy_start(cost, 3)
    chosen, values = exchange(cost, start, 100, 12)
    assert all(b < a for a, b in itertools.pairwise(values))
    assert values[0] == pytest.approx(transport(cost, start)[0])
    assert values[-1] == pytest.approx(transport(cost, chosen)[0])
    for i, o in itertools.product(range(3), np.setdiff1d(np.arange(12), chosen)):
        assert transport(cost, np.append(np.delete(chosen, i), o))[0] >= values[-1] - 1e-9
    best = min(transport(cost, np.array(s))[0] for s in itertools.combinations(range(12), 3))
    assert best - 1e-9 <= values[-1] <= best + 0.05 * abs(best)


def test_exchange_finds_the_known_answer_from_the_worst_start():
    """Targets in three equal clumps with a candidate on each: these three, whatever the start."""
    points = np.array([0.0, 10.0, 20.0, 3.0, 13.0, 40.0, -30.0, 25.0])
    targets = np.repeat([0.0, 10.0, 20.0], 4)
    cost = np.abs(points[:, None] - targets)
    chosen, values = exchange(cost, np.array([5, 6, 7]), 100, 8)
    assert set(chosen.tolist()) == {0, 1, 2} and values[-1] == pytest.approx(0)
    limited, values = exchange(cost, np.array([5, 6, 7]), 1, 8)
    assert len(values) == 2 and len(set(limited.tolist()) & {5, 6, 7}) == 2


# ------------------------------------------------------------------------------ the method


@pytest.fixture
def clumps(task):
    """Three groups of ten items with one text each; windows and queries stay within a group.

    Validation: two of four queries in group 0, one each in groups 1 and 2; windows: most in group 1.
    """
    group = np.repeat(np.arange(3), 10)
    embeddings = torch.eye(3).repeat_interleave(10, 0)
    rng = np.random.default_rng(0)
    owners = [0] * 4 + [1] * 12 + [2] * 4
    train = [np.flatnonzero(group == g)[rng.permutation(10)[:5]] for g in owners]
    wanted = [0, 0, 1, 2] * 3
    histories = [np.flatnonzero(group == g)[:4] for g in wanted]
    validation = Queries(np.arange(12), histories, np.array([10 * g + 9 for g in wanted]))
    return replace(task, train=train, validation=validation, catalogue=FrozenCatalogue(embeddings))


def test_goracs_matches_the_validation_set(clumps):
    """Four windows: two of group 0, one of each other group, the proportions of the validation set."""
    for seed in range(3):
        chosen = rows(goracs(clumps, 4, seed, gradient_weight=0.0))
        assert sorted(row[0] // 10 for row in chosen) == [0, 0, 1, 2]
        assert len(set(chosen)) == 4


def test_goracs_reads_the_validation_targets(clumps):
    """With targets in group 2 after histories of group 0, windows that mix both are nearest."""
    mixed = np.array([0, 1, 2, 3, 29])
    queries = Queries(np.arange(12), [np.arange(4)] * 12, np.full(12, 29))
    chosen = goracs(replace(clumps, train=[*clumps.train, mixed], validation=queries), 1, 0, gradient_weight=0.0)
    assert rows(chosen) == [tuple(mixed.tolist())]


def test_goracs_prefers_large_gradients(clumps, monkeypatch):
    """Among windows of equal text those of the largest gradient per target are taken."""
    gradients = np.random.default_rng(3).random(20)
    monkeypatch.setattr(module, "gradient_norms", lambda model, pool: gradients * [len(w) - 1 for w in pool])
    chosen = set(rows(goracs(clumps, 4, 0, gradient_weight=0.1)))
    best = [*np.argsort(-gradients[:4])[:2], 4 + gradients[4:16].argmax(), 16 + gradients[16:].argmax()]
    assert chosen == {tuple(candidates(clumps)[i].tolist()) for i in best}


def test_goracs_as_a_whole(task):
    """Distinct windows, repeatable, on samples of windows and queries."""
    options = dict(windows=25, targets=20)
    first, second = (goracs(task, 6, 1, **options) for _ in range(2))
    assert rows(first) == rows(second) and len(set(rows(first))) == 6
    assert len(goracs(task, 6, 1, windows=2)) == 6  # a sample is never smaller than the budget
