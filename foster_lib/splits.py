"""Leave-one-out and global temporal splits, and the windows that training reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from foster_lib.datasets import Dataset
from foster_lib.errors import FosterError, check_known


@dataclass(frozen=True)
class Queries:
    """Ranking tasks: given `histories[q]`, rank all items; `targets[q]` is the right one.

    `users[q]` is the index of the user, so that two methods can be compared user by user.
    """

    users: np.ndarray
    histories: list[np.ndarray]
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Split:
    """Training sequences (at least two items each) with their timestamps, validation and test queries."""

    name: str
    train: list[np.ndarray]
    train_timestamps: list[np.ndarray]
    validation: Queries
    test: Queries


def make_split(dataset: Dataset, name: str) -> Split:
    """`leave-one-out` or `temporal`, by name."""
    splits = {"leave-one-out": leave_one_out, "temporal": global_temporal}
    check_known(name, splits, "split")
    return splits[name](dataset)


def leave_one_out(dataset: Dataset) -> Split:
    """Each user's last item is the test target, the last but one the validation target.

    Users with fewer than three interactions only train.
    """
    sequences = dataset.sequences
    users = [u for u, sequence in enumerate(sequences) if len(sequence) >= 3]
    kept = [len(sequence) - 2 if len(sequence) >= 3 else len(sequence) for sequence in sequences]
    return Split(
        "leave-one-out",
        *_training_part(dataset, kept),
        _queries(users, [sequences[u][:-2] for u in users], [sequences[u][-2] for u in users]),
        _queries(users, [sequences[u][:-1] for u in users], [sequences[u][-1] for u in users]),
    )


def wide_validation(dataset: Dataset, targets: int) -> Split:
    """Leave-one-out with up to `targets` validation targets per user, to choose settings with less noise.

    The last item stays the test target, untouched; the `targets` items before it are validation
    targets, each given everything before it, and the rest trains. At least two items train.
    """
    sequences = dataset.sequences
    kept = [max(min(2, len(sequence)), len(sequence) - 1 - targets) for sequence in sequences]
    places = [(u, place) for u, first in enumerate(kept) for place in range(first, len(sequences[u]) - 1)]
    users = [u for u, _ in places]
    test = leave_one_out(dataset).test
    histories = [sequences[u][:place] for u, place in places]
    validation = _queries(users, histories, [sequences[u][place] for u, place in places])
    return Split("wide-validation", *_training_part(dataset, kept), validation, test)


def global_temporal(dataset: Dataset, validation_from: float = 0.8, test_from: float = 0.9) -> Split:
    """Train on what happened before one date, validate on the next span, test on the last.

    The dates are the quantiles `validation_from` and `test_from` of all timestamps. A user's
    query is the first interaction inside the span, given everything the user did before the
    span, so no history reaches past the date that the model was trained up to.

    Raises
    ------
    FosterError
        If the timestamps carry no time between users (only positions 0, 1, 2 …).
    """
    if not knows_time(dataset):
        raise FosterError(
            f"data set '{dataset.name}' knows only the order within each user, so a temporal split "
            "is not possible. Use the leave-one-out split."
        )
    everything = np.concatenate(dataset.timestamps)
    first, second = np.quantile(everything, [validation_from, test_from], method="lower")
    return Split(
        "temporal",
        *_training_part(dataset, [int((t < first).sum()) for t in dataset.timestamps]),
        _span_queries(dataset, first, second),
        _span_queries(dataset, second, np.inf),
    )


def knows_time(dataset: Dataset) -> bool:
    """Whether timestamps are times of a clock, and not only positions 0, 1, 2 … within each user.

    Positions have gaps where the k-core took an interaction out; they never repeat and stay near
    the lengths, while times of a clock are larger by orders of magnitude.
    """
    longest = max(map(len, dataset.timestamps))
    repeats = any((np.diff(time) == 0).any() for time in dataset.timestamps)
    return bool(repeats or max(time[-1] for time in dataset.timestamps) >= 2 * longest)


def _training_part(dataset: Dataset, kept: list[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The first `kept` interactions of each user with two or more of them: items, timestamps."""
    users = [user for user, count in enumerate(kept) if count >= 2]
    return tuple([series[user][: kept[user]] for user in users] for series in (dataset.sequences, dataset.timestamps))


def _span_queries(dataset: Dataset, start: float, end: float) -> Queries:
    users, histories, targets = [], [], []
    for user, (sequence, time) in enumerate(zip(dataset.sequences, dataset.timestamps)):
        position = int(np.searchsorted(time, start))  # first interaction at or after `start`
        if 0 < position < len(time) and time[position] < end:
            users.append(user)
            histories.append(sequence[:position])
            targets.append(sequence[position])
    return _queries(users, histories, targets)


def _queries(users: list[int], histories: list[np.ndarray], targets: list[int]) -> Queries:
    if not users:
        raise FosterError("no user is left to evaluate on: the split needs longer sequences.")
    return Queries(np.asarray(users, np.int64), histories, np.asarray(targets, np.int64))


def windows(sequences: list[np.ndarray], length: int, generator: np.random.Generator | None = None):
    """Cut sequences into training windows of at most `length` + 1 items (inputs and targets).

    Consecutive windows share one item, so every transition is a target exactly once. Without a
    generator the cuts are counted from the end of the sequence; with one the first cut is drawn
    anew, so that epochs see different contexts.

    Returns
    -------
    list of int64 arrays, 2 … `length` + 1 items each
    """
    pieces = []
    for sequence in sequences:
        transitions = len(sequence) - 1
        first = (transitions - 1) % length + 1
        if generator is not None and transitions > length:
            first = int(generator.integers(1, length + 1))
        ends = [*range(first, transitions, length), transitions]
        start = 0
        for end in ends:
            pieces.append(sequence[start : end + 1])
            start = end
    return pieces
