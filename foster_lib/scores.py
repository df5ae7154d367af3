"""Coresets by difficulty: GraNd, EL2N and forgetting, measured along full-data training.

The training loss is a mean over all targets of all sequences, so a sequence's share of it is the
sum over its own targets. With T targets, hidden states h_t, logits s h_t·f_j and errors
δ_t = softmax(logits) − onehot(target):

- GraNd: norm of the gradient of that share with respect to the output layer, whose rows are the
  item features: ‖Σ_t δ_t ⊗ s h_t‖;
- EL2N: Σ_t ‖δ_t‖;
- forgetting: how often a target that was ranked in the top 10 after one epoch no longer is after
  the next, summed over t.

`per="target"` divides each by T.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from foster_lib.coresets import checked_pool, select
from foster_lib.errors import check_known
from foster_lib.sasrec import SASRec
from foster_lib.selection import highest
from foster_lib.synthetic import SyntheticSequences
from foster_lib.task import Task
from foster_lib.training import make_batch

PER, KEEP = ("sequence", "target"), ("hardest", "easiest")


def grand(
    task: Task,
    sequences: int,
    seed: int,
    epochs: int = 5,
    per: str = "sequence",
    keep: str = "hardest",
) -> SyntheticSequences:
    """Gradient norm (GraNd; Paul et al., 2021), averaged over several early models.

    Parameters
    ----------
    epochs : int
        The early models are the checkpoints of full-data training after epochs 1 … `epochs`.
    per : str
        `sequence`: sums over a sequence's targets; `target`: means.
    keep : str
        `hardest`, as in the paper, or `easiest`, which is better where little can be kept
        (Sorscher et al., 2022).
    """
    pool = checked_pool(task, sequences)
    scores = np.mean([gradient_norms(model, pool) for model in checkpoints(task, epochs)], axis=0)
    return _rank(task, pool, scores, sequences, seed, per, keep)


def el2n(
    task: Task,
    sequences: int,
    seed: int,
    epochs: int = 5,
    per: str = "sequence",
    keep: str = "hardest",
) -> SyntheticSequences:
    """Norm of the error (EL2N; Paul et al., 2021), averaged over several early models; see `grand`."""
    pool = checked_pool(task, sequences)
    scores = np.mean([error_norms(model, pool) for model in checkpoints(task, epochs)], axis=0)
    return _rank(task, pool, scores, sequences, seed, per, keep)


def forgetting(
    task: Task,
    sequences: int,
    seed: int,
    top: int = 10,
    per: str = "sequence",
    keep: str = "hardest",
) -> SyntheticSequences:
    """Forgetting events (Toneva et al., 2019) over the checkpoints of full-data training.

    A next item counts as learned while it ranks among the `top` of the whole catalogue, which is
    what the metrics reward; being first is too rare to be unlearned. A target that is never
    learned counts as forgotten infinitely often. Nearly every sequence has such targets, so in
    the sum over a sequence infinity is one more than any learned target can reach. Targets alone
    keep the order of the paper.
    """
    pool = checked_pool(task, sequences)
    learned = np.stack([target_ranks(model, pool) < top for model in checkpoints(task)])
    events = forgetting_events(learned)
    events[np.isinf(events)] = len(learned) // 2 + 1
    ends = np.cumsum([len(piece) - 1 for piece in pool])
    scores = np.array([part.sum() for part in np.split(events, ends[:-1])])
    return _rank(task, pool, scores, sequences, seed, per, keep)


# ------------------------------------------------------------------------------- scores


def gradient_norms(model: SASRec, pieces: list[np.ndarray]) -> np.ndarray:
    """‖Σ_t δ_t ⊗ s h_t‖ of each window, (len(pieces),) float64.

    The (|V|, d) gradients are never formed: ‖Σ_t δ_t ⊗ h_t‖² = Σ_tu (δ_t·δ_u)(h_t·h_u).
    """
    norms, scale = np.empty(len(pieces)), model.log_scale.detach().exp()
    for chosen, hidden, logits, targets in _forward(model, pieces):
        errors = _errors(logits, targets)
        squares = ((errors @ errors.mT) * (hidden @ hidden.mT)).sum((1, 2))
        norms[chosen] = (scale * squares.clamp(min=0).sqrt()).cpu().numpy()
    return norms


def error_norms(model: SASRec, pieces: list[np.ndarray]) -> np.ndarray:
    """Σ_t ‖δ_t‖ of each window, (len(pieces),) float64."""
    norms = np.empty(len(pieces))
    for chosen, _, logits, targets in _forward(model, pieces):
        norms[chosen] = _errors(logits, targets).norm(dim=-1).sum(1).cpu().numpy()
    return norms


def target_ranks(model: SASRec, pieces: list[np.ndarray]) -> np.ndarray:
    """Number of items scored above each target, windows one after the other: (Σ T,)."""
    ranks = [np.empty(0, int)] * len(pieces)
    for chosen, _, logits, targets in _forward(model, pieces):
        own = logits.gather(-1, targets.clamp(min=0)[..., None])
        for i, row in zip(chosen, (logits > own).sum(-1).cpu().numpy()):
            ranks[i] = row[: len(pieces[i]) - 1]
    return np.concatenate(ranks)


def forgetting_events(learned: np.ndarray) -> np.ndarray:
    """How often each target turns from learned to not learned; infinite if it never is learned.

    Parameters
    ----------
    learned : (C, T) bool
        By checkpoint and target.
    """
    events = (learned[:-1] & ~learned[1:]).sum(0).astype(float)
    events[~learned.any(0)] = np.inf
    return events


# ------------------------------------------------------------------------------ helpers


def checkpoints(task: Task, epochs: int | None = None) -> Iterator[SASRec]:
    """One model after the other as it was after epochs 1 … `epochs` of full-data training."""
    model = task.new_model(seed=0).eval()
    for state in task.trajectory[1 : None if epochs is None else epochs + 1]:
        model.load_state_dict(state)
        yield model


@torch.no_grad()
def _forward(model: SASRec, pieces: list[np.ndarray]) -> Iterator[tuple[np.ndarray, Tensor, Tensor, Tensor]]:
    """Windows of similar lengths together: which, hidden states (B, L, d), logits (B, L, |V|), targets (B, L).

    Padded targets are −1.
    """
    features = model.features()
    lengths = np.array([len(piece) - 1 for piece in pieces])
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, 2**21 // (lengths[order[start]] * len(features)))  # at most 8 MiB of logits at once
        chosen = order[start : start + size]
        batch = make_batch([pieces[i] for i in chosen]).to(features.device)
        targets = torch.full_like(batch.inputs, -1)
        targets[batch.mask] = batch.targets
        hidden = model(batch.inputs, features)
        yield chosen, hidden, model.scores(hidden, features), targets
        start += size


def _errors(logits: Tensor, targets: Tensor) -> Tensor:
    """δ = softmax(logits) − onehot(target), zero where there is padding."""
    errors = logits.softmax(-1)
    errors.scatter_add_(-1, targets.clamp(min=0)[..., None], torch.full_like(errors[..., :1], -1.0))
    return errors * (targets >= 0)[..., None]


def _rank(
    task: Task, pool: list[np.ndarray], scores: np.ndarray, count: int, seed: int, per: str, keep: str
) -> SyntheticSequences:
    check_known(per, PER, "unit")
    check_known(keep, KEEP, "end of the scale")
    if per == "target":
        scores = scores / np.array([len(piece) - 1 for piece in pool])
    return select(task, pool, highest(scores if keep == "hardest" else -scores, count, seed))
