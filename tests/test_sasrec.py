"""The recommender: attention, causality, mixtures, warm start, seeds."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import erf
from scipy.stats import spearmanr

from foster_lib.encoder import FrozenCatalogue
from foster_lib.errors import FosterError
from foster_lib.sasrec import Adapter, Block, Dropout, ModelSettings, SASRec, build_model
from tests.conftest import SMALL

# Full-size residual branches: the untrained transformer then really mixes its inputs.
LIVELY = ModelSettings(width=16, layers=2, heads=4, length=8, dropout=0.0, branch_scale=1.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_catalogue(n: int = 50, width: int = 24, seed: int = 0) -> FrozenCatalogue:
    return FrozenCatalogue(torch.randn(n, width, generator=generator(seed)))


@pytest.fixture
def model() -> SASRec:
    return SASRec(random_catalogue(), LIVELY, generator()).eval()


def naive_block(block: Block, x: np.ndarray) -> np.ndarray:
    """One sequence (L, d) through the block in float64, attention head by head and position by position."""
    p = {name: tensor.detach().double().numpy() for name, tensor in block.state_dict().items()}

    def linear(name, v):
        return v @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name, v):
        v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-5)
        return v * p[f"{name}.weight"] + p[f"{name}.bias"]

    L, d = x.shape
    size = d // block.heads
    q, k, v = np.split(linear("qkv", norm("norm_attention", x)), 3, axis=-1)
    mixed = np.zeros((L, d))
    for h in range(block.heads):
        part = slice(h * size, (h + 1) * size)
        for t in range(L):
            logits = np.array([q[t, part] @ k[s, part] / math.sqrt(size) for s in range(t + 1)])
            weight = np.exp(logits - logits.max())
            mixed[t, part] = sum(w * v[s, part] for s, w in enumerate(weight / weight.sum()))
    x = x + linear("project", mixed)
    inner = linear("expand", norm("norm_mlp", x))
    return x + linear("contract", 0.5 * inner * (1 + erf(inner / math.sqrt(2))))


def test_block_equals_naive_attention():
    """The fused block equals explicit causal attention in float64."""
    block = Block(LIVELY, generator()).eval()
    with torch.no_grad():  # biases and norms start at 0 and 1: make them count
        for tensor in block.parameters():
            if tensor.dim() == 1:
                tensor.add_(torch.randn(tensor.shape, generator=generator(1)) * 0.3)
    x = torch.randn(3, 7, 16, generator=generator(2))
    expected = np.stack([naive_block(block, row.double().numpy()) for row in x])
    np.testing.assert_allclose(block(x).detach().numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("positions", [16, 19])
def test_long_sequences_are_read_in_windows(model, positions):
    """More than L items: consecutive windows of L, each as if it stood alone."""
    items = torch.randn(3, positions, LIVELY.width, generator=generator(3))
    whole = model.transform(items)
    assert whole.shape == items.shape
    for start in range(0, positions, LIVELY.length):
        part = slice(start, start + LIVELY.length)
        torch.testing.assert_close(whole[:, part], model.transform(items[:, part]))


def test_transform_equals_its_formula(model):
    """Hidden state = normalise(blocks(√d · f + position)), scores = s · cos."""
    items = torch.tensor([[4, 9, 1, 30, 7]])
    features = model.features().double()
    x = features[items[0]] * 4 + model.positions[:5].double()
    x = x.detach().numpy()
    for block in model.blocks:
        x = naive_block(block, x)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    hidden = model(items, model.features())
    np.testing.assert_allclose(hidden[0].detach().numpy(), x, atol=2e-5)
    expected = LIVELY.initial_scale * x @ features.detach().numpy().T
    np.testing.assert_allclose(model.scores(hidden, model.features())[0].detach().numpy(), expected, atol=5e-4)


def test_later_items_do_not_reach_earlier_states(model):
    """A change at position t leaves all states before t alone and changes those from t on."""
    features = model.features()
    items = torch.randint(50, (4, 8), generator=generator(3))
    before = model(items, features)
    for t in range(8):
        changed = items.clone()
        changed[:, t] = (changed[:, t] + 1) % 50
        moved = (model(changed, features) - before).abs().amax((0, 2))
        assert (moved[:t] < 1e-6).all()
        assert (moved[t:] > 1e-4).all()


def test_padding_at_the_end_is_not_read(model):
    """Short and padded sequences have the same states where they are real."""
    features = model.features()
    items = torch.tensor([[3, 1, 2]])
    padded = torch.tensor([[3, 1, 2, 0, 0, 49, 0]])
    torch.testing.assert_close(model(padded, features)[:, :3], model(items, features))


def test_positions_matter(model):
    """The same items in another order give another last state."""
    a, b = model(torch.tensor([[3, 1, 2], [1, 3, 2]]), model.features())[:, -1]
    assert (a - b).abs().max() > 1e-3


def test_ids_equal_one_hot_mixtures(model):
    """Item indices and one-hot mixtures take the same path; a mixture is linear in the features."""
    features = model.features()
    items = torch.randint(50, (4, 6), generator=generator(4))
    one_hot = torch.nn.functional.one_hot(items, 50).float()
    torch.testing.assert_close(model(items, features), model(one_hot, features), atol=1e-6, rtol=1e-6)
    mixture = torch.rand(2, 3, 50, generator=generator(5))
    torch.testing.assert_close(model(mixture, features), model.transform(mixture @ features))


def test_permuting_items_permutes_scores():
    """Renumbered items get the scores of their old numbers."""
    embeddings = random_catalogue().embeddings
    order = torch.randperm(50, generator=generator(6))
    new_number = order.argsort()
    model, permuted = (SASRec(FrozenCatalogue(e), LIVELY, generator()).eval() for e in (embeddings, embeddings[order]))
    items = torch.randint(50, (4, 6), generator=generator(7))
    scores = model.scores(model(items, model.features()), model.features())
    features = permuted.features()
    other = permuted.scores(permuted(new_number[items], features), features)
    torch.testing.assert_close(other, scores[..., order], atol=1e-4, rtol=1e-4)


def test_features_have_unit_length(model):
    """Features and hidden states lie on the sphere; a subset is part of the whole."""
    features = model.features()
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(50))
    torch.testing.assert_close(model(torch.tensor([[1, 2]]), features).norm(dim=-1), torch.ones(1, 2))
    torch.testing.assert_close(model.features(torch.tensor([8, 3])), features[[8, 3]])


# ----------------------------------------------------------------------------- warm start


def test_adapter_equals_its_formula():
    """f(e) = normalise(W e + b + V gelu(U e + c)), item by item in float64."""
    adapter = Adapter(6, 4, 5, generator(20))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(generator=generator(21))
    embeddings = torch.randn(9, 6, generator=generator(22))
    p = {name: tensor.detach().double().numpy() for name, tensor in adapter.named_parameters()}
    for e, found in zip(embeddings.double().numpy(), adapter(embeddings).detach().numpy()):
        hidden = p["up.weight"] @ e + p["up.bias"]
        f = p["linear.weight"] @ e + p["linear.bias"] + p["down.bias"]
        f += p["down.weight"] @ (0.5 * hidden * (1 + erf(hidden / math.sqrt(2))))
        np.testing.assert_allclose(found, f / np.linalg.norm(f), atol=1e-5)


def test_adapters_hidden_layer_has_no_part_in_the_warm_start():
    """At the start the features are those of a linear adapter; the hidden layer learns from the first step."""
    catalogue = random_catalogue()
    with_layer = build_model(catalogue, replace(LIVELY, adapter_hidden=7), seed=0)
    linear = build_model(catalogue, replace(LIVELY, adapter_hidden=0), seed=0)
    assert torch.equal(with_layer.features(), linear.features())
    with_layer.features()[:, 0].sum().backward()
    assert with_layer.adapter.down.weight.grad.any()


def test_hidden_units_start_centred_with_unit_variance():
    """What enters the adapter's hidden units has mean 0 over the catalogue and standard deviation 1."""
    embeddings = 3 * torch.randn(400, 24, generator=generator(23)) + 5
    settings = replace(LIVELY, adapter_hidden=300)
    up = build_model(FrozenCatalogue(embeddings), settings, seed=0).adapter.up
    entering = up(embeddings).detach()
    torch.testing.assert_close(entering.mean(0), torch.zeros(300), atol=1e-3, rtol=0)
    assert abs(float(entering.std()) - 1) < 0.05


