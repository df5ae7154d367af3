"""Full-catalogue ranking, its metrics, and the paired bootstrap between two methods.

For every query all |V| items are scored and the items of the user's history are left out (the
target never is). A query's result is two counts: `higher`, the items scored above the target,
and `tied`, the other items with the target's score. The reported rank is
1 + higher + tied / 2, the expected rank under random tie-breaking; a metric is its expected
value under random tie-breaking, so constant scores earn Recall@K = K / |candidates| and no more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from foster_lib.errors import FosterError
from foster_lib.sasrec import SASRec
from foster_lib.splits import Queries

CUTOFFS = (5, 10, 20)
METRICS = (*(f"{name}@{k}" for name in ("ndcg", "recall") for k in CUTOFFS), "mrr")
Scorer = Callable[[list[np.ndarray]], Tensor]
"""Maps Q histories (item indices, oldest first) to scores (Q, |V|)."""


@dataclass(frozen=True)
class Ranks:
    """Per query: the user, the items above the target, the other items tied with it."""

    users: np.ndarray
    higher: np.ndarray
    tied: np.ndarray

    @property
    def rank(self) -> np.ndarray:
        """1 + higher + tied / 2, as float64."""
        return 1 + self.higher + self.tied / 2

    def per_user(self, metric: str) -> np.ndarray:
        """Expected value of `metric` for each query, float64.

        The target's place is uniform over higher + 1 … higher + tied + 1; the mean gain over
        these places is a difference of two prefix sums of the gain by place.
        """
        places = int((self.higher + self.tied).max()) + 1
        place = np.arange(1, places + 1)
        name, _, cut = metric.partition("@")
        if name == "mrr":
            gain = 1 / place
        elif name in ("recall", "ndcg"):
            gain = (place <= int(cut)) * (1.0 if name == "recall" else 1 / np.log2(1 + place))
        else:
            raise FosterError(f"unknown metric '{metric}'. Known: {', '.join(METRICS)}.")
        total = np.concatenate([[0.0], np.cumsum(gain)])
        return (total[self.higher + self.tied + 1] - total[self.higher]) / (self.tied + 1)

    def metrics(self) -> dict[str, float]:
        """Mean over queries of every metric in `METRICS`."""
        return {metric: float(self.per_user(metric).mean()) for metric in METRICS}

    def to_frame(self) -> pd.DataFrame:
        """Columns user, higher, tied, as stored beside a manifest."""
        return pd.DataFrame(
            {
                "user": self.users.astype(np.int32),
                "higher": self.higher.astype(np.int32),
                "tied": self.tied.astype(np.int32),
            }
        )

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> Ranks:
        return cls(*(frame[column].to_numpy(np.int64) for column in ("user", "higher", "tied")))


def rank_queries(score: Scorer, queries: Queries, n_items: int, memory_items: int = 2**21) -> Ranks:
    """Rank every query's target among all items, in float32.

    Parameters
    ----------
    score : Scorer
    memory_items : int
        Upper bound on the number of scores held at once (bounded memory for any |U| × |V|).

    Raises
    ------
    FosterError
        If a score is NaN.
    """
    batch = max(1, min(512, memory_items // n_items))
    higher = np.empty(len(queries), np.int64)
    tied = np.empty(len(queries), np.int64)
    # Queries of similar length share a batch, which keeps padding low.
    order = np.argsort([len(history) for history in queries.histories], kind="stable")
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        histories = [queries.histories[q] for q in chosen]
        scores = score(histories).clone()  # a scorer may keep what it returns
        row = torch.arange(len(chosen), device=scores.device)
        target = torch.as_tensor(queries.targets[chosen], device=scores.device)
        target_score = scores[row, target][:, None]
        if torch.isnan(scores.amax()):
            raise FosterError("a score is NaN: training has diverged; lower the learning rate.")
        lengths = torch.tensor([len(history) for history in histories], device=scores.device)
        seen = torch.as_tensor(np.concatenate(histories), dtype=torch.long, device=scores.device)
        scores[row.repeat_interleave(lengths), seen] = torch.nan  # compares with nothing: no candidate
        scores[row, target] = torch.nan
        above, equal = (torch.empty_like(scores) for _ in range(2))  # counting in float is several times faster
        torch.gt(scores, target_score, out=above)
        torch.eq(scores, target_score, out=equal)
        higher[chosen] = above.sum(1).cpu().numpy()
        tied[chosen] = equal.sum(1).cpu().numpy()
    return Ranks(queries.users, higher, tied)


def recommender_scorer(model: SASRec) -> Scorer:
    """Score all items with the recommender, reading the last L items of each history."""
    model.eval()
    with torch.inference_mode():
        features = model.features()

    @torch.inference_mode()
    def score(histories: list[np.ndarray]) -> Tensor:
        length = model.settings.length
        recent = [history[-length:] for history in histories]
        inputs = torch.zeros(len(recent), max(map(len, recent)), dtype=torch.long)
        for row, history in enumerate(recent):
            inputs[row, : len(history)] = torch.from_numpy(history)
        hidden = model(inputs.to(features.device), features)
        last = torch.tensor([len(history) - 1 for history in recent], device=features.device)
        return model.scores(hidden[torch.arange(len(recent), device=last.device), last], features)

    return score


def paired_bootstrap(
    ours: np.ndarray, theirs: np.ndarray, *, samples: int = 10_000, level: float = 0.95, seed: int = 0
) -> dict[str, float]:
    """Is the mean of `ours` above that of `theirs`, user by user?

    Resamples users with replacement and keeps the pairs together (Efron and Tibshirani, 1993).

    Parameters
    ----------
    ours, theirs : (|U|,) float
        One metric of the same users in the same order (mean over seeds).

    Returns
    -------
    dict
        `difference` of the means, its interval `low` … `high` at `level`, `p_value` (two-sided),
        and the effect size `cohens_d` of the paired differences.
    """
    if ours.shape != theirs.shape:
        raise FosterError(f"paired bootstrap needs the same users: {ours.shape} against {theirs.shape}.")
    difference = ours - theirs
    generator = np.random.default_rng(seed)
    means = np.empty(samples)
    for start in range(0, samples, 500):
        count = min(500, samples - start)
        drawn = generator.integers(0, len(difference), size=(count, len(difference)))
        means[start : start + count] = difference[drawn].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    one_sided = min((means <= 0).mean(), (means >= 0).mean())
    spread = difference.std()
    return {
        "difference": float(difference.mean()),
        "low": float(low),
        "high": float(high),
        "p_value": float(min(1.0, 2 * max(one_sided, 1 / samples))),
        "cohens_d": float(difference.mean() / spread) if spread > 0 else 0.0,
    }
