"""DConRec: condensing by choosing interactions, with policy gradients (arXiv 2310.01038).

Every candidate interaction i of a user's sequence is kept with probability s_i. With masks
m ~ Bernoulli(s), and L(m) the real loss of a model after one epoch on the interactions kept,

    min_s E_m[L(m)]   subject to   0 ≤ s ≤ 1,  Σ_i s_i ≤ budget.

1. Pre-augmentation: a proxy model adds items that a user has not met but would like (`augment`).
2. Each step draws K masks. From one checkpoint, a model trains an epoch on each mask's sequences
   (the one-step update); its loss on real windows is L_k.
3. s follows the score-function estimator with the mean of the losses as baseline
   (`policy_gradient`), by Adam; nothing is differentiated through the model.
4. s is projected back onto the constraints (`project`).

The result keeps the most probable interactions in their order: real sequences with gaps and
additions, and real next items, without labels. The budget is matched in interactions: n · L of
them, in as many sequences as they come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from foster_lib.errors import FosterError
from foster_lib.sasrec import SASRec
from foster_lib.synthetic import SyntheticSequences
from foster_lib.task import Task
from foster_lib.training import Batch, make_batch, sequence_loss, warmup_cosine


@dataclass(frozen=True)
class Interactions:
    """C candidate interactions, grouped by sequence, each sequence in its order.

    Attributes
    ----------
    sequence, item : (C,) int64
    added : (C,) bool, put there by the proxy
    fixed : (C,) bool, kept in any case (long-tail users)
    """

    sequence: np.ndarray
    item: np.ndarray
    added: np.ndarray
    fixed: np.ndarray

    @classmethod
    def of(cls, pieces: list[np.ndarray], added: list[np.ndarray], fixed: np.ndarray) -> Interactions:
        """`pieces` and `added` are items and marks per sequence, `fixed` (len(pieces),) marks sequences."""
        lengths = [len(piece) for piece in pieces]
        sequence = np.repeat(np.arange(len(pieces)), lengths)
        return cls(sequence, np.concatenate(pieces), np.concatenate(added), np.repeat(fixed, lengths))

    def __len__(self) -> int:
        return len(self.item)

    def pieces(self, mask: np.ndarray) -> list[np.ndarray]:
        """What `mask` (C,) keeps of each sequence; fewer than two interactions make no target."""
        kept = np.flatnonzero(mask)
        starts = np.flatnonzero(np.diff(self.sequence[kept])) + 1
        return [piece for piece in np.split(self.item[kept], starts) if len(piece) > 1]


# -------------------------------------------------------------------------- candidates


@torch.no_grad()
def augment(proxy: SASRec, piece: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Add the `count` unseen items that `proxy` rates highest anywhere along `piece`.

    Each is inserted where the proxy expects it most, so that the order stays plausible.

    Returns
    -------
    items, added : (len(piece) + count,) int64 and bool
    """
    features = proxy.features()
    hidden = proxy(torch.from_numpy(piece)[None].to(features.device), features)[0]
    log_p = proxy.scores(hidden, features).log_softmax(-1)
    log_p[:, torch.from_numpy(np.unique(piece)).to(features.device)] = -torch.inf
    best, after = log_p.max(0)
    chosen = best.topk(min(count, len(best) - len(np.unique(piece)))).indices
    place = after[chosen].cpu().numpy() + 1
    added = np.insert(np.zeros(len(piece), bool), place, True)
    return np.insert(piece, place, chosen.cpu().numpy()), added


