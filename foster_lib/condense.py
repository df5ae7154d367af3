"""Labels of several teachers in the terms of one: S stays small, whatever labels it.

The mean of M full-data models has item features of M times their width: S would hold M adapters, and label queries
M times as long. Its probabilities at a thousand positions need far less. One adapter with queries of one model's
width is fitted to all that S tells of the teachers, by stochastic gradient steps on a few labels and items at a time:

    min over f, z_y, A   KL(y ‖ softmax(z_y · f)) + the same for the likeness of items and for successors,

from one teacher's adapter and the queries that are nearest to the labels by least squares.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foster_lib.optimizers import MuonAdamW
from foster_lib.sasrec import adapt
from foster_lib.subsets import likeness_scores, sample_subset
from foster_lib.synthetic import LIKENESS_ROWS, SyntheticSequences
from foster_lib.training import warmup_cosine

STEPS, LABELS, ITEMS = 600, 1000, 2048
"""Steps of the fit; labels and items that one step looks at."""

MATRIX_RATE, VECTOR_RATE, QUERY_RATE = 0.03, 3e-3, 0.1
"""Learning rates of the adapter's matrices (Muon), of its vectors and of queries (Adam)."""

BITS = 8
"""Of a stored number: finer ones do not show in what students learn."""


@torch.enable_grad()
def condensed(
    labelled: SyntheticSequences, adapter: dict[str, Tensor], embeddings: Tensor, steps: int = STEPS
) -> SyntheticSequences:
    """The same sequences, their labels told by one adapter and queries of its width.

    Parameters
    ----------
    labelled : SyntheticSequences
        With labels in the features of any adapters.
    adapter : weights of a `sasrec.Adapter` of width k, to start from
    embeddings : (|V|, width of the encoder)
        Text embeddings of the catalogue.

    Returns
    -------
    SyntheticSequences, on the CPU, with label queries of width k, stored with `BITS` bits a number.
    """
    device, exact = embeddings.device, labelled.to(embeddings.device)
    known = exact.features(embeddings)
    z_known = exact.labels[:, :, None]
    if exact.further_labels is not None:
        z_known = torch.cat([z_known, exact.further_labels], 2)
    readings = z_known.shape[2]
    z_known = z_known[exact.mask].flatten(0, 1)
    adapter = {name: tensor.to(device, copy=True).requires_grad_() for name, tensor in adapter.items()}
    f = adapt(embeddings, adapter).detach()
    z = nearest_queries(z_known, known, f)
    learnt, A = {"z": z}, None
    if exact.successors is not None:
        alone = nearest_queries(F.pad(known, (0, 1), value=1.0) @ exact.successors, known, f)
        learnt["A"] = A = least_squares(F.pad(f, (0, 1), value=1.0), alone)
    for tensor in learnt.values():
        tensor.requires_grad_()
    optimizer = _optimizer(adapter, learnt)
    generator = np.random.default_rng(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["full_rate"] * warmup_cosine((step + 0.5) / steps, 0.03)
        subset = sample_subset(len(embeddings), ITEMS, generator).to(device)
        rows = torch.from_numpy(drawn(len(subset.items), LIKENESS_ROWS, generator)).to(device)
        some = torch.from_numpy(drawn(len(z), LABELS, generator)).to(device)
        f, f_known = adapt(embeddings[subset.items], adapter), known[subset.items]
        loss = divergence(z_known[some] @ f_known.T, z[some] @ f.T)
        if exact.alike is not None:
            loss = loss + divergence(*(likeness_scores(each, rows, exact.alike, subset) for each in (f_known, f)))
        if A is not None:
            parts = ((f_known, exact.successors), (f, A))
            loss = loss + divergence(*(F.pad(each[rows], (0, 1), value=1.0) @ a @ each.T for each, a in parts))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    labels = torch.zeros(*exact.mask.shape, readings, z.shape[-1], device=device)
    labels[exact.mask] = z.detach().unflatten(0, (-1, readings))
    found = replace(exact, adapter=adapter, labels=labels[:, :, 0], bits=BITS)
    found = replace(found, further_labels=labels[:, :, 1:] if readings > 1 else None, successors=A)
    return found.detached()


def nearest_queries(z: Tensor, known: Tensor, f: Tensor) -> Tensor:
    """Queries whose scores of the features `f` (|V|, k) are nearest to those that `z` (…, k') gives the features
    `known` (|V|, k'), but for a constant, by least squares: (…, k).
    """
    return z @ least_squares(f - f.mean(0), known - known.mean(0)).T


def least_squares(a: Tensor, b: Tensor) -> Tensor:
    """X with A X nearest to B, of matrices (n, k) and (n, m): (k, m)."""
    a, b = a.double(), b.double()
    ridge = 1e-2 * torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    return torch.linalg.solve(a.T @ a + ridge, a.T @ b).float()


def divergence(logits: Tensor, others: Tensor) -> Tensor:
    """Mean KL divergence from the probabilities that `others` (n, N) are logits of to those of `logits`."""
    return F.kl_div(others.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="batchmean")


def drawn(count: int, size: int, generator: np.random.Generator) -> np.ndarray:
    """At most `size` of `count`, in ascending order."""
    return np.sort(generator.choice(count, min(count, size), replace=False))


def _optimizer(adapter: dict[str, Tensor], learnt: dict[str, Tensor]) -> MuonAdamW:
    def group(tensors: list[Tensor], rate: float) -> dict:
        return {"params": tensors, "lr": rate, "full_rate": rate, "weight_decay": 0.0}

    matrices = [tensor for tensor in adapter.values() if tensor.dim() == 2]
    vectors = [tensor for tensor in adapter.values() if tensor.dim() < 2]
    others = [group(vectors, VECTOR_RATE), group(list(learnt.values()), QUERY_RATE)]
    return MuonAdamW([group(matrices, MATRIX_RATE)], others, momentum=0.95)
