"""Table 5: what students of another kind read, which runs it is made of, and what its table says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from foster_lib import transfer
from foster_lib.config import Profile
from foster_lib.coresets import kd
from foster_lib.errors import FosterError
from foster_lib.execution import execute
from foster_lib.foster import FosterSettings, Synthesizer
from foster_lib.paths import results_dir
from foster_lib.runs import load_once
from foster_lib.synthetic import SyntheticSequences
from foster_lib.transfer import Student, plan_transfer, read, run_transfers
from foster_lib.transfer_tables import COLUMNS, readable_table, transfer_table, write_table5
from tests.conftest import ITEMS
from tests.test_studies import RAW

SPACE = {
    "students": [{"backbone": "sasrec"}, {"backbone": "bert4rec"}, {"backbone": "gru4rec", "encoder": "lsa"}],
    "sources": ["kd", "foster"],
    "decoded": ["foster"],
    "top": 3,
    "recipes": {"bert4rec": {"student": {"epochs": 6}}},
    "smoke_recipe": {"full": {"epochs": 1}},
}


@pytest.fixture
def profile(toy, monkeypatch):
    monkeypatch.setattr(transfer, "SPACE", toy / "transfer.yaml")
    transfer.SPACE.write_text(yaml.safe_dump(SPACE))
    transfer.load_student_catalogue.cache_clear()
    return Profile("cpu", ["toy"], [0], "leave-one-out", [], RAW)


@pytest.fixture(scope="module")
def sequences(task) -> SyntheticSequences:
    """FOSTER's start with inputs that are mixtures, one sequence cut short."""
    start = kd(task, sequences=4, seed=0)
    mask = start.mask.clone()
    mask[1, 3:] = False
    return Synthesizer(replace(start, mask=mask), task.embeddings, FosterSettings(bonus=2.0)).result()


# ----------------------------------------------------------------------------- the forms


def test_the_soft_form_is_what_the_sequences_say(sequences, task):
    batch, size = read(sequences, task.embeddings, "soft", 6)
    assert torch.equal(batch.inputs, sequences.input_probabilities(task.embeddings))
    assert torch.equal(batch.targets, sequences.target_probabilities(task.embeddings)[sequences.mask])
    assert size == sequences.size_in_bytes()


def test_decoded_items_are_followed_by_the_next_decoded_item(sequences, task):
    batch, size = read(sequences, task.embeddings, "decoded", 6)
    best = sequences.input_probabilities(task.embeddings).argmax(-1).tolist()
    last = sequences.target_probabilities(task.embeddings).argmax(-1).tolist()
    lengths, expected = sequences.mask.sum(1).tolist(), []
    for row, length in enumerate(lengths):
        assert batch.inputs[row, :length].tolist() == best[row][:length]
        expected += [*best[row][1:length], last[row][length - 1]]
    assert batch.targets.tolist() == expected and batch.inputs.dtype == torch.long
    assert min(lengths) == 3 and size == 4 * sum(length + 1 for length in lengths)


def test_decoded_labels_keep_the_most_probable_items(sequences, task):
    soft, _ = read(sequences, task.embeddings, "soft", 6)
    batch, size = read(sequences, task.embeddings, "decoded+labels", 6, top=3)
    assert ((batch.targets > 0).sum(-1) == 3).all() and torch.allclose(
        batch.targets.sum(-1), torch.ones(len(soft.targets))
    )
    for kept, label in zip(batch.targets, soft.targets):
        chosen = label.topk(3).indices
        assert torch.allclose(kept[chosen], label[chosen] / label[chosen].sum())
    assert size == len(batch.targets) * (4 + 3 * 6)
    everything, _ = read(sequences, task.embeddings, "decoded+labels", 6, top=10**6)
    assert torch.allclose(everything.targets, soft.targets, atol=1e-6)
    with pytest.raises(FosterError, match="unknown reading 'hard'"):
        read(sequences, task.embeddings, "hard", 6)


def test_hard_sequences_stay_hard(task):
    pieces = SyntheticSequences.from_windows(task.windows[:3], task.length)
    batch, _ = read(pieces, task.embeddings, "soft", 6)
    assert torch.equal(batch.inputs, pieces.items) and torch.equal(batch.targets, pieces.targets[pieces.mask])
    decoded, _ = read(pieces, task.embeddings, "decoded", 6)
    assert torch.equal(decoded.targets, batch.targets)


@pytest.mark.parametrize("reading", ["soft", "decoded", "decoded+labels"])
def test_a_long_sequence_is_read_in_windows(sequences, task, reading):
    """Two sequences in one, as they would be read apart; a window that holds nothing is left out."""
    apart, joined = (read(form, task.embeddings, reading, 6)[0] for form in (sequences, sequences.joined(2)))
    for name in ("inputs", "targets", "mask"):
        assert torch.allclose(getattr(apart, name).float(), getattr(joined, name).float()), name
    empty = sequences.mask.clone()
    empty[3] = False
    shorter = read(replace(sequences, mask=empty).joined(2), task.embeddings, reading, 6)[0]
    assert len(shorter.mask) == 3 and torch.equal(shorter.mask, apart.mask[:3])


