"""Coresets: selection rules against naive versions, labels against the teacher."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs

from foster_lib import coresets
from foster_lib.coresets import candidates, farthest_points, nearest_points, with_labels
from foster_lib.errors import FosterError

METHODS = [coresets.random, coresets.k_center, coresets.k_means, coresets.kd]


def rows(chosen) -> list[tuple]:
    """Each sequence as the tuple of its window."""
    return [
        (*items[mask].tolist(), int(targets[mask][-1]))
        for items, mask, targets in zip(chosen.items, chosen.mask, chosen.targets)
    ]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_coresets_are_distinct_training_windows(task, method):
    """n sequences, all of them windows of the training data, none more often than it stands there."""
    chosen = method(task, sequences=12, seed=0)
    assert chosen.items.shape == (12, task.length)
    available = [tuple(w.tolist()) for w in candidates(task)]
    for row in rows(chosen):
        available.remove(row)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_coresets_follow_their_seed(task, method):
    """The same seed selects the same, whatever the global random state."""
    chosen = []
    for run in range(2):
        np.random.seed(run)
        chosen.append(rows(method(task, sequences=8, seed=4)))
    assert chosen[0] == chosen[1]
    assert chosen[0] != rows(method(task, sequences=8, seed=5))


def test_random_is_uniform(task):
    """Every window is drawn equally often, within what chance allows, and never twice at once."""
    few = replace(task, train=task.train[:8])
    number = {tuple(w.tolist()): i for i, w in enumerate(candidates(few))}
    assert len(number) == len(candidates(few)) > 5
    assert set(rows(coresets.random(few, sequences=len(number), seed=0))) == set(number)
    counts = np.zeros(len(number))
    for seed in range(600):
        for row in rows(coresets.random(few, sequences=3, seed=seed)):
            counts[number[row]] += 1
    p = 3 / len(number)
    assert (abs(counts / 600 - p) < 4.5 * np.sqrt(p * (1 - p) / 600)).all()


# ------------------------------------------------------------------------------- k-center


@pytest.mark.parametrize("seed", range(3))
def test_farthest_points_equal_naive_greedy(seed):
    """Each point is the one whose nearest chosen point is farthest, found by a double loop."""
    points = np.random.default_rng(seed).normal(size=(40, 3))
    found = farthest_points(points, 10, seed).tolist()
    chosen = found[:1]
    while len(chosen) < 10:
        gaps = [min(np.sqrt(((p - points[c]) ** 2).sum()) for c in chosen) for p in points]
        chosen.append(int(np.argmax(gaps)))
    assert found == chosen
    assert len(set(found)) == 10


def test_farthest_points_are_at_most_twice_the_optimum():
    """Gonzalez' guarantee: the covering radius is within a factor of two of the best over all subsets."""
    for seed in range(5):
        points = np.random.default_rng(seed).random((11, 2))
        distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
        radius = lambda subset: distance[:, list(subset)].min(1).max()  # noqa: B023, E731
        best = min(radius(subset) for subset in itertools.combinations(range(11), 3))
        assert best <= radius(farthest_points(points, 3, seed)) <= 2 * best


def test_k_center_measures_the_untrained_model(task):
    """Its windows are the farthest points among mean hidden states of the warm-started model."""
    model = task.new_model(3).eval()
    with torch.no_grad():
        features = model.features()
        points = [model(torch.from_numpy(w[:-1])[None], features)[0].mean(0).numpy() for w in candidates(task)]
    expected = [tuple(candidates(task)[i].tolist()) for i in farthest_points(np.stack(points), 6, 3)]
    assert rows(coresets.k_center(task, sequences=6, seed=3)) == expected


# -------------------------------------------------------------------------------- k-means


def test_nearest_points():
    """The nearest point of each centroid; the second of two equal centroids takes the next point."""
    points = np.array([[0.0], [1.0], [2.5], [9.0]])
    assert nearest_points(points, np.array([[8.0], [0.9]])).tolist() == [3, 1]
    assert nearest_points(points, np.array([[1.1], [1.1], [1.1]])).tolist() == [1, 0, 2]


