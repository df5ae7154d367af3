"""Table 5: do sequences that SASRec was distilled with teach other recommenders, and readers of other embeddings?

A distilled position is a distribution over items, so any model can read it: the *soft* form needs the encoder that the
sequences were distilled with, to turn their queries into probabilities. The *decoded* forms are the bridge to
everything else: lists of real items, with or without the few most probable next items of each position.
Every student is measured beside two models of its own kind, one trained on all data and one not trained at all.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from foster_lib.backbones import BACKBONES, WholeBatch, build_backbone, scorer, training_form
from foster_lib.config import EncoderSettings, Profile, Settings
from foster_lib.encoder import TextEncoder
from foster_lib.errors import FosterError, check_known
from foster_lib.evaluation import rank_queries
from foster_lib.execution import Call, execute, parallel, resolve_device
from foster_lib.lsa import LsaEncoder
from foster_lib.methods import get_method
from foster_lib.paths import shown
from foster_lib.records import code_fingerprint, content_key, environment, manifest_path, read_manifest, write_manifest
from foster_lib.runs import Run, describe_data, load_catalogue, load_once, make_task, plan
from foster_lib.sasrec import SASRec
from foster_lib.splits import make_split
from foster_lib.studies import changed, smoke_settings
from foster_lib.synthetic import SyntheticSequences
from foster_lib.task import Task
from foster_lib.training import Batch, RealSequences, TrainLog, TrainSettings, train

SPACE = Path(__file__).parent / "transfer.yaml"
READINGS = {
    "": "",
    "soft": "",
    "decoded": ", decoded to items",
    "decoded+labels": ", decoded, with the {top} likeliest next items",
}
"""Forms in which a student reads sequences, and what tables add to the name of their source."""


@dataclass(frozen=True)
class Student:
    """backbone : one of `BACKBONES`; encoder : its text encoder, empty: the one the sequences were distilled with."""

    backbone: str = "sasrec"
    encoder: str = ""

    def title(self, settings: Settings) -> str:
        return f"{BACKBONES[self.backbone].__name__}, {(self.encoder or settings.encoder.name).split('/')[-1]}"


@dataclass(frozen=True)
class Transfer:
    """One student: who it is and what it is trained on.

    base : run of Table 2 that makes the sequences, or "full" or "untrained"; reading : one of `READINGS`, empty for
    these two; top : next items that a decoded label keeps; recipe : changes of the sections `full` and `student`
    """

    base: Run
    student: Student
    reading: str
    top: int
    recipe: dict[str, Any]

    @property
    def settings(self) -> Settings:
        """The student's own."""
        encoder = EncoderSettings(self.student.encoder) if self.student.encoder else self.base.settings.encoder
        allowed = replace(encoder, allow_download=self.base.settings.encoder.allow_download)
        return replace(changed(self.base.settings, "", self.recipe), encoder=allowed)

    @property
    def trained_on(self) -> str:
        """As tables show it."""
        titles = {"full": "all data", "untrained": "nothing (untrained)"}
        title = titles.get(self.base.method, get_method(self.base.method).title)
        return title + READINGS[self.reading].format(top=self.top)

    @property
    def is_base(self) -> bool:
        """Whether this is a run of Table 2."""
        return self.student == Student() and self.reading in ("", "soft")

    @property
    def key(self) -> str:
        settings = self.settings
        described = {"base": self.base.key, "student": asdict(self.student), "reading": self.reading}
        if self.base.method == "full":
            described["recipe"] = asdict(settings.full)
        elif self.reading:
            described["recipe"] = asdict(settings.student)
        if self.reading == "decoded+labels":
            described["top"] = self.top
        return content_key({**described, "code": code_fingerprint("backbones", "lsa", "transfer")})

    @property
    def path(self) -> Path:
        if self.is_base:
            return self.base.path
        name = "-".join(["transfer", self.base.method, *filter(None, [self.reading]), self.student.backbone])
        settings = self.base.settings
        return manifest_path(settings.profile, settings.dataset, name, str(self.base.seed), self.key)

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, if this student is trained."""
        return read_manifest(self.path)


@dataclass(frozen=True)
class StudentTask(Task):
    """A `Task` whose models are another backbone."""

    backbone: str = "sasrec"

    def new_model(self, seed: int) -> SASRec:
        return build_backbone(self.backbone, copy.deepcopy(self.catalogue), self.model_settings, seed, self.device)

    def validate(self, model: SASRec) -> float:
        return rank_queries(scorer(model), self.validation_sample, self.n_items).metrics()["ndcg@10"]


def plan_transfer(
    profile: Profile, datasets: list[str], seeds: list[int], split: str | None = None, sources: Sequence[str] = ()
) -> list[Transfer]:
    """All students of Table 5, by data set and student.

    Parameters
    ----------
    sources : names of rows of Table 2 that condense, optional
        Whose sequences are learned from; default: as `transfer.yaml` says.

    Raises
    ------
    FosterError
        For a name that does not exist, or a source that condenses nothing.
    """
    spec = yaml.safe_load(SPACE.read_text(encoding="utf-8"))
    sources = list(sources) or spec["sources"]
    for source in sources:
        if not get_method(source).condenses:
            raise FosterError(
                f"'{source}' makes no sequences that could be transferred: name a row that does, e.g. kd."
            )
    students = [Student(**each) for each in spec.get(profile.name, spec["students"])]
    kinds = [("untrained", ""), ("full", "")]
    for source in sources:
        kinds += [(source, reading) for reading in list(READINGS)[1 : 4 if source in spec["decoded"] else 2]]
    planned = []
    for dataset in datasets:
        for student in students:
            recipe = spec["smoke_recipe"] if profile.name == "smoke" else spec["recipes"].get(student.backbone, {})
            for method, reading in kinds:
                for run in plan(profile, [dataset], [method], seeds, split):
                    if not run.student:  # one student of each kind
                        base = replace(run, settings=smoke_settings(run.settings, profile))
                        planned.append(Transfer(base, student, reading, spec["top"], recipe))
    return planned


def run_transfers(
    planned: list[Transfer],
    *,
    jobs: int = 1,
    device: str = "auto",
    fresh: bool = False,
    progress: bool = True,
    say=print,
) -> None:
    """Make what is not finished: first the runs of Table 2, then the other students."""
    device = resolve_device(device)
    execute({t.base.path: t.base for t in planned if t.reading or t.is_base}.values(), jobs=jobs, device=device,
            fresh=fresh, progress=progress, say=say)  # fmt: skip
    others = [t for t in planned if not t.is_base]
    pending = [t for t in others if fresh or t.manifest() is None]
    if len(pending) < len(others):
        say(f"{len(others) - len(pending)} of {len(others)} students are reused from {shown(others[0].path.parent)}")
    for run in {t.base.settings.dataset: t.base for t in pending}.values():
        load_catalogue(run.settings.dataset, run.settings.encoder, device)  # embed once, before fanning out
    pending.sort(key=lambda t: t.base.method != "full")  # longest first, so that no worker finishes alone
    calls = [Call(run_transfer, t) for t in pending]
    parallel(calls, jobs=jobs, device=device, label="students", progress=progress, say=say)


def run_transfer(item: Transfer, device: str, progress: bool) -> str:
    """Train the student, evaluate, record."""
    base, settings = item.base, item.settings
    label = f"{base.settings.dataset} {item.student.title(settings)}: {item.trained_on}, seed {base.seed}"
    source = make_task(base, device)
    split = make_split(source.dataset, base.settings.split)
    known = {name: getattr(source, name) for name in ("dataset", "train", "train_timestamps", "validation")}
    catalogue = (
        load_student_catalogue(base.settings.dataset, settings.encoder, device)
        if item.student.encoder
        else source.catalogue
    )
    task = StudentTask(
        **known, catalogue=catalogue, model_settings=settings.model, device=device, backbone=item.student.backbone
    )
    details: dict[str, Any] = {}
    if item.reading:
        sequences = get_method(base.method).form.load(base.distilled_path).to(device)
        batch, size = read(sequences, source.embeddings, item.reading, source.length, item.top)
        recipe = settings.student if batch.targets.is_floating_point() else settings.student.for_hard_targets
        task = replace(task, model_settings=replace(settings.model, dropout=recipe.dropout))
        model, log = fit(task, WholeBatch(batch), recipe, base.student_seed, label if progress else "")
        details = {"bytes": size, "targets": int(batch.mask.sum()), "kept_step": log.best_epoch}
    elif base.method == "full":
        data = RealSequences(task.train, task.length, settings.full.batch_size, task.train_timestamps)
        model, log = fit(task, data, settings.full, base.seed, label if progress else "")
        details = {"kept_epoch": log.best_epoch, "epochs": len(log.losses)}
    else:
        model, log = task.new_model(base.seed), TrainLog()
    start = time.perf_counter()
    validation = rank_queries(scorer(model), split.validation, task.n_items).metrics()
    test = rank_queries(scorer(model), split.test, task.n_items)
    manifest = {
        **base.description(),
        **{name: asdict(getattr(settings, name)) for name in ("full", "student", "model", "encoder")},
        "backbone": item.student.backbone,
        "reading": item.reading,
        "profile": settings.profile,
        "key": item.key,
        "code": base.code,
        "data": describe_data(task.dataset),
        "details": details,
        "seconds": {"training": round(log.seconds, 2), "evaluation": round(time.perf_counter() - start, 2)},
        "validation": validation,
        "test": test.metrics(),
        **environment(device),
    }
    write_manifest(item.path, manifest, test)
    return f"{label}: NDCG@10 {validation['ndcg@10']:.4f} validation, {test.metrics()['ndcg@10']:.4f} test"


def fit(task: StudentTask, data: Any, recipe: TrainSettings, seed: int, progress: str = "") -> tuple[SASRec, TrainLog]:
    """A fresh model of the task's backbone, trained on `data`."""
    model = task.new_model(seed)
    form = training_form(task.backbone, data, task.n_items)
    log = train(model, form, recipe, seed=seed, validate=task.validate, device=task.device, progress=progress)
    return model, log


