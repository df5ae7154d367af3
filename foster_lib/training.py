"""One trainer for real and for synthetic sequences."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from foster_lib.batches import Batch, make_batch, soft_cross_entropy
from foster_lib.encoder import fast_precision
from foster_lib.errors import FosterError
from foster_lib.optimizers import build_optimizer
from foster_lib.sasrec import SASRec
from foster_lib.splits import windows
from foster_lib.subsets import SyntheticBatch, real_loss, sample_subset


@dataclass(frozen=True)
class TrainSettings:
    """How a recommender is trained.

    epochs : passes over the data; batch_size : sequences; warmup : fraction of all steps with
    rising learning rate, then cosine to zero; clip : largest gradient norm; validate_every :
    epochs between validations, of which the best is kept; patience : validations without
    improvement before training stops (0: never); subset : items drawn per step for the softmax,
    beside those that the batch itself names (0: the whole catalogue); adapter_rate : the adapter's
    learning rate as a multiple of that of the rest; muon_rate : learning rate of weight matrices as a
    multiple of what AdamW would have, where Muon moves them (`optimizers`; 0: AdamW moves all);
    muon_momentum : Muon's momentum, less for few steps; mixed_precision : matrix products in bfloat16, about
    twice as fast on processors with AVX512-BF16 or AMX (on a GPU that has bfloat16, always).
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    epochs: int = 30
    batch_size: int = 64
    warmup: float = 0.1
    clip: float = 1.0
    validate_every: int = 1
    patience: int = 5
    subset: int = 0
    adapter_rate: float = 1.0
    muon_rate: float = 0.0
    muon_momentum: float = 0.95
    mixed_precision: bool = False


class TrainingData(Protocol):
    """Anything that yields the batches of an epoch and knows a model's loss on one of them."""

    def batches(self, generator: np.random.Generator) -> Iterable[Batch | SyntheticBatch]: ...

    def loss(self, model: SASRec, batch: Batch | SyntheticBatch) -> Tensor: ...


