"""Profiles, runs, manifests and tables on the tiny data set."""

import json
import shutil
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import foster_lib.records as records
import foster_lib.runs
from foster_lib.errors import FosterError
from foster_lib.execution import execute, resolve_device
from foster_lib.methods import CORESETS, LABELLED, METHODS, base_name
from foster_lib.paths import write_atomically
from foster_lib.records import code_fingerprint
from foster_lib.runs import Run, train_full_run, trajectory_folder
from foster_lib.synthetic import SyntheticSequences
from foster_lib.tables import COLUMNS, long_table, overview_figure, write_table2

QUICK = {
    "foster": {"iterations": 2, "subset": 16, "windows": 4, "pool": 1},
    "foster-tied": {"iterations": 2, "subset": 16, "windows": 4, "pool": 1},
    "foster-decoded": {"iterations": 2, "subset": 16, "windows": 4, "pool": 1},
    "foster-late": {"iterations": 2, "subset": 16, "windows": 4, "pool": 1},
    "foster-free": {"iterations": 2, "subset": 16, "windows": 4, "pool": 1},
    "id-sasrec": {"epochs": 2},
    "dconrec": {"iterations": 2, "added": 1},
    "dealrec": {"depth": 3},
    "gradient-matching": {"iterations": 2, "subset": 16},
    "distribution-matching": {"iterations": 2, "subset": 16},
    "trajectory-matching": {"iterations": 1, "subset": 16, "steps": 1, "expert_epochs": 1},
    "farzi": {"outer_steps": 2, "inner_steps": 2},
    "td3": {"outer_steps": 2, "inner_steps": 2, "window": 1},
}


@pytest.fixture
def settings(settings):
    """With few steps for every method."""
    return replace(settings, methods=QUICK)


def quiet(line):
    pass


def test_every_row_of_table_2_runs_and_makes_its_table(settings, tmp_path):
    runs = [Run(settings, method, seed) for method in METHODS for seed in (0, 1)]
    manifests = execute(runs, say=quiet, progress=False)
    assert [m["method"] for m in manifests] == [run.method for run in runs]
    for manifest in manifests:
        assert 0 <= manifest["test"]["ndcg@10"] <= 1 and manifest["data"]["users"] == 60
        assert manifest["hardware"] and manifest["peak_memory_mib"] > 0 and len(manifest["data"]["sha256"]) == 2
    kept = SyntheticSequences.load(next(r for r in runs if r.method == "foster").distilled_path)
    assert len(kept) == 4 and kept.labels is not None

    write_table2(runs, tmp_path / "table2")
    table = pd.read_csv(tmp_path / "table2" / "table2.csv")
    assert list(table.columns) == COLUMNS
    assert set(table["method"]) == set(METHODS) and len(table) == len(METHODS) * 7
    full = table[table["method"] == "full"]
    assert (full["ratio_to_full"] == 1).all()
    values = [m["test"]["ndcg@10"] for m in manifests if m["method"] == "random"]
    row = table[(table["method"] == "random") & (table["metric"] == "ndcg@10")].iloc[0]
    assert row["mean"] == pytest.approx(np.mean(values), rel=1e-5)
    assert row["std"] == pytest.approx(np.std(values, ddof=1), rel=1e-4) and row["runs"] == 2

    fewer = [run for run in runs if (run.method, run.seed) != ("longest", 1)]
    for chosen, said in ((runs, False), (fewer, True), ([run for run in runs if run.seed == 0], False)):
        text = write_table2(chosen, tmp_path / "fewer").read_text()
        assert ("where none is shown, one seed and one student" in text) == said
    text = (tmp_path / "table2" / "table2.md").read_text()
    assert "FOSTER" in text and "cores (cpu)" in text
    for method, steps in (("td3", 2), ("trajectory-matching", 1), ("foster-free", 2)):
        assert f"{METHODS[method].title} {steps}" in text[text.index("Steps on S:") :]
    for name in ("table2.tex", "table2.png", "table2.pdf", "overview.png", "overview.pdf"):
        assert (tmp_path / "table2" / name).stat().st_size > 500


def test_the_overview_has_the_rows_that_all_data_sets_have():
    rows = [("toys", "full", 0.2), ("toys", "random", 0.1), ("books", "full", 0.4), ("books", "random", 0.3)]
    rows += [("books", "linear", 0.25)]
    long = pd.DataFrame(rows, columns=["dataset", "method", "mean"]).assign(metric="ndcg@10", std=0.0)
    figure = overview_figure(long)
    toys, books = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["toys", "books"]
    assert [label.get_text() for label in toys.get_yticklabels()] == [METHODS[m].title for m in ("full", "random")]
    assert [[bar.get_width() for bar in axis.patches] for axis in (toys, books)] == [[0.2, 0.1], [0.4, 0.3]]
    plt.close(figure)


def test_data_sets_stay_in_the_order_in_which_they_were_asked_for(settings):
    manifest = execute([Run(settings, "popularity", 0)], say=quiet, progress=False)[0]
    table = long_table([{**manifest, "dataset": name} for name in ("toys", "books")])
    assert list(dict.fromkeys(table["dataset"])) == ["toys", "books"]


