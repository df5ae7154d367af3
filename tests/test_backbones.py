"""The other recommenders: their equations written out, what each position can see, and that they start warm."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from foster_lib.backbones import (
    BACKBONES,
    BERT4Rec,
    ClozeSequences,
    WholeBatch,
    build_backbone,
    causal_filter,
    cloze,
    scorer,
    training_form,
    whole_loss,
)
from foster_lib.batches import Batch, make_batch
from foster_lib.encoder import FrozenCatalogue
from foster_lib.errors import FosterError
from foster_lib.evaluation import rank_queries, recommender_scorer
from foster_lib.sasrec import Dropout
from foster_lib.training import RealSequences, TrainSettings, train
from tests.conftest import ITEMS, SMALL

CAUSAL = [name for name in BACKBONES if name != "bert4rec"]
N = ITEMS


@pytest.fixture(params=BACKBONES)
def model(request, catalogue):
    return build(request.param, catalogue)


def build(name, catalogue, **changes):
    """A model whose branches are as large as after training, so that a leak would show."""
    return build_backbone(name, catalogue, replace(SMALL, branch_scale=1.0, **changes), seed=0).eval()


def hidden_of(model, inputs):
    return model(inputs, model.features())


@pytest.mark.parametrize("name", BACKBONES)
def test_untrained_models_rank_by_text_similarity_to_the_last_item(name, catalogue, split):
    settings = replace(SMALL, branch_scale=0.0, dropout=0.0)
    model = build_backbone(name, catalogue, settings, seed=0).eval()
    with torch.no_grad():
        model.positions = None if model.positions is None else torch.nn.Parameter(torch.zeros_like(model.positions))
        features = model.features()
        histories = split.validation.histories[:20]
        similarity = features[[history[-1] for history in histories]] @ features.T
        scores = scorer(model)(histories)
    assert torch.allclose(scores, similarity * model.log_scale.exp(), atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_equal_seeds_give_equal_weights_and_leave_the_global_state(name, catalogue):
    made = []
    for seed in (0, 0, 1):
        before = torch.get_rng_state()
        made.append(build_backbone(name, catalogue, SMALL, seed))
        assert torch.equal(before, torch.get_rng_state())
        torch.rand(1)  # the global state is another one for the next
    one, same, other = made
    pairs = list(zip(one.state_dict().values(), same.state_dict().values(), other.state_dict().values()))
    assert all(torch.equal(a, b) for a, b, _ in pairs) and any(not torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize("name", CAUSAL)
def test_no_position_sees_what_follows_it(name, catalogue):
    """A later item changes the states from its place on, and no earlier one."""
    model = build(name, catalogue)
    inputs = torch.randint(N, (3, 6), generator=torch.Generator().manual_seed(0))
    before = hidden_of(model, inputs)
    for place in range(6):
        changed = inputs.clone()
        changed[:, place] = (changed[:, place] + 1) % N
        differs = (hidden_of(model, changed) - before).abs().amax((0, 2)) > 1e-6
        assert differs.tolist() == [at >= place for at in range(6)], place


def test_a_mixture_of_one_item_is_that_item(model):
    """Real and synthetic inputs take the same path; for BERT4Rec with [MASK] and padding too."""
    extra = 2 * isinstance(model, BERT4Rec)
    inputs = torch.tensor([[3, 7, 1, 0], [5, 2, 0, 9]])
    if extra:
        inputs = torch.tensor([[3, N, 1, N + 1], [5, 2, N, 9]])
    one_hot = torch.nn.functional.one_hot(inputs, N + extra).float()
    read = inputs <= N  # what stands at padding is nobody's business
    assert torch.allclose(hidden_of(model, inputs)[read], hidden_of(model, one_hot)[read], atol=1e-5)


def test_gru_is_the_recurrence_of_the_paper(catalogue):
    """Reset and update gates written out, in float64."""
    model = build("gru4rec", FrozenCatalogue(catalogue.embeddings.clone())).double()
    features = model.features(torch.arange(5)).detach()[None]
    w_in, w_state, b_in, b_state = (parameter.detach() for parameter in model.gru.parameters())
    x, state, found = features * 4.0, torch.zeros(16, dtype=torch.float64), []  # 4: the root of the width
    for given in model.norm(x)[0].detach():
        (r_in, z_in, n_in), (r_s, z_s, n_s) = (w_in @ given + b_in).chunk(3), (w_state @ state + b_state).chunk(3)
        reset, update = torch.sigmoid(r_in + r_s), torch.sigmoid(z_in + z_s)
        state = (1 - update) * torch.tanh(n_in + reset * n_s) + update * state
        found.append(state)
    expected = torch.nn.functional.normalize(x[0] + model.project(torch.stack(found)), dim=-1)
    assert torch.allclose(model.transform(features)[0], expected, atol=1e-12)


def test_a_filter_is_a_causal_convolution():
    """Against a loop, and against the product of Fourier transforms of sequences padded to twice their length."""
    draw = torch.Generator().manual_seed(0)
    x, kernel = (torch.randn(*shape, 5, generator=draw, dtype=torch.float64) for shape in ((2, 7), (9,)))
    found, loop = causal_filter(x, kernel), torch.zeros_like(x)
    for t in range(7):
        for s in range(t + 1):
            loop[:, t] += kernel[t - s] * x[:, s]
    assert torch.allclose(found, loop, atol=1e-12)
    transformed = torch.fft.rfft(x, n=14, dim=1) * torch.fft.rfft(kernel[:7], n=14, dim=0)
    assert torch.allclose(found, torch.fft.irfft(transformed, n=14, dim=1)[:, :7], atol=1e-12)


# ------------------------------------------------------------------------------ BERT4Rec


def test_bert_sees_both_sides_but_neither_padding_nor_what_is_hidden(catalogue):
    model = build("bert4rec", catalogue, layers=2).requires_grad_(False)
    inputs = torch.tensor([[3, 7, N, 1, 9, N + 1, N + 1]])
    at_mask = hidden_of(model, inputs)[0, 2]

    def moved(place, item):
        changed = inputs.clone()
        changed[0, place] = item
        return float((hidden_of(model, changed)[0, 2] - at_mask).abs().max()) > 1e-6

    assert moved(0, 8) and moved(1, 8) and moved(3, 8) and moved(4, 8)
    assert moved(5, 8)  # an item where padding was is read
    assert torch.allclose(hidden_of(model, inputs[:, :5])[0, 2], at_mask, atol=1e-6)  # padding is not read at all


def test_bert_agrees_with_the_encoder_of_pytorch(catalogue):
    """The same weights in `nn.TransformerEncoderLayer`, with its mask of padding; branches in its order."""
    model = build("bert4rec", catalogue)
    block, d = model.blocks[0], 16
    layer = torch.nn.TransformerEncoderLayer(d, 2, 4 * d, 0.0, "gelu", batch_first=True, norm_first=True).eval()
    pairs = {
        "self_attn.in_proj": block.qkv, "self_attn.out_proj.": block.project, "linear1.": block.expand,
        "linear2.": block.contract, "norm1.": block.norm_attention, "norm2.": block.norm_mlp,
    }  # fmt: skip
    weights = {}
    for name, own in pairs.items():
        separator = "_" if name.endswith("proj") else ""
        weights |= {f"{name}{separator}weight": own.weight, f"{name}{separator}bias": own.bias}
    layer.load_state_dict(weights)
    x = torch.randn(2, 5, d, generator=torch.Generator().manual_seed(0))
    readable = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    expected = layer(x, src_key_padding_mask=~readable)
    assert torch.allclose(block(x, readable)[readable], expected[readable], atol=1e-5)


@pytest.mark.parametrize("soft", [False, True])
def test_a_mask_hides_its_item_and_asks_for_it(soft):
    """Two sequences of 4 and 2 targets: where [MASK] stands, what is read, and which target belongs to which place."""
    items = torch.tensor([[5, 6, 7, 8], [1, 2, 0, 0]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    targets = torch.tensor([6, 7, 8, 9, 2, 3])
    given = Batch(items, targets, mask)
    if soft:
        given = Batch(torch.nn.functional.one_hot(items, N).float(), torch.eye(N)[targets], mask)
    drawn = torch.tensor([[True, True, False, False, True], [False, False, True, True, True]])
    made = cloze(given, torch.tensor([3, 2]), drawn, N)
    expected = torch.tensor([[5, N, 7, N, N + 1], [1, 2, N, N + 1, N + 1]])
    assert torch.equal(made.inputs.argmax(-1) if soft else made.inputs, expected)
    assert not soft or torch.equal(made.inputs.sum(-1), torch.ones(2, 5))
    assert made.mask.tolist() == (expected == N).tolist()
    found = made.targets.argmax(-1) if soft else made.targets
    assert found.tolist() == [6, 8, 3]  # the hidden 6; what follows 7; what follows 2


def test_cloze_draws_ends_and_masks_at_its_rates():
    pieces = [np.arange(21) % N for _ in range(400)]
    data = ClozeSequences(WholeBatch(make_batch(pieces)), N, share=0.3, cut=0.5)
    one, two = (next(iter(data.batches(np.random.default_rng(seed)))) for seed in (0, 1))
    assert not torch.equal(one.inputs, two.inputs)
    ends = (one.inputs == N + 1).int().argmax(1).where((one.inputs == N + 1).any(1), torch.tensor(21)) - 1
    assert (one.inputs[torch.arange(400), ends] == N).all() and not one.mask[:, 0].any() and int(ends.min()) >= 1
    assert abs(float((ends < 20).float().mean()) - 0.5 * 19 / 20) < 0.08
    inside = (torch.arange(21) < ends[:, None]) & (torch.arange(21) > 0)
    assert abs(float(one.mask[inside].float().mean()) - 0.3) < 0.03
    hidden = one.mask[:, :21] & inside
    assert torch.equal(one.targets, torch.from_numpy(np.array(pieces))[one.mask])  # real data: the hidden item
    assert hidden.any() and len(one.targets) == int(one.mask.sum())


def test_bert_is_asked_behind_the_last_items_of_a_history(catalogue):
    """Against a single history at a time, without padding; only the last L items count."""
    model = build("bert4rec", catalogue)
    histories = [np.array([4]), np.arange(5), np.arange(20) % N]
    found = scorer(model)(histories)
    for history, scores in zip(histories, found):
        inputs = torch.tensor([[*history[-SMALL.length :], N]])
        expected = model.scores(hidden_of(model, inputs)[0, -1], model.features())
        assert torch.allclose(scores, expected, atol=1e-5)


# ------------------------------------------------------------------------------ all alike


@pytest.mark.parametrize("name", BACKBONES)
def test_the_trainer_takes_them_and_they_learn_the_ring(name, task, catalogue):
    """Most users of the tiny data set walk along a ring: any recommender beats its own start by far."""
    model = build_backbone(name, catalogue, SMALL, seed=0)

    def validate(model):
        return rank_queries(scorer(model), task.validation, N).metrics()["ndcg@10"]

    data = training_form(name, RealSequences(task.train, SMALL.length, 16), N)
    settings = TrainSettings(learning_rate=1e-2, epochs=20, validate_every=20)
    log = train(model, data, settings, seed=0, validate=validate)
    assert log.validation[20] > 2 * log.validation[0] and validate(model) == log.validation[20]


def test_a_whole_batch_is_the_trainers_loss(model, task):
    if isinstance(model, BERT4Rec):
        pytest.skip("reads its own form")
    batch = make_batch(task.windows[:8])
    assert torch.allclose(whole_loss(model, batch), RealSequences([], 6, 8).loss(model, batch))
    soft = Batch(torch.eye(N)[batch.inputs], torch.eye(N)[batch.targets], batch.mask)
    assert torch.allclose(whole_loss(model, soft), whole_loss(model, batch), atol=1e-5)


def test_dropout_is_the_models_own(catalogue):
    for name in BACKBONES:
        one, two = (build_backbone(name, catalogue, SMALL, seed=0).train() for _ in range(2))
        inputs = torch.tensor([[1, 2, 3]])
        torch.rand(1)
        assert torch.equal(hidden_of(one, inputs), hidden_of(two, inputs)), name
        assert any(isinstance(module, Dropout) for module in one.modules())
        assert not torch.equal(hidden_of(one, inputs), hidden_of(one, inputs)), name


def test_names_are_checked_and_a_narrow_encoder_will_do(dataset):
    narrow = FrozenCatalogue(torch.randn(N, 8, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(FosterError, match="unknown backbone 'gru'.*gru4rec"):
        build_backbone("gru", narrow, SMALL, 0)
    assert recommender_scorer(build_backbone("fmlp", narrow, SMALL, 0))([np.array([1])]).shape == (1, N)
