"""What distilling costs, method by method: time, memory and operations of a step, and how soon it pays.

Each measurement is of one method on one data set and leaves one JSON below `results/efficiency/steps/`, so that a
measuring that was broken off goes on where it stopped. Two kinds:

- `StepCost`: a few steps; median seconds, the most bytes that a step allocates at once, and operations, which are
  counted and are the same on every machine;
- `Course`: a whole distillation, stopped at several moments to train a student on what there is by then. The clock
  stands still meanwhile. No more steps than fit into a time limit: the learning rates fall over as many as there are.

With an encoder whose last layer learns, models are untrained: a step costs the same whatever they have learnt.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from foster_lib.config import Profile
from foster_lib.errors import FosterError
from foster_lib.evaluation import rank_queries, recommender_scorer
from foster_lib.execution import resolve_device
from foster_lib.foster import FosterSettings, distill
from foster_lib.measuring import MIB, StepProbe
from foster_lib.methods import defaults, get_method
from foster_lib.paths import write_text
from foster_lib.recipes import train_student
from foster_lib.records import code_fingerprint, content_key, environment
from foster_lib.runs import Run, load_once, make_task, plan, train_full_run, trained
from foster_lib.scaling import UntrainedTask
from foster_lib.starts import start_sequences
from foster_lib.studies import smoke_settings, study_folder
from foster_lib.synthetic import SyntheticSequences
from foster_lib.task import Task

COMPARED = ("foster", "td3", "farzi", "gradient-matching", "trajectory-matching", "dconrec")
PARTS = {"td3": ("subset", (128, 256)), "farzi": ("subset", (128, 256)), "trajectory-matching": ("steps", (2, 3))}
"""A parameter that a step of a method grows linearly with, and two values to measure it at where a whole step would not
fit into memory: the items of TD3 and Farzi, which embed all of them as in their papers, and the student's steps that
trajectory matching unrolls, each with a graph of its own that is kept until the end."""

COSTS = ("step_seconds", "step_mib", "setup_mib", "gigaflop")
"""What is measured of a step, in this order in the table."""

OnStep = Callable[[int, Callable[[], SyntheticSequences]], None]


# ------------------------------------------------------------------- one distillation, watched


def distil(run: Run, task: Task, on_step: OnStep, progress: str = "") -> None:
    """Distil as `runs.run_one` does; `on_step` is called after each step with its number and a function that returns S
    so far.
    """
    method, parameters = get_method(run.method), dict(run.parameters)
    if run.method != "foster":
        method.function(task, run.settings.sequences, run.seed, progress, on_step=on_step, **parameters)
        return
    where = [parameters.pop(name, defaults("foster")[name]) for name in ("start_items", "start_labels", "start_filled")]
    start = start_sequences(task, run.settings.sequences, run.seed, *where)

    def tell(step: int, synthetic) -> None:
        on_step(step, synthetic.result)

    distill(task, start, FosterSettings(**parameters), seed=run.seed, progress=progress, on_iteration=tell)


def steps_of(run: Run) -> tuple[str, int]:
    """What a method calls the number of its steps, and that number."""
    known = defaults(run.method)
    name = next((name for name in ("outer_steps", "iterations") if name in known), None)
    if name is None:
        raise FosterError(f"{run.method} takes no steps: it is not distilled. Known: {', '.join(COMPARED)}.")
    return name, run.parameters.get(name, known[name])


def with_parameters(run: Run, **parameters) -> Run:
    """The run with some of its method's parameters changed."""
    methods = {**run.settings.methods, run.method: {**run.parameters, **parameters}}
    return replace(run, settings=replace(run.settings, methods=methods))


