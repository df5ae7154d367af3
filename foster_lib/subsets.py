"""Stochastic item subsets: synthetic and real losses without the whole catalogue.

Each iteration draws N of the |V| items. Only these, the anchors of the synthetic positions and
the items of the drawn real windows are embedded, so a step costs the same for any |V|.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from foster_lib.batches import Batch, soft_cross_entropy
from foster_lib.sasrec import SASRec

NEVER = -1e4
"""A logit of no probability; unlike -inf it may be multiplied by a target of 0."""


@dataclass(frozen=True)
class Subset:
    """The items of one iteration.

    Attributes
    ----------
    items : (N,) int64, sorted
    n_items : |V|, size of the catalogue that they were drawn from
    log_weight : (N,) or float
        log of how many items of the catalogue each stands for; log |V| / N where all are alike.
    """

    items: Tensor
    n_items: int
    log_weight: Tensor | float

    @classmethod
    def uniform(cls, items: Tensor, n_items: int) -> Subset:
        """Items that were drawn with equal probability."""
        return cls(items, n_items, -float(np.log(len(items) / n_items)))

    def to(self, device: str) -> Subset:
        weight = self.log_weight
        return replace(
            self, items=self.items.to(device), log_weight=weight.to(device) if isinstance(weight, Tensor) else weight
        )

    def including(self, wanted: Tensor) -> Subset:
        """The subset with the items `wanted` besides, which stand for themselves; the other drawn ones
        stand for all that is left, so that a weighted sum estimates the catalogue's without bias.
        """
        if isinstance(self.log_weight, Tensor):  # what was wanted before still is
            wanted = torch.cat([self.items[self.log_weight == 0], wanted.flatten()])
        wanted = torch.unique(wanted)
        items = torch.unique(torch.cat([self.items, wanted]))
        drawn = ~torch.isin(items, wanted)
        weight = (self.n_items - len(wanted)) / max(1, int(drawn.sum()))
        return Subset(items, self.n_items, torch.where(drawn, float(np.log(max(weight, 1.0))), 0.0))

    def positions(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Where `anchors` stand in `items`, and which of them do: two tensors of their shape."""
        place = torch.searchsorted(self.items, anchors).clamp(max=len(self.items) - 1)
        return place, self.items[place] == anchors


def sample_subset(n_items: int, size: int, generator: np.random.Generator) -> Subset:
    """Draw N of |V| items uniformly without replacement; N ≥ |V| gives all of them."""
    size = min(size, n_items)
    items = np.arange(n_items) if size == n_items else np.sort(generator.choice(n_items, size, replace=False))
    return Subset.uniform(torch.from_numpy(items), n_items)


def subset_inputs(
    queries: Tensor, bonus: Tensor, anchors: Tensor, subset: Subset, f_subset: Tensor, f_anchor: Tensor
) -> tuple[Tensor, Tensor]:
    """Input probabilities of S over the subset and each position's own anchor.

    An anchor always stays available, whether or not it was drawn: without it, inputs would drift
    to whatever neighbours the subset happens to hold. The other items' weights are multiplied by
    |V| / N (or by their own, `Subset.including`), so that the sum over the subset estimates the sum
    over the catalogue without bias; a subset of all items gives exactly the full softmax.

    Parameters
    ----------
    queries : (n, L, k), bonus : (n, L), anchors : (n, L)
    f_subset : (N, k), f_anchor : (n, L, k)

    Returns
    -------
    (n, L, N) and (n, L)
        Probabilities of the subset's items other than the anchor, and of the anchor.
    """
    place, inside = subset.positions(anchors)
    others = queries @ f_subset.T + subset.log_weight
    hide = torch.zeros_like(others).scatter_(-1, place[..., None], torch.where(inside, -torch.inf, 0.0)[..., None])
    own = (queries * f_anchor).sum(-1) + bonus
    p = torch.cat([others + hide, own[..., None]], -1).softmax(-1)
    return p[..., :-1], p[..., -1]


