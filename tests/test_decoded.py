"""Decoded sequences: of each mixture and label the largest part is kept, in whatever items a step sees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from foster_lib.decoded import DecodedSequences, foster_decoded, largest
from foster_lib.errors import FosterError
from foster_lib.foster import FosterSettings, distill, foster
from foster_lib.methods import get_method
from foster_lib.starts import start_sequences
from foster_lib.subsets import Subset, sample_subset
from foster_lib.synthetic import SyntheticSequences
from foster_lib.synthetic_data import SyntheticData

FAST = {"iterations": 2, "subset": 20, "windows": 4, "pool": 1}


@pytest.fixture
def soft(task) -> SyntheticSequences:
    """FOSTER's form with mixtures that are far from pure."""
    task = replace(task, readings=3)
    start = start_sequences(task, 3, 0, "k-means", "teacher", True)
    learned, _ = distill(task, start, FosterSettings(**FAST), seed=0)
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(learned.queries.shape, generator=generator) * 3
    return replace(learned, queries=queries, bonus=torch.rand(learned.bonus.shape, generator=generator) * 10)


def decoded(soft: SyntheticSequences, inputs: int, targets: int) -> DecodedSequences:
    return DecodedSequences(**vars(soft), kept=torch.tensor([inputs, targets]))


def test_the_largest_keep_their_proportions():
    p = torch.tensor([[0.1, 0.5, 0.3, 0.1], [0.4, 0.2, 0.35, 0.05]])
    assert torch.equal(largest(p, 0), p) and torch.equal(largest(p, 9), p)
    torch.testing.assert_close(largest(p, 2), torch.tensor([[0, 0.625, 0.375, 0], [0.4 / 0.75, 0, 0.35 / 0.75, 0]]))
    assert torch.equal(largest(p, 1), torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0]]))


@pytest.mark.parametrize("inputs, targets", [(0, 0), (1, 1), (3, 0), (0, 5), (4, 2), (10**6, 10**6)])
def test_a_step_reads_what_the_whole_catalogue_says(task, soft, inputs, targets):
    """Of each reading, over all items and over a subset that holds what is wanted."""
    sequences = decoded(soft, inputs, targets)
    f = sequences.features(task.embeddings)
    for number in range(3):
        reading, plain = sequences.reading(number), soft.reading(number)
        p, y = reading.input_probabilities(task.embeddings), reading.target_probabilities(task.embeddings)
        torch.testing.assert_close(p, largest(plain.input_probabilities(task.embeddings), inputs))
        torch.testing.assert_close(y, largest(plain.target_probabilities(task.embeddings), targets))
        drawn = sample_subset(task.n_items, 3, np.random.default_rng(0)).including(reading.wanted(f))
        everything = Subset.uniform(torch.arange(task.n_items), task.n_items)
        for subset in (everything, drawn) if inputs and targets else (everything,):
            batch = reading.batch(subset, f)
            seen = torch.zeros_like(p).index_add(-1, subset.items, batch.p)
            seen = seen.scatter_add(-1, reading.items[..., None], batch.own[..., None])
            torch.testing.assert_close(seen[reading.mask], p[reading.mask])
            wanted = torch.zeros_like(y[reading.mask]).index_add(-1, subset.items, batch.y)
            torch.testing.assert_close(wanted, y[reading.mask])


def test_steps_of_some_windows_want_what_is_kept(task, soft):
    """As on large catalogues: windows and items of each step are drawn, labels still sum to one."""
    data = SyntheticData(decoded(soft, 3, 4), task.embeddings, size=5, likeness=1.0, count=2, length=3)
    generator = np.random.default_rng(0)
    for _ in range(5):
        batch = data.draw(generator)
        assert len(batch.mask) == 2 and ((batch.y > 0).sum(-1) == 4).all()
        torch.testing.assert_close(batch.y.sum(-1), torch.ones(len(batch.y)))
        assert (((batch.p > 0).sum(-1) + (batch.own > 0)) == 3)[batch.mask].all()


def test_foster_decoded_is_foster_cut(task, tmp_path):
    learned = foster(task, 3, 0, **FAST)
    cut = foster_decoded(task, 3, 0, kept_inputs=2, kept_targets=0, **FAST)
    p = learned.input_probabilities(task.embeddings)
    torch.testing.assert_close(cut.input_probabilities(task.embeddings), largest(p, 2))
    torch.testing.assert_close(cut.target_probabilities(task.embeddings), learned.target_probabilities(task.embeddings))
    again = get_method("foster-decoded").form.load(cut.save(tmp_path / "cut"))
    assert again.kept.tolist() == [2, 0]
    rounded = largest(learned.stored().input_probabilities(task.embeddings), 2)
    torch.testing.assert_close(again.input_probabilities(task.embeddings), rounded)

    hard = foster_decoded(task, 3, 0, hard=True, **FAST)
    assert set(hard.tensors()) == {"items", "mask", "targets"} and hard.counts == (0, 0)
    assert torch.equal(hard.items[hard.mask], p.argmax(-1)[hard.mask])
    best = learned.target_probabilities(task.embeddings).argmax(-1)
    assert torch.equal(hard.targets[hard.mask], best[hard.mask])


def test_a_negative_number_of_items_is_refused(task):
    with pytest.raises(FosterError, match="0 for all, not -1 and 1"):
        foster_decoded(task, 3, 0, kept_inputs=-1, **FAST)


def test_items_that_stand_for_many_push_out_none_that_is_kept(task, soft):
    """One position, whose anchor is improbable: beside what is wanted, drawn items of great weight."""
    mask = torch.zeros_like(soft.mask)
    mask[0, 0] = True
    bonus = torch.full_like(soft.bonus, -20.0)
    queries = 10 * soft.features(task.embeddings)[soft.items]  # but for the bonus the anchor is the most probable
    reading = decoded(replace(soft.reading(0), mask=mask, bonus=bonus, queries=queries), 2, 2)
    f = reading.features(task.embeddings)
    items = torch.arange(task.n_items)
    subset = Subset(items, task.n_items, torch.where(torch.isin(items, reading.wanted(f)), 0.0, 30.0))
    batch = reading.batch(subset, f)
    seen = batch.p.scatter_add(-1, reading.items[..., None], batch.own[..., None])
    torch.testing.assert_close(seen[mask], reading.input_probabilities(task.embeddings)[mask])
    torch.testing.assert_close(batch.y, reading.target_probabilities(task.embeddings)[mask])
