"""What students learn of items apart from the sequences: which of them are alike in S."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from foster_lib import coresets
from foster_lib.adjoint import Rollout
from foster_lib.batches import make_batch
from foster_lib.config import load_profile
from foster_lib.foster import FosterSettings, Synthesizer, distill
from foster_lib.methods import get_method
from foster_lib.recipes import train_student
from foster_lib.runs import Run
from foster_lib.starts import start_sequences
from foster_lib.subsets import Likeness, Subset, likeness_loss, sample_subset, synthetic_loss
from foster_lib.synthetic import SyntheticSequences
from foster_lib.synthetic_data import SyntheticData
from foster_lib.td3 import TuckerSequences, start_factors

FAST = FosterSettings(iterations=3, windows=4, pool=1, subset=40, inner_likeness=0.7)


@pytest.fixture
def labelled(task) -> SyntheticSequences:
    return coresets.kd(task, 4, seed=0)


def everything(task) -> Subset:
    return Subset.uniform(torch.arange(task.n_items), task.n_items)


def test_likeness_is_a_softmax_over_all_other_items(task, labelled):
    """Over all items, one by one, in float64; an item is not compared with itself."""
    f = labelled.features(task.embeddings)
    likeness = labelled.likeness(everything(task), f, np.random.default_rng(0), 0.5)
    assert likeness.weight == 0.5 and len(likeness.rows) == min(512, task.n_items)
    for place, y in zip(likeness.rows.tolist(), likeness.y):
        weight = torch.exp(coresets.ALIKE * f.double() @ f[place].double())
        weight[place] = 0
        torch.testing.assert_close(y.double(), weight / weight.sum(), rtol=1e-4, atol=1e-7)


def test_a_subset_estimates_the_likeness_of_all(task, labelled):
    """Drawn items stand for those left out: what is surely in the subset keeps its mean probability."""
    f, generator = labelled.features(task.embeddings), np.random.default_rng(0)
    sure = torch.arange(3)
    weight = torch.exp(coresets.ALIKE * f @ f[0])
    weight[0] = 0
    wanted, seen = weight[1] / weight.sum(), []
    for _ in range(400):
        subset = sample_subset(task.n_items, task.n_items // 2, generator).including(sure)
        likeness = labelled.likeness(subset, f, np.random.default_rng(0), 1.0)
        row = int((likeness.rows == 0).nonzero())
        seen.append(1 / float(likeness.y[row, 1]))  # the partition sum is what is estimated without bias
    assert np.mean(seen) == pytest.approx(1 / float(wanted), rel=0.03)


def test_turned_features_are_as_alike(task, labelled):
    """The loss is least, its gradient zero, at S's own features and at any rotation of them."""
    f = labelled.features(task.embeddings)
    likeness = labelled.likeness(everything(task), f, np.random.default_rng(0), 1.0)
    turn = torch.linalg.qr(torch.randn(f.shape[1], f.shape[1], generator=torch.Generator().manual_seed(0)))[0]
    turned = (f @ turn).requires_grad_()
    least = likeness_loss(turned, everything(task), likeness)
    (gradient,) = torch.autograd.grad(least, turned)
    assert gradient.abs().max() < 1e-5
    torch.testing.assert_close(least, likeness_loss(f, everything(task), likeness))
    other = torch.nn.functional.normalize(turned.detach() + 0.3 * turned.detach().roll(1, 0), dim=-1)
    assert likeness_loss(other, everything(task), likeness) > least


def test_the_loss_of_a_batch_adds_its_likeness(task, labelled):
    model = task.new_model(1).eval()
    data = SyntheticData(labelled, task.embeddings, size=30, likeness=0.7)
    batch = data.draw(np.random.default_rng(0))
    plain = synthetic_loss(model, replace(batch, likeness=None))
    own = likeness_loss(model.features(batch.subset.items), batch.subset, batch.likeness)
    torch.testing.assert_close(data.loss(model, batch), plain + 0.7 * own)
    assert isinstance(batch.to("cpu").likeness, Likeness)


