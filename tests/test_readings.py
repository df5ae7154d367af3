"""Sequences that the model reads in several orders, with labels for each."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from foster_lib import coresets, starts, tied
from foster_lib.config import load_profile
from foster_lib.errors import FosterError
from foster_lib.foster import FosterSettings, Synthesizer, distill
from foster_lib.recipes import train_student
from foster_lib.runs import Run, make_task
from foster_lib.studies import changed
from foster_lib.subsets import sample_subset
from foster_lib.synthetic import ORDERS, SyntheticSequences, cut, shuffled
from foster_lib.synthetic_data import SyntheticData, in_windows

READINGS, LENGTH = 3, 6


@pytest.fixture(params=["shuffled", "cut"])
def long(task, request):
    """Sequences of three windows."""
    return replace(task, synthetic_length=3 * LENGTH, readings=READINGS, order=request.param)


@pytest.fixture
def start(long) -> SyntheticSequences:
    """Histories of three items and more in each window, the rest of it empty."""
    short = replace(long, train=[sequence[-3 - user % 4 :] for user, sequence in enumerate(long.train)])
    return starts.start_sequences(short, 2, 0, fill=False)


def test_positions_of_a_cut():
    assert cut(torch.ones(2, 6, dtype=torch.bool), 3, 1, 3).tolist() == [[0, -1, -1, 1, 2, 3, 4, 5, -1]] * 2
    assert cut(torch.ones(1, 4, dtype=torch.bool), 4, 1, 2).tolist() == [[0, 1, -1, -1, 2, 3, -1, -1]]


def test_positions_in_random_order():
    """Filled ones first, each once; every row, and every reading, has an order of its own, always the same one."""
    mask = torch.rand(300, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    first, second = shuffled(mask, 5, 1, 3), shuffled(mask, 5, 2, 3)
    assert torch.equal(first, shuffled(mask, 5, 1, 3)) and not torch.equal(first, second)
    for order in (first, second):
        assert torch.equal(order.sort(1).values, torch.arange(5).expand(300, -1))
        assert torch.equal(mask.gather(1, order), torch.arange(5) < mask.sum(1, keepdim=True))
    whole = shuffled(torch.ones(6000, 3, dtype=torch.bool), 3, 1, 2)
    seen = whole.unique(dim=0, return_counts=True)[1]
    assert len(seen) == 6 and (seen - 1000).abs().max() < 150  # all orders, equally often


@torch.no_grad()
def test_every_reading_has_the_teachers_labels_of_its_own_histories(long, start):
    """Against the teacher on one history at a time: what stands before the position in its window of the reading."""
    teacher, features = long.teacher, long.teacher.features()
    assert start.readings == READINGS and start.further_labels.shape[:3] == (2, 3 * LENGTH, READINGS - 1)
    compared = 0
    for number in range(READINGS):
        labels = start.labels if number == 0 else start.further_labels[:, :, number - 1]
        kept = torch.arange(3 * LENGTH).expand(2, -1)
        order = ORDERS[long.order](start.mask, LENGTH, number, READINGS) if number else kept
        for row, place in (order >= 0).nonzero().tolist():
            position = order[row, place]
            if not start.mask[row, position]:
                continue
            history = start.items[row, order[row, place // LENGTH * LENGTH : place + 1]]
            alone = teacher.log_scale.exp() * teacher(history[None], features)[0, -1]
            torch.testing.assert_close(labels[row, position], alone, atol=1e-4, rtol=1e-4)
            compared += 1
    assert compared == READINGS * int(start.mask.sum())
    assert not torch.allclose(start.further_labels[:, :, 0], start.labels, atol=1e-2)


def test_a_reading_holds_each_position_once(long, start):
    """With its own item, target and label."""
    for number in range(1, READINGS):
        read = start.reading(number)
        assert read.items.shape == (2, (3 + (long.order == "cut")) * LENGTH) and read.readings == 1
        for row in range(2):
            order = start.orders[row, :, number - 1]
            order = order[(order >= 0) & start.mask[row, order.clamp(min=0)]]
            assert sorted(order.tolist()) == start.mask[row].nonzero()[:, 0].tolist()
            for name, kept in {"items": start.items, "targets": start.targets}.items():
                assert torch.equal(getattr(read, name)[row][read.mask[row]], kept[row, order])
            assert torch.equal(read.labels[row][read.mask[row]], start.further_labels[row, order, number - 1])
    whole = start.reading(0)
    assert whole.readings == 1 and torch.equal(whole.items, start.items) and torch.equal(whole.labels, start.labels)


@torch.no_grad()
def test_the_teacher_reproduces_the_labels_of_the_reading_that_it_reads(long, start):
    """What a student is given as input and target belongs together, windows and padding included."""
    teacher = long.teacher
    for number in range(READINGS):
        batch = SyntheticData(start.reading(number), long.embeddings).draw(np.random.default_rng(0))
        features = teacher.features()
        hidden = teacher.transform(batch.own[..., None] * features[batch.anchors])[batch.mask]
        torch.testing.assert_close(teacher.scores(hidden, features).softmax(-1), batch.y, atol=1e-5, rtol=1e-3)


def most_probable(read: SyntheticSequences, task) -> torch.Tensor:
    return torch.unique(read.target_probabilities(task.embeddings)[read.mask].topk(3).indices)


def test_readings_differ_in_what_is_most_probable(long, start):
    """Without that, the tests below would not see whose items a subset holds."""
    sets = {tuple(most_probable(start.reading(number), long).tolist()) for number in range(READINGS)}
    assert len(sets) == READINGS


@pytest.mark.parametrize("size", [0, 2])
def test_steps_draw_their_reading(long, start, size):
    """All of them, about equally often, each with its own labels and its own most probable items."""
    data, generator = SyntheticData(start, long.embeddings, size=size), np.random.default_rng(0)
    labels = [start.reading(number).labels for number in range(READINGS)]
    seen = np.zeros(READINGS)
    for _ in range(200):
        batch = data.draw(generator)
        shapes = [batch.mask.shape == read.shape[:2] for read in labels]
        f = start.features(long.embeddings)[batch.subset.items]
        close = [
            same and torch.allclose((read[batch.mask] @ f.T + batch.subset.log_weight).softmax(-1), batch.y, atol=1e-6)
            for same, read in zip(shapes, labels)
        ]
        assert sum(close) == 1
        number = close.index(True)
        seen[number] += 1
        if size:
            assert torch.equal(data.wanted[number], most_probable(start.reading(number), long))
            assert torch.isin(data.wanted[number], batch.subset.items).all()
            assert len(batch.subset.items) <= size + len(data.wanted[number])
    assert seen.min() > 30


@pytest.mark.parametrize("size", [0, 2])
def test_steps_draw_some_windows(long, start, size):
    """Each step reads as many as it shall of those that hold something, with what is most probable in them; all come
    along, equally often."""
    count, seen = 3, {}
    data = SyntheticData(start, long.embeddings, size, count=count, length=LENGTH)
    f, generator = start.features(long.embeddings), np.random.default_rng(0)
    windows = [in_windows(start.reading(number), LENGTH) for number in range(READINGS)]
    assert all(read.items.shape[1] == LENGTH and read.mask.any(1).all() for read in windows)
    assert all(read.mask.sum() == start.mask.sum() for read in windows)
    for _ in range(400):
        batch = data.draw(generator)
        assert batch.mask.shape == (count, LENGTH)
        y = torch.zeros(*batch.mask.shape, batch.y.shape[1]).masked_scatter(batch.mask[..., None], batch.y)
        for row in range(count):
            own = batch.mask[row]
            matching = [
                (number, i)
                for number, read in enumerate(windows)
                for i in range(len(read))
                if torch.equal(read.items[i], batch.anchors[row]) and torch.equal(read.mask[i], own)
                if torch.allclose(
                    (read.labels[i][own] @ f[batch.subset.items].T + batch.subset.log_weight).softmax(-1),
                    y[row][own],
                    atol=1e-6,
                )
            ]
            assert matching
            seen[matching[0]] = seen.get(matching[0], 0) + 1
            if size:
                number, i = matching[0]
                probable = (windows[number].labels[i][own] @ f.T).topk(3).indices
                assert torch.isin(probable, batch.subset.items).all()
    assert len(seen) == sum(len(read) for read in windows) and max(seen.values()) < 4 * min(seen.values())


def test_as_many_windows_as_there_are_is_all_of_them(long, start):
    whole, same = (SyntheticData(start, long.embeddings, count=count, length=LENGTH) for count in (0, 1000))
    for _ in range(3):
        one, other = (data.draw(np.random.default_rng(0)) for data in (whole, same))
        assert torch.equal(one.y, other.y) and torch.equal(one.anchors, other.anchors)


def test_sequences_that_are_tied_are_read_whole(task):
    sequences = tied.real_start(task, 4, tied.TiedSettings(), seed=0)
    batch = SyntheticData(sequences, task.embeddings, count=1, length=task.length).draw(np.random.default_rng(0))
    assert len(batch.mask) == 4


def test_one_reading_draws_nothing(task):
    """A single reading leaves the random numbers of a step as they were."""
    data = SyntheticData(coresets.kd(task, 4, seed=0), task.embeddings)
    generator = np.random.default_rng(0)
    data.draw(generator)
    assert generator.integers(2**31) == np.random.default_rng(0).integers(2**31)


def test_distilling_moves_the_labels_of_all_readings_alike(long, start):
    settings = FosterSettings(iterations=6, windows=4, pool=1, subset=40, label_learning_rate=0.1)
    seen = set()
    found, _ = distill(long, start, settings, seed=0, on_iteration=lambda _, synthetic: seen.add(synthetic.number))
    assert len(seen) > 1
    moved = found.labels - start.labels
    assert moved.abs().max() > 0.01
    torch.testing.assert_close(
        found.further_labels - start.further_labels, moved[:, :, None].expand(-1, -1, READINGS - 1, -1)
    )
    assert not found.further_labels.requires_grad and torch.equal(found.orders, start.orders)


def test_an_iteration_is_about_one_reading(long, start):
    """Its label gradient is that of the same loss on the reading alone."""
    synthetic = Synthesizer(start, long.embeddings, FosterSettings(subset=2, probable=True))
    generator, numbers = np.random.default_rng(0), set()
    for _ in range(30):
        synthetic.turn(generator)
        numbers.add(synthetic.number)
        read = start.reading(synthetic.number)
        drawn = sample_subset(long.n_items, 2, copy.deepcopy(generator))
        batch = synthetic.batch(synthetic.draw(generator))
        assert torch.equal(batch.anchors, read.items)
        assert torch.equal(batch.subset.items, drawn.including(most_probable(read, long)).items)
    assert numbers == set(range(READINGS))


def test_students_train_on_all_readings(long, start):
    """With the labels of the first reading alone they learn something else."""
    settings = replace(load_profile("smoke").settings("ml-100k"), model=long.model_settings)
    both, _ = train_student(long, start, settings, 0)
    first, _ = train_student(long, start.reading(0), settings, 0)
    assert any(not torch.equal(a, b) for a, b in zip(both.state_dict().values(), first.state_dict().values()))


def test_readings_are_kept_on_disk(start, tmp_path):
    start.save(tmp_path / "s")
    found = SyntheticSequences.load(tmp_path / "s")
    assert found.readings == READINGS and torch.equal(found.orders, start.orders)
    torch.testing.assert_close(found.further_labels, start.further_labels.half().float())
    assert torch.equal(start.joined(2).further_labels[0, 3 * LENGTH :], start.further_labels[1])


def test_hard_labels_have_one_reading(long):
    assert starts.start_sequences(long, 2, 0, labels="hard", fill=False).readings == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"readings": 7, "order": "cut"}, "there cannot be 7 cuts of windows of 50"),
        ({"readings": 0}, "readings must be a whole number of at least 1, not 0"),
        ({"order": "sorted"}, "order .*'sorted'.*shuffled"),
        ({"teachers": True}, "teachers must be a whole number of at least 1, not True"),
    ],
)
def test_settings_of_readings_are_checked(change, message):
    profile = load_profile("smoke")
    profile.raw["per_dataset"]["ml-100k"] |= change
    with pytest.raises(FosterError, match=message):
        profile.settings("ml-100k")


def test_rows_with_a_teacher_depend_on_their_readings():
    settings = load_profile("smoke").settings("ml-100k")
    more = replace(settings, readings=2)
    for method, depends in (
        ("kd", True),
        ("foster", True),
        ("random+labels", True),
        ("random", False),
        ("full", False),
    ):
        assert (Run(settings, method, 0).description() != Run(more, method, 0).description()) == depends


def test_the_profile_says_how_many():
    settings = replace(load_profile("smoke").settings("ml-100k"), readings=5)
    assert make_task(Run(settings, "untrained", 0)).readings == 5


@pytest.mark.parametrize("order, readings", [("cut", 5), ("shuffled", 10)])
def test_a_study_of_shorter_windows_keeps_the_cuts_that_divide_them(order, readings):
    """Of random orders there can be any number."""
    settings = replace(load_profile("smoke").settings("ml-100k"), readings=10, order=order, sequence_length=50)
    settings = replace(settings, model=replace(settings.model, length=10))
    assert changed(settings, "foster", {"model": {"length": 5}}).readings == readings
