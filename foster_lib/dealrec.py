"""DEALRec: data pruning for language-model recommenders (Lin et al., SIGIR 2024, arXiv 2401.17197).

A window's score is  influence + λ · effort, both scaled to 0 … 1. With L(s) the mean loss on the
window s and L = Σ_s L(s) / N,

    influence(s) = ∇L(s)ᵀ H⁻¹ ∇L,   H = ∇²L   (Eq. 7 to 11),

on one weight matrix of a small surrogate that is trained on everything: how much the training
loss would rise without s. Effort is the norm of the gradient of s at the large model before it is
tuned: how much s would move it. The largest scores are cut off, the others are divided into
strata of equal width, and the budget is shared between the strata (coverage).

Here the surrogate is the full-data teacher; the large model is the recommender whose item
features come from the language model, as warm-started, and its gradient is that of the output
layer, which holds those features.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, jvp
from tqdm.auto import tqdm

from foster_lib.coresets import checked_pool, select
from foster_lib.errors import FosterError
from foster_lib.sasrec import SASRec
from foster_lib.scores import gradient_norms
from foster_lib.synthetic import SyntheticSequences
from foster_lib.task import Task
from foster_lib.training import make_batch


def dealrec(
    task: Task,
    sequences: int,
    seed: int,
    effort: float = 1.0,
    strata: int = 50,
    prune: float = 0.1,
    damping: float = 0.01,
    scale: float = 25.0,
    depth: int = 500,
    batch_size: int = 8,
    progress: str = "",
) -> SyntheticSequences:
    """Windows of high influence and effort, spread over the strata of the score.

    Parameters
    ----------
    effort : float
        λ (in the paper 0.3 on Games, 1.0 elsewhere).
    strata : int
        K, ranges of equal width that the scores are divided into.
    prune : float
        Fraction of the windows, those of largest score, that is cut off as noise.
    damping, scale, depth, batch_size
        Of `lissa`; windows per step.
    """
    pool = checked_pool(task, sequences)
    generator = np.random.default_rng(seed)
    influences = influence(
        task.teacher, pool, generator, damping=damping, scale=scale, depth=depth, size=batch_size, progress=progress
    )
    lengths = np.array([len(piece) - 1 for piece in pool])
    efforts = gradient_norms(task.new_model(seed).eval(), pool) / lengths
    scores = unit_range(influences) + effort * unit_range(efforts)
    kept = np.argsort(-scores, kind="stable")[min(int(prune * len(pool)), len(pool) - sequences) :]
    return select(task, pool, kept[stratified(scores[kept], sequences, strata, generator)])


# -------------------------------------------------------------------------------- influence


def influence(
    model: SASRec,
    pieces: list[np.ndarray],
    generator: np.random.Generator,
    *,
    damping: float,
    scale: float,
    depth: int,
    size: int,
    progress: str = "",
) -> np.ndarray:
    """∇L(s)ᵀ H⁻¹ ∇L of every window s on the output matrix of the last attention: (len(pieces),).

    All inner products come from one forward-mode derivative in the direction H⁻¹∇L, so no window's
    own gradient is formed.
    """
    losses = WindowLosses(model, pieces)
    parts = np.array_split(np.arange(len(pieces)), -(-len(pieces) // 64))
    mean_gradient = sum(losses.gradient(part) * (len(part) / len(pieces)) for part in parts)

    def hessian_vector(direction: Tensor) -> Tensor:
        drawn = generator.choice(len(pieces), min(size, len(pieces)), replace=False)
        return losses.hessian_vector(drawn, direction)

    direction = lissa(mean_gradient, hessian_vector, damping, scale, depth, progress)
    return np.concatenate([losses.derivative(part, direction).cpu().numpy() for part in parts])


class WindowLosses:
    """Mean loss of each window as a function of one weight matrix W of the model.

    W projects the last block's attention output, so no derivative passes through attention and
    any attention kernel will do, fused ones without a second derivative included.
    """

    def __init__(self, model: SASRec, pieces: list[np.ndarray]):
        self.model, self.pieces = model.eval(), pieces
        self.name = f"blocks.{len(model.blocks) - 1}.project.weight"
        self.weight = model.get_parameter(self.name).detach()
        self.features = model.features().detach()

    def __call__(self, weight: Tensor, chosen: np.ndarray) -> Tensor:
        """(len(chosen),)"""
        batch = make_batch([self.pieces[i] for i in chosen]).to(self.features.device)
        hidden = functional_call(self.model, {self.name: weight}, (batch.inputs, self.features))[batch.mask]
        loss = F.cross_entropy(self.model.scores(hidden, self.features), batch.targets, reduction="none")
        counts = batch.mask.sum(1)
        rows = torch.repeat_interleave(torch.arange(len(chosen), device=loss.device), counts)
        return torch.zeros_like(counts, dtype=loss.dtype).index_add(0, rows, loss) / counts

    def gradient(self, chosen: np.ndarray) -> Tensor:
        """∇ of the mean over the chosen windows, of W's shape."""
        weight = self.weight.clone().requires_grad_()
        return torch.autograd.grad(self(weight, chosen).mean(), weight)[0]

    def hessian_vector(self, chosen: np.ndarray, direction: Tensor) -> Tensor:
        """∇² of the mean over the chosen windows, times `direction`."""
        weight = self.weight.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self(weight, chosen).mean(), weight, create_graph=True)
        return torch.autograd.grad((gradient * direction).sum(), weight)[0]

    def derivative(self, chosen: np.ndarray, direction: Tensor) -> Tensor:
        """⟨∇L(s), direction⟩ for each chosen window s: (len(chosen),)."""
        return jvp(lambda weight: self(weight, chosen), (self.weight,), (direction,))[1].detach()