@pytest.mark.parametrize("power", [-0.5, 0.0, -1.0])
def test_warm_start_is_partial_whitening(power):
    """Features are the rows of U Σ^(1 + power), normalised: their cosines agree with numpy's SVD."""
    embeddings = torch.randn(60, 24, generator=generator(8)) * torch.linspace(3, 0.3, 24) + 5.0
    model = SASRec(FrozenCatalogue(embeddings), LIVELY, generator()).warm_start(embeddings, power)
    x = embeddings.double().numpy()
    u, sigma, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    expected = (u * sigma ** (1 + power))[:, : LIVELY.width]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    features = model.features().detach().double().numpy()
    np.testing.assert_allclose(features @ features.T, expected @ expected.T, atol=1e-4)
    # An eigenvector's sign is arbitrary: the rule is that its largest entry is positive.
    weight = model.adapter.linear.weight.detach()
    assert (weight.gather(1, weight.abs().argmax(1, keepdim=True)) > 0).all()


def test_warm_start_ranks_by_similarity_to_the_last_item(catalogue):
    """Untrained scores follow the last item's text neighbours, whatever came before it."""
    model = build_model(catalogue, SMALL, seed=0).eval()
    with torch.no_grad():
        features = model.features()
        n = len(features)
        histories = torch.randint(n, (n, 4), generator=generator(10))
        histories[:, -1] = torch.arange(n)
        scores = model.scores(model(histories, features)[:, -1], features)
        cosine = features @ features.T
    assert (scores.argmax(1) == torch.arange(n)).all()
    scores.fill_diagonal_(-math.inf)
    neighbours = cosine.clone().fill_diagonal_(-math.inf)
    assert (scores.argmax(1) == neighbours.argmax(1)).float().mean() > 0.8
    off_diagonal = ~torch.eye(n, dtype=bool)
    assert spearmanr(scores[off_diagonal], cosine[off_diagonal]).statistic > 0.95


