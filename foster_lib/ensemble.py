"""Several full-data models as one teacher: the geometric mean of their probabilities.

Models that differ by their seed err in different places; their mean is right more often than each of
them, and its labels teach students more. It is a teacher, never the reference: full data in the tables is
one model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foster_lib.sasrec import SASRec


class Ensemble(nn.Module):
    """M recommenders, seen as one of M times their width.

    Item features are theirs side by side, f = [f_1 … f_M] / √M, again of length 1; with the mean scale s of theirs
    and hidden states h = [s_1 h_1 … s_M h_M] / (√M s), its scores s h · f are the mean of theirs, so its
    probabilities are their geometric mean. Where a function reads a teacher, both will do.

    Parameters
    ----------
    models : list of SASRec
        Of equal shape.
    """

    def __init__(self, models: list[SASRec]):
        super().__init__()
        self.models, self.settings = nn.ModuleList(models), models[0].settings
        scales = torch.stack([model.log_scale.exp() for model in models])
        self.register_buffer("log_scale", scales.mean().log())
        self.register_buffer("shares", scales / scales.mean() / len(models) ** 0.5)
        self.eval().requires_grad_(False)

    def adapter_weights(self) -> dict[str, Tensor]:
        """Those of the models, stacked: `adapt` takes them as it takes one model's."""
        weights = [model.adapter_weights() for model in self.models]
        return {name: torch.stack([each[name] for each in weights]) for name in weights[0]}

    def features(self, items: Tensor | None = None) -> Tensor:
        """Unit-length features of `items` (N,), or of the whole catalogue: (N, M d)."""
        return torch.cat([model.features(items) for model in self.models], -1) / len(self.models) ** 0.5

    def forward(self, inputs: Tensor, features: Tensor) -> Tensor:
        """Hidden states (B, L, M d) of items (B, L) whose `features` (N, M d) are given."""
        return self.transform(features[inputs])

    def transform(self, items: Tensor) -> Tensor:
        """Hidden states of sequences of item features (B, L, M d), of the same shape."""
        parts = (items * len(self.models) ** 0.5).chunk(len(self.models), -1)
        hidden = [model.transform(part) for model, part in zip(self.models, parts)]
        return torch.cat([share * part for share, part in zip(self.shares, hidden)], -1)

    def scores(self, hidden: Tensor, features: Tensor) -> Tensor:
        """Mean logits of the models: (..., M d) and (N, M d) to (..., N)."""
        return (self.log_scale.exp() * hidden) @ features.T
