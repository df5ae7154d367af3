"""Farzi: a latent summary and a decoder, distilled by Adam differentiated backwards.

Sachdeva et al., 2023, arXiv 2310.09983. The item probabilities of n sequences of R positions are

    P[a, b, :] = softmax(D[a, b, :] · M),

a latent summary D (n × R × k) times a decoder M (k × |V|), both learned: the catalogue enters
through k numbers an item. One outer step of `distill`:

1. P from D and M; the student becomes a random checkpoint of full-data training;
2. it trains on P by T steps of Adam, recording θ, m and v only;
3. ∂L_real/∂θ of the next item on real windows is carried back through the T steps by reverse-mode
   Adam (`unrolled.reverse_adam`), one step's graph at a time, and on to D and M.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from foster_lib.coresets import ALIKE
from foster_lib.errors import FosterError, check_known
from foster_lib.factored import (
    FactorDescent,
    FactoredSequences,
    draw_subset,
    expected_mixtures,
    in_turn,
    real_mixtures,
    with_dropout,
)
from foster_lib.starts import start_sequences
from foster_lib.synthetic import SyntheticSequences
from foster_lib.task import Task
from foster_lib.unrolled import (
    Adam,
    AdamState,
    FlatModel,
    InnerLoss,
    RealBatch,
    descend,
    math_attention,
    mixture_loss,
    real_loss,
    reverse_adam,
)

STARTS = ("teacher", "real", "random")


@dataclass(frozen=True)
class FarziSettings:
    """All constants of the distillation.

    outer_steps : steps on D and M
    inner_steps : T, all of them differentiated
    checkpoints : how many of the trajectory's checkpoints, from its start, are drawn from (0: all)
    batch : sequences per inner step, taken in turn (0: all)
    latent : k
    start : of D and M: what the "teacher" expects at each position of real sequences, or these "real" ones, and its
        item features; or "random"
    windows : real windows per outer step
    subset : N, items drawn per outer step (0: the whole catalogue, as in the paper)
    learning_rate, clip : of the Adam on D and M, and its largest gradient norm
    inner_learning_rate, dropout : of the student
    """

    outer_steps: int = 300
    inner_steps: int = 10
    checkpoints: int = 0
    batch: int = 10
    latent: int = 64
    start: str = "teacher"
    windows: int = 32
    subset: int = 0
    learning_rate: float = 0.01
    clip: float = 1.0
    inner_learning_rate: float = 5e-3
    dropout: float = 0.1


@dataclass(frozen=True)
class LatentSequences(FactoredSequences):
    """`SyntheticSequences` stored as the summary D (`latent`, n × R × k) and the decoder M (`decoder`, k × |V|).

    They belong to one catalogue, item by item. A position's target is the mixture of the next one.
    """

    latent: Tensor | None = None
    decoder: Tensor | None = None

    FACTORS: ClassVar[tuple[str, ...]] = ("latent", "decoder")
    # Columns of M that began as a teacher's item features say which items are alike, as with any labels.
    OPTIONAL: ClassVar[tuple[str, ...]] = ("alike",)

    @classmethod
    def from_factors(cls, **factors) -> LatentSequences:
        return cls(**cls.tensors_of(factors["latent"]), **factors)

    def features(self, embeddings: Tensor) -> Tensor:
        """The decoder's column of each item, (|V|, k); the text embeddings only say how many items there are."""
        if len(embeddings) != self.decoder.shape[1]:
            raise FosterError(
                f"these sequences decode to {self.decoder.shape[1]} items, the catalogue has {len(embeddings)}: "
                "distil them for this catalogue."
            )
        return self.decoder.T