def test_warm_start_with_a_narrow_encoder():
    """Fewer embedding columns than the recommender is wide: the rest stays zero, features stay unit vectors."""
    catalogue = random_catalogue(width=5)
    model = build_model(catalogue, LIVELY, seed=0)
    assert not model.adapter.linear.weight[5:].any() and not model.adapter.linear.bias[5:].any()
    torch.testing.assert_close(model.features().norm(dim=-1), torch.ones(50))


def test_warm_start_survives_directions_without_variance():
    """Of rank 10 and with rounding errors in all columns: whitening must not amplify the errors."""
    low_rank = torch.randn(50, 10, generator=generator(11), dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(24, 10, generator=generator(12), dtype=torch.float64)).Q
    embeddings = (low_rank @ rotation.T + 3).float()
    settings = ModelSettings(width=24, layers=1, heads=2)
    features = build_model(FrozenCatalogue(embeddings), settings, seed=0).features()
    only = build_model(FrozenCatalogue(low_rank.float()), settings, seed=0).features()
    torch.testing.assert_close(features @ features.T, only @ only.T, atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------------------------- seeds


def test_equal_seeds_give_equal_weights():
    """Weights depend on the seed alone, not on the global random state."""
    catalogue = random_catalogue()
    torch.manual_seed(1)
    first = build_model(catalogue, LIVELY, seed=5).state_dict()
    torch.manual_seed(2)
    second = build_model(catalogue, LIVELY, seed=5).state_dict()
    other = build_model(catalogue, LIVELY, seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["blocks.0.qkv.weight"], other["blocks.0.qkv.weight"])
    assert torch.equal(
        first["adapter.linear.weight"], other["adapter.linear.weight"]
    )  # the warm start has no chance in it


def test_global_random_state_is_untouched():
    """Neither building nor a training forward pass draws from torch's global generator."""
    state = torch.get_rng_state()
    model = build_model(random_catalogue(), SMALL, seed=0).train()
    model(torch.tensor([[1, 2, 3]]), model.features())
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout():
    """Off in evaluation; in training a share p becomes zero and the mean is kept; the generator decides."""
    x = torch.ones(200, 200)
    dropout = Dropout(0.3, generator())
    y = dropout(x)
    assert torch.unique(y).tolist() == pytest.approx([0.0, 1 / 0.7])
    assert float((y == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.equal(Dropout(0.3, generator())(x), y)
    assert not torch.equal(dropout(x), y)
    assert dropout.eval()(x) is x
    assert copy.deepcopy(dropout).generator is dropout.generator


def test_training_and_evaluation_differ_only_by_dropout():
    """With p = 0 both modes agree, with p > 0 they do not."""
    for p in (0.0, 0.5):
        settings = ModelSettings(width=16, layers=1, heads=2, length=8, dropout=p)
        model = SASRec(random_catalogue(), settings, generator())
        items = torch.tensor([[1, 2, 3]])
        training, evaluation = model.train()(items, model.features()), model.eval()(items, model.features())
        assert torch.equal(training, evaluation) == (p == 0.0)


def test_heads_split_the_width_evenly():
    """A width that the heads do not divide is refused where it is named, not deep inside attention."""
    with pytest.raises(FosterError, match="width 10 is no multiple of heads 4"):
        ModelSettings(width=10, heads=4)
