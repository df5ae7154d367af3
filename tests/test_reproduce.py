"""Which notebooks run with which parameters, and what becomes of one that fails, on tiny notebooks."""

from __future__ import annotations

import json

import nbformat
import pytest

from foster_lib import reproduce
from foster_lib.errors import FosterError
from foster_lib.reproduce import main, plan


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """Three notebooks that write what they were given, of which `fig_b` fails; results in the test's own folder."""
    monkeypatch.setattr(reproduce, "NOTEBOOKS", tmp_path)
    monkeypatch.setenv("FOSTER_RESULTS", str(tmp_path / "results"))
    for name, parameters in (
        ("table1", 'profile: str = "smoke"'),
        ("fig_a", 'profile: str = "smoke"\njobs: int = 0'),
        ("fig_b", 'profile: str = "smoke"\njobs: int = 0\nmethods: str = ""'),
    ):
        body = "assert False, 'no figure'" if name == "fig_b" else f"open({str(tmp_path / name)!r}, 'w').write(profile)"
        cells = [nbformat.v4.new_code_cell(source) for source in (parameters, body)]
        cells[0].metadata["tags"] = ["parameters"]
        book = nbformat.v4.new_notebook(cells=cells)
        book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(book, tmp_path / f"{name}.ipynb")
    return tmp_path


def test_a_notebook_that_is_named_knows_all_or_is_refused(notebooks):
    given = {"profile": "cpu", "jobs": 2}
    assert plan(["fig_b", "fig_a"], given) == {"fig_b": given, "fig_a": given}
    with pytest.raises(FosterError, match="parameter of notebook 'table1': 'jobs'"):
        plan(["fig_a", "table1"], given)
    with pytest.raises(FosterError, match="parameter of notebook 'table1': 'jobs'"):
        plan(["all", "table1"], given)
    with pytest.raises(FosterError, match="unknown notebook 'fig'"):
        plan(["fig"], {})


def test_of_a_group_each_gets_what_it_knows(notebooks):
    """Tables come first; a parameter that none knows is a mistake."""
    planned = plan(["all"], {"profile": "cpu", "jobs": 2, "methods": "kd"})
    assert list(planned) == ["table1", "fig_a", "fig_b"]
    assert [sorted(own) for own in planned.values()] == [
        ["profile"],
        ["jobs", "profile"],
        ["jobs", "methods", "profile"],
    ]
    assert list(plan(["figures"], {})) == ["fig_a", "fig_b"]
    with pytest.raises(FosterError, match="'methds'.*Did you mean 'methods'"):
        plan(["all"], {"methds": "kd"})


def test_a_failing_notebook_does_not_keep_the_others_from_running(notebooks, capfd):
    assert main(["fig_b", "fig_a", "--profile", "cpu"]) == 2
    assert (notebooks / "fig_a").read_text() == "cpu"
    out, err = capfd.readouterr()
    assert "AssertionError: no figure" in err and "1 of 2 notebooks failed: fig_b" in err
    assert "notebook 1 of 2: fig_b" in out and "notebook 2 of 2: fig_a" in out
    kept = {path.name for path in (notebooks / "results" / "notebooks").iterdir()}
    assert kept == {"fig_a.ipynb", "fig_a.json", "fig_b.failed.ipynb"}
    assert json.loads((notebooks / "results/notebooks/fig_a.json").read_text())["parameters"] == {"profile": "cpu"}


def test_what_is_left_out_is_said_and_nothing_runs_after_a_mistake(notebooks, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(reproduce, "run_notebook", lambda name, own: ran.append((name, own)))
    assert main(["all", "--methods", "random+labels", "--jobs", "2"]) == 0
    assert ran == [("table1", {}), ("fig_a", {"jobs": 2}), ("fig_b", {"methods": "random+labels", "jobs": 2})]
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "knows no" in line] == [
        "table1 knows no jobs, methods: it runs without",
        "fig_a knows no methods: it runs without",
    ]
    assert main(["fig_a", "table1", "--jobs", "2"]) == 2 and len(ran) == 3


def test_the_notebooks_of_this_project_take_what_make_passes_on():
    """All options pass through the groups; every notebook takes the profile; Table 2 comes before its costs."""
    given = {"datasets": "ml-100k", "methods": "full", "seeds": "0", "split": "temporal", "jobs": 1, "device": "cpu"}
    everything = plan(["all"], {"profile": "smoke", "fresh": True, **given})
    assert all(own["profile"] == "smoke" for own in everything.values())
    tables = ["table1_datasets", "table2", "table3_efficiency", "table4_ablation", "table5_transfer"]
    tables += ["table6_key_ideas", "table7_two_sequences"]
    assert list(everything)[:7] == tables and list(everything)[7:] == list(plan(["figures"], {}))
    assert len(everything) == 14
    for name, own in everything.items():
        missing = given.keys() - own.keys()
        assert not missing or name in ("table1_datasets", "fig_scaling", "fig_sequences"), (name, missing)
    with pytest.raises(FosterError, match="'methods'"):
        plan(["table1_datasets"], {"methods": "full"})
