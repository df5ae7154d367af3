"""What methods cost, step by step: against the methods themselves, and on figures with known answers."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from foster_lib import efficiency
from foster_lib.efficiency import (
    COMPARED,
    Course,
    StepCost,
    distil,
    measure,
    measurements,
    steps_of,
    with_parameters,
    with_part,
)
from foster_lib.efficiency_tables import efficiency_table, projected, write_efficiency
from foster_lib.errors import FosterError
from foster_lib.methods import get_method
from foster_lib.recipes import train_student
from foster_lib.runs import Run
from foster_lib.scaling import UntrainedTask

FEW = {
    "foster": {"iterations": 3, "windows": 2, "subset": 16, "pool": 1, "inner_steps": 1},
    "td3": {"outer_steps": 3, "inner_steps": 2, "window": 1, "windows": 2, "rank": 2},
    "farzi": {"outer_steps": 3, "inner_steps": 2, "windows": 2, "latent": 4},
    "gradient-matching": {"iterations": 3, "windows": 2, "subset": 16},
    "distribution-matching": {"iterations": 3, "windows": 2, "subset": 16},
    "trajectory-matching": {"iterations": 3, "subset": 16, "steps": 2, "checkpoints": 1, "expert_epochs": 1},
    "dconrec": {"iterations": 3, "masks": 2, "windows": 2, "added": 1},
}


def run_of(settings, method, **parameters) -> Run:
    methods = {method: {**FEW[method], **parameters}}
    return Run(replace(settings, dataset="toy", profile="test", methods=methods), method, seed=0)


@pytest.mark.parametrize("method", FEW)
def test_watching_changes_nothing_and_the_last_step_is_the_result(settings, task, method):
    """S after the last step is what the method returns when nobody watches; earlier it is something else."""
    run, seen = run_of(settings, method), {}
    distil(run, task, lambda step, so_far: seen.update({step: so_far().stored().tensors()}))
    plain = get_method(method).function(task, run.settings.sequences, 0, **run.parameters).stored().tensors()
    assert list(seen) == [0, 1, 2]
    assert plain.keys() == seen[2].keys() and all(torch.equal(plain[name], seen[2][name]) for name in plain)
    if method != "dconrec":  # three steps may keep the same interactions
        assert any(not torch.equal(seen[0][name], seen[2][name]) for name in plain)


def test_steps_by_their_names(settings):
    assert steps_of(run_of(settings, "td3")) == ("outer_steps", 3)
    assert steps_of(run_of(settings, "foster")) == ("iterations", 3)
    longer = with_parameters(run_of(settings, "td3"), outer_steps=7)
    assert steps_of(longer) == ("outer_steps", 7) and longer.parameters["rank"] == 2
    with pytest.raises(FosterError, match="random takes no steps"):
        steps_of(replace(run_of(settings, "td3"), method="random"))


def test_a_line_through_two_measurements():
    assert projected({256: 50.0, 128: 30.0}, 1000) == pytest.approx(10 + 1000 * 20 / 128)
    assert projected({128: 30.0, 256: 50.0}, 256) == 50.0


@pytest.fixture
def records(settings, monkeypatch, tmp_path):
    """Measurements of made-up costs in files of their own."""
    monkeypatch.setenv("FOSTER_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(Run, "key", property(lambda run: f"{run.method}{run.settings.encoder.tuned_layers}"))
    base = {"dataset": "toy", "seed": 0, "whole": 1000, "hardware": "abacus", "device": "cpu"}
    base["created"] = "2026-01-02T03:04:05"
    made = []

    def put(kind, method, tuned=0, **found):
        run = run_of(settings, method)
        run = replace(run, settings=replace(run.settings, encoder=replace(run.settings.encoder, tuned_layers=tuned)))
        each = Course(run) if kind == "Course" else StepCost(run, part=found.get("part", 0))
        record = {**base, "kind": kind, "method": method, "tuned_layers": tuned, "part": 0, **found}
        each.path.parent.mkdir(parents=True, exist_ok=True)
        each.path.write_text(json.dumps(record))
        made.append(each)

    def cost(seconds, mib):
        return {"step_seconds": seconds, "step_mib": mib, "setup_mib": 1.0, "gigaflop": seconds}

    def moments(*pairs):
        return [{"step": 1, "seconds": seconds, "ndcg@10": value} for seconds, value in pairs]

    put("StepCost", "foster", **cost(0.5, 10.0))
    put("Course", "foster", steps=30, planned_steps=30, course=moments((1, 0.1), (4, 0.3), (9, 0.2)))
    put("StepCost", "td3", **cost(2.0, 250.0))
    put("Course", "td3", steps=12, planned_steps=300, course=moments((2, 0.05), (24, 0.15)))
    put("StepCost", "foster", tuned=1, **cost(1.0, 100.0))
    put("StepCost", "td3", tuned=1, **cost(2.0, 30.0), part=128)
    put("StepCost", "td3", tuned=1, **{**cost(3.0, 50.0), "step_seconds": 6.0}, part=256)
    return made


def test_the_table_of_known_costs(records, tmp_path):
    table = efficiency_table(records).set_index(["tuned_layers", "method"])
    assert table.loc[(0, "td3"), "memory_ratio"] == 25 and table.loc[(0, "td3"), "time_ratio"] == 4
    assert table.loc[(0, "foster"), ["best", "end", "seconds_to_best"]].tolist() == [0.3, 0.2, 4]
    assert table.loc[(1, "td3"), "step_mib"] == pytest.approx(30 + 20 / 128 * (1000 - 128))
    operations = 2 + 1 / 128 * (1000 - 128)
    assert table.loc[(1, "td3"), "gigaflop"] == pytest.approx(operations)
    assert table.loc[(1, "td3"), "step_seconds"] == pytest.approx(6 * operations / 3)  # not the line's 32
    assert table["projected"].tolist() == [False, False, False, True]
    path = write_efficiency(records, tmp_path / "out")
    text = path.read_text()
    assert "TD3 †" in text and "12 (300)" in text and "abacus" in text and "2026-01-02" in text
    assert "| FOSTER   | 0.50" in text and "last layer tuned" in text
    assert all((tmp_path / "out" / f"steps.{suffix}").stat().st_size > 300 for suffix in ("csv", "tex", "png", "pdf"))


def test_half_a_projection_is_none(records):
    """With one of the two sizes there is no line, and no row of costs that look measured."""
    table = efficiency_table(records[:-1]).set_index(["tuned_layers", "method"])
    assert not table.loc[(1, "td3"), "projected"] and np.isnan(table.loc[(1, "td3"), "step_mib"])
    assert efficiency_table([]).empty


def test_a_damaged_measurement_is_named(records):
    records[0].path.write_text('{"kind": ')
    with pytest.raises(FosterError, match=f"{records[0].path.name}: no readable measurement.*Delete it"):
        efficiency_table(records)


def test_what_is_measured_is_kept(settings, task, monkeypatch, tmp_path):
    """A measurement is made once; a course has as many steps as fit, and its clock stands still for students."""
    monkeypatch.setenv("FOSTER_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(Run, "key", "k")
    monkeypatch.setattr(efficiency, "_task", lambda *_: task)
    monkeypatch.setattr(efficiency, "make_task", lambda *_: task)
    clock = [0.0]
    monkeypatch.setattr(efficiency, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def slow_student(*arguments):
        clock[0] += 100
        return train_student(*arguments)

    monkeypatch.setattr(efficiency, "train_student", slow_student)
    run = run_of(settings, "td3", outer_steps=500)
    wanted = [StepCost(run, 2), Course(run, 2, 3, 0.0)]
    measure(wanted, progress=False)
    record = json.loads(wanted[0].path.read_text())
    assert record["step_mib"] > 0 and record["gigaflop"] > 0 and record["part"] == record["whole"] == 0
    course = json.loads(wanted[1].path.read_text())
    assert (course["steps"], course["planned_steps"]) == (3, 500)  # one for each student at least
    assert [moment["step"] for moment in course["course"]] == [1, 2, 3]
    assert [moment["seconds"] for moment in course["course"]] == [0, 0, 0]
    before = [each.path.stat().st_mtime_ns for each in wanted]
    measure(wanted, progress=False)
    assert [each.path.stat().st_mtime_ns for each in wanted] == before
    measure(wanted[:1], progress=False, fresh=True)
    assert wanted[0].path.stat().st_mtime_ns > before[0]


def test_a_course_without_its_step(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("FOSTER_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(Run, "key", "k")
    with pytest.raises(FosterError, match="what a step of td3 costs before"):
        Course(run_of(settings, "td3")).measure("cpu", False)


def test_which_measurements_there_are(monkeypatch, settings):
    """Methods whose step would not fit are measured in two parts where the encoder learns; DConRec is not."""
    monkeypatch.setattr(
        efficiency,
        "plan",
        lambda profile, datasets, methods, seeds: [
            replace(run_of(settings, method), student=student) for method in methods for student in (0, 1)
        ],
    )
    wanted = measurements(SimpleNamespace(name="cpu"), ["toy"], list(COMPARED), 0)
    assert all(not each.run.student for each in wanted)
    tuned = [(each.run.method, each.part) for each in wanted if each.run.settings.encoder.tuned_layers]
    assert ("td3", 128) in tuned and ("farzi", 256) in tuned and ("foster", 0) in tuned
    assert [part for method, part in tuned if method == "trajectory-matching"] == [2, 3]
    assert "dconrec" not in dict(tuned)
    plain = measurements(SimpleNamespace(name="cpu"), ["toy"], ["td3"], 0, tuned=False)
    assert [type(each) for each in plain] == [StepCost, Course]


def test_a_part_and_its_whole(settings, task, monkeypatch):
    """A part is a run with less of the method's parameter; the whole is the catalogue, or the unrolled steps."""
    monkeypatch.setattr(efficiency, "load_once", {"toy": SimpleNamespace(n_items=40)}.get)
    monkeypatch.setattr(efficiency, "_task", lambda *_: task)
    seen, plain = [], efficiency.distil
    monkeypatch.setattr(efficiency, "distil", lambda run, *rest: seen.append(run.parameters) or plain(run, *rest))
    td3, matched = run_of(settings, "td3"), run_of(settings, "trajectory-matching", steps=8)
    assert [StepCost(td3, part=12).whole, StepCost(matched, part=2).whole, StepCost(td3).whole] == [40, 8, 0]
    default = replace(matched, settings=replace(matched.settings, methods={}))
    assert StepCost(default, part=1).whole == 8
    costs = [
        each.measure("cpu", False) for each in (StepCost(td3, 2, 12), StepCost(matched, 2, 1), StepCost(matched, 2))
    ]
    assert [parameters.get("subset") for parameters in seen] == [12, 16, 16]
    assert [parameters["steps"] for parameters in seen[1:]] == [1, 8]
    assert costs[1]["gigaflop"] < costs[2]["gigaflop"] and costs[1]["step_mib"] < costs[2]["step_mib"]


