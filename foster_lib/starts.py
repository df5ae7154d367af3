"""Where FOSTER may start: which items stand in the sequences, and with which labels.

The published form starts at k-means medoids with a teacher's labels; the others are there to
measure what each of the two is worth (Table 4).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from foster_lib.coresets import checked_pool, packed_k_means, with_labels
from foster_lib.errors import check_known
from foster_lib.synthetic import SyntheticSequences
from foster_lib.task import Task


def random_histories(task: Task, sequences: int, seed: int) -> SyntheticSequences:
    """A random user's latest items in each window that the model reads."""
    windows = task.sequence_length // task.length
    pool = checked_pool(task, sequences * windows)
    chosen = np.random.default_rng(seed).choice(len(pool), sequences * windows, replace=False)
    return SyntheticSequences.from_windows([pool[i][-(task.length + 1) :] for i in chosen], task.length).joined(windows)


def noise(task: Task, sequences: int, seed: int) -> SyntheticSequences:
    """Items drawn uniformly from the catalogue, at every position."""
    windows = task.sequence_length // task.length
    drawn = np.random.default_rng(seed).integers(task.n_items, size=(sequences * windows, task.length + 1))
    return SyntheticSequences.from_windows(list(drawn), task.length).joined(windows)


@torch.no_grad()
def hard_labels(task: Task, chosen: SyntheticSequences) -> SyntheticSequences:
    """Labels that know of the next item alone: z_y = s · f(e_target), with the teacher's scale s.

    As near to a hard target as labels of this form come: the rest of the probability lies on
    items of similar features.
    """
    labelled = with_labels(task, chosen)
    f = labelled.features(task.embeddings.cpu())
    return replace(labelled, labels=task.teacher.log_scale.exp().cpu() * f[chosen.targets])


ITEMS = {"k-means": packed_k_means, "random": random_histories, "noise": noise}
LABELS = {"teacher": with_labels, "hard": hard_labels}


def start_sequences(task: Task, sequences: int, seed: int, items: str, labels: str) -> SyntheticSequences:
    """Labelled sequences to start from.

    Parameters
    ----------
    items : a key of `ITEMS`
    labels : a key of `LABELS`

    Raises
    ------
    FosterError
        For other keys, or fewer users than windows.
    """
    check_known(items, ITEMS, "start_items")
    check_known(labels, LABELS, "start_labels")
    return LABELS[labels](task, ITEMS[items](task, sequences, seed))
