"""Studies: which runs they are, what their table says, and the files they write, on the tiny data set."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
import yaml

from foster_lib import studies
from foster_lib.config import Profile, load_profile
from foster_lib.errors import FosterError
from foster_lib.evaluation import METRICS, paired_bootstrap
from foster_lib.execution import execute
from foster_lib.foster import FosterSettings
from foster_lib.methods import check_parameters
from foster_lib.records import read_ranks
from foster_lib.runs import load_once, plan
from foster_lib.studies import (
    COLUMNS,
    changed,
    chosen_methods,
    chosen_seeds,
    load_study,
    run_study,
    study_folder,
    study_table,
    write_study,
)
from foster_lib.study_tables import readable_table
from foster_lib.synthetic import SyntheticSequences

FOSTER = {"iterations": 1, "subset": 16, "windows": 4, "pool": 1}
RAW = {
    "encoder": {"name": "tiny"},
    "model": {"width": 16, "layers": 1, "heads": 2, "length": 6, "dropout": 0.1, "adapter_hidden": 8},
    "full": {"learning_rate": 1.0e-2, "epochs": 3, "batch_size": 16},
    "student": {"epochs": 4, "validate_every": 2},
    "sequences": 4,
    "methods": {"foster": FOSTER},
}
SWEEP = {"axis": "N", "change": "parameters.subset", "methods": ["foster"], "values": [16, {"all": 10**6}]}
SPACE = {
    "smoke": {"sequences": 3, "methods": {"foster": {"iterations": 3}}},
    "labels": {
        "ndcg@10": "NDCG@10",
        "recall@10": "Recall@10",
        "coverage": "coverage",
        "tail_share": "tail",
        "gini": "Gini",
        "bytes": "bytes",
    },
    "notes": {"NDCG@10": "A note.", "FOSTER minus it": "What is minus it.", "coverage": "What is covered."},
    "studies": {
        "parts": {
            "title": "Parts",
            "references": ["kd"],
            "panels": ["ndcg@10"],
            "variants": [
                {"name": "no regulariser", "change": {"parameters": {"regulariser": 0}}},
                {"name": "by hand", "change": {"parameters": {"regulariser": FosterSettings.regulariser}}},
            ],
            "smoke": ["no regulariser"],
        },
        "sizes": {
            "title": "Sizes",
            "note": "Of this study alone.",
            "panels": ["ndcg@10", "coverage", "tail_share"],
            "collapse": True,
            "columns": ["gini"],
            "sweeps": [{**SWEEP, "smoke": [8]}],
        },
        "costs": {"title": "Costs", "references": "table2", "panels": ["bytes"], "run": False},
    },
}


@pytest.fixture
def space(toy, monkeypatch):
    """A function that writes the studies' file, beside the tiny data set."""
    monkeypatch.setattr(studies, "SPACE", toy / "studies.yaml")

    def write(content: dict = SPACE) -> None:
        (toy / "studies.yaml").write_text(yaml.safe_dump(content))

    write()
    return write


@pytest.fixture
def profile():
    return Profile("cpu", ["toy"], [0, 1], "leave-one-out", ["full", "untrained", "random", "foster"], RAW)


def quiet(line):
    pass


def test_runs_of_table_2_are_reused(space, profile):
    """FOSTER and the references are the runs that Table 2 has; a broken-off study computes only the rest."""
    execute(plan(profile, ["toy"], ["full", "untrained", "kd", "foster"], [0]), say=quiet, progress=False)
    study = load_study("parts", profile)
    planned = study.runs(profile, ["toy"], [0])
    assert len({run.path for _, run in planned}) == 5 and len(planned) == 6
    said = []
    run_study(study, planned, say=said.append, progress=False)
    assert said[0].startswith("4 of 5 runs are reused") and len(said) == 1 + 1
    said.clear()
    run_study(study, planned, say=said.append, progress=False)
    assert said == [said[0]] and said[0].startswith("5 of 5")


