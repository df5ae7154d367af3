"""Labels of a linear model, and FOSTER that starts at them: nothing is ever trained on all data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from foster_lib import adjoint
from foster_lib.errors import FosterError
from foster_lib.evaluation import rank_queries, recommender_scorer
from foster_lib.foster import distill
from foster_lib.free import FreeSettings, FreeSynthesizer, FreshTask, foster_free
from foster_lib.linear import ease, text_knn
from foster_lib.linear_labels import (
    LinearSettings,
    ScoreSettings,
    continued,
    exact_labels,
    fitted,
    histories,
    kd_linear,
    linear_start,
    linear_text,
    nearest,
    scorer,
    sharpened,
)
from foster_lib.methods import get_method
from foster_lib.runs import Run
from foster_lib.selection import cluster_medoids
from foster_lib.subsets import synthetic_loss
from foster_lib.synthetic_data import SyntheticData

FAST = {"iterations": 6, "subset": 20, "windows": 4, "pool": 2, "inner_steps": 2, "reset_every": 3}
LENGTH = 6


@pytest.fixture
def alone(task):
    """Sequences of two windows in three readings; the files of full-data training cannot be found."""
    return replace(task, trajectory_folder=None, synthetic_length=2 * LENGTH, readings=3)


@pytest.fixture
def score(alone):
    return ease(alone, regularisation=20.0, decay=0.8)


@pytest.fixture
def chosen(alone):
    """Two histories a sequence, some of them shorter than their window."""
    own = replace(alone, synthetic_length=LENGTH, train=[s[: 3 + i % 9] for i, s in enumerate(alone.train)])
    found = cluster_medoids(own, 6, 0).joined(2)
    assert not found.mask.all()
    return found


def test_a_history_is_the_window_up_to_its_position():
    items = torch.arange(12).reshape(1, 12)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    found = [history.tolist() for history in histories(items, mask, 6)]
    assert found == [[0], [0, 1], [0, 1, 2], [6], [6, 7]]


def test_windows_are_filled_with_the_best_items_that_are_not_there(chosen, score):
    whole = continued(chosen, score, LENGTH)
    assert whole.mask.all() and torch.equal(whole.items[chosen.mask], chosen.items[chosen.mask])
    assert torch.equal(whole.targets[chosen.mask], chosen.targets[chosen.mask])
    for items, targets, real in zip(*(t.reshape(-1, LENGTH) for t in (whole.items, whole.targets, chosen.mask))):
        assert torch.equal(items[1:], targets[:-1])
        for place in (~real).nonzero()[:, 0].tolist():
            scores = score([items[: place + 1].numpy()])[0]
            scores[items[: place + 1]] = -torch.inf
            assert targets[place] == scores.argmax()


@pytest.mark.parametrize("order", ["shuffled", "cut"])
def test_exact_labels_are_the_scores_of_what_was_read_before(alone, chosen, score, order):
    """In each reading, position by position, by a naive loop over its windows."""
    task = replace(alone, order=order, readings=3)
    if order == "cut":  # may leave a gap within a window where a history does not fill its own
        chosen = continued(chosen, score, LENGTH)
    labels, orders = exact_labels(task, chosen, score)
    positions = chosen.mask.nonzero().tolist()
    assert labels.shape == (len(positions), 3, task.n_items) and orders.shape[2] == 2
    for reading in range(3):
        for row in range(len(chosen)):
            places = range(2 * LENGTH) if reading == 0 else orders[row, :, reading - 1].tolist()
            window: list[int] = []
            for number, place in enumerate(places):
                window = [] if number % LENGTH == 0 else window
                if place < 0 or not chosen.mask[row, place]:
                    continue
                window.append(int(chosen.items[row, place]))
                expected = score([np.array(window)])[0]
                torch.testing.assert_close(labels[positions.index([row, place]), reading], expected.float())


def test_queries_by_least_squares_are_numpy_s():
    generator = torch.Generator().manual_seed(0)
    f, logits = torch.randn(30, 4, generator=generator), torch.randn(7, 30, generator=generator)
    x = np.c_[f.double().numpy(), np.ones(30)]
    best = np.linalg.lstsq(x, logits.double().numpy().T, rcond=None)[0][:-1].T
    torch.testing.assert_close(nearest(logits, f).double(), torch.from_numpy(best), rtol=1e-2, atol=1e-3)


def test_scores_are_the_linear_model_s_and_the_texts_(alone):
    """Each over its largest, by hand; what was read is not its own likeness. A method of its own is the same."""
    histories = [np.array([3, 1, 4]), np.array([2])]
    settings = {"regularisation": 20.0, "decay": 0.8, "text": 0.7, "text_decay": 0.5}
    found = scorer(alone, ScoreSettings(**settings))(histories)
    linear, texts = ease(alone, regularisation=20.0, decay=0.8), text_knn(alone, decay=0.5)
    for own, history in zip(found, histories, strict=True):
        first, second = linear([history])[0].float(), texts([history])[0]
        second[history] = 0.0
        torch.testing.assert_close(own, first / first.max() + 0.7 * second / second.max())
    torch.testing.assert_close(linear_text(alone, **settings)(histories), found)


def test_a_label_is_as_sharp_however_small_its_scores_are():
    """The best has odds of e^margin against items without a score, at any scale; no scores are uniform."""
    scores = torch.zeros(3, 50)
    scores[0, 7], scores[1, 7] = 0.2, 0.003
    scores[1, 8] = -0.5
    labels = sharpened(scores, margin=0.5).softmax(-1)
    odds = labels[:2, 7] / (1 - labels[:2, 7])
    torch.testing.assert_close(odds, np.exp(0.5) * 50 / torch.tensor([49.0, 48.0]), rtol=1e-3, atol=0)
    torch.testing.assert_close(labels[2], torch.full((50,), 1 / 50))
    torch.testing.assert_close(sharpened(scores[:1], 0.5), sharpened(scores[:1] / 30, 0.5))
    assert sharpened(scores, 0.5)[1].min() == pytest.approx(-np.log(50) - 0.5)  # not 170 times the largest


def test_the_start_tells_what_follows_single_items(alone, score):
    """Unless it shall not: near the linear model's own probabilities, far nearer than before the fit."""
    settings = LinearSettings(regularisation=20.0, decay=0.8)
    assert linear_start(alone, 3, 0, replace(settings, successors=False)).successors is None
    wanted = sharpened(score([np.array([item]) for item in range(alone.n_items)]).float(), settings.label_margin)

    @torch.no_grad()
    def distance(found):
        f = found.features(alone.embeddings)
        got = F.pad(f, (0, 1), value=1.0) @ found.successors @ f.T
        return float(F.kl_div(got.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean"))

    chosen = linear_start(alone, 3, 0, settings)
    exact, orders = exact_labels(alone, chosen, score)
    before = fitted(alone, chosen, exact, orders, 0, lambda items: wanted[items], steps=0)
    assert distance(chosen) < 0.3 * distance(before) and distance(chosen) < 0.3


@torch.no_grad()
def test_the_fit_comes_near_the_exact_labels(alone, chosen, score):
    """Many times nearer than without its steps, in every reading."""
    exact, orders = exact_labels(alone, chosen, score)
    exact = 5.0 * exact
    wanted = exact.log_softmax(-1)

    def distance(steps: int) -> list[float]:
        with torch.enable_grad():
            found = fitted(alone, chosen, exact, orders, 0, steps=steps)
        z = torch.cat([found.labels[:, :, None], found.further_labels], 2)[chosen.mask]
        got = (z @ found.features(alone.embeddings).T).log_softmax(-1)
        return [float(F.kl_div(got[:, r], wanted[:, r], log_target=True, reduction="batchmean")) for r in range(3)]

    before, after = distance(0), distance(300)
    assert all(then < 0.3 * now and then < 0.1 for now, then in zip(before, after))


def test_the_start_needs_no_full_data_training_and_teaches(alone):
    """A student of it ranks far better than the untrained model."""
    start = linear_start(alone, 6, 0, LinearSettings(regularisation=20.0))
    assert start.readings == 3 and float(start.alike) > 0 and start.mask.all()
    assert torch.equal(start.items, kd_linear(alone, 6, 0, regularisation=20.0).items)
    model, data = alone.new_model(5), SyntheticData(start, alone.embeddings, likeness=1.0)
    before = rank_queries(recommender_scorer(model), alone.validation, alone.n_items).metrics()["ndcg@10"]
    optimizer, generator = torch.optim.Adam(model.parameters(), lr=5e-3), np.random.default_rng(0)
    for _ in range(100):
        optimizer.zero_grad()
        synthetic_loss(model, data.draw(generator)).backward()
        optimizer.step()
    after = rank_queries(recommender_scorer(model.eval()), alone.validation, alone.n_items).metrics()["ndcg@10"]
    assert after > 1.5 * before


def test_distilling_without_full_data_training_repeats(alone):
    first, second = (foster_free(alone, 3, 0, **FAST) for _ in range(2))
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name
    start = linear_start(alone, 3, 0, FreeSettings())
    assert not torch.equal(first.labels, start.labels) and torch.equal(first.items, start.items)
    assert not torch.equal(first.labels, foster_free(alone, 3, 1, **FAST).labels)


def test_real_next_items_are_judged(alone, monkeypatch):
    """L_real gets no teacher, and its subset holds the targets."""
    seen, plain = [], adjoint.real_loss

    def watched(model, windows, subset, teacher, *more):
        seen.append(teacher is None and bool(torch.isin(windows.targets, subset.items).all()))
        return plain(model, windows, subset, teacher, *more)

    monkeypatch.setattr(adjoint, "real_loss", watched)
    settings = FreeSettings(**FAST)
    start = linear_start(alone, 3, 0, settings)
    distill(FreshTask.of(alone), start, settings, seed=0, synthesizer=FreeSynthesizer)
    assert len(seen) == FAST["iterations"] and all(seen)


@pytest.mark.parametrize("wrong", [{"fresh": 0.5}, {"checkpoints": 1}])
def test_resets_to_checkpoints_are_refused(task, wrong):
    with pytest.raises(FosterError, match="no checkpoints"):
        foster_free(task, 3, 0, **wrong)


@pytest.mark.parametrize("name", ["kd-linear", "foster-free", "foster-tied"])
def test_their_rows_ask_for_no_full_data_run(settings, name):
    run = Run(settings, name, 0)
    assert not run.teachers and not get_method(name).needs_teacher
    described = run.description()
    assert "likeness" in described["student"] and described["readings"] == settings.readings and "full" not in described