def read(
    sequences: SyntheticSequences, embeddings: Tensor, reading: str, length: int, top: int = 20
) -> tuple[Batch, int]:
    """The sequences as a batch for any model, and the bytes that this form takes.

    Parameters
    ----------
    embeddings : (|V|, width of the encoder)
        Of the encoder that the sequences were distilled with.
    reading : str
        ``soft``: mixtures and probabilities. ``decoded``: the most probable item of each position, and as its
        target that of the next one; only behind the last one stands the most probable target. ``decoded+labels``: the
        same items, and for each the `top` most probable next items with their probabilities, scaled to sum to one.
    length : int
        L, positions that a model reads at a time: longer sequences are several windows, each a row of the batch.
    """
    check_known(reading, list(READINGS)[1:], "reading")

    def cut(tensor: Tensor) -> Tensor:
        """(n, sequence length, …) to (windows that hold something, L, …)."""
        return tensor.reshape(-1, length, *tensor.shape[2:])[used]

    used = sequences.mask.reshape(-1, length).any(1)
    mask, y = cut(sequences.mask), cut(sequences.target_probabilities(embeddings))
    if reading == "soft":
        hard = sequences.queries is None
        inputs = cut(sequences.items if hard else sequences.input_probabilities(embeddings))
        targets = cut(sequences.targets)[mask] if sequences.labels is None else y[mask]
        return Batch(inputs, targets, mask), sequences.size_in_bytes()
    items = cut(sequences.input_probabilities(embeddings).argmax(-1)).masked_fill(~mask, 0)
    if reading == "decoded":
        last = ~mask.roll(-1, 1)
        last[:, -1] = True  # what is rolled in there is the front
        targets = torch.where(last, y.argmax(-1), items.roll(-1, 1))[mask]
        return Batch(items, targets, mask), 4 * int(mask.sum() + len(mask))  # 32 bits an item
    best = y[mask].topk(min(top, y.shape[-1]))
    shares = best.values / best.values.sum(-1, keepdim=True)
    targets = torch.zeros_like(y[mask]).scatter_(-1, best.indices, shares)
    return Batch(items, targets, mask), int(mask.sum()) * (4 + (4 + 2) * best.indices.shape[1])  # half precision


@functools.lru_cache(maxsize=2)
def load_student_catalogue(dataset: str, encoder: EncoderSettings, device: str) -> torch.nn.Module:
    """Text embeddings of a data set's items by an encoder that the sequences were not distilled with."""
    name, texts = encoder.name, load_once(dataset).texts
    loaded = LsaEncoder() if name == "lsa" else TextEncoder.load(name, allow_download=encoder.allow_download)
    return loaded.catalogue(texts, 0, device)
