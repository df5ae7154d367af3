"""FOSTER in the form that the paper describes: tied sequences, without a teacher.

S holds no labels. Every position of n sequences of R = L + 1 is one mixture of items,

    p_t(j) = softmax_j(z_t · f(e_j) + β_t [j is the anchor of t]),

and the target at a position is the mixture of the next one, y_t = p_{t+1}: the same tensors are read
as input and as target. L_real is the cross-entropy of real next items; nothing is ever trained on all data.

Sequences of nearly real items (β large) teach a student hardly more than real ones do. So each begins with a real item,
and every further mixture is what a linear model expects there after the real items before it (`linear_labels`).
From there S also has what follows single items; without `successors` it is the tied mixtures alone, as in the paper.
The rest is `foster.distill`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foster_lib.coresets import ALIKE
from foster_lib.errors import FosterError, check_known
from foster_lib.foster import FosterSettings, distill
from foster_lib.free import FreeSettings, FreeSynthesizer, FreshTask
from foster_lib.linear_labels import linear_start
from foster_lib.selection import cluster_medoids
from foster_lib.subsets import Subset, SyntheticBatch, sample_subset, subset_inputs
from foster_lib.synthetic import SyntheticSequences
from foster_lib.task import Task


@dataclass(frozen=True)
class TiedSequences(SyntheticSequences):
    """`SyntheticSequences` whose target at a position is the mixture of the next one.

    Behind the last position that has a target stands one more mixture, which is no input:

    end_queries : (n, k), end_bonus : (n,)
        Its z and β. `labels`, the z of each position's target, follows from these and `queries`.
    """

    POSITION_BY_POSITION: ClassVar[bool] = False

    end_queries: Tensor | None = None
    end_bonus: Tensor | None = None

    def __post_init__(self) -> None:
        if any(tensor is None for tensor in (self.queries, self.bonus, self.end_queries, self.end_bonus)):
            raise FosterError(
                "these sequences are not tied: nothing stands behind their last position. "
                "Read them with the method that made them, or distil them with foster-tied."
            )
        object.__setattr__(self, "labels", self.next_of(self.queries, self.end_queries))

    def next_of(self, values: Tensor, end: Tensor) -> Tensor:
        """What follows each position: (n, L, …) and (n, …) to (n, L, …)."""
        row = torch.arange(len(self.mask), device=values.device)
        following = values.roll(-1, dims=1)
        return following.index_put((row, self.mask.sum(1) - 1), end)

    def target_probabilities(self, embeddings: Tensor) -> Tensor:
        """y over the whole catalogue: (n, L, |V|)."""
        logits = self.labels @ self.features(embeddings).T
        bonus = self.next_of(self.bonus, self.end_bonus)
        return logits.scatter_add(-1, self.targets[..., None], bonus[..., None]).softmax(-1)

    def wanted(self, f: Tensor | None = None) -> Tensor:
        """All anchors, as input and as target."""
        return torch.unique(torch.cat([self.items.flatten(), self.targets[self.mask]]))

    def batch(self, subset: Subset, f: Tensor) -> SyntheticBatch:
        """The sequences seen through an item subset that holds the `wanted` items; differentiable."""
        p, own = subset_inputs(self.queries, self.bonus, self.items, subset, f[subset.items], f[self.items])
        bonus = self.next_of(self.bonus, self.end_bonus)
        y, own_y = subset_inputs(self.labels, bonus, self.targets, subset, f[subset.items], f[self.targets])
        place, _ = subset.positions(self.targets)
        y = y.scatter_add(-1, place[..., None], own_y[..., None])
        return SyntheticBatch(subset, self.items, self.mask, p, own, y[self.mask])

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name but `labels`, which follow from the others."""
        return {name: tensor for name, tensor in super().tensors().items() if name != "labels"}


@dataclass(frozen=True)
class TiedSettings(FreeSettings):
    """start : of the mixtures: what a "linear" model expects, or "real" items, nearly pure"""

    start: str = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_known(self.start, STARTS, "start of tied sequences:")