def lissa(
    vector: Tensor,
    hessian_vector: Callable[[Tensor], Tensor],
    damping: float,
    scale: float,
    depth: int,
    progress: str = "",
) -> Tensor:
    """Stochastic estimate of H⁻¹v (LiSSA; Agarwal et al., 2017; Koh and Liang, 2017).

    h ← v + (1 − damping) h − H h / scale, `depth` times from h = v, each time with the Hessian of
    a fresh batch; the fixed point is (damping · I + H / scale)⁻¹ v.

    Raises
    ------
    FosterError
        If the recursion diverges: an eigenvalue of H is above 2 · scale or below −damping · scale.
    """
    estimate = vector.clone()
    for _ in tqdm(range(depth), desc=progress, unit="step", disable=not progress):
        estimate = vector + (1 - damping) * estimate - hessian_vector(estimate) / scale
        if not torch.isfinite(estimate).all():
            raise FosterError("LiSSA diverged: raise its damping or its scale.")
    return estimate


# --------------------------------------------------------------------------------- sampling


def stratified(scores: np.ndarray, count: int, strata: int, generator: np.random.Generator) -> np.ndarray:
    """Indices drawn from equal-width ranges of the scores (coverage-centric; Zheng et al., 2023).

    Ranges are served from the one with fewest members up; each may give an equal share, rounded
    down, of what is left of the budget, so what small ranges cannot give goes to larger ones. With
    more ranges than sequences the smallest ranges give nothing.
    """
    if not 0 < count <= len(scores):
        raise FosterError(f"{count} sequences cannot be drawn from {len(scores)} scores.")
    edges = np.linspace(scores.min(), scores.max(), strata + 1)[1:-1]
    stratum = np.searchsorted(edges, scores)  # ranges are closed above: lowest < score ≤ edge
    groups = [np.flatnonzero(stratum == k) for k in range(strata)]
    groups = sorted((group for group in groups if len(group)), key=len)
    chosen: list[np.ndarray] = []
    for number, group in enumerate(groups):
        share = (count - sum(map(len, chosen))) // (len(groups) - number)
        chosen.append(generator.choice(group, min(len(group), share), replace=False))
    return np.concatenate(chosen)


def unit_range(values: np.ndarray) -> np.ndarray:
    """Shift and scale to 0 … 1; all zero if all are equal."""
    values = values.astype(np.float64) - values.min()
    return values / values.max() if values.max() > 0 else values
