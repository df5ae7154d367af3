"""Where FOSTER may start: which items stand in the sequences, and with which labels.

The published form starts at k-means medoids, a history in each window that the model reads, continued
by the teacher to the window's end, with the teacher's labels. The others are there to measure what
each of these is worth (Table 4).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from foster_lib.coresets import checked_pool, medoids, with_labels
from foster_lib.errors import check_known
from foster_lib.synthetic import SyntheticSequences
from foster_lib.task import Task


def packed_medoids(task: Task, sequences: int, seed: int) -> SyntheticSequences:
    """As `coresets.k_means`, with a user for each window of L positions that the model reads, not for each sequence.

    Where users have short histories, one of them would leave most positions of a sequence empty. If a
    sequence is one window, this is `coresets.k_means`.

    Raises
    ------
    FosterError
        If there are fewer users than windows.
    """
    pool, count = latest_windows(task, sequences)
    return packed(task, [pool[i] for i in medoids(task, pool, count, seed)])


def random_histories(task: Task, sequences: int, seed: int) -> SyntheticSequences:
    """A random user's latest items in each window that the model reads."""
    pool, count = latest_windows(task, sequences)
    return packed(task, [pool[i] for i in np.random.default_rng(seed).choice(len(pool), count, replace=False)])


def noise(task: Task, sequences: int, seed: int) -> SyntheticSequences:
    """Items drawn uniformly from the catalogue, at every position."""
    shape = (sequences * (task.sequence_length // task.length), task.length + 1)
    return packed(task, list(np.random.default_rng(seed).integers(task.n_items, size=shape)))


def latest_windows(task: Task, sequences: int) -> tuple[list[np.ndarray], int]:
    """Each user's latest window that the model reads, and how many of them `sequences` sequences hold."""
    count = sequences * (task.sequence_length // task.length)
    return [history[-(task.length + 1) :] for history in checked_pool(task, count)], count


def packed(task: Task, pieces: list[np.ndarray]) -> SyntheticSequences:
    """Sequences of as many of these windows as fit, one after another."""
    return SyntheticSequences.from_windows(pieces, task.length).joined(task.sequence_length // task.length)


@torch.no_grad()
def continued(task: Task, chosen: SyntheticSequences) -> SyntheticSequences:
    """Fill each window that the model reads: what follows a history is the teacher's most probable other item.

    Histories are short where data are sparse, and a position without a target teaches nothing.
    """
    teacher, length = task.labeller, task.length
    features = teacher.features()
    parts = (chosen.items, chosen.targets, chosen.mask)
    items, targets, mask = (part.reshape(-1, length).clone().to(task.device) for part in parts)
    while len(rows := (~mask).any(1).nonzero()[:, 0]):
        end = mask[rows].sum(1)
        items[rows, end] = targets[rows, end - 1]
        known = torch.arange(length, device=rows.device) <= end[:, None]
        seen = torch.where(known, items[rows], items[rows, :1])
        hidden = teacher(items[rows], features)[torch.arange(len(rows), device=rows.device), end]
        targets[rows, end] = teacher.scores(hidden, features).scatter(1, seen, -torch.inf).argmax(1)
        mask[rows, end] = True
    whole = {"items": items, "targets": targets, "mask": mask}
    return replace(chosen, **{name: part.cpu().reshape(chosen.items.shape) for name, part in whole.items()})


@torch.no_grad()
def hard_labels(task: Task, chosen: SyntheticSequences) -> SyntheticSequences:
    """Labels that know of the next item alone: z_y = s · f(e_target), with the teacher's scale s.

    As near to a hard target as labels of this form come: the rest of the probability lies on
    items of similar features. Which items are alike is the teacher's to say, and left out, as are further readings.
    """
    labelled = with_labels(task, chosen)
    f = labelled.features(task.embeddings.cpu())
    labels = task.labeller.log_scale.exp().cpu() * f[chosen.targets]
    return replace(labelled, labels=labels, alike=None, successors=None, further_labels=None, orders=None)


ITEMS = {"k-means": packed_medoids, "random": random_histories, "noise": noise}
LABELS = {"teacher": with_labels, "hard": hard_labels}


def start_sequences(
    task: Task, sequences: int, seed: int, items: str = "k-means", labels: str = "teacher", fill: bool = True
) -> SyntheticSequences:
    """Labelled sequences to start from.

    Parameters
    ----------
    items : a key of `ITEMS`
    labels : a key of `LABELS`
    fill : whether histories are `continued`

    Raises
    ------
    FosterError
        For other keys, or fewer users than windows.
    """
    check_known(items, ITEMS, "start_items")
    check_known(labels, LABELS, "start_labels")
    chosen = ITEMS[items](task, sequences, seed)
    return LABELS[labels](task, continued(task, chosen) if fill else chosen)


def kd_start(task: Task, sequences: int, seed: int) -> SyntheticSequences:
    """FOSTER's start as it is, nothing distilled: the row that says what distilling adds."""
    return start_sequences(task, sequences, seed)
