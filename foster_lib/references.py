"""Reference rows: what the condensed data sets are measured against."""

from __future__ import annotations

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from foster_lib.evaluation import Scorer, recommender_scorer
from foster_lib.task import Task


def full(task: Task, sequences: int = 0, seed: int = 0) -> Scorer:
    """The full-data model; `runs` has trained it before, and recorded its trajectory."""
    return recommender_scorer(task.teacher)


def untrained(task: Task, sequences: int = 0, seed: int = 0) -> Scorer:
    """The warm start without any training: text similarity to the last item."""
    return recommender_scorer(task.new_model(seed))


def popularity(task: Task, sequences: int = 0, seed: int = 0) -> Scorer:
    """Score an item by its number of training interactions."""
    counts = torch.from_numpy(np.bincount(np.concatenate(task.train), minlength=task.n_items).astype(np.float32))
    return lambda histories: counts.expand(len(histories), -1)


def item_knn(
    task: Task, sequences: int = 0, seed: int = 0, neighbours: int = 100, shrinkage: float = 10.0, decay: float = 0.9
) -> Scorer:
    """Item-to-item collaborative filtering (Sarwar et al., 2001).

    Similarity is the cosine of two items' user sets, shrunk for small supports; an item's score
    is the sum of its similarities to the history, the latest item counting most.

    Parameters
    ----------
    neighbours : int
        Neighbours kept per item.
    shrinkage : float
        Added to the denominator of the cosine.
    decay : float
        Weight of an item relative to the next later one.
    """
    users = np.repeat(np.arange(len(task.train)), [len(sequence) for sequence in task.train])
    items = np.concatenate(task.train)
    matrix = sparse.csr_matrix((np.ones(len(items), np.float32), (users, items)), shape=(len(task.train), task.n_items))
    matrix.data[:] = 1  # repeats count once
    norms = np.sqrt(np.asarray(matrix.sum(0)).ravel())
    product = (matrix.T @ matrix).tocsr()
    product.setdiag(0)
    product.eliminate_zeros()
    rows = np.repeat(np.arange(task.n_items), np.diff(product.indptr))
    product.data /= norms[rows] * norms[product.indices] + shrinkage
    similarity = _keep_largest(product, neighbours)

    def score(histories: list[np.ndarray]) -> Tensor:
        lengths = [len(history) for history in histories]
        row = np.repeat(np.arange(len(histories)), lengths)
        weight = np.concatenate([decay ** np.arange(n - 1, -1, -1) for n in lengths]).astype(np.float32)
        history = sparse.csr_matrix((weight, (row, np.concatenate(histories))), shape=(len(histories), task.n_items))
        return torch.from_numpy((history @ similarity).toarray())

    return score


def _keep_largest(matrix: sparse.csr_matrix, count: int) -> sparse.csr_matrix:
    """Keep each row's `count` largest entries; equal ones by lower column."""
    matrix = matrix.copy()
    for row in range(matrix.shape[0]):
        values = matrix.data[matrix.indptr[row] : matrix.indptr[row + 1]]
        if len(values) > count:
            values[np.argsort(-values, kind="stable")[count:]] = 0
    matrix.eliminate_zeros()
    return matrix