def test_each_step_compares_other_items(task, labelled, monkeypatch):
    """Over the whole catalogue too, where the rest of the batch stays the same."""
    monkeypatch.setattr("foster_lib.synthetic.LIKENESS_ROWS", 5)
    data, generator = SyntheticData(labelled, task.embeddings, likeness=1.0), np.random.default_rng(0)
    first, second = data.draw(generator), data.draw(generator)
    assert len(first.likeness.rows) == 5 and not torch.equal(first.likeness.rows, second.likeness.rows)
    assert first.y is second.y


@pytest.mark.parametrize("method", ["random", "gradient-matching", "foster-tied"])
def test_without_a_teacher_there_is_no_likeness(task, method):
    """Sequences that start at real next items know nothing of it, whatever the student's settings ask for."""
    few = {"iterations": 1, "start": "real"} if method != "random" else {}
    sequences = get_method(method).function(task, sequences=4, seed=0, **few)
    assert sequences.alike is None
    assert SyntheticData(sequences, task.embeddings, likeness=1.0).draw(np.random.default_rng(0)).likeness is None


def test_hard_labels_have_none_though_they_are_written_in_the_teachers_features(task):
    assert start_sequences(task, 4, 0, labels="hard").alike is None
    assert float(start_sequences(task, 4, 0, labels="teacher").alike) == coresets.ALIKE


def test_factors_of_td3_tell_it_as_labels_do(task):
    """Its item factors are the teacher's features, so that its students learn no less of them than FOSTER's."""
    users, times, core = start_factors(3, task.length + 1, 2, task.model_settings.width, 0)
    adapter = task.teacher.adapter_weights()
    sequences = TuckerSequences.from_factors(users=users, times=times, core=core, adapter=adapter)
    assert float(sequences.alike) == coresets.ALIKE


@pytest.mark.parametrize(("method", "differs"), [("random", False), ("kd", True), ("random+labels", True)])
def test_only_runs_with_a_teacher_depend_on_it(method, differs):
    settings = load_profile("smoke").settings("ml-100k")
    without = replace(settings, student=replace(settings.student, likeness=0.0))
    assert (Run(settings, method, 0).description() != Run(without, method, 0).description()) == differs


def test_the_file_keeps_it(labelled, tmp_path):
    labelled.save(tmp_path / "kd")
    assert float(SyntheticSequences.load(tmp_path / "kd").alike) == coresets.ALIKE


def test_students_heed_it_as_their_settings_say(task, labelled):
    """Weight 0 is training without; a weight leaves the student's items arranged more as S has them."""
    settings = load_profile("smoke").settings("ml-100k")
    f = labelled.features(task.embeddings)

    def disagreement(weight: float) -> float:
        student = replace(settings.student, likeness=weight, epochs=60, validate_every=60)
        model, _ = train_student(task, labelled, replace(settings, student=student), 0)
        likeness = labelled.likeness(everything(task), f, np.random.default_rng(0), 1.0)
        return float(likeness_loss(model.features(), everything(task), likeness).detach())

    assert disagreement(3.0) < disagreement(0.0) - 1e-3


def test_the_inner_student_learns_it_as_well(task, labelled):
    """In the steps of φ and in the look back over them; S itself has no part in it."""
    synthetic = Synthesizer(labelled, task.embeddings, FAST)
    batch = synthetic.batch(sample_subset(task.n_items, 40, np.random.default_rng(0)), np.random.default_rng(1))
    assert batch.likeness.weight == 0.7 and not batch.likeness.y.requires_grad
    seen = []
    for weight in (0.7, 0.0):
        student = Rollout(task, FAST, seed=0)
        given = replace(batch, likeness=replace(batch.likeness, weight=weight))
        student.gradient(synthetic, given, lambda: make_batch(task.windows[:4]), task.teacher)
        seen.append(student.phi.model.adapter.linear.weight.detach().clone())
    assert not torch.equal(*seen)


def test_distilling_with_likeness_is_reproducible_and_differs(task, labelled):
    runs = [
        distill(task, labelled, settings, seed=0)[0] for settings in (FAST, FAST, replace(FAST, inner_likeness=0.0))
    ]
    assert torch.equal(runs[0].labels, runs[1].labels)
    assert not torch.equal(runs[0].labels, runs[2].labels)
