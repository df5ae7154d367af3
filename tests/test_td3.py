"""TD3 against naive sums, the paper's parameter counts and plain unrolled training."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from foster_lib import td3
from foster_lib.config import StudentSettings, load_profile
from foster_lib.errors import FosterError
from foster_lib.factored import in_turn
from foster_lib.recipes import train_student
from foster_lib.starts import start_sequences
from foster_lib.synthetic_data import SyntheticData
from foster_lib.td3 import (
    TD3Settings,
    TuckerSequences,
    distill,
    draw_rows,
    inner_loss,
    nearest_factors,
    rat_bptt,
    start_factors,
    tucker_queries,
)
from foster_lib.unrolled import Adam, FlatModel, RealBatch, math_attention, real_loss

FAST = TD3Settings(outer_steps=3, inner_steps=3, window=2, outer_epoch=2, windows=4, rank=3, batch=2)


def random_factors(n=3, positions=5, rank=2, width=4):
    generator = torch.Generator().manual_seed(0)
    shapes = (n, rank), (positions, rank), (rank, rank, width)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.fixture
def sequences(task):
    """Tucker sequences over the teacher's item features."""
    users, times, core = random_factors(3, task.length + 1, 2, task.model_settings.width)
    adapter = {name: tensor.detach() for name, tensor in task.teacher.adapter.state_dict().items()}
    return TuckerSequences.from_factors(users=users, times=times, core=2 * core, adapter=adapter)


# ------------------------------------------------------------------- parametrisation


def test_with_factors_enough_nothing_is_lost_and_with_fewer_the_norm_is_kept(task):
    queries = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    users, times, core = nearest_factors(queries, 6)
    assert users.shape == (3, 6) and times.shape == (6, 6) and core.shape == (6, 6, 4)
    torch.testing.assert_close(tucker_queries(users, times, core), queries)
    few = tucker_queries(*nearest_factors(queries, 2))
    assert few.norm() == pytest.approx(float(queries.norm()), rel=1e-4)
    assert torch.linalg.matrix_rank(few.flatten(1)) == 2
    few = few * (few * queries).sum() / few.square().sum()  # how near, whatever the length
    for seed in range(5):
        a, b = (
            torch.linalg.qr(torch.randn(size, 2, generator=torch.Generator().manual_seed(seed)))[0] for size in (3, 6)
        )
        elsewhere = torch.einsum("abk,ax,by,cx,dy->cdk", queries, a, b, a, b)
        assert (few - queries).norm() < (elsewhere - queries).norm()


@pytest.mark.parametrize("start", ["real", "teacher"])
def test_a_start_is_what_stands_at_a_position_or_what_the_teacher_expects_there(task, start):
    """Nothing learned, and as many factors as positions: the mixtures of FOSTER's start."""
    settings = replace(FAST, start=start, rank=task.length + 1, learning_rate=0.0, outer_steps=1)
    found, expected = distill(task, 3, settings, seed=0)[0], start_sequences(task, 3, 0)
    p = found.input_probabilities(task.embeddings)
    if start == "real":
        f, scale = task.teacher.features().detach(), task.teacher.log_scale.detach().exp()
        torch.testing.assert_close(p, (scale * f[expected.items] @ f.T).softmax(-1), rtol=1e-3, atol=1e-5)
    else:
        wanted = expected.target_probabilities(task.embeddings)
        torch.testing.assert_close(p[:, 1:], wanted[:, :-1], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.target_probabilities(task.embeddings), wanted, rtol=1e-3, atol=1e-5)


def test_tucker_probabilities_against_loops():
    users, times, core = random_factors()
    items = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    logits = torch.zeros(3, 5, 6)
    for a, b, c in np.ndindex(3, 5, 6):
        for i, j, k in np.ndindex(2, 2, 4):
            logits[a, b, c] += core[i, j, k] * users[a, i] * times[b, j] * items[c, k]
    torch.testing.assert_close(tucker_queries(users, times, core) @ items.T, logits)


@pytest.mark.parametrize(
    "n, positions, rank, count",
    [(50, 50, 16, 9792), (30, 50, 8, 2688), (30, 20, 8, 2448), (15, 30, 8, 2408)],
    ids=["ml-1m", "ml-100k", "magazine", "epinions"],
)
def test_parameter_counts_of_the_paper(n, positions, rank, count):
    """The sizes of the paper's experiments at its width 32; it reports 9,792 for ML-1M."""
    assert sum(tensor.numel() for tensor in start_factors(n, positions, rank, 32, seed=0)) == count


