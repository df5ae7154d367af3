"""The two trainings every comparison is made of: on all real data, and on synthetic sequences."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from foster_lib.config import Settings
from foster_lib.paths import new_folder, write_atomically, write_text
from foster_lib.sasrec import SASRec
from foster_lib.synthetic import SyntheticSequences
from foster_lib.synthetic_data import SyntheticData
from foster_lib.task import Task
from foster_lib.training import RealSequences, TrainLog, TrainSettings, train


def train_student(
    task: Task, sequences: SyntheticSequences, settings: Settings, seed: int, progress: str = ""
) -> tuple[SASRec, TrainLog]:
    """Train a fresh, warm-started recommender on synthetic sequences alone: (model, log)."""
    recipe = settings.student if sequences.labels is not None else settings.student.for_hard_targets
    student = replace(task, model_settings=replace(task.model_settings, dropout=recipe.dropout))
    model = student.new_model(seed)
    log = train(
        model,
        SyntheticData(
            sequences.to(task.device), task.embeddings, recipe.subset, recipe.likeness, recipe.windows, task.length
        ),
        recipe,
        seed=seed,
        validate=task.validate,
        device=task.device,
        progress=progress,
    )
    return model, log


def train_full(
    task: Task, settings: TrainSettings, seed: int, folder: Path, progress: str = ""
) -> tuple[SASRec, TrainLog]:
    """Train on everything; record all epochs and the best weights in `folder`: (model, log).

    The folder appears complete or not at all.
    """
    with new_folder(folder) as working:
        model = task.new_model(seed)
        log = train(
            model,
            full_data(task, settings),
            settings,
            seed=seed,
            validate=task.validate,
            on_epoch=lambda epoch, model: save_checkpoint(model, epoch, working),
            device=task.device,
            progress=progress,
        )
        save_best(model, log, task, working)
    return model, log


def full_data(task: Task, settings: TrainSettings) -> RealSequences:
    """All training sequences, as `settings` wants them batched."""
    return RealSequences(
        task.train, task.length, settings.batch_size, task.train_timestamps, task.n_items, settings.subset
    )


def save_checkpoint(model: SASRec, epoch: int, folder: Path) -> None:
    """One of the trajectory's checkpoints, which `Task.trajectory` reads."""
    _save_weights(model, folder / f"epoch-{epoch:03d}.safetensors")


def save_best(model: SASRec, log: TrainLog, task: Task, folder: Path, **more: object) -> None:
    """The model that is kept, which `Task.teacher` reads; and how training went, `more` besides."""
    _save_weights(model, folder / "best.safetensors")
    details = {
        "seconds": round(log.seconds, 2),
        "epochs": len(log.losses),
        "kept_epoch": log.best_epoch,
        "validation_curve": {str(epoch): round(value, 5) for epoch, value in log.validation.items()},
        "interactions_per_second": round(len(log.losses) * sum(len(s) - 1 for s in task.train) / log.seconds),
        **more,
    }
    write_text(folder / "log.json", json.dumps(details))


def _save_weights(model: torch.nn.Module, path: Path) -> None:
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    write_atomically(path, lambda temporary: save_file(state, temporary))
