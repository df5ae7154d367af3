"""The co-occurrence regulariser L_r in its three forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from foster_lib.regulariser import FORMS, cooccurrence_regulariser

SEQUENCE = torch.tensor([0, 0, 0, 1, 1, 1, 1])


def use(p, y, k, form):
    """q_k, unnormalised sums first."""
    if form == "conditional":
        q = sum(p[t, k] * y[t] for t in range(7))
    elif form == "slots":
        q = torch.stack([p[t, k] for t in range(7)])
    else:
        q = sum(p[t, k] * p[u] for t in range(7) for u in range(7) if SEQUENCE[t] == SEQUENCE[u])
    return q / q.sum()


@pytest.mark.parametrize("form", FORMS)
def test_against_loops(form):
    """Each form of q by its definition, position by position, in float64."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(7, 5, generator=generator, dtype=torch.float64).softmax(-1)
    y = torch.rand(7, 5, generator=generator, dtype=torch.float64).mul(4).softmax(-1)
    text = F.normalize(torch.randn(5, 3, generator=generator, dtype=torch.float64), dim=-1)
    similarity = text @ text.T
    total = 0.0
    for i in range(5):
        near = sorted((j for j in range(5) if j != i), key=lambda j: -similarity[i, j])[:2]
        weights = np.exp([float(similarity[i, j]) / 0.1 for j in near])
        q = {k: use(p, y, k, form) for k in (i, *near)}
        for j, w in zip(near, weights / weights.sum()):
            total += w * (1 - float((q[i].sqrt() * q[j].sqrt()).sum()))
    value = float(cooccurrence_regulariser(p, y, similarity, 2, 0.1, form, SEQUENCE))
    assert value == pytest.approx(total / 5, abs=1e-9)


def test_pulls_items_of_identical_text_to_identical_conditionals():
    """Two items share their text; descending L_r alone makes what follows them alike."""
    generator = torch.Generator().manual_seed(0)
    z_p = torch.randn(12, 6, generator=generator, dtype=torch.float64).requires_grad_()
    z_y = torch.randn(12, 6, generator=generator, dtype=torch.float64).mul(2).requires_grad_()
    text = F.normalize(torch.randn(6, 4, generator=generator, dtype=torch.float64), dim=-1)
    text[1] = text[0]

    def distance():
        p, y = z_p.softmax(-1), z_y.softmax(-1)
        q = ((p.T @ y) / p.sum(0)[:, None]).detach()
        return float((q[0] - q[1]).abs().sum())

    before = distance()
    optimizer = torch.optim.Adam([z_p, z_y], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        cooccurrence_regulariser(z_p.softmax(-1), z_y.softmax(-1), text @ text.T, 1, 0.05).backward()
        optimizer.step()
    assert before > 0.1 and distance() < 0.1 * before