def test_targets_are_the_next_positions_mixtures(task, sequences):
    users, times, core = sequences.users, sequences.times, sequences.core
    p = (tucker_queries(users, times, core) @ sequences.features(task.embeddings).T).softmax(-1)
    torch.testing.assert_close(sequences.input_probabilities(task.embeddings), p[:, :-1])
    torch.testing.assert_close(sequences.target_probabilities(task.embeddings), p[:, 1:])
    (batch,) = SyntheticData(sequences, task.embeddings).batches(None)
    torch.testing.assert_close(batch.y, p[:, 1:].flatten(0, 1))
    assert batch.mask.all() and batch.p.shape == (3, task.length, task.n_items)


def test_sequences_survive_the_disk_as_factors(task, sequences, tmp_path):
    path = sequences.save(tmp_path / "sequences")
    loaded = TuckerSequences.load(tmp_path / "sequences")
    numbers = 3 * 2 + (task.length + 1) * 2 + 2 * 2 * 16 + sum(t.numel() for t in sequences.adapter.values())
    assert loaded.size_in_bytes() == sequences.size_in_bytes() == 2 * numbers
    assert numbers * 2 < path.stat().st_size < numbers * 2 + 2000
    rounded = sequences.stored()
    for name in ("queries", "labels", "mask", "bonus", "users"):
        assert torch.equal(getattr(loaded, name), getattr(rounded, name))
    torch.testing.assert_close(loaded.queries, sequences.queries, rtol=0.01, atol=0.01)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name in ("broken", "absent"):
        with pytest.raises(FosterError, match=name):
            TuckerSequences.load(tmp_path / name)


def test_a_student_trains_on_them(task, sequences):
    settings = replace(load_profile("smoke").settings("ml-100k"), student=StudentSettings(epochs=20, validate_every=20))
    model, log = train_student(task, sequences.stored(), settings, seed=0)
    assert len(log.losses) == 20 and log.losses[-1] < log.losses[0]
    assert not model.training


# ------------------------------------------------------------------------- inner training


def test_cuts_are_those_of_the_paper():
    rows = torch.cat([draw_rows("cut", 4, 50, (0, step)) for step in range(200)])
    assert (rows[:, 0] == 49).all()
    assert set(rows[:, 1].tolist()) == set(range(5, 49))
    assert torch.equal(draw_rows("cut", 4, 50, (1, 2)), draw_rows("cut", 4, 50, (1, 2)))
    assert draw_rows("last", 4, 50, (0, 0)).tolist() == [[49]] * 4
    assert draw_rows("all", 4, 50, (0, 0)) is None
    short = draw_rows("cut", 100, 4, (0, 0))[:, 1]
    assert short.min() >= 1 and short.max() <= 2


def test_sequences_take_turns():
    p = torch.arange(5.0)[:, None, None]
    assert [in_turn(p, 2, step).flatten().tolist() for step in range(3)] == [[0, 1], [2, 3], [4, 0]]
    assert in_turn(p, 0, 3) is p and in_turn(p, 9, 3) is p


def test_rat_bptt_with_a_window_of_all_steps_is_a_plain_unroll(task):
    """The gradient that reaches U, T and G, through TD3's own inner loss (float32)."""
    student = FlatModel(task.new_model(0))
    theta = student.vector()
    factors = [tensor.mul(3).requires_grad_() for tensor in random_factors(3, task.length + 1, 2, 16)]
    features = task.teacher.features().detach()
    adam = Adam(0.01)
    weights = torch.randn(len(theta), generator=torch.Generator().manual_seed(0))
    with math_attention():

        def gradient(before, window):
            p = (tucker_queries(*factors) @ features.T).softmax(-1)
            loss = inner_loss(student, None, FAST, base=7)
            end, middle = rat_bptt(loss, theta, p, before, window, adam)
            return torch.cat([g.flatten() for g in torch.autograd.grad((end * weights).sum(), factors)]), middle

        full, middle = gradient(0, 4)
        cut, later = gradient(2, 2)
        p = (tucker_queries(*factors) @ features.T).softmax(-1)
        loss = inner_loss(student, None, FAST, base=7)
        x = theta.clone().requires_grad_()
        m = v = torch.zeros_like(x)
        for t in range(1, 5):
            (g,) = torch.autograd.grad(loss(x, p, t - 1), x, create_graph=True)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            x = x - 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t) + adam.floor).sqrt() + 1e-8)
        expected = torch.cat([g.flatten() for g in torch.autograd.grad((x * weights).sum(), factors)])
    assert torch.equal(middle, theta) and not torch.equal(later, theta)
    assert (full - expected).norm() < 1e-3 * expected.norm()
    assert (cut - expected).norm() > 1e-2 * expected.norm()