def test_finished_runs_are_reused_and_damaged_ones_made_again(settings):
    runs = [Run(settings, "random", 0), Run(settings, "popularity", 0)]
    first = execute(runs, say=quiet, progress=False)
    said = []
    assert execute(runs, say=said.append, progress=False) == first
    assert said[0].startswith("2 of 2 runs are reused") and len(said) == 1
    runs[0].path.write_text(runs[0].path.read_text()[:50])
    runs[1].path.with_suffix(".parquet").unlink()
    again = execute(runs, say=quiet, progress=False)
    assert [m["test"] for m in again] == [m["test"] for m in first]
    assert not list(runs[0].path.parent.glob(".*"))


def test_further_students_read_what_the_first_has_stored(settings):
    """They do not distil again, differ by seed, and the table takes their mean within a seed."""
    first, second = runs = [Run(settings, "random", 0, student) for student in (0, 1)]
    assert second.distilled_path == first.distilled_path and second.path != first.path
    manifests = execute(runs, say=quiet, progress=False)
    stored = first.distilled_path.stat().st_mtime_ns
    assert manifests[1]["seconds"]["distillation"] == 0 and manifests[1]["student_number"] == 1
    assert manifests[0]["test"] != manifests[1]["test"]
    row = long_table(manifests).set_index("metric").loc["mrr"]
    assert row["mean"] == pytest.approx(np.mean([m["test"]["mrr"] for m in manifests])) and row["runs"] == 1
    second.path.unlink()
    assert execute([second], say=quiet, progress=False)[0]["test"] == manifests[1]["test"]
    assert first.distilled_path.stat().st_mtime_ns == stored
    second.path.unlink()
    first.distilled_path.unlink()  # lost: the first run makes it again
    assert execute([second], say=quiet, progress=False)[0]["test"] == manifests[1]["test"]
    assert first.distilled_path.is_file()
    first.distilled_path.unlink()
    execute(runs, say=quiet, progress=False)  # whoever wants the figures alone does not miss it
    assert not first.distilled_path.is_file()
    execute(runs, sequences=True, say=quiet, progress=False)
    assert first.distilled_path.is_file()


def test_students_of_another_recipe_read_the_same_sequences(settings, monkeypatch):
    """Nothing is distilled again; what it took stands in both manifests. Other sequences lie elsewhere."""
    first = Run(settings, "random", 0)
    other = Run(replace(settings, student=replace(settings.student, epochs=7)), "random", 0)
    assert other.path != first.path and other.distilled_path == first.distilled_path
    assert Run(replace(settings, sequences=settings.sequences + 1), "random", 0).distilled_path != first.distilled_path
    assert Run(settings, "random", 1).distilled_path != first.distilled_path
    (one,) = execute([first], say=quiet, progress=False)
    stored = first.distilled_path.stat().st_mtime_ns
    (two,) = execute([other], say=quiet, progress=False)
    assert first.distilled_path.stat().st_mtime_ns == stored and one["test"] != two["test"]
    assert two["seconds"]["distillation"] == one["seconds"]["distillation"] and two["student"]["epochs"] == 7
    distilled, distil = [], foster_lib.runs._distil
    monkeypatch.setattr(foster_lib.runs, "_distil", lambda *known: distilled.append(known[0]) or distil(*known))
    again = execute([first, other], fresh=True, say=quiet, progress=False)  # once, though both are made again
    assert len(distilled) == 1 and [m["test"] for m in again] == [one["test"], two["test"]]


def test_sequences_stored_before_a_kill_are_read(settings):
    """A killed run goes on from them; asked for afresh, or where the file is damaged, it distils again."""
    run = Run(settings, "foster", 0)
    (before,) = execute([run], say=quiet, progress=False)
    description = run.distilled_path.with_suffix(".json")
    marked = json.loads(description.read_text()) | {"seconds": 1234.5}

    def again(fresh=False):
        description.write_text(json.dumps(marked))
        run.path.unlink()
        (manifest,) = execute([run], say=quiet, progress=False, fresh=fresh)
        assert manifest["test"] == before["test"] and manifest["validation"] == before["validation"]
        return manifest["seconds"]["distillation"]

    assert again() == 1234.5
    assert again(fresh=True) != 1234.5
    run.distilled_path.write_bytes(run.distilled_path.read_bytes()[:-7])
    assert again() != 1234.5
    marked.pop("seconds")
    assert again() != 1234.5 and json.loads(description.read_text())["seconds"] > 0


def test_students_share_a_teacher(settings):
    """Full data is trained once, however many students there are, and not at all for those that find sequences."""
    said = []
    first, second = runs = [Run(settings, "kd", 0, student) for student in (0, 1)]
    execute(runs, say=said.append, progress=False)
    assert sum("trained" in line for line in said) == 1
    assert trajectory_folder(second) == trajectory_folder(first)
    shutil.rmtree(trajectory_folder(first))
    second.path.unlink()
    execute(runs, say=said.append, progress=False)
    assert sum("trained" in line for line in said) == 1 and not trajectory_folder(first).exists()


