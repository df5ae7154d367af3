"""Longest, herding and cluster medoids: rules on points by hand and by naive loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from sklearn.exceptions import ConvergenceWarning

from foster_lib import selection
from foster_lib.coresets import candidates, select
from foster_lib.encoder import FrozenCatalogue
from foster_lib.errors import FosterError
from foster_lib.selection import herd, highest, medoids, text_means

METHODS = [selection.longest, selection.herding, selection.cluster_medoids]


def rows(chosen) -> list[tuple]:
    """Each sequence as the tuple of its window."""
    return [
        (*items[mask].tolist(), int(targets[mask][-1]))
        for items, mask, targets in zip(chosen.items, chosen.mask, chosen.targets)
    ]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_selections_are_distinct_windows_and_follow_their_seed(task, method):
    """n windows of the training data, none twice, the same for the same seed; no teacher is needed."""
    without = replace(task, trajectory_folder=None)
    chosen = []
    for run in range(2):
        np.random.seed(run)
        chosen.append(rows(method(without, sequences=12, seed=4)))
    assert chosen[0] == chosen[1]
    available = [tuple(w.tolist()) for w in candidates(task)]
    for row in chosen[0]:
        available.remove(row)
    assert len(available) == len(candidates(task)) - 12


def test_errors_name_the_remedy(task):
    """An impossible budget and users of equal texts."""
    with pytest.raises(FosterError, match="cannot be chosen"):
        selection.herding(task, 10**6, 0)
    alike = replace(task, catalogue=FrozenCatalogue(torch.zeros(task.n_items, 4)))
    with pytest.warns(ConvergenceWarning), pytest.raises(FosterError, match="ask for fewer sequences"):
        selection.cluster_medoids(alike, 2, 0)


def test_longest_counts_the_whole_sequence(task):
    """Windows are capped, the count is not: the most active users are chosen."""
    rng = np.random.default_rng(0)
    task = replace(task, train=[rng.permutation(40)[: rng.integers(3, 30)] for _ in range(50)])
    lengths = [len(s) for s in task.train]
    chosen = rows(selection.longest(task, 10, 0))
    pool = [tuple(w.tolist()) for w in candidates(task)]
    found = sorted(lengths[pool.index(row)] for row in chosen)
    assert found == sorted(lengths)[-10:]
    assert min(found) > task.length + 1


def test_highest_breaks_ties_at_random():
    """Every one of four equal scores is chosen first for some seed; larger ones always come before."""
    scores = np.array([1.0, 3.0, 1.0, 1.0, 5.0, 1.0])
    chosen = [highest(scores, 3, seed) for seed in range(40)]
    assert all(c[:2].tolist() == [4, 1] for c in chosen)
    assert {int(c[2]) for c in chosen} == {0, 2, 3, 5}


# -------------------------------------------------------------------------------- herding


def test_herd_by_hand():
    """μ = 3. Wanted 3: takes 2; wanted 6 − 2 = 4: takes 1; wanted 9 − 3 = 6: takes 9."""
    assert herd(np.array([[0.0], [1.0], [2.0], [9.0]]), 3).tolist() == [2, 1, 3]


@pytest.mark.parametrize("seed", range(3))
def test_herd_equals_naive_greedy(seed):
    """Each step takes the argmin of ‖(i + 1) μ − Σ chosen − x‖ among those left."""
    points = np.random.default_rng(seed).normal(size=(30, 4))
    mean, chosen = points.mean(0), []
    for step in range(12):
        total = sum((points[c] for c in chosen), np.zeros(4))
        left = [x for x in range(30) if x not in chosen]
        chosen.append(min(left, key=lambda x: np.linalg.norm((step + 1) * mean - total - points[x])))
    assert herd(points, 12).tolist() == chosen


def test_herd_follows_the_mean_better_than_chance():
    """The mean of ten herded points is nearer to μ than that of any of 200 random draws."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(200, 5))
    gap = lambda chosen: np.linalg.norm(points[chosen].mean(0) - points.mean(0))  # noqa: E731
    assert gap(herd(points, 10)) < min(gap(rng.choice(200, 10, replace=False)) for _ in range(200))


def test_herding_measures_the_untrained_model(task):
    """Its windows are herded among mean hidden states of the warm-started model."""
    model = task.new_model(3).eval()
    with torch.no_grad():
        features = model.features()
        points = [model(torch.from_numpy(w[:-1])[None], features)[0].mean(0).numpy() for w in candidates(task)]
    expected = [tuple(candidates(task)[i].tolist()) for i in herd(np.stack(points), 6)]
    assert rows(selection.herding(task, sequences=6, seed=3)) == expected


# -------------------------------------------------------------------------------- medoids


def test_medoids_by_hand():
    """The member with the smallest sum of distances, not the one nearest to the mean."""
    points = np.array([[0.0], [5.0], [1.0], [6.0], [9.0], [2.0], [30.0]])
    cluster = np.array([0, 1, 0, 1, 1, 0, 0])  # cluster 0: 0, 1, 2, 30 (mean 8.25): 1 and 2 tie at 31
    assert medoids(points, cluster).tolist() == [2, 3]


def test_cluster_medoids_takes_one_user_of_each_cluster(task, monkeypatch):
    """On well separated points every cluster is represented, by its medoid."""
    points, cluster = make_blobs(len(candidates(task)), n_features=4, centers=6, cluster_std=0.05, random_state=0)
    monkeypatch.setattr(selection, "text_means", lambda task, pieces: points)
    expected = set()
    for c in range(6):
        members = np.flatnonzero(cluster == c)
        sums = [sum(np.linalg.norm(points[m] - points[o]) for o in members) for m in members]
        expected.add(tuple(candidates(task)[members[int(np.argmin(sums))]].tolist()))
    assert set(rows(selection.cluster_medoids(task, 6, 0))) == expected


def test_text_means_include_the_last_item_and_repeats(task):
    """The mean over all items of a piece, each as often as it stands there."""
    pieces = [np.array([3, 5]), np.array([7, 7, 1])]
    e = task.embeddings
    expected = torch.stack([(e[3] + e[5]) / 2, (2 * e[7] + e[1]) / 3])
    np.testing.assert_allclose(text_means(task, pieces), expected.numpy(), atol=1e-6)


def test_select_keeps_the_order(task):
    """Windows stand in the order in which they were chosen."""
    pool = candidates(task)
    assert rows(select(task, pool, np.array([9, 2, 5]))) == [tuple(pool[i].tolist()) for i in (9, 2, 5)]
