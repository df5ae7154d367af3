"""Coresets that need no training at all: longest, herding, medoids of user clusters.

Each function returns real windows as `SyntheticSequences`, with real next items.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans

from foster_lib.coresets import checked_pool, select
from foster_lib.errors import FosterError
from foster_lib.synthetic import SyntheticSequences
from foster_lib.task import Task


def longest(task: Task, sequences: int, seed: int) -> SyntheticSequences:
    """The users with most training interactions; equal numbers in random order."""
    pool = checked_pool(task, sequences)
    lengths = np.array([len(sequence) for sequence in task.train], dtype=float)
    return select(task, pool, highest(lengths, sequences, seed))


def herding(task: Task, sequences: int, seed: int) -> SyntheticSequences:
    """Windows whose running mean follows the mean of all windows (Welling, 2009).

    Points are mean hidden states of the untrained, warm-started model, as in K-Center: the space
    that a student starts in, free of training, and whitened, so that the few directions in which
    all texts of a catalogue agree do not decide the distances.
    """
    pool = checked_pool(task, sequences)
    points = task.hidden_means(task.new_model(seed).eval(), pool)
    return select(task, pool, herd(points, sequences))


def cluster_medoids(task: Task, sequences: int, seed: int) -> SyntheticSequences:
    """One real user for each cluster of users with similar interests.

    The training-free idea of TF-DCon (Wu et al., arXiv 2310.09874: cluster users by interest,
    condense each cluster to one user) without its generative language model: a user's interest is
    the mean text embedding of the window, k-means clusters the users, and the cluster's medoid
    stands for it instead of a generated user.
    """
    pool = checked_pool(task, sequences)
    points = text_means(task, pool)
    cluster = KMeans(sequences, n_init=4, random_state=seed).fit(points).labels_
    if len(np.unique(cluster)) < sequences:
        raise FosterError(f"fewer than {sequences} users differ in their texts: ask for fewer sequences.")
    return select(task, pool, medoids(points, cluster))


# ------------------------------------------------------------------------- rules on points


def herd(points: np.ndarray, count: int) -> np.ndarray:
    """Greedy herding: step i takes the x, not taken before, of least ‖(i + 1) μ − Σ chosen − x‖.

    Parameters
    ----------
    points : (N, d), with mean μ

    Returns
    -------
    (count,) int64
        Indices in order of selection: the mean of the first i is close to μ for every i.
    """
    points = points.astype(np.float64)
    wanted = mean = points.mean(0)
    chosen: list[int] = []
    while len(chosen) < count:
        distance = np.linalg.norm(wanted - points, axis=1)
        distance[chosen] = np.inf
        chosen.append(int(distance.argmin()))
        wanted = wanted + mean - points[chosen[-1]]
    return np.array(chosen)


def medoids(points: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """For each cluster number the member with the smallest sum of distances to the other members."""
    chosen = []
    for number in np.unique(cluster):
        members = np.flatnonzero(cluster == number)
        chosen.append(members[cdist(points[members], points[members]).sum(1).argmin()])
    return np.array(chosen)


def highest(scores: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Indices of the `count` highest scores, highest first; equal ones in random order."""
    order = np.random.default_rng(seed).permutation(len(scores))
    return order[np.argsort(-scores[order], kind="stable")[:count]]


# -------------------------------------------------------------------------------- helpers


def text_means(task: Task, pieces: list[np.ndarray]) -> np.ndarray:
    """Mean text embedding of each sequence of items: (len(pieces), width of the encoder)."""
    embeddings = task.embeddings.cpu().numpy()
    rows = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    weight = np.concatenate([np.full(len(piece), 1 / len(piece), np.float32) for piece in pieces])
    shape = (len(pieces), len(embeddings))
    return sparse.csr_matrix((weight, (rows, np.concatenate(pieces))), shape=shape) @ embeddings
