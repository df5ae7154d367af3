"""Calls in processes: their order, and what a failing one does to the others."""

import time
from pathlib import Path

import pytest

from foster_lib.errors import FosterError
from foster_lib.execution import Call, parallel


def _leave_a_mark(item: tuple[Path, str, str | None], device: str, progress: bool) -> str:
    """Write a file, once the file it waits for is there."""
    folder, name, waits_for = item
    if name == "fails":
        raise FosterError("this call fails")
    for _ in range(600):
        if waits_for is None or (folder / waits_for).is_file():
            (folder / name).touch(exist_ok=False)
            return name
        time.sleep(0.1)
    raise FosterError(f"{name} waited for {waits_for} in vain")


@pytest.mark.parametrize("jobs", [1, 2])
def test_calls_wait_for_what_they_need_and_no_longer(tmp_path, jobs):
    """What depends on a call comes after it; with a free worker, what does not depend comes during it."""
    first = Call(_leave_a_mark, (tmp_path, "first", "free" if jobs == 2 else None))
    calls = [first, *(Call(_leave_a_mark, (tmp_path, f"after-{i}", None), after=(first,)) for i in range(2))]
    calls.append(Call(_leave_a_mark, (tmp_path, "free", None)))
    said = []
    parallel(calls, jobs=jobs, device="cpu", label="", progress=False, say=said.append)
    assert sorted(said) == ["after-0", "after-1", "first", "free"]
    assert min(said.index("after-0"), said.index("after-1")) > said.index("first")


def _neighbours(item: tuple[Path, str, float], device: str, progress: bool) -> str:
    """How many calls run at the same time as this one, itself included; it looks for three until its time is over."""
    folder, name, seconds = item
    most, end = 0, time.monotonic() + seconds
    (folder / name).touch()
    while most < 3 and time.monotonic() < end:
        most = max(most, len(list(folder.glob("call-*"))))
        time.sleep(0.05)
    time.sleep(0.2)  # for the others to see it
    (folder / name).unlink()
    return str(most)


@pytest.mark.parametrize(("awaited", "expected"), [(True, 3), (False, 2)])
def test_one_call_too_many_that_others_wait_for_runs_beside_them(tmp_path, awaited, expected):
    """Two workers make three calls at once if a fourth waits for them, otherwise never more than two."""
    calls = [Call(_neighbours, (tmp_path, f"call-{i}", 60.0 if awaited else 2.0)) for i in range(3)]
    last = Call(_neighbours, (tmp_path, "last", 0.1), after=tuple(calls) if awaited else ())
    said = []
    parallel([*calls, last], jobs=2, device="cpu", label="", progress=False, say=said.append)
    assert max(map(int, said)) <= expected
    assert not awaited or said[:3] == ["3"] * 3


def test_a_failing_call_ends_the_others(tmp_path):
    """Its error is raised, and what depends on it is never called."""
    fails = Call(_leave_a_mark, (tmp_path, "fails", None))
    late = Call(_leave_a_mark, (tmp_path, "late", None), after=(fails,))
    for jobs in (1, 2):
        with pytest.raises(FosterError, match="this call fails"):
            parallel([fails, late], jobs=jobs, device="cpu", label="", progress=False, say=lambda line: None)
        assert not (tmp_path / "late").exists()
