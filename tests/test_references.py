"""Popularity and item-kNN against naive loops and scikit-learn."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.metrics.pairwise import cosine_similarity

from foster_lib.encoder import FrozenCatalogue
from foster_lib.evaluation import rank_queries
from foster_lib.references import _keep_largest, item_knn, popularity

HISTORIES = [np.array([3]), np.array([1, 2, 5]), np.array([7, 7, 0, 7])]


@pytest.fixture
def own_task(task):
    """Random training sequences with repeats over 30 items, of which the last two never occur."""
    rng = np.random.default_rng(0)
    train = [rng.integers(28, size=rng.integers(2, 12)) for _ in range(50)]
    return replace(task, train=train, catalogue=FrozenCatalogue(torch.zeros(30, 4)))


def naive_knn(train, n_items, histories, neighbours, shrinkage, decay) -> np.ndarray:
    """Shrunken cosine of user sets, pair by pair; each history item brings its nearest neighbours."""
    users = [{u for u, s in enumerate(train) if i in s} for i in range(n_items)]
    similarity = np.zeros((n_items, n_items))
    for i in range(n_items):
        for j in range(n_items):
            both = len(users[i] & users[j])
            if i != j and both:
                similarity[i, j] = both / ((len(users[i]) * len(users[j])) ** 0.5 + shrinkage)
    for i in range(n_items):
        order = sorted(range(n_items), key=lambda j: (-np.float32(similarity[i, j]), j))
        similarity[i, order[neighbours:]] = 0
    scores = np.zeros((len(histories), n_items))
    for row, history in enumerate(histories):
        for age, item in enumerate(history[::-1]):
            scores[row] += decay**age * similarity[item]
    return scores


def test_popularity_counts_training_interactions(own_task):
    """Scores are counts of the training sequences, repeats included, for every history."""
    counts = Counter(int(i) for s in own_task.train for i in s)
    scores = popularity(own_task)(HISTORIES)
    assert scores.shape == (3, 30)
    assert all(row.tolist() == [counts[i] for i in range(30)] for row in scores)


@pytest.mark.parametrize(
    ("neighbours", "shrinkage", "decay"), [(100, 10.0, 0.9), (100, 0.0, 1.0), (5, 10.0, 0.5), (1, 0.0, 0.9)]
)
def test_item_knn_equals_naive_loops(own_task, neighbours, shrinkage, decay):
    """Scores agree with pairwise loops, ties at the edge of the neighbourhood included."""
    scores = item_knn(own_task, neighbours=neighbours, shrinkage=shrinkage, decay=decay)(HISTORIES)
    expected = naive_knn(own_task.train, 30, HISTORIES, neighbours, shrinkage, decay)
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-5)


def test_item_knn_equals_scikit_learn(own_task):
    """Without shrinkage and with one history item the scores are sklearn's cosine of binary columns."""
    matrix = np.zeros((len(own_task.train), 30))
    for user, sequence in enumerate(own_task.train):
        matrix[user, sequence] = 1
    expected = cosine_similarity(matrix.T)
    np.fill_diagonal(expected, 0)
    scores = item_knn(own_task, shrinkage=0.0)([np.array([i]) for i in range(30)])
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-6)


def test_item_knn_defaults(own_task):
    """The figures of the table are made with 100 neighbours, shrinkage 10 and decay 0.9."""
    expected = naive_knn(own_task.train, 30, HISTORIES, 100, 10.0, 0.9)
    np.testing.assert_allclose(item_knn(own_task)(HISTORIES).numpy(), expected, atol=1e-5)


def test_item_knn_does_not_depend_on_the_numbering(own_task):
    """Renumbered items and shuffled users give renumbered scores."""
    rng = np.random.default_rng(1)
    number, order = rng.permutation(30), rng.permutation(50)
    renamed = replace(own_task, train=[number[own_task.train[u]] for u in order])
    scores = item_knn(own_task)(HISTORIES).numpy()
    other = item_knn(renamed)([number[h] for h in HISTORIES]).numpy()
    np.testing.assert_allclose(other[:, number], scores, atol=1e-6)


def test_keep_largest():
    """The largest entries of each row stay, equal ones by lower column; short rows stay whole."""
    dense = np.array([[1, 3, 3, 3, 2], [0, 0, 5, 0, 4], [0, 0, 0, 0, 0]], float)
    kept = _keep_largest(sparse.csr_matrix(dense), 2).toarray()
    assert kept.tolist() == [[0, 3, 3, 0, 0], [0, 0, 5, 0, 4], [0, 0, 0, 0, 0]]


def test_references_rank_on_structured_data(task):
    """On the ring, where neighbours follow each other, item-kNN beats popularity, and that is near chance."""
    chance = 10 / task.n_items
    recall = {
        f.__name__: rank_queries(f(task), task.validation, task.n_items).metrics()["recall@10"]
        for f in (popularity, item_knn)
    }
    assert recall["item_knn"] > 2 * chance
    assert recall["item_knn"] > recall["popularity"] + 0.1
