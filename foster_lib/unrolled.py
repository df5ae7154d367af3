"""Gradients through training: what the second-order methods (`td3`, `farzi`, `matching`) share.

The student's trainable parameters are one vector θ and a training step is a function of it, so
that the loss after training can be differentiated with respect to the synthetic data. Two ways:

- `unroll` keeps the graph of all steps: plain automatic differentiation, memory grows with every step;
- `reverse_adam` replays the recorded steps backwards with Hessian-vector products: the graph of
  one step at a time.

Both differentiate a gradient. PyTorch's fused attention kernels cannot do that, hence `math_attention`.

Symbols: p (n, R, N) synthetic data, item probabilities of n sequences of R = L + 1 positions over
N items, each position the target of the one before it; θ parameters; m, v Adam's moments;
g = ∂L_syn(θ; p)/∂θ; a learning rate; β₁, β₂, ε Adam's constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from foster_lib.errors import FosterError
from foster_lib.sasrec import Dropout, SASRec
from foster_lib.subsets import Subset
from foster_lib.task import Task
from foster_lib.training import Batch, make_batch, soft_cross_entropy

InnerLoss = Callable[[Tensor, Tensor, int], Tensor]
"""`loss(θ, p, t)`: L_syn at inner step t; the same t gives the same random choices."""


# ---------------------------------------------------------------------- attention kernel


@contextmanager
def math_attention() -> Iterator[None]:
    """Within it, attention runs by the plain formula, which can be differentiated twice; asserts that it does."""
    with sdpa_kernel(SDPBackend.MATH):
        assert_math_attention()
        yield


def assert_math_attention() -> None:
    """Raise `FosterError` if a fused attention kernel could be chosen."""
    cuda = torch.backends.cuda  # these switches hold for the CPU too
    fused = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled())
    if any(fused) or not cuda.math_sdp_enabled():
        raise FosterError(
            "second-order gradients need the math attention kernel, and a fused one is switched on: "
            "call within `with unrolled.math_attention():`."
        )


# --------------------------------------------------------- a model as a function of a vector


class FlatModel:
    """A recommender as a function of one vector θ of all its trainable parameters."""

    def __init__(self, model: SASRec):
        self.model, self.caller = model, _Caller(model)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names = list(trainable)
        self.shapes = [p.shape for p in trainable.values()]
        self.sizes = [p.numel() for p in trainable.values()]

    def vector(self, weights: dict[str, Tensor] | None = None) -> Tensor:
        """Weights by name, the model's own if none are given, as θ: (number of parameters,), detached."""
        weights = dict(self.model.named_parameters()) if weights is None else weights
        return torch.cat([weights[name].detach().reshape(-1) for name in self.names])

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        """θ as weights by name, the inverse of `vector`."""
        return {name: w.view(shape) for name, shape, w in zip(self.names, self.shapes, theta.split(self.sizes))}

    def load(self, checkpoint: dict[str, Tensor]) -> Tensor:
        """Take a checkpoint's weights; returns them as θ."""
        self.model.load_state_dict(checkpoint)
        return self.vector()

    def __call__(self, theta: Tensor, function: Callable, *arguments, dropout_seed: int | None = None):
        """`function(model, *arguments)` with the weights θ; without a seed, no dropout."""
        self.model.train(dropout_seed is not None)
        if dropout_seed is not None:
            for module in self.model.modules():
                if isinstance(module, Dropout):
                    module.generator.manual_seed(dropout_seed)  # one generator is shared by all
        weights = {f"model.{name}": w for name, w in self.named(theta).items()}
        return functional_call(self.caller, weights, (function, *arguments))


