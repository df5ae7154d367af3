"""Gradients through training against autograd, finite differences and PyTorch's own Adam, in float64."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from foster_lib import unrolled
from foster_lib.encoder import FrozenCatalogue
from foster_lib.errors import FosterError
from foster_lib.sasrec import SASRec
from foster_lib.subsets import Subset, sample_subset
from foster_lib.training import make_batch, sequence_loss
from foster_lib.unrolled import (
    Adam,
    AdamState,
    FlatModel,
    RealBatch,
    adam_step,
    assert_math_attention,
    descend,
    math_attention,
    mixture_loss,
    real_loss,
    reverse_adam,
    unroll,
)

ADAM = Adam(learning_rate=0.02)


@pytest.fixture(scope="module")
def exact(task):
    """A float64 student, its θ, random mixtures p (3, 5, |V|), and L_syn without a float32 cast."""
    catalogue = FrozenCatalogue(task.embeddings.double())
    model = SASRec(catalogue, task.model_settings, torch.Generator().manual_seed(0)).double()
    student = FlatModel(model)
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(3, 5, task.n_items, generator=generator, dtype=torch.float64).mul(2).softmax(-1)

    def cross_entropy(model, p):
        features = model.features()
        logits = model.scores(model(p[:, :-1], features), features)
        return -(p[:, 1:] * logits.log_softmax(-1)).sum(-1).mean()

    def loss(theta, p, step):  # differs from step to step, as random cuts and dropout do
        return (1 + 0.1 * step) * student(theta, cross_entropy, p, dropout_seed=step)

    return student, student.vector(), p, loss


def plain_unroll(loss, theta, p, steps, adam):
    """Adam written out once more, on one vector, the graph kept: the oracle."""
    theta = theta.clone().requires_grad_()
    m = v = torch.zeros_like(theta)
    for t in range(1, steps + 1):
        (g,) = torch.autograd.grad(loss(theta, p, t - 1), theta, create_graph=True)
        m, v = adam.beta1 * m + (1 - adam.beta1) * g, adam.beta2 * v + (1 - adam.beta2) * g**2
        root = (v / (1 - adam.beta2**t) + adam.floor) ** 0.5
        theta = theta - adam.learning_rate * (m / (1 - adam.beta1**t)) / (root + adam.epsilon)
    return theta


def outer(theta):
    """Some outer loss that weighs all parameters differently."""
    return (theta * torch.linspace(-1, 1, len(theta), dtype=theta.dtype)).sum() + (theta**2).sum()


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


# ----------------------------------------------------------------------------- attention


def test_only_the_math_kernel_has_a_second_derivative(monkeypatch):
    """Fused attention refuses a double backward; `math_attention` selects what allows it, or fails."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 6, 8, generator=generator).requires_grad_()

    def second(context):
        with context:
            out = F.scaled_dot_product_attention(q, q, q, is_causal=True).square().sum()
        (first,) = torch.autograd.grad(out, q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), q)

    assert torch.isfinite(second(math_attention())[0]).all()
    with pytest.raises(RuntimeError, match="derivative"):
        second(sdpa_kernel(SDPBackend.FLASH_ATTENTION))
    monkeypatch.setattr(unrolled, "sdpa_kernel", lambda backend: nullcontext())
    with pytest.raises(FosterError, match="math attention"):
        second(math_attention())


def test_second_order_without_the_math_kernel_is_refused(exact):
    student, theta, p, loss = exact
    with pytest.raises(FosterError, match="math attention kernel"):
        unroll(loss, AdamState.start(theta), p, 1, ADAM)
    with pytest.raises(FosterError, match="math attention kernel"):
        reverse_adam(loss, descend(loss, AdamState.start(theta), p, 1, ADAM), p, theta, ADAM)
    with math_attention():
        assert_math_attention()
    with pytest.raises(FosterError):
        assert_math_attention()  # and it is off again


# ------------------------------------------------------------------------------ FlatModel


