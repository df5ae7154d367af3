"""Profiles, and the runs that a table is made of."""

from dataclasses import replace

import pytest

from foster_lib.config import Profile, build, load_profile
from foster_lib.errors import FosterError
from foster_lib.methods import METHODS
from foster_lib.runs import plan
from foster_lib.training import TrainSettings


def test_a_plan_holds_every_run_once(settings, monkeypatch):
    """Unseeded methods once, students only where sequences are condensed; wrong names end it."""
    raw = {"encoder": {"name": "tiny"}, "students": 2}
    profile = Profile("cpu", ["toy"], [0, 1], "leave-one-out", [], raw, students=2)
    runs = plan(profile, ["toy"], ["popularity", "full", "random"], [0, 1])
    assert [(run.method, run.seed, run.student) for run in runs] == [
        ("popularity", 0, 0),
        ("full", 0, 0),
        ("full", 1, 0),
        *[("random", seed, student) for seed in (0, 1) for student in (0, 1)],
    ]
    assert [run.method for run in plan(profile, ["toy"], ["k-means+labels", "kd"], [0])] == ["kd", "kd"]  # one row
    planned = plan(profile, ["toy"], ["all"], [0])
    assert {run.method for run in planned} == set(METHODS) - {"teachers"}  # a single model labels
    with pytest.raises(FosterError, match="unknown method"):
        plan(profile, ["toy"], ["randm"], [0])
    with pytest.raises(FosterError, match="unknown split"):
        plan(profile, ["toy"], ["random"], [0], "temporl")


def test_dear_rows_have_one_seed_and_one_student(settings):
    """The rows that `once` names, on that data set alone; a wrong name there ends the plan."""

    def planned(once):
        raw = {"encoder": {"name": "tiny"}, "students": 2, "per_dataset": {"toy": {"once": once}}}
        profile = Profile("cpu", ["toy"], [1, 2], "leave-one-out", ["random", "longest", "full"], raw, students=2)
        return [(run.method, run.seed, run.student) for run in plan(profile, ["toy"], [], [1, 2])]

    everything = planned([])
    assert len(everything) == 4 + 4 + 2 and {run[0] for run in everything} == {"random", "longest", "full"}
    kept = [run for run in everything if run[0] != "random" or run == ("random", 1, 0)]
    assert planned(["random"]) == kept
    with pytest.raises(FosterError, match="unknown method"):
        planned(["randm"])
    with pytest.raises(FosterError, match="once must be a list"):
        planned("random")


@pytest.mark.parametrize(("split", "longest"), [(None, 4), ("leave-one-out", 4), ("temporal", 1)])
def test_further_rows_are_of_one_seed_on_another_split(settings, split, longest):
    """The rows that a data set adds to those of the profile; these, and rows of no table, keep all seeds."""
    rows = ["random", "longest", "full"]
    raw = {"encoder": {"name": "tiny"}, "students": 2, "per_dataset": {"toy": {"table2": rows}}}
    profile = Profile("cpu", ["toy"], [0, 1], "leave-one-out", ["random", "full"], raw, students=2)
    runs = [run.method for run in plan(profile, ["toy"], [*rows, "herding"], [0, 1], split)]
    assert [runs.count(method) for method in (*rows, "herding")] == [4, longest, 2, 4]
    rows[1] = "all"  # names none
    assert [run.method for run in plan(profile, ["toy"], [], [0, 1], split)].count("longest") == 4


def test_a_data_set_may_have_rows_of_its_own(settings, monkeypatch):
    """None named: the profile's; an empty list as well; rows that are named are for every data set."""
    monkeypatch.setattr("foster_lib.runs._split", lambda *_: None)
    own = {"one": {"table2": ["random", "random"]}, "two": {"table2": []}, "three": {"table2": ["all"]}}
    profile = Profile("test", [], [0], "leave-one-out", ["popularity"], {"per_dataset": own})
    rows = {name: [run.method for run in plan(profile, [name], [], [0])] for name in (*own, "four")}
    assert rows["one"] == ["random"] and rows["two"] == rows["four"] == ["popularity"]
    assert set(rows["three"]) == {*METHODS} - {"teachers"}
    assert [run.method for run in plan(profile, ["one"], ["linear"], [0])] == ["linear"]
    own["one"]["table2"] = "random"
    with pytest.raises(FosterError, match="per_dataset.one.table2 must be a list, not 'random'"):
        plan(profile, ["one"], [], [0])


def test_profiles_extend_each_other_and_refuse_unknown_keys():
    quick, cpu = load_profile("quick").settings("ml-100k"), load_profile("cpu").settings("ml-100k")
    assert quick.methods["foster"]["iterations"] < cpu.methods["foster"]["iterations"]
    steps = {"foster": {**quick.methods["foster"], "iterations": cpu.methods["foster"]["iterations"]}}
    assert replace(quick, profile="cpu", methods={**quick.methods, **steps}) == cpu
    assert load_profile("cpu").settings("foods").model.width != 0
    with pytest.raises(FosterError, match="unknown profile 'cqu'.*Did you mean 'cpu'"):
        load_profile("cqu")
    with pytest.raises(FosterError, match="'epoch'.*Did you mean 'epochs'"):
        build(TrainSettings, {"epoch": 3}, "test")
    with pytest.raises(FosterError, match="must be a number"):
        build(TrainSettings, {"learning_rate": "1e-3"}, "test")


def test_students_of_one_method_may_learn_otherwise(settings):
    """On one data set alone; a wrong method, key or shape ends the plan."""

    def planned(own, dataset="toy"):
        raw = {"encoder": {"name": "tiny"}, "student": {"epochs": 7}, "per_dataset": {dataset: {"own_student": own}}}
        profile = Profile("cpu", ["toy"], [0], "leave-one-out", [], raw)
        return {run.method: run for run in plan(profile, ["toy"], ["full", "random", "td3"], [0])}

    plain, own = planned({}), planned({"td3": {"muon_rate": 0.5}})
    assert own["td3"].settings.student == replace(plain["td3"].settings.student, muon_rate=0.5)
    assert own["td3"].settings.student.epochs == 7 and own["td3"].key != plain["td3"].key
    assert own["td3"].distilled_path == plain["td3"].distilled_path  # what it learns from is the same
    assert own["random"] == plain["random"] and own["full"] == plain["full"]
    assert planned({"td3": {"muon_rate": 0.5}}, "other") == plain
    for wrong, said in (
        ({"td4": {}}, "Did you mean 'td3'"),
        ({"td3": {"muon": 1.0}}, "muon"),
        ({"td3": 1.0}, "must hold methods"),
        ([1], "must hold methods"),
    ):
        with pytest.raises(FosterError, match=said):
            planned(wrong)
