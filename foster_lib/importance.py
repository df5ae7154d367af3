"""Item subsets by importance: as many items as a uniform subset, most of them where S's labels have probability.

Of a large catalogue a uniform subset holds hardly an item that is probable anywhere: the softmax over it is about the
order of items that are all out of the question. Each of N draws therefore takes item i with probability

    q_i = a · m_i + (1 − a) / |V|,   m_i the labels' mean probability of i, a the share of the draws that follow it,

and items with N q_i ≥ 1 are always there. One that was drawn stands for 1 / (N q_i) of its kind, so that a weighted sum
still estimates the catalogue's without bias (importance sampling; Hansen and Hurwitz, 1943), whatever a is.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from foster_lib.subsets import Subset


class ImportanceSampler:
    """Draws subsets of a catalogue; a draw costs the same for any size of it.

    Parameters
    ----------
    mass : (|V|,) how probable each item is, up to a factor
    size : N; not more items than that are drawn
    share : a in 0 … 1; 0: uniform
    """

    def __init__(self, mass: Tensor, size: int, share: float):
        mass = mass.detach().cpu().double().numpy()
        expected = expected_draws(share * mass / mass.sum() + (1 - share) / len(mass), size)
        self.n_items, self.always = len(mass), np.flatnonzero(expected >= 1)
        self.others = np.flatnonzero(expected < 1)
        self.expected, self.cumulative = expected[self.others], np.cumsum(expected[self.others])

    def draw(self, generator: np.random.Generator) -> Subset:
        """A subset of at most N items. Draws are stratified: one in each N-th of the probability."""
        count = round(float(self.cumulative[-1])) if len(self.others) else 0
        where = (np.arange(count) + generator.random(count)) * (self.cumulative[-1] / count if count else 0.0)
        drawn = np.minimum(np.searchsorted(self.cumulative, where, side="right"), len(self.others) - 1)
        places, times = np.unique(drawn, return_counts=True)
        items = np.concatenate([self.always, self.others[places]])
        weight = np.concatenate([np.zeros(len(self.always)), np.log(times / self.expected[places])])
        order = np.argsort(items)
        log_weight = torch.from_numpy(weight[order]).float()
        return Subset(torch.from_numpy(items[order]), self.n_items, log_weight)


def expected_draws(probability: np.ndarray, size: int) -> np.ndarray:
    """How often N draws take each item if none shall be taken more than once: min(1, c q_i), with c such that the sum
    is N (all items if there are no more).
    """
    always = np.zeros(len(probability), dtype=bool)
    while True:
        left = min(size, len(probability)) - always.sum()
        expected = np.where(always, 1.0, probability * (left / max(probability[~always].sum(), 1e-300)))
        further = (expected >= 1 - 1e-9) & ~always
        if not further.any():
            return expected
        always |= further


def label_mass(labels: Tensor, f: Tensor, at_once: int = 100) -> Tensor:
    """Summed probability of each item in labels z (T, k), softmax_j(z · f_j), f (|V|, k): (|V|,)."""
    mass = torch.zeros(len(f), dtype=torch.float64, device=f.device)
    with torch.no_grad():
        for z in labels.split(at_once):  # the scores of all items at once would fill the memory
            mass += (z @ f.T).softmax(-1).sum(0)
    return mass
