"""TD3: Tucker-factored synthetic sequences, distilled through unrolled training.

Zhang et al., WWW 2025, arXiv 2502.02854. The item probabilities of n sequences of R positions are

    P[a, b, :] = softmax_c Σ_ijk G[i, j, k] U[a, i] T[b, j] V[c, k],

with factors U (n × d₁) of the sequences, T (R × d₂) of the positions, a core G (d₁ × d₂ × d₃) and
item factors V (|V| × d₃) that do not learn. Here V are the item features s · f(e) of the full-data teacher's
labels, e the text embeddings, so only U, T and G are learned: a few thousand numbers,
whatever the catalogue. One outer step of `distill`:

1. P from the factors; at the start of an outer epoch the student becomes a random checkpoint of
   full-data training;
2. the student trains on P by Adam, for a number of steps drawn at random, nothing recorded;
3. W further steps are unrolled on a copy (steps 2 and 3: random truncated backpropagation through
   time, RaT-BPTT, Feng et al. 2024); the student goes on from step 2 in the next outer step;
4. L_real(θ) on real windows, cross-entropy plus distance to the teacher's hidden states, is
   differentiated through the W steps and P to U, T, G.

The inner loss predicts the last position of each sequence and, as augmentation, one more position
drawn at random: the sequence cut off there.
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
    unroll,
)

TARGETS = ("last", "cut", "all")
STARTS = ("noise", "real", "teacher")


@dataclass(frozen=True)
class TD3Settings:
    """All constants of the distillation.

    outer_steps : steps on the factors
    outer_epoch : outer steps between two resets of the student
    inner_steps : T, most steps of the student before L_real is read
    window : W, how many of them are differentiated
    random_window : end the window at a random step of W … T; if not, at T (plain truncation)
    checkpoints : how many of the trajectory's checkpoints, from its start, resets are drawn from (0: all)
    rank : d₁ = d₂
    start : of the factors: "noise", as in the paper; nearest to the "real" sequences that FOSTER starts at, or to what
        the "teacher" expects at each of their positions
    batch : sequences per inner step, taken in turn (0: all)
    targets : of the inner loss: "last" position, and one at a random "cut", or "all" positions
    alignment : weight of the distance to the teacher's hidden states in L_real
    windows : real windows per outer step
    subset : N, items drawn per outer step (0: the whole catalogue, as in the paper)
    learning_rate, weight_decay, clip : of the Adam on U, T, G, and its largest gradient norm
    inner_learning_rate, dropout : of the student
    """

    outer_steps: int = 300
    outer_epoch: int = 24
    inner_steps: int = 40
    window: int = 8
    random_window: bool = True
    checkpoints: int = 0
    rank: int = 8
    start: str = "teacher"
    batch: int = 10
    targets: str = "cut"
    alignment: float = 1.0
    windows: int = 32
    subset: int = 0
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    clip: float = 1.0
    inner_learning_rate: float = 5e-3
    dropout: float = 0.1


# ------------------------------------------------------------------- parametrisation


def tucker_queries(users: Tensor, times: Tensor, core: Tensor) -> Tensor:
    """Σ_ij G[i, j, :] U[a, i] T[b, j]: (n, d₁), (R, d₂), (d₁, d₂, d₃) to (n, R, d₃)."""
    return torch.einsum("ai,bj,ijk->abk", users, times, core)


def start_factors(sequences: int, positions: int, rank: int, width: int, seed: int) -> list[Tensor]:
    """U and T from N(0, 0.02²), G from Kaiming's normal distribution, as the paper's code draws them."""
    generator = torch.Generator().manual_seed(seed)
    users = torch.empty(sequences, rank).normal_(0.0, 0.02, generator=generator)
    times = torch.empty(positions, rank).normal_(0.0, 0.02, generator=generator)
    core = torch.nn.init.kaiming_normal_(torch.empty(rank, rank, width), generator=generator)
    return [users, times, core]


def nearest_factors(queries: Tensor, rank: int) -> list[Tensor]:
    """U, T and G whose queries are nearest, for factors of this rank, to those given, (n, R, d₃).

    The truncated higher-order singular value decomposition, grown to the norm of what it stands for, with columns of
    U and T of unit mean square.
    """
    users = _directions(queries.flatten(1), rank)
    times = _directions(queries.transpose(0, 1).flatten(1), rank)
    core = torch.einsum("abk,ai,bj->ijk", queries, users, times) / (len(users) * len(times))
    return [users, times, core * (queries.norm() / tucker_queries(users, times, core).norm())]


def _directions(rows: Tensor, rank: int) -> Tensor:
    """The `rank` left singular vectors of largest value, with entries of unit mean square; zeros if there are fewer."""
    left = torch.linalg.svd(rows, full_matrices=False).U[:, :rank] * len(rows) ** 0.5
    return torch.nn.functional.pad(left, (0, rank - left.shape[1]))


@dataclass(frozen=True)
class TuckerSequences(FactoredSequences):
    """`SyntheticSequences` that are stored as the factors U (`users`), T (`times`), G (`core`).

    A position's query is z = Σ_ij G U T, over the item features f(e) of `adapter`; its target is
    the mixture of the next position.
    """

    users: Tensor | None = None
    times: Tensor | None = None
    core: Tensor | None = None

    FACTORS: ClassVar[tuple[str, ...]] = ("users", "times", "core", "adapter")

    @classmethod
    def from_factors(cls, **factors) -> TuckerSequences:
        queries = tucker_queries(factors["users"], factors["times"], factors["core"])
        # The item features are a teacher's, so that students learn from them which items are alike, as with any labels.
        return cls(**cls.tensors_of(queries), alike=torch.tensor(ALIKE), **factors)


# ----------------------------------------------------------------------- the algorithm


def draw_rows(targets: str, sequences: int, positions: int, seed: tuple[int, int]) -> Tensor | None:
    """Target positions of the inner loss, (n, 1 or 2); None: all.

    A cut lies in 5 … R − 2, as in the paper, or as near to that as short sequences allow.
    """
    if targets == "all":
        return None
    last = torch.full((sequences, 1), positions - 1)
    if targets == "last":
        return last
    low = max(1, min(5, positions - 2))
    cut = np.random.default_rng(seed).integers(low, max(low + 1, positions - 1), (sequences, 1))
    return torch.cat([last, torch.from_numpy(cut)], 1)


def inner_loss(student: FlatModel, items: Tensor | None, settings: TD3Settings, base: int) -> InnerLoss:
    """L_syn as a function of θ, P and the inner step, which with `base` seeds the cuts and the dropout."""

    def loss(theta: Tensor, p: Tensor, step: int) -> Tensor:
        p = in_turn(p, settings.batch, step)
        rows = draw_rows(settings.targets, len(p), p.shape[1], (base, step))
        rows = rows if rows is None else rows.to(p.device)
        return student(theta, mixture_loss, p, items, rows, dropout_seed=base + step)

    return loss


def rat_bptt(loss: InnerLoss, theta: Tensor, p: Tensor, before: int, window: int, adam: Adam) -> tuple[Tensor, Tensor]:
    """`before` ordinary steps on P, then `window` differentiable ones: θ after both, and θ between them."""
    state = descend(loss, AdamState.start(theta), p, before, adam)[-1]
    return unroll(loss, state, p, window, adam).theta, state.theta


def distill(
    task: Task,
    sequences: int,
    settings: TD3Settings,
    *,
    seed: int,
    progress: str = "",
    on_step: Callable | None = None,
) -> tuple[TuckerSequences, list[float]]:
    """Run the algorithm; needs a teacher and a trajectory of full-data training.

    on_step : called after each outer step with its number and a function that returns S so far.

    Returns
    -------
    TuckerSequences, and the course of L_real.
    """
    check_settings(settings)
    generator = np.random.default_rng(seed)
    teacher, trajectory = task.teacher, task.trajectory[: settings.checkpoints or None]
    labelled = start_sequences(task, sequences, seed)
    features, scale = labelled.features(task.embeddings.cpu()), float(teacher.log_scale.detach().exp())
    item_factors = (scale * features).to(task.device)  # V
    if settings.start == "noise":
        start = start_factors(sequences, task.sequence_length + 1, settings.rank, features.shape[1], seed)
    else:
        mixtures = real_mixtures if settings.start == "real" else expected_mixtures
        start = nearest_factors(mixtures(labelled, features, scale) / scale, settings.rank)
    factors = [tensor.to(task.device).requires_grad_() for tensor in start]
    descent = FactorDescent(factors, settings, settings.weight_decay)
    student = FlatModel(with_dropout(task, settings.dropout).new_model(seed))
    adam, history = Adam(settings.inner_learning_rate), []

    def made() -> TuckerSequences:
        users, times, core = (tensor.detach().cpu().clone() for tensor in factors)
        return TuckerSequences.from_factors(users=users, times=times, core=scale * core, adapter=labelled.adapter)

    bar = tqdm(range(settings.outer_steps), desc=progress, unit="step", disable=not progress)
    for outer in bar:
        if outer % settings.outer_epoch == 0:
            theta = student.load(trajectory[generator.integers(len(trajectory))])
        subset = draw_subset(task, settings.subset, generator)
        items = subset.items if subset else None
        p = (tucker_queries(*factors) @ (item_factors if subset is None else item_factors[items]).T).softmax(-1)
        loss = inner_loss(student, items, settings, int(generator.integers(2**31)))
        spare = settings.inner_steps - settings.window
        before = int(generator.integers(spare + 1)) if settings.random_window else spare
        real = RealBatch.draw(task, settings.windows, subset, generator)
        with torch.no_grad():
            known = real.last_hidden(teacher(real.batch.inputs, teacher.features(real.items)))
        with math_attention():
            trained, theta = rat_bptt(loss, theta, p, before, settings.window, adam)
            outer_loss = student(trained, real_loss, real, known, settings.alignment)
            gradients = torch.autograd.grad(outer_loss, factors)
        descent.step(gradients)
        history.append(float(outer_loss.detach()))
        bar.set_postfix(outer=f"{history[-1]:.3f}", refresh=False)
        if on_step:
            on_step(outer, made)
    return made(), history


def check_settings(settings: TD3Settings) -> None:
    """Raise `FosterError` for settings that cannot be run."""
    check_known(settings.targets, TARGETS, "targets of the inner loss")
    check_known(settings.start, STARTS, "start of TD3:")
    if not 0 < settings.window <= settings.inner_steps:
        raise FosterError(
            f"a window of {settings.window} does not fit into {settings.inner_steps} steps: choose 1 to that many."
        )


def td3(
    task: Task, sequences: int, seed: int, progress: str = "", on_step: Callable | None = None, **parameters
) -> SyntheticSequences:
    """The method as Table 2 calls it; parameters are those of `TD3Settings`."""
    settings = TD3Settings(**parameters)
    return distill(task, sequences, settings, seed=seed, progress=progress, on_step=on_step)[0]
