"""Ranks, metrics under ties, and the paired bootstrap."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from foster_lib.errors import FosterError
from foster_lib.evaluation import METRICS, Ranks, paired_bootstrap, rank_queries, recommender_scorer
from foster_lib.sasrec import build_model
from foster_lib.significance import paired_bootstraps
from foster_lib.splits import Queries
from tests.conftest import SMALL

N = 50


def random_queries(count: int = 30, seed: int = 0) -> Queries:
    """Histories of 1 to 8 items; every third target stands in its own history."""
    rng = np.random.default_rng(seed)
    histories = [rng.integers(N, size=rng.integers(1, 9)) for _ in range(count)]
    targets = np.array([h[0] if q % 3 == 0 else rng.integers(N) for q, h in enumerate(histories)])
    return Queries(np.arange(100, 100 + count), histories, targets)


def fixed_scorer(queries: Queries, scores: np.ndarray):
    """A scorer that looks its scores up by history, so that any batching asks the same."""
    row = {id(history): q for q, history in enumerate(queries.histories)}
    return lambda histories: torch.from_numpy(scores[[row[id(h)] for h in histories]])


def candidates_of(queries: Queries, q: int) -> list[int]:
    history = set(queries.histories[q].tolist())
    return [i for i in range(N) if i == queries.targets[q] or i not in history]


def naive_metric(metric: str, higher: int, tied: int) -> float:
    """Mean of the metric over all places that random tie-breaking can give the target."""
    name, _, cut = metric.partition("@")
    gains = []
    for place in range(higher + 1, higher + tied + 2):
        if name == "mrr":
            gains.append(1 / place)
        elif place > int(cut):
            gains.append(0.0)
        else:
            gains.append(1.0 if name == "recall" else 1 / math.log2(1 + place))
    return sum(gains) / len(gains)


@pytest.mark.parametrize("levels", [3, 10, 10**6])
def test_ranks_and_metrics_equal_naive_loops(levels):
    """Counts above and beside the target, and the expected metrics, under many ties and under none."""
    queries = random_queries()
    scores = np.random.default_rng(1).integers(levels, size=(30, N)).astype(np.float32)
    ranks = rank_queries(fixed_scorer(queries, scores), queries, N)
    assert ranks.users.tolist() == list(range(100, 130))
    for q in range(30):
        goal = scores[q, queries.targets[q]]
        others = [scores[q, i] for i in candidates_of(queries, q) if i != queries.targets[q]]
        higher, tied = sum(s > goal for s in others), sum(s == goal for s in others)
        assert (ranks.higher[q], ranks.tied[q]) == (higher, tied)
        assert ranks.rank[q] == 1 + higher + tied / 2
        for metric in METRICS:
            assert ranks.per_user(metric)[q] == pytest.approx(naive_metric(metric, higher, tied), abs=1e-12)
    for metric, value in ranks.metrics().items():
        assert value == pytest.approx(ranks.per_user(metric).mean())
    assert set(ranks.metrics()) == {f"{m}@{k}" for m in ("ndcg", "recall") for k in (5, 10, 20)} | {"mrr"}


def test_untied_metrics_equal_ranx():
    """An independent library agrees on NDCG, Recall and MRR of random scores without ties."""
    ranx = pytest.importorskip("ranx")
    queries = random_queries(count=60)
    scores = np.random.default_rng(2).permuted(np.tile(np.arange(N, dtype=np.float64), (60, 1)), axis=1)
    ranks = rank_queries(fixed_scorer(queries, scores), queries, N)
    assert not ranks.tied.any()
    truth = ranx.Qrels({f"q{q:03d}": {f"i{target}": 1} for q, target in enumerate(queries.targets)})
    run = ranx.Run({f"q{q:03d}": {f"i{i}": scores[q, i] for i in candidates_of(queries, q)} for q in range(60)})
    theirs = ranx.evaluate(truth, run, list(METRICS), return_mean=False)
    for metric in METRICS:
        np.testing.assert_allclose(ranks.per_user(metric), theirs[metric], atol=1e-9)


def test_constant_scores_earn_chance():
    """Recall@K = K / |candidates| exactly, rank = (|candidates| + 1) / 2: the history leaves the candidates."""
    queries = random_queries()
    ranks = rank_queries(lambda histories: torch.zeros(len(histories), N), queries, N)
    size = np.array([len(candidates_of(queries, q)) for q in range(30)])
    for k in (5, 10, 20):
        np.testing.assert_allclose(ranks.per_user(f"recall@{k}"), k / size)
    np.testing.assert_allclose(ranks.rank, (size + 1) / 2)


def test_constant_scores_with_few_candidates():
    """With no more candidates than places every metric is the mean over all places and recall is 1."""
    queries = Queries(np.array([0]), [np.array([3])], np.array([0]))
    ranks = rank_queries(lambda histories: torch.ones(1, 4), queries, 4)
    assert ranks.per_user("recall@5")[0] == 1.0
    assert ranks.per_user("mrr")[0] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_history_is_excluded_but_the_target_never():
    """High-scored history items cost nothing; a target that stands in the history is still ranked."""
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0]])
    ask = lambda history, target: rank_queries(  # noqa: E731
        lambda histories: scores, Queries(np.array([0]), [np.array(history)], np.array([target])), 5
    )
    assert ask([0, 1, 0], 2).rank[0] == 1
    assert ask([3, 4], 2).rank[0] == 3
    assert ask([0, 2, 2], 2).rank[0] == 2
    tied = torch.zeros(1, 5)
    ranks = rank_queries(lambda h: tied, Queries(np.array([0]), [np.array([1, 2, 2])], np.array([2])), 5)
    assert (ranks.higher[0], ranks.tied[0]) == (0, 3)  # items 0, 3 and 4; not 1, and not itself


def test_a_large_validation_set_is_sampled_once(task, monkeypatch):
    """The same queries for every call and every task of the data; a small set is used whole."""
    assert task.validation_sample is task.validation
    monkeypatch.setattr("foster_lib.task.VALIDATION_QUERIES", 20)
    first, second = replace(task).validation_sample, replace(task).validation_sample
    assert len(first) == 20 and (first.users == second.users).all()
    place = {user: q for q, user in enumerate(task.validation.users)}
    for user, history, target in zip(first.users, first.histories, first.targets):
        assert task.validation.targets[place[user]] == target
        assert (task.validation.histories[place[user]] == history).all()


def test_perfect_and_worst_scores():
    """First place earns 1 everywhere; the last place of 50 earns 1/50 in MRR and nothing else."""
    queries = Queries(np.arange(2), [np.array([0]), np.array([0])], np.array([7, 7]))
    high, low = torch.zeros(2, N), torch.zeros(2, N)
    high[:, 7], low[:, 7] = 1.0, -math.inf
    assert set(rank_queries(lambda h: high, queries, N).metrics().values()) == {1.0}
    worst = rank_queries(lambda h: low, queries, N).metrics()
    assert worst.pop("mrr") == pytest.approx(1 / 49)
    assert set(worst.values()) == {0.0}


def test_nan_score_is_an_error():
    """One NaN anywhere, even in the history, stops the evaluation."""
    queries = random_queries()
    scores = np.random.default_rng(3).random((30, N))
    scores[17, queries.histories[17][0]] = math.nan
    with pytest.raises(FosterError, match="a score is NaN"):
        rank_queries(fixed_scorer(queries, scores), queries, N)


@pytest.mark.parametrize("memory_items", [1, N, 7 * N + 3, 2**23])
def test_memory_bound_does_not_change_ranks(memory_items):
    """Any batch size gives the same ranks in the order of the queries, and no batch is larger than allowed."""
    queries = random_queries()
    scores = np.random.default_rng(4).integers(20, size=(30, N)).astype(np.float32)
    score, sizes = fixed_scorer(queries, scores), []

    def counted(histories):
        sizes.append(len(histories))
        return score(histories)

    ranks, expected = rank_queries(counted, queries, N, memory_items), rank_queries(score, queries, N)
    assert np.array_equal(ranks.higher, expected.higher) and np.array_equal(ranks.tied, expected.tied)
    assert max(sizes) * N <= max(memory_items, N) and sum(sizes) == 30


def test_renumbering_items_and_users_changes_nothing():
    """Metrics per user are the same after a permutation of the items and of the queries."""
    queries = random_queries()
    scores = np.random.default_rng(5).integers(12, size=(30, N)).astype(np.float32)
    rng = np.random.default_rng(6)
    item, order = rng.permutation(N), rng.permutation(30)  # item i gets the number item[i]
    renamed = Queries(queries.users[order], [item[queries.histories[q]] for q in order], item[queries.targets[order]])
    ranks = rank_queries(fixed_scorer(queries, scores), queries, N)
    other = rank_queries(fixed_scorer(renamed, scores[order][:, np.argsort(item)]), renamed, N)
    for metric in METRICS:
        np.testing.assert_allclose(other.per_user(metric), ranks.per_user(metric)[order])


def test_frame_round_trip():
    """Ranks come back from the stored table."""
    ranks = Ranks(np.array([4, 2]), np.array([0, 70000]), np.array([3, 0]))
    frame = ranks.to_frame()
    assert list(frame.columns) == ["user", "higher", "tied"]
    again = Ranks.from_frame(frame)
    for a, b in zip((ranks.users, ranks.higher, ranks.tied), (again.users, again.higher, again.tied)):
        assert np.array_equal(a, b) and b.dtype == np.int64
    assert again.metrics() == ranks.metrics()


def test_unknown_metric():
    """An unknown metric is answered with the known ones."""
    with pytest.raises(FosterError, match=r"unknown metric 'precision@5'. Known: ndcg@5"):
        Ranks(np.array([0]), np.array([0]), np.array([0])).per_user("precision@5")


# ------------------------------------------------------------------------ recommender scorer


def test_recommender_scorer_equals_one_history_at_a_time(catalogue):
    """Histories of mixed lengths, padded together, score as each does alone with its last L items."""
    model = build_model(catalogue, SMALL, seed=0).train()
    rng = np.random.default_rng(7)
    histories = [rng.integers(catalogue.n_items, size=n) for n in (1, 3, 6, 7, 20)]
    scores = recommender_scorer(model)(histories)
    assert not model.training
    with torch.no_grad():
        for row, history in zip(scores, histories):
            items = torch.from_numpy(history[-SMALL.length :])[None]
            expected = model.scores(model(items, model.features())[0, -1], model.features())
            torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)


def test_task_validate_is_ndcg_on_validation(task):
    """The figure that training selects by is NDCG@10 of the validation queries, reproduced by hand."""
    score = recommender_scorer(task.teacher)
    gains = []
    for history, target in zip(task.validation.histories, task.validation.targets):
        scores = score([history])[0].numpy().copy()
        goal = scores[target]
        scores[np.setdiff1d(history, [target])] = -np.inf
        place = 1 + (scores > goal).sum()
        gains.append(1 / math.log2(1 + place) if place <= 10 else 0.0)
    assert task.validate(task.teacher) == pytest.approx(np.mean(gains), abs=1e-3)


# ------------------------------------------------------------------------------- bootstrap


def test_bootstrap_of_equal_methods():
    """No difference at all: nothing is significant."""
    values = np.random.default_rng(0).random(50)
    result = paired_bootstrap(values, values.copy(), samples=500)
    assert result == {"difference": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0, "cohens_d": 0.0}


def test_bootstrap_interval_is_the_normal_one():
    """For many users the interval is mean ± z·s/√n, at any level."""
    rng = np.random.default_rng(1)
    theirs = rng.random(2000)
    ours = theirs + rng.normal(0.1, 1.0, 2000)
    d = ours - theirs
    error = d.std() / math.sqrt(2000)
    for level, z in ((0.95, 1.960), (0.8, 1.2816)):
        result = paired_bootstrap(ours, theirs, samples=4000, level=level)
        assert result["difference"] == pytest.approx(d.mean())
        assert result["low"] == pytest.approx(d.mean() - z * error, abs=0.1 * error)
        assert result["high"] == pytest.approx(d.mean() + z * error, abs=0.1 * error)
        assert result["cohens_d"] == pytest.approx(d.mean() / d.std())


def test_bootstrap_keeps_the_pairs():
    """A small steady gain over widely spread users is certain; without the pairs it would drown."""
    rng = np.random.default_rng(2)
    theirs = rng.normal(0, 10, 300)
    ours = theirs + 0.1 + rng.normal(0, 0.05, 300)
    steady = paired_bootstrap(ours, theirs, samples=2000)
    assert steady["p_value"] == pytest.approx(2 / 2000) and steady["low"] > 0.09
    loose = paired_bootstrap(rng.permutation(ours), theirs, samples=2000)
    assert loose["p_value"] > 0.05 and loose["low"] < 0 < loose["high"]


def test_bootstrap_is_antisymmetric():
    """Swapping the methods mirrors difference, interval and effect, and keeps the p-value."""
    rng = np.random.default_rng(3)
    ours, theirs = rng.random(100), rng.random(100) + 0.05
    a, b = paired_bootstrap(ours, theirs, samples=2000), paired_bootstrap(theirs, ours, samples=2000)
    assert (a["difference"], a["cohens_d"]) == pytest.approx((-b["difference"], -b["cohens_d"]))
    assert (a["low"], a["high"]) == pytest.approx((-b["high"], -b["low"]))
    assert a["p_value"] == pytest.approx(b["p_value"])


def test_bootstrap_is_calibrated():
    """Of 400 comparisons of equally good methods about 5 % come out below 0.05, and p-values are uniform."""
    rng = np.random.default_rng(4)
    p = []
    for _ in range(400):
        ours, theirs = rng.random((2, 100)) < 0.3
        p.append(paired_bootstrap(ours.astype(float), theirs.astype(float), samples=400)["p_value"])
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.09
    assert 0.4 < np.mean(p) < 0.65


def test_bootstrap_needs_the_same_users():
    """Different numbers of users are refused, by name where there are several rows."""
    with pytest.raises(FosterError, match="needs the same users"):
        paired_bootstrap(np.zeros(3), np.zeros(4))
    with pytest.raises(FosterError, match="needs the same users.*of kd"):
        paired_bootstraps(np.zeros(3), {"full": np.zeros(3), "kd": np.zeros(4)})


def test_many_bootstraps_at_once_are_the_single_ones():
    """The same draws of users, whatever the number of samples is divided by; nothing to compare is nothing."""
    rng = np.random.default_rng(5)
    ours = rng.random(257) * (rng.random(257) < 0.3)
    others = {"near": ours + rng.normal(0, 0.05, 257), "far": ours - 0.1 * rng.random(257), "same": ours.copy()}
    together = paired_bootstraps(ours, others, samples=1234, level=0.9, seed=3)
    for name, theirs in others.items():
        alone = paired_bootstrap(ours, theirs, samples=1234, level=0.9, seed=3)
        assert together[name] == pytest.approx(alone, abs=1e-11)
    assert together["same"]["low"] == together["same"]["high"] == 0.0
    assert paired_bootstraps(ours, {}) == {}
