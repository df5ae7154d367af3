"""The mean of several full-data models as one teacher."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from foster_lib import coresets
from foster_lib.config import load_profile
from foster_lib.ensemble import Ensemble
from foster_lib.errors import FosterError
from foster_lib.evaluation import rank_queries
from foster_lib.execution import execute
from foster_lib.foster import FosterSettings, distill
from foster_lib.methods import get_method
from foster_lib.runs import Run, make_task, plan, train_full_run, trained, trajectory_folder
from foster_lib.sasrec import adapt
from foster_lib.starts import start_sequences
from foster_lib.studies import teacher_seconds
from foster_lib.subsets import real_loss, sample_subset
from foster_lib.synthetic import SyntheticSequences
from foster_lib.training import make_batch


@pytest.fixture(scope="module")
def models(task):
    """The teacher and two of its earlier checkpoints, of different scales."""
    found = [task.teacher]
    for number, epoch in enumerate((5, 12)):
        model = task.new_model(0).eval().requires_grad_(False)
        model.load_state_dict(task.trajectory[epoch])
        model.log_scale.add_(0.3 * (number + 1))
        found.append(model)
    return found


@pytest.fixture
def taught(task, models, tmp_path):
    """The task whose labels are the mean of the three."""
    folders = [task.trajectory_folder]
    for number, model in enumerate(models[1:]):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        save_file(model.state_dict(), folders[-1] / "best.safetensors")
    return replace(task, labeller_folders=tuple(folders))


def log_probabilities(model, items):
    features = model.features()
    return model.scores(model(items, features), features).double().log_softmax(-1)


def test_probabilities_are_the_geometric_mean(task, models):
    """Over the catalogue, the models' own log probabilities averaged and normalised."""
    items = torch.randint(task.n_items, (4, task.length), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([log_probabilities(model, items) for model in models]).mean(0).log_softmax(-1)
    torch.testing.assert_close(log_probabilities(Ensemble(models), items), expected, atol=1e-5, rtol=1e-5)


def test_one_model_twice_is_that_model(task, models):
    items = torch.arange(6)[None]
    twice = log_probabilities(Ensemble([models[0]] * 2), items)
    torch.testing.assert_close(twice, log_probabilities(models[0], items), atol=1e-5, rtol=1e-5)


def test_features_are_those_of_the_stacked_adapters(task, models):
    """What S stores gives the teacher's item features back, of length 1."""
    ensemble = Ensemble(models)
    f = adapt(task.embeddings, ensemble.adapter_weights())
    torch.testing.assert_close(f, ensemble.features())
    assert f.shape == (task.n_items, 3 * task.model_settings.width)
    torch.testing.assert_close(f.norm(dim=-1), torch.ones(task.n_items))


def test_labels_are_the_mean_teachers_softmax(taught, models):
    """Before they are condensed; the windows are those of the run's own teacher."""
    labelled = coresets.with_exact_labels(taught, coresets.k_means(taught, sequences=5, seed=0))
    assert torch.equal(labelled.items, coresets.k_means(replace(taught, labeller_folders=()), 5, 0).items)
    logs = torch.stack([log_probabilities(model, labelled.items) for model in models]).mean(0)
    exact = labelled.target_probabilities(taught.embeddings)
    torch.testing.assert_close(exact[labelled.mask], logs.softmax(-1).float()[labelled.mask], atol=1e-5, rtol=1e-4)


def test_the_outer_loss_reads_the_mean(taught, models):
    """L_real over the whole catalogue is the cross-entropy from the geometric mean."""
    model, real = taught.new_model(3).eval(), make_batch(taught.windows[:6])
    everything = sample_subset(taught.n_items, taught.n_items, np.random.default_rng(0))
    y = torch.stack([log_probabilities(each, real.inputs) for each in models]).mean(0).softmax(-1)
    expected = -(y * log_probabilities(model, real.inputs)).sum(-1)[real.mask].mean()
    found = real_loss(model, real, everything, taught.labeller)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_foster_distils_from_several_teachers(taught, tmp_path):
    """From their condensed labels; what is stored comes back."""
    settings = FosterSettings(iterations=3, subset=16, windows=4, inner_likeness=1.0)
    told = replace(taught, readings=2, successors=True)
    start = start_sequences(told, 4, seed=0)
    learned, _ = distill(told, start, settings, seed=0)
    width = taught.model_settings.width
    assert learned.labels.shape[-1] == learned.queries.shape[-1] == width
    assert not torch.equal(learned.labels, start.labels)
    assert learned.further_labels.shape[-1] == width and learned.successors.shape == (width + 1, width)
    again = SyntheticSequences.load(learned.save(tmp_path / "S"))
    found, kept = (sequences.features(taught.embeddings) for sequences in (again, learned))
    torch.testing.assert_close(found, kept, atol=0.02, rtol=0)


def test_a_missing_teacher_is_named(task, tmp_path):
    with pytest.raises(FosterError, match="nowhere.*Run the method 'full' first"):
        _ = replace(task, labeller_folders=(task.trajectory_folder, tmp_path / "nowhere")).labeller


# ---------------------------------------------------------------------------------- runs


def test_seeds_share_blocks_of_teachers(settings):
    """Seeds 0 to 2 read three, 3 to 5 the next three; full data is one model, and its key knows of no others."""
    three = replace(settings, teachers=3)
    assert [run.seed for run in Run(three, "foster", 1).teachers] == [0, 1, 2]
    assert [run.seed for run in Run(three, "kd", 5, student=1).teachers] == [3, 4, 5]
    assert [run.seed for run in Run(three, "full", 1).teachers] == [1] and not Run(three, "random", 0).teachers
    assert Run(three, "full", 1).key == Run(settings, "full", 1).key
    assert Run(three, "random", 1).key == Run(settings, "random", 1).key
    assert Run(three, "kd", 1).key != Run(settings, "kd", 1).key


def test_all_teachers_are_trained_first(settings):
    """A run of one seed trains the models of its block, and further students none; `make_task` hands them over."""
    two = replace(settings, teachers=2)
    run, said = Run(two, "kd", 0), []
    execute([run, replace(run, student=1)], say=said.append, progress=False)
    assert sum("trained" in line for line in said) == 2
    assert all(trained(teacher) for teacher in run.teachers)
    task = make_task(run)
    assert task.labeller_folders == tuple(trajectory_folder(Run(two, "full", seed)) for seed in (0, 1))
    assert len(task.labeller.models) == 2 and task.trajectory_folder == task.labeller_folders[0]
    # A lost one is trained again before the next run reads it.
    shutil.rmtree(task.labeller_folders[1])
    run.path.unlink()
    execute([run], say=said.append, progress=False)
    assert sum("trained" in line for line in said) == 3


def test_the_row_of_the_mean(settings):
    """It ranks by the mean of the models; where one model labels there is no such row."""
    two = replace(settings, teachers=2)
    for seed in (0, 1):
        train_full_run(Run(two, "full", seed), "cpu", progress=False)
    task = make_task(Run(two, "teachers", 1))
    one, other = (make_task(Run(two, "full", seed)).teacher for seed in (0, 1))
    score = get_method("teachers").function(task)
    histories = task.validation.histories[:8]
    latest = [torch.as_tensor(history[-task.length :])[None] for history in histories]
    expected = [torch.stack([log_probabilities(model, items)[0, -1] for model in (one, other)]) for items in latest]
    ours = score(histories).double().log_softmax(-1)
    torch.testing.assert_close(ours, torch.stack(expected).mean(1).log_softmax(-1), atol=1e-5, rtol=1e-5)
    assert rank_queries(score, task.validation, task.n_items).metrics()["ndcg@10"] > 0


def test_plan_leaves_out_the_mean_of_one():
    profile = load_profile("cpu")
    assert any(run.method == "teachers" for run in plan(profile, ["ml-100k"], ["full", "teachers"], [0]))
    single = replace(profile, raw={**profile.raw, "per_dataset": {}})
    assert {run.method for run in plan(single, ["ml-100k"], ["full", "teachers"], [0])} == {"full"}
    with pytest.raises(FosterError, match="ask for its row, 'full'"):
        plan(single, ["ml-100k"], ["teachers"], [0])


def test_teachers_are_paid_for(settings):
    """The total cost of a row holds the training of all models that it reads, those of other seeds too."""
    two, manifest = replace(settings, teachers=2), {"seconds": {"training": 50.0}}
    known = {(settings.dataset, 0): manifest}
    assert teacher_seconds(Run(two, "foster", 0), known) == 100 and teacher_seconds(Run(two, "random", 0), known) == 0
    assert np.isnan(teacher_seconds(Run(two, "foster", 0), {}))