class _Caller(nn.Module):
    """`functional_call` swaps weights during `forward`; this forwards to any function of the model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable, *arguments):
        return function(self.model, *arguments)


# ------------------------------------------------------------------------ steps of Adam


@dataclass(frozen=True)
class Adam:
    """Constants of the inner optimiser (Kingma and Ba, 2015).

    floor : added under the root, which makes the step differentiable where a gradient is zero.
    """

    learning_rate: float | Tensor = 5e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    floor: float = 1e-30


class AdamState(NamedTuple):
    """θ, first and second moment, and the number of steps taken."""

    theta: Tensor
    m: Tensor
    v: Tensor
    step: int

    @classmethod
    def start(cls, theta: Tensor) -> AdamState:
        return cls(theta.detach(), torch.zeros_like(theta), torch.zeros_like(theta), 0)


def adam_step(state: AdamState, g: Tensor, adam: Adam) -> AdamState:
    """θ ← θ − a m̂ / (√v̂ + ε), with bias correction; a function without side effects."""
    step = state.step + 1
    m = adam.beta1 * state.m + (1 - adam.beta1) * g
    v = adam.beta2 * state.v + (1 - adam.beta2) * g * g
    m_hat, root = _corrected(m, v, step, adam)
    return AdamState(state.theta - adam.learning_rate * m_hat / (root + adam.epsilon), m, v, step)


def plain_step(state: AdamState, g: Tensor, adam: Adam) -> AdamState:
    """θ ← θ − a g: gradient descent, which uses nothing of Adam's but the learning rate."""
    return state._replace(theta=state.theta - adam.learning_rate * g, step=state.step + 1)


def _corrected(m: Tensor, v: Tensor, step: int, adam: Adam) -> tuple[Tensor, Tensor]:
    """m̂ and √v̂ of step number `step`."""
    return m / (1 - adam.beta1**step), (v / (1 - adam.beta2**step) + adam.floor).sqrt()


def descend(loss: InnerLoss, state: AdamState, p: Tensor, steps: int, adam: Adam) -> list[AdamState]:
    """Ordinary training on fixed p: the states before and after each step, `steps` + 1 of them.

    `state.step` continues to count, so that `loss` sees other random choices at each step.
    """
    states, p = [state], p.detach()
    for _ in range(steps):
        theta = states[-1].theta.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss(theta, p, states[-1].step), theta)
        states.append(adam_step(states[-1], g, adam))
    return states


def unroll(
    loss: InnerLoss, state: AdamState, p: Tensor, steps: int, adam: Adam, step: Callable = adam_step
) -> AdamState:
    """Training whose result is differentiable with respect to p, through all `steps` steps of Adam.

    The state that it starts from is a constant: what happened before it is cut off, which is
    truncated backpropagation through time. `step` may be `plain_step`, and the learning rate a
    tensor to differentiate with respect to.
    """
    assert_math_attention()
    state = AdamState(state.theta.detach().requires_grad_(), state.m.detach(), state.v.detach(), state.step)
    for _ in range(steps):
        (g,) = torch.autograd.grad(loss(state.theta, p, state.step), state.theta, create_graph=True)
        state = step(state, g, adam)
    return state


def reverse_adam(loss: InnerLoss, states: list[AdamState], p: Tensor, d_theta: Tensor, adam: Adam) -> Tensor:
    """Gradient with respect to p of an outer loss after training: Adam differentiated backwards.

    Per step, from the last to the first (Sachdeva et al., 2023, Algorithm 1, with bias correction;
    c₁ = 1 − β₁ᵗ, c₂ = 1 − β₂ᵗ, r = √v̂):

        dm −= a dθ / (c₁ (r + ε)),        dv += a dθ m̂ / (2 c₂ r (r + ε)²),
        dg  = (1 − β₁) dm + 2 (1 − β₂) g dv,
        dp += ∂⟨g(θ, p), dg⟩/∂p,          dθ += ∂⟨g(θ, p), dg⟩/∂θ,
        dm ← β₁ dm,                       dv ← β₂ dv.

    Parameters
    ----------
    states : list of AdamState
        As `descend` returns them. This is all that grows with the number of steps: three vectors
        of the size of θ a step; the graph of one step lives at a time.
    d_theta : Tensor
        Gradient of the outer loss at the last θ.

    Returns
    -------
    Tensor of the shape of p
    """
    assert_math_attention()
    data = p.detach().requires_grad_()
    d_data, dm, dv = torch.zeros_like(data), torch.zeros_like(d_theta), torch.zeros_like(d_theta)
    for before, after in zip(states[-2::-1], states[:0:-1]):
        m_hat, root = _corrected(after.m, after.v, after.step, adam)
        c1, c2 = 1 - adam.beta1**after.step, 1 - adam.beta2**after.step
        dm = dm - adam.learning_rate * d_theta / (c1 * (root + adam.epsilon))
        dv = dv + adam.learning_rate * d_theta * m_hat / (2 * c2 * root * (root + adam.epsilon) ** 2)
        theta = before.theta.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss(theta, data, before.step), theta, create_graph=True)
        dg = (1 - adam.beta1) * dm + 2 * (1 - adam.beta2) * g.detach() * dv
        from_theta, from_data = torch.autograd.grad(g, (theta, data), dg)
        d_theta, d_data = d_theta + from_theta, d_data + from_data
        dm, dv = adam.beta1 * dm, adam.beta2 * dv
    return d_data


