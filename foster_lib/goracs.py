"""GORACS: coreset selection by optimal transport (Mei et al., KDD 2025, arXiv 2506.04015).

The chosen set S minimises the optimal transport between S (mass 1/n on each window) and the
validation sequences (mass 1/m each) with the cost

    c_ij = ‖e_i − e_j‖ / max − λ · g_i / max,

e the mean text embedding of a sequence, target included, g_i the norm of the gradient of window i
before training: a bound on the loss on data like the validation set after a step on S.

1. A greedy start: the facility-location solution Σ_j min_{i ∈ S} c_ij, S grown item by item.
2. Exchanges of one member of S with one outsider, tried in the order of a lower bound that the
   dual potentials give without solving a transport problem; the first that pays is made.
"""

from __future__ import annotations

import numpy as np
import ot
from scipy.spatial.distance import cdist
from tqdm.auto import tqdm

from foster_lib.coresets import checked_pool, select
from foster_lib.scores import gradient_norms
from foster_lib.selection import text_means
from foster_lib.synthetic import SyntheticSequences
from foster_lib.task import Task


def goracs(
    task: Task,
    sequences: int,
    seed: int,
    gradient_weight: float = 0.1,
    exchanges: int = 100,
    shortlist: int = 30,
    windows: int = 2000,
    targets: int = 2000,
    progress: str = "",
) -> SyntheticSequences:
    """Windows to which the validation sequences are transported at least cost.

    Parameters
    ----------
    gradient_weight : float
        λ.
    exchanges : int
        Largest number of exchanges.
    shortlist : int
        Outsiders considered for each exchange.
    windows, targets : int
        Where there are more windows or validation sequences, as many are drawn at random.
    """
    pool = checked_pool(task, sequences)
    generator = np.random.default_rng(seed)
    some = np.sort(generator.permutation(len(pool))[: max(windows, sequences)])
    queries = np.sort(generator.permutation(len(task.validation))[:targets])
    pool = [pool[i] for i in some]
    wanted = [
        np.append(task.validation.histories[q][-task.length :], task.validation.targets[q]) for q in queries.tolist()
    ]
    distance = cdist(text_means(task, pool), text_means(task, wanted))
    lengths = np.array([len(piece) - 1 for piece in pool])
    gradients = gradient_norms(task.new_model(seed).eval(), pool) / lengths
    cost = distance / distance.max() - gradient_weight * (gradients / gradients.max())[:, None]
    start = greedy_start(cost, sequences)
    return select(task, pool, exchange(cost, start, exchanges, shortlist, progress)[0])


def transport(cost: np.ndarray, chosen: np.ndarray) -> tuple[float, np.ndarray]:
    """Optimal transport between uniform masses on the chosen rows and on all columns of the cost.

    Returns
    -------
    value; dual potentials u of the chosen rows (n,)
        value = Σ_i u_i / n + Σ_j min_i (c_ij − u_i) / m.
    """
    rows = np.ascontiguousarray(cost[chosen], dtype=np.float64)
    masses = [np.full(size, 1 / size) for size in rows.shape]
    value, log = ot.emd2(*masses, rows, log=True, numItermax=1_000_000)
    return float(value), log["u"]


def greedy_start(cost: np.ndarray, count: int) -> np.ndarray:
    """Add the row that lowers Σ_j min_{i ∈ S} c_ij most, `count` times."""
    best, chosen = np.full(cost.shape[1], np.inf), []
    for _ in range(count):
        totals = np.minimum(cost, best).sum(1)
        totals[chosen] = np.inf
        chosen.append(int(totals.argmin()))
        best = np.minimum(best, cost[chosen[-1]])
    return np.array(chosen)


def exchange(
    cost: np.ndarray, chosen: np.ndarray, exchanges: int, shortlist: int, progress: str = ""
) -> tuple[np.ndarray, list[float]]:
    """Improve the transport by exchanges of one row: (chosen rows, values after each exchange).

    An exchange whose lower bound is not below the current value cannot pay and is not tried.
    """
    value, potentials = transport(cost, chosen)
    values = [value]
    for _ in tqdm(range(exchanges), desc=progress, unit="exchange", disable=not progress):
        outer = outsiders(cost, chosen, potentials, shortlist)
        bounds = exchange_bounds(cost, chosen, potentials, outer)
        for flat in np.argsort(bounds, axis=None, kind="stable"):
            leaver, newcomer = np.unravel_index(flat, bounds.shape)
            if bounds[leaver, newcomer] >= value - 1e-9:
                return chosen, values
            changed = np.append(np.delete(chosen, leaver), outer[newcomer])
            new_value, new_potentials = transport(cost, changed)
            if new_value < value - 1e-9:
                chosen, value, potentials = changed, new_value, new_potentials
                values.append(value)
                break
        else:
            return chosen, values
    return chosen, values


def outsiders(cost: np.ndarray, chosen: np.ndarray, potentials: np.ndarray, count: int) -> np.ndarray:
    """The rows outside S that promise most when added to it, by the bound of `newcomer_terms`."""
    free = np.setdiff1d(np.arange(len(cost)), chosen)
    reach = (cost[chosen] - potentials[:, None]).min(0)
    return free[np.argsort(newcomer_terms(cost[free] - reach, len(chosen)), kind="stable")[:count]]


def exchange_bounds(cost: np.ndarray, chosen: np.ndarray, potentials: np.ndarray, outer: np.ndarray) -> np.ndarray:
    """Lower bounds of the transport after each exchange: (n, len(outer)).

    Any potentials bound the transport from below (weak duality). Those of the rows that stay are
    kept, f_j = min (c_ij − u_i) over them, and the newcomer's potential y is chosen best:

        Σ_stay u_i / n + Σ_j f_j / m + max_y [ y / n + Σ_j min(c_oj − f_j − y, 0) / m ].
    """
    n = len(chosen)
    if n == 1:  # nobody stays: the newcomer receives everything
        return cost[outer].mean(1)[None]
    slack = cost[chosen] - potentials[:, None]
    bounds = np.empty((n, len(outer)))
    for leaver in range(n):
        reach = np.delete(slack, leaver, axis=0).min(0)
        stay = (potentials.sum() - potentials[leaver]) / n + reach.mean()
        bounds[leaver] = stay + newcomer_terms(cost[outer] - reach, n)
    return bounds


def newcomer_terms(difference: np.ndarray, n: int) -> np.ndarray:
    """max_y [ y / n + Σ_j min(d_j − y, 0) / m ] for each row d of `difference`.

    The slope in y is 1/n minus the fraction of d below y, so the maximum is at the ⌈m/n⌉-th smallest d.
    """
    place = -(-difference.shape[1] // n) - 1
    y = np.partition(difference, place, axis=1)[:, place]
    return y / n + np.minimum(difference - y[:, None], 0).mean(1)
