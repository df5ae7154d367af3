"""The distance of students from their teachers, against sums by hand, and where it is recorded."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from foster_lib import fidelity
from foster_lib.evaluation import recommender_scorer
from foster_lib.execution import execute
from foster_lib.fidelity import kl_to_teacher
from foster_lib.recipes import train_student
from foster_lib.runs import Run, make_task, trajectory_folder
from foster_lib.synthetic import SyntheticSequences


def fixed(scores):
    """A scorer that knows each history by its first item."""
    return lambda histories: torch.stack([torch.as_tensor(scores[int(history[0])]) for history in histories])


HISTORIES = [np.array([0, 1]), np.array([1]), np.array([2, 0, 1])]
TEACHER = [[0.0, np.log(3.0)], [0.0, 0.0], [5.0, 5.0 + np.log(4.0)]]
STUDENT = [[1.0, 1.0], [0.0, np.log(3.0)], [0.0, np.log(4.0)]]


@pytest.mark.parametrize("at_once", [1, 2, 256])
def test_it_is_the_mean_of_the_divergences(at_once):
    first = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    second = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    found = kl_to_teacher(fixed(TEACHER), fixed(STUDENT), HISTORIES, at_once)
    assert found == pytest.approx((first + second) / 3)  # the third is equal but for what a softmax does not see


def test_a_model_has_none_from_itself_and_some_from_others(task):
    histories = task.validation.histories
    teacher, other = recommender_scorer(task.teacher), recommender_scorer(task.new_model(1))
    assert kl_to_teacher(teacher, teacher, histories) == pytest.approx(0, abs=1e-9)
    assert kl_to_teacher(teacher, other, histories) > 1e-3


def test_runs_with_teachers_record_it(settings):
    """Where the teachers' models are there; not for hard targets, nor what makes no sequences."""
    settings = replace(settings, methods={"foster": {"iterations": 2, "subset": 16, "windows": 4, "pool": 1}})
    runs = [Run(settings, method, 0) for method in ("full", "random", "kd", "foster")]
    details = [manifest["details"] for manifest in execute(runs, say=lambda line: None, progress=False)]
    assert ["kl_to_teacher" in of for of in details] == [False, False, True, True]
    task, first = make_task(runs[3]), runs[3]
    model, _ = train_student(task, SyntheticSequences.load(first.distilled_path), settings, first.student_seed, "")
    teacher = recommender_scorer(task.teacher)
    expected = kl_to_teacher(teacher, recommender_scorer(model), task.validation.histories)
    assert details[3]["kl_to_teacher"] == pytest.approx(expected) and expected > 0
    shutil.rmtree(trajectory_folder(first))
    manifest = execute([replace(first, student=1)], say=lambda line: None, progress=False)[0]
    assert "kl_to_teacher" not in manifest["details"]


def test_no_more_histories_than_said_are_read(monkeypatch):
    monkeypatch.setattr(fidelity, "HISTORIES", 2)
    everything = kl_to_teacher(fixed(TEACHER), fixed(STUDENT), HISTORIES)
    assert everything == pytest.approx(kl_to_teacher(fixed(TEACHER), fixed(STUDENT), HISTORIES[:2]))