@pytest.mark.parametrize(
    ("method", "parameters", "parts", "whole", "error"),
    [
        ("trajectory-matching", {"steps": 5}, (2, 3), 5, 1e-3),
        # The windows' own items are embedded besides: some are in the subset, others not.
        ("td3", {"inner_steps": 6, "window": 2}, (8, 16), 24, 0.03),
        ("farzi", {}, (8, 16), 24, 0.03),
    ],
)
def test_what_is_measured_in_part_grows_linearly(settings, task, monkeypatch, method, parameters, parts, whole, error):
    """Operations of two parts, continued to the whole, are those of the whole."""
    monkeypatch.setattr(efficiency, "_task", lambda *_: task)
    run = run_of(settings, method, **parameters)
    found = {part: StepCost(run, 2, part).measure("cpu", False)["gigaflop"] for part in (*parts, whole)}
    assert projected({part: found[part] for part in parts}, whole) == pytest.approx(found[whole], rel=error)


def test_td3_in_part_takes_the_mean_number_of_steps(settings):
    run = with_part(run_of(settings, "td3", inner_steps=40, window=8), 12)
    assert (run.parameters["inner_steps"], run.parameters["random_window"], run.parameters["subset"]) == (24, False, 12)
    assert "random_window" not in with_part(run_of(settings, "farzi"), 12).parameters


@pytest.mark.parametrize("method", ["foster", "td3", "trajectory-matching"])
def test_an_untrained_task_serves_to_measure_a_step(settings, task, method):
    """No file of a trained model is read, and checkpoints differ, without which a trajectory has no length."""
    known = {name: getattr(task, name) for name in task.__dataclass_fields__}
    untrained = UntrainedTask(**{**known, "trajectory_folder": None, "labeller_folders": ()})
    steps = []
    distil(run_of(settings, method), untrained, lambda step, _: steps.append(step))
    assert steps == [0, 1, 2]
    one, two = untrained.trajectory[:2]
    assert any(not torch.equal(one[name], two[name]) for name in one)
