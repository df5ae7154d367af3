"""Gradient and trajectory matching: two other objectives for FOSTER's sequences.

Both, and `distribution_matching`, learn the tensors of `foster.Synthesizer` (soft inputs and soft
targets over an item subset) from the same start, the row `kd-start`, so that a comparison is one of
objectives. θ is a recommender, θ*_t the t-th checkpoint of full-data training.

    gradient      Σ_layers 1 − cos(∇_θ L_real(θ), ∇_θ L_syn(θ; S))         DC, Zhao et al. 2021
    trajectory    ‖θ_N(S) − θ*_{t+M}‖² / ‖θ*_t − θ*_{t+M}‖²                 MTT, Cazenavette et al. 2022

θ_N(S) are the weights after N steps on S from θ*_t. Both differentiate through a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from foster_lib import coresets, unrolled
from foster_lib.errors import FosterError, check_known
from foster_lib.foster import FosterSettings, Synthesizer
from foster_lib.learners import Learner
from foster_lib.sasrec import SASRec
from foster_lib.starts import kd_start
from foster_lib.subsets import FeatureBank, Subset, SyntheticBatch, logits, sample_subset, synthetic_loss
from foster_lib.synthetic import SyntheticSequences
from foster_lib.task import Task
from foster_lib.training import Batch, make_batch, soft_cross_entropy
from foster_lib.unrolled import Adam, AdamState, FlatModel, adam_step, math_attention, plain_step

STARTS = ("teacher", "real")
Objective = Callable[[Synthesizer, np.random.Generator], Tensor]
"""Loss of S, differentiable with respect to `Synthesizer.tensors`; draws what it needs."""


# -------------------------------------------------------------------- start and descent


def start_sequences(task: Task, sequences: int, seed: int, start: str) -> SyntheticSequences:
    """What the synthetic tensors are at step 0.

    "teacher": where FOSTER starts. "real": n real sequences drawn at random, each label a
    softmax at the untrained model's own sharpness around the real next item; no teacher.
    """
    check_known(start, STARTS, "start")
    if start == "teacher":
        return kd_start(task, sequences, seed)
    chosen, fresh = coresets.random(task, sequences, seed), task.new_model(seed).requires_grad_(False)
    f = fresh.features()[chosen.targets.to(task.device)]
    return replace(chosen, adapter=fresh.adapter_weights(), labels=(fresh.log_scale.exp() * f).cpu())


def descend(
    task: Task,
    start: SyntheticSequences,
    objective: Objective,
    *,
    iterations: int,
    rates: tuple[float, float],
    seed: int,
    progress: str = "",
    also: Sequence[Tensor] = (),
    on_step: Callable | None = None,
) -> tuple[SyntheticSequences, list[float]]:
    """Minimise `objective` over S with FOSTER's optimiser: (S, course of the loss).

    `rates` are the learning rates of inputs and labels; `also` are tensors learned beside S (the
    step size of trajectory matching), at rate 0.01. `on_step` is called after each step with its
    number and a function that returns S so far.
    """
    settings = FosterSettings(input_learning_rate=rates[0], label_learning_rate=rates[1])
    synthetic = Synthesizer(start.to(task.device), task.embeddings, settings)
    beside = torch.optim.Adam(also, lr=0.01) if also else None
    generator, losses = np.random.default_rng(seed), []
    bar = tqdm(range(iterations), desc=progress, unit="step", disable=not progress)
    for iteration in bar:
        loss = objective(synthetic, generator)
        tensors = [*synthetic.tensors, *also]
        # Distribution matching without targets leaves the labels alone: their gradient is zero.
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
        if not all(torch.isfinite(gradient).all() for gradient in gradients):
            raise FosterError(f"matching diverged at iteration {iteration}: lower the learning rates.")
        own = len(synthetic.tensors)
        synthetic.step(list(gradients[:own]), (iteration + 0.5) / iterations)
        if beside:
            for tensor, gradient in zip(also, gradients[own:]):
                tensor.grad = gradient
            beside.step()
        losses.append(float(loss.detach()))
        bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
        if on_step:
            on_step(iteration, synthetic.result)
    return synthetic.result(), losses


# ------------------------------------------------------- real and synthetic, on a subset


def draw_real(
    task: Task, windows: int, subset: int, soft: bool, generator: np.random.Generator
) -> tuple[Batch, Subset, Tensor]:
    """Real windows, an item subset, and the windows' targets over it: (T, N) probabilities.

    The targets are the full-data teacher's (`soft`) or the real next items, which then join the
    subset.
    """
    drawn = generator.choice(len(task.windows), min(windows, len(task.windows)), replace=False)
    real = make_batch([task.windows[i] for i in drawn]).to(task.device)
    items = sample_subset(task.n_items, subset, generator).to(task.device)
    if not soft:
        items = items.including(real.targets)
        return real, items, nn.functional.one_hot(items.positions(real.targets)[0], len(items.items)).float()
    with torch.no_grad():
        bank = FeatureBank(task.labeller, items.items, real.inputs)
        hidden = task.labeller.transform(bank(real.inputs))[real.mask]
        return real, items, task.labeller.scores(hidden, bank(items.items)).softmax(-1)


def draw_checkpoint(task: Task, checkpoints: int, generator: np.random.Generator) -> dict[str, Tensor]:
    """Weights of one of the first checkpoints of full-data training."""
    early = task.trajectory[:checkpoints]
    return early[generator.integers(len(early))]


# -------------------------------------------------------------------- gradient matching


def matrices(model: nn.Module) -> list[Tensor]:
    """The weights whose gradients are matched: as in DC's code, no biases, norms or scalars."""
    return [p for p in model.parameters() if p.requires_grad and p.dim() > 1]


