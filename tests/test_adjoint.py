"""The look back by finite differences against automatic differentiation through the same steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from foster_lib import coresets
from foster_lib.adjoint import Rollout, look_back
from foster_lib.foster import FosterSettings, Synthesizer
from foster_lib.subsets import real_loss, sample_subset, synthetic_loss
from foster_lib.training import make_batch
from foster_lib.unrolled import FlatModel, math_attention

FAST = FosterSettings(subset=20, windows=4, inner_steps=4, dropout=0.2, inner_adapter_rate=3.0)


@pytest.fixture
def synthetic(task):
    return Synthesizer(coresets.kd(task, 3, seed=0), task.embeddings, FAST)


def rollout(task, settings=FAST) -> Rollout:
    student = Rollout(task, settings, seed=0)
    student.reset(task.trajectory[1])
    return student


def live(batch):
    data = [tensor.detach().requires_grad_() for tensor in (batch.p, batch.own, batch.y)]
    p, own, y = data
    own_batch = replace(batch, p=p, own=own, y=y)
    return data, lambda model: synthetic_loss(model, own_batch)


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).double()


@pytest.mark.parametrize("steps", [1, 4])
def test_look_back_is_automatic_differentiation_through_the_steps(task, synthetic, steps):
    """Clipping, warm-up, dropout masks and Adam's preconditioner included, with the plain attention
    kernel twice differentiated; the preconditioner and the moments before the first step are constants."""
    settings = replace(FAST, inner_steps=steps)
    student = rollout(task, settings)
    batch = synthetic.batch(sample_subset(task.n_items, 20, np.random.default_rng(0)))
    data, loss = live(batch)
    student.settings = replace(settings, inner_steps=25)
    student.train(loss, data)  # so that Adam's running means are under way
    student.settings = settings
    momentum = [student.phi.optimizer.state[p]["exp_avg"].clone() for p in student.phi.parameters]
    tape, _ = student.train(loss, data)
    windows = make_batch(task.windows[:8])
    outer = real_loss(student.phi.model, windows, batch.subset, task.teacher)
    of_phi = list(torch.autograd.grad(outer, student.phi.parameters))
    kept = [parameter.detach().clone() for parameter in student.phi.parameters]
    found = look_back(student.phi, loss, data, tape, of_phi, settings.probe)
    assert all(torch.equal(a, b) for a, b in zip(kept, student.phi.parameters))  # φ goes on from where it was

    model = FlatModel(student.phi.model)
    with math_attention():
        theta = torch.cat([weights.flatten() for weights in tape[0].weights]).requires_grad_()
        m = torch.cat([part.flatten() for part in momentum])
        for step in tape:
            (g,) = torch.autograd.grad(model(theta, loss, dropout_seed=step.seed), theta, create_graph=True)
            m = 0.9 * m + 0.1 * step.clip * g
            theta = theta - torch.cat([P.flatten() for P in step.preconditioner]) * m
        # φ's steps, up to rounding noise in Adam's P:
        assert torch.allclose(theta, torch.cat([w.flatten() for w in kept]), atol=1e-3)
        judged = model(theta, lambda own: real_loss(own, windows, batch.subset, task.teacher))
        expected = torch.autograd.grad(judged, data)
    cosine = torch.nn.functional.cosine_similarity(flat(found), flat(expected), dim=0)
    assert cosine > 0.999 and float(flat(found).norm() / flat(expected).norm()) == pytest.approx(1, abs=0.03)


def test_stepping_against_the_gradient_helps_the_student(task, synthetic):
    """S moved against it teaches a fresh student, in the same steps, a lower loss on the same real data."""
    everything, windows = sample_subset(task.n_items, 10**6, np.random.default_rng(0)), make_batch(task.windows[:20])
    settings = replace(FAST, dropout=0.0, inner_steps=8)

    def judged(move: bool) -> float:
        student = rollout(task, settings)
        gradients, _, outer = student.gradient(synthetic, synthetic.batch(everything), lambda: windows, task.teacher)
        if move:
            for tensor, gradient in zip(synthetic.tensors, gradients):
                tensor.data -= 0.3 * gradient
        return outer

    before = judged(move=True)
    assert judged(move=False) < before - 1e-4


def test_the_gradient_has_length_one_and_goes_to_all_tensors(task, synthetic):
    student = rollout(task)
    batch = synthetic.batch(sample_subset(task.n_items, 20, np.random.default_rng(0)))
    gradients, inner, outer = student.gradient(synthetic, batch, lambda: make_batch(task.windows[:4]), task.teacher)
    assert float(flat(gradients).norm()) == pytest.approx(1, abs=1e-5)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    assert inner > 0 and outer > 0 and student.phi.steps == FAST.inner_steps


@pytest.mark.parametrize("probable", [True, False])
def test_the_real_loss_runs_over_the_real_next_items_too(task, synthetic, probable):
    """With `probable` they are in the subset of L_real beside what S holds; without, the subset is as drawn."""
    student = rollout(task, replace(FAST, probable=probable, dropout=0.0))
    windows = make_batch(task.windows[:4])
    batch = synthetic.batch(sample_subset(task.n_items, 20, np.random.default_rng(0)))
    _, _, outer = student.gradient(synthetic, batch, lambda: windows, task.teacher)
    subset = batch.subset.including(windows.targets) if probable else batch.subset
    assert len(subset.items) > 20 or not probable
    assert outer == pytest.approx(float(real_loss(student.phi.model, windows, subset, task.teacher).detach()), rel=1e-5)


def test_reset_restores_identical_weights_and_forgets_the_optimiser(task, synthetic):
    student, checkpoint = rollout(task), task.trajectory[1]
    batch = synthetic.batch(sample_subset(task.n_items, 20, np.random.default_rng(0)))
    student.gradient(synthetic, batch, lambda: make_batch(task.windows[:4]), task.teacher)
    weights = student.phi.model.state_dict()
    assert not all(torch.equal(weights[name], checkpoint[name]) for name in checkpoint)
    student.reset(checkpoint)
    weights = student.phi.model.state_dict()
    assert all(torch.equal(weights[name], checkpoint[name]) for name in checkpoint)
    assert student.phi.steps == 0 and not student.phi.optimizer.state


def test_students_have_the_dropout_of_the_settings(task):
    """Not the full-data model's: φ stands for the student."""
    model = rollout(task, replace(FAST, dropout=0.37)).phi.model
    assert {module.p for module in model.modules() if hasattr(module, "p")} == {0.37}
