"""What must hold for any input, on inputs that hypothesis makes up: 200 examples each, the same ones every time."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foster_lib.datasets import Dataset, k_core
from foster_lib.evaluation import METRICS, Ranks, rank_queries
from foster_lib.export import decode, prompts
from foster_lib.splits import Queries, global_temporal, leave_one_out, wide_validation, windows
from foster_lib.subsets import Subset, sample_subset, subset_inputs
from foster_lib.synthetic import SyntheticSequences

EXAMPLES = 200
examples = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)

interactions = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=60)
sequences = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), min_size=1, max_size=8)
seeds = st.integers(0, 2**32 - 1)


# --------------------------------------------------------------------------------------- k-core


def peeled(rows: list[tuple[int, int]], k: int) -> list[tuple[int, int]]:
    """One offending row at a time."""
    rows = list(rows)
    while bad := [row for row in rows if min(sum(r[i] == row[i] for r in rows) for i in (0, 1)) < k]:
        rows.remove(bad[0])
    return rows


@examples
@given(interactions, st.integers(1, 4))
def test_the_core_is_the_largest_in_which_all_have_k(rows, k):
    core = k_core(pd.DataFrame(rows, columns=["user_id", "item_id"]), k)
    assert list(core.itertuples(index=False, name=None)) == peeled(rows, k)
    smaller = k_core(pd.DataFrame(rows, columns=["user_id", "item_id"]), k + 1)
    assert set(smaller.index) <= set(core.index) and core.index.is_monotonic_increasing


# --------------------------------------------------------------------------------------- splits


def made_of(lists: list[list[int]], times: list[list[int]] | None = None) -> Dataset:
    ids = [str(item) for item in range(10)]
    arrays = [np.array(part, np.int64) for part in lists]
    clocks = [np.arange(len(part)) for part in lists] if times is None else [np.array(part, np.int64) for part in times]
    return Dataset("made", ids, ids, ids, [str(user) for user in range(len(lists))], arrays, clocks)


@examples
@given(sequences.filter(lambda lists: any(len(part) >= 3 for part in lists)), st.integers(1, 4))
def test_leave_one_out_gives_every_interaction_one_role(lists, targets):
    """Training, validation target and test target together are the sequence, in its order; nothing is shown early."""
    split = leave_one_out(made_of(lists))
    users = [user for user, part in enumerate(lists) if len(part) >= 3]
    assert split.test.users.tolist() == split.validation.users.tolist() == users
    for query, user in enumerate(users):
        whole, test, validation = lists[user], split.test, split.validation
        assert [*test.histories[query], test.targets[query]] == whole
        assert [*validation.histories[query], validation.targets[query]] == whole[:-1]
    trained = [part[:-2] if len(part) >= 3 else part for part in lists]
    assert [part.tolist() for part in split.train] == [part for part in trained if len(part) >= 2]
    assert [len(part) for part in split.train] == [len(part) for part in split.train_timestamps]
    if max(map(len, lists)) < 4:  # two items train, one is the test target
        return
    wide = wide_validation(made_of(lists), targets)
    assert wide.test.targets.tolist() == split.test.targets.tolist()
    for user, history, target in zip(wide.validation.users, wide.validation.histories, wide.validation.targets):
        assert [*history, target] == lists[user][: len(history) + 1] and len(history) + 1 < len(lists[user])


@examples
@given(st.lists(st.lists(st.integers(0, 10**6), min_size=2, max_size=8), min_size=3, max_size=8), seeds)
def test_the_temporal_split_never_looks_past_its_dates(times, seed):
    times = [sorted(part) for part in times]
    drawn = np.random.default_rng(seed)
    data = made_of([drawn.integers(0, 10, len(part)).tolist() for part in times], times)
    data.timestamps[0][-1] += 10**6  # a clock, not positions
    first, second = np.quantile(np.concatenate(data.timestamps), [0.8, 0.9], method="lower")
    try:
        split = global_temporal(data)
    except ValueError as error:
        assert "no user is left" in str(error)
        return
    assert all((part < first).all() for part in split.train_timestamps)
    for queries, begin, end in ((split.validation, first, second), (split.test, second, np.inf)):
        for user, history, target in zip(queries.users, queries.histories, queries.targets):
            time = data.timestamps[user]
            assert (time[: len(history)] < begin).all() and begin <= time[len(history)] < end
            assert data.sequences[user][len(history)] == target


@examples
@given(sequences.map(lambda lists: [part for part in lists if len(part) >= 2]), st.integers(1, 6), st.none() | seeds)
def test_windows_hold_every_transition_once(lists, length, seed):
    arrays = [np.array(part) for part in lists]
    pieces = windows(arrays, length, None if seed is None else np.random.default_rng(seed))
    pairs = [pair for piece in pieces for pair in zip(piece[:-1].tolist(), piece[1:].tolist())]
    assert pairs == [pair for part in lists for pair in zip(part[:-1], part[1:])]
    assert all(2 <= len(piece) <= length + 1 for piece in pieces)


# -------------------------------------------------------------------------------------- metrics


@examples
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=25), st.data())
def test_ranks_are_counts_and_metrics_are_means_over_the_ties(levels, data):
    """Against a loop over all places that the target can have among the items with its score."""
    n, scores = len(levels), torch.tensor([levels], dtype=torch.float32)
    target = data.draw(st.integers(0, n - 1))
    history = data.draw(st.lists(st.integers(0, n - 1), max_size=n))
    queries = Queries(np.array([0]), [np.array(history, np.int64)], np.array([target]))
    ranks = rank_queries(lambda histories: scores, queries, n)
    others = [levels[item] for item in range(n) if item != target and item not in history]
    higher, tied = sum(level > levels[target] for level in others), sum(level == levels[target] for level in others)
    assert (ranks.higher[0], ranks.tied[0]) == (higher, tied)
    places = range(higher + 1, higher + tied + 2)
    for metric in METRICS:
        name, _, cut = metric.partition("@")
        gain = {"mrr": lambda p: 1 / p, "recall": lambda p: 1.0, "ndcg": lambda p: 1 / np.log2(1 + p)}[name]
        expected = np.mean([gain(place) if not cut or place <= int(cut) else 0.0 for place in places])
        assert abs(ranks.per_user(metric)[0] - expected) < 1e-12
    monotone = rank_queries(lambda histories: scores.exp() * 3 - 1, queries, n)
    assert (monotone.higher, monotone.tied) == (ranks.higher, ranks.tied)


@examples
@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), min_size=1, max_size=20))
def test_metrics_are_in_range_and_rise_with_the_cut(counts):
    higher, tied = np.array(counts).T
    values = Ranks(np.arange(len(counts)), higher, tied).metrics()
    assert all(0 <= value <= 1 for value in values.values())
    for name in ("ndcg", "recall"):
        assert values[f"{name}@5"] <= values[f"{name}@10"] + 1e-12 <= values[f"{name}@20"] + 2e-12
    assert all(values[f"ndcg@{cut}"] <= values[f"recall@{cut}"] + 1e-12 for cut in (5, 10, 20))


# ------------------------------------------------------------------------------ subset indexing


@examples
@given(st.integers(1, 60), st.integers(1, 70), seeds, st.lists(st.integers(0, 59), min_size=1, max_size=30))
def test_places_in_a_subset_are_those_of_the_items(n_items, size, seed, anchors):
    subset = sample_subset(n_items, size, np.random.default_rng(seed))
    items = subset.items.tolist()
    assert items == sorted(set(items)) and len(items) == min(size, n_items) and 0 <= items[0] <= items[-1] < n_items
    place, inside = subset.positions(torch.tensor(anchors))
    assert inside.tolist() == [anchor in items for anchor in anchors]
    assert all(items[p] == a for p, a, there in zip(place.tolist(), anchors, inside.tolist()) if there)
    wanted = [anchor % n_items for anchor in anchors]
    wider = subset.including(torch.tensor(wanted))
    assert set(wider.items.tolist()) == {*items, *wanted} and wider.positions(torch.tensor(wanted))[1].all()
    weight = wider.log_weight.exp()  # how many items of the catalogue each stands for
    if set(items) - set(wanted):
        torch.testing.assert_close(weight.sum(), torch.tensor(float(n_items)), rtol=1e-4, atol=1e-4)


@examples
@given(st.integers(2, 12), st.integers(1, 12), seeds)
def test_inputs_over_a_subset_are_a_distribution_with_the_anchor_in_it(n_items, size, seed):
    """No item is counted twice; over all items it is the softmax of the catalogue."""
    drawn = torch.Generator().manual_seed(seed)
    f = torch.nn.functional.normalize(torch.randn(n_items, 3, generator=drawn), dim=-1)
    anchors = torch.randint(n_items, (2, 4), generator=drawn)
    queries, bonus = torch.randn(2, 4, 3, generator=drawn), torch.randn(2, 4, generator=drawn)
    subset = sample_subset(n_items, size, np.random.default_rng(seed))
    others, own = subset_inputs(queries, bonus, anchors, subset, f[subset.items], f[anchors])
    torch.testing.assert_close(others.sum(-1) + own, torch.ones(2, 4))
    place, inside = subset.positions(anchors)
    assert (others.gather(-1, place[..., None])[..., 0][inside] == 0).all()
    if len(subset.items) == n_items:
        logits = (queries @ f.T).scatter_add(-1, anchors[..., None], bonus[..., None])
        whole = others.scatter_add(-1, anchors[..., None], own[..., None])
        torch.testing.assert_close(whole, logits.softmax(-1), rtol=1e-4, atol=1e-6)
    assert Subset.uniform(subset.items, n_items).log_weight == subset.log_weight


# ------------------------------------------------------------------------------------- decoding

pieces = st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=5), min_size=1, max_size=4)
titles = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@examples
@given(pieces, st.lists(titles, min_size=6, max_size=6), st.integers(1, 9), seeds)
def test_decoding_finds_the_most_probable_items(pieces, names, top, seed):
    """Best first, as a sort of all probabilities does; each prompt names the titles so far, each on its line."""
    drawn = torch.Generator().manual_seed(seed)
    real = SyntheticSequences.from_windows([np.array(piece) for piece in pieces], 4)
    shape = (*real.items.shape, 3)
    adapter = {"linear.weight": torch.randn(3, 5, generator=drawn), "linear.bias": torch.zeros(3)}
    mixed = SyntheticSequences(
        real.items, real.mask, real.targets, adapter, torch.randn(shape, generator=drawn),
        torch.randn(shape, generator=drawn), torch.randn(shape[:2], generator=drawn),
    )  # fmt: skip
    embeddings = torch.randn(6, 5, generator=drawn)
    for chosen in (real, mixed):
        decoded = decode(chosen, embeddings, [f"i{n}" for n in range(6)], names, top)
        assert len(decoded) == int(real.mask.sum()) == sum(len(piece) - 1 for piece in pieces)
        for items, chances, probabilities in (
            (decoded.inputs, decoded.input_probabilities, chosen.input_probabilities(embeddings)[real.mask]),
            (decoded.targets, decoded.target_probabilities, chosen.target_probabilities(embeddings)[real.mask]),
        ):
            assert items.shape == (len(decoded), min(top, 6))
            np.testing.assert_array_equal(chances, -np.sort(-probabilities.numpy(), axis=1)[:, :top])
            np.testing.assert_array_equal(chances, np.take_along_axis(probabilities.numpy(), items, 1))
        if chosen is real:
            flat = [(a, b) for piece in pieces for a, b in zip(piece[:-1], piece[1:])]
            assert list(zip(decoded.inputs[:, 0].tolist(), decoded.targets[:, 0].tolist())) == flat
        for prompt, position in zip(prompts(decoded), decoded.position):
            assert len(prompt["messages"][0]["content"].split("\n")) == int(position) + 3
