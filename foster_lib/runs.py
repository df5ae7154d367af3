"""One run: a (data set, method, seed), from the texts to the manifest."""

from __future__ import annotations

import functools
import inspect
import json
import resource
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch

from foster_lib.config import EncoderSettings, Profile, Settings
from foster_lib.coresets import with_labels
from foster_lib.datasets import Dataset, load_dataset
from foster_lib.encoder import TextEncoder
from foster_lib.errors import FosterError
from foster_lib.evaluation import Scorer, rank_queries, recommender_scorer
from foster_lib.fidelity import kl_to_teacher
from foster_lib.methods import METHODS, base_name, check_parameters, get_method, row_name
from foster_lib.paths import cache_dir, results_dir
from foster_lib.recipes import train_full, train_student
from foster_lib.records import (
    code_fingerprint,
    content_key,
    environment,
    manifest_path,
    modules_behind,
    read_manifest,
    write_manifest,
)
from foster_lib.splits import Split, make_split
from foster_lib.synthetic import SyntheticSequences
from foster_lib.task import Task

STUDENT_STRIDE = 1000
"""Students of one set of sequences differ by this much in their seeds."""


@dataclass(frozen=True)
class Run:
    """One run; `key` names everything that determines its result.

    student : which of several students trained on the same sequences; those after the first read
    the sequences that the run of the first has stored
    """

    settings: Settings
    method: str
    seed: int
    student: int = 0

    @property
    def parameters(self) -> dict[str, Any]:
        """The method's own; a coreset with labels has those of the coreset."""
        return self.settings.methods.get(base_name(self.method), {})

    def description(self) -> dict[str, Any]:
        """Resolved settings that this run depends on, and no others."""
        settings, method = self.settings, get_method(self.method)
        check_parameters(self.method, self.parameters)
        described = {
            "dataset": settings.dataset,
            "split": settings.split,
            "encoder": asdict(settings.encoder),
            "model": asdict(settings.model),
            "method": self.method,
            "parameters": self.parameters,
            "seed": self.seed if method.seeded else 0,
        }
        if method.needs_teacher:
            described["full"] = asdict(settings.full)
        if len(self.teachers) > 1:
            described["teachers"] = settings.teachers
        if method.condenses:
            described["sequences"] = settings.sequences
            described["sequence_length"] = settings.sequence_length
            described["student"] = asdict(settings.student)
            if method.needs_teacher or method.soft:
                described["readings"] = settings.readings
                described |= {"order": settings.order} if settings.readings > 1 else {}
                described |= {"successors": settings.successors} if method.needs_teacher else {}
            else:
                del described["student"]["likeness"]  # which nobody knows
            described["student_seed"] = self.student_seed
        if method.labelled:
            described["labels"] = "teacher"
        if self.student:
            described["student_number"] = self.student
        return described

    @property
    def teachers(self) -> list[Run]:
        """The full-data runs whose models this one reads; of its own seed, and those that label with it.

        Seeds 0 to M - 1 share their M teachers, as the next M do: further ones would cost as many trainings again.
        """
        if not get_method(self.method).needs_teacher:
            return []
        count = self.settings.teachers if self.method != "full" else 1
        begin = self.seed - self.seed % count
        return [replace(self, method="full", seed=begin + number, student=0) for number in range(count)]

    @property
    def key(self) -> str:
        return content_key({**self.description(), "data": load_once(self.settings.dataset).content, "code": self.code})

    @property
    def code(self) -> str:
        """Fingerprint of the library's modules that the result depends on."""
        method = get_method(self.method)
        modules = modules_behind(method.function.__module__.rpartition(".")[2])
        return code_fingerprint(*modules, *(["coresets"] if method.labelled else []))

    @property
    def path(self) -> Path:
        seed = f"{self.seed}-student{self.student}" if self.student else str(self.seed)
        return manifest_path(self.settings.profile, self.settings.dataset, self.method, seed, self.key)

    @property
    def student_seed(self) -> int:
        """Seed of the student's weights, dropout and training.

        Never that of the teacher: from the teacher's own initial weights a student learns more of its labels
        than a fresh one does.
        """
        return self.seed + STUDENT_STRIDE * (1 + self.student)

    @property
    def first(self) -> Run:
        """The run that makes the sequences of this one's student."""
        return replace(self, student=0)

    @property
    def distilled_path(self) -> Path:
        """Where the sequences lie: under a key of what they depend on, so that other students read the same."""
        described = {name: value for name, value in self.description().items() if not name.startswith("student")}
        key = content_key({**described, "data": load_once(self.settings.dataset).content, "code": self.code})
        name = f"{self.method}-seed{self.seed}-{key}.safetensors"
        return results_dir() / "distilled" / self.settings.profile / self.settings.dataset / name

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, if this run is finished."""
        return read_manifest(self.path)

    def stale(self) -> dict[str, Any] | None:
        """The newest manifest of the same settings and data that another version of the code has left."""
        described = json.loads(json.dumps({"student_number": 0, **self.description()}))
        found = []
        for path in self.path.parent.glob(f"{self.method}-seed{self.seed}-*.json"):
            manifest = read_manifest(path) or {}
            same = all({"student_number": 0, **manifest}.get(name) == value for name, value in described.items())
            if same and manifest["data"].get("content") == load_once(self.settings.dataset).content:
                found += [manifest] if manifest["code"] != self.code else []
        return max(found, key=lambda manifest: manifest["created"], default=None)


def plan(
    profile: Profile, datasets: list[str], methods: list[str], seeds: list[int], split: str | None = None
) -> list[Run]:
    """All runs of a table: each data set, method and seed, and each student of those that condense; of the rows that
    the profile has `once` on a data set and split the first seed and student.

    `methods` may be ["all"], or empty: the profile's rows of each data set. Names that do not exist, and
    splits that a data set does not allow, end here.
    """
    datasets, seeds = list(dict.fromkeys(datasets)), list(dict.fromkeys(seeds))
    if not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise FosterError(f"seeds are {seeds}: they must be whole numbers that are not negative.")
    settings = {name: profile.settings(name, split) for name in datasets}
    rows = {name: dict.fromkeys(map(row_name, methods or profile.rows(name))) for name in datasets}
    once = {name: profile.once(name, split) for name in datasets}
    for name in datasets:
        _split(name, settings[name].split)
        for method in (*once[name], *profile.own_students(name)):
            get_method(method)
    runs = [
        Run(profile.for_method(settings[name], method), method, seed, student)
        for name in datasets
        for method in (METHODS if "all" in rows[name] else rows[name])
        if method != "teachers" or settings[name].teachers > 1  # the mean of one is the row `full`
        for seed in (seeds if get_method(method).seeded and method not in once[name] else seeds[:1])
        for student in range(profile.students if get_method(method).condenses and method not in once[name] else 1)
    ]
    if not runs:
        raise FosterError(f"one full-data model labels S on {', '.join(datasets)}: ask for its row, 'full'.")
    return runs


# ------------------------------------------------------------------------------ one run


def run_one(run: Run, device: str, progress: bool, fresh: bool = True) -> str:
    """Distil if the method does, train the student, evaluate, record.

    Not `fresh`: sequences that an earlier process has stored, killed before it had trained its student, are read.
    """
    settings, method = run.settings, get_method(run.method)
    split, task = _split(settings.dataset, settings.split), make_task(run, device)
    label = f"{settings.dataset} {run.method} seed {run.seed}" + f", student {run.student + 1}" * bool(run.student)
    seconds = {"distillation": 0.0, "training": 0.0}
    details: dict[str, Any] = {}
    if method.condenses:
        if not run.student:  # further students find the sequences made
            found = None if fresh else _stored_seconds(run)
            seconds["distillation"] = _distil(run, task, label, progress) if found is None else found
        # The student reads what is on disk, rounding included: the file is the result.
        stored = method.form.load(run.distilled_path)
        model, log = train_student(task, stored, settings, run.student_seed, f"{label}, student" if progress else "")
        score = recommender_scorer(model)
        seconds["training"] = round(log.seconds, 2)
        details = {"bytes": stored.size_in_bytes(), "targets": int(stored.mask.sum()), "kept_step": log.best_epoch}
        # Students read the sequences, so that their teachers need not be there.
        if run.teachers and all(trained(teacher) for teacher in run.teachers):
            teacher = recommender_scorer(task.labeller)
            details["kl_to_teacher"] = kl_to_teacher(teacher, score, split.validation.histories)
    else:
        score, seconds["distillation"] = apply_method(run, task, label if progress else "")
        if run.method == "full":
            details = json.loads((trajectory_folder(run) / "log.json").read_text())
            seconds["training"] = details["seconds"]
    start = time.perf_counter()
    validation = rank_queries(score, split.validation, task.n_items).metrics()
    test = rank_queries(score, split.test, task.n_items)
    seconds["evaluation"] = round(time.perf_counter() - start, 2)
    manifest = {
        **run.description(),
        "profile": settings.profile,
        "key": run.key,
        "code": run.code,
        "data": describe_data(task.dataset),
        "details": details,
        "seconds": seconds,
        "peak_memory_mib": _peak_memory(device),
        "validation": validation,
        "test": test.metrics(),
        **environment(device),
    }
    write_manifest(run.path, manifest, test)
    figures = f"NDCG@10 {validation['ndcg@10']:.4f} validation, {test.metrics()['ndcg@10']:.4f} test"
    return f"{label}: {figures}, {sum(seconds.values()):.0f} s"


def _distil(run: Run, task: Task, label: str, progress: bool) -> float:
    """Make and store the sequences of `run`; returns the seconds it took."""
    outcome, seconds = apply_method(run, task, label if progress else "")
    if not all(tensor.isfinite().all() for tensor in outcome.stored().tensors().values()):
        raise FosterError(f"{label}: distillation has diverged, S is not finite. Lower the learning rates.")
    description = {"dataset": run.settings.dataset, "method": run.method, "seed": run.seed, "seconds": seconds}
    outcome.save(run.distilled_path, description)
    return seconds


def _stored_seconds(run: Run) -> float | None:
    """What the stored sequences of `run` took to make, if they and their description are there and whole."""
    try:
        get_method(run.method).form.load(run.distilled_path)
        return float(json.loads(run.distilled_path.with_suffix(".json").read_text(encoding="utf-8"))["seconds"])
    except (FosterError, OSError, ValueError, KeyError, TypeError):
        return None


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """What a manifest says of its data set: content, files and statistics."""
    return {"content": dataset.content, "sha256": dataset.sha256, **dataset.statistics()}


def apply_method(run: Run, task: Task, progress: str = "") -> tuple[SyntheticSequences | Scorer, float]:
    """What the method of `run` makes of a task, sequences or a scorer, and the seconds it took."""
    method, parameters = get_method(run.method), run.parameters
    if "progress" in inspect.signature(method.function).parameters:
        parameters = {**parameters, "progress": progress}
    start = time.perf_counter()
    outcome = method.function(task, sequences=run.settings.sequences, seed=run.seed, **parameters)
    if method.labelled:
        outcome = with_labels(task, outcome)
    return outcome, round(time.perf_counter() - start, 2)


def train_full_run(run: Run, device: str, progress: bool, fresh: bool = True) -> str:
    """Train on everything; record the trajectory that `run` and others of its key read.

    Not `fresh`: what another process has recorded since this call was planned is taken as it is.
    """
    label, folder = f"{run.settings.dataset} full data seed {run.seed}", trajectory_folder(run)
    task = make_task(run, device)
    if not fresh and trained(run):
        return f"{label}: trained by another process meanwhile"
    _, log = train_full(task, run.settings.full, run.seed, folder, label if progress else "")
    return f"{label}: trained {len(log.losses)} epochs in {log.seconds:.0f} s"


def trajectory_folder(run: Run) -> Path:
    """Cache folder of the full-data run of `run`'s seed: its checkpoints and the best model."""
    return cache_dir() / "trajectories" / replace(run.first, method="full").key