@dataclass(frozen=True)
class RealSequences:
    """Windows of real sequences, cut and shuffled anew each epoch, similar lengths together.

    timestamps : where given, interactions of one user with equal timestamps have no order of
    their own (a page of ratings, a basket): each epoch draws one.
    subset : N of the `n_items` items of the catalogue that a step's softmax runs over, beside the
    targets; a drawn item's weight makes up for those left out (`Subset.including`). 0: all items.
    """

    sequences: list[np.ndarray]
    length: int
    batch_size: int
    timestamps: list[np.ndarray] | None = None
    n_items: int = 0
    subset: int = 0

    def batches(self, generator: np.random.Generator) -> Iterable[Batch]:
        sequences = self.sequences
        if self.timestamps is not None:
            sequences = [shuffle_ties(s, t, generator) for s, t in zip(sequences, self.timestamps)]
        pieces = windows(sequences, self.length, generator)
        order = generator.permutation(len(pieces))
        bucket = 32 * self.batch_size
        groups = []
        for start in range(0, len(order), bucket):
            part = sorted(order[start : start + bucket], key=lambda i: len(pieces[i]))
            groups += [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        for index in generator.permutation(len(groups)):
            batch = make_batch([pieces[i] for i in groups[index]])
            if 0 < self.subset < self.n_items:
                drawn = sample_subset(self.n_items, self.subset, generator)
                batch = replace(batch, subset=drawn.including(batch.targets))
            yield batch

    def loss(self, model: SASRec, batch: Batch) -> Tensor:
        """Mean cross-entropy of the next item."""
        if batch.subset is None:
            return sequence_loss(model, batch, model.features())
        return real_loss(model, batch, batch.subset, teacher=None)


def shuffle_ties(sequence: np.ndarray, timestamps: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The sequence with the items of equal timestamps in random order."""
    return sequence[np.lexsort((generator.random(len(sequence)), timestamps))]


def sequence_loss(model: SASRec, batch: Batch, features: Tensor) -> Tensor:
    """Mean cross-entropy of the next item over all items of `features` (full softmax)."""
    hidden = model(batch.inputs, features)[batch.mask]
    return soft_cross_entropy(model.scores(hidden, features), batch.targets)


@dataclass
class TrainLog:
    """What happened: losses per epoch, validation figures by epoch, and the epoch that was kept."""

    losses: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)
    best_epoch: int = 0
    seconds: float = 0.0
    steps: int = 0


def train(
    model: SASRec,
    data: TrainingData,
    settings: TrainSettings,
    *,
    seed: int,
    validate: Callable[[SASRec], float] | None = None,
    on_epoch: Callable[[int, SASRec], None] | None = None,
    device: str = "cpu",
    progress: str = "",
) -> TrainLog:
    """Train `model` in place with AdamW or Muon; end with the weights that validated best.

    Parameters
    ----------
    data : TrainingData
        `RealSequences` or `synthetic_data.SyntheticData`.
    seed : int
        Of the order of the data; dropout and initial weights have the model's own generator.
    validate : callable, optional
        Higher is better. The weights before the first step take part, as epoch 0.
    on_epoch : callable, optional
        Called with the epoch and the model before training and after each epoch; records the
        trajectory of checkpoints.
    progress : str
        Label of the progress bar; empty: no bar.

    Raises
    ------
    FosterError
        If the loss stops being finite.
    """
    start = time.perf_counter()
    generator = np.random.default_rng(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rates = (settings.learning_rate, settings.adapter_rate, settings.weight_decay)
    optimizer = build_optimizer(model, *rates, settings.muon_rate, settings.muon_momentum)
    on_gpu = torch.device(device).type == "cuda"
    mixed = fast_precision(device) == "bf16" if on_gpu else settings.mixed_precision
    log, best, best_state = TrainLog(), -math.inf, None

    def check(epoch: int) -> None:
        nonlocal best, best_state
        log.validation[epoch] = figure = validate(model)
        if figure > best:
            best, log.best_epoch = figure, epoch
            best_state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    if on_epoch:
        on_epoch(0, model)
    if validate:
        check(0)
    bar = tqdm(total=settings.epochs, desc=progress, unit="epoch", disable=not progress)
    for epoch in range(1, settings.epochs + 1):
        model.train()
        losses = []
        batches = list(data.batches(generator))  # their number differs a little between epochs
        for number, batch in enumerate(batches):
            batch = batch.to(device)
            done = (epoch - 1 + (number + 0.5) / len(batches)) / settings.epochs
            for group in optimizer.param_groups:
                group["lr"] = group["full_rate"] * warmup_cosine(done, settings.warmup)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=mixed):
                loss = data.loss(model, batch)
            if not torch.isfinite(loss):
                raise FosterError(
                    f"the loss is {loss.item()} at step {log.steps} (epoch {epoch}): training has diverged. "
                    "Lower the learning rate or the clip."
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            losses.append(loss.detach())
            log.steps += 1
        bar.update()
        log.losses.append(float(torch.stack(losses).mean()))
        if on_epoch:
            on_epoch(epoch, model)
        if validate and (epoch % settings.validate_every == 0 or epoch == settings.epochs):
            check(epoch)
            bar.set_postfix(loss=f"{log.losses[-1]:.3f}", validation=f"{log.validation[epoch]:.4f}")
            waited = sum(e > log.best_epoch for e in log.validation)
            if settings.patience and waited >= settings.patience:
                break
    bar.close()
    if best_state is not None:
        model.load_state_dict(best_state)
    model.eval()
    log.seconds = time.perf_counter() - start
    return log


def warmup_cosine(done: float, warmup: float) -> float:
    """Learning-rate factor after the fraction `done` of training: linear rise over `warmup`, then cosine to zero."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
