"""Coresets: real training windows that stand for all of them.

Each function returns `SyntheticSequences` of real items with real next items; `with_labels` puts
a teacher's probabilities in the place of the next items. More rules of choice stand in
`selection`, `scores`, `dealrec` and `goracs`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from foster_lib.condense import condensed
from foster_lib.ensemble import Ensemble
from foster_lib.errors import FosterError
from foster_lib.synthetic import ORDERS, SyntheticSequences
from foster_lib.task import Task

ALIKE = 12.0
"""s of the items' likeness: the sharpness that recommenders start with (half of it serves students less well)."""


def candidates(task: Task) -> list[np.ndarray]:
    """What is chosen from: each user's latest window of at most L + 1 items."""
    return [sequence[-(task.sequence_length + 1) :] for sequence in task.train]


def random(task: Task, sequences: int, seed: int) -> SyntheticSequences:
    """Users drawn uniformly without replacement."""
    pool = checked_pool(task, sequences)
    return select(task, pool, np.random.default_rng(seed).choice(len(pool), size=sequences, replace=False))


def k_center(task: Task, sequences: int, seed: int) -> SyntheticSequences:
    """Greedy k-center (Sener and Savarese, 2018): always add the window farthest from the chosen.

    Distance is Euclidean between mean hidden states of the untrained, warm-started model; the
    first window is drawn at random.
    """
    pool = checked_pool(task, sequences)
    points = task.hidden_means(task.new_model(seed).eval(), pool)
    return select(task, pool, farthest_points(points, sequences, seed))


def k_means(task: Task, sequences: int, seed: int) -> SyntheticSequences:
    """Windows nearest to the k-means centroids of the teacher's mean hidden states."""
    pool = checked_pool(task, sequences)
    return select(task, pool, medoids(task, pool, sequences, seed))


def medoids(task: Task, pool: list[np.ndarray], clusters: int, seed: int) -> np.ndarray:
    """Index of the window nearest to each centroid of `k_means`."""
    points = task.hidden_means(task.teacher, pool)
    found = KMeans(clusters, n_init=4, random_state=seed).fit(points)
    return nearest_points(points, found.cluster_centers_)


def kd(task: Task, sequences: int, seed: int) -> SyntheticSequences:
    """KD-n: the windows of `k_means` with a teacher's labels, no distillation."""
    return with_labels(task, k_means(task, sequences, seed))


def with_labels(task: Task, chosen: SyntheticSequences) -> SyntheticSequences:
    """Replace hard next items by the probabilities of `Task.labeller`, `condensed` if that is several models.

    Which items are alike comes with them, what follows each on its own if the task asks for it, and where sequences
    have several readings, the labels of each. The size does not depend on the catalogue.
    """
    labelled = with_exact_labels(task, chosen)
    if not isinstance(task.labeller, Ensemble):
        return labelled
    return condensed(labelled, task.teacher.adapter_weights(), task.embeddings)


@torch.no_grad()
def with_exact_labels(task: Task, chosen: SyntheticSequences) -> SyntheticSequences:
    """`with_labels` in the teacher's own terms, y = softmax(s·h · f(e)).

    Its hidden states, times its scale, are the label queries and its adapter, or those of all its models, gives
    the item features, so the labels are exact (for a frozen encoder; a tuned one's text embeddings are taken
    before tuning).
    """
    teacher = task.labeller
    features = teacher.features()

    def label(items: Tensor) -> Tensor:
        return (teacher.log_scale.exp() * teacher(items.to(task.device), features)).cpu()

    labelled = replace(chosen, adapter=teacher.adapter_weights(), labels=label(chosen.items), alike=torch.tensor(ALIKE))
    if task.successors:
        labelled = replace(labelled, successors=fitted_successors(task, features))
    if task.readings == 1:
        return labelled
    row, orders, further = torch.arange(len(chosen))[:, None], [], []
    for number in range(1, task.readings):
        order = ORDERS[task.order](chosen.mask, task.length, number, task.readings)
        z, there = label(chosen.items[row, order.clamp(min=0)]), order >= 0
        by_position = torch.empty_like(labelled.labels)
        by_position[row.expand_as(order)[there], order[there]] = z[there]
        orders.append(order)
        further.append(by_position)
    return replace(labelled, further_labels=torch.stack(further, 2), orders=torch.stack(orders, 2))


def fitted_successors(task: Task, features: Tensor) -> Tensor:
    """A with [f_i, 1] A nearest to the teacher's label query of each item on its own, by least squares: (k + 1, k).

    On Games it explains 92 % of their variance: the teacher of a history of one item is nearly linear in it.
    """
    teacher, parts = task.labeller, torch.arange(task.n_items, device=task.device)[:, None].split(4096)
    z = teacher.log_scale.exp() * torch.cat([teacher(items, features)[:, 0] for items in parts])
    f = torch.nn.functional.pad(features, (0, 1), value=1.0).double()
    ridge = 1e-3 * torch.eye(f.shape[1], dtype=f.dtype, device=f.device)
    return torch.linalg.solve(f.T @ f + ridge, f.T @ z.double()).float().cpu()


def farthest_points(points: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Indices of `count` points, each the farthest from those before it."""
    chosen = [int(np.random.default_rng(seed).integers(len(points)))]
    distance = np.linalg.norm(points - points[chosen[0]], axis=1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(points - points[chosen[-1]], axis=1))
    return np.array(chosen)


def nearest_points(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """For each centroid the nearest point that no earlier centroid has taken."""
    chosen: list[int] = []
    for centroid in centroids:
        distance = np.linalg.norm(points - centroid, axis=1)
        distance[chosen] = np.inf
        chosen.append(int(distance.argmin()))
    return np.array(chosen)


def checked_pool(task: Task, sequences: int) -> list[np.ndarray]:
    """`candidates`; raises `FosterError` if there are fewer than `sequences`."""
    pool = candidates(task)
    if not 0 < sequences <= len(pool):
        raise FosterError(f"{sequences} sequences cannot be chosen from those of {len(pool)} users.")
    return pool


def select(task: Task, pool: list[np.ndarray], chosen: np.ndarray) -> SyntheticSequences:
    """The `chosen` windows of the pool."""
    return SyntheticSequences.from_windows([pool[i] for i in chosen], task.sequence_length)
