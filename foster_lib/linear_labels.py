"""Labels of a linear model: where S starts if nobody shall train on all data first.

EASE (`linear.ease`) has a closed form: one matrix is inverted where a full-data teacher needs epochs. A label is
softmax_j(s Σ_i w_i B_ij) over the history i of its position, w_i falling with age.

S holds it as any label, as a query z over item features f(e) of an adapter. Both are fitted to the labels, from the
untrained model's adapter, by stochastic gradient steps on some labels and items at a time,

    min over f, z   KL(y ‖ softmax(z · f)),

which makes what B knows of single items smooth in their texts: on MovieLens students of these labels rank better than
students of the exact ones. Of which items are alike, f then says what B does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from foster_lib.condense import BITS, _optimizer, divergence, drawn
from foster_lib.coresets import ALIKE
from foster_lib.evaluation import Scorer
from foster_lib.importance import ImportanceSampler
from foster_lib.linear import ease
from foster_lib.sasrec import adapt
from foster_lib.selection import cluster_medoids
from foster_lib.synthetic import ORDERS, SyntheticSequences
from foster_lib.task import Task
from foster_lib.training import warmup_cosine

STEPS, LABELS, ITEMS, SHARE = 600, 1000, 2048, 0.5
"""Steps of the fit; labels and items that one step looks at; share of the items' draws that go where labels are."""


@dataclass(frozen=True)
class LinearSettings:
    """regularisation, decay : λ of EASE and w_i = decay^age, see `linear.ease`; label_sharpness : s"""

    regularisation: float = 400.0
    decay: float = 0.9
    label_sharpness: float = 60.0


def linear_start(
    task: Task, sequences: int, seed: int, settings: LinearSettings, window: int = 0
) -> SyntheticSequences:
    """Real histories with a linear model's labels; nothing has been trained on all data.

    window : positions that one user's history fills; 0: as many as the model reads at a time. Users are medoids of
        clusters of similar texts (`selection.cluster_medoids`); what a history leaves empty is filled with the linear
        model's most probable other items.
    """
    window = window or task.length
    count = task.sequence_length // window
    chosen = cluster_medoids(replace(task, synthetic_length=window), sequences * count, seed).joined(count)
    score = ease(task, regularisation=settings.regularisation, decay=settings.decay)
    chosen = continued(chosen, score, window)
    exact, orders = exact_labels(task, chosen, score, settings.label_sharpness)
    return fitted(task, chosen, exact, orders, seed)


def kd_linear(task: Task, sequences: int, seed: int, **parameters) -> SyntheticSequences:
    """The start as it is, nothing distilled, as Table 2 calls it; parameters are those of `LinearSettings`."""
    return linear_start(task, sequences, seed, LinearSettings(**parameters))


def continued(chosen: SyntheticSequences, score: Scorer, length: int) -> SyntheticSequences:
    """Fill each window of `length` positions, one item at a time: the best that is not in it yet."""
    items, targets, mask = (part.reshape(-1, length).clone() for part in (chosen.items, chosen.targets, chosen.mask))
    while len(rows := (~mask).any(1).nonzero()[:, 0]):
        end = mask[rows].sum(1)
        items[rows, end] = targets[rows, end - 1]
        seen = [items[row, : count + 1] for row, count in zip(rows, end)]
        scores = score([history.numpy() for history in seen])
        for own, history in zip(scores, seen):
            own[history] = -torch.inf
        targets[rows, end] = scores.argmax(1)
        mask[rows, end] = True
    whole = {"items": items, "targets": targets, "mask": mask}
    return replace(chosen, **{name: part.reshape(chosen.items.shape) for name, part in whole.items()})


def exact_labels(
    task: Task, chosen: SyntheticSequences, score: Scorer, sharpness: float
) -> tuple[Tensor, Tensor | None]:
    """Logits of the labels of all positions that have a target, in each of the task's readings.

    Returns
    -------
    (T, R, |V|), and the `SyntheticSequences.orders` of the further readings
    """
    row, orders = torch.arange(len(chosen))[:, None], []
    number_of = torch.zeros(chosen.mask.shape, dtype=torch.long)
    number_of[chosen.mask] = torch.arange(int(chosen.mask.sum()))
    labels = torch.zeros(int(chosen.mask.sum()), task.readings, task.n_items)
    for reading in range(task.readings):
        order = torch.arange(chosen.items.shape[1]).expand(len(chosen), -1)
        if reading:
            order = ORDERS[task.order](chosen.mask, task.length, reading, task.readings)
            orders.append(order)
        place = order.clamp(min=0)
        there = chosen.mask[row, place] & (order >= 0)
        scores = score(histories(chosen.items[row, place], there, task.length))
        labels[number_of[row, place][there], reading] = sharpness * scores.float()
    return labels, torch.stack(orders, 2) if orders else None


def histories(items: Tensor, mask: Tensor, length: int) -> list[np.ndarray]:
    """What is read before each target, in the order of `mask`: the window's items up to its position.

    items, mask : (n, P), P a multiple of `length`; the positions of a window that have a target come first.
    """
    windows = items.reshape(-1, length).numpy()
    return [windows[row, : place + 1] for row, place in mask.reshape(-1, length).nonzero().tolist()]


def fitted(
    task: Task, chosen: SyntheticSequences, exact: Tensor, orders: Tensor | None, seed: int, steps: int = STEPS
) -> SyntheticSequences:
    """`chosen` with labels z over features f(e) fitted to the logits `exact`, (T, R, |V|)."""
    embeddings, readings, device = task.embeddings, exact.shape[1], task.device
    exact = exact.flatten(0, 1)
    adapter = {name: t.clone().requires_grad_() for name, t in task.new_model(seed).adapter_weights().items()}
    with torch.no_grad():
        mass = sum(part.softmax(-1).sum(0) for part in exact.split(1000))
        z = nearest(exact, adapt(embeddings, adapter).cpu()).to(device).requires_grad_()
    sampler, generator = ImportanceSampler(mass, ITEMS, SHARE), np.random.default_rng(seed)
    optimizer = _optimizer(adapter, {"z": z})  # at the learning rates of `condense`
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["full_rate"] * warmup_cosine((step + 0.5) / steps, 0.03)
        subset = sampler.draw(generator)
        some = torch.from_numpy(drawn(len(z), LABELS, generator))
        known = (exact[some[:, None], subset.items] + subset.log_weight).to(device)
        f = adapt(embeddings[subset.items.to(device)], adapter)
        loss = divergence(known, z[some.to(device)] @ f.T + subset.log_weight.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    labels = torch.zeros(*chosen.mask.shape, readings, z.shape[1])
    labels[chosen.mask] = z.detach().cpu().unflatten(0, (-1, readings))
    further = {"further_labels": labels[:, :, 1:], "orders": orders} if orders is not None else {}
    own = {"labels": labels[:, :, 0], "alike": torch.tensor(ALIKE), "bits": BITS, "adapter": adapter}
    return replace(chosen, **own, **further).detached()


def nearest(logits: Tensor, f: Tensor) -> Tensor:
    """Queries z whose scores of `f` (|V|, k) are nearest to `logits` (T, |V|), but for a constant: (T, k)."""
    f = (f - f.mean(0)).double()
    solved = torch.linalg.solve(f.T @ f + 1e-2 * torch.eye(f.shape[1], dtype=f.dtype), f.T)
    parts = [(part.double() - part.double().mean(1, keepdim=True)) @ solved.T for part in logits.split(1000)]
    return torch.cat(parts).float()
