"""Results that cannot rot: a manifest that cannot be used is named once and its run made again; old code is marked."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

import foster_lib.runs
from foster_lib import studies
from foster_lib.config import Profile
from foster_lib.errors import FosterError
from foster_lib.execution import execute
from foster_lib.records import defect, read_manifest, read_ranks
from foster_lib.runs import plan, trained, trajectory_folder
from tests.test_studies import RAW, space  # noqa: F401 (a fixture)


@pytest.fixture
def profile() -> Profile:
    return Profile("cpu", ["toy"], [0], "leave-one-out", ["full", "random"], RAW)


def changed(**entries: object):
    def damage(path: Path) -> None:
        manifest = {**json.loads(path.read_text()), **entries}
        path.write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))

    return damage


def put(path: Path, text: str) -> None:
    path.write_text(text)


DAMAGE = {
    "an older schema": (changed(schema=0), "its schema is 0, this version of the code reads 1"),
    "a newer schema": (changed(schema="2"), "its schema is '2', this"),
    "no schema": (changed(schema=None), "it is damaged"),
    "cut off": (lambda path: put(path, path.read_text()[:99]), "it is damaged"),
    "empty": (lambda path: put(path, ""), "it is damaged"),
    "a list": (lambda path: put(path, "[]"), "it is damaged"),
    "binary": (lambda path: path.write_bytes(b"\xff\xfe"), "it is damaged"),
    "no test metrics": (changed(test=None), "it lacks test"),
    "a metric less": (changed(test={"mrr": 0.5}), "a metric is missing or no number"),
    "a metric NaN": (lambda path: put(path, path.read_text().replace('"mrr": 0.', '"mrr": NaN, "x": 0.')), "metric is"),
    "no ranks": (lambda path: path.with_suffix(".parquet").unlink(), "the ranks beside it are missing or damaged"),
    "ranks cut off": (lambda path: path.with_suffix(".parquet").write_bytes(b"PAR1"), "the ranks beside it"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_cannot_be_used_is_said_once_and_made_again(toy, profile, kind):
    damage, reason = DAMAGE[kind]
    runs = plan(profile, ["toy"], ["popularity", "untrained"], [0])
    before = execute(runs, progress=False, say=lambda line: None)
    damage(runs[0].path)
    assert read_manifest(runs[0].path) is None and reason in defect(runs[0].path)
    said: list[str] = []
    after = execute(runs, progress=False, say=said.append)
    assert [manifest["test"] for manifest in after] == [manifest["test"] for manifest in before]
    named = [line for line in said if "cannot be used, its run is made again" in line]
    assert len(named) == 1 and reason in named[0] and runs[0].path.name in named[0]
    assert said[0].startswith("1 of 2 runs are reused") and defect(runs[0].path) == ""


def test_nothing_is_said_of_runs_that_are_new(toy, profile):
    said: list[str] = []
    execute(plan(profile, ["toy"], ["popularity"], [0]), progress=False, say=said.append)
    assert len(said) == 1 and "cannot be used" not in said[0]


def test_ranks_that_cannot_be_read_are_named(toy, profile):
    (run,) = plan(profile, ["toy"], ["popularity"], [0])
    execute([run], progress=False, say=lambda line: None)
    pd.DataFrame({"a": [1]}).to_parquet(run.path.with_suffix(".parquet"))
    with pytest.raises(FosterError, match=r"parquet: no readable ranks .*Delete it"):
        read_ranks(run.path)


@pytest.mark.parametrize("name", ["best.safetensors", "epoch-001.safetensors", "log.json"])
def test_a_damaged_trajectory_is_trained_again(toy, profile, name):
    """The run is finished, but others read its teacher and its checkpoints."""
    full, kd = plan(profile, ["toy"], ["full", "kd"], [0])
    expected = execute([full, kd], progress=False, say=lambda line: None)[1]["test"]
    path = trajectory_folder(full) / name
    path.write_bytes(path.read_bytes()[:-9])
    assert not trained(full)
    kd.path.unlink()
    assert execute([kd], progress=False, say=lambda line: None)[0]["test"] == expected
    assert trained(full) and full.manifest()


def test_rows_of_other_code_are_marked_in_a_table_that_runs_nothing(space, profile, tmp_path, monkeypatch):  # noqa: F811
    execute(plan(profile, ["toy"], ["full", "random"], [0]), progress=False, say=lambda line: None)
    study = studies.load_study("costs", profile)
    planned = study.runs(profile, ["toy"], [0])

    def rows() -> list[str]:
        found, table = studies.run_study(study, planned)
        text = studies.write_study(study, found, table, tmp_path / "costs").read_text()
        assert ("*stale*: made by another version of the code." in text) == ("(stale)" in text.replace("*stale*", ""))
        return list(table["variant"].unique())

    assert rows() == ["Full data", "Random"]
    monkeypatch.setattr(foster_lib.runs, "code_fingerprint", lambda *modules: "another")
    assert rows() == ["Full data (stale)", "Random (stale)"]
    execute(plan(profile, ["toy"], ["random"], [0]), progress=False, say=lambda line: None)
    assert rows() == ["Full data (stale)", "Random"]
    other = Profile(
        "cpu", ["toy"], [0], "leave-one-out", ["full", "random"], {**RAW, "student": {**RAW["student"], "epochs": 5}}
    )
    random = plan(other, ["toy"], ["random"], [0])[0]
    assert random.stale() is None and plan(profile, ["toy"], ["random"], [1])[0].stale() is None
