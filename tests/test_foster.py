"""FOSTER's three parts against closed forms, naive loops and the full computation."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from foster_lib import coresets
from foster_lib.encoder import TextEncoder
from foster_lib.errors import FosterError
from foster_lib.foster import FosterSettings, Synthesizer, distill
from foster_lib.learners import Learner
from foster_lib.penalty import Pair, gap_gradient
from foster_lib.subsets import FeatureBank, Subset, real_loss, sample_subset, subset_inputs, synthetic_loss
from foster_lib.training import make_batch

FAST = FosterSettings(iterations=6, subset=20, windows=4, pool=2, inner_steps=2, reset_every=3)


@pytest.fixture
def synthetic(task):
    return Synthesizer(coresets.kd(task, 3, seed=0), task.embeddings, FAST)


def test_subset_is_uniform_sorted_and_without_repeats():
    generator = np.random.default_rng(0)
    counts = np.zeros(20)
    for _ in range(3000):
        items = sample_subset(20, 5, generator).items.numpy()
        assert (np.diff(items) > 0).all()
        counts[items] += 1
    assert abs(counts / 3000 - 0.25).max() < 0.04


def test_subset_of_all_items_equals_the_full_softmax(task, synthetic):
    """Inputs, targets and the loss over N = |V| items are those of the whole catalogue."""
    everything = sample_subset(task.n_items, 10**6, np.random.default_rng(0))
    batch = synthetic.batch(everything)
    result = synthetic.result()
    p = batch.p.scatter_add(-1, result.items[..., None], batch.own[..., None])
    torch.testing.assert_close(p, result.input_probabilities(task.embeddings))
    torch.testing.assert_close(batch.y, result.target_probabilities(task.embeddings)[result.mask])
    model = task.new_model(1).eval()
    features = model.features()
    hidden = model(result.input_probabilities(task.embeddings), features)[result.mask]
    full = -(batch.y * model.scores(hidden, features).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(synthetic_loss(model, batch), full)


def test_subset_correction_estimates_the_full_probability_of_the_anchor(synthetic, task):
    """The weight |V|/N makes the subset's partition sum unbiased: its mean is the full sum."""
    generator = np.random.default_rng(0)
    start, f = synthetic.start, synthetic.f
    own = ((synthetic.z_x * f[start.items]).sum(-1) + synthetic.bonus).exp()

    def partition(size):
        subset = sample_subset(task.n_items, size, generator)
        _, p = subset_inputs(synthetic.z_x, synthetic.bonus, start.items, subset, f[subset.items], f[start.items])
        return (own / p).detach()

    full = partition(task.n_items)
    mean = torch.stack([partition(10) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, full, rtol=0.02, atol=0)


def test_only_the_subset_and_the_anchors_are_embedded(task, synthetic):
    """No step asks the catalogue for all items."""
    asked = []

    class Watched(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, items=None):
            asked.append(None if items is None else items.tolist())
            return self.inner(items)

    model = task.new_model(0)
    model.catalogue = Watched(model.catalogue)
    subset = sample_subset(task.n_items, 8, np.random.default_rng(0))
    synthetic_loss(model, synthetic.batch(subset))
    assert asked == [sorted({*subset.items.tolist(), *synthetic.start.items.flatten().tolist()})]


def test_a_bank_embeds_each_item_once(task):
    """Losses from a shared bank equal those of their own; the bank holds every item once."""
    subset = sample_subset(task.n_items, 12, np.random.default_rng(0))
    model, real = task.new_model(0).eval(), make_batch(task.windows[:6])
    bank = FeatureBank(model, subset.items, real.inputs, real.inputs)
    assert bank.items.tolist() == sorted({*subset.items.tolist(), *real.inputs.flatten().tolist()})
    assert torch.equal(bank(real.inputs), bank.features[torch.searchsorted(bank.items, real.inputs)])
    torch.testing.assert_close(bank(real.inputs), model.features()[real.inputs])
    own = real_loss(model, real, subset, task.teacher)
    torch.testing.assert_close(real_loss(model, real, subset, task.teacher, bank), own)


def test_inner_models_have_the_students_dropout(task):
    """Not the full-data model's: φ stands for the student."""
    pair = Pair(task, replace(FAST, dropout=0.37), seed=0)
    for learner in (pair.phi, pair.theta):
        assert {module.p for module in learner.model.modules() if hasattr(module, "p")} == {0.37}


def test_reset_restores_identical_weights_and_forgets_the_optimiser(task, synthetic):
    pair = Pair(task, FAST, seed=0)
    checkpoint = task.trajectory[1]
    batch = synthetic.batch(sample_subset(task.n_items, 20, np.random.default_rng(0))).detached()
    pair.reset(checkpoint)
    pair.fit(batch, lambda: make_batch(task.windows[:5]), task.teacher)
    for learner in (pair.phi, pair.theta):
        assert not all(torch.equal(learner.model.state_dict()[name], checkpoint[name]) for name in checkpoint)
        assert learner.steps == FAST.inner_steps
    pair.reset(checkpoint)
    for learner in (pair.phi, pair.theta):
        assert all(torch.equal(learner.model.state_dict()[name], checkpoint[name]) for name in checkpoint)
        assert learner.steps == 0 and not learner.optimizer.state


def test_learner_takes_adams_steps(task):
    """Against Adam written out, after its warm-up, without clipping and dropout."""
    model = task.new_model(0)
    for module in model.modules():
        if hasattr(module, "p"):
            module.p = 0.0
    learner = Learner(model, learning_rate=0.01, warmup=1)
    goal = task.teacher.log_scale.detach() + 0.1
    w, m, v = float(model.log_scale.detach()), 0.0, 0.0
    for t in range(1, 4):
        learner.step(lambda model: (model.log_scale - goal) ** 2)
        g = 2 * (w - float(goal))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w -= 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)) ** 0.5 + 1e-8)
    assert float(model.log_scale.detach()) == pytest.approx(w, abs=1e-6)


