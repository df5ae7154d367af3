"""Whether a handful of sequences has collapsed: what it speaks of, and whom its student serves.

Of real data the same is measured, which is what the figures are to be compared with.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from foster_lib.methods import get_method
from foster_lib.records import read_ranks
from foster_lib.runs import Run, load_once, make_task
from foster_lib.splits import make_split

HEAD, TAIL = 0.1, 0.5
"""Shares of the catalogue that count as popular and as rare, by interactions in training."""


def collapse_figures(run: Run) -> dict[str, float]:
    """Figures of a finished run.

    Returns
    -------
    dict with
        `ndcg_head`, `ndcg_tail`: NDCG@10 of the test queries whose target is a popular, or a rare, item;
        and of a method that condenses, or of full data:
        `head_share`, `tail_share`: shares of the targets' probability on popular and on rare items;
        `gini`: of that probability over the catalogue (0: the same on every item);
        `diversity`: mean text distance (1 − cosine) of two inputs of one sequence;
        `coverage`: distinct most probable targets (not of full data).
    """
    method, task = get_method(run.method), make_task(run)
    popularity = np.bincount(np.concatenate(task.train), minlength=task.n_items)
    order = np.argsort(-popularity, kind="stable")
    head, tail = order[: round(HEAD * task.n_items)], order[-round(TAIL * task.n_items) :]
    settings, ndcg = run.settings, read_ranks(run.path).per_user("ndcg@10")
    targets = make_split(load_once(settings.dataset), settings.split).test.targets
    figures = {}
    for name, items in (("ndcg_head", head), ("ndcg_tail", tail)):
        own = ndcg[np.isin(targets, items)]
        figures[name] = float(own.mean()) if len(own) else np.nan
    embeddings = task.embeddings.cpu()
    text = F.normalize(embeddings, dim=-1)
    if method.condenses:
        stored = method.form.load(run.distilled_path)
        inputs = stored.input_probabilities(embeddings).argmax(-1)
        y = stored.target_probabilities(embeddings)[stored.mask]
        sequences = [text[row[real]] for row, real in zip(inputs, stored.mask)]
        mass, figures["coverage"] = y.double().sum(0).numpy(), len(y.argmax(-1).unique())
    elif run.method == "full":
        sequences = [text[sequence[:-1]] for sequence in task.train]
        mass = np.bincount(np.concatenate([sequence[1:] for sequence in task.train]), minlength=task.n_items)
    else:
        return figures
    figures |= {"head_share": float(mass[head].sum() / mass.sum()), "tail_share": float(mass[tail].sum() / mass.sum())}
    return figures | {"gini": gini(mass), "diversity": float(np.mean([diversity(s) for s in sequences if len(s) > 1]))}


def gini(mass: np.ndarray) -> float:
    """Gini coefficient of a distribution over items: mean absolute difference of two items, over twice the mean."""
    ordered, count = np.sort(mass.astype(float)), len(mass)
    return float((2 * np.arange(1, count + 1) - count - 1) @ ordered / (count * ordered.sum()))


def diversity(text: Tensor) -> float:
    """Mean 1 − cosine over pairs of different positions; `text` are (n, width) embeddings of length 1, n > 1."""
    count = len(text)
    return float(1 - (text.sum(0).square().sum() - count) / (count * (count - 1)))
