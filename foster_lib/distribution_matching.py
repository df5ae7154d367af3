"""Distribution matching: sequences on which a recommender's mean hidden states are those of real windows.

    ‖E_real ψ_θ − E_S ψ_θ‖²,  ψ_θ: mean hidden state of a sequence          DM, Zhao and Bilen 2023

The tensors of S, where they start and how they descend are those of `matching`, so that a
comparison is one of objectives. Nothing is trained, and no gradient is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from foster_lib.foster import Synthesizer
from foster_lib.matching import descend, draw_checkpoint, draw_real, start_sequences
from foster_lib.sasrec import SASRec
from foster_lib.subsets import FeatureBank, SyntheticBatch
from foster_lib.synthetic import SyntheticSequences
from foster_lib.task import Task
from foster_lib.training import Batch


def sequence_means(hidden: Tensor, mask: Tensor, y: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over sequences of E_t[h_t] and of E_t[h_t ⊗ Σ_j y_tj f_j].

    The second replaces DM's means per class: with one class per item, most of them without a
    real position in a batch, classes share their statistics through the item features f.

    Parameters
    ----------
    hidden : (B, L, d); mask : (B, L); y : (T, N), targets of the T positions; features : (N, d)

    Returns
    -------
    (d,) and (d, d)
    """
    weight = (mask / (mask.sum(1, keepdim=True) * len(mask)))[mask][:, None]
    weighted = weight * hidden[mask]
    return weighted.sum(0), weighted.T @ (y @ features)


def distribution_loss(model: SASRec, batch: SyntheticBatch, real: Batch, targets: Tensor, conditional: float) -> Tensor:
    """DM's objective for one model: squared distance of mean hidden states, and of their joint
    means with the targets, weighted by `conditional`."""
    bank = FeatureBank(model, batch.subset.items, batch.anchors, real.inputs)
    features = bank(batch.subset.items)
    with torch.no_grad():
        ours = sequence_means(model.transform(bank(real.inputs)), real.mask, targets, features)
    mixed = batch.p @ features + batch.own[..., None] * bank(batch.anchors)
    theirs = sequence_means(model.transform(mixed), batch.mask, batch.y, features)
    marginal, joint = ((a - b).square().sum() for a, b in zip(ours, theirs))
    return marginal + conditional * joint


def distribution_matching(
    task: Task,
    sequences: int,
    seed: int,
    progress: str = "",
    *,
    start: str = "teacher",
    iterations: int = 1500,
    subset: int = 512,
    windows: int = 64,
    checkpoints: int = 3,
    conditional: float = 1.0,
    input_learning_rate: float = 0.01,
    label_learning_rate: float = 0.003,
    on_step: Callable | None = None,
) -> SyntheticSequences:
    """DM (arXiv 2110.04181): S's mean hidden states shall be those of real windows.

    Parameters as in `matching.gradient_matching`; every step draws a new network, `conditional` is the
    weight of the joint means of states and targets (0: the labels stay those of the start).
    """
    soft = start == "teacher"
    first = start_sequences(task, sequences, seed, start)
    model = task.new_model(seed).eval().requires_grad_(False)

    def objective(synthetic: Synthesizer, generator: np.random.Generator) -> Tensor:
        model.load_state_dict(draw_checkpoint(task, checkpoints, generator))
        real, items, targets = draw_real(task, windows, subset, soft, generator)
        return distribution_loss(model, synthetic.batch(items), real, targets, conditional)

    rates = (input_learning_rate, label_learning_rate)
    return descend(
        task, first, objective, iterations=iterations, rates=rates, seed=seed, progress=progress, on_step=on_step
    )[0]
