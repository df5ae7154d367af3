"""L_r: semantically similar items shall be used alike inside the synthetic sequences.

Each item i has a distribution q_i that says how S uses it, in one of three forms:

* "conditional": what follows it,  q_i(j) ∝ Σ_t p_t(i) y_t(j)  over all positions t;
* "slots": the positions that it stands at,  q_i(t) ∝ p_t(i);
* "sequences": the items it shares sequences with,  q_i(j) ∝ Σ_a P_a(i) P_a(j),  P_a = Σ_{t in a} p_t.

With weights w_ij = softmax_j(s_ij / τ) over the nearest neighbours j of i in text space,

    L_r = 1/N Σ_i Σ_j w_ij H²(q_i, q_j),   H² = 1 − Σ_k √(q_i(k) q_j(k))  (squared Hellinger).
"""

from __future__ import annotations

import torch
from torch import Tensor

FORMS = ("conditional", "slots", "sequences")


def cooccurrence_regulariser(
    p: Tensor,
    y: Tensor,
    similarity: Tensor,
    neighbours: int,
    temperature: float,
    form: str = "conditional",
    sequence: Tensor | None = None,
) -> Tensor:
    """L_r.

    Parameters
    ----------
    p, y : (T, N)
        Input and target probabilities of all T synthetic positions over the subset.
    similarity : (N, N)
        Cosine of the frozen text embeddings.
    neighbours, temperature : how many neighbours an item has, and τ
    form : one of `FORMS`
    sequence : (T,) int64
        The sequence of each position; only the form "sequences" reads it.
    """
    strength, near = similarity.clone().fill_diagonal_(-torch.inf).topk(min(neighbours, len(similarity) - 1))
    w = (strength / temperature).softmax(-1)
    if form == "conditional":
        q = (p.T @ y) / (p.sum(0)[:, None] + 1e-12)
    else:
        q = p.T
        if form == "sequences":
            together = p.new_zeros(int(sequence.max()) + 1, p.shape[1]).index_add(0, sequence, p)
            q = together.T @ together
        q = q / (q.sum(1, keepdim=True) + 1e-12)
    root = (q + 1e-12).sqrt()
    affinity = root @ root.T
    return (w * (1 - affinity.gather(1, near))).sum() / len(p.T)
