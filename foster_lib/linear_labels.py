"""Labels of a linear model: where S starts if nobody shall train on all data first.

EASE (`linear.ease`) has a closed form: one matrix is inverted where a full-data teacher needs epochs. It scores item j
after a history as Σ_i w_i B_ij, w_i falling with age. Beside it stands what the texts say without any data, their
similarity to those of the history (`linear.text_knn`): `linear_text` is the sum of both, each relative to its largest.
A label is softmax_j(c s_j), each with a c of its own (`sharpened`): where data are sparse the scores of EASE are ten
times smaller, and a softmax of them as they are would say nothing.

S holds it as any label, as a query z over item features f(e) of an adapter. Both are fitted to the labels, from the
untrained model's adapter, by stochastic gradient steps on some labels and items at a time,

    min over f, z, A   KL(y ‖ softmax(z · f)) + KL(y_i ‖ softmax([f_i, 1] A · f)),

y_i what follows item i on its own. That makes what B knows of single items smooth in their texts: on MovieLens students
of these labels rank better than students of the exact ones. Of which items are alike, f then says what the labels do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foster_lib.condense import BITS, _optimizer, divergence, drawn, least_squares
from foster_lib.coresets import ALIKE
from foster_lib.evaluation import Scorer
from foster_lib.importance import ImportanceSampler
from foster_lib.linear import ease, text_knn
from foster_lib.references import item_matrix
from foster_lib.sasrec import adapt
from foster_lib.selection import cluster_medoids
from foster_lib.synthetic import LIKENESS_ROWS, ORDERS, SyntheticSequences
from foster_lib.task import Task
from foster_lib.training import warmup_cosine

STEPS, LABELS, ITEMS, SHARE = 600, 1000, 2048, 0.5
"""Steps of the fit; labels and items that one step looks at; share of the items' draws that go where labels are."""


@dataclass(frozen=True)
class ScoreSettings:
    """regularisation, decay : λ of EASE and w_i = decay^age, see `linear.ease`
    text, text_decay : weight of the similarity of texts, and decay^age of the history's there, see `linear.text_knn`
    """

    regularisation: float = 400.0
    decay: float = 0.9
    text: float = 0.2
    text_decay: float = 0.6


@dataclass(frozen=True)
class LinearSettings(ScoreSettings):
    """Of the scores and the labels.

    label_margin : see `sharpened`
    successors : whether S tells what follows an item on its own, besides what follows the histories in it
    """

    label_margin: float = 0.5
    successors: bool = True


def linear_text(task: Task, sequences: int = 0, seed: int = 0, **parameters) -> Scorer:
    """What the labels say, as a row of its own; parameters are those of `ScoreSettings`."""
    return scorer(task, ScoreSettings(**parameters))


def scorer(task: Task, settings: ScoreSettings) -> Scorer:
    """EASE + similarity of texts, each relative to its largest.

    No text counts as similar to itself; EASE's diagonal is 0 as well.
    """
    linear = ease(task, regularisation=settings.regularisation, decay=settings.decay)
    texts = text_knn(task, decay=settings.text_decay)

    def score(histories: list[np.ndarray]) -> Tensor:
        seen = torch.from_numpy(item_matrix(histories, np.ones, task.n_items, binary=True).toarray()).bool()
        others = texts(histories).masked_fill(seen, 0.0)
        return relative(linear(histories).float()) + settings.text * relative(others)

    return score


def relative(scores: Tensor) -> Tensor:
    """Scores (…, |V|) over the largest for the same history; 0 where none is above 0."""
    top = scores.amax(-1, keepdim=True)
    return torch.where(top > 1e-6, scores / top.clamp(min=1e-6), 0.0)


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
    score = scorer(task, settings)
    chosen = continued(chosen, score, window)
    exact, orders = exact_labels(task, chosen, score)

    def follows(items: Tensor) -> Tensor:
        return sharpened(score([item.numpy() for item in items.split(1)]), settings.label_margin)

    exact = sharpened(exact, settings.label_margin)
    return fitted(task, chosen, exact, orders, seed, follows if settings.successors else None)


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