def gradient_distance(real: Sequence[Tensor], synthetic: Sequence[Tensor], by_row: bool = False) -> Tensor:
    """Σ 1 − cos over layers, or (`by_row`) over the layers' output units, as in DC, eq. 7.

    Where the real gradient is zero there is nothing to match.
    """
    total = torch.zeros((), dtype=synthetic[0].dtype, device=synthetic[0].device)
    for a, b in zip(real, synthetic):
        a, b = (a, b) if by_row else (a.reshape(1, -1), b.reshape(1, -1))
        given = a.norm(dim=-1) > 0
        total = total + (1 - nn.functional.cosine_similarity(a[given], b[given], dim=-1, eps=1e-12)).sum()
    return total


def gradient_loss(model: SASRec, batch: SyntheticBatch, real: Sequence[Tensor], by_row: bool = False) -> Tensor:
    """DC's objective for one model and the real gradient of its `matrices`; differentiable in S."""
    with math_attention():
        synthetic = torch.autograd.grad(synthetic_loss(model, batch), matrices(model), create_graph=True)
    return gradient_distance(real, synthetic, by_row)


def gradient_matching(
    task: Task,
    sequences: int,
    seed: int,
    progress: str = "",
    *,
    start: str = "teacher",
    iterations: int = 800,
    subset: int = 512,
    windows: int = 32,
    network_steps: int = 2,
    network_learning_rate: float = 5e-3,
    dropout: float = 0.1,
    reset_every: int = 50,
    checkpoints: int = 3,
    by_row: bool = False,
    input_learning_rate: float = 0.01,
    label_learning_rate: float = 0.003,
    on_step: Callable | None = None,
) -> SyntheticSequences:
    """DC (arXiv 2006.05929, algorithm 1): S's gradients shall point where real ones do.

    Parameters
    ----------
    start : see `start_sequences`
    iterations : steps on S; subset : items drawn per step; windows : real windows per step
    network_steps, network_learning_rate, dropout : the network trains on S between two steps on S
    reset_every : iterations after which a network gives way to the next
    checkpoints : networks start at one of the trajectory's first checkpoints
    by_row : cosine per output unit instead of per layer
    input_learning_rate, label_learning_rate : of Adam on S
    on_step : see `descend`
    """
    soft = start == "teacher"
    first = start_sequences(task, sequences, seed, start)
    own = replace(task, model_settings=replace(task.model_settings, dropout=dropout))
    network = Learner(own.new_model(seed), network_learning_rate)
    network.model.eval()
    served = reset_every

    def objective(synthetic: Synthesizer, generator: np.random.Generator) -> Tensor:
        nonlocal served
        if served == reset_every:
            network.reset(draw_checkpoint(task, checkpoints, generator))
            served = 0
        served += 1
        real, items, targets = draw_real(task, windows, subset, soft, generator)
        batch = synthetic.batch(items)
        model, fixed = network.model, batch.detached()
        for _ in range(network_steps if served > 1 else 0):
            network.step(lambda m: synthetic_loss(m, fixed))
        bank = FeatureBank(model, items.items, real.inputs)
        hidden = model.transform(bank(real.inputs))[real.mask]
        loss = soft_cross_entropy(logits(model, hidden, bank(items.items), items), targets)
        return gradient_loss(model, batch, torch.autograd.grad(loss, matrices(model)), by_row)

    rates = (input_learning_rate, label_learning_rate)
    return descend(
        task, first, objective, iterations=iterations, rates=rates, seed=seed, progress=progress, on_step=on_step
    )[0]