def test_a_change_makes_another_key_and_a_default_does_not(space, profile):
    base = plan(profile, ["toy"], ["foster"], [0])[0]

    def key(method="foster", **change):
        run = replace(base, method=method)
        return replace(run, settings=changed(run.settings, method, change)).key

    assert key(parameters={"regulariser": FosterSettings.regulariser}) == key(parameters={"subset": 16}) == base.key
    different = [
        base.key,
        key(parameters={"regulariser": 0}),
        key(parameters={"subset": 512}),  # the default of the library is not this profile's
        key(sequences=5),
        key(model={"length": 5}),
        key(student={"epochs": 5}),
        key(full={"epochs": 4}),
        key(methods={"foster": {"iterations": 2}}),
    ]
    assert len(set(different)) == len(different)
    assert key("full", sequences=5) == key("full") and key("full", model={"length": 5}) != key("full")
    assert changed(base.settings, "foster", {"parameters": {"subset": None, "pool": None}}).methods["foster"] == {
        name: value for name, value in FOSTER.items() if name not in ("subset", "pool")
    }  # null: as the library has it
    assert base.settings.methods == {"foster": FOSTER}  # nothing was changed in place


def test_a_sequence_keeps_its_number_of_windows(space, profile):
    """Where the model reads fewer items at a time, a synthetic sequence gets shorter too."""
    settings = replace(plan(profile, ["toy"], ["foster"], [0])[0].settings, sequence_length=12)
    assert changed(settings, "foster", {"model": {"length": 3}}).sequence_length == 6
    assert changed(settings, "foster", {"model": {"width": 8}}).sequence_length == 12


def test_methods_choose_the_lines_of_a_study(space, profile):
    """Names of other rows are left aside, all and none stand for all lines, a name that no row has is an error."""
    study = load_study("sizes", profile)

    def lines(methods):
        planned = study.runs(profile, ["toy"], [0], None, methods)
        assert {"full", "untrained", "foster"} <= {
            run.method for variant, run in planned if variant.sweep == "reference"
        }
        return {run.method for variant, run in planned if variant.sweep != "reference"}

    assert lines("") == lines("all") == lines("random+labels") == lines("foster kd") == {"foster"}
    assert chosen_methods("kd random+labels", ["foster", "kd", "random", "kd"]) == ["kd"]
    assert chosen_methods("k-means+labels", ["foster", "kd"]) == ["kd"]
    assert chosen_methods("all", ["foster", "kd", "kd"]) == ["foster", "kd"]
    with pytest.raises(FosterError, match="unknown method 'fosterr'"):
        lines("fosterr")
    assert (
        chosen_seeds("", profile) == [0, 1]
        and chosen_seeds("3 3 1", profile) == [3, 1]
        and chosen_seeds(2, profile) == [2]
    )
    with pytest.raises(FosterError, match="whole numbers"):
        chosen_seeds("one", profile)


def test_the_smoke_profile_has_values_of_its_own(space, profile):
    smoke = replace(profile, name="smoke")
    study = load_study("parts", smoke)
    assert [variant.name for variant in study.variants if not variant.sweep] == ["no regulariser"]
    settings = [run.settings for _, run in study.runs(smoke, ["toy"], [0])]
    assert {one.sequences for one in settings} == {3}
    assert all(one.methods["foster"]["iterations"] == 3 and one.methods["foster"]["subset"] == 16 for one in settings)
    assert [v.value for v in load_study("sizes", smoke).variants if v.sweep == "N"] == ["8"]
    assert [v.value for v in load_study("sizes", profile).variants if v.sweep == "N"] == ["16", "all"]
    assert study_folder("parts", "smoke", "temporal").parts[-2:] == ("smoke", "parts-temporal")
    assert study_folder("parts", "cpu").name == "parts"


def test_settings_of_a_study_hold_for_all_its_rows(space, profile):
    """For references and variants; what the profile `smoke` lays over a study comes after them."""
    parts = {**SPACE["studies"]["parts"], "settings": {"sequences": 2, "model": {"width": 8}}}
    space({**SPACE, "studies": {"parts": parts}})
    for chosen, sequences in ((profile, 2), (replace(profile, name="smoke"), 3)):
        runs = [run for _, run in load_study("parts", chosen).runs(chosen, ["toy"], [0])]
        assert {run.method for run in runs} == {"full", "untrained", "kd", "foster"}
        assert {(run.settings.sequences, run.settings.model.width) for run in runs} == {(sequences, 8)}


