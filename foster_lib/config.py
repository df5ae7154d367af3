"""Profiles: which runs a table is made of, with all their settings.

A profile is a YAML file in `foster_lib/profiles/`. It may extend another one (`base`) and holds
only what differs; `per_dataset` holds what differs for one data set. An unknown key is an error.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from foster_lib.errors import FosterError, check_known
from foster_lib.sasrec import ModelSettings
from foster_lib.synthetic import ORDERS
from foster_lib.training import TrainSettings

PROFILES = Path(__file__).parent / "profiles"
MAY_BE_ZERO = ("patience", "hard_patience", "adapter_hidden", "inner_warmup", "added", "kept_inputs", "kept_targets")
"""Whole numbers that are not 0 by default, but may be."""
SECTIONS = ("model", "full", "student", "methods", "encoder")
BUDGET = ("sequences", "sequence_length", "readings", "order", "successors", "teachers")
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

    hard_learning_rate, hard_validate_every, hard_patience : in the place of those without `hard`, the adapter's rate
    included, where targets are real next items, which over-fit within a few steps; see `for_hard_targets`.
    windows : windows of the sequences that a step reads, drawn anew (0: all); what is tied or stored as factors is
    read whole.
    likeness : weight of the likeness of items (`SyntheticSequences.likeness`) beside the labels, where the
    sequences know of it.
    """

    learning_rate: float = 5e-3
    hard_learning_rate: float = 1e-3
    hard_validate_every: int = 10
    hard_patience: int = 5
    epochs: int = 500
    validate_every: int = 50
    patience: int = 4
    dropout: float = 0.1
    windows: int = 0
    likeness: float = 0.0

    @property
    def for_hard_targets(self) -> StudentSettings:
        """The recipe where sequences have no labels: a student is kept that was stopped early."""
        return replace(
            self,
            learning_rate=self.hard_learning_rate,
            adapter_rate=1.0,
            validate_every=self.hard_validate_every,
            patience=self.hard_patience,
        )


