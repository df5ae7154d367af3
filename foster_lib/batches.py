"""What one gradient step on real sequences reads, and the loss of a prediction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from foster_lib.subsets import Subset


@dataclass(frozen=True)
class Batch:
    """Real sequences, left-aligned.

    Attributes
    ----------
    inputs : (B, L) int64 item indices
    targets : (T,) int64 item indices
    mask : (B, L) bool, the T positions that have a target
    subset : items that the softmax runs over, all targets among them; None: the whole catalogue
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor
    subset: Subset | None = None

    def to(self, device: str | torch.device) -> Batch:
        moved = {name: getattr(self, name).to(device) for name in ("inputs", "targets", "mask")}
        return replace(self, **moved, subset=self.subset and self.subset.to(device))


def make_batch(pieces: list[np.ndarray]) -> Batch:
    """Left-align windows of items: inputs are all but the last item, targets all but the first."""
    longest = max(map(len, pieces)) - 1
    inputs = torch.zeros(len(pieces), longest, dtype=torch.long)
    mask = torch.zeros(len(pieces), longest, dtype=torch.bool)
    for row, piece in enumerate(pieces):
        inputs[row, : len(piece) - 1] = torch.from_numpy(piece[:-1])
        mask[row, : len(piece) - 1] = True
    return Batch(inputs, torch.from_numpy(np.concatenate([piece[1:] for piece in pieces])), mask)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """−Σ_j y_j log softmax(logits)_j, averaged; `targets` are indices (T,) or probabilities (T, N)."""
    return F.cross_entropy(logits.float(), targets)