def test_some_data_sets_have_fewer_rows(space, profile):
    """The `rows` of a study name those that a data set has beside the references; a wrong name is an error."""

    def loaded(rows):
        space({**SPACE, "studies": {"parts": {**SPACE["studies"]["parts"], "rows": {"ml-100k": rows}}}})
        return load_study("parts", profile)

    planned = loaded(["no regulariser"]).runs(profile, ["toy", "ml-100k"], [3, 1])
    for name, further in (("toy", {"no regulariser", "by hand"}), ("ml-100k", {"no regulariser"})):
        own = [(v, run) for v, run in planned if run.settings.dataset == name]
        assert {v.name for v, _ in own if v.sweep != "reference"} == further
        assert {v.method for v, _ in own if v.sweep == "reference"} == {"full", "untrained", "kd", "foster"}
        assert {run.seed for _, run in own} == {3, 1}
    with pytest.raises(FosterError, match="row of study 'parts' on ml-100k: 'no reset'"):
        loaded(["no reset"])


def test_the_table_is_what_the_manifests_say(space, profile, tmp_path):
    profile = replace(profile, students=2)
    study = load_study("sizes", profile)
    planned, table = run_study(study, study.runs(profile, ["toy"], [0, 1]), say=quiet, progress=False)
    assert list(table.columns) == COLUMNS
    cells = table.set_index(["variant", "metric"])
    by_name: dict[str, list] = {}
    for variant, run in planned:
        by_name.setdefault(variant.name, []).append(run)
    assert list(by_name) == list(table["variant"].unique())

    def seed_means(name, figure):
        return [np.mean([figure(r.manifest()) for r in by_name[name] if r.seed == seed]) for seed in (0, 1)]

    for name, runs in by_name.items():
        assert len(runs) == (4 if runs[0].method == "foster" else 2)
        for metric in METRICS:
            values, cell = seed_means(name, lambda m, metric=metric: m["test"][metric]), cells.loc[(name, metric)]
            assert cell["mean"] == pytest.approx(np.mean(values)) and cell["runs"] == 2
            assert cell["std"] == pytest.approx(np.std(values, ddof=1))
            full, untrained = (cells.loc[(of, metric), "mean"] for of in ("Full data", "Untrained (text similarity)"))
            assert cell["ratio_to_full"] == pytest.approx(np.mean(values) / full)
            assert cell["recovered_gain"] == pytest.approx(
                (np.mean(values) - untrained) / (full - untrained), nan_ok=True
            )
        distances = seed_means(name, lambda m: m["details"].get("kl_to_teacher", np.nan))
        assert cells.loc[(name, "kl_to_teacher"), "mean"] == pytest.approx(np.mean(distances), nan_ok=True)
        assert (runs[0].method == "foster") == np.isfinite(distances).all()
    name = "FOSTER, N: all"
    own, cell = by_name[name], cells.loc[(name, "ndcg@10")]
    first = [run.manifest() for run in own if not run.student]
    teacher = np.mean([run.manifest()["seconds"]["training"] for run in by_name["Full data"]])
    distil = np.mean([manifest["seconds"]["distillation"] for manifest in first])
    assert cell["distil_seconds"] == pytest.approx(distil)
    train = np.mean([run.manifest()["seconds"]["training"] for run in own])  # a further student costs as much
    assert cell["total_seconds"] == pytest.approx(teacher + distil + train)
    assert cell["bytes"] == SyntheticSequences.load(own[0].distilled_path).size_in_bytes()
    assert cells.loc[("Full data", "ndcg@10"), "bytes"] == 4 * load_once("toy").statistics()["interactions"]
    assert (cells["as_profile"] == cells.index.get_level_values(0).isin(["FOSTER", "FOSTER, N: 16"])).all()
    assert cells.loc[("FOSTER, N: 16", "ndcg@10"), "mean"] == cells.loc[("FOSTER", "ndcg@10"), "mean"]
    assert pd.isna(cells.loc[("FOSTER", "coverage"), "ratio_to_full"]) and pd.isna(
        cells.loc[("FOSTER", "bytes"), "recovered_gain"]
    )

    path = write_study(study, planned, table, tmp_path / "out")
    text = path.read_text()
    assert "FOSTER, N: 16 †" in text and "Hardware" in text
    assert all(note in text for note in ("Of this study alone.", "A note.", "What is minus it.", "What is covered."))
    written = pd.read_csv(tmp_path / "out" / "sizes.csv")
    assert list(written.columns) == COLUMNS and len(written) == len(table)
    assert written["mean"].to_numpy() == pytest.approx(table["mean"].to_numpy(), rel=1e-5, nan_ok=True)
    for suffix in ("tex", "png", "pdf"):
        assert (tmp_path / "out" / f"sizes.{suffix}").stat().st_size > 500
    assert not list((tmp_path / "out").glob(".*"))


