"""Full-data training on disk: whole or not at all."""

from __future__ import annotations

from dataclasses import replace

import pytest

from foster_lib import coresets
from foster_lib.config import Settings, StudentSettings
from foster_lib.paths import new_folder
from foster_lib.recipes import train_full, train_student
from foster_lib.training import TrainSettings

TWO_EPOCHS = TrainSettings(epochs=2, patience=0)


def left_behind(folder) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir())


def test_the_trajectory_is_whole(task, tmp_path):
    """Every epoch with the start, the best weights and the log; no hidden folder beside them."""
    folder = tmp_path / "trajectories" / "one"
    train_full(task, TWO_EPOCHS, 0, folder)
    epochs = [f"epoch-{epoch:03d}.safetensors" for epoch in range(3)]
    assert sorted(path.name for path in folder.iterdir()) == ["best.safetensors", *epochs, "log.json"]
    assert left_behind(folder) == ["one"]
    assert [state.keys() for state in replace(task, trajectory_folder=folder).trajectory]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_training_leaves_nothing(task, tmp_path, interruption):
    """Stopped after the first epoch's checkpoint: neither a trajectory nor a hidden folder remains."""
    folder, seen = tmp_path / "trajectories" / "one", []

    class Stopped(type(task)):
        def validate(self, model):
            seen.append(left_behind(folder))
            if len(seen) == 2:
                raise interruption
            return 0.0

    with pytest.raises(interruption):
        train_full(Stopped(**{name: getattr(task, name) for name in task.__dataclass_fields__}), TWO_EPOCHS, 0, folder)
    assert seen[1] and left_behind(folder) == []


def test_an_interrupted_training_leaves_the_old_one(task, tmp_path):
    """What was there before stays as it was when its successor fails."""
    folder = tmp_path / "old"
    with new_folder(folder) as working:
        (working / "a").write_text("old")
    with pytest.raises(RuntimeError), new_folder(folder) as working:
        (working / "a").write_text("new")
        raise RuntimeError
    assert (folder / "a").read_text() == "old" and left_behind(folder) == ["old"]
    with new_folder(folder) as working:
        (working / "b").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["b"]


def test_of_two_that_make_the_same_folder_one_keeps_its_own(tmp_path):
    """The second to finish replaces the first, and neither leaves a hidden folder."""
    folder = tmp_path / "both"
    with new_folder(folder) as first, new_folder(folder) as second:
        assert first != second
        (first / "a").write_text("first")
        (second / "a").write_text("second")
    assert (folder / "a").read_text() == "first" and left_behind(folder) == ["both"]


def test_students_on_hard_targets_are_stopped_early(task, settings: Settings):
    """They over-fit within a few steps: they are looked at often, and soon left. Those on labels are not."""
    student = StudentSettings(epochs=60, validate_every=60, patience=0, hard_validate_every=2, hard_patience=3)
    hard = coresets.random(task, 3, seed=0)

    class Falling(type(task)):
        """Each validation is worse than the one before."""

        def validate(self, model):
            seen.append(-len(seen))
            return float(seen[-1])

    falling = Falling(**{name: getattr(task, name) for name in task.__dataclass_fields__})
    seen: list[int] = []
    _, log = train_student(falling, hard, replace(settings, student=student), seed=1)
    assert list(log.validation) == [0, 2, 4, 6] and log.best_epoch == 0
    seen.clear()
    _, log = train_student(falling, coresets.with_labels(task, hard), replace(settings, student=student), seed=1)
    assert list(log.validation) == [0, 60]