def exact_labels(task: Task, chosen: SyntheticSequences, score: Scorer) -> tuple[Tensor, Tensor | None]:
    """Scores at all positions that have a target, in each of the task's readings.

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
        labels[number_of[row, place][there], reading] = scores
    return labels, torch.stack(orders, 2) if orders else None


def histories(items: Tensor, mask: Tensor, length: int) -> list[np.ndarray]:
    """What is read before each target, in the order of `mask`: the window's items up to its position.

    items, mask : (n, P), P a multiple of `length`; the positions of a window that have a target come first.
    """
    windows = items.reshape(-1, length).numpy()
    return [windows[row, : place + 1] for row, place in mask.reshape(-1, length).nonzero().tolist()]


def sharpened(scores: Tensor, margin: float) -> Tensor:
    """Scores (…, |V|) times the c with which each label's largest is the logit ln |V| + `margin`.

    So that item is e^margin times as probable as all those together that have no score. Where nothing has one the label
    is uniform; a logit of less than the largest's negative does not count as more unlikely.
    """
    highest = math.log(scores.shape[-1]) + margin
    return (highest * relative(scores)).clamp(min=-highest)


def fitted(
    task: Task,
    chosen: SyntheticSequences,
    exact: Tensor,
    orders: Tensor | None,
    seed: int,
    follows: Callable[[Tensor], Tensor] | None = None,
    steps: int = STEPS,
) -> SyntheticSequences:
    """`chosen` with labels z over features f(e) fitted to logits.

    Parameters
    ----------
    exact : (T, R, |V|)
        Of the labels of T positions in R readings.
    follows : (M,) items to (M, |V|), optional
        Of what follows single items, to which A is fitted.
    """
    embeddings, readings, device = task.embeddings, exact.shape[1], task.device
    exact = exact.flatten(0, 1)
    adapter = {name: t.clone().requires_grad_() for name, t in task.new_model(seed).adapter_weights().items()}
    with torch.no_grad():
        f = adapt(embeddings, adapter).cpu()
        learnt = {"z": nearest(exact, f)}
        if follows:
            alone = torch.cat([nearest(follows(items), f) for items in torch.arange(task.n_items).split(1000)])
            learnt["A"] = least_squares(F.pad(f, (0, 1), value=1.0), alone)
    learnt = {name: tensor.to(device).requires_grad_() for name, tensor in learnt.items()}

    def after_one(items: Tensor) -> Tensor:
        f = adapt(embeddings[items.to(device)], adapter)
        return F.pad(f, (0, 1), value=1.0) @ learnt["A"]

    # How many there are, how many a step looks at, logits and queries of some of them: of labels, of single items.
    parts = [(len(exact), LABELS, exact.__getitem__, lambda some: learnt["z"][some.to(device)])]
    parts += [(task.n_items, LIKENESS_ROWS, follows, after_one)] if follows else []
    generator = np.random.default_rng(seed)
    optimizer = _optimizer(adapter, learnt)  # at the learning rates of `condense`
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["full_rate"] * warmup_cosine((step + 0.5) / steps, 0.03)
        drawn_rows = [torch.from_numpy(drawn(count, size, generator)) for count, size, _, _ in parts]
        known = [logits(rows) for rows, (_, _, logits, _) in zip(drawn_rows, parts)]
        # Few items are probable in a label, others in each: a subset holds those of this step's labels.
        mass = sum(logits.softmax(-1).mean(0) for logits in known)
        subset = ImportanceSampler(mass, ITEMS, SHARE).draw(generator)
        f, weight = adapt(embeddings[subset.items.to(device)], adapter), subset.log_weight.to(device)
        loss = sum(
            divergence(logits[:, subset.items].to(device) + weight, queries(rows) @ f.T + weight)
            for logits, rows, (_, _, _, queries) in zip(known, drawn_rows, parts)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    labels = torch.zeros(*chosen.mask.shape, readings, learnt["z"].shape[1])
    labels[chosen.mask] = learnt["z"].detach().cpu().unflatten(0, (-1, readings))
    further = {"further_labels": labels[:, :, 1:], "orders": orders} if orders is not None else {}
    own = {"labels": labels[:, :, 0], "alike": torch.tensor(ALIKE), "bits": BITS, "adapter": adapter}
    return replace(chosen, **own, **further, successors=learnt.get("A")).detached()


def nearest(logits: Tensor, f: Tensor) -> Tensor:
    """Queries z whose scores of `f` (|V|, k) are nearest to `logits` (T, |V|), but for a constant: (T, k)."""
    f = (f - f.mean(0)).double()
    solved = torch.linalg.solve(f.T @ f + 1e-2 * torch.eye(f.shape[1], dtype=f.dtype), f.T)
    parts = [(part.double() - part.double().mean(1, keepdim=True)) @ solved.T for part in logits.split(1000)]
    return torch.cat(parts).float()
