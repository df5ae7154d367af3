"""Tied sequences: targets are the next mixtures, no teacher is read, real items join the subset without bias."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from foster_lib.errors import FosterError
from foster_lib.linear_labels import LinearSettings, linear_start
from foster_lib.penalty import gap_gradient
from foster_lib.selection import cluster_medoids
from foster_lib.subsets import Subset, real_loss, sample_subset, synthetic_loss
from foster_lib.synthetic_data import SyntheticData
from foster_lib.tied import (
    STARTS,
    TiedSequences,
    TiedSettings,
    TiedSynthesizer,
    expected_start,
    foster_tied,
    real_start,
)
from foster_lib.training import make_batch

FAST = TiedSettings(iterations=6, subset=20, windows=4, pool=2, inner_steps=2, reset_every=3)


@pytest.fixture
def start(task) -> TiedSequences:
    return real_start(task, 3, FAST, seed=0)


@pytest.fixture
def learned(task, start) -> TiedSequences:
    """The start, moved away from pure items."""
    generator = torch.Generator().manual_seed(0)
    moved = {
        name: getattr(start, name) + torch.randn(getattr(start, name).shape, generator=generator)
        for name in ("queries", "bonus", "end_queries", "end_bonus")
    }
    return replace(start, **moved)


def test_the_real_start_is_nearly_the_real_sequences(task, start):
    chosen = cluster_medoids(task, 3, 0)
    assert torch.equal(start.items, chosen.items) and torch.equal(start.targets, chosen.targets)
    p, y = start.input_probabilities(task.embeddings), start.target_probabilities(task.embeddings)
    assert (p.argmax(-1) == chosen.items)[chosen.mask].all() and (y.argmax(-1) == chosen.targets)[chosen.mask].all()
    assert (p.max(-1).values > 0.9).all() and (y.max(-1).values[chosen.mask] > 0.9).all()


def test_the_other_start_is_what_the_linear_model_expects(task):
    """After a real item each mixture is the label of the position before it, as `linear_start` has it."""
    start = expected_start(task, 3, FAST, seed=0)
    labelled = linear_start(task, 3, 0, LinearSettings())
    expected = labelled.target_probabilities(task.embeddings)
    assert start.mask.all() and torch.equal(start.items, labelled.items)
    torch.testing.assert_close(start.target_probabilities(task.embeddings), expected)
    p = start.input_probabilities(task.embeddings)
    torch.testing.assert_close(p[:, 1:], expected[:, :-1])
    assert (p[:, 0].argmax(-1) == labelled.items[:, 0]).all() and (p[:, 0].max(-1).values > 0.9).all()


def test_phi_heeds_the_likeness_that_came_with_the_labels(task):
    synthetic = TiedSynthesizer(
        expected_start(task, 3, FAST, seed=0), task.embeddings, replace(FAST, inner_likeness=0.5)
    )
    subset = synthetic.draw(np.random.default_rng(0))
    known = synthetic.batch(subset, np.random.default_rng(0)).likeness
    assert known.weight == 0.5 and synthetic.batch(subset).likeness is None
    assert torch.equal(synthetic.result().alike, synthetic.start.alike)


def test_targets_are_the_next_inputs(task, learned):
    """Within a sequence the target is the next position's input; behind the last stands the end."""
    p, y = learned.input_probabilities(task.embeddings), learned.target_probabilities(task.embeddings)
    f = learned.features(task.embeddings)
    for row, count in enumerate(learned.mask.sum(1).tolist()):
        torch.testing.assert_close(y[row, : count - 1], p[row, 1:count])
        logits = learned.end_queries[row] @ f.T
        logits[learned.targets[row, count - 1]] += learned.end_bonus[row]
        torch.testing.assert_close(y[row, count - 1], logits.softmax(-1))
    batch = next(iter(SyntheticData(learned, task.embeddings).batches(np.random.default_rng(0))))
    torch.testing.assert_close(batch.p.scatter_add(-1, learned.items[..., None], batch.own[..., None]), p)
    torch.testing.assert_close(batch.y, y[learned.mask])


def test_saved_and_loaded_without_the_labels(task, learned, tmp_path):
    path = learned.save(tmp_path / "tied")
    again = TiedSequences.load(path)
    assert set(again.tensors()) == set(learned.tensors()) and "labels" not in again.tensors()
    for name, tensor in learned.stored().tensors().items():
        assert torch.equal(again.tensors()[name], tensor)
    torch.testing.assert_close(
        again.target_probabilities(task.embeddings), learned.target_probabilities(task.embeddings), atol=5e-3, rtol=0
    )


def test_sequences_of_another_method_are_no_tied_ones(task, tmp_path):
    cluster_medoids(task, 2, 0).save(tmp_path / "plain")
    with pytest.raises(FosterError, match="not tied.*foster-tied"):
        TiedSequences.load(tmp_path / "plain")


