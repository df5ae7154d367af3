"""`Task`: all that a method of Table 2 may look at, and nothing of the test set."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from foster_lib.datasets import Dataset
from foster_lib.encoder import load_tensors
from foster_lib.ensemble import Ensemble
from foster_lib.errors import FosterError
from foster_lib.evaluation import rank_queries, recommender_scorer
from foster_lib.sasrec import ModelSettings, SASRec, build_model
from foster_lib.splits import Queries, windows
from foster_lib.training import make_batch

VALIDATION_QUERIES = 10_000  # enough to choose an epoch by, and cheap for data of any size


@dataclass(frozen=True)
class Task:
    """Training data, model and validation queries of one run.

    Attributes
    ----------
    dataset : Dataset
        Item texts and names; the sequences to learn from are in `train`.
    train : list of int64 arrays
    train_timestamps : list of arrays of the same lengths
    validation : Queries
    catalogue : module
        Text embeddings of the items, see `TextEncoder.catalogue`.
    model_settings : ModelSettings
    trajectory_folder : path or None
        Checkpoints of the full-data run of the same seed.
    labeller_folders : paths
        Full-data runs whose mean labels S; empty: the one of `trajectory_folder` does.
    device : str
    synthetic_length : int
        Positions of a synthetic sequence; 0: as many as the model reads at a time.
    readings : int
        R, see `SyntheticSequences.readings`, of sequences with a teacher's labels.
    order : str
        Of these readings, a key of `synthetic.ORDERS`.
    successors : bool
        Whether these also say what follows an item on its own.
    """

    dataset: Dataset
    train: list[np.ndarray]
    train_timestamps: list[np.ndarray]
    validation: Queries
    catalogue: torch.nn.Module
    model_settings: ModelSettings
    trajectory_folder: Path | None = None
    device: str = "cpu"
    synthetic_length: int = 0
    readings: int = 1
    order: str = "shuffled"
    successors: bool = False
    labeller_folders: tuple[Path, ...] = ()

    @property
    def n_items(self) -> int:
        return self.catalogue.n_items

    @property
    def length(self) -> int:
        """L, items that the model reads at a time."""
        return self.model_settings.length

    @property
    def sequence_length(self) -> int:
        """Positions of a synthetic sequence, a multiple of L; the model reads them in windows of L."""
        return self.synthetic_length or self.length

    @cached_property
    def embeddings(self) -> Tensor:
        """Text embeddings of all items, (|V|, width of the encoder), without gradient."""
        with torch.no_grad():
            return self.catalogue()

    def new_model(self, seed: int) -> SASRec:
        """A fresh, warm-started recommender; encoder layers that learn are its own."""
        return build_model(copy.deepcopy(self.catalogue), self.model_settings, seed, self.device)

    def validate(self, model: SASRec) -> float:
        """NDCG@10 on the validation queries, or on `VALIDATION_QUERIES` of them."""
        return rank_queries(recommender_scorer(model), self.validation_sample, self.n_items).metrics()["ndcg@10"]

    @cached_property
    def validation_sample(self) -> Queries:
        """At most `VALIDATION_QUERIES` validation queries, the same ones for every method."""
        if len(self.validation) <= VALIDATION_QUERIES:
            return self.validation
        drawn = np.sort(np.random.default_rng(0).choice(len(self.validation), VALIDATION_QUERIES, replace=False))
        whole = self.validation
        return Queries(whole.users[drawn], [whole.histories[q] for q in drawn], whole.targets[drawn])

    @cached_property
    def windows(self) -> list[np.ndarray]:
        """All training sequences, cut into windows of at most L + 1 items: what θ reads."""
        return windows(self.train, self.length)

    @cached_property
    def trajectory(self) -> list[dict[str, Tensor]]:
        """Checkpoints of full-data training, oldest first; the first is a warm start."""
        paths = sorted((self.trajectory_folder or Path()).glob("epoch-*.safetensors"))
        states = [load_tensors(path) for path in paths]
        if not states or any(state is None for state in states):
            raise FosterError(
                f"{self.trajectory_folder}: no trajectory of full-data training. Run the method 'full' first."
            )
        return states

    @cached_property
    def teacher(self) -> SASRec:
        """The full-data model of the run's own seed, of the epoch that validated best."""
        return self._full_model(self.trajectory_folder)

    @cached_property
    def labeller(self) -> SASRec | Ensemble:
        """What labels are made by: the mean of several full-data models, or the `teacher` alone."""
        if not self.labeller_folders:
            return self.teacher
        return Ensemble([self._full_model(folder) for folder in self.labeller_folders])

    def _full_model(self, folder: Path | None) -> SASRec:
        state = load_tensors((folder or Path()) / "best.safetensors")
        if state is None:
            raise FosterError(f"{folder}: no full-data model. Run the method 'full' first.")
        model = self.new_model(seed=0)
        model.load_state_dict(state)
        return model.eval().requires_grad_(False)

    @torch.inference_mode()
    def hidden_means(self, model: SASRec, pieces: list[np.ndarray]) -> np.ndarray:
        """Mean hidden state of each window under `model`: (len(pieces), d) float32."""
        features, means = model.features(), []
        for start in range(0, len(pieces), 256):
            batch = make_batch(pieces[start : start + 256]).to(self.device)
            hidden = model(batch.inputs, features) * batch.mask[..., None]
            means.append((hidden.sum(1) / batch.mask.sum(1, keepdim=True)).cpu())
        return torch.cat(means).numpy()


Method = Callable[..., object]
"""`method(task, sequences=n, seed=s, **parameters)`: `SyntheticSequences` to train a student on,
or a `Scorer` that ranks without training."""
