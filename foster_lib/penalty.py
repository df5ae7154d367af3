"""The hypergradient as a difference between two models: the penalty form of the bi-level problem.

min_S L_real(φ*(S)),  φ*(S) = argmin_φ L_syn(φ; S)  becomes the single-level problem
(value-function form; Ye et al., 2022; Kwon et al., 2023)

    min_{θ, S} J(θ, S) = L_real(θ) + λ [L_syn(θ; S) − min_φ L_syn(φ; S)],

whose gradients are all of first order:

    θ on  L_real(θ) + λ L_syn(θ; S),     φ on  L_syn(φ; S),
    S on  ∂J/∂S = λ [∂L_syn(θ; S)/∂S − ∂L_syn(φ; S)/∂S].

Where the difference vanishes, real data have nothing to add to what S teaches, or S does not show it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foster_lib.learners import Learner
from foster_lib.sasrec import SASRec
from foster_lib.subsets import FeatureBank, SyntheticBatch, real_loss, synthetic_loss
from foster_lib.task import Task
from foster_lib.training import Batch

if TYPE_CHECKING:
    from foster_lib.foster import FosterSettings, Synthesizer


class Pair:
    """φ and θ, which start from the same checkpoint and part only through the real data."""

    def __init__(self, task: Task, settings: FosterSettings, seed: int):
        self.settings = settings
        task = replace(task, model_settings=replace(task.model_settings, dropout=settings.dropout))
        self.phi, self.theta = (
            Learner(
                task.new_model(seed), settings.inner_learning_rate, settings.inner_warmup, settings.inner_adapter_rate
            )
            for _ in range(2)
        )
        self.served, self.steps, self.seed = 0, 0, seed

    def reset(self, checkpoint: dict[str, Tensor]) -> None:
        """Trajectory-anchored reset of both models; their optimisers forget."""
        self.phi.reset(checkpoint)
        self.theta.reset(checkpoint)
        self.served = 0

    def couple_dropout(self) -> None:
        """Let θ draw the dropout masks on S that φ draws: then only the real data part them."""
        self.steps += 1
        for learner in (self.phi, self.theta):
            learner.seed_dropout(self.seed * 2**20 + self.steps)

    def fit(
        self, batch: SyntheticBatch, draw_windows: Callable[[], Batch], teacher: SASRec | None
    ) -> tuple[float, float]:
        """W steps each, S held fixed: φ on L_syn, θ on (L_real + λ L_syn) / (1 + λ).

        Parameters
        ----------
        batch : SyntheticBatch
            Detached from S.
        draw_windows : callable
            Draws real windows, anew for each step of θ.
        teacher : SASRec or None
            Labels them in L_real; without one their real next items are the targets.

        Returns
        -------
        L_syn(φ; S) and L_real(θ), last values
        """
        weight, outer = self.settings.penalty, 0.0

        def joint_loss(model: SASRec, windows: Batch) -> Tensor:
            nonlocal outer
            subset = self.settings.judged(batch.subset, windows, teacher)
            bank = FeatureBank(model, subset.items, batch.anchors, windows.inputs)
            synthetic = synthetic_loss(model, batch, bank)  # first: with the dropout masks that φ has drawn
            real = real_loss(model, windows, subset, teacher, bank)
            outer = float(real.detach())
            return (real + weight * synthetic) / (1 + weight)

        for _ in range(self.settings.inner_steps):
            self.couple_dropout()
            inner = self.phi.step(lambda model: synthetic_loss(model, batch))
            windows = draw_windows()
            self.theta.step(lambda model, windows=windows: joint_loss(model, windows))
        return inner, outer

    def gradient(
        self, synthetic: Synthesizer, batch: SyntheticBatch, draw_windows: Callable[[], Batch], teacher: SASRec | None
    ) -> tuple[list[Tensor], float, float]:
        """W steps of both models, then the gradient on S: as `adjoint.Rollout.gradient`, its length as it is."""
        inner, outer = self.fit(batch.detached(), draw_windows, teacher)
        return gap_gradient(synthetic, batch, self.theta.model, self.phi.model)[0], inner, outer


def gap_gradient(
    synthetic: Synthesizer, batch: SyntheticBatch, theta: SASRec, phi: SASRec
) -> tuple[list[Tensor], float]:
    """Gradient of L_syn(θ; S) − L_syn(φ; S) with respect to `synthetic.tensors`, and the difference itself.

    The penalty λ is left out here: Adam, which follows, is indifferent to a common factor.
    """
    gap = synthetic_loss(theta, batch) - synthetic_loss(phi, batch)
    gradients = torch.autograd.grad(gap, synthetic.tensors, retain_graph=True)
    return list(gradients), float(gap.detach())