@dataclass(frozen=True)
class Likeness:
    """How alike some items of a subset are to the others, and how much a student heeds it.

    rows : (M,) int64, places in the subset; y : (M, N) probabilities over it, 0 at the row's own item;
    scale : s of their softmax; weight : of the cross-entropy beside that of the sequences;
    successors : (M, N) probabilities of what follows each row's item on its own, if that is known
    """

    rows: Tensor
    y: Tensor
    scale: Tensor
    weight: float
    successors: Tensor | None = None

    def to(self, device: str | torch.device) -> Likeness:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class SyntheticBatch:
    """S seen through one item subset.

    Attributes
    ----------
    p : (n, L, N) and own : (n, L)
        Input probabilities of the subset's items and of each position's anchor; p None: the
        anchors alone are the inputs.
    y : (T, N) target probabilities, or (T,) places of the targets in the subset
    likeness : what else `synthetic_loss` contains, if anything
    """

    subset: Subset
    anchors: Tensor
    mask: Tensor
    p: Tensor | None
    own: Tensor
    y: Tensor
    likeness: Likeness | None = None

    def to(self, device: str | torch.device) -> SyntheticBatch:
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if value is not None})

    def detached(self) -> SyntheticBatch:
        return replace(self, p=self.p.detach(), own=self.own.detach(), y=self.y.detach())


class FeatureBank:
    """A model's features of the items that a step touches, each embedded once."""

    def __init__(self, model: SASRec, *items: Tensor):
        self.items = torch.unique(torch.cat([part.flatten() for part in items]))
        self.features = model.features(self.items)

    def __call__(self, items: Tensor) -> Tensor:
        """Features of `items`, (…) to (…, d); all of them must have been named before."""
        return self.features[torch.searchsorted(self.items, items)]


def synthetic_loss(model: SASRec, batch: SyntheticBatch, bank: FeatureBank | None = None) -> Tensor:
    """L_syn: cross-entropy of the soft targets over the subset, inputs being mixtures; and those of the batch's
    likeness and successors times their weight.

    bank : features of `model` where the caller has them, of the subset and the anchors at least.
    """
    bank = bank or FeatureBank(model, batch.subset.items, batch.anchors)
    features = bank(batch.subset.items)
    mixed = batch.own[..., None] * bank(batch.anchors)
    if batch.p is not None:
        mixed = mixed + batch.p @ features
    hidden = model.transform(mixed)[batch.mask]
    loss = soft_cross_entropy(logits(model, hidden, features, batch.subset), batch.y)
    if (known := batch.likeness) is None:
        return loss
    of_items = likeness_loss(features, batch.subset, known)
    if known.successors is not None:
        alone = model.transform(features[known.rows, None])[:, 0]
        of_items = of_items + soft_cross_entropy(logits(model, alone, features, batch.subset), known.successors)
    return loss + known.weight * of_items


def likeness_scores(features: Tensor, rows: Tensor, scale: Tensor, subset: Subset) -> Tensor:
    """(M, N) logits s f_i · f_j of items i at `rows` and j ≠ i, from features (N, d) of the subset's items."""
    scores = scale * (features[rows] @ features.T) + subset.log_weight
    return scores.scatter(1, rows[:, None], NEVER)


def likeness_loss(features: Tensor, subset: Subset, likeness: Likeness) -> Tensor:
    """Cross-entropy from the given likeness of items to that of a model's `features` (N, d) of the subset's items."""
    return soft_cross_entropy(likeness_scores(features, likeness.rows, likeness.scale, subset), likeness.y)


def logits(model: SASRec, hidden: Tensor, features: Tensor, subset: Subset) -> Tensor:
    """Scores whose softmax over the subset estimates the one over the catalogue."""
    scores = model.scores(hidden, features)  # the softmax does not see a weight that all items share
    return scores + subset.log_weight if isinstance(subset.log_weight, Tensor) else scores


def real_loss(
    model: SASRec, batch: Batch, subset: Subset, teacher: SASRec | None, bank: FeatureBank | None = None
) -> Tensor:
    """L_real on real windows: cross-entropy from the full-data teacher to `model` over the subset, or,
    without a teacher, of the real next items, all of which the subset must include.

    The windows' own items are embedded beside the subset; their number is bounded by the batch.
    """
    bank = bank or FeatureBank(model, subset.items, batch.inputs)
    hidden = model.transform(bank(batch.inputs))[batch.mask]
    if teacher is None:
        return soft_cross_entropy(logits(model, hidden, bank(subset.items), subset), subset.positions(batch.targets)[0])
    with torch.no_grad():
        known = FeatureBank(teacher, subset.items, batch.inputs)
        seen = teacher.transform(known(batch.inputs))[batch.mask]
        targets = logits(teacher, seen, known(subset.items), subset).softmax(-1)
    return soft_cross_entropy(logits(model, hidden, bank(subset.items), subset), targets)
