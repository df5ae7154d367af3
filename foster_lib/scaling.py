"""How time and memory grow with the catalogue and with the users, measured on synthetic data.

Each function returns a table with a row per size. Sizes take turns (small, large, small, large …), so a
load that comes and goes touches all of them. Memory is counted at the allocator: bytes of tensors
and arrays alive at once, which is the same on every machine and in every run; times are not.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from foster_lib.coresets import with_labels
from foster_lib.datasets import Dataset
from foster_lib.encoder import FrozenCatalogue
from foster_lib.evaluation import rank_queries, recommender_scorer
from foster_lib.foster import FosterSettings, distill
from foster_lib.measuring import MIB, MemoryMeter, StepProbe, in_turns, matmul_rate
from foster_lib.sasrec import ModelSettings, SASRec
from foster_lib.splits import Queries
from foster_lib.synthetic import SyntheticSequences
from foster_lib.task import Task
from foster_lib.training import RealSequences, TrainSettings, train

SIZES = (10**3, 10**4, 10**5, 10**6)
MODEL = ModelSettings(adapter_hidden=512)
CHUNK = 10_000  # users that are streamed at once


def distillation_steps(
    sizes: Sequence[int] = SIZES,
    *,
    settings: FosterSettings | None = None,
    model: ModelSettings = MODEL,
    sequences: int = 20,
    embedding_width: int = 384,
    steps: int = 10,
    repeats: int = 1,
    seed: int = 0,
    device: str = "cpu",
    progress: str = "",
) -> pd.DataFrame:
    """One step of `foster.distill` for each size of the catalogue.

    Parameters
    ----------
    sizes : |V|; a million items of width 384 need about 8 GB while the distillation is set up
    settings : by default items are drawn by importance, as for the large data sets of Table 2, and one student is in
        the pool, which costs a step nothing and saves set-up
    steps, repeats : timed steps of each distillation, which take turns with those of the other sizes; how often all
        of it is done

    Returns
    -------
    DataFrame
        `items`; `step_seconds` (median); `step_mib`, the most that a step allocates at once; `setup_mib`, the same
        of all before the first step, and `table_mib`, what then stays (both grow with the catalogue);
        `gigaflop` of matrix products in a step; `floor_seconds`, the time of these at the rate that a large matrix
        product reaches between the steps; `times_floor`.
    """
    settings = replace(settings or FosterSettings(pool=1, importance=0.5), iterations=steps + 4)
    tasks = {size: SyntheticTask.make(size, embedding_width, model, seed, device) for size in sizes}
    starts = {size: _start(task, sequences) for size, task in tasks.items()}
    probes: dict[int, list[StepProbe]] = {size: [] for size in sizes}
    rates: list[float] = []
    smallest = min(sizes)  # once for what is imported and kept at the first call
    few = replace(settings, iterations=4)
    distill(tasks[smallest], starts[smallest], few, seed=seed, on_iteration=StepProbe(device))

    def measure(size: int, pause: Callable[[], None]) -> None:
        probes[size].append(probe := StepProbe(device, pause))
        distill(tasks[size], starts[size], settings, seed=seed, on_iteration=probe)

    with tqdm(total=repeats * (steps + 5), desc=progress, unit="round", disable=not progress) as bar:

        def after_round() -> None:
            rates.append(matmul_rate(torch.float32, device))
            bar.update()

        for _ in range(repeats):
            in_turns([partial(measure, size) for size in sizes], after_round)
    rows = []
    for size in sizes:
        seconds = float(np.median([s for probe in probes[size] for s in probe.seconds]))
        first, floor = probes[size][0], probes[size][0].operations / np.median(rates)
        table = sum(t.nbytes for t in (tasks[size].embeddings, *first.tables))
        rows.append(
            {
                "items": size,
                "step_seconds": seconds,
                "step_mib": first.step_bytes / MIB,
                "setup_mib": first.setup_bytes / MIB,
                "table_mib": table / MIB,
                "gigaflop": first.operations / 1e9,
                "floor_seconds": floor,
                "times_floor": seconds / floor,
            }
        )
    return pd.DataFrame(rows)


def training_steps(
    sizes: Sequence[int] = SIZES,
    *,
    subsets: Sequence[int] = (0, 512),
    full_softmax_limit: int = 10**5,
    model: ModelSettings = MODEL,
    batch_size: int = 64,
    history: int = 10,
    embedding_width: int = 384,
    steps: int = 10,
    repeats: int = 1,
    seed: int = 0,
    device: str = "cpu",
    progress: str = "",
) -> pd.DataFrame:
    """One step of `training.train` on real sequences for each size of the catalogue.

    Parameters
    ----------
    subsets : items that a step's softmax runs over (0: the whole catalogue, up to `full_softmax_limit` items)
    history : items of each user

    Returns
    -------
    DataFrame
        `loss` ("full softmax" or "subset of N"), `items`, `step_seconds` (median), `step_mib`
    """
    cases = [(subset, size) for subset in subsets for size in sizes if subset or size <= full_softmax_limit]
    tasks = {size: SyntheticTask.make(size, embedding_width, model, seed, device, history) for size in sizes}
    found: dict[tuple[int, int], list[StepProbe]] = {case: [] for case in cases}

    def measure(subset: int, size: int, pause: Callable[[], None]) -> None:
        found[subset, size].append(probe := StepProbe(device, pause))
        users = tasks[size].train[: batch_size * (steps + 5)]
        data = ProbedSequences(RealSequences(users, model.length, batch_size, None, size, subset), probe)
        settings = TrainSettings(epochs=1, batch_size=batch_size)
        train(tasks[size].new_model(seed), data, settings, seed=seed, device=device)

    with tqdm(total=repeats * (steps + 6), desc=progress, unit="round", disable=not progress) as bar:
        for _ in range(repeats):
            in_turns([partial(measure, *case) for case in cases], bar.update)
    return pd.DataFrame(
        {
            "loss": f"subset of {subset}" if subset else "full softmax",
            "items": size,
            "step_seconds": float(np.median([s for probe in probes for s in probe.seconds])),
            "step_mib": probes[0].step_bytes / MIB,
        }
        for (subset, size), probes in found.items()
    )


def ranking(
    sizes: Sequence[int] = SIZES,
    *,
    items: int = 2000,
    model: ModelSettings = MODEL,
    history: int = 10,
    embedding_width: int = 384,
    seed: int = 0,
    device: str = "cpu",
    progress: str = "",
) -> pd.DataFrame:
    """Full ranking of ever more users, who are drawn, ranked and forgotten `CHUNK` at a time.

    Parameters
    ----------
    sizes : users

    Returns
    -------
    DataFrame
        `users`, `users_per_second`; `peak_mib`, the most that is alive at once while they stream past; `held_mib`, what
        the histories would take in one list; `epoch_mib`, what `training.train` holds of an epoch's batches.
    """
    task = SyntheticTask.make(items, embedding_width, model, seed, device, history)
    score = recommender_scorer(task.new_model(seed))
    rows = []
    with tqdm(total=sum(sizes), desc=progress, unit="user", disable=not progress) as bar:
        for size in sizes:
            seconds, peak, held, epoch = 0.0, 0, 0, 0
            for number, start in enumerate(range(0, size, CHUNK)):
                meter = MemoryMeter(device) if number < 3 or start + CHUNK >= size else None
                if meter:
                    meter.start()
                users = min(CHUNK, size - start)
                sequences = random_sequences(users, items, history + 1, seed + start)
                queries = Queries(np.arange(users), [s[:-1] for s in sequences], np.array([s[-1] for s in sequences]))
                begin = time.perf_counter()
                ranks = rank_queries(score, queries, items)
                seconds += time.perf_counter() - begin
                held += ranks.higher.nbytes + sum(s.nbytes for s in queries.histories)
                if meter:
                    peak = max(peak, meter.stop())
                bar.update(users)
            for start in range(0, size, CHUNK):  # by chunks here: all batches of an epoch at once are what is counted
                sequences = random_sequences(min(CHUNK, size - start), items, history + 1, seed + start)
                batches = RealSequences(sequences, task.length, 64).batches(np.random.default_rng(seed))
                epoch += sum(b.inputs.nbytes + b.targets.nbytes + b.mask.nbytes for b in batches)
            rows.append(
                {
                    "users": size,
                    "users_per_second": size / seconds,
                    "peak_mib": peak / MIB,
                    "held_mib": held / MIB,
                    "epoch_mib": epoch / MIB,
                }
            )
    return pd.DataFrame(rows)


def ratio_of_ends(frame: pd.DataFrame, column: str, size: str = "items") -> float:
    """`column` at the largest size, divided by the same at the smallest."""
    ordered = frame.sort_values(size)[column]
    return float(ordered.iloc[-1] / ordered.iloc[0])


@dataclass(frozen=True)
class ProbedSequences:
    """`RealSequences` that tell a probe when a step begins, which is when the one before it has ended."""

    data: RealSequences
    probe: StepProbe

    def batches(self, generator: np.random.Generator) -> Iterable:
        return self.data.batches(generator)

    def loss(self, model: SASRec, batch) -> Tensor:
        self.probe(self.probe.steps)
        return self.data.loss(model, batch)


# ------------------------------------------------------------------------- synthetic data


class UntrainedTask(Task):
    """A task whose full-data models have learnt nothing: enough to measure what a step costs."""

    @cached_property
    def teacher(self) -> SASRec:
        return self.new_model(seed=0).eval().requires_grad_(False)

    @cached_property
    def trajectory(self) -> list[dict[str, Tensor]]:
        """Models of different seeds: trajectory matching divides by the distance between two."""
        return [copy.deepcopy(self.new_model(seed).state_dict()) for seed in range(6)]


class SyntheticTask(UntrainedTask):
    """A task without texts or training: random embeddings, random users, an untrained model for a teacher."""

    @classmethod
    def make(
        cls, items: int, width: int, model: ModelSettings, seed: int, device: str = "cpu", history: int = 60
    ) -> SyntheticTask:
        generator = torch.Generator().manual_seed(seed)
        embeddings = torch.randn(items, width, generator=generator).to(device)
        users = random_sequences(1000, items, history, seed)
        empty = Dataset("synthetic", [], [], [], [], [], [])
        times = [np.arange(len(user)) for user in users]
        last = Queries(np.arange(len(users)), [user[:-1] for user in users], np.array([user[-1] for user in users]))
        return cls(empty, users, times, last, FrozenCatalogue(embeddings), model, device=device)

    @cached_property
    def trajectory(self) -> list[dict[str, Tensor]]:
        return [{name: tensor.clone() for name, tensor in self.teacher.state_dict().items()}]


def random_sequences(users: int, items: int, length: int, seed: int) -> list[np.ndarray]:
    """Sequences of items that are all equally likely."""
    return list(np.random.default_rng(seed).integers(items, size=(users, length)))


def _start(task: Task, sequences: int) -> SyntheticSequences:
    whole = [window for window in task.windows if len(window) == task.length + 1]
    return with_labels(task, SyntheticSequences.from_windows(whole[:sequences], task.length)).to(task.device)
