"""Farzi against naive products and plain automatic differentiation."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from foster_lib import farzi
from foster_lib.config import StudentSettings, load_profile
from foster_lib.errors import FosterError
from foster_lib.farzi import FarziSettings, LatentSequences, distill, meta_gradient, start_factors
from foster_lib.recipes import train_student
from foster_lib.starts import start_sequences
from foster_lib.synthetic_data import SyntheticData
from foster_lib.unrolled import Adam, AdamState, FlatModel, RealBatch, math_attention, mixture_loss, real_loss, unroll

FAST = FarziSettings(outer_steps=3, inner_steps=3, windows=4, latent=8, batch=2)


@pytest.fixture
def sequences(task):
    generator = torch.Generator().manual_seed(0)
    return LatentSequences.from_factors(
        latent=torch.randn(3, task.length + 1, 4, generator=generator),
        decoder=torch.randn(4, task.n_items, generator=generator),
    )


def test_probabilities_are_the_summary_times_the_decoder(task, sequences):
    p = torch.einsum("abk,kc->abc", sequences.latent, sequences.decoder).softmax(-1)
    torch.testing.assert_close(sequences.input_probabilities(task.embeddings), p[:, :-1])
    torch.testing.assert_close(sequences.target_probabilities(task.embeddings), p[:, 1:])
    (batch,) = SyntheticData(sequences, task.embeddings).batches(None)
    torch.testing.assert_close(batch.y, p[:, 1:].flatten(0, 1))


def test_sequences_survive_the_disk_and_belong_to_one_catalogue(task, sequences, tmp_path):
    path = sequences.save(tmp_path / "sequences")
    loaded = LatentSequences.load(path)
    assert torch.equal(loaded.latent, sequences.stored().latent)
    assert torch.equal(loaded.labels, loaded.latent[:, 1:])
    assert loaded.size_in_bytes() == 2 * (3 * (task.length + 1) * 4 + 4 * task.n_items)
    with pytest.raises(FosterError, match="another|catalogue"):
        loaded.input_probabilities(task.embeddings[:-1])
    settings = replace(load_profile("smoke").settings("ml-100k"), student=StudentSettings(epochs=20, validate_every=20))
    _, log = train_student(task, loaded, settings, seed=0)
    assert log.losses[-1] < log.losses[0]


@pytest.mark.parametrize("start", ["real", "teacher"])
def test_the_start_is_sequences_as_the_teacher_sees_them(task, start):
    """With k = d the logits are exactly its own; with fewer, the best approximation of that rank."""
    f, expected = task.teacher.features().detach(), start_sequences(task, 3, 0)
    latent, decoder = start_factors(task, 3, replace(FAST, latent=99, start=start), seed=0)
    assert latent.shape == (3, task.length + 1, 16) and decoder.shape == (16, task.n_items)
    torch.testing.assert_close(decoder.norm(dim=0), torch.ones(task.n_items))
    own = task.teacher.log_scale.detach().exp() * f[expected.items] @ f.T
    logits = latent @ decoder
    torch.testing.assert_close(logits[:, 0], own[:, 0], rtol=1e-4, atol=1e-4)
    later = own[:, 1:] if start == "real" else expected.labels[:, :-1] @ f.T
    torch.testing.assert_close(logits[:, 1:-1], later, rtol=1e-4, atol=1e-4)
    _, few = start_factors(task, 3, replace(FAST, latent=4, start=start), seed=0)
    torch.testing.assert_close(few, decoder[:4])


def test_a_start_at_random_knows_nothing_of_likeness(task):
    for start, knows in (("random", False), ("teacher", True)):
        found, _ = distill(task, 3, replace(FAST, start=start, latent=4), seed=0)
        assert (found.alike is not None) == (found.stored().alike is not None) == knows


def test_meta_gradient_equals_autograd_through_the_unrolled_steps(task):
    """With dropout and sequences that take turns, the replayed steps are the recorded ones (float32)."""
    student = FlatModel(task.new_model(0))
    theta = student.load(task.trajectory[2])
    p = torch.randn(3, 5, task.n_items, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)
    real = RealBatch.draw(task, 8, None, np.random.default_rng(0))

    def loss(theta, p, step):
        return student(theta, mixture_loss, farzi.in_turn(p, 2, step), None, None, dropout_seed=step)

    with math_attention():
        found, outer_loss = meta_gradient(student, loss, theta, p, real, 3, Adam(0.01))
        data = p.clone().requires_grad_()
        expected_loss = student(unroll(loss, AdamState.start(theta), data, 3, Adam(0.01)).theta, real_loss, real)
        (expected,) = torch.autograd.grad(expected_loss, data)
    assert outer_loss == pytest.approx(float(expected_loss.detach()), abs=1e-5)
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_a_step_along_the_meta_gradient_lowers_the_outer_loss(task):
    student = FlatModel(task.new_model(0))
    theta = student.load(task.trajectory[1])
    factors = [tensor.requires_grad_() for tensor in start_factors(task, 3, FAST, seed=0)]
    real = RealBatch.draw(task, 30, None, np.random.default_rng(0))

    def loss(theta, p, step):
        return student(theta, mixture_loss, p, None, None)

    course = []
    for _ in range(5):
        p = (factors[0] @ factors[1]).softmax(-1)
        with math_attention():
            d_p, outer_loss = meta_gradient(student, loss, theta, p, real, 3, Adam(0.01))
        course.append(outer_loss)
        gradients = torch.autograd.grad(p, factors, d_p)
        length = torch.cat([g.flatten() for g in gradients]).norm()
        with torch.no_grad():
            for tensor, gradient in zip(factors, gradients):
                tensor -= 0.05 * gradient / length  # six times as long, the last overshoot on some processors
    assert (np.diff(course) < -1e-3).all()


def test_distilling_is_reproducible_and_depends_on_its_seed(task):
    first, history = distill(task, 3, FAST, seed=0)
    second, _ = distill(task, 3, FAST, seed=0)
    other, _ = distill(task, 3, FAST, seed=1)
    assert torch.equal(first.latent, second.latent) and torch.equal(first.decoder, second.decoder)
    assert not torch.equal(first.latent, other.latent)
    assert len(history) == 3 and first.items.shape == (3, task.length)
    called = farzi.farzi(task, sequences=3, seed=0, **vars(FAST))
    assert torch.equal(called.latent, first.latent)


@pytest.mark.parametrize(
    "change", [{"inner_steps": 1}, {"start": "random"}, {"subset": 20}, {"checkpoints": 1}], ids=str
)
def test_every_part_takes_part(task, change):
    ours, theirs = (distill(task, 3, settings, seed=0)[0] for settings in (FAST, replace(FAST, **change)))
    assert not torch.equal(ours.latent, theirs.latent)


def test_a_subset_of_all_items_is_the_whole_catalogue(task):
    whole, _ = distill(task, 3, FAST, seed=0)
    all_items, _ = distill(task, 3, replace(FAST, subset=task.n_items), seed=0)
    assert torch.equal(whole.latent, all_items.latent)


def test_an_unknown_start_is_refused(task):
    with pytest.raises(FosterError, match="'real'"):
        distill(task, 3, replace(FAST, start="reals"), seed=0)
