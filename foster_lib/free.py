"""FOSTER without full-data training: what it costs is the distillation alone.

S starts at the labels of a linear model and the texts (`linear_labels`), L_real is the cross-entropy of real next
items, students φ are reset to new first weights: no recommender is ever trained on all data. Two forms:

* `foster_free` learns inputs and labels on their own, as FOSTER does from a teacher's labels;
* `tied.foster_tied` learns one mixture a position, which is input there and target of the position before.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from foster_lib.errors import FosterError
from foster_lib.foster import FosterSettings, Synthesizer, distill
from foster_lib.linear_labels import LinearSettings, linear_start
from foster_lib.synthetic import SyntheticSequences
from foster_lib.task import Task


@dataclass(frozen=True)
class FreeSettings(LinearSettings, FosterSettings):
    """Constants of the start and of the distillation, whose resets all go to new first weights."""

    iterations: int = 300
    windows: int = 64
    fresh: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fresh != 1 or self.checkpoints != FosterSettings.checkpoints:
            raise FosterError("without full-data training there are no checkpoints: resets go to a fresh start alone.")


class FreeSynthesizer(Synthesizer):
    """The tensors of `Synthesizer`; L_real reads real next items."""

    reads_teacher = False


class FreshTask(Task):
    """A task of which no full-data training has been recorded."""

    trajectory: tuple[dict[str, Tensor], ...] = ()

    @classmethod
    def of(cls, task: Task) -> FreshTask:
        return cls(**{each.name: getattr(task, each.name) for each in fields(Task)})


def foster_free(task: Task, sequences: int, seed: int, progress: str = "", **parameters) -> SyntheticSequences:
    """The method as Table 2 calls it; parameters are those of `FreeSettings`."""
    settings = FreeSettings(**parameters)
    start = linear_start(task, sequences, seed, settings)
    own = FreshTask.of(task)
    return distill(own, start, settings, seed=seed, progress=progress, synthesizer=FreeSynthesizer)[0]