# ------------------------------------------------------------------------------- the runs


def test_runs_of_table_2_are_shared_and_the_others_made_once(profile):
    planned = plan_transfer(profile, ["toy"], [0])
    assert len(planned) == 3 * (2 + 1 + 3) and sum(item.is_base for item in planned) == 4
    assert len({item.path for item in planned}) == len(planned)
    execute([item.base for item in planned if item.is_base], progress=False, say=lambda line: None)
    said = []
    run_transfers(planned, progress=False, say=said.append)
    assert said[0].startswith("4 of 4 runs are reused") and len(said) == 1 + 14
    again = []
    run_transfers(plan_transfer(profile, ["toy"], [0]), progress=False, say=again.append)
    assert len(again) == 2 and again[1].startswith("14 of 14 students are reused")

    table = transfer_table(planned)
    assert list(table.columns) == COLUMNS and table["student"].nunique() == 3
    cells = table[table["metric"] == "ndcg@10"].set_index(["student", "trained_on"])
    for item in planned:
        student = item.student.title(item.base.settings)
        figures = {
            name: cells.loc[(student, trained_on), "mean"]
            for name, trained_on in (
                ("full", "all data"),
                ("untrained", "nothing (untrained)"),
                ("own", item.trained_on),
            )
        }
        assert figures["own"] == pytest.approx(item.manifest()["test"]["ndcg@10"])
        cell = cells.loc[(student, item.trained_on)]
        assert cell["ratio_to_full"] == pytest.approx(figures["own"] / figures["full"])
        gain = (figures["own"] - figures["untrained"]) / (figures["full"] - figures["untrained"])
        assert cell["recovered_gain"] == pytest.approx(gain, nan_ok=True)
    assert cells.index.get_level_values(0).unique().tolist() == ["SASRec, tiny", "BERT4Rec, tiny", "GRU4Rec, lsa"]
    references = cells.xs("all data", level=1)["mean"]
    assert references.nunique() == 3, "each student has a reference of its own"

    path = write_table5(planned, table, results_dir() / "table5")
    assert {file.suffix for file in path.parent.iterdir()} == {".md", ".csv", ".tex", ".png", ".pdf"}
    text = path.read_text()
    assert text.count("FOSTER, decoded, with the 3 likeliest next items") == 3 and text.count("| GRU4Rec, lsa") == 6
    shown = readable_table(table, planned).set_index(["Student", "Trained on"])
    assert (shown.xs("FOSTER", level=1)["FOSTER minus it, 95 %"] == "").all()
    assert shown.loc[("SASRec, tiny", "all data"), "NDCG@10 / full"] == "1.000"


def test_a_students_key_is_its_own(profile):
    planned = {
        (item.student.backbone, item.base.method, item.reading): item for item in plan_transfer(profile, ["toy"], [0])
    }
    item = planned["bert4rec", "foster", "decoded+labels"]
    assert item.settings.student.epochs == 6 and planned["sasrec", "foster", "soft"].settings.student.epochs == 4
    changed = [
        replace(item, top=4),
        replace(item, recipe={"student": {"epochs": 7}}),
        replace(item, reading="decoded"),
        replace(item, student=Student("fmlp")),
        replace(item, student=Student("bert4rec", "lsa")),
        replace(item, base=replace(item.base, seed=1)),
    ]
    assert len({item.key, *(other.key for other in changed)}) == 7
    assert replace(planned["bert4rec", "foster", "soft"], top=4).key == planned["bert4rec", "foster", "soft"].key
    full = planned["bert4rec", "full", ""]
    assert (
        replace(full, recipe={"student": {"epochs": 7}}).key
        == full.key
        != replace(full, recipe={"full": {"epochs": 9}}).key
    )


def test_sources_can_be_named_and_must_make_sequences(profile):
    planned = plan_transfer(profile, ["toy"], [0], sources=["random"])
    assert {item.base.method for item in planned} == {"full", "untrained", "random"}
    with pytest.raises(FosterError, match="'popularity' makes no sequences"):
        plan_transfer(profile, ["toy"], [0], sources=["popularity"])
    with pytest.raises(FosterError, match="unknown method 'kdd'"):
        plan_transfer(profile, ["toy"], [0], sources=["kdd"])


def test_another_encoder_changes_what_a_student_reads(profile):
    """The sequences stay those of the first encoder, the student's item features do not."""
    encoder = plan_transfer(profile, ["toy"], [0])[0].base.settings.encoder
    loaded = [transfer.load_student_catalogue("toy", replace(encoder, name=name), "cpu") for name in ("tiny", "lsa")]
    own, other = loaded
    assert own.n_items == other.n_items == ITEMS == len(load_once("toy").texts)
    assert own.width != other.width and np.isfinite(other.embeddings.numpy()).all()
