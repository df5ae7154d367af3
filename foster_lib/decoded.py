"""FOSTER's sequences decoded: of each mixture and each label only the most probable items count.

What the export formats hold (`export`) is such a decoded form: lists of items, in the end one real item a position. How
much of what S teaches survives that is a row of the ablation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foster_lib.errors import FosterError
from foster_lib.foster import foster
from foster_lib.subsets import Subset, SyntheticBatch
from foster_lib.synthetic import SyntheticSequences
from foster_lib.task import Task


@dataclass(frozen=True)
class DecodedSequences(SyntheticSequences):
    """`SyntheticSequences` of whose probabilities only the largest count, divided by their sum.

    Attributes
    ----------
    kept : (2,) int64, optional
        How many items of an input, and of a target, keep their probability; 0: all.
    """

    kept: Tensor | None = None

    @property
    def counts(self) -> tuple[int, int]:
        """Kept items of an input and of a target; 0: all, or real items that need no such choice."""
        inputs, targets = (0, 0) if self.kept is None else self.kept.tolist()
        return inputs if self.queries is not None else 0, targets if self.labels is not None else 0

    def input_probabilities(self, embeddings: Tensor) -> Tensor:
        return largest(super().input_probabilities(embeddings), self.counts[0])

    def target_probabilities(self, embeddings: Tensor) -> Tensor:
        return largest(super().target_probabilities(embeddings), self.counts[1])

    @torch.no_grad()
    def probable(self, f: Tensor | None) -> Tensor:
        """All that is kept is wanted in every subset; besides what other sequences want."""
        inputs, targets = self.counts
        wanted = [super().probable(f)]
        if inputs:
            logits = self.queries @ f.T
            logits = logits.scatter_add(-1, self.items[..., None], self.bonus[..., None])[self.mask]
            wanted.append(logits.topk(min(inputs, len(f)), dim=-1).indices)
        if targets:
            wanted.append((self.labels[self.mask] @ f.T).topk(min(targets, len(f)), dim=-1).indices)
        return torch.cat(wanted, -1)

    def batch(self, subset: Subset, f: Tensor | None) -> SyntheticBatch:
        batch, (inputs, targets) = super().batch(subset, f), self.counts
        # What is kept stands for itself, and is the most probable of the subset as it is of the catalogue.
        weight = torch.as_tensor(subset.log_weight).exp()
        if inputs:
            p = largest(torch.cat([batch.p / weight, batch.own[..., None]], -1), inputs)
            batch = replace(batch, p=p[..., :-1], own=p[..., -1])
        if targets:
            batch = replace(batch, y=largest(batch.y / weight, targets))
        return batch


def largest(probabilities: Tensor, count: int) -> Tensor:
    """The `count` largest of the last dimension divided by their sum, 0 elsewhere; 0: all as they are."""
    if not count:
        return probabilities
    values, places = probabilities.topk(min(count, probabilities.shape[-1]), dim=-1)
    return torch.zeros_like(probabilities).scatter(-1, places, values / values.sum(-1, keepdim=True))


def foster_decoded(
    task: Task,
    sequences: int,
    seed: int,
    progress: str = "",
    kept_inputs: int = 1,
    kept_targets: int = 1,
    hard: bool = False,
    **parameters,
) -> DecodedSequences:
    """FOSTER, decoded to `kept_inputs` items a position and `kept_targets` items a label (0: all).

    hard : decoded to real sequences: the most probable item, and the most probable next one as a hard target, without
        labels, likeness or other orders of reading; a student learns them as it does real histories.
    parameters : those of `FosterSettings`
    """
    if min(kept_inputs, kept_targets) < 0:
        raise FosterError(f"kept_inputs and kept_targets are 0 for all, not {kept_inputs} and {kept_targets}.")
    learned = foster(task, sequences, seed, progress, **parameters)
    if hard:
        embeddings = task.embeddings.cpu()
        p, y = learned.input_probabilities(embeddings), learned.target_probabilities(embeddings)
        return DecodedSequences(p.argmax(-1) * learned.mask, learned.mask, y.argmax(-1) * learned.mask)
    return DecodedSequences(**vars(learned), kept=torch.tensor([kept_inputs, kept_targets]))
