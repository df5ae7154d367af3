"""The optimiser of a training: AdamW, or Muon for the weight matrices and AdamW for all else."""

from __future__ import annotations

import torch
from torch import nn

from foster_lib.sasrec import rate_groups

MATRICES = ("adapter.", "blocks.")
"""Where Muon's matrices are: position vectors are a table, and a tuned encoder has learnt with Adam before."""


class MuonAdamW:
    """Two optimisers as one. Each of their `param_groups` keeps, as `full_rate`, the rate that a schedule multiplies.

    Muon (Jordan et al., 2024) steps along the momentum with all its singular values set to one: a weight matrix
    learns in all directions at the same speed, those that the gradient hardly shows included. Here that is the
    adapter's map from texts to items, which takes Adam many more steps. Steps are scaled to the length that Adam's
    have (Liu et al., 2025, arXiv 2502.16982), so that one learning rate serves both, up to a factor.

    Parameters
    ----------
    matrices, others : parameter groups
        With `lr`, `full_rate` and `weight_decay`.
    momentum : float
        Of Muon.
    """

    def __init__(self, matrices: list[dict], others: list[dict], momentum: float):
        muon = torch.optim.Muon(matrices, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self.parts = [muon, torch.optim.AdamW(others)]
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self) -> None:
        for part in self.parts:
            part.step()


def build_optimizer(
    model: nn.Module,
    learning_rate: float,
    adapter_rate: float,
    weight_decay: float,
    muon_rate: float,
    muon_momentum: float = 0.95,
) -> torch.optim.AdamW | MuonAdamW:
    """For the trained parameters of `model`; the rates are those of `TrainSettings`. Vectors have no weight decay."""
    groups = [
        {**group, "params": [p for p in group["params"] if (p.dim() > 1) == matrices], "weight_decay": decay}
        for group in rate_groups(model, learning_rate, adapter_rate)
        for matrices, decay in ((True, weight_decay), (False, 0.0))
    ]
    if not muon_rate:
        return torch.optim.AdamW(groups)
    chosen = {p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith(MATRICES)}
    matrices = [{**group, "params": [p for p in group["params"] if p in chosen]} for group in groups]
    for group in matrices:
        group["lr"] = group["full_rate"] = group["full_rate"] * muon_rate
    others = [{**group, "params": [p for p in group["params"] if p not in chosen]} for group in groups]
    matrices, others = ([group for group in part if group["params"]] for part in (matrices, others))
    return MuonAdamW(matrices, others, muon_momentum)
