"""What S says of single items: what follows each of them on its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from foster_lib import coresets, starts
from foster_lib.config import load_profile
from foster_lib.errors import FosterError
from foster_lib.foster import FosterSettings, Synthesizer
from foster_lib.methods import get_method
from foster_lib.runs import Run, make_task
from foster_lib.subsets import Subset, sample_subset, synthetic_loss
from foster_lib.synthetic import SyntheticSequences
from foster_lib.synthetic_data import SyntheticData


@pytest.fixture
def told(task):
    return replace(task, successors=True)


@pytest.fixture
def sequences(told) -> SyntheticSequences:
    return coresets.kd(told, 4, seed=0)


@torch.no_grad()
def alone(model, item: int) -> torch.Tensor:
    """A model's scores of all items after a history of one."""
    features = model.features()
    return model.scores(model(torch.tensor([[item]]), features)[0, 0], features)


@torch.no_grad()
def test_the_map_is_the_least_squares_one(told, sequences):
    """Against NumPy's solver, and what it predicts against the teacher."""
    teacher, features = told.teacher, told.teacher.features()
    x = np.c_[features.double().numpy(), np.ones(told.n_items)]
    z = [teacher.log_scale.exp() * teacher(torch.tensor([[item]]), features)[0, 0] for item in range(told.n_items)]
    z = torch.stack(z).double().numpy()
    best = np.linalg.lstsq(x, z, rcond=None)[0]
    error, least = (((x @ np.asarray(a, dtype=float) - z) ** 2).sum() for a in (sequences.successors, best))
    assert error == pytest.approx(least, rel=1e-3)
    assert error < 0.5 * ((z - z.mean(0)) ** 2).sum()


@torch.no_grad()
def test_successors_are_near_what_the_teacher_expects(told, sequences):
    """Nearer than what follows items in general."""
    f, whole = sequences.features(told.embeddings), Subset.uniform(torch.arange(told.n_items), told.n_items)
    known = sequences.likeness(whole, f, np.random.default_rng(0), 1.0)
    assert len(known.rows) == told.n_items
    torch.testing.assert_close(known.successors.sum(1), torch.ones(told.n_items))
    expected = torch.stack([alone(told.teacher, item).softmax(-1) for item in known.rows.tolist()])
    distance = (known.successors - expected).abs().sum(1).mean()
    assert distance < 0.7 * (expected.mean(0) - expected).abs().sum(1).mean()


def test_successors_are_a_softmax_over_the_subset(told, sequences):
    """By the formula in float64; a drawn item counts for those it stands for."""
    f = sequences.features(told.embeddings)
    subset = sample_subset(told.n_items, 20, np.random.default_rng(1)).including(torch.arange(5))
    known = sequences.likeness(subset, f, np.random.default_rng(0), 1.0)
    assert len(set(subset.log_weight.tolist())) == 2
    f, a = f[subset.items].double(), sequences.successors.double()
    for row, y in zip(known.rows.tolist(), known.successors):
        odds = ((f[row] @ a[:-1] + a[-1]) @ f.T).exp() * subset.log_weight.double().exp()
        torch.testing.assert_close(y.double(), odds / odds.sum(), rtol=1e-4, atol=1e-7)


def test_the_loss_adds_what_follows_single_items(told, sequences):
    """Item by item, by the formula."""
    model, weight = told.new_model(1).eval(), 0.7
    batch = SyntheticData(sequences, told.embeddings, size=30, likeness=weight).draw(np.random.default_rng(0))
    known = batch.likeness
    without = synthetic_loss(model, replace(batch, likeness=replace(known, successors=None)))
    of_items = []
    for row, y in zip(known.rows.tolist(), known.successors):
        scores = alone(model, int(batch.subset.items[row]))[batch.subset.items] + batch.subset.log_weight
        of_items.append(-(y * scores.log_softmax(-1)).sum())
    added = synthetic_loss(model, batch) - without
    torch.testing.assert_close(added, weight * torch.stack(of_items).mean(), rtol=1e-4, atol=1e-5)


def test_a_student_of_single_items_learns_what_follows_them(told, sequences):
    """By gradient steps on this part alone, from the warm start."""
    model = told.new_model(1).eval()
    batch = SyntheticData(sequences, told.embeddings, likeness=1.0).draw(np.random.default_rng(0))
    before = synthetic_loss(model, batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        loss = synthetic_loss(model, batch)
        (loss - synthetic_loss(model, replace(batch, likeness=replace(batch.likeness, successors=None)))).backward()
        optimizer.step()
    assert loss < before


def test_phi_heeds_them_too(told, sequences):
    synthetic = Synthesizer(sequences, told.embeddings, FosterSettings(inner_likeness=0.5, subset=30))
    subset = synthetic.draw(np.random.default_rng(0))
    known = synthetic.batch(subset, np.random.default_rng(0)).likeness
    assert known.successors.shape == known.y.shape and known.weight == 0.5
    assert torch.equal(synthetic.result().successors, sequences.successors)


def test_they_are_kept_on_disk_and_only_told_where_asked_for(task, told, sequences, tmp_path):
    sequences.save(tmp_path / "s")
    found = SyntheticSequences.load(tmp_path / "s").successors
    torch.testing.assert_close(found, sequences.successors.half().float())
    assert coresets.kd(task, 4, seed=0).successors is None
    assert starts.start_sequences(told, 4, 0, labels="hard").successors is None
    assert coresets.random(told, 4, 0).successors is None


def test_rows_with_a_teacher_depend_on_them():
    settings = load_profile("smoke").settings("ml-100k")
    more = replace(settings, successors=True)
    assert make_task(Run(more, "untrained", 0)).successors
    for method in ("kd", "foster", "random+labels", "random", "full"):
        differs = Run(settings, method, 0).description() != Run(more, method, 0).description()
        assert differs == (get_method(method).needs_teacher and get_method(method).condenses)


def test_the_profile_says_yes_or_no():
    profile = load_profile("smoke")
    profile.raw["successors"] = 1
    with pytest.raises(FosterError, match="successors must be true or false"):
        profile.settings("ml-100k")
