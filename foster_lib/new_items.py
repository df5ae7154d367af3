"""Table 2 of the users whose test target was new to them.

The ranking leaves out a user's history, but not the target. Where users come back to items, as on Yelp, such a target
is the only item of its history that is left, and whoever scores histories highest finds it without knowing anything
else. The second table of such a data set counts the other users alone (`tables.write_table2`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from foster_lib.evaluation import Ranks
from foster_lib.records import read_ranks
from foster_lib.runs import Run, load_once
from foster_lib.splits import Queries, make_split


def new_targets(queries: Queries) -> np.ndarray:
    """Whether a query's target is not in its history: (queries,) bool."""
    return np.array([target not in history for history, target in zip(queries.histories, queries.targets)], bool)


def new_test_targets(run: Run) -> np.ndarray:
    """`new_targets` of the test queries that a run was ranked on: (queries,) bool."""
    return new_targets(make_split(load_once(run.settings.dataset), run.settings.split).test)


def over_queries(runs: Iterable[Run], chosen: np.ndarray) -> list[dict[str, Any]]:
    """Manifests of finished runs whose test metrics are over the `chosen` queries alone, from the stored ranks."""
    manifests = []
    for run in runs:
        ranks = read_ranks(run.path)
        part = Ranks(ranks.users[chosen], ranks.higher[chosen], ranks.tied[chosen])
        manifests.append({**run.manifest(), "test": part.metrics()})
    return manifests