def test_flat_model_is_the_model(task):
    """Same loss and gradient as the module with these weights; the module itself stays as it was."""
    model, other = task.new_model(0), task.teacher
    student = FlatModel(model)
    own = student.vector()
    theta = torch.cat([p.detach().reshape(-1) for p in other.parameters()]).requires_grad_()
    batch = make_batch(task.windows[:4])

    def loss_of(model):
        return sequence_loss(model, batch, model.features())

    loss = student(theta, loss_of)
    (g,) = torch.autograd.grad(loss, theta)
    copy = task.new_model(0).eval()
    copy.load_state_dict(other.state_dict())
    expected = loss_of(copy)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(g, torch.cat([p.grad.reshape(-1) for p in copy.parameters()]))
    assert torch.equal(student.vector(), own)
    assert torch.equal(student.load(other.state_dict()), theta.detach())
    named = student.named(theta)
    assert named.keys() == dict(other.named_parameters()).keys()
    assert all(torch.equal(named[name], weight) for name, weight in other.named_parameters())
    assert torch.equal(student.vector(named), theta.detach())


def test_dropout_repeats_with_its_seed(task):
    student = FlatModel(task.new_model(0))
    batch = make_batch(task.windows[:4])

    def loss(seed):
        return float(
            student(student.vector(), lambda m: sequence_loss(m, batch, m.features()).detach(), dropout_seed=seed)
        )

    assert loss(1) == loss(1) != loss(2)
    assert loss(None) == loss(None) != loss(1)


# ------------------------------------------------------------------------- steps of Adam


def test_steps_are_those_of_pytorchs_adam(exact):
    student, theta, p, loss = exact
    states = descend(loss, AdamState.start(theta), p, 5, ADAM)
    parameter = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.Adam([parameter], lr=ADAM.learning_rate)
    for step in range(5):
        optimizer.zero_grad()
        loss(parameter, p, step).backward()
        optimizer.step()
    assert relative_error(states[-1].theta - theta, parameter.detach() - theta) < 1e-6
    assert [state.step for state in states] == list(range(6))


def test_step_is_differentiable_where_the_gradient_is_zero():
    g = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    adam_step(AdamState.start(torch.zeros_like(g)), g, ADAM).theta.sum().backward()
    assert torch.isfinite(g.grad).all()


def test_unroll_against_finite_differences(exact):
    """∂ outer(θ after 3 steps) / ∂p in a random direction, by central differences of plain training."""
    student, theta, p, loss = exact
    data = p.clone().requires_grad_()
    with math_attention():
        (gradient,) = torch.autograd.grad(outer(unroll(loss, AdamState.start(theta), data, 3, ADAM).theta), data)
        direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * p
        ends = [descend(loss, AdamState.start(theta), p + e * direction, 3, ADAM)[-1].theta for e in (1e-6, -1e-6)]
    difference = float(outer(ends[0]) - outer(ends[1])) / 2e-6
    assert float((gradient * direction).sum()) == pytest.approx(difference, rel=1e-5)


def test_reverse_adam_equals_autograd_through_three_steps(exact):
    student, theta, p, loss = exact
    data = p.clone().requires_grad_()
    with math_attention():
        (expected,) = torch.autograd.grad(outer(plain_unroll(loss, theta, data, 3, ADAM)), data)
        states = descend(loss, AdamState.start(theta), p, 3, ADAM)
        last = states[-1].theta.clone().requires_grad_()
        (d_theta,) = torch.autograd.grad(outer(last), last)
        found = reverse_adam(loss, states, p, d_theta, ADAM)
    assert relative_error(found, expected) < 1e-6


def test_window_of_all_steps_equals_a_plain_unroll_and_a_shorter_one_cuts(exact):
    student, theta, p, loss = exact
    with math_attention():

        def gradient(of):
            data = p.clone().requires_grad_()
            return torch.autograd.grad(outer(of(data)), data)[0]

        full = gradient(lambda data: plain_unroll(loss, theta, data, 4, ADAM))
        window = gradient(lambda data: unroll(loss, AdamState.start(theta), data, 4, ADAM).theta)
        middle = descend(loss, AdamState.start(theta), p, 2, ADAM)[-1]
        short = gradient(lambda data: unroll(loss, middle, data, 2, ADAM).theta)
        again = unroll(loss, middle, p, 2, ADAM).theta
    assert relative_error(window, full) < 1e-9
    assert relative_error(short, full) > 1e-2
    # The value is not cut: moments and the count of steps go on.
    torch.testing.assert_close(again.detach(), descend(loss, AdamState.start(theta), p, 4, ADAM)[-1].theta)


