"""The search on validation: trials, their records, and that the test set is not read."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
import yaml

from foster_lib import tune
from foster_lib.config import PROFILES, Profile, load_profile
from foster_lib.errors import FosterError
from foster_lib.methods import check_parameters

RAW = {
    "encoder": {"name": "tiny"},
    "model": {"width": 16, "layers": 1, "length": 6, "adapter_hidden": 8},
    "full": {"epochs": 2, "batch_size": 16, "patience": 0},
    "student": {"epochs": 4, "validate_every": 2},
    "sequences": 4,
}
SPACE = {
    "toy": {
        "targets": 2,
        "trials": [{}, {"model": {"width": 8}}],
        "methods": {
            "random": [{}],
            "random+labels": [{}],
            "linear": [{"regularisation": 1.0}],
            "foster": [{"iterations": 1, "pool": 1}],
        },
    }
}


@pytest.fixture
def space(toy, monkeypatch):
    """The tiny data set, a small profile and a search space of its own."""
    monkeypatch.setattr(tune, "SPACE", toy / "search.yaml")
    (toy / "search.yaml").write_text(yaml.safe_dump(SPACE))
    small = Profile("cpu", ["toy"], [0], "leave-one-out", [], RAW)
    monkeypatch.setattr(tune, "load_profile", lambda name: small)
    return toy


def test_full_data_trials_are_recorded_sorted_and_kept(space):
    table = tune.search("toy", "full", 1, "cpu")
    assert set(table["width"]) == {8, 16} and (table["targets"] == 2).all()
    assert table["validation_ndcg@10"].is_monotonic_decreasing
    written = pd.read_csv(space / "results" / "tuning" / "toy-full.csv")
    assert written["validation_ndcg@10"].tolist() == table["validation_ndcg@10"].tolist()
    records = sorted((space / "results" / "tuning" / "toy").glob("*.json"))
    times = [path.stat().st_mtime_ns for path in records]
    tune.search("toy", "full", 1, "cpu")
    assert [path.stat().st_mtime_ns for path in records] == times and len(times) == 2


@pytest.mark.parametrize("method", ["random", "random+labels", "linear", "foster"])
def test_method_trials(space, method):
    """Students or a scorer are validated; what a trial changes reaches the method."""
    table = tune.search("toy", method, 1, "cpu")
    record = json.loads(next((space / "results" / "tuning" / "toy").glob(f"{method}-*.json")).read_text())
    assert 0 <= table["validation_ndcg@10"].iloc[0] <= 1
    assert len(record["values"]) == (1 if method == "linear" else tune.STUDENTS)
    assert json.loads(record["change"]) == SPACE["toy"]["methods"][method][0]


def test_students_of_a_trial_do_not_share_the_teachers_seed(space, monkeypatch):
    """They are those of Table 2: from the teacher's own first weights they would learn too well."""
    seeds, real = [], tune.train_student
    monkeypatch.setattr(tune, "train_student", lambda *given: seeds.append(given[3]) or real(*given))
    tune.search("toy", "random+labels", 1, "cpu")
    trial = tune.trials("toy", "random+labels")[0]
    assert seeds == [replace(trial.run, student=number).student_seed for number in range(tune.STUDENTS)]
    assert trial.run.seed not in seeds and len(set(seeds)) == tune.STUDENTS


def test_the_test_set_is_not_read(space, monkeypatch):
    """Test targets are replaced by others: nothing changes."""
    before = tune.search("toy", "random", 1, "cpu")["validation_ndcg@10"].tolist()
    real = tune.wide_validation

    def without_test(dataset, targets):
        split = real(dataset, targets)
        split.test.targets[:] = 0
        return split

    monkeypatch.setattr(tune, "wide_validation", without_test)
    next((space / "results" / "tuning" / "toy").glob("random-*.json")).unlink()
    assert tune.search("toy", "random", 1, "cpu")["validation_ndcg@10"].tolist() == before


def test_unknown_names_are_answered(space):
    with pytest.raises(FosterError, match="unknown data set in search.yaml"):
        tune.trials("toys", "full")
    with pytest.raises(FosterError, match="Did you mean 'foster'"):
        tune.trials("toy", "fostr")


def test_the_committed_space_and_profiles_name_known_parameters():
    """Every trial of search.yaml and every profile resolves."""
    space = yaml.safe_load(tune.SPACE.read_text())
    for dataset, own in space.items():
        for method in ["full", *own.get("methods", {})]:
            for trial in tune.trials(dataset, method):
                check_parameters(method, trial.run.parameters)
    for path in PROFILES.glob("*.yaml"):
        profile = load_profile(path.stem)
        for method, parameters in profile.settings("ml-100k").methods.items():
            check_parameters(method, parameters)
