"""The recommender: SASRec over text embeddings, with an adapter and a warm start.

Symbols: B sequences, L positions, N items (a subset or all |V|), d the recommender's width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foster_lib.errors import FosterError


@dataclass(frozen=True)
class ModelSettings:
    """Shape of the recommender.

    width : d; adapter_hidden : width of the adapter's hidden layer (0: the adapter is linear);
    layers, heads : of the transformer; length : L, items that it reads at a time; dropout : on
    embeddings and residual branches; branch_scale : factor on the initial weights that write into
    a residual stream (warm start); initial_scale : s in the softmax s·cos.
    """

    width: int = 64
    adapter_hidden: int = 256
    layers: int = 2
    heads: int = 2
    length: int = 50
    dropout: float = 0.1
    branch_scale: float = 0.1
    initial_scale: float = 12.0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise FosterError(f"width {self.width} is no multiple of heads {self.heads}: attention splits it evenly.")


class Dropout(nn.Module):
    """Dropout with its own random generator: runs do not depend on a global seed."""

    def __init__(self, p: float, generator: torch.Generator):
        super().__init__()
        self.p, self.generator = p, generator

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = torch.empty_like(x).bernoulli_(1 - self.p, generator=self.generator)
        return x * keep.div_(1 - self.p)

    def __deepcopy__(self, memo: dict) -> Dropout:
        return Dropout(self.p, self.generator)  # a generator cannot be copied; sharing is harmless


class Adapter(nn.Module):
    """Item features from text embeddings e: f(e) = normalise(W e + b + V gelu(U e + c)).

    The hidden layer lets items move apart on their own: W alone is one linear map for all of
    them, and full-data training with it stays clearly behind.

    Parameters
    ----------
    embedding_width, width, hidden : int
        Of e; d; of the hidden layer (0: none, f(e) = normalise(W e + b)).
    """

    def __init__(self, embedding_width: int, width: int, hidden: int, generator: torch.Generator):
        super().__init__()
        self.linear = nn.Linear(embedding_width, width)
        nn.init.normal_(self.linear.weight, 0.0, 1 / math.sqrt(embedding_width), generator=generator)
        nn.init.zeros_(self.linear.bias)
        if hidden:
            self.up, self.down = nn.Linear(embedding_width, hidden), nn.Linear(hidden, width)
            nn.init.normal_(self.up.weight, generator=generator)
            for zero in (self.up.bias, self.down.weight, self.down.bias):  # no part in the warm start
                nn.init.zeros_(zero)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(N, width of the encoder) to features of unit length (N, d)."""
        return adapt(embeddings, dict(self.named_parameters()))


