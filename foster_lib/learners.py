"""A recommender that is trained a few steps at a time: the inner and outer models of distillation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from foster_lib.sasrec import Dropout, SASRec, rate_groups


class Learner:
    """A recommender with its Adam.

    Parameters
    ----------
    model : SASRec
    learning_rate : float
    warmup : int
        Steps over which the learning rate rises after each reset.
    adapter_rate : float
        Learning rate of the adapter, as a multiple.
    """

    def __init__(self, model: SASRec, learning_rate: float, warmup: int = 30, adapter_rate: float = 1.0):
        self.model, self.learning_rate, self.warmup, self.adapter_rate = model, learning_rate, warmup, adapter_rate
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.forget()

    def reset(self, checkpoint: dict[str, Tensor]) -> None:
        """Take the checkpoint's weights, bit for bit, and forget the optimiser's state."""
        self.model.load_state_dict(checkpoint)
        self.forget()

    def forget(self) -> None:
        self.optimizer = torch.optim.Adam(rate_groups(self.model, self.learning_rate, self.adapter_rate))
        self.steps = 0

    def seed_dropout(self, seed: int) -> None:
        """Let the next forward pass draw the dropout masks of `seed`: equal seeds, equal masks."""
        for module in self.model.modules():
            if isinstance(module, Dropout):
                module.generator.manual_seed(seed)  # one generator is shared by all

    def step(self, loss_of: Callable[[SASRec], Tensor]) -> float:
        """One step of Adam, with dropout, on `loss_of(model)`; returns the loss."""
        self.model.train()
        loss = loss_of(self.model)
        self.descend(torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True))
        self.model.eval()
        return float(loss.detach())

    def descend(self, gradients: Sequence[Tensor]) -> float:
        """One step of Adam along `gradients`, clipped to norm 1; returns the factor that clipped them."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_rate"] * min(1.0, (self.steps + 1) / self.warmup)
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.grad = gradient.clone()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, 1.0))
        self.optimizer.step()
        self.steps += 1
        return min(1.0, 1.0 / (norm + 1e-6))

    def preconditioner(self) -> list[Tensor]:
        """P of the last step: Adam moved the weights by −P m, m the running mean of the gradients."""
        found = {}
        for group in self.optimizer.param_groups:
            (beta1, beta2), rate = group["betas"], group["lr"]
            for p in group["params"]:
                second = self.optimizer.state[p]["exp_avg_sq"] / (1 - beta2**self.steps)
                found[p] = rate / (1 - beta1**self.steps) / (second.sqrt() + group["eps"])
        return [found[p] for p in self.parameters]
