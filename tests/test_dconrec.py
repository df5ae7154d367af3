"""DConRec: estimator by enumeration, projection by quadratic programming, the choice on planted noise."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from foster_lib import dconrec
from foster_lib.dconrec import Interactions, augment, candidates, condense, most_probable, policy_gradient, project
from foster_lib.errors import FosterError
from foster_lib.methods import check_parameters
from foster_lib.training import make_batch

FAST = {"iterations": 4, "masks": 2, "windows": 8, "pool": 2.0, "added": 2, "batch_size": 8}

LOOP = {"masks": 4, "windows": 60, "checkpoints": 1, "batch_size": 16, "inner_learning_rate": 5e-3, "seed": 0}


def rows(chosen) -> list[tuple]:
    """Each sequence as the tuple of its items."""
    return [
        (*items[mask].tolist(), int(targets[mask][-1]))
        for items, mask, targets in zip(chosen.items, chosen.mask, chosen.targets)
    ]


def is_subsequence(short, long) -> bool:
    remaining = iter(long)
    return all(item in remaining for item in short)


# ----------------------------------------------------------------- estimator and projection


@pytest.mark.parametrize("K, C", [(2, 4), (3, 3)])
def test_policy_gradient_is_unbiased(K, C):
    """Its expectation over all K-tuples of masks of C Bernoullis is ∇_s E[L], by enumeration."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=C)), dtype=torch.float64)
    losses = torch.randn(2**C, generator=generator, dtype=torch.float64)
    s = torch.tensor([0.2, 0.5, 0.9, 0.35][:C], dtype=torch.float64, requires_grad=True)
    probability = (masks * s + (1 - masks) * (1 - s)).prod(1)
    (truth,) = torch.autograd.grad(probability @ losses, s, retain_graph=True)
    expected = torch.zeros(C, dtype=torch.float64)
    for drawn in itertools.product(range(2**C), repeat=K):
        drawn = list(drawn)
        estimate = policy_gradient(losses[drawn], masks[drawn], s.detach())
        expected += probability.detach()[drawn].prod() * estimate
    torch.testing.assert_close(expected, truth, rtol=1e-10, atol=1e-12)


def test_policy_gradient_ignores_a_constant_and_certain_interactions():
    """The baseline takes a constant out of every single estimate; s of 0 and 1 stay finite."""
    masks = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    s = torch.tensor([0.0, 1.0, 0.25], dtype=torch.float64)
    losses = torch.tensor([2.0, 3.0], dtype=torch.float64)
    estimate = policy_gradient(losses, masks, s)
    torch.testing.assert_close(policy_gradient(losses + 100, masks, s), estimate)
    # (L1 − mean) (1 − s)/(s (1 − s)) + (L2 − mean) (0 − s)/(s (1 − s)) = −0.5 · 4 − 0.5 · 4/3
    torch.testing.assert_close(estimate, torch.tensor([0.0, 0.0, -2 - 2 / 3], dtype=torch.float64))
    with pytest.raises(FosterError, match="at least two"):
        policy_gradient(losses[:1], masks[:1], s)