def trained(run: Run) -> bool:
    """Whether the `trajectory_folder` of `run` is there, each file of it whole."""
    folder = trajectory_folder(run)
    try:
        json.loads((folder / "log.json").read_text(encoding="utf-8"))["seconds"]
        for path in (folder / "best.safetensors", *folder.glob("epoch-*.safetensors")):
            with safetensors.safe_open(path, "pt"):  # compares the length of the file with its header
                pass
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
        return False
    return True


def make_task(run: Run, device: str = "cpu") -> Task:
    """What the method of `run` may look at."""
    settings = run.settings
    split = _split(settings.dataset, settings.split)
    folders = tuple(trajectory_folder(teacher) for teacher in run.teachers)
    return Task(
        dataset=load_once(settings.dataset),
        train=split.train,
        train_timestamps=split.train_timestamps,
        validation=split.validation,
        catalogue=load_catalogue(settings.dataset, settings.encoder, device),
        model_settings=settings.model,
        synthetic_length=settings.sequence_length,
        readings=settings.readings,
        order=settings.order,
        successors=settings.successors,
        trajectory_folder=trajectory_folder(run) if folders else None,
        labeller_folders=folders if len(folders) > 1 else (),
        device=device,
    )


# ------------------------------------------------------------- loaded once per process


@functools.lru_cache(maxsize=2)
def load_once(name: str) -> Dataset:
    """`load_dataset`, kept for the next run of the same process."""
    return load_dataset(name)


@functools.lru_cache(maxsize=2)
def _split(name: str, split: str) -> Split:
    return make_split(load_once(name), split)


@functools.lru_cache(maxsize=2)
def load_catalogue(dataset: str, encoder: EncoderSettings, device: str) -> torch.nn.Module:
    """Text embeddings of a data set's items, from the cache on disk after the first call."""
    loaded = TextEncoder.load(encoder.name, allow_download=encoder.allow_download)
    return loaded.catalogue(load_once(dataset).texts, encoder.tuned_layers, device)


def _peak_memory(device: str) -> int:
    """High-water mark of this process (CPU) or of the GPU's allocator, in MiB."""
    if torch.device(device).type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
