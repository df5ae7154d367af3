"""GraNd, EL2N and forgetting: closed forms against autograd, counts by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from foster_lib import scores
from foster_lib.coresets import candidates
from foster_lib.encoder import FrozenCatalogue
from foster_lib.errors import FosterError
from foster_lib.scores import error_norms, forgetting_events, gradient_norms, target_ranks
from tests.test_selection import rows

METHODS = [scores.grand, scores.el2n, scores.forgetting]


@pytest.fixture(scope="module")
def exact(task):
    """The teacher in double precision, and a few windows of different lengths."""
    pieces = [candidates(task)[i][: 2 + i % 6] for i in range(9)]
    return in_double(task), pieces


def in_double(task):
    """The teacher in double precision; the task keeps its own table of embeddings."""
    model = copy.deepcopy(task.teacher)
    model.catalogue = FrozenCatalogue(task.embeddings.double())
    return model.double().eval()


def logits_of(model, piece) -> torch.Tensor:
    features = model.features()
    return model.scores(model(torch.from_numpy(piece[:-1])[None], features)[0], features)


# --------------------------------------------------------------------------------- scores


def test_gradient_norm_equals_autograd(exact):
    """The Gram-matrix form equals the norm of the gradient with respect to the output features."""
    model, pieces = exact
    expected = []
    for piece in pieces:
        features = model.features()
        output = features.clone().requires_grad_()
        hidden = model(torch.from_numpy(piece[:-1])[None], features)[0]
        loss = F.cross_entropy(model.scores(hidden, output), torch.from_numpy(piece[1:]), reduction="sum")
        expected.append(torch.autograd.grad(loss, output)[0].norm().item())
    np.testing.assert_allclose(gradient_norms(model, pieces), expected, rtol=1e-9)


def test_error_norm_by_hand(exact):
    """Σ_t ‖softmax − onehot‖, written out."""
    model, pieces = exact
    expected = []
    for piece in pieces:
        total = 0.0
        for row, target in zip(logits_of(model, piece), piece[1:]):
            p = torch.exp(row) / torch.exp(row).sum()
            total += float(((1 - p[target]) ** 2 + (p**2).sum() - p[target] ** 2).sqrt())
        expected.append(total)
    np.testing.assert_allclose(error_norms(model, pieces), expected, rtol=1e-9)


def test_target_ranks_by_sorting(exact):
    """The place of each target in the sorted scores, windows one after the other."""
    model, pieces = exact
    expected = []
    for piece in pieces:
        order = logits_of(model, piece).argsort(-1, descending=True)
        expected += [int((row == target).nonzero()) for row, target in zip(order, piece[1:])]
    assert target_ranks(model, pieces).tolist() == expected


def test_scores_do_not_depend_on_the_batch(task, monkeypatch):
    """Many windows together, padded, give what each gives alone."""
    pieces = candidates(task)[:7]
    for score in (gradient_norms, error_norms, target_ranks):
        alone = np.concatenate([score(task.teacher, [piece]) for piece in pieces])
        np.testing.assert_allclose(score(task.teacher, pieces), alone, rtol=1e-4)


def test_forgetting_events_by_hand():
    """Learned → not learned counts; learning does not; never learned is infinite."""
    learned = np.array(
        [
            # kept, forgotten twice, late, never, forgotten at the end
            [1, 1, 0, 0, 0],
            [1, 0, 0, 0, 1],
            [1, 1, 1, 0, 1],
            [1, 0, 1, 0, 0],
        ],
        bool,
    )
    assert forgetting_events(learned).tolist() == [0, 2, 0, np.inf, 1]


# ------------------------------------------------------------------------------ selections


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_selections_are_distinct_windows(task, method):
    """n windows of the training data, none twice."""
    chosen = method(task, sequences=12, seed=0)
    available = [tuple(w.tolist()) for w in candidates(task)]
    for row in rows(chosen):
        available.remove(row)


def early_models(task, epochs):
    for epoch in range(1, epochs + 1):
        model = task.new_model(7).eval()
        model.load_state_dict(task.trajectory[epoch])
        yield model


@pytest.mark.parametrize(("method", "score"), [(scores.grand, gradient_norms), (scores.el2n, error_norms)])
@pytest.mark.parametrize(("per", "keep"), [("sequence", "hardest"), ("target", "easiest")])
def test_early_models_are_averaged(task, method, score, per, keep):
    """The ranking is by the mean over checkpoints 1 … epochs, per sequence or per target."""
    pool = candidates(task)
    mean = sum(score(model, pool).astype(float) for model in early_models(task, 3)) / 3
    if per == "target":
        mean = mean / [len(w) - 1 for w in pool]
    order = np.argsort(mean if keep == "easiest" else -mean)[:8]
    expected = {tuple(pool[i].tolist()) for i in order}
    assert set(rows(method(task, 8, 0, epochs=3, per=per, keep=keep))) == expected


def test_hardest_and_easiest_are_opposite(task):
    """The easiest windows have larger teacher likelihood per target than the hardest."""
    likelihood = []
    for keep in ("easiest", "hardest"):
        chosen = scores.el2n(task, 10, 0, per="target", keep=keep)
        logits = [logits_of(task.teacher, np.array(row)).log_softmax(-1) for row in rows(chosen)]
        gathered = [l.gather(-1, torch.tensor(row[1:])[:, None]) for l, row in zip(logits, rows(chosen))]  # noqa: E741
        likelihood.append(float(torch.cat(gathered).mean()))
    assert likelihood[0] > likelihood[1] + 0.5


def test_forgetting_selects_by_events(task, monkeypatch):
    """Three windows with prescribed ranks over four checkpoints; infinity counts 4 // 2 + 1 = 3."""
    pieces = [np.array([0, 1, 2]), np.array([3, 4]), np.array([5, 6, 7])]
    ranks = np.array(
        [  # window 0: 1 + 0 = 1 event; window 1: never learned = 3; window 2: 2 + 0 = 2
            [9, 0, 10, 3, 0],
            [10, 0, 10, 30, 0],
            [0, 0, 99, 2, 0],
            [0, 0, 10, 11, 0],
        ]
    )
    monkeypatch.setattr(scores, "checked_pool", lambda task, n: pieces)
    monkeypatch.setattr(scores, "checkpoints", lambda task: range(4))
    monkeypatch.setattr(scores, "target_ranks", lambda model, pool: ranks[model])
    assert [row[0] for row in rows(scores.forgetting(task, 3, 0))] == [3, 5, 0]
    assert [row[0] for row in rows(scores.forgetting(task, 3, 0, keep="easiest"))] == [0, 5, 3]
    # With top = 1 only rank 0 is learned. Events: 0 + 0; never; never + 0.
    first_places = [row[0] for row in rows(scores.forgetting(task, 3, 0, top=1))]
    assert first_places[2] == 0
    # Per target: window 2 falls to 3/2 behind window 1's 3.
    assert [row[0] for row in rows(scores.forgetting(task, 2, 0, top=1, per="target"))] == [3, 5]


def test_checkpoints_are_those_after_training_began(task):
    """The warm start takes no part; without a limit all epochs do."""
    assert (
        len(list(scores.checkpoints(task, 2))) == 2 and len(list(scores.checkpoints(task))) == len(task.trajectory) - 1
    )
    for epoch, model in enumerate(scores.checkpoints(task, 2), 1):
        state = model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in task.trajectory[epoch].items())


def test_unknown_options(task):
    """The message names the nearest word."""
    with pytest.raises(FosterError, match="Did you mean 'hardest'"):
        scores.grand(task, 2, 0, keep="hard")
    with pytest.raises(FosterError, match="Did you mean 'target'"):
        scores.el2n(task, 2, 0, per="targets")