@dataclass(frozen=True)
class Settings:
    """All that determines the runs of one data set, profile and split.

    sequence_length : positions of a synthetic sequence, a multiple of model.length: the model reads
    it in windows of that length, as it does real sequences (0: one window)
    readings : R, in how many orders the teacher labels them; order : which, a key of `synthetic.ORDERS`
    successors : whether it also tells what follows an item on its own
    teachers : full-data models, of neighbouring seeds, whose mean labels S
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
    readings: int = 1
    order: str = "shuffled"
    successors: bool = False
    teachers: int = 1


@dataclass(frozen=True)
class Profile:
    """A profile as read: defaults of the command line, and `settings` per data set.

    table2 : rows of Table 2, where `per_dataset` names no others, see `rows`
    students : models trained on each set of sequences, by different seeds
    """

    name: str
    datasets: list[str]
    seeds: list[int]
    split: str
    table2: list[str]
    raw: dict[str, Any]
    students: int = 1

    def rows(self, dataset: str) -> list[str]:
        """Rows of Table 2 for a data set: its own, if `per_dataset` names any."""
        return self._own_list(dataset, "table2") or self.table2

    def once(self, dataset: str, split: str | None = None) -> list[str]:
        """Rows that a data set has from one seed and one student, because they are dear there.

        On another split than the profile's also all that `per_dataset` names beside the profile's `table2`.
        """
        further = self._own_list(dataset, "table2") if split not in (None, self.split) else []
        return self._own_list(dataset, "once") + [row for row in further if row not in (*self.table2, "all")]

    def _own_list(self, dataset: str, key: str) -> list[str]:
        own = self.raw.get("per_dataset", {}).get(dataset, {}).get(key, [])
        if not isinstance(own, list):
            raise FosterError(f"profile '{self.name}': per_dataset.{dataset}.{key} must be a list, not {own!r}.")
        return own

    def own_students(self, dataset: str) -> dict[str, dict[str, Any]]:
        """What is changed for the students of a method's sequences: not every optimiser suits every form of S."""
        own = self.raw.get("per_dataset", {}).get(dataset, {}).get("own_student", {})
        if not isinstance(own, dict) or not all(isinstance(change, dict) for change in own.values()):
            where = f"profile '{self.name}': per_dataset.{dataset}.own_student"
            raise FosterError(f"{where} must hold methods, with keys and values of each.")
        return own

    def for_method(self, settings: Settings, method: str) -> Settings:
        """`settings` with the own student of a method, if it has one on that data set."""
        change = self.own_students(settings.dataset).get(method)
        if not change:
            return settings
        where = f"own_student.{method} of {settings.dataset} in profile '{self.name}'"
        return replace(settings, student=build(StudentSettings, {**asdict(settings.student), **change}, where))

    def settings(self, dataset: str, split: str | None = None) -> Settings:
        """Settings of one data set, `per_dataset` applied."""
        own = self.raw.get("per_dataset", {}).get(dataset, {})
        if not isinstance(own, dict):
            raise FosterError(f"profile '{self.name}': per_dataset.{dataset} must hold keys and values.")
        for key in own:
            check_known(
                key,
                (*SECTIONS, *BUDGET, "table2", "once", "own_student"),
                f"key of per_dataset.{dataset} in profile '{self.name}'",
            )
        merged = _merge(self.raw, own)
        for method, parameters in merged.get("methods", {}).items():
            if not isinstance(parameters, dict):
                raise FosterError(f"profile '{self.name}': methods.{method} must hold keys and values.")
        where = f"profile '{self.name}'"
        model = build(ModelSettings, merged.get("model", {}), f"model of {where}")
        length = merged.get("sequence_length", model.length)
        if type(length) is not int or length < 1 or length % model.length:
            raise FosterError(
                f"{where}: sequence_length must be a multiple of model.length {model.length}, not {length}."
            )
        readings = merged.get("readings", 1)
        if type(readings) is not int or readings < 1:
            raise FosterError(f"{where}: readings must be a whole number of at least 1, not {readings!r}.")
        order = merged.get("order", "shuffled")
        check_known(order, ORDERS, f"order in {where}:")
        if order == "cut" and model.length % readings:
            raise FosterError(f"{where}: there cannot be {readings} cuts of windows of {model.length}, only a divisor.")
        successors = merged.get("successors", False)
        if not isinstance(successors, bool):
            raise FosterError(f"{where}: successors must be true or false, not {successors!r}.")
        teachers = merged.get("teachers", 1)
        if type(teachers) is not int or teachers < 1:
            raise FosterError(f"{where}: teachers must be a whole number of at least 1, not {teachers!r}.")
        return Settings(
            dataset=dataset,
            profile=self.name,
            split=split or self.split,
            sequences=merged.get("sequences", 20),
            sequence_length=length,
            readings=readings,
            order=order,
            successors=successors,
            teachers=teachers,
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
    where = f"profile '{name}'"
    for key in ("datasets", "seeds", "table2"):
        if not isinstance(raw.get(key, []), list):
            raise FosterError(f"{where}: {key} must be a list, not {raw[key]!r}.")
    for key in ("students", "sequences"):
        if not (type(raw.get(key, 1)) is int and raw.get(key, 1) >= 1):
            raise FosterError(f"{where}: {key} must be a whole number of at least 1, not {raw[key]!r}.")
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
        if what := refused(key, value, known[key].default):
            raise FosterError(f"{where}: {key} must be {what}, not {value!r}.")
    return cls(**values)


def refused(key: str, value: Any, default: Any) -> str:
    """What a setting must be, if `value` is not that; the default tells the type."""
    whole, number = type(value) is int, type(value) in (int, float)
    if key == "tuned_layers":
        return "" if value == "all" or (whole and value >= 0) else "'all' or a whole number"
    if isinstance(default, (bool, str)):
        return "" if isinstance(value, type(default)) else f"a {type(default).__name__}"
    if isinstance(default, (int, float)) and not number:
        return "a number (write 1.0e-3, not 1e-3, in YAML)"
    if isinstance(default, int):
        least = 1 if default and key not in MAY_BE_ZERO else 0
        return "" if whole and value >= least else f"a whole number of at least {least}"
    if isinstance(default, float):
        most = 1 if "dropout" in key else 1e30  # about the largest that float32 can still compute with
        return "" if 0 <= value < most else f"a number of at least 0 and below {most}"
    return ""


def as_dict(settings: Any) -> dict[str, Any]:
    """Plain dictionary of a settings dataclass, for manifests."""
    return asdict(settings)


def _read(path: Path, extended: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise FosterError(f"{path}: not valid YAML ({error}). Mend it, or restore it with `git checkout`.") from error
    if not isinstance(raw, dict):
        raise FosterError(f"{path}: a profile holds keys and values, this file a {type(raw).__name__}. See cpu.yaml.")
    for key, value in raw.items():
        check_known(key, KEYS, f"key in profile {path.name}")
        if key in (*SECTIONS, "per_dataset") and not isinstance(value, dict):
            raise FosterError(f"{path}: {key} must hold keys and values, not {value!r}.")
    if base := raw.pop("base", None):
        check_known(base, [other.stem for other in PROFILES.glob("*.yaml")], f"base of profile {path.name}:")
        if path in extended:
            raise FosterError(f"{path}: the profile extends itself. Mend `base`.")
        raw = _merge(_read(PROFILES / f"{base}.yaml", (*extended, path)), raw)
    return raw


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with `change` laid over it, dictionaries key by key."""
    merged = copy.deepcopy(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else copy.deepcopy(value)
    return merged