def test_k_means_takes_one_window_of_each_cluster(task, monkeypatch):
    """On well separated points every cluster is represented, by the window nearest to its mean."""
    points, cluster = make_blobs(len(candidates(task)), n_features=4, centers=6, cluster_std=0.05, random_state=0)
    monkeypatch.setattr(type(task), "hidden_means", lambda self, model, pieces: points)
    expected = set()
    for c in range(6):
        members = np.flatnonzero(cluster == c)
        nearest = members[np.linalg.norm(points[members] - points[members].mean(0), axis=1).argmin()]
        expected.add(tuple(candidates(task)[nearest].tolist()))
    assert set(rows(coresets.k_means(task, sequences=6, seed=0))) == expected


def test_hidden_means_ignore_padding(task):
    """The batched means equal those of each window alone."""
    means = task.hidden_means(task.teacher, candidates(task))
    features = task.teacher.features()
    for window, mean in zip(candidates(task)[::7], means[::7]):
        alone = task.teacher(torch.from_numpy(window[:-1])[None], features)[0].mean(0)
        np.testing.assert_allclose(mean, alone.numpy(), atol=1e-5)


# --------------------------------------------------------------------------------- labels


def test_labels_are_the_teachers_softmax(task):
    """The stored queries give back the teacher's full softmax at every position with a target."""
    chosen = coresets.random(task, sequences=9, seed=1)
    labelled = with_labels(task, chosen)
    probabilities = labelled.target_probabilities(task.embeddings)
    teacher = task.teacher
    for row, window in enumerate(rows(chosen)):
        features = teacher.features()
        logits = teacher.scores(teacher(torch.tensor([window[:-1]]), features)[0], features).double()
        expected = (logits.exp() / logits.exp().sum(-1, keepdim=True)).float()
        torch.testing.assert_close(probabilities[row, : len(window) - 1], expected, atol=1e-6, rtol=1e-4)
    assert torch.equal(labelled.items, chosen.items) and torch.equal(labelled.targets, chosen.targets)
    assert chosen.labels is None and labelled.queries is None


def test_labels_survive_the_disk(task):
    """Half precision moves no probability by more than half a percentage point, and no first place."""
    labelled = with_labels(task, coresets.random(task, sequences=9, seed=1))
    exact, rounded = (s.target_probabilities(task.embeddings) for s in (labelled, labelled.stored()))
    assert (exact - rounded).abs().max() < 5e-3
    assert torch.equal(exact.argmax(-1), rounded.argmax(-1))


def test_labels_do_not_share_the_teachers_weights(task):
    """Training a student or editing the labels cannot change the teacher."""
    labelled = with_labels(task, coresets.random(task, sequences=2, seed=0))
    before = task.teacher.adapter.linear.weight.clone()
    labelled.adapter["linear.weight"].zero_()
    assert torch.equal(task.teacher.adapter.linear.weight, before)


def test_kd_is_k_means_with_labels(task):
    """KD-n is what its parts are."""
    a, b = coresets.kd(task, sequences=5, seed=2), with_labels(task, coresets.k_means(task, sequences=5, seed=2))
    assert torch.equal(a.items, b.items) and torch.equal(a.labels, b.labels)


def test_methods_with_a_teacher_need_its_file(task, tmp_path):
    """Without full-data training the error names the folder and the method to run first."""
    for folder in (tmp_path, None):
        without = replace(task, trajectory_folder=folder)
        with pytest.raises(FosterError, match="no full-data model. Run the method 'full' first"):
            coresets.kd(without, sequences=3, seed=0)
        with pytest.raises(FosterError, match="no trajectory of full-data training"):
            _ = without.trajectory


def test_trajectory_is_in_order_and_starts_warm(task):
    """Checkpoints come oldest first; the first is the warm start, and the teacher validates better."""
    fresh = task.new_model(seed=0)
    assert len(task.trajectory) == 31
    assert all(torch.equal(task.trajectory[0][name], tensor) for name, tensor in fresh.state_dict().items())
    assert not task.teacher.training and not any(p.requires_grad for p in task.teacher.parameters())
    assert task.validate(task.teacher) > 2 * task.validate(fresh)


def test_candidates_are_each_users_latest_window(task):
    """One per user: the end of the training sequence, never longer than a window."""
    pool = candidates(task)
    assert len(pool) == len(task.train)
    for window, sequence in zip(pool, task.train):
        assert len(window) == min(len(sequence), task.length + 1)
        assert window.tolist() == sequence.tolist()[-len(window) :]


def test_budgets_are_checked(task):
    """More sequences than users is an error."""
    with pytest.raises(FosterError, match="cannot be chosen"):
        coresets.random(task, sequences=10**6, seed=0)
