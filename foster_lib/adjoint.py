"""The hypergradient by looking back over W steps of training, with first-order gradients alone.

A student φ trains on S for W steps of Adam and is then judged on real data; how would its loss
there have changed with S? The chain rule through the steps, from the last to the first, needs the
products of a vector u with second derivatives of L_syn. Each is a directional derivative of an
ordinary gradient, so a second gradient a little way along u gives it (as in DARTS; Liu et al., 2019):

    ∂⟨∂L_syn(φ; S)/∂φ, u⟩ ≈ [∂L_syn(φ + e u; S) − ∂L_syn(φ; S)] / e      with respect to φ and S.

The first of the two gradients is the one that φ has trained with. So a look back costs as much as
the training it looks back on, any fused kernel serves, and nothing is differentiated twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foster_lib.learners import Learner
from foster_lib.sasrec import SASRec
from foster_lib.subsets import SyntheticBatch, real_loss, synthetic_loss
from foster_lib.task import Task
from foster_lib.training import Batch

if TYPE_CHECKING:
    from foster_lib.foster import FosterSettings, Synthesizer


@dataclass(frozen=True)
class Step:
    """One recorded step of φ.

    weights : φ before it; preconditioner : P, of Adam; clip : factor on its gradient; seed : of its
    dropout masks; of_weights, of_data : the gradients of L_syn it was made of and made with
    """

    weights: list[Tensor]
    preconditioner: list[Tensor]
    clip: float
    seed: int
    of_weights: list[Tensor]
    of_data: list[Tensor]


class Rollout:
    """A student φ that trains on S, and the gradient of its loss on real data with respect to S."""

    def __init__(self, task: Task, settings: FosterSettings, seed: int):
        self.settings, self.seed = settings, seed
        own = replace(task, model_settings=replace(task.model_settings, dropout=settings.dropout))
        self.phi = Learner(
            own.new_model(seed), settings.inner_learning_rate, settings.inner_warmup, settings.inner_adapter_rate
        )
        self.served, self.steps = 0, 0

    def reset(self, checkpoint: dict[str, Tensor]) -> None:
        """Trajectory-anchored reset; the optimiser forgets."""
        self.phi.reset(checkpoint)
        self.served = 0

    def gradient(
        self, synthetic: Synthesizer, batch: SyntheticBatch, draw_windows: Callable[[], Batch], teacher: SASRec | None
    ) -> tuple[list[Tensor], float, float]:
        """W steps of φ on L_syn, then ∂L_real(φ)/∂S with its length set to 1.

        Parameters
        ----------
        batch : SyntheticBatch
            Differentiable with respect to `synthetic.tensors`.
        draw_windows : callable
            Draws real windows.
        teacher : SASRec or None
            Labels them in L_real; without one their real next items are the targets.

        Returns
        -------
        gradients of `synthetic.tensors`; L_syn(φ; S) at the last step; L_real(φ) after it
        """
        seen = [batch.p, batch.own, batch.y]
        p, own, y = data = [tensor.detach().requires_grad_() for tensor in seen]
        live = replace(batch, p=p, own=own, y=y)

        def loss(model: SASRec) -> Tensor:
            return synthetic_loss(model, live)

        steps, inner = self.train(loss, data)
        windows = draw_windows()
        outer = real_loss(self.phi.model, windows, self.settings.judged(batch.subset, windows, teacher), teacher)
        of_phi = list(torch.autograd.grad(outer, self.phi.parameters))
        of_data = look_back(self.phi, loss, data, steps, of_phi, self.settings.probe)
        gradients = list(torch.autograd.grad(seen, synthetic.tensors, of_data, retain_graph=True))
        # After a reset P is many times what it is later: only the direction is comparable.
        length = torch.stack([gradient.norm() for gradient in gradients]).norm()
        return [gradient / (length + 1e-20) for gradient in gradients], inner, float(outer.detach())

    def train(self, loss: Callable[[SASRec], Tensor], data: list[Tensor]) -> tuple[list[Step], float]:
        """W steps on `loss`, which reads `data`, recorded; and the last value of the loss."""
        phi, steps, value = self.phi, [], torch.nan
        phi.model.train()
        for _ in range(self.settings.inner_steps):
            self.steps += 1
            seed = self.seed * 2**20 + self.steps
            phi.seed_dropout(seed)
            before = [parameter.detach().clone() for parameter in phi.parameters]
            value = loss(phi.model)
            gradients = torch.autograd.grad(value, phi.parameters + data)
            of_weights, of_data = split(gradients, len(phi.parameters))
            clip = phi.descend(of_weights)
            steps.append(Step(before, phi.preconditioner(), clip, seed, of_weights, of_data))
        phi.model.eval()
        return steps, float(value.detach())


def look_back(
    phi: Learner,
    loss: Callable[[SASRec], Tensor],
    data: list[Tensor],
    steps: list[Step],
    of_phi: list[Tensor],
    probe: float,
) -> list[Tensor]:
    """Gradient with respect to `data` of an outer loss after `steps`, whose gradient at φ is `of_phi`.

    Adam moves by −P m with m ← β m + (1 − β) c g, g = ∂L_syn/∂φ, c the clipping, P held constant.
    Backwards from the last step, dφ = `of_phi` and dm = 0 at first:

        dm ← dm − P dφ,      u = (1 − β) c dm,
        dφ ← dφ + ∂⟨g, u⟩/∂φ,      dS ← dS + ∂⟨g, u⟩/∂S,      dm ← β dm.

    Parameters
    ----------
    probe : float
        ‖e u‖, how far along u the second gradient is taken.

    Returns
    -------
    list of tensors of the shapes of `data`; φ is left as it was.
    """
    after = [parameter.detach().clone() for parameter in phi.parameters]
    beta = phi.optimizer.param_groups[0]["betas"][0]
    d_phi, d_data = of_phi, [torch.zeros_like(tensor) for tensor in data]
    dm = [torch.zeros_like(weights) for weights in of_phi]
    phi.model.train()
    for step in reversed(steps):
        dm = [m - P * d for m, P, d in zip(dm, step.preconditioner, d_phi)]
        u = [(1 - beta) * step.clip * m for m in dm]
        e = probe / (float(torch.stack([part.norm() for part in u]).norm()) + 1e-20)
        put(phi, [weights + e * part for weights, part in zip(step.weights, u)])
        phi.seed_dropout(step.seed)
        moved = torch.autograd.grad(loss(phi.model), phi.parameters + data)
        of_weights, of_data = split(moved, len(phi.parameters))
        d_phi = [d + (there - here) / e for d, there, here in zip(d_phi, of_weights, step.of_weights)]
        d_data = [d + (there - here) / e for d, there, here in zip(d_data, of_data, step.of_data)]
        dm = [beta * m for m in dm]
    put(phi, after)
    phi.model.eval()
    return d_data


@torch.no_grad()
def put(phi: Learner, weights: list[Tensor]) -> None:
    """Set φ's trainable weights."""
    for parameter, value in zip(phi.parameters, weights):
        parameter.copy_(value)


def split(gradients: tuple[Tensor, ...], count: int) -> tuple[list[Tensor], list[Tensor]]:
    """The first `count`, and the rest."""
    return list(gradients[:count]), list(gradients[count:])
