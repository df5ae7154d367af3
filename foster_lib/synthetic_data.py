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
    """One batch of all sequences: an epoch is a step, on a reading drawn at random.

    Parameters
    ----------
    sequences : SyntheticSequences
    embeddings : (|V|, width of the encoder)
        Text embeddings of the catalogue.
    size : int
        Items drawn anew for each step; 0: the whole catalogue.
    likeness : float
        Weight of the `SyntheticSequences.likeness` of items, if the sequences say which are alike.
    """

    def __init__(self, sequences: SyntheticSequences, embeddings: Tensor, size: int = 0, likeness: float = 0.0):
        self.sequences, self.n_items = sequences, len(embeddings)
        self.likeness = 0.0 if sequences.alike is None else likeness
        self.f = f = None if sequences.labels is None and sequences.queries is None else sequences.features(embeddings)
        self.size = size if 0 < size < self.n_items else self.n_items
        self.readings = [sequences.reading(number) for number in range(sequences.readings)]
        if self.size < self.n_items:
            self.wanted = [reading.wanted(f) for reading in self.readings]
        else:
            whole = Subset.uniform(torch.arange(self.n_items, device=sequences.items.device), self.n_items)
            self.everything = [reading.batch(whole, f) for reading in self.readings]

    def draw(self, generator: np.random.Generator) -> SyntheticBatch:
        """One reading of S over the items of one step."""
        number = int(generator.integers(len(self.readings))) if len(self.readings) > 1 else 0
        if self.size < self.n_items:
            subset = sample_subset(self.n_items, self.size, generator).to(self.sequences.items.device)
            batch = self.readings[number].batch(subset.including(self.wanted[number]), self.f)
        else:
            batch = self.everything[number]
        if self.likeness:
            likeness = self.sequences.likeness(batch.subset, self.f, generator, self.likeness)
            batch = replace(batch, likeness=likeness)
        return batch

    def batches(self, generator: np.random.Generator) -> Iterable[SyntheticBatch]:
        yield self.draw(generator)

    def loss(self, model: SASRec, batch: SyntheticBatch) -> Tensor:
        return synthetic_loss(model, batch)