def with_part(run: Run, part: int) -> Run:
    """The run with so much of its parameter in `PARTS`.

    TD3 draws how many steps its student takes before the window that it unrolls: here the mean number, so that a few
    timed steps tell what one costs.
    """
    run = with_parameters(run, **{PARTS[run.method][0]: part})
    if run.method != "td3":
        return run
    window, most = ({**defaults("td3"), **run.parameters}[name] for name in ("window", "inner_steps"))
    return with_parameters(run, random_window=False, inner_steps=window + (most - window) // 2)


# ------------------------------------------------------------------------------ measurements


@dataclass(frozen=True)
class StepCost:
    """What a step costs. steps : timed; part : value of the method's parameter in `PARTS`, 0: as the run has it."""

    run: Run
    steps: int = 10
    part: int = 0

    @property
    def path(self) -> Path:
        return _path(self.run, "step", self.steps, self.part)

    @property
    def whole(self) -> int:
        """What `part` is a part of: the items of the catalogue, or the steps that the run unrolls; 0 without one."""
        if not self.part:
            return 0
        name = PARTS[self.run.method][0]
        if name == "subset":
            return load_once(self.run.settings.dataset).n_items
        return self.run.parameters.get(name, defaults(self.run.method)[name])

    def measure(self, device: str, progress: bool) -> dict[str, Any]:
        """Median seconds of a step, its memory and operations; the memory of what comes before the first."""
        run = with_parameters(self.run, **{steps_of(self.run)[0]: self.steps + 4})
        run = with_part(run, self.part) if self.part else run
        task, probe = _task(run, device, progress), StepProbe(device)
        distil(run, task, lambda step, _: probe(step), _label(run, "cost of a step") if progress else "")
        return {
            "step_seconds": float(np.median(probe.seconds)),
            "step_mib": probe.step_bytes / MIB,
            "setup_mib": probe.setup_bytes / MIB,
            "gigaflop": probe.operations / 1e9,
        }


@dataclass(frozen=True)
class Course:
    """Validation NDCG@10 along a distillation.

    timed : of the `StepCost` that says how many steps fit; marks : students; limit : seconds of all steps
    """

    run: Run
    timed: int = 10
    marks: int = 6
    limit: float = 450.0

    @property
    def path(self) -> Path:
        return _path(self.run, "course", self.timed, self.marks, self.limit)

    def measure(self, device: str, progress: bool) -> dict[str, Any]:
        """Steps, their seconds and what a student reaches on validation, at moments that double; the last is the end.

        Students have one seed, so that they differ by what they learn from alone.
        """
        cost = read_measurement(StepCost(self.run, self.timed).path)
        if cost is None:
            raise FosterError(f"measure what a step of {self.run.method} costs before its course.")
        name, planned = steps_of(self.run)
        steps = max(self.marks, min(planned, int(self.limit / cost["step_seconds"])))
        run = with_parameters(self.run, **{name: steps})
        marks = {1} | {max(1, round(steps / 2**power)) for power in range(self.marks - 1)}
        task, found, away = _task(run, device, progress), [], 0.0
        begin = time.perf_counter()

        def on_step(step: int, so_far: Callable[[], SyntheticSequences]) -> None:
            nonlocal away
            if step + 1 not in marks:
                return
            left = time.perf_counter()
            model, log = train_student(task, so_far().stored(), run.settings, run.student_seed)
            ranks = rank_queries(recommender_scorer(model), task.validation, task.n_items)
            found.append({"step": step + 1, "seconds": left - begin - away, "ndcg@10": ranks.metrics()["ndcg@10"]})
            found[-1]["student_seconds"] = log.seconds
            away += time.perf_counter() - left

        distil(run, task, on_step, _label(run, "course") if progress else "")
        return {"steps": steps, "planned_steps": planned, "course": found}


def measurements(
    profile: Profile,
    datasets: list[str],
    methods: list[str],
    seed: int,
    *,
    steps: int = 10,
    marks: int = 6,
    limit: float = 450.0,
    tuned: bool = True,
) -> list[StepCost | Course]:
    """All that Table 3 is made of: for each data set and method a step, a course, and a step that tunes the encoder's
    last layer, or two in part. DConRec is left out of the last: it embeds the whole catalogue some hundred times in a
    step.
    """
    found: list[StepCost | Course] = []
    for dataset in datasets:
        for run in plan(profile, [dataset], methods, [seed]):
            if run.student:
                continue
            run = replace(run, settings=smoke_settings(run.settings, profile))
            learns = replace(run, settings=replace(run.settings, encoder=replace(run.settings.encoder, tuned_layers=1)))
            found += [StepCost(run, steps), Course(run, steps, marks, limit)]
            if tuned and run.method in PARTS:
                found += [StepCost(learns, 2, part) for part in PARTS[run.method][1]]
            elif tuned and run.method != "dconrec":
                found.append(StepCost(learns, 2))
    return found


def measure(wanted: list[StepCost | Course], device: str = "cpu", progress: bool = True, fresh: bool = False) -> None:
    """Make those measurements that are not there yet, one after another."""
    device = resolve_device(device)
    for number, each in enumerate(wanted):
        if fresh or read_measurement(each.path) is None:
            record = {
                "kind": type(each).__name__,
                "dataset": each.run.settings.dataset,
                "method": each.run.method,
                "seed": each.run.seed,
                "tuned_layers": each.run.settings.encoder.tuned_layers,
                "part": getattr(each, "part", 0),
                "whole": getattr(each, "whole", 0),
                **each.measure(device, progress),
                **environment(device),
            }
            write_text(each.path, json.dumps(record, indent=1))
        if progress:
            print(f"{number + 1} of {len(wanted)}: {_label(each.run, type(each).__name__)}", flush=True)


def read_measurement(path: Path) -> dict[str, Any] | None:
    """What `measure` has left at `path`, or None; raises `FosterError` if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise FosterError(f"{path}: no readable measurement ({error}). Delete it and measure again.") from error


def _task(run: Run, device: str, progress: bool) -> Task:
    """What the run reads; full-data models that it needs are trained first."""
    if run.settings.encoder.tuned_layers:
        run = replace(run, settings=replace(run.settings, teachers=1))
        known = make_task(run, device)
        return UntrainedTask(**{each.name: getattr(known, each.name) for each in fields(Task)})
    for teacher in run.teachers:
        if not trained(teacher):
            train_full_run(teacher, device, progress)
    return make_task(run, device)


def _path(run: Run, kind: str, *what) -> Path:
    code = code_fingerprint("efficiency", "measuring")
    key = content_key({"run": run.key, "code": code, "kind": kind, "what": what})
    settings = run.settings
    encoder = "-tuned" if settings.encoder.tuned_layers else ""
    name = f"{run.method}-seed{run.seed}-{kind}{encoder}-{key}.json"
    return study_folder("efficiency", settings.profile) / "steps" / settings.dataset / name


def _label(run: Run, what: str) -> str:
    tuned = ", last layer tuned" if run.settings.encoder.tuned_layers else ""
    return f"{run.settings.dataset} {run.method}{tuned}: {what}"