# ------------------------------------------------------------------------------- losses


def mixture_loss(model: SASRec, p: Tensor, items: Tensor | None, rows: Tensor | None) -> Tensor:
    """L_syn: cross-entropy of each position's mixture, predicted from the mixtures before it.

    It differs from the Kullback-Leibler divergence by the entropy of p, which θ does not enter.

    Parameters
    ----------
    p : (n, R, N)
    items : (N,) int64 or None
        What the columns of p stand for; None: the whole catalogue.
    rows : (n, c) int64 or None
        Positions that are targets, each in 1 … R − 1; None: all.
    """
    features = model.features(items)
    hidden = model(p[:, :-1], features)
    if rows is None:
        hidden, y = hidden.flatten(0, 1), p[:, 1:].flatten(0, 1)
    else:
        sequence = torch.arange(len(p), device=p.device)[:, None]
        hidden, y = hidden[sequence, rows - 1].flatten(0, 1), p[sequence, rows].flatten(0, 1)
    return soft_cross_entropy(model.scores(hidden, features), y)


@dataclass(frozen=True)
class RealBatch:
    """Real windows whose items are rows of a list of candidates.

    Attributes
    ----------
    items : (N,) int64 or None
        The candidates; None: the whole catalogue.
    log_weight : (N,) float or None
        Logarithm of how many items of the catalogue a candidate stands for.
    batch : Batch
        Inputs and targets are rows of `items`.
    last : (B,) int64
        The last position of each window that has a target.
    """

    items: Tensor | None
    log_weight: Tensor | None
    batch: Batch
    last: Tensor

    @classmethod
    def make(cls, batch: Batch, subset: Subset | None) -> RealBatch:
        """Candidates are the subset and the items of the windows themselves, or all items.

        The windows' items stand for themselves, the other drawn ones for all that were not drawn,
        so that the partition sum is an unbiased estimate of the one over the catalogue.
        """
        last = batch.mask.sum(1) - 1
        if subset is None:
            return cls(None, None, batch, last)
        subset = subset.including(torch.cat([batch.inputs[batch.mask], batch.targets]))
        items, log_weight = subset.items, subset.log_weight
        # Padding (item 0) may be no candidate: any row will do, it is masked.
        inputs = torch.searchsorted(items, batch.inputs).clamp(max=len(items) - 1)
        return cls(
            items, log_weight, replace(batch, inputs=inputs, targets=torch.searchsorted(items, batch.targets)), last
        )

    @classmethod
    def draw(cls, task: Task, count: int, subset: Subset | None, generator: np.random.Generator) -> RealBatch:
        """`count` of the task's windows, drawn without replacement."""
        drawn = generator.choice(len(task.windows), min(count, len(task.windows)), replace=False)
        return cls.make(make_batch([task.windows[i] for i in drawn]).to(task.device), subset)

    def last_hidden(self, hidden: Tensor) -> Tensor:
        """(B, L, d) to (B, d): the hidden states at the last positions."""
        return hidden[torch.arange(len(hidden), device=hidden.device), self.last]


def real_loss(model: SASRec, real: RealBatch, teacher_hidden: Tensor | None = None, alignment: float = 0.0) -> Tensor:
    """L_real: cross-entropy of the real next items + alignment · ‖h − h*‖² at the last positions.

    Parameters
    ----------
    teacher_hidden : (B, d), optional
        h*, the teacher's hidden states at the last positions. Hidden states have unit length, so
        the squared distance is what a mean over features is for states of unit variance.
    """
    features = model.features(real.items)
    hidden = model(real.batch.inputs, features)
    logits = model.scores(hidden[real.batch.mask], features)
    if real.log_weight is not None:
        logits = logits + real.log_weight
    loss = F.cross_entropy(logits.float(), real.batch.targets)
    if teacher_hidden is not None and alignment:
        loss = loss + alignment * (real.last_hidden(hidden) - teacher_hidden).square().sum(-1).mean()
    return loss