def test_memory_of_reverse_adam_does_not_grow_with_the_steps(exact):
    """Bytes that autograd keeps alive at the worst moment; an unroll's grow with every step."""
    student, theta, p, loss = exact

    class Kept:
        alive = peak = 0

        def __init__(self, tensor):
            self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()
            Kept.alive += self.bytes
            Kept.peak = max(Kept.peak, Kept.alive)

        def __del__(self):
            Kept.alive -= self.bytes

    def peak(function):
        Kept.alive = Kept.peak = 0
        with math_attention(), torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            function()
        return Kept.peak

    def reverse(steps):
        states = descend(loss, AdamState.start(theta), p, steps, ADAM)
        return peak(lambda: reverse_adam(loss, states, p, theta, ADAM))

    def unrolled(steps):
        data = p.clone().requires_grad_()
        return peak(lambda: outer(unroll(loss, AdamState.start(theta), data, steps, ADAM).theta).backward())

    assert reverse(8) < 1.1 * reverse(2)
    assert unrolled(8) > 3 * unrolled(2)


# -------------------------------------------------------------------------------- losses


def test_mixture_loss_against_loops(task):
    model = task.new_model(0).eval()
    items = torch.arange(3, 23)
    p = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    rows = torch.tensor([[5, 2], [5, 4]])
    features = model.features(items)

    def term(sequence, row):
        hidden = model.transform(p[sequence : sequence + 1, :row] @ features)[0, -1]  # cut off before `row`
        return -(p[sequence, row] * model.scores(hidden, features).log_softmax(-1)).sum()

    chosen = torch.stack([term(a, int(b)) for a in range(2) for b in rows[a]]).mean()
    torch.testing.assert_close(mixture_loss(model, p, items, rows), chosen)
    everything = torch.stack([term(a, b) for a in range(2) for b in range(1, 6)]).mean()
    torch.testing.assert_close(mixture_loss(model, p, items, None), everything)


def test_real_loss_on_the_catalogue_is_the_next_item_loss_plus_the_distance(task):
    model, teacher = task.new_model(3).eval(), task.teacher
    batch = make_batch(task.windows[:5])
    real = RealBatch.make(batch, None)
    plain = sequence_loss(model, batch, model.features())
    torch.testing.assert_close(real_loss(model, real), plain)
    known, distance = real.last_hidden(teacher(batch.inputs, teacher.features())), 0.0
    for row, window in enumerate(task.windows[:5]):
        inputs = torch.from_numpy(window[:-1])[None]
        ours, theirs = (m(inputs, m.features())[0, -1] for m in (model, teacher))
        distance = distance + (ours - theirs).square().sum() / 5
        torch.testing.assert_close(known[row], theirs)
    torch.testing.assert_close(real_loss(model, real, known, 0.5), plain + 0.5 * distance)


def test_real_loss_over_a_subset_estimates_the_full_one(task):
    """All items as subset give the exact loss; small ones an unbiased partition sum."""
    model = task.new_model(3).eval()
    batch = make_batch(task.windows[:2])
    everything = Subset.uniform(torch.arange(task.n_items), task.n_items)
    full = RealBatch.make(batch, None)
    torch.testing.assert_close(real_loss(model, RealBatch.make(batch, everything)), real_loss(model, full))
    generator, sums = np.random.default_rng(0), []
    with torch.no_grad():
        hidden = model(batch.inputs, model.features())[batch.mask]
        for _ in range(400):
            real = RealBatch.make(batch, sample_subset(task.n_items, 8, generator))
            assert torch.equal(real.items[real.batch.targets], batch.targets)
            assert torch.equal(real.items[real.batch.inputs][batch.mask], batch.inputs[batch.mask])
            sums.append((model.scores(hidden, model.features(real.items)) + real.log_weight).exp().sum(-1))
        expected = model.scores(hidden, model.features()).exp().sum(-1)
    torch.testing.assert_close(torch.stack(sums).mean(0), expected, rtol=0.05, atol=0)


def test_only_candidates_are_embedded(task):
    asked = []
    model = task.new_model(0)
    frozen = model.catalogue

    class Watched(torch.nn.Module):
        def forward(self, items=None):
            asked.append(None if items is None else len(items))
            return frozen(items)

    model.catalogue = Watched()
    subset = sample_subset(task.n_items, 6, np.random.default_rng(0))
    real = RealBatch.make(make_batch(task.windows[:1]), subset)
    real_loss(model, real)
    mixture_loss(model, torch.full((1, 4, 6), 1 / 6), subset.items, None)
    assert asked == [len(real.items), 6] and len(real.items) < 6 + len(task.windows[0]) + 1
    assert F.one_hot(real.batch.targets, len(real.items)).sum() == len(task.windows[0]) - 1
    assert replace(real, items=None).items is None