def candidates(
    task: Task, budget: int, pool: float, added: int, tail: int, compensation: float, seed: int
) -> Interactions:
    """Users whose latest interactions number at least `pool` · budget, augmented by the teacher.

    Users are drawn uniformly; those with at most `tail` interactions are marked as kept until
    they fill the fraction `compensation` of the budget.
    """
    room = task.sequence_length + 1 - added
    if room < 2:
        raise FosterError(
            f"{added} added items leave no room in sequences of {task.sequence_length + 1}: lower `added`."
        )
    generator = np.random.default_rng(seed)
    pieces, marks, fixed, size, spent = [], [], [], 0, 0
    for user in generator.permutation(len(task.train)):
        if size >= pool * budget:
            break
        sequence = task.train[user][-room:]
        keep = len(task.train[user]) <= tail and spent + len(sequence) <= compensation * budget
        items, new = (sequence, np.zeros(len(sequence), bool)) if keep else augment(task.teacher, sequence, added)
        pieces.append(items)
        marks.append(new)
        fixed.append(keep)
        size += len(sequence)
        spent += keep * len(sequence)
    return Interactions.of(pieces, marks, np.array(fixed))


# -------------------------------------------------------------- estimator and projection


def policy_gradient(losses: Tensor, masks: Tensor, s: Tensor) -> Tensor:
    """1/(K−1) Σ_k (L_k − mean L) (m_k − s) / (s (1 − s)), an unbiased estimate of ∇_s E[L(m)].

    Where s is 0 or 1 the mask is certain, and the estimate is 0.

    Parameters
    ----------
    losses : (K,), masks : (K, C) of 0 and 1, s : (C,)
    """
    if len(losses) < 2:
        raise FosterError("the policy gradient compares masks: draw at least two.")
    variance = s * (1 - s)
    score = torch.where(variance > 0, (masks - s) / variance.clamp(min=1e-12), 0.0)
    return (losses - losses.mean()) @ score / (len(losses) - 1)


def project(s: Tensor, budget: float) -> Tensor:
    """Nearest point of {0 ≤ s ≤ 1, Σ s ≤ budget}: clip(s − v, 0, 1), v ≥ 0 by bisection."""
    clipped = s.clamp(0, 1)
    if float(clipped.sum()) <= budget:
        return clipped
    low, high = 0.0, float(s.max())
    for _ in range(60):
        v = (low + high) / 2
        low, high = (v, high) if float((s - v).clamp(0, 1).sum()) > budget else (low, v)
    return (s - high).clamp(0, 1)


def most_probable(interactions: Interactions, s: np.ndarray, budget: int) -> np.ndarray:
    """The `budget` most probable interactions, (C,) bool, none of them alone in its sequence.

    An interaction that stands alone makes no target: the least probable of these hands its place
    to the next one, until none is left.
    """
    s = np.where(interactions.fixed, 2.0, s)
    while True:
        order = np.argsort(-s, kind="stable")[:budget]
        kept = order[s[order] >= 0]
        company = np.bincount(interactions.sequence[kept], minlength=interactions.sequence.max() + 1)
        alone = kept[company[interactions.sequence[kept]] == 1]
        if not len(alone):
            mask = np.zeros(len(s), bool)
            mask[kept] = True
            return mask
        s[alone[-1]] = -1.0


# --------------------------------------------------------------------------- the method


