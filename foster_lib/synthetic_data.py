"""Synthetic sequences as training data of a student."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from foster_lib.sasrec import SASRec
from foster_lib.subsets import Subset, SyntheticBatch, sample_subset, synthetic_loss
from foster_lib.synthetic import SyntheticSequences


class SyntheticData:
    """One batch of the sequences: an epoch is a step, on a reading drawn at random.

    Parameters
    ----------
    sequences : SyntheticSequences
    embeddings : (|V|, width of the encoder)
        Text embeddings of the catalogue.
    size : int
        Items drawn anew for each step; 0: the whole catalogue.
    likeness : float
        Weight of the `SyntheticSequences.likeness` of items, if the sequences say which are alike.
    count, length : int
        Windows of `length` positions that a step reads, drawn anew; 0, or no fewer than there are: all sequences.
        Those that are not `POSITION_BY_POSITION` are always read whole.
    """

    def __init__(
        self,
        sequences: SyntheticSequences,
        embeddings: Tensor,
        size: int = 0,
        likeness: float = 0.0,
        count: int = 0,
        length: int = 0,
    ):
        self.sequences, self.n_items = sequences, len(embeddings)
        self.likeness = 0.0 if sequences.alike is None else likeness
        self.f = f = None if sequences.labels is None and sequences.queries is None else sequences.features(embeddings)
        self.size = size if 0 < size < self.n_items else self.n_items
        self.whole = Subset.uniform(torch.arange(self.n_items, device=sequences.items.device), self.n_items)
        self.readings = [sequences.reading(number) for number in range(sequences.readings)]
        self.count = 0
        if count and sequences.POSITION_BY_POSITION:
            windows = [in_windows(reading, length) for reading in self.readings]
            if count < min(len(reading) for reading in windows):
                self.readings, self.count = windows, count
        if self.count:
            self.wanted = [wanted_by_position(reading, f) for reading in self.readings]
        elif self.size < self.n_items:
            self.wanted = [reading.wanted(f) for reading in self.readings]
        else:
            self.everything = [reading.batch(self.whole, f) for reading in self.readings]

    def draw(self, generator: np.random.Generator) -> SyntheticBatch:
        """What one step reads of S, over the items of that step."""
        number = int(generator.integers(len(self.readings))) if len(self.readings) > 1 else 0
        if not self.count and self.size == self.n_items:
            batch = self.everything[number]
        else:
            part, wanted = self._part(number, generator)
            subset = self.whole
            if self.size < self.n_items:
                drawn = sample_subset(self.n_items, self.size, generator)
                subset = drawn.to(self.sequences.items.device).including(wanted)
            batch = part.batch(subset, self.f)
        if self.likeness:
            likeness = self.sequences.likeness(batch.subset, self.f, generator, self.likeness)
            batch = replace(batch, likeness=likeness)
        return batch

    def _part(self, number: int, generator: np.random.Generator) -> tuple[SyntheticSequences, Tensor]:
        """What a step reads of a reading, and the items that its subset has to hold for it."""
        reading, wanted = self.readings[number], self.wanted[number]
        if not self.count:
            return reading, wanted
        rows = generator.choice(len(reading), self.count, replace=False)
        rows = torch.from_numpy(rows).to(reading.items.device)
        part = replace(reading, **{name: tensor[rows] for name, tensor in reading.positional().items()})
        return part, wanted[rows][part.mask]

    def batches(self, generator: np.random.Generator) -> Iterable[SyntheticBatch]:
        yield self.draw(generator)

    def loss(self, model: SASRec, batch: SyntheticBatch) -> Tensor:
        return synthetic_loss(model, batch)


def in_windows(reading: SyntheticSequences, length: int) -> SyntheticSequences:
    """Each window of `length` positions that has a target as a sequence of its own: (windows, length)."""
    if reading.items.shape[1] <= length:
        return reading
    tensors = {name: tensor.reshape(-1, length, *tensor.shape[2:]) for name, tensor in reading.positional().items()}
    filled = tensors["mask"].any(1)
    return replace(reading, **{name: tensor[filled] for name, tensor in tensors.items()})


def wanted_by_position(reading: SyntheticSequences, f: Tensor | None) -> Tensor:
    """`SyntheticSequences.probable` items at their places: (n, L, …), 0 where there is no target."""
    probable = reading.probable(f)
    places = torch.zeros(*reading.mask.shape, probable.shape[1], dtype=torch.long, device=probable.device)
    places[reading.mask] = probable
    return places