def test_a_coreset_with_labels_is_the_coreset_with_labels(settings):
    """The same windows by the same parameters; the sign in its name may stand in those of files."""
    assert {base_name(name) for name in LABELLED} == {*CORESETS, "kd", "kd-start"} - {"k-means"}
    plain, labelled = runs = [Run(settings, name, 0) for name in ("dealrec", "dealrec+labels")]
    assert plain.parameters == labelled.parameters == QUICK["dealrec"]
    manifests = execute(runs, say=quiet, progress=False)
    assert labelled.manifest() == manifests[1] and labelled.path.name.startswith("dealrec+labels-seed0-")
    stored = [SyntheticSequences.load(run.distilled_path) for run in runs]
    assert (stored[0].items == stored[1].items).all() and (stored[0].targets == stored[1].targets).all()
    assert stored[0].labels is None and stored[1].labels is not None


def test_full_data_training_found_finished_is_taken(settings):
    """Another process may have been faster; not where the training is wanted fresh, or its weights are lost."""
    run = Run(settings, "full", 0)
    log = trajectory_folder(run) / "log.json"

    def call(**options) -> tuple[str, int]:
        return train_full_run(run, "cpu", False, **options), log.stat().st_mtime_ns

    said, first = call(fresh=False)
    assert "trained 3 epochs" in said
    said, second = call(fresh=False)
    assert "another process" in said and second == first
    said, third = call()
    assert "trained 3 epochs" in said and third > first
    log.with_name("best.safetensors").unlink()
    assert "trained 3 epochs" in call(fresh=False)[0]


def test_results_do_not_depend_on_jobs(settings):
    runs = [Run(settings, method, 0) for method in ("full", "kd", "foster", "k-center")]
    serial = execute(runs, jobs=1, say=quiet, progress=False)
    parallel = execute(runs, jobs=2, fresh=True, say=quiet, progress=False)
    assert [m["test"] for m in serial] == [m["test"] for m in parallel]
    assert [m["validation"] for m in serial] == [m["validation"] for m in parallel]


def test_the_key_holds_what_the_result_depends_on_and_no_more(settings):
    def key(method, **changes):
        return Run(replace(settings, **changes), method, 0).key

    student = replace(settings.student, epochs=5)
    full = replace(settings.full, epochs=5)
    assert key("random") != key("random", student=student) and key("full") == key("full", student=student)
    assert key("kd") != key("kd", full=full) and key("random") == key("random", full=full)
    assert key("random") != key("random", sequences=5) and key("popularity") == key("popularity", sequences=5)
    assert key("foster") != key("foster", methods={"foster": {"iterations": 3}})
    assert key("random") == key("random", methods={"foster": {"iterations": 3}})


def test_code_fingerprint_sees_code_and_not_comments(tmp_path, monkeypatch):
    def fingerprint(text):
        records._code_of.cache_clear()
        monkeypatch.setattr(records, "__file__", str(tmp_path / "records.py"))
        monkeypatch.setattr(records, "CORE_MODULES", ("core",))
        (tmp_path / "core.py").write_text(text)
        return code_fingerprint()

    plain = fingerprint('def f(x):\n    """Say."""\n    return x + 1\n')
    assert plain == fingerprint('def f(x):\n    """Say more."""\n    # why\n    return x + 1\n')
    assert plain != fingerprint('def f(x):\n    """Say."""\n    return x + 2\n')
    records._code_of.cache_clear()


def test_what_the_core_computes_with_is_in_every_key():
    """The core modules import nothing beside them but what reads files and settings, whose content is in the key."""
    imported = set().union(*(records._imports_of(module) for module in records.CORE_MODULES))
    assert imported <= {"config", "datasets", "paths"}
    assert {"condense", "regulariser", "adjoint"} <= set(records.modules_behind("foster"))


def test_unknown_method_parameter_and_device_are_refused(settings):
    with pytest.raises(FosterError, match="unknown method 'foser'.*Did you mean 'foster'"):
        execute([Run(settings, "foser", 0)])
    wrong = replace(settings, methods={"foster": {"iteration": 3}})
    with pytest.raises(FosterError, match="'iteration'.*Did you mean 'iterations'"):
        execute([Run(wrong, "foster", 0)])
    with pytest.raises(FosterError, match="device"):
        resolve_device("gpu")


def test_table_without_references_has_empty_ratios(settings):
    table = long_table(execute([Run(settings, "popularity", 0)], say=quiet, progress=False))
    assert table["ratio_to_full"].isna().all() and table["recovered_gain"].isna().all()


def test_a_failing_writer_leaves_nothing_behind(tmp_path):
    def write(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    target = tmp_path / "folder" / "file.json"
    with pytest.raises(FosterError, match="No space left on device"):
        write_atomically(target, write)
    assert list(target.parent.iterdir()) == []


def test_manifests_are_plain_json(settings):
    execute([Run(settings, "untrained", 0)], say=quiet, progress=False)
    manifest = json.loads(Run(settings, "untrained", 0).path.read_text())
    assert manifest["schema"] == 1 and set(manifest["packages"]) >= {"torch", "transformers"}
    assert manifest["data"]["interactions"] > 0 and "git" in manifest
