"""DEALRec: LiSSA against an exact solve, derivatives against autograd, strata by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from foster_lib import dealrec as module
from foster_lib.coresets import candidates
from foster_lib.dealrec import WindowLosses, dealrec, influence, lissa, stratified, unit_range
from foster_lib.errors import FosterError
from tests.test_scores import in_double
from tests.test_selection import rows


@pytest.fixture(scope="module")
def losses(task) -> WindowLosses:
    """Losses of the teacher in double precision on a few windows of different lengths."""
    pieces = [candidates(task)[i][: 2 + i % 6] for i in range(10)]
    return WindowLosses(in_double(task), pieces)


@pytest.fixture(scope="module")
def hessian(losses) -> torch.Tensor:
    """The explicit Hessian of the mean loss: (d², d²)."""
    everything, shape = np.arange(10), losses.weight.shape
    return torch.autograd.functional.hessian(
        lambda flat: losses(flat.view(shape), everything).mean(), losses.weight.flatten()
    )


def direction_like(weight, seed=0) -> torch.Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=weight.dtype)


# ------------------------------------------------------------------------------ influence


def test_window_losses_are_the_models(losses):
    """At the model's own weight they are the mean cross-entropy of each window alone."""
    model = losses.model
    features = model.features()
    for i, loss in enumerate(losses(losses.weight, np.arange(10))):
        piece = torch.from_numpy(losses.pieces[i])
        logits = model.scores(model(piece[None, :-1], features)[0], features)
        torch.testing.assert_close(loss, F.cross_entropy(logits, piece[1:]))