def test_a_study_with_another_number_of_sequences(space, profile):
    """All rows have it, in the profile `smoke` too, and the title names it."""
    few = {**SPACE["studies"]["parts"], "title": "{sequences}", "settings": {"sequences": 2}}
    space({**SPACE, "studies": {"few": few}})
    for chosen, asked, expected in ((profile, 0, 2), (profile, 5, 5), (replace(profile, name="smoke"), 5, 5)):
        study = load_study("few", chosen, asked)
        assert study.spec["title"] == str(expected)
        runs = [run for _, run in study.runs(chosen, ["toy"], [0])]
        assert len(runs) > 3 and {run.settings.sequences for run in runs} == {expected}


def test_foster_is_compared_at_as_many_sequences(space, profile):
    """A row of four sequences with FOSTER's four, one of three with FOSTER's three, whatever the profile has."""
    sweep = {"axis": "n", "change": "sequences", "methods": ["foster", "kd"], "values": [3, 4], "smoke": [3]}
    space({**SPACE, "studies": {"counts": {"title": "Counts", "panels": ["ndcg@10"], "sweeps": [sweep]}}})
    study = load_study("counts", profile)
    planned, table = run_study(study, study.runs(profile, ["toy"], [0]), say=quiet, progress=False)
    runs = [(variant.name, run) for variant, run in planned]
    shown = readable_table(study.spec, table, runs).set_index("Row")["FOSTER minus it, 95 %"]
    per_user = {name: read_ranks(run.path).per_user("ndcg@10") for name, run in runs}
    names = {(run.method, run.settings.sequences): name for name, run in runs}
    for count in (3, 4):
        ours, theirs = names["foster", count], names["kd", count]
        test = paired_bootstrap(per_user[ours], per_user[theirs])
        assert shown[theirs].startswith(f"{test['difference']:+.4f} [{test['low']:+.4f}, {test['high']:+.4f}]")
        assert not any(shown[row] for row in shown.index if row.removesuffix(" †") == ours)
    without = readable_table(study.spec, table, [(name, run) for name, run in runs if name != names["foster", 3]])
    without = without.set_index("Row")[shown.name]
    assert without[names["kd", 3]] == "" and without[names["kd", 4]] == shown[names["kd", 4]]


def test_foster_is_compared_at_the_same_value(space, profile):
    """KD whose students take three steps with FOSTER whose students take three; FOSTER's row with FOSTER as it is."""
    sweep = {"axis": "steps", "change": "student.epochs", "methods": ["foster", "kd"], "values": [3], "smoke": [3]}
    space({**SPACE, "studies": {"steps": {"title": "Steps", "panels": ["ndcg@10"], "sweeps": [sweep]}}})
    study = load_study("steps", profile)
    planned, table = run_study(study, study.runs(profile, ["toy"], [0]), say=quiet, progress=False)
    runs = [(variant.name, run) for variant, run in planned]
    shown = readable_table(study.spec, table, runs).set_index("Row")["FOSTER minus it, 95 %"]
    own = {(v.method, v.sweep): read_ranks(run.path).per_user("ndcg@10") for v, run in planned}
    names = {(v.method, v.sweep): v.name for v, _ in planned}
    for row, rival in ((("kd", "steps"), ("foster", "steps")), (("foster", "steps"), ("foster", "reference"))):
        assert shown[names[row]].startswith(f"{(own[rival] - own[row]).mean():+.4f} ["), row
    assert not np.isclose(own["foster", "steps"].mean(), own["foster", "reference"].mean())


