"""Leave-one-out and temporal splits, and training windows."""

from __future__ import annotations

import numpy as np
import pytest

from foster_lib.datasets import Dataset
from foster_lib.errors import FosterError
from foster_lib.splits import global_temporal, leave_one_out, make_split, wide_validation, windows


def make_dataset(sequences, timestamps=None) -> Dataset:
    sequences = [np.asarray(s, np.int64) for s in sequences]
    timestamps = [np.asarray(t, np.int64) for t in timestamps] if timestamps else [np.arange(len(s)) for s in sequences]
    ids = [f"i{i}" for i in range(max(map(max, sequences)) + 1)]
    return Dataset("hand", ids, ids, ids, [f"u{u}" for u in range(len(sequences))], sequences, timestamps)


def test_leave_one_out_layout():
    """Last item: test; last but one: validation; the rest trains, if two items are left; short users only train."""
    split = leave_one_out(make_dataset([[0], [1, 2], [3, 4, 5], [6, 7, 8, 9, 10]]))
    assert [s.tolist() for s in split.train] == [[1, 2], [6, 7, 8]]
    assert split.validation.users.tolist() == split.test.users.tolist() == [2, 3]
    assert split.validation.targets.tolist() == [4, 9]
    assert split.test.targets.tolist() == [5, 10]
    assert [h.tolist() for h in split.validation.histories] == [[3], [6, 7, 8]]
    assert [h.tolist() for h in split.test.histories] == [[3, 4], [6, 7, 8, 9]]
    assert len(split.test) == 2


def test_leave_one_out_never_trains_on_a_target(dataset, split):
    """History, validation target and test target put together are the user's sequence."""
    for q, user in enumerate(split.test.users):
        parts = [split.train[q], [split.validation.targets[q]], [split.test.targets[q]]]
        assert np.array_equal(np.concatenate(parts), dataset.sequences[user])


def test_wide_validation_by_hand():
    """Two targets per user before the test item; short users give what they have; the rest trains."""
    sequences = [np.arange(6), np.array([7, 8, 9, 10]), np.array([1, 2]), np.array([3, 4, 5])]
    dataset = Dataset(
        "toy", [""] * 11, [""] * 11, [""] * 11, list("abcd"), sequences, [np.arange(len(s)) for s in sequences]
    )
    split = wide_validation(dataset, 2)
    assert [s.tolist() for s in split.train] == [[0, 1, 2], [7, 8], [1, 2], [3, 4]]
    assert split.validation.users.tolist() == [0, 0, 1]
    assert split.validation.targets.tolist() == [3, 4, 9]
    assert [h.tolist() for h in split.validation.histories] == [[0, 1, 2], [0, 1, 2, 3], [7, 8]]
    assert split.test.targets.tolist() == [5, 10, 5]


@pytest.mark.parametrize("make", [leave_one_out, global_temporal])
def test_training_timestamps_belong_to_their_items(dataset, make):
    """Each training item keeps its own time."""
    split = make(dataset)
    assert len(split.train) == len(split.train_timestamps) > 0
    users = iter(zip(dataset.sequences, dataset.timestamps))  # training keeps their order
    for items, times in zip(split.train, split.train_timestamps):
        n = len(items)
        assert len(times) == n
        assert any(np.array_equal(s[:n], items) and np.array_equal(t[:n], times) for s, t in users)


def test_no_user_to_evaluate_is_an_error():
    """Sequences of two items leave nothing to rank."""
    with pytest.raises(FosterError, match="no user is left to evaluate on"):
        leave_one_out(make_dataset([[0, 1], [1, 2]]))


@pytest.mark.parametrize("cuts", [(0.8, 0.9), (0.5, 0.7)])
def test_temporal_split_never_looks_past_the_cut(dataset, cuts):
    """Training, histories and targets lie on their side of the dates; each target is the first in its span."""
    split = global_temporal(dataset, *cuts)
    times = np.sort(np.concatenate(dataset.timestamps))
    first, second = (times[int(np.floor(cut * (len(times) - 1)))] for cut in cuts)
    expected = [[(i, t) for i, t in zip(s, ts) if t < first] for s, ts in zip(dataset.sequences, dataset.timestamps)]
    assert [s.tolist() for s in split.train] == [[i for i, _ in e] for e in expected if len(e) >= 2]
    for queries, start, end in ((split.validation, first, second), (split.test, second, np.inf)):
        asked = dict(zip(queries.users.tolist(), zip(queries.histories, queries.targets)))
        assert len(queries) > 3
        for user, (sequence, time) in enumerate(zip(dataset.sequences, dataset.timestamps)):
            before, inside = sequence[time < start], sequence[(time >= start) & (time < end)]
            assert (user in asked) == bool(len(before) and len(inside))
            if user in asked:
                history, target = asked[user]
                assert np.array_equal(history, before)
                assert target == inside[0]


