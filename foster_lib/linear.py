"""More references: EASE, text similarity to the whole history, SASRec on item ids."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor, nn

from foster_lib.evaluation import Scorer, recommender_scorer
from foster_lib.references import decaying, item_matrix
from foster_lib.sasrec import Dropout, ModelSettings, SASRec
from foster_lib.task import Task
from foster_lib.training import RealSequences, TrainSettings, train


def ease(task: Task, sequences: int = 0, seed: int = 0, regularisation: float = 200.0, decay: float = 0.9) -> Scorer:
    """Linear autoencoder with a closed form (EASE; Steck, 2019).

    B minimises ‖X − XB‖² + λ‖B‖² subject to diag(B) = 0, X the binary user-item matrix:
    B_ij = −P_ij / P_jj off the diagonal, P = (XᵀX + λI)⁻¹ (Eq. 8). An item's score is the sum of
    its weights to the history.

    Parameters
    ----------
    regularisation : float
        λ.
    decay : float
        Weight of a history item relative to the next later one; 1 is Steck's model.
    """
    weights = ease_weights(item_matrix(task.train, np.ones, task.n_items, binary=True), regularisation)
    return lambda histories: torch.from_numpy(item_matrix(histories, decaying(decay), task.n_items) @ weights)


def ease_weights(matrix: sparse.csr_matrix, regularisation: float) -> np.ndarray:
    """B of a binary user-item matrix: (|V|, |V|) float32."""
    gram = torch.from_numpy((matrix.T @ matrix).toarray())  # for 20,000 items: 1.6 GB in float32
    gram.diagonal().add_(regularisation)
    # Symmetric, so the transpose is itself, row by row in memory: a product with sparse histories takes no copy of it.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram)).mT
    weights = inverse / -inverse.diagonal()
    weights.fill_diagonal_(0)
    return weights.numpy()


def text_knn(task: Task, sequences: int = 0, seed: int = 0, decay: float = 0.9) -> Scorer:
    """Text similarity to the whole history, without any training.

    Score of item j: Σ_i decay^age(i) · f_i·f_j over the history, f the unit-length item features of
    the warm start (`SASRec.warm_start`). With decay 0 only the last item counts, which is what the
    untrained recommender does.
    """
    with torch.no_grad():
        features = task.new_model(seed).features().cpu()

    def score(histories: list[np.ndarray]) -> Tensor:
        profile = item_matrix(histories, decaying(decay), task.n_items) @ features.numpy()
        return torch.from_numpy(profile) @ features.T

    return score


def id_sasrec(
    task: Task,
    sequences: int = 0,
    seed: int = 0,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    epochs: int = 40,
    batch_size: int = 64,
    patience: int = 5,
    dropout: float = 0.3,
    subset: int = 0,
    progress: str = "",
) -> Scorer:
    """SASRec on all data without text: a learned embedding for each item, started at random.

    Everything else is as for the full-data model with text; the epoch that validates best is kept.

    Parameters
    ----------
    learning_rate, weight_decay, epochs, batch_size, patience, subset
        See `TrainSettings`.
    dropout : float
        Of this model; without the text's prior it needs more than the one with text.
    """
    settings = TrainSettings(
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        epochs=epochs,
        batch_size=batch_size,
        patience=patience,
        subset=subset,
    )
    model = id_model(task.n_items, replace(task.model_settings, dropout=dropout), seed, task.device)
    data = RealSequences(task.train, task.length, batch_size, task.train_timestamps, task.n_items, subset)
    train(model, data, settings, seed=seed, validate=task.validate, device=task.device, progress=progress)
    return recommender_scorer(model)


class IdCatalogue(nn.Module):
    """Item embeddings that are learned as they are; stands where text embeddings stand otherwise."""

    def __init__(self, n_items: int, width: int, generator: torch.Generator):
        super().__init__()
        self.n_items, self.width = n_items, width
        self.table = nn.Parameter(torch.randn(n_items, width, generator=generator) / width**0.5)

    def forward(self, items: Tensor | None = None) -> Tensor:
        return self.table if items is None else self.table[items]


class UnitLength(nn.Module):
    """In the place of the adapter from text embeddings to features: nothing but the normalisation."""

    def forward(self, embeddings: Tensor) -> Tensor:
        return F.normalize(embeddings, dim=-1)


def id_model(n_items: int, settings: ModelSettings, seed: int, device: str = "cpu") -> SASRec:
    """A randomly started SASRec over item ids, with no adapter between embeddings and features."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # nn.Linear's own, overwritten weights draw from the global state
        model = SASRec(IdCatalogue(n_items, settings.width, generator), settings, generator)
    model.adapter = UnitLength()
    if torch.device(device).type != "cpu":
        generator = torch.Generator(device).manual_seed(seed)
        for module in model.to(device).modules():
            if isinstance(module, Dropout):
                module.generator = generator
    return model
