"""Published figures against the code: what holds, what was tampered with, what is stale, what is missing."""

import json
import re
import shutil

import pandas as pd
import pytest

import foster_lib.runs
from foster_lib.config import load_profile
from foster_lib.evaluation import METRICS
from foster_lib.execution import execute
from foster_lib.runs import plan
from foster_lib.tables import long_table, table2_folder, write_table2
from foster_lib.verify import main, remake
from tests.conftest import make_tables, write_tables
from tests.shop import PROFILE, settle, write_profile

ROWS = ["full", "popularity", "random", "foster"]
SMALL = {**PROFILE, "seeds": [0, 1], "students": 2, "full": {**PROFILE["full"], "epochs": 3}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A published table: two seeds, two students on each set of sequences."""
    folder = tmp_path_factory.mktemp("verify")
    write_tables(folder / "data", *make_tables())
    write_profile(folder, SMALL)
    with pytest.MonkeyPatch.context() as patch:
        settle(patch, folder)
        runs = the_runs()
        execute(runs, say=lambda line: None, progress=False)
        write_table2(runs, table2_folder("mini"))
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy of it, to tamper with."""
    shutil.copytree(made, tmp_path / "copy")
    settle(monkeypatch, tmp_path / "copy")
    return tmp_path / "copy"


def the_runs():
    profile = load_profile("mini")
    return plan(profile, ["toy"], ROWS, profile.seeds)


def verified(capsys, *arguments):
    """Exit code, lines of verdicts (the last one sums up), and the errors."""
    code = main(["--datasets", "toy", "--profile", "mini", "--jobs", "1", "--device", "cpu", *arguments])
    out, err = capsys.readouterr()
    return code, out.splitlines(), [line for line in err.splitlines() if "error" in line or "Traceback" in line]


def change_table(rows, column, change):
    path = table2_folder("mini") / "table2.csv"
    table = pd.read_csv(path)
    chosen = table.eval(rows)
    assert chosen.any()
    table.loc[chosen, column] = change(table.loc[chosen, column])
    table.to_csv(path, index=False)


def test_an_untouched_table_is_held(place, capsys):
    code, lines, errors = verified(capsys)
    assert (code, errors) == (0, []) and lines[-1] == "18 of 18 held"  # four rows, two of them made again: 7 metrics
    assert len(lines) == 19 and all(line.startswith("held ") for line in lines[:-1])
    assert sum("Full data made again (seed 0)" in line for line in lines) == len(METRICS)
    assert sum("FOSTER made again (4 students)" in line for line in lines) == len(METRICS)


def test_models_made_again_have_the_very_same_figures(place):
    runs = [run for run in the_runs() if run.method in ("full", "random", "foster")]
    published = {run.path.name: run.manifest()["test"] for run in runs}
    assert remake(runs, 1, "cpu") == published
    foster = [published[run.path.name]["mrr"] for run in runs if run.method == "foster"]
    assert len(set(foster)) == 4  # each student has a seed of its own


def test_students_are_trained_on_the_stored_sequences(place):
    first, other = (run for run in the_runs() if run.method == "random" and not run.student)
    shutil.copy(other.distilled_path, first.distilled_path)
    assert remake([first], 1, "cpu")[first.path.name] != first.manifest()["test"]


@pytest.mark.parametrize(("column", "shift"), [("mean", 0.0002), ("std", 0.0002), ("std", float("nan"))])
def test_a_figure_that_was_tampered_with_is_not_held(place, capsys, column, shift):
    change_table("method == 'random' and metric == 'mrr'", column, lambda figure: figure + shift)
    code, lines, _ = verified(capsys)
    bad = [line for line in lines if line.startswith("NOT HELD")]
    assert code == 1 and lines[-1] == "17 of 18 held, 1 not"
    assert len(bad) == 1 and f"Random, table against manifests, {column} of mrr" in bad[0]


def test_a_line_that_was_taken_out_is_not_held(place, capsys):
    path = table2_folder("mini") / "table2.csv"
    table = pd.read_csv(path)
    table[(table["method"] != "foster") | (table["metric"] != "mrr")].to_csv(path, index=False)
    code, lines, _ = verified(capsys)
    bad = [line for line in lines if line.startswith("NOT HELD")]
    assert code == 1 and "FOSTER, table against manifests, mean of mrr" in bad[0]
    assert all(" of mrr: " in line for line in bad)


@pytest.mark.parametrize("method", ["full", "foster"])
def test_a_forged_run_is_not_held(place, capsys, method):
    """Manifests and table say the same; a model made again says otherwise."""
    for run in the_runs():
        if run.method == method:
            manifest = run.manifest()
            manifest["test"]["ndcg@10"] += 0.5
            run.path.write_text(json.dumps(manifest))
    long = long_table([run.manifest() for run in the_runs()])
    long.to_csv(table2_folder("mini") / "table2.csv", index=False)
    code, lines, _ = verified(capsys)
    [bad] = [line for line in lines if line.startswith("NOT HELD")]
    assert code == 1 and "made again" in bad and bad.split(":")[0].endswith("ndcg@10")


def test_rows_of_other_settings_are_stale(place, capsys):
    """Those that trained a student; what does not depend on the change is still checked."""
    write_profile(place, {**SMALL, "student": {**SMALL["student"], "epochs": 9}})
    code, lines, _ = verified(capsys)
    stale = [line.split(":")[0].split(", ")[1] for line in lines if line.startswith("STALE")]
    assert code == 1 and stale == ["Random", "FOSTER"] and lines[-1] == "9 of 11 held, 2 not"
    assert not any("FOSTER made again" in line for line in lines)


def test_rows_of_other_code_are_stale(place, capsys, monkeypatch):
    monkeypatch.setattr(foster_lib.runs, "code_fingerprint", lambda *modules: "another")
    code, lines, _ = verified(capsys)
    assert code == 1 and [line.split()[0] for line in lines] == ["STALE"] * 4 + ["0"]


def test_a_row_that_the_code_does_not_know_is_stale(place, capsys):
    change_table("method == 'random'", "method", lambda names: "at-random")
    code, lines, _ = verified(capsys)
    assert (
        code == 1 and lines[0].startswith("STALE     toy, at-random: no method") and lines[-1] == "17 of 18 held, 1 not"
    )


def test_a_missing_table_is_one_line(place, capsys):
    path = table2_folder("mini") / "table2.csv"
    code, lines, errors = verified(capsys, "--datasets", "tou")
    assert (code, lines) == (2, []) and len(errors) == 1
    assert re.search("unknown data set of profile 'mini' in .*table2.csv: 'tou'. Did you mean 'toy'", errors[0])
    for damage in (lambda: path.write_text("method,metric\nfull,mrr\n"), path.unlink):
        damage()
        code, lines, errors = verified(capsys)
        assert (code, lines) == (2, []) and len(errors) == 1
        assert "no readable table. Make it with `make reproduce-table2 PROFILE=mini`" in errors[0]


def test_a_table_made_here_does_not_replace_the_published_one():
    """The README's first command leaves what its second compares with as it was."""
    published = {table2_folder("cpu", split) for split in ("", "temporal")}
    assert not published & {
        table2_folder(profile, split) for profile in ("quick", "smoke") for split in ("", "temporal")
    }
