"""Synthetic sequences: probabilities, training data, decoding, and the file format."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from foster_lib import coresets
from foster_lib.config import load_profile
from foster_lib.errors import FosterError
from foster_lib.recipes import train_student
from foster_lib.sasrec import build_model
from foster_lib.synthetic import SyntheticSequences
from foster_lib.synthetic_data import SyntheticData
from foster_lib.training import TrainSettings, make_batch, train
from tests.conftest import SMALL

LENGTH, WIDTH, K, V = 6, 32, 5, 40


def embeddings(n: int = V) -> torch.Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(0))


def windows() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(V, size=n) for n in (7, 3, 2, 5)]


def full(seed: int = 0) -> SyntheticSequences:
    """Sequences with every optional part, all random."""
    g = torch.Generator().manual_seed(seed)
    real = SyntheticSequences.from_windows(windows(), LENGTH)
    return SyntheticSequences(
        real.items,
        real.mask,
        real.targets,
        adapter={"linear.weight": torch.randn(K, WIDTH, generator=g), "linear.bias": torch.randn(K, generator=g)},
        labels=4 * torch.randn(4, LENGTH, K, generator=g),
        queries=4 * torch.randn(4, LENGTH, K, generator=g),
        bonus=2 * torch.rand(4, LENGTH, generator=g),
    )


def inputs_of(batch) -> torch.Tensor:
    """(n, L, |V|) probabilities of a batch over all items, the anchors' in their columns."""
    return batch.p.scatter_add(-1, batch.anchors[..., None], batch.own[..., None])


def equal(a: SyntheticSequences, b: SyntheticSequences) -> bool:
    """All parts have the same type and bits, absent parts are absent in both."""
    if (a.adapter or {}).keys() != (b.adapter or {}).keys():
        return False
    apart = ("adapter", "bits")
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(SyntheticSequences) if f.name not in apart]
    pairs += [(tensor, b.adapter[name]) for name, tensor in (a.adapter or {}).items()]
    return a.bits == b.bits and all(x is y is None or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in pairs)


def test_from_windows():
    """Items, next items and mask, left-aligned and padded to L."""
    s = SyntheticSequences.from_windows([np.array([4, 5, 6, 7]), np.array([8, 9])], 4)
    assert s.items.tolist() == [[4, 5, 6, 0], [8, 0, 0, 0]]
    assert s.targets.tolist() == [[5, 6, 7, 0], [9, 0, 0, 0]]
    assert s.mask.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert len(s) == 2


def test_probabilities_equal_their_formulas():
    """p = softmax(z_x·f + β·[anchor]), y = softmax(z_y·f), f = normalise(W e + b), item by item in float64."""
    s, e = full(), embeddings()
    w, b = (s.adapter[f"linear.{part}"].double().numpy() for part in ("weight", "bias"))
    f = np.stack([w @ row + b for row in e.double().numpy()])
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    p, y = s.input_probabilities(e).numpy(), s.target_probabilities(e).numpy()
    assert p.shape == y.shape == (4, LENGTH, V)
    for n in range(4):
        for position in range(LENGTH):
            inputs = [float(s.queries[n, position].double().numpy() @ f[j]) for j in range(V)]
            inputs[s.items[n, position]] += float(s.bonus[n, position])
            targets = [float(s.labels[n, position].double().numpy() @ f[j]) for j in range(V)]
            for found, logits in ((p[n, position], inputs), (y[n, position], targets)):
                total = sum(math.exp(v) for v in logits)
                np.testing.assert_allclose(found, [math.exp(v) / total for v in logits], atol=1e-5)


def test_real_sequences_have_one_hot_probabilities():
    """Without queries and labels the probabilities are the items themselves, and there are no features."""
    s = SyntheticSequences.from_windows(windows(), LENGTH)
    assert torch.equal(s.input_probabilities(embeddings()).argmax(-1), s.items)
    assert torch.equal(s.target_probabilities(embeddings()).argmax(-1), s.targets)
    assert torch.equal(s.target_probabilities(embeddings()).sum(-1), torch.ones(4, LENGTH))
    with pytest.raises(FosterError, match="real items only"):
        s.features(embeddings())


def test_training_data_of_real_sequences_is_the_real_batch():
    """Hard sequences give what `make_batch` gives for the windows they came from."""
    (batch,) = SyntheticData(SyntheticSequences.from_windows(windows(), LENGTH), embeddings()).batches(None)
    expected = make_batch(windows())
    assert batch.p is None and torch.equal(batch.anchors, expected.inputs)
    assert torch.equal(batch.y, expected.targets)
    assert torch.equal(batch.mask, expected.mask)


def test_training_data_of_mixtures():
    """Inputs and targets are the probabilities, targets only where the mask stands; one step an epoch."""
    s, e = full(), embeddings()
    data = SyntheticData(s, e)
    (batch,) = data.batches(None)
    torch.testing.assert_close(inputs_of(batch), s.input_probabilities(e))
    torch.testing.assert_close(batch.y, s.target_probabilities(e)[s.mask])
    assert len(batch.y) == sum(len(w) - 1 for w in windows())


