"""FOSTER: first-order distillation of a data set into a handful of synthetic sequences.

Symbols: S synthetic sequences with inputs p and targets y, φ the inner model that trains on S
alone, θ the outer model that sees real data as well, f(e) item features, N size of the item subset.

The bi-level problem  min_S L_real(φ*(S)),  φ*(S) = argmin_φ L_syn(φ; S)  becomes the
single-level penalty problem (value-function form; Ye et al. 2022, Kwon et al. 2023)

    min_{θ, S} J(θ, S) = L_real(θ) + λ [L_syn(θ; S) − min_φ L_syn(φ; S)],

whose gradients are all of first order:

    θ on  L_real(θ) + λ L_syn(θ; S),     φ on  L_syn(φ; S),
    S on  ∂J/∂S = λ [∂L_syn(θ; S)/∂S − ∂L_syn(φ; S)/∂S],

a difference of two ordinary input gradients; nothing is differentiated through training. Where
it vanishes, real data have nothing to add to what S teaches. One iteration of `distill`:

1. draw a subset of N items; embed only those (`subsets`);
2. φ takes W steps on L_syn, θ takes W steps on L_real + λ L_syn (`Pair.fit`);
3. S steps along ∂J/∂S plus the gradient of the co-occurrence regulariser (`synthetic_gradient`);
4. every R iterations θ and φ are reset to one random checkpoint of the real trajectory
   (`Pair.reset`), because S would otherwise fit the one model it grew up with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from foster_lib.coresets import kd
from foster_lib.errors import FosterError
from foster_lib.sasrec import Dropout, SASRec
from foster_lib.subsets import (
    FeatureBank,
    Subset,
    SyntheticBatch,
    real_loss,
    sample_subset,
    subset_inputs,
    synthetic_loss,
)
from foster_lib.synthetic import SyntheticSequences
from foster_lib.task import Task
from foster_lib.training import Batch, make_batch, warmup_cosine


@dataclass(frozen=True)
class FosterSettings:
    """All constants of the distillation.

    iterations : steps on the synthetic data
    subset : N, items drawn per iteration
    windows : real windows per step of θ
    penalty : λ
    pool : pairs (θ, φ) trained side by side, reset at different times
    inner_steps : W, steps of θ and φ per iteration
    inner_learning_rate, inner_warmup : of the Adam of θ and φ
    dropout : of θ and φ, as of the students
    reset_every : R, iterations that a pair serves between two resets
    checkpoints : how many of the trajectory's checkpoints, from its start, resets are drawn from
    input_learning_rate, label_learning_rate : Adam on z_x, β and on z_y
    regulariser : weight of L_r beside the gap L_syn(θ) − L_syn(φ)
    neighbours, neighbour_temperature : of the item similarity in L_r
    sharpness : norm of z_x at the start; bonus : β at the start
    """

    iterations: int = 400
    subset: int = 512
    windows: int = 16
    penalty: float = 1.0
    pool: int = 4
    inner_steps: int = 4
    inner_learning_rate: float = 5e-3
    inner_warmup: int = 30
    dropout: float = 0.1
    reset_every: int = 100
    checkpoints: int = 3
    input_learning_rate: float = 0.01
    label_learning_rate: float = 0.003
    regulariser: float = 0.1
    neighbours: int = 4
    neighbour_temperature: float = 0.05
    sharpness: float = 4.0
    bonus: float = 8.0


# ------------------------------------------------------------ inner and outer model


class Learner:
    """A recommender with its Adam, trained a few steps at a time."""

    def __init__(self, model: SASRec, settings: FosterSettings):
        self.model, self.settings = model, settings
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.forget()

    def reset(self, checkpoint: dict[str, Tensor]) -> None:
        """Take the checkpoint's weights, bit for bit, and forget the optimiser's state."""
        self.model.load_state_dict(checkpoint)
        self.forget()

    def forget(self) -> None:
        self.optimizer = torch.optim.Adam(self.parameters, lr=self.settings.inner_learning_rate)
        self.steps = 0

    def step(self, loss_of: Callable[[SASRec], Tensor]) -> float:
        """One step of Adam, with dropout, on `loss_of(model)`; returns the loss."""
        self.model.train()
        rise = min(1.0, (self.steps + 1) / self.settings.inner_warmup)
        self.optimizer.param_groups[0]["lr"] = self.settings.inner_learning_rate * rise
        loss = loss_of(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.steps += 1
        self.model.eval()
        return float(loss.detach())


class Pair:
    """φ and θ, which start from the same checkpoint and part only through the real data."""

    def __init__(self, task: Task, settings: FosterSettings, seed: int):
        self.settings = settings
        task = replace(task, model_settings=replace(task.model_settings, dropout=settings.dropout))
        self.phi, self.theta = (Learner(task.new_model(seed), settings) for _ in range(2))
        self.served, self.steps, self.seed = 0, 0, seed

    def reset(self, checkpoint: dict[str, Tensor]) -> None:
        """Trajectory-anchored reset of both models; their optimisers forget."""
        self.phi.reset(checkpoint)
        self.theta.reset(checkpoint)
        self.served = 0

    def couple_dropout(self) -> None:
        """Let θ draw the dropout masks on S that φ draws: then only the real data part them."""
        self.steps += 1
        for learner in (self.phi, self.theta):
            for module in learner.model.modules():
                if isinstance(module, Dropout):
                    module.generator.manual_seed(self.seed * 2**20 + self.steps)

    def fit(
        self, batch: SyntheticBatch, draw_windows: Callable[[], Batch], teacher: SASRec | None
    ) -> tuple[float, float]:
        """W steps each, S held fixed: φ on L_syn, θ on (L_real + λ L_syn) / (1 + λ).

        Parameters
        ----------
        batch : SyntheticBatch
            Detached from S.
        draw_windows : callable
            Draws real windows, anew for each step of θ.
        teacher : SASRec or None
            Labels them in L_real; without one their real next items are the targets.

        Returns
        -------
        L_syn(φ; S) and L_real(θ), last values
        """
        weight, outer = self.settings.penalty, 0.0

        def joint_loss(model: SASRec, windows: Batch) -> Tensor:
            nonlocal outer
            subset = batch.subset if teacher else batch.subset.including(windows.targets)
            bank = FeatureBank(model, subset.items, batch.anchors, windows.inputs)
            synthetic = synthetic_loss(model, batch, bank)  # first: with the dropout masks that φ has drawn
            real = real_loss(model, windows, subset, teacher, bank)
            outer = float(real.detach())
            return (real + weight * synthetic) / (1 + weight)

        for _ in range(self.settings.inner_steps):
            self.couple_dropout()
            inner = self.phi.step(lambda model: synthetic_loss(model, batch))
            windows = draw_windows()
            self.theta.step(lambda model, windows=windows: joint_loss(model, windows))
        return inner, outer


# ------------------------------------------------------- co-occurrence regulariser


def cooccurrence_regulariser(p: Tensor, y: Tensor, similarity: Tensor, neighbours: int, temperature: float) -> Tensor:
    """L_r: semantically similar items shall be followed by similar items inside S.

    With the conditional  q_i(j) = Σ_t p_t(i) y_t(j) / Σ_t p_t(i)  of what follows item i, and
    w_ij = softmax_j(s_ij / τ) over the nearest neighbours j of i in text space,

        L_r = 1/N Σ_i Σ_j w_ij H²(q_i, q_j),   H² = 1 − Σ_k √(q_i(k) q_j(k))  (squared Hellinger).

    Parameters
    ----------
    p, y : (T, N)
        Input and target probabilities of all T synthetic positions over the subset.
    similarity : (N, N)
        Cosine of the frozen text embeddings.
    """
    strength, near = similarity.clone().fill_diagonal_(-torch.inf).topk(min(neighbours, len(similarity) - 1))
    w = (strength / temperature).softmax(-1)
    q = (p.T @ y) / (p.sum(0)[:, None] + 1e-12)
    root = (q + 1e-12).sqrt()
    affinity = root @ root.T
    return (w * (1 - affinity.gather(1, near))).sum() / len(p.T)


# ------------------------------------------------------------------- the algorithm


class Synthesizer:
    """The learnable tensors of S with their optimiser; another form of S is a subclass (`tied`)."""

    reads_teacher = True  # in L_real

    def __init__(self, start: SyntheticSequences, embeddings: Tensor, settings: FosterSettings):
        if start.labels is None:
            raise FosterError("FOSTER starts from labelled sequences, see coresets.with_labels.")
        self.start, self.settings = start, settings
        self.f = start.features(embeddings)
        self.text = F.normalize(embeddings, dim=-1)
        self.z_y = start.labels.clone().requires_grad_()
        self.z_x = (settings.sharpness * self.f[start.items]).requires_grad_()
        self.bonus = torch.full(start.items.shape, settings.bonus, device=self.z_x.device).requires_grad_()
        self.optimizer = torch.optim.Adam(
            [
                {"params": [self.z_x, self.bonus], "lr": settings.input_learning_rate},
                {"params": [self.z_y], "lr": settings.label_learning_rate},
            ],
            betas=(0.8, 0.99),
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.z_x, self.bonus, self.z_y]

    def subset(self, drawn: Subset) -> Subset:
        """What S reads of the catalogue when `drawn` was drawn, its anchors aside."""
        return drawn

    def batch(self, subset: Subset) -> SyntheticBatch:
        """S over the subset, differentiable."""
        start, f = self.start, self.f[subset.items]
        p, own = subset_inputs(self.z_x, self.bonus, start.items, subset, f, self.f[start.items])
        y = (self.z_y[start.mask] @ f.T).softmax(-1)
        return SyntheticBatch(subset, start.items, start.mask, p, own, y)

    def regulariser(self, batch: SyntheticBatch) -> Tensor:
        """L_r of the batch; an anchor that was drawn counts in its column."""
        place, inside = batch.subset.positions(batch.anchors)
        p = batch.p.scatter_add(-1, place[..., None], (batch.own * inside)[..., None])
        text = self.text[batch.subset.items]
        settings = self.settings
        return cooccurrence_regulariser(
            p[batch.mask], batch.y, text @ text.T, settings.neighbours, settings.neighbour_temperature
        )

    def step(self, gradients: list[Tensor], progress: float) -> None:
        """Adam along `gradients`, the learning rates falling by a cosine over `progress` in 0 … 1."""
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * warmup_cosine(progress, 0.02)
        for tensor, gradient in zip(self.tensors, gradients):
            tensor.grad = gradient
        self.optimizer.step()

    def result(self) -> SyntheticSequences:
        return replace(
            self.start, queries=self.z_x.detach().cpu(), bonus=self.bonus.detach().cpu(), labels=self.z_y.detach().cpu()
        ).to("cpu")


def synthetic_gradient(
    synthetic: Synthesizer, batch: SyntheticBatch, theta: SASRec, phi: SASRec, weight: float
) -> tuple[list[Tensor], float, float]:
    """Gradient of L_syn(θ; S) − L_syn(φ; S) + weight · L_r with respect to S.

    The penalty λ is left out here: Adam, which follows, is indifferent to a common factor.

    Returns
    -------
    gradients of `Synthesizer.tensors`; the gap L_syn(θ) − L_syn(φ); L_r
    """
    gap = synthetic_loss(theta, batch) - synthetic_loss(phi, batch)
    regulariser = synthetic.regulariser(batch) if weight else torch.zeros(())
    gradients = torch.autograd.grad(gap + weight * regulariser, synthetic.tensors)
    return list(gradients), float(gap.detach()), float(regulariser.detach())


def distill(
    task: Task,
    start: SyntheticSequences,
    settings: FosterSettings,
    *,
    seed: int,
    progress: str = "",
    on_iteration=None,
    synthesizer: type[Synthesizer] = Synthesizer,
) -> tuple[SyntheticSequences, dict[str, list[float]]]:
    """Run the algorithm from the sequences `start`, which must be of the form that `synthesizer` learns.

    Parameters
    ----------
    task : Task
        With a trajectory of full-data training, and a teacher if S reads one.
    seed : int
        Of subsets, windows and resets.
    progress : str
        Label of the progress bar; empty: none.
    on_iteration : callable, optional
        Called with the iteration and the current `SyntheticSequences`, for pictures.

    Returns
    -------
    SyntheticSequences, and the course of the losses `inner`, `outer`, `gap`, `regulariser`.
    """
    generator = np.random.default_rng(seed)
    trajectory = task.trajectory[: settings.checkpoints]
    teacher = task.teacher if synthesizer.reads_teacher else None
    synthetic = synthesizer(start.to(task.device), task.embeddings, settings)
    pool = [Pair(task, settings, seed) for _ in range(settings.pool)]
    for number, pair in enumerate(pool):
        pair.reset(trajectory[generator.integers(len(trajectory))])
        pair.served = number * settings.reset_every // settings.pool  # resets fall at different times
    history: dict[str, list[float]] = {"inner": [], "outer": [], "gap": [], "regulariser": []}
    bar = tqdm(range(settings.iterations), desc=progress, unit="step", disable=not progress)
    for iteration in bar:
        pair = pool[iteration % settings.pool]
        if pair.served == settings.reset_every:
            pair.reset(trajectory[generator.integers(len(trajectory))])
        pair.served += 1
        subset = synthetic.subset(sample_subset(task.n_items, settings.subset, generator).to(task.device))
        batch = synthetic.batch(subset)

        def draw_windows() -> Batch:
            drawn = generator.choice(len(task.windows), min(settings.windows, len(task.windows)), replace=False)
            return make_batch([task.windows[i] for i in drawn]).to(task.device)

        inner, outer = pair.fit(batch.detached(), draw_windows, teacher)
        gradients, gap, regulariser = synthetic_gradient(
            synthetic, batch, pair.theta.model, pair.phi.model, settings.regulariser
        )
        if not all(torch.isfinite(gradient).all() for gradient in gradients):
            raise FosterError(f"distillation diverged at iteration {iteration}: lower the learning rates.")
        synthetic.step(gradients, (iteration + 0.5) / settings.iterations)
        for name, value in zip(history, (inner, outer, gap, regulariser)):
            history[name].append(value)
        bar.set_postfix(inner=f"{inner:.2f}", outer=f"{outer:.2f}", gap=f"{gap:.4f}", refresh=False)
        if on_iteration:
            on_iteration(iteration, synthetic)
    return synthetic.result(), history


def foster(task: Task, sequences: int, seed: int, progress: str = "", **parameters) -> SyntheticSequences:
    """The method as Table 2 calls it: KD-n's sequences and labels as start, then `distill`."""
    start = kd(task, sequences, seed)
    return distill(task, start, FosterSettings(**parameters), seed=seed, progress=progress)[0]