def start_factors(task: Task, sequences: int, settings: FarziSettings, seed: int) -> list[Tensor]:
    """D and M as `settings.start` says.

    M are the item features f(e) of the teacher's labels in their k principal directions Q, and D are the queries of
    FOSTER's start in the same, so that P = softmax(query · Q Qᵀ f(e)). The queries of "real" sequences are s · f of
    the item at a position, with the teacher's scale s; those of "teacher", what it expects there. "random": both from
    normal distributions.
    """
    check_known(settings.start, STARTS, "start of Farzi:")
    if settings.start == "random":
        generator = torch.Generator().manual_seed(seed)
        latent = torch.empty(sequences, task.sequence_length + 1, settings.latent).normal_(0, 0.02, generator=generator)
        return [latent, torch.empty(settings.latent, task.n_items).normal_(generator=generator)]
    labelled = start_sequences(task, sequences, seed)
    features, scale = labelled.features(task.embeddings.cpu()), float(task.teacher.log_scale.detach().exp())
    mixtures = real_mixtures if settings.start == "real" else expected_mixtures
    directions = torch.linalg.svd(features, full_matrices=False).Vh[: settings.latent].T
    return [mixtures(labelled, features, scale) @ directions, (features @ directions).T.contiguous()]


def meta_gradient(
    student: FlatModel, loss: InnerLoss, theta: Tensor, p: Tensor, real: RealBatch, steps: int, adam: Adam
) -> tuple[Tensor, float]:
    """∂L_real(θ_T)/∂P of a student that starts at θ and trains T = `steps` steps on P; and L_real(θ_T)."""
    states = descend(loss, AdamState.start(theta), p, steps, adam)
    trained = states[-1].theta.detach().requires_grad_()
    outer_loss = student(trained, real_loss, real)
    (d_theta,) = torch.autograd.grad(outer_loss, trained)
    return reverse_adam(loss, states, p, d_theta, adam), float(outer_loss.detach())


def distill(
    task: Task,
    sequences: int,
    settings: FarziSettings,
    *,
    seed: int,
    progress: str = "",
    on_step: Callable | None = None,
) -> tuple[LatentSequences, list[float]]:
    """Run the algorithm; needs a trajectory of full-data training.

    on_step : called after each outer step with its number and a function that returns S so far.

    Returns
    -------
    LatentSequences, and the course of L_real.
    """
    generator = np.random.default_rng(seed)
    trajectory = task.trajectory[: settings.checkpoints or None]
    factors = [tensor.to(task.device).requires_grad_() for tensor in start_factors(task, sequences, settings, seed)]
    latent, decoder = factors
    descent = FactorDescent(factors, settings)
    student = FlatModel(with_dropout(task, settings.dropout).new_model(seed))
    adam, history = Adam(settings.inner_learning_rate), []

    def made() -> LatentSequences:
        now = {name: tensor.detach().cpu().clone() for name, tensor in zip(LatentSequences.FACTORS, factors)}
        alike = {} if settings.start == "random" else {"alike": torch.tensor(ALIKE)}
        return LatentSequences.from_factors(**now, **alike)

    bar = tqdm(range(settings.outer_steps), desc=progress, unit="step", disable=not progress)
    for outer in bar:
        subset = draw_subset(task, settings.subset, generator)
        items = subset.items if subset else None
        p = (latent @ (decoder if subset is None else decoder[:, items])).softmax(-1)
        base = int(generator.integers(2**31))

        def loss(theta: Tensor, p: Tensor, step: int) -> Tensor:
            p = in_turn(p, settings.batch, step)
            return student(theta, mixture_loss, p, items, None, dropout_seed=base + step)

        real = RealBatch.draw(task, settings.windows, subset, generator)
        theta = student.load(trajectory[generator.integers(len(trajectory))])
        with math_attention():
            d_p, outer_loss = meta_gradient(student, loss, theta, p, real, settings.inner_steps, adam)
        descent.step(torch.autograd.grad(p, factors, d_p))
        history.append(outer_loss)
        bar.set_postfix(outer=f"{history[-1]:.3f}", refresh=False)
        if on_step:
            on_step(outer, made)
    return made(), history


def farzi(
    task: Task, sequences: int, seed: int, progress: str = "", on_step: Callable | None = None, **parameters
) -> SyntheticSequences:
    """The method as Table 2 calls it; parameters are those of `FarziSettings`."""
    settings = FarziSettings(**parameters)
    return distill(task, sequences, settings, seed=seed, progress=progress, on_step=on_step)[0]