def real_start(task: Task, sequences: int, settings: TiedSettings, seed: int) -> TiedSequences:
    """Real sequences as nearly pure mixtures: cluster medoids by text, f of the untrained model."""
    chosen = cluster_medoids(task, sequences, seed)
    model = task.new_model(seed)
    with torch.no_grad():
        f = model.features().cpu()
    end = chosen.targets[torch.arange(len(chosen)), chosen.mask.sum(1) - 1]
    return TiedSequences(
        chosen.items,
        chosen.mask,
        chosen.targets,
        adapter=model.adapter_weights(),
        queries=settings.sharpness * f[chosen.items],
        bonus=torch.full(chosen.items.shape, settings.bonus),
        end_queries=settings.sharpness * f[end],
        end_bonus=torch.full((len(chosen),), settings.bonus),
    )


def expected_start(task: Task, sequences: int, settings: TiedSettings, seed: int) -> TiedSequences:
    """A real item, then what the linear model expects at each position of a real sequence."""
    labelled = linear_start(replace(task, readings=1), sequences, seed, settings, window=task.sequence_length)
    f = labelled.features(task.embeddings).cpu()
    z = torch.cat([ALIKE * f[labelled.items[:, :1]], labelled.labels], 1)
    bonus = torch.zeros(z.shape[:2])
    bonus[:, 0] = settings.bonus
    kept = {name: getattr(labelled, name) for name in ("items", "mask", "targets", "adapter", "alike", "successors")}
    return TiedSequences(**kept, queries=z[:, :-1], bonus=bonus[:, :-1], end_queries=z[:, -1], end_bonus=bonus[:, -1])


STARTS = {"linear": expected_start, "real": real_start}


class TiedSynthesizer(FreeSynthesizer):
    """The learnable z and β of all positions; every anchor stays in every item subset, as input and as target."""

    def __init__(self, start: TiedSequences, embeddings: Tensor, settings: FosterSettings):
        self.start, self.settings = start, settings
        self.f = start.features(embeddings)
        self.text = F.normalize(embeddings, dim=-1)
        self.z = [start.queries.clone().requires_grad_(), start.end_queries.clone().requires_grad_()]
        self.beta = [start.bonus.clone().requires_grad_(), start.end_bonus.clone().requires_grad_()]
        self.optimizer = torch.optim.Adam(self.tensors, lr=settings.input_learning_rate, betas=(0.8, 0.99))
        self.rates = [settings.input_learning_rate]

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.z, *self.beta]

    def draw(self, generator: np.random.Generator) -> Subset:
        drawn = sample_subset(len(self.f), self.settings.subset, generator).to(self.f.device)
        return drawn.including(self.start.wanted())

    def batch(self, subset: Subset, generator: np.random.Generator | None = None) -> SyntheticBatch:
        now = self.learned(self.z, self.beta)
        batch = now.batch(subset, self.f)
        if generator is None or not self.settings.inner_likeness or now.alike is None:
            return batch
        return replace(batch, likeness=now.likeness(subset, self.f, generator, self.settings.inner_likeness))

    def learned(self, z: list[Tensor], beta: list[Tensor]) -> TiedSequences:
        return replace(self.start, queries=z[0], end_queries=z[1], bonus=beta[0], end_bonus=beta[1])

    def result(self) -> TiedSequences:
        return self.learned(*([tensor.detach() for tensor in pair] for pair in (self.z, self.beta))).to("cpu")


def foster_tied(task: Task, sequences: int, seed: int, progress: str = "", **parameters) -> TiedSequences:
    """The method as Table 2 calls it; parameters are those of `TiedSettings`."""
    settings = TiedSettings(**parameters)
    start, own = STARTS[settings.start](task, sequences, settings, seed), FreshTask.of(task)
    return distill(own, start, settings, seed=seed, progress=progress, synthesizer=TiedSynthesizer)[0]
