"""Reference rows: what the condensed data sets are measured against."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from foster_lib.evaluation import Scorer, recommender_scorer
from foster_lib.task import Task


def full(task: Task, sequences: int = 0, seed: int = 0) -> Scorer:
    """The full-data model; `runs` has trained it before, and recorded its trajectory."""
    return recommender_scorer(task.teacher)


def teachers(task: Task, sequences: int = 0, seed: int = 0) -> Scorer:
    """The mean of the full-data models that label S (`ensemble`), where there are several."""
    return recommender_scorer(task.labeller)


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
    matrix = item_matrix(task.train, np.ones, task.n_items, binary=True)
    norms = np.sqrt(np.asarray(matrix.sum(0)).ravel())
    product = (matrix.T @ matrix).tocsr()
    product.setdiag(0)
    product.eliminate_zeros()
    rows = np.repeat(np.arange(task.n_items), np.diff(product.indptr))
    product.data /= norms[rows] * norms[product.indices] + shrinkage
    similarity = _keep_largest(product, neighbours)

    def score(histories: list[np.ndarray]) -> Tensor:
        return torch.from_numpy((item_matrix(histories, decaying(decay), task.n_items) @ similarity).toarray())

    return score


def item_matrix(
    sequences: list[np.ndarray], weights: Callable[[int], np.ndarray], n_items: int, binary: bool = False
) -> sparse.csr_matrix:
    """Sequences as rows over the catalogue: (number of sequences, |V|) float32.

    Parameters
    ----------
    weights : function
        From the length of a sequence to the weights of its items.
    binary : bool
        Whether repeated items count once; if not, their weights add up.
    """
    rows = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
    values = np.concatenate([weights(len(sequence)) for sequence in sequences]).astype(np.float32)
    matrix = sparse.csr_matrix((values, (rows, np.concatenate(sequences))), shape=(len(sequences), n_items))
    if binary:
        matrix.data[:] = 1
    return matrix


def decaying(decay: float) -> Callable[[int], np.ndarray]:
    """Weights decay^age of a history of n items, oldest first."""
    return lambda n: decay ** np.arange(n - 1, -1, -1.0)


def _keep_largest(matrix: sparse.csr_matrix, count: int) -> sparse.csr_matrix:
    """Keep each row's `count` largest entries; equal ones by lower column."""
    matrix = matrix.copy()
    for row in range(matrix.shape[0]):
        values = matrix.data[matrix.indptr[row] : matrix.indptr[row + 1]]
        if len(values) > count:
            values[np.argsort(-values, kind="stable")[count:]] = 0
    matrix.eliminate_zeros()
    return matrix