@pytest.mark.parametrize("hard", [True, False])
def test_training_over_subsets_of_items(catalogue, hard):
    """Each step draws other items, hard targets among them; the mean loss over many is near the full one's."""
    model = build_model(catalogue, SMALL, seed=0).eval()
    s, e = SyntheticSequences.from_windows(windows(), LENGTH) if hard else full(), catalogue.embeddings
    (everything,) = SyntheticData(s, e).batches(None)
    data, generator = SyntheticData(s, e, size=3 * V // 4), np.random.default_rng(0)
    losses = []
    with torch.no_grad():
        expected = data.loss(model, everything).item()
        for _ in range(300):
            (batch,) = data.batches(generator)
            assert len(batch.subset.items) < V
            if hard:
                assert torch.equal(batch.subset.items[batch.y], s.targets[s.mask])
            losses.append(data.loss(model, batch).item())
    assert np.std(losses) > 0
    if hard:  # the softmax over the subset is that over the catalogue but for the noise in its normaliser
        assert np.mean(losses) == pytest.approx(expected, rel=0.03)
    assert SyntheticData(s, e, size=V + 1).everything is not None


@pytest.mark.parametrize("hard", [True, False])
def test_items_that_every_subset_holds(catalogue, hard):
    """Hard targets, or the three most probable items of each label, against a search through all."""
    s, e = SyntheticSequences.from_windows(windows(), LENGTH) if hard else full(), catalogue.embeddings
    probable = s.target_probabilities(e)[s.mask].topk(1 if hard else 3).indices
    data, generator = SyntheticData(s, e, size=V // 4), np.random.default_rng(0)
    assert torch.equal(data.wanted[0], torch.unique(probable))
    for _ in range(5):
        (batch,) = data.batches(generator)
        assert torch.isin(probable, batch.subset.items).all()


@pytest.mark.parametrize(("labelled", "rates"), [(True, [0.02, 0.005]), (False, [0.001, 0.001])])
def test_students_rates(task, monkeypatch, labelled, rates):
    """The adapter has its own rate where targets are probabilities; hard ones have the small rate throughout."""
    seen = []

    class Spy(torch.optim.AdamW):
        def __init__(self, groups):
            super().__init__(groups)
            seen.extend(sorted({group["full_rate"] for group in groups}, reverse=True))

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    settings = load_profile("smoke").settings("ml-100k")
    settings = replace(settings, student=replace(settings.student, adapter_rate=4.0, epochs=1))
    sequences = coresets.kd(task, 3, seed=0)
    hard = replace(sequences, labels=None, adapter=None, alike=None)
    train_student(task, sequences if labelled else hard, settings, seed=0)
    assert seen == sorted(set(rates), reverse=True)


def test_a_student_learns_from_mixtures(catalogue):
    """A fresh recommender fits synthetic sequences read from the disk."""
    model = build_model(catalogue, SMALL, seed=0)
    data = SyntheticData(full().stored(), catalogue.embeddings)
    log = train(model, data, TrainSettings(learning_rate=1e-2, epochs=40), seed=0)
    assert log.losses[-1] < 0.8 * log.losses[0]


# -------------------------------------------------------------------------------- reading


def test_decode_names_the_most_probable_items():
    """A large β makes the anchor first; further items follow by probability; padding is not named."""
    s, e = full(), embeddings()
    titles = [f"title {j}" for j in range(V)]
    anchored = SyntheticSequences(**{f.name: getattr(s, f.name) for f in fields(s)} | {"bonus": s.bonus + 100})
    pieces = windows()
    assert anchored.decode(e, titles) == [[f"title {i}" for i in piece[:-1]] for piece in pieces]
    order = s.target_probabilities(e).argsort(-1, descending=True)
    expected = [
        [" | ".join(f"title {order[n, t, r]}" for r in range(3)) for t in range(len(piece) - 1)]
        for n, piece in enumerate(pieces)
    ]
    assert s.decode_targets(e, titles, top=3) == expected
    real = SyntheticSequences.from_windows(pieces, LENGTH)
    assert real.decode_targets(e, titles) == [[f"title {i}" for i in piece[1:]] for piece in pieces]


# ------------------------------------------------------------------------------ on the disk


def in_bytes() -> SyntheticSequences:
    return replace(full(), bits=8)


@pytest.mark.parametrize("make", [full, in_bytes, lambda: SyntheticSequences.from_windows(windows(), LENGTH)])
def test_round_trip_equals_stored(tmp_path, make):
    """What comes back from the disk is `stored()`, bit by bit, and storing again changes nothing."""
    s = make()
    path = s.save(tmp_path / "deep" / "s.safetensors")
    again = SyntheticSequences.load(path)
    assert equal(again, s.stored())
    assert equal(again.stored(), again)
    assert torch.equal(again.items, s.items) and torch.equal(again.mask, s.mask)


def test_stored_rounds_to_half_precision():
    """Queries, labels and weights are rounded to 11 bits, no more."""
    s = full()
    stored = s.stored()
    for name, exact in s.tensors().items():
        rounded = stored.tensors()[name]
        if not exact.is_floating_point():
            continue
        assert rounded.dtype == torch.float32
        assert not torch.equal(exact, rounded)
        torch.testing.assert_close(rounded, exact, rtol=2**-11, atol=1e-6)


def test_stored_in_bytes_rounds_each_row_to_its_scale():
    """Numbers of a matrix are off by at most half a 127th of the largest of their row, other numbers by half
    precision; rows of zeros, as padding has, stay so.
    """
    s = in_bytes()
    s = replace(s, labels=s.labels * s.mask[..., None] * torch.tensor([1e-6, 1.0, 50.0, 1.0])[:, None, None])
    stored = s.stored()
    for name, exact in s.tensors().items():
        rounded = stored.tensors()[name]
        if name in ("labels", "queries", "adapter.linear.weight"):
            largest = exact.abs().amax(-1, keepdim=True)
            assert ((rounded - exact).abs() <= largest * (0.5 / 127 + 1e-6)).all()
            assert len(torch.unique(exact)) > 20 and not torch.equal(rounded, exact)
        elif exact.is_floating_point():
            torch.testing.assert_close(rounded, exact, rtol=2**-11, atol=1e-6)
        else:
            assert torch.equal(rounded, exact)
    assert not stored.labels[~s.mask].any()


@pytest.mark.parametrize("make", [full, in_bytes, lambda: SyntheticSequences.from_windows(windows(), LENGTH)])
def test_size_in_bytes_is_the_payload_of_the_file(tmp_path, make):
    """File = 8 bytes + header + payload; the payload is the figure that budgets are counted in."""
    s = make()
    content = s.save(tmp_path / "s").read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert s.size_in_bytes() == len(content) - 8 - header


def test_size_by_hand():
    """Two int32 and a bool per position, then two bytes a number, or one and two for the row's scale; the catalogue
    does not enter."""
    positions = 4 * LENGTH
    assert SyntheticSequences.from_windows(windows(), LENGTH).size_in_bytes() == positions * (4 + 4 + 1)
    assert full().size_in_bytes() == positions * (4 + 4 + 1) + 2 * (K * WIDTH + K + positions * (2 * K + 1))
    rows, vectors = positions * 2 + K, 2 * (positions + K)
    matrices = positions * 2 * K + K * WIDTH
    assert in_bytes().size_in_bytes() == positions * (4 + 4 + 1) + vectors + matrices + 2 * rows
    assert full().input_probabilities(embeddings(400)).shape == (4, LENGTH, 400)


def test_description_beside_the_file(tmp_path):
    """The JSON names the counts, the bytes, the shapes on disk and what the caller adds."""
    s = full()
    path = s.save(tmp_path / "s.safetensors", {"method": "foster", "seed": 3})
    text = json.loads(path.with_suffix(".json").read_text())
    assert (text["sequences"], text["length"], text["targets"]) == (4, LENGTH, sum(len(w) - 1 for w in windows()))
    assert (text["method"], text["seed"], text["bytes"]) == ("foster", 3, s.size_in_bytes())
    with safe_open(path, "pt") as file:
        assert text["tensors"] == {name: file.get_slice(name).get_shape() for name in file.keys()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.json", "s.safetensors"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "text", "empty"])
def test_damaged_file(tmp_path, damage):
    """A missing or damaged file is one clear error that names it."""
    path = full().save(tmp_path / "s")
    good = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": good[:-5], "text": b"hello " * 9, "empty": b""}[damage])
    with pytest.raises(FosterError, match=r"s\.safetensors: no readable synthetic sequences"):
        SyntheticSequences.load(path)


@pytest.mark.parametrize("extra", [{"embeddings": torch.zeros(2)}, {}])
def test_foreign_file(tmp_path, extra):
    """A good file of something else, or with a part missing, is not taken for synthetic sequences."""
    tensors = {"items": torch.zeros(2, 3), "mask": torch.zeros(2, 3), **extra}
    save_file(tensors | ({"targets": torch.zeros(2, 3)} if extra else {}), tmp_path / "s.safetensors")
    with pytest.raises(FosterError, match=r"holds \[.*'items'.*\], not synthetic sequences"):
        SyntheticSequences.load(tmp_path / "s.safetensors")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    """When the disk is full the error says so, and the previous file and no temporary one remain."""
    path = full().save(tmp_path / "s")
    before = path.read_bytes()

    def no_space(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", no_space)
    with pytest.raises(FosterError, match="cannot be written .No space left on device"):
        full(seed=1).save(path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.json", "s.safetensors"]


def test_to_moves_every_part():
    """`to` keeps values, absent parts, and how numbers are stored; so does `detached`."""
    assert equal(full().to("cpu"), full())
    assert equal(in_bytes().to("cpu"), in_bytes().detached())
    real = SyntheticSequences.from_windows(windows(), LENGTH).to("cpu")
    assert real.labels is None and real.queries is None