def one_epoch(model: SASRec, pieces: list[np.ndarray], batch_size: int, learning_rate: float, device: str) -> None:
    """The one-step update: Adam, one pass over `pieces` in batches of similar lengths."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    pieces = sorted(pieces, key=len)
    for start in range(0, len(pieces), batch_size):
        loss = sequence_loss(model, make_batch(pieces[start : start + batch_size]).to(device), model.features())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def condense(
    task: Task,
    interactions: Interactions,
    budget: int,
    *,
    iterations: int,
    masks: int,
    windows: int,
    checkpoints: int,
    batch_size: int,
    learning_rate: float,
    inner_learning_rate: float,
    seed: int,
    progress: str = "",
    on_step: Callable | None = None,
) -> tuple[Tensor, list[float]]:
    """Learn s, (C,) float64; also the course of the mean loss.

    Parameters: see `dconrec`; `on_step` is called after each step with its number and a function that returns s.
    """
    generator, model = np.random.default_rng(seed), task.new_model(seed).eval()
    trajectory = task.trajectory[:checkpoints]
    free = torch.from_numpy(~interactions.fixed)
    room = budget - int(interactions.fixed.sum())
    # All start alike, and the start already meets the budget.
    s = torch.full((int(free.sum()),), 1.0, dtype=torch.float64)
    s = (s * min(1.0, room / len(s))).requires_grad_()
    optimizer, losses = torch.optim.Adam([s], lr=learning_rate), []

    def everywhere() -> Tensor:
        return torch.ones(len(interactions), dtype=torch.float64).masked_scatter(free, s.detach())

    bar = tqdm(range(iterations), desc=progress, unit="step", disable=not progress)
    for iteration in bar:
        checkpoint = trajectory[generator.integers(len(trajectory))]
        drawn = generator.choice(len(task.windows), min(windows, len(task.windows)), replace=False)
        real = make_batch([task.windows[i] for i in drawn]).to(task.device)
        probability = s.detach().numpy()
        m = generator.random((masks, len(s))) < probability
        values = []
        for row in m:
            mask = interactions.fixed.copy()
            mask[free.numpy()] = row
            values.append(
                _loss_after(model, checkpoint, interactions.pieces(mask), real, batch_size, inner_learning_rate)
            )
        values = torch.tensor(values, dtype=torch.float64)
        s.grad = policy_gradient(values, torch.from_numpy(m).double(), s.detach())  # a fresh one each step
        optimizer.param_groups[0]["lr"] = learning_rate * warmup_cosine((iteration + 0.5) / iterations, 0.0)
        optimizer.step()
        s.data = project(s.data, room)
        losses.append(float(values.mean()))
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        if on_step:
            on_step(iteration, everywhere)
    return everywhere(), losses


def _loss_after(
    model: SASRec, checkpoint: dict, pieces: list[np.ndarray], real: Batch, batch_size: int, learning_rate: float
) -> float:
    model.load_state_dict(checkpoint)
    one_epoch(model, pieces, batch_size, learning_rate, real.mask.device)
    with torch.no_grad():
        loss = float(sequence_loss(model, real, model.features()))
    if not np.isfinite(loss):
        raise FosterError("DConRec's model diverged within an epoch: lower inner_learning_rate.")
    return loss


def dconrec(
    task: Task,
    sequences: int,
    seed: int,
    progress: str = "",
    *,
    pool: float = 4.0,
    added: int = 5,
    tail: int = 10,
    compensation: float = 0.1,
    iterations: int = 800,
    masks: int = 4,
    windows: int = 32,
    checkpoints: int = 3,
    batch_size: int = 16,
    learning_rate: float = 0.02,
    inner_learning_rate: float = 5e-3,
    on_step: Callable | None = None,
) -> SyntheticSequences:
    """The method as Table 2 calls it: hard sequences of together at most n · L interactions.

    Parameters
    ----------
    pool : candidates' real interactions, as a multiple of the budget
    added : items that the proxy (the teacher) adds to each candidate user
    tail, compensation : users of at most `tail` interactions are kept whole, within this
        fraction of the budget
    iterations : steps on s; masks : K
    windows : real windows that L is measured on, the same for the K masks of a step
    checkpoints : the inner model starts at one of the trajectory's first checkpoints
    batch_size, inner_learning_rate : of the epoch on a mask's sequences
    learning_rate : of Adam on s, falling to zero by a cosine
    on_step : called after each step with its number and a function that returns the sequences so far
    """
    budget = sequences * task.sequence_length
    interactions = candidates(task, budget, pool, added, tail, compensation, seed)

    def made(s: Tensor) -> SyntheticSequences:
        kept = most_probable(interactions, s.numpy(), budget)
        return SyntheticSequences.from_windows(interactions.pieces(kept), task.sequence_length)

    s, _ = condense(
        task,
        interactions,
        budget,
        iterations=iterations,
        masks=masks,
        windows=windows,
        checkpoints=checkpoints,
        batch_size=batch_size,
        learning_rate=learning_rate,
        inner_learning_rate=inner_learning_rate,
        seed=seed,
        progress=progress,
        on_step=on_step and (lambda iteration, learned: on_step(iteration, lambda: made(learned()))),
    )
    return made(s)