def test_temporal_split_by_hand():
    """Cuts at 50 and 70: user 1 skips the validation span, user 2 has no past, user 3 is never seen again."""
    times = [[0, 40, 50, 60, 80], [10, 20, 90], [70, 90], [0, 10, 20]]
    data = make_dataset([[0, 1, 2, 3, 4], [4, 3, 2], [1, 0], [2, 4, 1]], times)
    split = global_temporal(data, 0.6, 0.8)  # the sorted times' entries 7 and 9
    assert np.sort(np.concatenate(times))[[7, 9]].tolist() == [50, 70]
    assert [s.tolist() for s in split.train] == [[0, 1], [4, 3], [2, 4, 1]]
    assert (split.validation.users.tolist(), split.validation.targets.tolist()) == ([0], [2])
    assert (split.test.users.tolist(), split.test.targets.tolist()) == ([0, 1], [4, 2])
    assert [h.tolist() for h in split.test.histories] == [[0, 1, 2, 3], [4, 3]]


def test_temporal_split_needs_real_time():
    """Timestamps that are only positions are refused, with the k-core's gaps too; one user with real time is enough."""
    sequences = [[0, 1, 2, 3], [3, 2, 1], [1, 0, 2, 3, 1]]
    for positions in (None, [[0, 1, 3, 4], [1, 2, 4], [0, 2, 3, 5, 6]]):
        with pytest.raises(FosterError, match="'hand' knows only the order within each user"):
            global_temporal(make_dataset(sequences, positions))
    global_temporal(make_dataset(sequences, [[0, 1, 2, 3], [0, 1, 2], [0, 0, 1, 2, 7]]), 0.5, 0.7)


def test_make_split_by_name(dataset):
    """Both names work, a misspelt one is answered with the nearest."""
    assert make_split(dataset, "leave-one-out").name == "leave-one-out"
    assert make_split(dataset, "temporal").name == "temporal"
    with pytest.raises(FosterError, match="unknown split 'leave-one-uot'. Did you mean 'leave-one-out'"):
        make_split(dataset, "leave-one-uot")


# -------------------------------------------------------------------------------- windows


def check_windows(sequences, pieces, length):
    """Every transition is a target once, in order, and no window is too long or too short."""
    transitions = [pair for s in sequences for pair in zip(s[:-1].tolist(), s[1:].tolist())]
    found = [pair for p in pieces for pair in zip(p[:-1].tolist(), p[1:].tolist())]
    assert found == transitions
    assert all(2 <= len(piece) <= length + 1 for piece in pieces)


@pytest.mark.parametrize("length", [1, 2, 5, 7])
def test_windows_cover_every_transition_once(length):
    """All lengths around the multiples of the window, with and without random cuts."""
    sequences = [np.arange(n) + 1000 * n for n in range(2, 26)]
    check_windows(sequences, windows(sequences, length), length)
    for seed in range(20):
        check_windows(sequences, windows(sequences, length, np.random.default_rng(seed)), length)


def test_windows_without_generator_are_counted_from_the_end():
    """Only the oldest window may be short, so the newest transition has the longest context."""
    pieces = windows([np.arange(12)], 5)
    assert [p.tolist() for p in pieces] == [[0, 1], [1, 2, 3, 4, 5, 6], [6, 7, 8, 9, 10, 11]]
    assert [p.tolist() for p in windows([np.arange(11)], 5)] == [[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10]]


def test_windows_with_generator_move():
    """All first cuts occur, equal seeds cut alike, and short sequences stay whole."""
    generator = np.random.default_rng(0)
    firsts = {len(windows([np.arange(30)], 5, generator)[0]) - 1 for _ in range(200)}
    assert firsts == {1, 2, 3, 4, 5}
    once, again = (windows([np.arange(30)] * 5, 5, np.random.default_rng(3)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert [p.tolist() for p in windows([np.arange(6)], 5, generator)] == [[0, 1, 2, 3, 4, 5]]