def test_derivatives_equal_autograd(losses, hessian):
    """Forward-mode inner products, mean gradient and Hessian-vector product against the explicit ones."""
    direction, everything = direction_like(losses.weight), np.arange(10)
    gradients = [losses.gradient(np.array([i])) for i in range(10)]
    inner = torch.stack([(g * direction).sum() for g in gradients])
    torch.testing.assert_close(losses.derivative(everything, direction), inner, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(losses.gradient(everything), torch.stack(gradients).mean(0))
    product = losses.hessian_vector(everything, direction).flatten()
    torch.testing.assert_close(product, hessian @ direction.flatten(), rtol=1e-9, atol=1e-12)


def test_lissa_equals_exact_solve():
    """After many steps the recursion stands at (damping I + H / scale)⁻¹ v."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    h, v = a @ a.T, torch.randn(8, generator=generator, dtype=torch.float64)
    for damping, scale in ((0.01, 25.0), (0.2, 40.0)):
        exact = torch.linalg.solve(damping * torch.eye(8, dtype=torch.float64) + h / scale, v)
        found = lissa(v, lambda x: h @ x, damping, scale, depth=4000)
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
    assert torch.equal(lissa(v, lambda x: h @ x, 0.01, 25.0, depth=0), v)


def test_lissa_says_when_it_diverges():
    """An eigenvalue above twice the scale is an error with a remedy, not a nan."""
    with pytest.raises(FosterError, match="raise its damping or its scale"):
        lissa(torch.ones(2), lambda x: 60 * x, 0.01, 25.0, depth=1000)


def test_influence_equals_exact_solve(losses, hessian):
    """∇L(s)ᵀ (damping I + H / scale)⁻¹ ∇L of every window, with batches of all windows."""
    scale = 2 * float(torch.linalg.eigvalsh(hessian).abs().max())  # H / scale within ± 1/2
    options = dict(damping=0.6, scale=scale, depth=250, size=10)
    found = influence(losses.model, losses.pieces, np.random.default_rng(0), **options)
    gradients = torch.stack([losses.gradient(np.array([i])).flatten() for i in range(10)])
    matrix = 0.6 * torch.eye(len(hessian), dtype=torch.float64) + hessian / scale
    expected = gradients @ torch.linalg.solve(matrix, gradients.mean(0))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-8)


def test_small_batches_estimate_the_same(losses, hessian):
    """Batches of four windows of ten give nearly the same ranking as batches of all."""
    options = dict(damping=0.6, scale=2 * float(torch.linalg.eigvalsh(hessian).abs().max()), depth=60)
    full, small = (influence(losses.model, losses.pieces, np.random.default_rng(0), size=n, **options) for n in (10, 4))
    assert np.corrcoef(full, small)[0, 1] > 0.98


# --------------------------------------------------------------------------------- strata


def test_stratified_by_hand():
    """Ten ranges of width 1; the empty ones do not count, small ones give all they have."""
    scores = np.array([0.0, 0.5, 0.9, 10.0, 5.1, 5.2, 5.3, 5.4, 5.5])
    for seed in range(5):
        chosen = set(stratified(scores, 6, 10, np.random.default_rng(seed)).tolist())
        assert len(chosen) == 6
        assert 3 in chosen  # alone in its range: share 6 // 3 = 2, gives 1
        assert len(chosen & {0, 1, 2}) == 2  # share 5 // 2 = 2
        assert len(chosen & {4, 5, 6, 7, 8}) == 3  # what is left
    assert sorted(stratified(scores, 9, 10, np.random.default_rng(0)).tolist()) == list(range(9))


def test_stratified_edges_belong_below():
    """A score on an edge counts in the range below it, as the largest score does."""
    scores = np.array([0.0, 1.0, 1.5, 2.0])  # two ranges: [0, 1] and (1, 2]
    for seed in range(8):
        chosen = set(stratified(scores, 2, 2, np.random.default_rng(seed)).tolist())
        assert len(chosen & {0, 1}) == 1


def test_stratified_meets_every_budget():
    """Exactly `count` distinct indices for many shapes of scores; the smallest ranges give nothing if need be."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        scores = rng.normal(size=rng.integers(1, 60)) ** rng.integers(1, 4)
        count = int(rng.integers(1, len(scores) + 1))
        chosen = stratified(scores, count, int(rng.integers(1, 60)), rng)
        assert len(set(chosen.tolist())) == count
    assert set(stratified(np.array([0.0, 5.0, 5.1, 10, 10, 10]), 1, 3, rng).tolist()) <= {3, 4, 5}
    with pytest.raises(FosterError, match="cannot be drawn"):
        stratified(np.ones(3), 4, 2, rng)


def test_unit_range():
    """0 … 1, also for equal values."""
    assert unit_range(np.array([3.0, 5.0, 4.0])).tolist() == [0, 1, 0.5]
    assert unit_range(np.array([2.0, 2.0])).tolist() == [0, 0]


# ------------------------------------------------------------------------------ the method


def test_dealrec_prunes_the_top_and_covers_the_rest(task, monkeypatch):
    """Score = influence + λ · effort per target; the largest tenth is cut, the strata of the rest are covered."""
    rng = np.random.default_rng(1)
    task = replace(task, train=[rng.permutation(40)[: rng.integers(3, 9)] for _ in range(60)])
    pool = candidates(task)
    lengths = np.array([len(w) - 1 for w in pool])
    influences, efforts = rng.random((2, len(pool)))
    monkeypatch.setattr(module, "influence", lambda *args, **options: influences)
    monkeypatch.setattr(module, "gradient_norms", lambda model, pieces: efforts * lengths)
    scores = unit_range(influences) + 2.0 * unit_range(efforts)
    order = np.argsort(-scores)
    cut = {tuple(pool[i].tolist()) for i in order[: len(pool) // 10]}
    kept = scores[order[len(pool) // 10 :]]
    edges = np.linspace(kept.min(), kept.max(), 6)
    number = {tuple(w.tolist()): i for i, w in enumerate(pool)}
    seen = set()
    for seed in range(6):
        chosen = rows(dealrec(task, 10, seed, effort=2.0, strata=5))
        assert len(set(chosen)) == 10 and not cut & set(chosen)
        strata = np.clip(np.searchsorted(edges, [scores[number[row]] for row in chosen]), 1, 5)
        assert set(strata) == {1, 2, 3, 4, 5}
        seen |= set(chosen)
    assert len(seen) > 20  # other seeds draw others


def test_dealrec_as_a_whole(task):
    """Distinct windows, repeatable; a tight budget leaves nothing to cut."""
    options = dict(depth=5, batch_size=4)
    first, second = (dealrec(task, 8, 3, **options) for _ in range(2))
    assert rows(first) == rows(second) and len(set(rows(first))) == 8
    assert len(dealrec(task, len(task.train), 3, **options)) == len(task.train)