def test_a_step_along_the_meta_gradient_lowers_the_outer_loss(task):
    student = FlatModel(task.new_model(0))
    theta = student.load(task.trajectory[1])
    factors = [tensor.requires_grad_() for tensor in random_factors(3, task.length + 1, 2, 16)]
    features = (task.teacher.log_scale.exp() * task.teacher.features()).detach()
    real = RealBatch.draw(task, 30, None, np.random.default_rng(0))
    settings = replace(FAST, dropout=0.0, targets="all", batch=0)

    def outer_loss():
        p = (tucker_queries(*factors) @ features.T).softmax(-1)
        trained, _ = rat_bptt(inner_loss(student, None, settings, 0), theta, p, 0, 3, Adam(0.01))
        return student(trained, real_loss, real)

    with math_attention():
        course = []
        for _ in range(5):
            loss = outer_loss()
            course.append(float(loss.detach()))
            gradients = torch.autograd.grad(loss, factors)
            with torch.no_grad():
                length = torch.cat([g.flatten() for g in gradients]).norm()
                for tensor, gradient in zip(factors, gradients):
                    tensor -= 0.1 * gradient / length
    assert (np.diff(course) < 0).all() and course[-1] < course[0] - 1e-3


# ------------------------------------------------------------------------ the algorithm


def changed(ours: TuckerSequences, theirs: TuckerSequences) -> bool:
    return not torch.equal(ours.core, theirs.core)


def test_distilling_is_reproducible_and_depends_on_its_seed(task):
    first, history = distill(task, 3, FAST, seed=0)
    second, _ = distill(task, 3, FAST, seed=0)
    other, _ = distill(task, 3, FAST, seed=1)
    assert torch.equal(first.core, second.core) and torch.equal(first.users, second.users)
    assert changed(first, other)
    assert len(history) == 3 and np.isfinite(history).all()
    assert len(first) == 3 and first.items.shape == (3, task.length)
    called = td3.td3(task, sequences=3, seed=0, **vars(FAST))
    assert torch.equal(called.core, first.core)


@pytest.mark.parametrize(
    "change",
    [{"alignment": 0.0}, {"targets": "last"}, {"targets": "all"}, {"random_window": False}, {"subset": 20}],
    ids=str,
)
def test_every_part_takes_part(task, change):
    base = replace(FAST, inner_steps=6)
    assert changed(distill(task, 3, base, seed=0)[0], distill(task, 3, replace(base, **change), seed=0)[0])


def test_a_subset_of_all_items_is_the_whole_catalogue(task):
    whole, _ = distill(task, 3, FAST, seed=0)
    all_items, _ = distill(task, 3, replace(FAST, subset=task.n_items), seed=0)
    assert torch.equal(whole.core, all_items.core)


def test_the_student_goes_on_until_the_epoch_ends(task, monkeypatch):
    """Each outer step starts where the last one's ordinary steps ended; an epoch's first one at a checkpoint."""
    starts, ends = [], []
    plain = td3.rat_bptt

    def watched(loss, theta, *rest):
        starts.append(theta)
        result = plain(loss, theta, *rest)
        ends.append(result[1])
        return result

    monkeypatch.setattr(td3, "rat_bptt", watched)
    distill(task, 3, replace(FAST, outer_steps=4, inner_steps=5, random_window=False), seed=0)
    assert torch.equal(starts[1], ends[0]) and torch.equal(starts[3], ends[2])
    student = FlatModel(task.new_model(0))
    checkpoints = [student.load(checkpoint) for checkpoint in task.trajectory]
    for start in (starts[0], starts[2]):
        assert any(torch.equal(start, checkpoint) for checkpoint in checkpoints)


def test_settings_that_cannot_be_run_are_refused(task):
    with pytest.raises(FosterError, match="window of 5"):
        distill(task, 3, replace(FAST, window=5), seed=0)
    with pytest.raises(FosterError, match="'cut'"):
        distill(task, 3, replace(FAST, targets="cuts"), seed=0)


def test_divergence_is_told(task):
    with pytest.raises(FosterError, match="outer step"):
        distill(task, 3, replace(FAST, inner_learning_rate=float("nan")), seed=0)
