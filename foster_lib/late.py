"""FOSTER with resets to late checkpoints: the model that S meets after a reset knows the data already.

The published resets go to fresh starts and to the first checkpoints of full-data training, near where students begin.
What late ones are worth is a row of the ablation.
"""

from __future__ import annotations

import copy

from foster_lib.foster import foster
from foster_lib.synthetic import SyntheticSequences
from foster_lib.task import Task


def foster_late(task: Task, sequences: int, seed: int, progress: str = "", **parameters) -> SyntheticSequences:
    """FOSTER whose `checkpoints` count from the end of the trajectory; `parameters` are those of `FosterSettings`."""
    late = copy.copy(task)
    vars(late)["trajectory"] = task.trajectory[::-1]  # the copy's own, where its cached property looks first
    return foster(late, sequences, seed, progress, **parameters)