def test_a_batch_over_all_items_is_the_full_computation(task, learned):
    synthetic = TiedSynthesizer(learned, task.embeddings, replace(FAST, subset=10**6))
    few = TiedSynthesizer(learned, task.embeddings, replace(FAST, subset=2)).draw(np.random.default_rng(0))
    assert torch.isin(learned.items, few.items).all() and torch.isin(learned.targets[learned.mask], few.items).all()
    batch = synthetic.batch(synthetic.draw(np.random.default_rng(0)))
    p = batch.p.scatter_add(-1, learned.items[..., None], batch.own[..., None])
    torch.testing.assert_close(p, learned.input_probabilities(task.embeddings))
    torch.testing.assert_close(batch.y, learned.target_probabilities(task.embeddings)[learned.mask])
    model = task.new_model(1).eval()
    features = model.features()
    hidden = model(learned.input_probabilities(task.embeddings), features)[learned.mask]
    full = -(batch.y * model.scores(hidden, features).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(synthetic_loss(model, batch), full)


def test_wanted_items_join_the_subset_and_the_sum_stays_unbiased():
    """The mean of the weighted sum over the subset is the sum over the catalogue; including twice keeps all."""
    generator, values = np.random.default_rng(0), torch.rand(30, generator=torch.Generator().manual_seed(1))
    wanted, sums = torch.tensor([[3, 7], [7, 21]]), []
    for _ in range(3000):
        subset = sample_subset(30, 8, generator).including(wanted).including(torch.tensor([5]))
        assert torch.isin(torch.tensor([3, 5, 7, 21]), subset.items).all()
        sums.append((subset.log_weight.exp() * values[subset.items]).sum())
    assert float(torch.stack(sums).mean()) == pytest.approx(float(values.sum()), rel=0.01)
    everything = Subset.uniform(torch.arange(30), 30).including(wanted)
    assert torch.equal(everything.items, torch.arange(30)) and (everything.log_weight == 0).all()


def test_real_loss_without_a_teacher_is_the_next_item_cross_entropy(task):
    real, model = make_batch(task.windows[:5]), task.new_model(3).eval()
    everything = sample_subset(task.n_items, 10**6, np.random.default_rng(0)).including(real.targets)
    logits = model.scores(model(real.inputs, model.features())[real.mask], model.features())
    expected = -logits.log_softmax(-1)[torch.arange(len(real.targets)), real.targets].mean()
    torch.testing.assert_close(real_loss(model, real, everything, None), expected)


@pytest.mark.parametrize("kind", ["linear", "real"])
def test_distilling_reads_no_full_data_model_and_repeats(task, kind):
    alone = replace(task, trajectory_folder=None)
    parameters = {name: getattr(FAST, name) for name in ("iterations", "subset", "windows", "pool", "inner_steps")}
    first, second = (foster_tied(alone, 3, 0, start=kind, **parameters) for _ in range(2))
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name])
    start = STARTS[kind](alone, 3, FAST, 0)
    assert not torch.equal(first.queries, start.queries) and not torch.equal(first.end_queries, start.end_queries)
    assert not torch.equal(first.queries, foster_tied(alone, 3, 1, start=kind, **parameters).queries)


def test_a_start_that_does_not_exist_ends_in_a_sentence(task):
    with pytest.raises(FosterError, match="start of tied sequences.*linear"):
        foster_tied(task, 3, 0, start="linaer")


def test_the_gradient_goes_through_both_roles(task, learned):
    """∂(L_syn(θ) − L_syn(φ))/∂z of a mixture that is input and target, against differences,
    for each learned tensor."""
    synthetic = TiedSynthesizer(learned, task.embeddings, replace(FAST, subset=10**6))
    everything = synthetic.draw(np.random.default_rng(0))
    theta, phi = task.teacher, task.new_model(3).eval()

    def gap() -> float:
        batch = synthetic.batch(everything)
        return float((synthetic_loss(theta, batch) - synthetic_loss(phi, batch)).detach())

    gradients, _ = gap_gradient(synthetic, synthetic.batch(everything), theta, phi)
    generator = torch.Generator().manual_seed(0)
    for tensor, gradient in zip(synthetic.tensors, gradients):
        direction, base = torch.randn(tensor.shape, generator=generator), tensor.detach().clone()
        values = []
        for sign in (1, -1):
            tensor.data = base + sign * 1e-2 * direction
            values.append(gap())
        tensor.data = base
        slope = float((gradient * direction).sum())
        assert (values[0] - values[1]) / 2e-2 == pytest.approx(slope, rel=0.02, abs=2e-3)
        assert gradient.abs().max() > 1e-6