# ------------------------------------------------------------------ trajectory matching


def unroll(
    model: SASRec,
    weights: dict[str, Tensor],
    batch: SyntheticBatch,
    steps: int,
    rate: Tensor,
    adam: bool,
    epsilon: float = 1e-6,
) -> dict[str, Tensor]:
    """θ_N(S): `steps` steps on L_syn from `weights`, differentiable in S and in `rate`.

    Plain gradient descent, or Adam with its usual constants; Adam's √v + ε becomes √(v + ε²),
    whose derivative stays finite where a gradient is zero.
    """
    student = FlatModel(model)

    def loss(theta: Tensor, batch: SyntheticBatch, step: int) -> Tensor:
        return student(theta, synthetic_loss, batch)

    begin, constants = AdamState.start(student.vector(weights)), Adam(rate, epsilon=0.0, floor=epsilon**2)
    with math_attention():
        end = unrolled.unroll(loss, begin, batch, steps, constants, adam_step if adam else plain_step)
    return student.named(end.theta)


def trajectory_distance(end: dict[str, Tensor], target: dict[str, Tensor], begin: dict[str, Tensor]) -> Tensor:
    """‖θ_N − θ*_{t+M}‖² / ‖θ*_t − θ*_{t+M}‖² over the tensors named in `end`: 1 is standing still."""
    remaining = sum((end[name] - target[name]).square().sum() for name in end)
    return remaining / sum((begin[name] - target[name]).square().sum() for name in end)


def trajectory_matching(
    task: Task,
    sequences: int,
    seed: int,
    progress: str = "",
    *,
    start: str = "teacher",
    iterations: int = 250,
    subset: int = 512,
    steps: int = 8,
    expert_epochs: int = 2,
    checkpoints: int = 3,
    adam: bool = True,
    rate: float = 5e-3,
    input_learning_rate: float = 0.01,
    label_learning_rate: float = 0.003,
    on_step: Callable | None = None,
) -> SyntheticSequences:
    """MTT (arXiv 2203.11932, algorithm 1): N steps on S shall lead where M epochs of all data do.

    Parameters
    ----------
    start : see `start_sequences`
    iterations : steps on S; subset : items drawn per iteration, for all its unrolled steps
    steps : N; expert_epochs : M; checkpoints : t is drawn from 0 … checkpoints − 1
    adam, rate : the unrolled optimiser and its step size at the start; the step size is learned
    input_learning_rate, label_learning_rate : of Adam on S
    on_step : see `descend`
    """
    if len(task.trajectory) < checkpoints + expert_epochs:
        raise FosterError(
            f"trajectory matching needs checkpoints of {checkpoints + expert_epochs - 1} epochs, the full-data run has "
            f"{len(task.trajectory) - 1}: lower checkpoints or expert_epochs, or train longer."
        )
    first = start_sequences(task, sequences, seed, start)
    model = task.new_model(seed).eval()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    log_rate = torch.tensor(float(np.log(rate)), device=task.device).requires_grad_()

    def objective(synthetic: Synthesizer, generator: np.random.Generator) -> Tensor:
        t = int(generator.integers(checkpoints))
        begin, target = (
            {name: task.trajectory[epoch][name].to(task.device) for name in names} for epoch in (t, t + expert_epochs)
        )
        batch = synthetic.batch(sample_subset(task.n_items, subset, generator).to(task.device))
        return trajectory_distance(unroll(model, begin, batch, steps, log_rate.exp(), adam), target, begin)

    return descend(
        task,
        first,
        objective,
        iterations=iterations,
        rates=(input_learning_rate, label_learning_rate),
        seed=seed,
        progress=progress,
        also=[log_rate],
        on_step=on_step,
    )[0]
