"""`Recommender`: a trained model with its catalogue, as a folder of plain files (no pickle).

| file | what |
|---|---|
| `weights.safetensors` | all weights that were trained |
| `items.parquet` | `item_id`, `title`, `text`, in the order of the model's item indices |
| `sequences.safetensors`, `.json` | the sequences it was trained on, if it was not all data |
| `recommender.json` | all settings, what it was trained on, its validation and test metrics |
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import safetensors
import torch
from safetensors.torch import load, save_file
from torch import Tensor

from foster_lib.config import EncoderSettings, Settings, StudentSettings, as_dict, build
from foster_lib.datasets import Dataset
from foster_lib.encoder import TextEncoder
from foster_lib.errors import FosterError
from foster_lib.evaluation import rank_queries, recommender_scorer
from foster_lib.methods import get_method
from foster_lib.paths import WRITE_ERRORS, unfinished
from foster_lib.recipes import train_student
from foster_lib.runs import Run, make_task
from foster_lib.sasrec import ModelSettings, SASRec, build_model
from foster_lib.splits import make_split
from foster_lib.synthetic import SyntheticSequences
from foster_lib.training import TrainSettings

FORMAT = "foster recommender 1"
DESCRIPTION = "recommender.json"
SEQUENCES = "sequences.safetensors"
FILES = ("weights.safetensors", "items.parquet", SEQUENCES, "sequences.json", DESCRIPTION)
NEEDED = {"settings", "method", "seed", "sha256"}
SECTIONS = {"encoder": EncoderSettings, "model": ModelSettings, "full": TrainSettings, "student": StudentSettings}


@dataclass(frozen=True)
class Recommender:
    """A trained model, and all that is needed to ask it.

    Attributes
    ----------
    model : SASRec
    item_ids, titles, texts : list of str, length |V|
    embeddings : (|V|, width of the encoder)
        Of the item texts, before any tuning of the encoder: what synthetic sequences refer to.
    settings : Settings
        Of the run that made it.
    about : dict
        What else `recommender.json` says: method, seed, key of the run, checksums, metrics.
    """

    model: SASRec
    item_ids: list[str]
    titles: list[str]
    texts: list[str]
    embeddings: Tensor
    settings: Settings
    about: dict[str, Any]

    def recommend(self, history: Sequence[str], k: int = 10) -> pd.DataFrame:
        """The k items most likely to come next.

        Parameters
        ----------
        history : sequence of str
            Item ids or titles, oldest first; its items are not recommended again.
        k : int

        Returns
        -------
        DataFrame
            Columns rank (from 1), item_id, title, probability (softmax over the items that are
            not in the history); fewer than k rows if the catalogue is smaller.

        Raises
        ------
        FosterError
            For an empty history, k < 1, or an item that is unknown or has a title of several.
        """
        if not history or k < 1:
            raise FosterError("name at least one item of the history, and ask for at least one recommendation.")
        known = np.array([self.find(item) for item in history], np.int64)
        scores = recommender_scorer(self.model)([known])[0].float().cpu().clone()  # the scorer's own is read-only
        scores[known] = -torch.inf
        probability, best = scores.softmax(0).topk(min(k, len(scores) - len(set(known.tolist()))))
        return pd.DataFrame(
            {
                "rank": range(1, len(best) + 1),
                "item_id": [self.item_ids[i] for i in best],
                "title": [self.titles[i] for i in best],
                "probability": probability.numpy(),
            }
        )

    def find(self, item: str) -> int:
        """Index of an item by its id, its title, or its title in other case and blanks."""
        if item in self.item_ids:
            return self.item_ids.index(item)
        for same in (str, _folded):
            found = [i for i, title in enumerate(self.titles) if same(title) == same(item)]
            if len(found) > 1:
                ids = ", ".join(self.item_ids[i] for i in found[:5])
                raise FosterError(f"{len(found)} items have the title '{item}': name one by its id ({ids}).")
            if found:
                return found[0]
        near = difflib.get_close_matches(item, [*self.titles, *self.item_ids], n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(repr(word) for word in near)}?" if near else ""
        raise FosterError(
            f"no item has the id or title '{item}'.{hint} items.parquet lists all; rare items are left out of training."
        )

    # --------------------------------------------------------------------------- on disk

    def save(self, folder: Path, sequences: SyntheticSequences | None = None, overwrite: bool = False) -> Path:
        """Write the folder, and the sequences that the model was trained on with it.

        Raises
        ------
        FosterError
            If the folder holds something and `overwrite` is not set, or cannot be written.
        """
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.model.state_dict().items()}
        items = pd.DataFrame({"item_id": self.item_ids, "title": self.titles, "text": self.texts})
        description = {"format": FORMAT, "items": len(items), **self.about, "settings": as_dict(self.settings)}

        def fill(working: Path) -> None:
            save_file(state, working / FILES[0])
            items.to_parquet(working / FILES[1], index=False)
            if sequences is not None:
                sequences.save(working / SEQUENCES, {name: self.about[name] for name in ("dataset", "method", "seed")})
            (working / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")

        return write_folder(folder, fill, last=DESCRIPTION, owned=FILES, overwrite=overwrite)

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Recommender:
        """Read what `save` wrote; item texts are embedded anew, or taken from the cache.

        Raises
        ------
        FosterError
            If the folder is not a recommender's, or a file of it is missing or damaged.
        """
        folder = Path(folder)
        about = _description(folder / DESCRIPTION)
        settings = _settings(about.pop("settings"), folder / DESCRIPTION)
        try:
            items = pd.read_parquet(folder / FILES[1], columns=["item_id", "title", "text"])
            state = load((folder / FILES[0]).read_bytes())
        except (OSError, ValueError, pyarrow.ArrowException, safetensors.SafetensorError) as error:
            raise FosterError(f"{folder} is damaged ({error}). Train again, with --overwrite.") from error
        item_ids, titles, texts = (items[column].tolist() for column in items.columns)
        if len(set(item_ids)) != about.pop("items", len(items)) or not all(
            isinstance(text, str) for text in (*item_ids, *titles, *texts)
        ):
            raise FosterError(
                f"{folder / FILES[1]} is not as it was written: an id, title or text is missing, twice or new. "
                "Train again, with --overwrite."
            )
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise FosterError(f"{folder / FILES[0]} holds numbers that are not finite. Train again, with --overwrite.")
        encoder = TextEncoder.load(settings.encoder.name, allow_download=settings.encoder.allow_download)
        catalogue = encoder.catalogue(texts, settings.encoder.tuned_layers, device)
        embeddings = catalogue().detach().clone()
        model = build_model(catalogue, settings.model, seed=0, device=device)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise FosterError(f"{folder / FILES[0]} does not fit {DESCRIPTION} ({error}). Train again.") from error
        model.eval().requires_grad_(False)
        return cls(model, item_ids, titles, texts, embeddings, settings, about)

    def check_data(self, dataset: Dataset) -> None:
        """Raise `FosterError` unless `dataset` is what the model was trained on."""
        if dataset.sha256 != self.about["sha256"]:
            changed = [name for name in dataset.sha256 if dataset.sha256[name] != self.about["sha256"].get(name)]
            raise FosterError(
                f"{', '.join(changed)} of data set '{dataset.name}' changed since the recommender was trained, which "
                "may have seen today's test items. Train again, or name the right folder with --data."
            )


def _folded(title: str) -> str:
    return " ".join(title.casefold().split())


def of_run(run: Run, device: str = "cpu", progress: bool = False) -> tuple[Recommender, SyntheticSequences | None]:
    """The recommender of a finished run, and the sequences it was trained on (None: all data).

    A student is trained again, which gives the same weights and takes seconds; full-data training
    left its weights in the cache. Metrics are those of these weights, which on another machine than
    the run's may differ from it in the last digits.
    """
    task, sequences = make_task(run, device), None
    if run.method == "full":
        model = task.teacher
    else:
        sequences = get_method(run.method).form.load(run.distilled_path)
        label = f"training on {len(sequences)} sequences" if progress else ""
        model, _ = train_student(task, sequences, run.settings, run.student_seed, label)
    dataset, score = task.dataset, recommender_scorer(model)
    split = make_split(dataset, run.settings.split)
    about = {
        "dataset": dataset.name,
        "method": run.method,
        "seed": run.seed,
        "key": run.key,
        "sha256": dataset.sha256,
        "validation": rank_queries(score, split.validation, task.n_items).metrics(),
        "test": rank_queries(score, split.test, task.n_items).metrics(),
    }
    embeddings = task.embeddings.cpu()
    return (
        Recommender(model, dataset.item_ids, dataset.titles, dataset.texts, embeddings, run.settings, about),
        sequences,
    )


def load_sequences(folder: Path) -> SyntheticSequences:
    """The synthetic sequences of a folder that `distill` wrote, in the form of the method that made them.

    Raises
    ------
    FosterError
        If the folder has none, or the JSON beside them does not name a method.
    """
    path = Path(folder) / SEQUENCES
    if not path.is_file():
        raise FosterError(f"{folder} holds no {SEQUENCES}: `train` makes none. Name a folder that `distill` wrote.")
    description = path.with_suffix(".json")
    try:
        method = str(json.loads(description.read_text(encoding="utf-8"))["method"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FosterError(
            f"{description} does not name the method ({error}), which says how {SEQUENCES} is to be read. "
            "Distil again, with --overwrite."
        ) from error
    sequences = get_method(method).form.load(path)
    shapes = {tensor.shape for tensor in (sequences.items, sequences.mask, sequences.targets)}
    if len(shapes) > 1 or not all(tensor.isfinite().all() for tensor in sequences.tensors().values()):
        raise FosterError(f"{path} is damaged (shapes that differ, or no finite numbers). Distil again.")
    return sequences


def _description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FosterError(f"{path} is missing: name a folder that `train` or `distill` wrote with --out.")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        form, missing = about["format"], NEEDED - about.keys()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FosterError(f"{path} is damaged ({error}). Train again, with --overwrite.") from error
    if form != FORMAT:
        raise FosterError(f"{path}: format is {form!r}, not {FORMAT!r}. Train again, with --overwrite.")
    if missing:
        raise FosterError(f"{path} is damaged (no {', '.join(sorted(missing))}). Train again, with --overwrite.")
    return about


def _settings(values: dict[str, Any], path: Path) -> Settings:
    try:
        sections = {name: build(cls, values[name], f"{name} of {path}") for name, cls in SECTIONS.items()}
        return build(Settings, {**values, **sections}, str(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise FosterError(f"{path}: its settings are incomplete ({error}). Train again, with --overwrite.") from error


# ------------------------------------------------------------------------------ folders


def check_target(target: Path, overwrite: bool) -> None:
    """Raise `FosterError` if something is at `target` that would be overwritten without leave."""
    target = Path(target)
    there = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if there and not overwrite:
        raise FosterError(f"{target} exists already. Add --overwrite to replace it, or choose another --out.")


def write_folder(
    folder: Path, fill: Callable[[Path], object], *, last: str, owned: Sequence[str] = (), overwrite: bool = False
) -> Path:
    """Let `fill` write a temporary folder beside `folder`, then move its files into place.

    Parameters
    ----------
    last : str
        The file that makes the folder complete: it goes first when an old result is replaced and
        comes last, so a folder that has it is whole.
    owned : sequence of str
        Files of an old result; those that `fill` did not write anew are removed. What else lies
        in the folder stays.

    Raises
    ------
    FosterError
        If the folder holds something and `overwrite` is not set, or cannot be written: then it is
        as it was or, if moving failed half-way, without `last`.
    """
    folder = Path(folder)
    check_target(folder, overwrite)
    try:
        with unfinished(folder, folder=True) as working:
            fill(working)
            folder.mkdir(exist_ok=True)
            written = {path.relative_to(working) for path in working.rglob("*") if path.is_file()}
            (folder / last).unlink(missing_ok=True)
            for stale in {Path(name) for name in owned} - written:
                (folder / stale).unlink(missing_ok=True)
            for name in sorted(written - {Path(last)}) + [Path(last)]:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (working / name).chmod(0o644)
                (working / name).replace(folder / name)
    except WRITE_ERRORS as error:
        reason = getattr(error, "strerror", None) or error
        raise FosterError(f"{folder} cannot be written ({reason}). Free some space or choose another --out.") from error
    return folder