def adapt(embeddings: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """f(e) of text embeddings (N, width of the encoder) under an `Adapter`'s weights: (N, d), unit length.

    Weights of M adapters, stacked, give their features side by side, (N, M d), see `ensemble`.
    """
    if weights["linear.weight"].dim() == 3:
        count = len(weights["linear.weight"])
        each = [{name: tensor[number] for name, tensor in weights.items()} for number in range(count)]
        return torch.cat([adapt(embeddings, one) for one in each], -1) / math.sqrt(count)
    f = F.linear(embeddings, weights["linear.weight"], weights["linear.bias"])
    if "up.weight" in weights:
        hidden = F.gelu(F.linear(embeddings, weights["up.weight"], weights["up.bias"]))
        f = f + F.linear(hidden, weights["down.weight"], weights["down.bias"])
    return F.normalize(f, dim=-1)


class Block(nn.Module):
    """Pre-norm transformer block with causal attention by PyTorch's fused kernel."""

    def __init__(self, settings: ModelSettings, generator: torch.Generator):
        super().__init__()
        d, self.heads = settings.width, settings.heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.project = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.expand, self.contract = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.dropout = Dropout(settings.dropout, generator)
        for linear in (self.qkv, self.project, self.expand, self.contract):
            scale = settings.branch_scale if linear in (self.project, self.contract) else 1.0
            nn.init.normal_(linear.weight, 0.0, scale / math.sqrt(linear.in_features), generator=generator)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        B, L, d = x.shape
        q, k, v = self.qkv(self.norm_attention(x)).view(B, L, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.project(mixed.transpose(1, 2).reshape(B, L, d)))
        return x + self.dropout(self.contract(F.gelu(self.expand(self.norm_mlp(x)))))


class SASRec(nn.Module):
    """Self-attentive sequential recommendation (Kang and McAuley, 2018) on text embeddings.

    Item features f(e) = adapter(text embedding) are tied: they are the input of the
    transformer and the output weights, score = s · cos(h, f(e)) with a learned scale s.
    Sequences are left-aligned: position 0 is the oldest item of the window and padding stands at
    the end, where the causal mask keeps it from being read.

    Parameters
    ----------
    catalogue : module
        Maps item indices to text embeddings (`FrozenCatalogue` or `TunedCatalogue`).
    generator : torch.Generator
        Draws the initial weights and the dropout masks.
    """

    def __init__(self, catalogue: nn.Module, settings: ModelSettings, generator: torch.Generator):
        super().__init__()
        self.settings, self.catalogue = settings, catalogue
        self.adapter = Adapter(catalogue.width, settings.width, settings.adapter_hidden, generator)
        self.positions = nn.Parameter(torch.empty(settings.length, settings.width))
        nn.init.normal_(self.positions, 0.0, 0.02, generator=generator)
        self.blocks = nn.ModuleList(Block(settings, generator) for _ in range(settings.layers))
        self.log_scale = nn.Parameter(torch.tensor(math.log(settings.initial_scale)))
        self.dropout = Dropout(settings.dropout, generator)

    def adapter_weights(self) -> dict[str, Tensor]:
        """A copy of the adapter's weights on the CPU, as `adapt` and `SyntheticSequences` take them."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.adapter.state_dict().items()}

    def features(self, items: Tensor | None = None) -> Tensor:
        """Unit-length features of `items` (N,), or of the whole catalogue: (N, d)."""
        return self.adapter(self.catalogue(items))

    def forward(self, inputs: Tensor, features: Tensor) -> Tensor:
        """Hidden states (B, L, d), unit length, each of which predicts the item that follows.

        Parameters
        ----------
        inputs : (B, L) int64 or (B, L, N) float
            Rows of `features`, or mixtures of them: real and synthetic data take the same path.
        features : (N, d)
        """
        return self.transform(inputs @ features if inputs.is_floating_point() else features[inputs])

    def transform(self, items: Tensor) -> Tensor:
        """Hidden states of sequences whose item features (B, any length, d) are given, of the same shape.

        More than L items are read in consecutive windows of L, each on its own, as training cuts real sequences.
        """
        (B, positions, d), window = items.shape, self.settings.length
        if positions > window:
            cut = F.pad(items, (0, 0, 0, -positions % window)).reshape(-1, window, d)
            return self.transform(cut).reshape(B, -1, d)[:, :positions]
        x = items * math.sqrt(self.settings.width) + self.positions[: items.shape[1]]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return F.normalize(x, dim=-1)

    def scores(self, hidden: Tensor, features: Tensor) -> Tensor:
        """Logits s · cos(h, f): (..., d) and (N, d) to (..., N)."""
        return (self.log_scale.exp() * hidden) @ features.T  # scaling (T, d) is cheaper than scaling (T, N)

    @torch.no_grad()
    def warm_start(self, embeddings: Tensor, power: float = -0.5) -> SASRec:
        """Let the untrained model rank by text similarity to the last item.

        The adapter's W becomes the leading principal directions of the catalogue's text embeddings,
        X − μ = U Σ Vᵀ, scaled by Σ^power (partial whitening); with the residual branches near
        zero, the adapter's among them, the hidden state is the last item's feature. Singular values
        are floored, because directions without variance would only amplify noise.

        Parameters
        ----------
        embeddings : (|V|, width of the encoder)
        """
        linear, mean = self.adapter.linear, embeddings.mean(0)
        variance, directions = torch.linalg.eigh(((embeddings - mean).T @ (embeddings - mean)).double())
        sigma = variance.flip(0).clamp(min=0).sqrt()[: self.settings.width]
        directions = directions.flip(1)[:, : self.settings.width]
        # An eigenvector's sign is arbitrary: fix it, so that all machines start alike.
        signs = directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
        weight = (directions * signs * sigma.clamp(min=1e-3 * float(sigma[0])).pow(power)).T
        weight = weight.float().to(linear.weight)
        rank = weight.shape[0]  # fewer than `width` when the encoder is narrower than the recommender
        linear.weight.zero_()
        linear.weight[:rank] = weight / (embeddings - mean).to(weight).matmul(weight.T).norm(dim=-1).mean()
        linear.bias.zero_()
        linear.bias[:rank] = -(linear.weight[:rank] @ mean.to(weight))
        if self.settings.adapter_hidden:
            # Hidden units start as random features of the centred embeddings, entering with unit variance.
            up, radius = self.adapter.up, (embeddings - mean).square().sum(-1).mean().sqrt().to(weight)
            up.weight.div_(radius * up.weight.square().mean().sqrt())
            up.bias.copy_(-(up.weight @ mean.to(weight)))
        return self


def rate_groups(model: nn.Module, learning_rate: float, adapter_rate: float) -> list[dict]:
    """Parameter groups for an optimiser: the adapter learns at `adapter_rate` times the `learning_rate` of the rest.

    Item features start as mere text features and have the longest way to go; where training has few
    steps, a rate that is right for the transformer leaves them behind. `full_rate` of a group keeps
    the rate that a schedule multiplies.
    """
    trained = [(name.startswith("adapter."), p) for name, p in model.named_parameters() if p.requires_grad]
    rates = {True: adapter_rate * learning_rate, False: learning_rate}
    return [
        {"params": [p for inside, p in trained if inside == of_adapter], "lr": rate, "full_rate": rate}
        for of_adapter, rate in rates.items()
    ]


def build_model(catalogue: nn.Module, settings: ModelSettings, seed: int, device: str = "cpu") -> SASRec:
    """A warm-started recommender on `device`; equal seeds give equal weights."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # nn.Linear's own, overwritten weights draw from the global state
        model = SASRec(catalogue, settings, generator)
    with torch.no_grad():
        model.warm_start(catalogue().detach().cpu())
    if torch.device(device).type != "cpu":
        model.to(device)
        device_generator = torch.Generator(device=device).manual_seed(seed)
        for module in model.modules():
            if isinstance(module, Dropout):
                module.generator = device_generator
    return model
