"""Catalogues: frozen embeddings, and layers of the encoder that learn."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from foster_lib.encoder import FrozenCatalogue, TextEncoder, TunedCatalogue
from foster_lib.errors import FosterError

TEXTS = ["abc", "a", "the quick brown fox 42", "zzzz", "abc d", "0123456789 0123456789", "a" * 100]


def embed(encoder, texts):
    return encoder.embed(texts, use_cache=False, progress=False)


def test_frozen_catalogue(own_encoder):
    """No parameters, nothing in checkpoints, one shared table when a model is copied."""
    catalogue = own_encoder.catalogue(TEXTS, use_cache=False, progress=False)
    assert isinstance(catalogue, FrozenCatalogue)
    assert (catalogue.n_items, catalogue.width) == (len(TEXTS), own_encoder.width)
    assert not list(catalogue.parameters()) and not catalogue.state_dict()
    assert torch.equal(catalogue(torch.tensor([4, 0])), catalogue()[[4, 0]])
    holder = nn.ModuleList([catalogue])
    assert copy.deepcopy(holder)[0].embeddings.data_ptr() == catalogue.embeddings.data_ptr()


@pytest.mark.parametrize("tuned_layers", [1, 2, "all"])
def test_tuned_catalogue_equals_the_full_forward(own_encoder, tuned_layers):
    """Before any training a tuned catalogue holds the frozen embeddings, for all items and for subsets."""
    expected = embed(own_encoder, TEXTS)
    catalogue = own_encoder.catalogue(TEXTS, tuned_layers=tuned_layers)
    assert (catalogue.n_items, catalogue.width) == (len(TEXTS), own_encoder.width)
    torch.testing.assert_close(catalogue().detach(), expected, atol=1e-5, rtol=1e-5)
    subset = torch.tensor([5, 0, 3])
    torch.testing.assert_close(catalogue(subset).detach(), expected[subset], atol=1e-5, rtol=1e-5)


def test_a_large_tuned_catalogue_is_embedded_in_parts(own_encoder):
    """Without gradients never more than 256 items at once, with the same embeddings; with gradients all."""
    catalogue = own_encoder.catalogue([f"{text} {number}" for number in range(100) for text in TEXTS], tuned_layers=1)
    sizes = []
    catalogue.upper[0].register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    whole = catalogue()
    assert sizes == [catalogue.n_items] and whole.requires_grad
    sizes.clear()
    with torch.no_grad():
        parts = catalogue()
    assert max(sizes) == 256 and sum(sizes) == catalogue.n_items
    torch.testing.assert_close(parts, whole.detach(), atol=1e-5, rtol=1e-5)


def test_tuned_catalogue_follows_its_weights(own_encoder):
    """After a change of the tuned layer it still equals the full forward with the new weights."""
    before = embed(own_encoder, TEXTS)
    catalogue = own_encoder.catalogue(TEXTS, tuned_layers=1)
    with torch.no_grad():
        for parameter in own_encoder.model.encoder.layer[-1].parameters():
            parameter.mul_(1.3)
    after = embed(own_encoder, TEXTS)
    assert not torch.allclose(before, after, atol=1e-2)
    torch.testing.assert_close(catalogue().detach(), after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tuned_layers", [1, 2, "all"])
def test_only_the_tuned_layers_learn(own_encoder, tuned_layers):
    """Gradients reach exactly the last k layers, or everything that the pooling reads."""
    catalogue = own_encoder.catalogue(TEXTS, tuned_layers=tuned_layers)
    catalogue().square().sum().backward()
    reached = {name for name, p in own_encoder.model.named_parameters() if p.grad is not None and p.grad.any()}
    layers = [f"encoder.layer.{i}." for i in range(2)]
    expected = {
        name
        for name, _ in own_encoder.model.named_parameters()
        if (tuned_layers == "all" and not name.startswith("pooler"))
        or (tuned_layers != "all" and name.startswith(tuple(layers[-tuned_layers:])))
    }
    # The softmax over keys does not see a constant added to all of them: key biases have no gradient.
    assert {n for n in reached if ".key.bias" not in n} == {n for n in expected if ".key.bias" not in n}
    trainable = {name for name, p in own_encoder.model.named_parameters() if p.requires_grad}
    assert tuned_layers == "all" or trainable == expected


def test_depth_can_be_chosen_anew(own_encoder):
    """The last choice counts when one encoder serves two catalogues."""
    own_encoder.catalogue(TEXTS, tuned_layers=1)
    own_encoder.catalogue(TEXTS, tuned_layers="all")
    assert all(p.requires_grad for p in own_encoder.parameters())


def test_tuned_weights_stand_once_in_a_checkpoint(own_encoder):
    """No tensor of the state has two names (safetensors refuses shared memory)."""
    state = own_encoder.catalogue(TEXTS, tuned_layers=1).state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)


def test_training_mode_leaves_the_encoder_deterministic(own_encoder):
    """The language model's dropout stays off, so nothing draws from the global random state."""
    for module in own_encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    catalogue = nn.Sequential(own_encoder.catalogue(TEXTS, tuned_layers=1)).train()
    state = torch.get_rng_state()
    assert torch.equal(catalogue[0](), catalogue[0]())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("tuned_layers", [3, -1, "al", 1.5])
def test_impossible_depth(own_encoder, tuned_layers):
    """More layers than there are, negative counts and misspelt words name the setting."""
    with pytest.raises(FosterError, match=rf"tuned_layers={tuned_layers} does not fit encoder 'tiny' \(2 layers\)"):
        own_encoder.catalogue(TEXTS, tuned_layers=tuned_layers)


def test_model_without_layer_list():
    """An architecture that is not BERT-like is refused with its reason."""
    model = nn.Linear(3, 3)
    encoder = TextEncoder("flat", model, lambda texts, **_: {"input_ids": [[1] for _ in texts]})
    with pytest.raises(FosterError, match=r"encoder 'flat' \(no BERT-like layer list\)"):
        TunedCatalogue(encoder, TEXTS, 1)
