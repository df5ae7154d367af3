"""EASE against least squares, text neighbours against loops, SASRec on ids on a cycle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from foster_lib.encoder import FrozenCatalogue
from foster_lib.evaluation import rank_queries
from foster_lib.linear import ease, ease_weights, id_model, id_sasrec, text_knn
from foster_lib.splits import Queries

HISTORIES = [np.array([3]), np.array([1, 2, 5]), np.array([7, 7, 0, 7])]


@pytest.fixture
def own_task(task):
    """Random training sequences with repeats over 30 items, with random texts."""
    rng = np.random.default_rng(0)
    train = [rng.integers(28, size=rng.integers(2, 12)) for _ in range(50)]
    embeddings = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    return replace(task, train=train, catalogue=FrozenCatalogue(embeddings))


def binary(train) -> np.ndarray:
    matrix = np.zeros((len(train), 30))
    for user, sequence in enumerate(train):
        matrix[user, sequence] = 1
    return matrix


# ----------------------------------------------------------------------------------- EASE


@pytest.mark.parametrize("regularisation", [0.5, 10.0, 500.0])
def test_ease_solves_its_least_squares_problem(own_task, regularisation):
    """Column j is the ridge regression of item j on all other items, which is the constraint b_jj = 0."""
    x = binary(own_task.train)
    found = ease_weights(sparse.csr_matrix(x.astype(np.float32)), regularisation)
    assert (np.diag(found) == 0).all()
    assert found.flags.c_contiguous  # else every batch of histories copies all |V|² numbers
    for j in range(30):
        others = np.delete(np.arange(30), j)
        a = x[:, others]
        column = np.linalg.solve(a.T @ a + regularisation * np.eye(29), a.T @ x[:, j])
        np.testing.assert_allclose(found[others, j], column, atol=1e-5)


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_ease_scores_sum_over_the_history(own_task, decay):
    """Repeats in training count once; in a history each occurrence counts, the latest most."""
    x = sparse.csr_matrix(binary(own_task.train).astype(np.float32))
    weights = ease_weights(x, 7.0)
    expected = np.stack(
        [sum(decay**age * weights[item] for age, item in enumerate(history[::-1])) for history in HISTORIES]
    )
    scores = ease(own_task, regularisation=7.0, decay=decay)(HISTORIES)
    assert scores.shape == (3, 30)
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-5)


def test_ease_does_not_depend_on_the_numbering(own_task):
    """Renumbered items and shuffled users give renumbered scores."""
    rng = np.random.default_rng(1)
    number, order = rng.permutation(30), rng.permutation(50)
    renamed = replace(own_task, train=[number[own_task.train[u]] for u in order])
    scores = ease(own_task)(HISTORIES).numpy()
    np.testing.assert_allclose(ease(renamed)([number[h] for h in HISTORIES]).numpy()[:, number], scores, atol=1e-5)


# ------------------------------------------------------------------------------- text-knn


@pytest.mark.parametrize("decay", [1.0, 0.7, 0.0])
def test_text_knn_equals_naive_loops(own_task, decay):
    """Decayed sum of inner products with the features of the warm start."""
    features = own_task.new_model(5).features().detach().numpy()
    scores = text_knn(own_task, decay=decay)(HISTORIES)
    for row, history in zip(scores.numpy(), HISTORIES):
        expected = [
            sum(decay**age * (features[i] * features[j]).sum() for age, i in enumerate(history[::-1]))
            for j in range(30)
        ]
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_text_knn_invariances(own_task):
    """Renumbered items give renumbered scores; without decay the order of the history is irrelevant."""
    number = np.random.default_rng(1).permutation(30)
    shuffled = torch.empty_like(own_task.embeddings)
    shuffled[torch.from_numpy(number)] = own_task.embeddings
    renamed = replace(own_task, catalogue=FrozenCatalogue(shuffled))
    scores = text_knn(own_task)(HISTORIES).numpy()
    other = text_knn(renamed)([number[h] for h in HISTORIES]).numpy()
    np.testing.assert_allclose(other[:, number], scores, atol=1e-4)
    score = text_knn(own_task, decay=1.0)
    torch.testing.assert_close(score(HISTORIES), score([h[::-1].copy() for h in HISTORIES]))
    assert not torch.allclose(text_knn(own_task)(HISTORIES), text_knn(own_task)([h[::-1].copy() for h in HISTORIES]))


def test_text_knn_ignores_the_training_sequences(own_task):
    """It reads texts only."""
    other = replace(own_task, train=own_task.train[:3])
    assert torch.equal(text_knn(own_task)(HISTORIES), text_knn(other)(HISTORIES))


# ------------------------------------------------------------------------------ id-sasrec


@pytest.fixture
def cycle(task):
    """All users walk along one ring of 24 items in a scrambled order; texts are all alike."""
    ring = np.random.default_rng(0).permutation(24)
    train = [ring[(start + np.arange(8)) % 24] for start in range(24)] * 2
    histories = [ring[(start + np.arange(5)) % 24] for start in range(24)]
    validation = Queries(np.arange(24), histories, ring[(np.arange(24) + 5) % 24])
    times = [np.arange(len(sequence)) for sequence in train]
    texts = FrozenCatalogue(torch.ones(24, 4))
    return replace(task, train=train, train_timestamps=times, validation=validation, catalogue=texts)


def test_id_sasrec_learns_a_cycle(cycle):
    """Without any text the next item of the ring comes first; untrained it does not."""
    options = dict(learning_rate=1e-2, batch_size=8, dropout=0.1)
    trained = rank_queries(id_sasrec(cycle, epochs=25, patience=0, **options), cycle.validation, 24).metrics()
    assert trained["recall@5"] == 1 and trained["ndcg@5"] > 0.99
    fresh = rank_queries(id_sasrec(cycle, epochs=0, **options), cycle.validation, 24).metrics()
    assert fresh["ndcg@5"] < 0.6


def test_id_sasrec_reads_no_text_and_follows_its_seed(cycle):
    """Other texts change nothing, the global random state neither; another seed does."""
    options = dict(epochs=2, learning_rate=1e-2)
    first = id_sasrec(cycle, seed=1, **options)(HISTORIES)
    torch.manual_seed(99)
    texts = replace(cycle, catalogue=FrozenCatalogue(torch.randn(24, 4)))
    state = torch.get_rng_state()
    assert torch.equal(first, id_sasrec(texts, seed=1, **options)(HISTORIES))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, id_sasrec(cycle, seed=2, **options)(HISTORIES))


def test_id_sasrec_keeps_the_best_epoch_and_stops(cycle, monkeypatch):
    """Validation decides: with figures that fall from the start the first weights are kept."""
    figures = iter(range(100, 0, -1))
    counted = []

    def validate(self, model):
        counted.append(model.catalogue.table.detach().clone())
        return float(next(figures))

    monkeypatch.setattr(type(cycle), "validate", validate)
    score = id_sasrec(cycle, epochs=30, patience=2)
    assert len(counted) == 3
    settings = replace(cycle.model_settings, dropout=0.0)
    expected = id_model(24, settings, seed=0).eval()
    assert torch.equal(expected.catalogue.table, counted[0])
    features = expected.features()
    hidden = expected(torch.tensor([[3]]), features)[:, -1]
    torch.testing.assert_close(score([np.array([3])]), expected.scores(hidden, features).detach())


def test_id_features_are_the_embeddings(cycle):
    """Nothing but a normalisation lies between the table and the features; the table learns."""
    model = id_model(24, cycle.model_settings, seed=0)
    torch.testing.assert_close(model.features(), torch.nn.functional.normalize(model.catalogue.table, dim=-1))
    torch.testing.assert_close(model.features(torch.tensor([4, 2])), model.features()[[4, 2]])
    names = {name for name, _ in model.named_parameters()}
    assert "catalogue.table" in names and not any(name.startswith("adapter") for name in names)