def test_costs_are_read_and_nothing_is_run(space, profile, monkeypatch, tmp_path):
    execute(plan(profile, ["toy"], ["full", "random"], [0]), say=quiet, progress=False)
    monkeypatch.setattr(studies, "execute", lambda *_, **__: pytest.fail("a run was started"))
    study = load_study("costs", profile)
    planned, table = run_study(study, study.runs(profile, ["toy"], [0, 1]))
    assert [run.method for _, run in planned] == ["full", "random"]
    costs = table[table["metric"] == "ndcg@10"].set_index("method")
    assert costs.loc["random", "bytes"] == 4 * 6 * 9 and (costs["runs"] == 1).all()
    assert costs.loc["random", "total_seconds"] == costs.loc["random", ["distil_seconds", "train_seconds"]].sum()
    assert pd.isna(costs.loc["random", "recovered_gain"])  # the untrained model was not run
    path = write_study(study, planned, table, tmp_path / "costs")
    # Only what is in the table is explained below it.
    assert "\nA note.\n" in path.read_text() and "minus it" not in path.read_text()
    assert path.with_suffix(".png").is_file()
    # Without full data nobody knows what a teacher cost.
    assert study_table(study, planned[1:])["ratio_to_full"].isna().all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"variants": [{"name": "a", "chnge": {}}]}, "'chnge'.*Did you mean 'change'"),
        ({"variants": [{"name": "a", "change": {"parameter": {}}}]}, "'parameter'.*Did you mean 'parameters'"),
        ({"variants": [{"name": "a", "change": {"parameters": {"subst": 3}}}]}, "'subst'.*Did you mean 'subset'"),
        ({"variants": [{"name": "a", "method": "foser"}]}, "unknown method 'foser'"),
        ({"sweeps": [{**SWEEP, "value": [1]}]}, "'value'.*Did you mean 'values'"),
        ({"sweeps": [{**SWEEP, "change": "parameters.subst"}]}, "'subst'"),
        ({"sweeps": [{**SWEEP, "change": "modell.length"}]}, "'modell'.*Did you mean 'model'"),
        ({"settings": {"sequence": 3}}, "'sequence'.*Did you mean 'sequences'"),
        ({"panels": ["ndcg@7"]}, "'ndcg@7'"),
        ({"panel": ["ndcg@10"]}, "'panel'.*Did you mean 'panels'"),
    ],
)
def test_unknown_keys_are_refused(space, profile, change, message):
    space({**SPACE, "studies": {"wrong": {"title": "Wrong", "panels": ["ndcg@10"], **change}}})
    with pytest.raises(FosterError, match=message):
        load_study("wrong", profile)


def test_wrong_settings_of_a_section_are_refused(space, profile):
    settings = profile.settings("toy")
    with pytest.raises(FosterError, match="'lenght'.*Did you mean 'length'"):
        changed(settings, "foster", {"model": {"lenght": 5}})
    with pytest.raises(FosterError, match="unknown study 'part'.*Did you mean 'parts'"):
        load_study("part", profile)


@pytest.mark.parametrize("name", yaml.safe_load(studies.SPACE.read_text(encoding="utf-8"))["studies"])
@pytest.mark.parametrize("profile_name", ["smoke", "cpu", "paper"])
def test_every_study_that_is_shipped_can_be_planned(name, profile_name):
    """Each is read for each profile; each sweep passes through the published settings."""
    chosen = load_profile(profile_name)
    study = load_study(name, chosen)
    names = [variant.name for variant in study.variants]
    assert len(set(names)) == len(names)
    settings = chosen.settings("ml-100k")
    for variant in study.variants:
        if variant.method == "foster":
            own = changed(changed(settings, "", study.laid_over), variant.method, variant.change)
            check_parameters("foster", own.methods["foster"])
            known = {field.name for field in fields(FosterSettings)}
            FosterSettings(**{name: value for name, value in own.methods["foster"].items() if name in known})
    sweeps = {variant.sweep for variant in study.variants} - {"", "reference"}
    if profile_name == "cpu":
        unchanged = {
            v.sweep
            for v in study.variants
            if v.method == "foster" and changed(settings, "foster", v.change) == settings
        }
        assert sweeps <= unchanged