def test_the_adapter_learns_at_its_own_rate(task):
    """Adam's first step moves every weight by the learning rate, the adapter's by `adapter_rate` times that."""
    learner = Learner(task.new_model(0), learning_rate=0.01, warmup=1, adapter_rate=3.0)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    learner.descend([torch.ones_like(p) for p in learner.parameters])
    for (name, p), P in zip(learner.model.named_parameters(), learner.preconditioner(), strict=True):
        expected = 0.03 if name.startswith("adapter.") else 0.01
        torch.testing.assert_close(before[name] - p.detach(), torch.full_like(p, expected), rtol=1e-3, atol=1e-6)
        gradient = learner.optimizer.state[p]["exp_avg"]
        torch.testing.assert_close(P * gradient, before[name] - p.detach(), rtol=1e-3, atol=1e-6)


def test_subsets_hold_what_is_probable_in_a_label(task, synthetic):
    """With `probable`; the others of a subset then stand for what is left of the catalogue."""
    drawn = sample_subset(task.n_items, 5, np.random.default_rng(0))
    synthetic = Synthesizer(synthetic.start, task.embeddings, replace(FAST, subset=5, probable=True))
    f = synthetic.f
    best = {int(j) for z in synthetic.z_y.detach()[synthetic.start.mask] for j in (f @ z).topk(3).indices}
    subset = synthetic.draw(np.random.default_rng(0))
    assert set(subset.items.tolist()) == best | set(drawn.items.tolist())
    assert subset.log_weight.exp().sum() == pytest.approx(task.n_items, rel=1e-5)
    plain = Synthesizer(synthetic.start, task.embeddings, replace(FAST, subset=5)).draw(np.random.default_rng(0))
    assert torch.equal(plain.items, drawn.items) and plain.log_weight == drawn.log_weight


def test_weights_in_the_real_loss_stand_for_copies(task):
    """An item of weight 2 counts like two items: the loss over the copies is more by the mean of log weights."""
    model, real, teacher = task.new_model(3).eval(), make_batch(task.windows[:6]), task.teacher
    items = torch.arange(0, 12)
    weight = torch.where(items % 2 == 0, 2.0, 1.0)
    subset = Subset(items, task.n_items, weight.log())
    copies = items.repeat_interleave(weight.long())

    def scores(judge):
        features = judge.features()
        return judge.scores(judge(real.inputs, features)[real.mask], features[copies])

    with torch.no_grad():
        y = scores(teacher).softmax(-1)
        over_copies = -(y * scores(model).log_softmax(-1)).sum(-1).mean()
        shift = (y * weight.repeat_interleave(weight.long()).log()).sum(-1).mean()
        torch.testing.assert_close(real_loss(model, real, subset, teacher) + shift, over_copies)


def test_theta_parts_from_phi_through_the_real_data_only(task, synthetic):
    """λ → ∞ leaves no real data: θ then takes φ's steps; with λ = 0 it fits the real loss better."""
    subset = sample_subset(task.n_items, 10**6, np.random.default_rng(0))
    batch = synthetic.batch(subset).detached()
    real = make_batch(task.windows[:40])

    def run(penalty, dropout=0.0):
        settings = FosterSettings(inner_steps=30, penalty=penalty, inner_learning_rate=1e-2, dropout=dropout)
        pair = Pair(task, settings, seed=0)
        pair.fit(batch, lambda: real, task.teacher)
        return pair

    def real_losses(pair):
        return [float(real_loss(x.model, real, subset, task.teacher).detach()) for x in (pair.theta, pair.phi)]

    theta, phi = real_losses(run(1e9))
    assert theta == pytest.approx(phi, abs=1e-3)
    theta, phi = real_losses(run(0.0))
    assert theta < phi - 0.01
    theta, phi = real_losses(run(1e9, dropout=0.5))  # the same dropout masks on S
    assert theta == pytest.approx(phi, abs=1e-2)


