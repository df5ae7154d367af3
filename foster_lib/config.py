"""Profiles: which runs a table is made of, with all their settings.

A profile is a YAML file in `foster_lib/profiles/`. It may extend another one (`base`) and holds
only what differs; `per_dataset` holds what differs for one data set. An unknown key is an error.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from foster_lib.errors import FosterError, check_known
from foster_lib.sasrec import ModelSettings
from foster_lib.training import TrainSettings

PROFILES = Path(__file__).parent / "profiles"
SECTIONS = ("model", "full", "student", "methods", "encoder")
BUDGET = ("sequences", "sequence_length")
KEYS = ("base", "description", "datasets", "split", "seeds", "students", "per_dataset", "table2", *BUDGET, *SECTIONS)


@dataclass(frozen=True)
class EncoderSettings:
    """name : see `TextEncoder.load`; tuned_layers : see `TextEncoder.catalogue`."""

    name: str = "minilm"
    tuned_layers: int | str = 0
    allow_download: bool = False


@dataclass(frozen=True)
class StudentSettings(TrainSettings):
    """`TrainSettings` of a model trained on synthetic sequences; an epoch is one full-batch step.

    hard_learning_rate : in the place of `learning_rate` where targets are real next items, which
    over-fit within a few steps.
    """

    learning_rate: float = 5e-3
    hard_learning_rate: float = 1e-3
    epochs: int = 500
    validate_every: int = 50
    patience: int = 4
    dropout: float = 0.1


@dataclass(frozen=True)
class Settings:
    """All that determines the runs of one data set, profile and split.

    sequence_length : positions of a synthetic sequence, a multiple of model.length: the model reads
    it in windows of that length, as it does real sequences (0: one window)
    """

    dataset: str
    profile: str
    split: str
    sequences: int
    encoder: EncoderSettings
    model: ModelSettings
    full: TrainSettings
    student: StudentSettings
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    sequence_length: int = 0


@dataclass(frozen=True)
class Profile:
    """A profile as read: defaults of the command line, and `settings` per data set.

    students : models trained on each set of sequences, by different seeds
    """

    name: str
    datasets: list[str]
    seeds: list[int]
    split: str
    table2: list[str]
    raw: dict[str, Any]
    students: int = 1

    def settings(self, dataset: str, split: str | None = None) -> Settings:
        """Settings of one data set, `per_dataset` applied."""
        own = self.raw.get("per_dataset", {}).get(dataset, {})
        for key in own:
            check_known(key, (*SECTIONS, *BUDGET), f"key of per_dataset.{dataset} in profile '{self.name}'")
        merged = _merge(self.raw, own)
        where = f"profile '{self.name}'"
        model = build(ModelSettings, merged.get("model", {}), f"model of {where}")
        length = merged.get("sequence_length", model.length)
        if type(length) is not int or length < 1 or length % model.length:
            raise FosterError(
                f"{where}: sequence_length must be a multiple of model.length {model.length}, not {length}."
            )
        return Settings(
            dataset=dataset,
            profile=self.name,
            split=split or self.split,
            sequences=merged.get("sequences", 20),
            sequence_length=length,
            encoder=build(EncoderSettings, merged.get("encoder", {}), f"encoder of {where}"),
            model=model,
            full=build(TrainSettings, merged.get("full", {}), f"full of {where}"),
            student=build(StudentSettings, merged.get("student", {}), f"student of {where}"),
            methods=merged.get("methods") or {},
        )


def load_profile(name: str) -> Profile:
    """Read a profile by name and everything it extends."""
    check_known(name, [path.stem for path in PROFILES.glob("*.yaml")], "profile")
    raw = _read(PROFILES / f"{name}.yaml")
    return Profile(
        name=name,
        datasets=raw.get("datasets", ["ml-100k"]),
        seeds=raw.get("seeds", [0, 1, 2]),
        split=raw.get("split", "leave-one-out"),
        table2=raw.get("table2", []),
        raw=raw,
        students=raw.get("students", 1),
    )


def build(cls: type, values: dict[str, Any], where: str) -> Any:
    """A settings dataclass from a dictionary; unknown keys and wrong types are errors."""
    known = {f.name: f for f in fields(cls)}
    for key, value in values.items():
        check_known(key, known, f"setting in {where}:")
        default = known[key].default
        if isinstance(default, (int, float)) and not isinstance(
            value, (int, float, str if key == "tuned_layers" else int)
        ):
            raise FosterError(f"{where}: {key} must be a number, not {value!r} (write 1.0e-3, not 1e-3, in YAML).")
    return cls(**values)


def as_dict(settings: Any) -> dict[str, Any]:
    """Plain dictionary of a settings dataclass, for manifests."""
    return asdict(settings)


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise FosterError(f"{path}: not valid YAML ({error}).") from error
    for key in raw:
        check_known(key, KEYS, f"key in profile {path.name}")
    if base := raw.pop("base", None):
        raw = _merge(_read(PROFILES / f"{base}.yaml"), raw)
    return raw


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with `change` laid over it, dictionaries key by key."""
    merged = copy.deepcopy(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else copy.deepcopy(value)
    return merged