@pytest.mark.parametrize("seed", range(6))
def test_projection_against_quadratic_programming(seed):
    """The nearest point of the constraints, as SLSQP finds it; with the budget active and not."""
    generator = np.random.default_rng(seed)
    point, budget = generator.normal(0.4, 0.6, size=8), [1.5, 3.0, 7.9][seed % 3]
    found = project(torch.from_numpy(point), budget).numpy()
    solved = minimize(
        lambda x: ((x - point) ** 2).sum(),
        np.full(8, budget / 8),
        jac=lambda x: 2 * (x - point),
        bounds=[(0, 1)] * 8,
        constraints={"type": "ineq", "fun": lambda x: budget - x.sum(), "jac": lambda x: -np.ones(8)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert solved.success
    np.testing.assert_allclose(found, solved.x, atol=1e-6)
    assert found.sum() <= budget + 1e-9 and found.min() >= 0 and found.max() <= 1


# ------------------------------------------------------------------------------ candidates


def test_pieces_against_a_loop():
    """Kept interactions by sequence and in order; lone ones fall out."""
    generator = np.random.default_rng(0)
    sources = [generator.integers(40, size=n) for n in (5, 2, 7, 1, 4)]
    interactions = Interactions.of(sources, [np.zeros(len(p), bool) for p in sources], np.zeros(5, bool))
    for _ in range(20):
        mask = generator.random(len(interactions)) < 0.4
        expected, start = [], 0
        for piece in sources:
            kept = [int(i) for i, m in zip(piece, mask[start : start + len(piece)]) if m]
            expected += [kept] if len(kept) > 1 else []
            start += len(piece)
        assert [p.tolist() for p in interactions.pieces(mask)] == expected
    assert interactions.pieces(np.zeros(len(interactions), bool)) == []


def test_augmentation_adds_what_the_proxy_rates_highest(task):
    """Unseen items by their best probability along the sequence, each behind the position of that best."""
    piece = task.train[0][-6:]
    items, added = augment(task.teacher, piece, 3)
    assert items[~added].tolist() == piece.tolist() and added.sum() == 3
    features = task.teacher.features()
    best = {}
    for item in set(range(task.n_items)) - set(piece.tolist()):
        scores = []
        for position in range(len(piece)):
            hidden = task.teacher(torch.from_numpy(piece[: position + 1])[None], features)[0, -1]
            scores.append(float(task.teacher.scores(hidden[None], features).log_softmax(-1)[0, item]))
        best[item] = (max(scores), int(np.argmax(scores)))
    expected = sorted(best, key=lambda item: -best[item][0])[:3]
    assert set(items[added].tolist()) == set(expected)
    for place in np.flatnonzero(added):
        assert (~added[:place]).sum() == best[int(items[place])][1] + 1
    items, added = augment(task.teacher, piece, 0)
    assert items.tolist() == piece.tolist() and not added.any()
    check_parameters("dconrec", {"added": 0})


def test_candidates_fill_the_pool_and_keep_tail_users_within_their_share(task):
    """Tail users count inside the budget, are not augmented, and never take more than their share."""
    found = candidates(task, budget=40, pool=3.0, added=1, tail=9, compensation=0.5, seed=0)
    assert (~found.added).sum() >= 120
    assert 0 < found.fixed.sum() <= 20 and not (found.fixed & found.added).any()
    real = {tuple(s[-task.length :].tolist()) for s in task.train if len(s) <= 9}
    for sequence in np.unique(found.sequence[found.fixed]):
        assert tuple(found.item[found.sequence == sequence].tolist()) in real
    none = candidates(task, budget=40, pool=3.0, added=1, tail=9, compensation=0.0, seed=0)
    assert not none.fixed.any()
    with pytest.raises(FosterError, match="lower `added`"):
        candidates(task, budget=40, pool=3.0, added=task.length, tail=9, compensation=0.0, seed=0)


def test_most_probable_spends_the_budget_on_interactions_with_company():
    """Highest s first; what would stand alone hands its place on; fixed ones always stay."""
    pieces = [np.arange(3), np.arange(3, 5), np.arange(5, 9)]
    interactions = Interactions.of(pieces, [np.zeros(len(p), bool) for p in pieces], np.array([False, False, False]))
    s = np.array([0.9, 0.1, 0.2, 0.95, 0.0, 0.5, 0.6, 0.3, 0.4])
    # Of the top four (0.95, 0.9, 0.6, 0.5) two stand alone: 0.9 gives way to 0.4, then 0.95 to 0.3.
    assert np.flatnonzero(most_probable(interactions, s, 4)).tolist() == [5, 6, 7, 8]
    assert np.flatnonzero(most_probable(interactions, s, 20)).tolist() == list(range(9))
    fixed = replace(interactions, fixed=interactions.sequence == 1)
    assert np.flatnonzero(most_probable(fixed, s, 4)).tolist() == [0, 2, 3, 4]
    s[5] = 0.7
    assert np.flatnonzero(most_probable(fixed, s, 5)).tolist() == [3, 4, 5, 6, 8]


# ------------------------------------------------------------------------------ the method


def test_condensing_finds_the_interactions_that_help(task, monkeypatch):
    """With a loss that is known, s rises where an interaction lowers it and falls where it does not."""
    pieces = [np.array([item, item + 1, item + 2, item + 3]) for item in range(0, 40, 4)]
    interactions = Interactions.of(pieces, [np.zeros(4, bool)] * 10, np.arange(10) == 9)
    good = interactions.item % 4 < 2

    def loss(model, checkpoint, kept, *rest):
        items = np.concatenate(kept) if kept else np.zeros(0)
        return float(((items % 4 >= 2) * 2.0 - 1).sum())

    monkeypatch.setattr(dconrec, "_loss_after", loss)
    s, losses = condense(task, interactions, 20, **LOOP, iterations=150, learning_rate=0.05)
    assert float(s.sum()) <= 20 + 1e-6 and s.min() >= 0 and s.max() <= 1
    free = ~interactions.fixed
    assert s[free & good].mean() > 0.8 and s[free & ~good].mean() < 0.2 and (s[~free] == 1).all()
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 5
    kept = most_probable(interactions, s.numpy(), 20)
    assert kept[free & good].sum() >= 14 and kept.sum() == 20


def test_condensing_lowers_the_real_loss(task):
    """Masks from the learned s train a better model than masks from the equal s of the start."""
    interactions = candidates(task, 40, 3.0, 1, 0, 0.0, 0)
    s, _ = condense(task, interactions, 40, **LOOP, iterations=40, learning_rate=0.05)
    real, model, generator = make_batch(task.windows), task.new_model(0).eval(), np.random.default_rng(1)

    def mean_loss(probability):
        masks = generator.random((24, len(interactions))) < probability
        start = task.trajectory[0]
        return np.mean([dconrec._loss_after(model, start, interactions.pieces(m), real, 16, 5e-3) for m in masks])

    assert mean_loss(s.numpy()) < mean_loss(np.full(len(s), 40 / len(s))) - 0.1


def test_result_meets_the_budget_in_interactions(task):
    """n · L interactions, in order, from users' sequences with the proxy's additions; no labels."""
    result = dconrec.dconrec(task, sequences=8, seed=0, **FAST)
    assert result.labels is None and result.items.shape[1] == task.length
    assert sum(map(len, rows(result))) == 8 * task.length
    added = candidates(task, 8 * task.length, 2.0, 2, 10, 0.1, 0)
    sources = [added.item[added.sequence == i].tolist() for i in np.unique(added.sequence)]
    assert all(any(is_subsequence(row, source) for source in sources) for row in rows(result))
    assert (result.mask.sum(1) >= 1).all()


def test_result_follows_the_seed(task):
    """The same seed gives the same sequences, whatever the global random state."""
    found = []
    for run in range(2):
        torch.manual_seed(run)
        np.random.seed(run)
        found.append(rows(dconrec.dconrec(task, sequences=6, seed=3, **FAST)))
    assert found[0] == found[1]
    assert found[0] != rows(dconrec.dconrec(task, sequences=6, seed=4, **FAST))


def test_small_data_are_kept_whole(task):
    """A budget beyond all candidates keeps everything and moves nothing."""
    few = replace(task, train=[s[-5:] for s in task.train[:6]])
    result = dconrec.dconrec(few, sequences=20, seed=0, **{**FAST, "added": 0, "compensation": 0.0})
    assert sorted(rows(result)) == sorted(tuple(s.tolist()) for s in few.train)


def test_divergence_is_named(task):
    with pytest.raises(FosterError, match="lower inner_learning_rate"):
        dconrec.dconrec(task, sequences=6, seed=0, **FAST, inner_learning_rate=float("inf"))
