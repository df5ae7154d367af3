"""FOSTER: first-order distillation of a data set into a handful of synthetic sequences.

Symbols: S synthetic sequences with inputs p and targets y, φ the inner model that trains on S
alone, f(e) item features, N size of the item subset.

The problem is  min_S L_real(φ*(S)),  φ*(S) = argmin_φ L_syn(φ; S).  One iteration of `distill`:

1. draw a subset of N items; embed only those (`subsets`);
2. a student φ takes W steps on L_syn, and S gets the gradient of the student's loss on real data,
   ∂L_real(φ)/∂S, from first-order gradients alone: by looking back over the W steps (`adjoint`), or
   as the difference to an outer model θ that sees real data as well (`penalty`);
3. S steps along that gradient plus the one of the co-occurrence regulariser L_r;
4. every R iterations φ is reset, to a random checkpoint of the real trajectory or to a fresh start,
   because S would otherwise fit the one model it grew up with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from foster_lib.adjoint import Rollout
from foster_lib.batches import Batch, make_batch
from foster_lib.errors import FosterError, check_known
from foster_lib.importance import ImportanceSampler, label_mass
from foster_lib.penalty import Pair
from foster_lib.regulariser import FORMS, cooccurrence_regulariser
from foster_lib.sasrec import SASRec
from foster_lib.starts import start_sequences
from foster_lib.subsets import Subset, SyntheticBatch, sample_subset
from foster_lib.synthetic import SyntheticSequences
from foster_lib.task import Task
from foster_lib.training import warmup_cosine


@dataclass(frozen=True)
class FosterSettings:
    """All constants of the distillation.

    iterations : steps on the synthetic data
    hypergradient : how ∂L_real/∂S is found, "adjoint" or "penalty"
    subset : N, items drawn per iteration
    importance : share of the draws that go where the labels of S have probability, see `importance`; 0: uniform
    probable : another way to the same: uniform draws, and the items besides that are most probable in a label of S, and
        the real next items in L_real; few of the N would be among them
    windows : real windows per evaluation of L_real
    pool : students trained side by side, reset at different times
    inner_steps : W, steps of φ per iteration
    inner_learning_rate, inner_warmup, inner_adapter_rate : of its Adam, see `TrainSettings`
    inner_likeness : weight of the likeness of items in L_syn, see `StudentSettings`
    dropout : of φ, as of the students
    reset_every : R, iterations that φ serves between two resets
    fresh : share of the resets that go to a fresh warm start of a new seed, not to a checkpoint
    checkpoints : how many of the trajectory's checkpoints, from its start, the others are drawn from
    probe : length of the finite differences of the adjoint; penalty : λ of the penalty form
    input_learning_rate, label_learning_rate : Adam on z_x, β and on z_y
    regulariser : weight of L_r beside the hypergradient (which the adjoint scales to length 1)
    regulariser_form : what similar items shall have in common, see `regulariser`
    neighbours, neighbour_temperature : of the item similarity in L_r
    sharpness : norm of z_x at the start; bonus : β at the start
    """

    iterations: int = 600
    hypergradient: str = "adjoint"
    subset: int = 512
    importance: float = 0.0
    probable: bool = False
    windows: int = 32
    pool: int = 4
    inner_steps: int = 4
    inner_learning_rate: float = 5e-3
    inner_warmup: int = 30
    inner_adapter_rate: float = 1.0
    inner_likeness: float = 0.0
    dropout: float = 0.1
    reset_every: int = 100
    fresh: float = 0.5
    checkpoints: int = 3
    probe: float = 3e-3
    penalty: float = 1.0
    input_learning_rate: float = 0.006
    label_learning_rate: float = 0.002
    regulariser: float = 3.0
    regulariser_form: str = "conditional"
    neighbours: int = 4
    neighbour_temperature: float = 0.05
    sharpness: float = 4.0
    bonus: float = 8.0

    def __post_init__(self) -> None:
        check_known(self.hypergradient, HYPERGRADIENTS, "hypergradient")
        check_known(self.regulariser_form, FORMS, "regulariser_form")
        if not 0 <= self.importance <= 1:
            raise FosterError(f"importance is a share of the draws, from 0 to 1, not {self.importance}.")
        if self.importance and self.probable:
            raise FosterError("subsets hold what is probable by importance or besides: set one of the two to 0.")

    def judged(self, subset: Subset, windows: Batch, teacher: SASRec | None) -> Subset:
        """The items that L_real runs over: the real next items are among them where they are its targets, or
        where subsets hold what is `probable`."""
        return subset if teacher and not self.probable else subset.including(windows.targets)


HYPERGRADIENTS = {"adjoint": Rollout, "penalty": Pair}


# ------------------------------------------------------------------- the algorithm


class Synthesizer:
    """The learnable tensors of S with their optimiser; another form of S is a subclass (`tied`)."""

    reads_teacher = True  # in L_real
    number = 0  # of the reading that this iteration is about

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
        readings = [start.reading(number) for number in range(start.readings)]
        self.wanted = [reading.wanted(self.f) for reading in readings] if settings.probable else None
        mass = [label_mass(reading.labels[reading.mask], self.f) for reading in readings if settings.importance]
        self.samplers = [ImportanceSampler(each, settings.subset, settings.importance) for each in mass]
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.z_x, self.bonus, self.z_y]

    def turn(self, generator: np.random.Generator) -> None:
        """Draw the reading of the next iteration."""
        if self.start.readings > 1:
            self.number = int(generator.integers(self.start.readings))

    def draw(self, generator: np.random.Generator) -> Subset:
        """The items of this iteration: what S reads of the catalogue, its anchors aside."""
        if self.samplers:
            return self.samplers[self.number].draw(generator).to(self.f.device)
        drawn = sample_subset(len(self.f), self.settings.subset, generator).to(self.f.device)
        return drawn.including(self.wanted[self.number]) if self.settings.probable else drawn

    def learned(self) -> SyntheticSequences:
        """S as it is. What a label has learnt holds for all readings of its position."""
        now = replace(self.start, queries=self.z_x, bonus=self.bonus, labels=self.z_y)
        if self.start.further_labels is None:
            return now
        return replace(now, further_labels=self.start.further_labels + (self.z_y - self.start.labels)[:, :, None])

    def batch(self, subset: Subset, generator: np.random.Generator | None = None) -> SyntheticBatch:
        """S over the subset, differentiable; `generator` draws the items whose likeness φ learns, None: none."""
        now = self.learned().reading(self.number)
        batch = now.batch(subset, self.f)
        if generator is None or not self.settings.inner_likeness or now.alike is None:
            return batch
        return replace(batch, likeness=now.likeness(subset, self.f, generator, self.settings.inner_likeness))

    def regulariser(self, batch: SyntheticBatch) -> Tensor:
        """L_r of the batch; an anchor that was drawn counts in its column."""
        place, inside = batch.subset.positions(batch.anchors)
        p = batch.p.scatter_add(-1, place[..., None], (batch.own * inside)[..., None])
        text = self.text[batch.subset.items]
        settings = self.settings
        return cooccurrence_regulariser(
            p[batch.mask],
            batch.y,
            text @ text.T,
            settings.neighbours,
            settings.neighbour_temperature,
            settings.regulariser_form,
            batch.mask.nonzero()[:, 0],
        )

    def step(self, gradients: list[Tensor], progress: float) -> None:
        """Adam along `gradients`, the learning rates falling by a cosine over `progress` in 0 … 1."""
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * warmup_cosine(progress, 0.02)
        for tensor, gradient in zip(self.tensors, gradients):
            tensor.grad = gradient
        self.optimizer.step()

    def result(self) -> SyntheticSequences:
        return self.learned().detached()


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
        Of subsets, windows, resets and students.
    progress : str
        Label of the progress bar; empty: none.
    on_iteration : callable, optional
        Called with the iteration and the current `SyntheticSequences`, for pictures.

    Returns
    -------
    SyntheticSequences, and the course of the losses `inner` L_syn(φ), `outer` L_real and `regulariser` L_r.
    """
    generator = np.random.default_rng(seed)
    trajectory = task.trajectory[: settings.checkpoints]
    teacher = task.labeller if synthesizer.reads_teacher else None
    synthetic = synthesizer(start.to(task.device), task.embeddings, settings)
    pool = [HYPERGRADIENTS[settings.hypergradient](task, settings, seed + number) for number in range(settings.pool)]

    def state() -> dict[str, Tensor]:
        if generator.random() < settings.fresh:
            return task.new_model(int(generator.integers(2**31))).state_dict()
        return trajectory[generator.integers(len(trajectory))]

    for number, student in enumerate(pool):
        student.reset(state())
        student.served = number * settings.reset_every // settings.pool  # resets fall at different times
    history: dict[str, list[float]] = {"inner": [], "outer": [], "regulariser": []}

    def draw_windows() -> Batch:
        drawn = generator.choice(len(task.windows), min(settings.windows, len(task.windows)), replace=False)
        return make_batch([task.windows[i] for i in drawn]).to(task.device)

    bar = tqdm(range(settings.iterations), desc=progress, unit="step", disable=not progress)
    for iteration in bar:
        student = pool[iteration % settings.pool]
        if student.served == settings.reset_every:
            student.reset(state())
        student.served += 1
        synthetic.turn(generator)
        batch = synthetic.batch(synthetic.draw(generator), generator)
        gradients, inner, outer = student.gradient(synthetic, batch, draw_windows, teacher)
        regulariser = 0.0
        if settings.regulariser:
            gradients, regulariser = regularised(synthetic, batch, gradients)
        if not all(torch.isfinite(gradient).all() for gradient in gradients):
            raise FosterError(f"distillation diverged at iteration {iteration}: lower the learning rates.")
        synthetic.step(gradients, (iteration + 0.5) / settings.iterations)
        for name, value in zip(history, (inner, outer, regulariser)):
            history[name].append(value)
        bar.set_postfix(inner=f"{inner:.2f}", outer=f"{outer:.2f}", refresh=False)
        if on_iteration:
            on_iteration(iteration, synthetic)
    return synthetic.result(), history


def regularised(synthetic: Synthesizer, batch: SyntheticBatch, gradients: list[Tensor]) -> tuple[list[Tensor], float]:
    """The gradients plus those of weight · L_r; and L_r."""
    value = synthetic.regulariser(batch)
    own = torch.autograd.grad(value, synthetic.tensors, allow_unused=True, materialize_grads=True)
    weight = synthetic.settings.regulariser
    return [g + weight * r for g, r in zip(gradients, own)], float(value.detach())


def foster(
    task: Task,
    sequences: int,
    seed: int,
    progress: str = "",
    start_items: str = "k-means",
    start_labels: str = "teacher",
    start_filled: bool = True,
    **parameters,
) -> SyntheticSequences:
    """As Table 2 calls it: `distill` from one of `starts`; `parameters` are those of `FosterSettings`."""
    start = start_sequences(task, sequences, seed, start_items, start_labels, start_filled)
    return distill(task, start, FosterSettings(**parameters), seed=seed, progress=progress)[0]
