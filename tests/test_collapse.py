"""What sequences speak of, and whom their students serve, against loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from foster_lib.collapse import collapse_figures, diversity, gini
from foster_lib.config import Profile
from foster_lib.execution import execute
from foster_lib.records import read_ranks
from foster_lib.runs import load_once, make_task, plan
from foster_lib.splits import make_split
from foster_lib.synthetic import SyntheticSequences
from tests.test_studies import RAW, quiet


@pytest.fixture
def runs(toy):
    """FOSTER, full data and popularity on the tiny data set, finished."""
    profile = Profile("tiny", ["toy"], [0], "leave-one-out", [], RAW)
    planned = plan(profile, ["toy"], ["foster", "full", "popularity"], [0])
    execute(planned, say=quiet, progress=False)
    return planned


def test_gini_is_the_mean_difference_over_twice_the_mean():
    mass = np.random.default_rng(0).random(30) ** 3
    by_pairs = np.mean([abs(a - b) for a in mass for b in mass]) / (2 * mass.mean())
    assert gini(mass) == pytest.approx(by_pairs) == gini(1000 * mass[::-1])
    assert gini(np.ones(9)) == pytest.approx(0) and gini(np.eye(10)[0]) == pytest.approx(0.9)


def test_diversity_is_the_mean_over_pairs():
    text = F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=-1)
    pairs = [1 - float(text[a] @ text[b]) for a in range(6) for b in range(6) if a != b]
    assert diversity(text) == pytest.approx(np.mean(pairs))
    assert diversity(text[:1].expand(3, 4)) == pytest.approx(0, abs=1e-12)


def test_figures_by_loops(runs):
    run, full, popularity = runs
    task, stored = make_task(run), SyntheticSequences.load(run.distilled_path)
    seen = {item: sum(list(sequence).count(item) for sequence in task.train) for item in range(task.n_items)}
    popular = sorted(seen, key=lambda item: (-seen[item], item))
    y = stored.target_probabilities(task.embeddings)
    rows = [y[n, t] for n in range(len(stored)) for t in range(y.shape[1]) if stored.mask[n, t]]
    figures = collapse_figures(run)
    assert figures["coverage"] == len({int(row.argmax()) for row in rows})
    for name, items in (("head_share", popular[:4]), ("tail_share", popular[20:])):
        assert figures[name] == pytest.approx(sum(float(row[items].sum()) for row in rows) / len(rows), rel=1e-5)
    nexts = [item for sequence in task.train for item in sequence[1:]]
    real = collapse_figures(full)
    assert real["head_share"] == pytest.approx(sum(item in popular[:4] for item in nexts) / len(nexts))
    assert real["gini"] == pytest.approx(gini(np.bincount(nexts, minlength=task.n_items)))
    targets = make_split(load_once("toy"), "leave-one-out").test.targets
    gains = dict(zip(range(len(targets)), read_ranks(popularity.path).per_user("ndcg@10")))
    tail = [gains[user] for user, target in enumerate(targets) if target in popular[20:]]
    assert collapse_figures(popularity)["ndcg_tail"] == pytest.approx(np.mean(tail))
    assert set(collapse_figures(popularity)) == {"ndcg_head", "ndcg_tail"}
    assert set(real) == set(figures) - {"coverage"}


def test_sequences_of_one_item_are_not_diverse(runs):
    run = runs[0]
    stored = SyntheticSequences.load(run.distilled_path)
    before = collapse_figures(run)["diversity"]
    text = F.normalize(make_task(run).embeddings, dim=-1)
    decoded = stored.input_probabilities(make_task(run).embeddings).argmax(-1)
    by_hand = [diversity(text[items[real]]) for items, real in zip(decoded, stored.mask) if real.sum() > 1]
    assert before == pytest.approx(np.mean(by_hand))
    replace(stored, items=torch.zeros_like(stored.items), bonus=stored.bonus + 1e4).save(run.distilled_path)
    assert collapse_figures(run)["diversity"] == pytest.approx(0, abs=1e-5) and before > 0.01