def test_real_loss_on_all_items_is_the_full_cross_entropy(task):
    real = make_batch(task.windows[:5])
    subset = sample_subset(task.n_items, 10**6, np.random.default_rng(0))
    model, teacher = task.new_model(3).eval(), task.teacher
    logits = model.scores(model(real.inputs, model.features())[real.mask], model.features())
    y = teacher.scores(teacher(real.inputs, teacher.features())[real.mask], teacher.features()).softmax(-1)
    expected = -(y * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(real_loss(model, real, subset, teacher), expected)


def test_gap_gradient_is_the_difference_of_two_input_gradients(task, synthetic):
    """Also a finite-difference check of ∂J/∂S in one random direction."""
    batch_of = lambda: synthetic.batch(Subset.uniform(torch.arange(task.n_items), task.n_items))  # noqa: E731
    theta, phi = task.teacher, task.new_model(3).eval()
    gradients, gap = gap_gradient(synthetic, batch_of(), theta, phi)
    direction = torch.randn(synthetic.z_y.shape, generator=torch.Generator().manual_seed(0))
    base = synthetic.z_y.detach().clone()
    values = []
    for sign in (1, -1):
        synthetic.z_y.data = base + sign * 1e-2 * direction
        batch = batch_of()
        values.append(float((synthetic_loss(theta, batch) - synthetic_loss(phi, batch)).detach()))
    synthetic.z_y.data = base
    assert abs((values[0] - values[1]) / 2e-2 - float((gradients[2] * direction).sum())) < 2e-3
    batch = batch_of()
    assert gap == pytest.approx(float((synthetic_loss(theta, batch) - synthetic_loss(phi, batch)).detach()), abs=1e-6)


@pytest.mark.parametrize("hypergradient", ["adjoint", "penalty"])
def test_distilling_starts_at_the_teachers_labels_and_is_reproducible(task, hypergradient):
    start, settings = coresets.kd(task, 3, seed=0), replace(FAST, hypergradient=hypergradient)
    first, history = distill(task, start, settings, seed=0)
    second, _ = distill(task, start, settings, seed=0)
    other, _ = distill(task, start, settings, seed=1)
    assert torch.equal(first.labels, second.labels) and torch.equal(first.queries, second.queries)
    assert not torch.equal(first.labels, other.labels)
    assert {len(course) for course in history.values()} == {FAST.iterations}
    none, _ = distill(task, start, replace(settings, iterations=0), seed=0)
    assert torch.equal(none.labels, start.labels)


def test_unknown_hypergradient_is_refused():
    with pytest.raises(FosterError, match="adjoint"):
        FosterSettings(hypergradient="ajoint")


def test_distillation_lowers_the_gap_of_the_same_models(task):
    """With θ the teacher and φ an untrained model held fixed, steps on S lower J."""
    synthetic = Synthesizer(coresets.kd(task, 3, seed=0), task.embeddings, FAST)
    subset = sample_subset(task.n_items, 10**6, np.random.default_rng(0))
    theta, phi = task.teacher, task.new_model(3).eval()
    gaps = []
    for _ in range(30):
        gradients, gap = gap_gradient(synthetic, synthetic.batch(subset), theta, phi)
        synthetic.step(gradients, 0.3)
        gaps.append(gap)
    assert gaps[-1] < gaps[0] - 1e-3


def test_distilling_without_labels_is_refused(task):
    with pytest.raises(FosterError, match="labelled"):
        distill(task, coresets.random(task, 3, seed=0), FAST, seed=0)


def test_distilling_with_a_tuned_encoder_leaves_the_catalogue_alone(task):
    """Each model tunes layers of its own; the task's catalogue stays as it was."""
    encoder = TextEncoder.load("tiny")
    tuned = replace(task, catalogue=encoder.catalogue(task.dataset.texts, tuned_layers=1), trajectory_folder=None)
    before = copy.deepcopy(encoder.state_dict())
    model = tuned.new_model(0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    batch = make_batch(tuned.windows[:4])
    everything = sample_subset(tuned.n_items, 10**6, np.random.default_rng(0))
    loss = real_loss(model, batch, everything, tuned.new_model(1))
    loss.backward()
    optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    changed = model.catalogue.encoder.state_dict()
    assert any(not torch.equal(before[name], changed[name]) for name in before)
    assert model.catalogue.activations is tuned.catalogue.activations


def test_resets_go_to_checkpoints_or_to_fresh_starts(task):
    """With damaged checkpoints distillation ends at once, unless all resets are to fresh first weights."""
    start, damaged = coresets.kd(task, 3, seed=0), replace(task)
    damaged.__dict__["trajectory"] = [{name: tensor * torch.nan for name, tensor in task.trajectory[0].items()}]
    learned, _ = distill(damaged, start, replace(FAST, fresh=1.0), seed=0)
    assert all(torch.isfinite(tensor).all() for tensor in (learned.queries, learned.labels))
    with pytest.raises(FosterError, match="diverged"):
        distill(damaged, start, replace(FAST, fresh=0.0), seed=0)
