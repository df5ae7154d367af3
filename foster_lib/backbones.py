"""Other recommenders in SASRec's place: GRU4Rec, BERT4Rec and an all-MLP model.

They have SASRec's interface, so trainer and evaluation take them as they are. Adapter, tied cosine scores and the
warm start are SASRec's too: every part that mixes positions is a branch beside the item's own feature, its initial
weights near zero, so each untrained model ranks by text similarity to the last item. What differs is the mixing alone.

Symbols: B sequences, L positions, N items, d the recommender's width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foster_lib.batches import Batch, soft_cross_entropy
from foster_lib.errors import check_known
from foster_lib.evaluation import Scorer, recommender_scorer
from foster_lib.sasrec import Block, Dropout, ModelSettings, SASRec, build_model
from foster_lib.training import TrainingData


class GRU4Rec(SASRec):
    """Recurrent recommendation (Hidasi et al., ICLR 2016): one layer of gated recurrent units over the item features.

    The recurrence knows the order, so there are no position embeddings. Cross-entropy over all items stands in
    the place of the paper's ranking losses, as for the other models.
    """

    def __init__(self, catalogue: nn.Module, settings: ModelSettings, generator: torch.Generator):
        super().__init__(catalogue, replace(settings, layers=0), generator)
        self.settings, self.positions, d = settings, None, settings.width
        self.norm, self.gru, self.project = nn.LayerNorm(d), nn.GRU(d, d, batch_first=True), nn.Linear(d, d)
        for weight in self.gru.parameters():
            nn.init.uniform_(weight, -1 / math.sqrt(d), 1 / math.sqrt(d), generator=generator)
        nn.init.normal_(self.project.weight, 0.0, settings.branch_scale / math.sqrt(d), generator=generator)
        nn.init.zeros_(self.project.bias)

    def transform(self, items: Tensor) -> Tensor:
        """Hidden states (B, L, d) of sequences whose item features (B, L, d) are given."""
        x = self.dropout(items * math.sqrt(self.settings.width))
        mixed, _ = self.gru(self.norm(x))
        return F.normalize(x + self.dropout(self.project(mixed)), dim=-1)


# ------------------------------------------------------------------------------- all-MLP


class FilterBlock(nn.Module):
    """A learnable filter over positions, then a perceptron over channels, both as residual branches."""

    def __init__(self, settings: ModelSettings, generator: torch.Generator):
        super().__init__()
        d = settings.width
        self.norm_filter, self.norm_mlp = nn.LayerNorm(d), nn.LayerNorm(d)
        self.kernel = nn.Parameter(torch.empty(settings.length, d))
        self.expand, self.contract = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.dropout = Dropout(settings.dropout, generator)
        scale = settings.branch_scale
        nn.init.normal_(self.kernel, 0.0, scale / math.sqrt(settings.length), generator=generator)
        for linear, size in ((self.expand, 1.0), (self.contract, scale)):
            nn.init.normal_(linear.weight, 0.0, size / math.sqrt(linear.in_features), generator=generator)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(causal_filter(self.norm_filter(x), self.kernel))
        return x + self.dropout(self.contract(F.gelu(self.expand(self.norm_mlp(x)))))


def causal_filter(x: Tensor, kernel: Tensor) -> Tensor:
    """y_t = Σ_{s ≤ t} k_{t−s} ⊙ x_s: (B, L, d) and (at least L, d) to (B, L, d)."""
    place = torch.arange(x.shape[1], device=x.device)
    lag = place[:, None] - place
    weights = kernel[lag.clamp(min=0)] * (lag >= 0)[..., None]
    return torch.einsum("tsd,bsd->btd", weights, x)


class FMLP(SASRec):
    """FMLP-Rec (Zhou et al., WWW 2022): learnable filters in the place of attention; nothing weighs items by content.

    The paper's filters act on the Fourier transform of the sequence, which is a circular convolution and
    reads the future; these are causal, so that every position can be trained on.
    """

    def __init__(self, catalogue: nn.Module, settings: ModelSettings, generator: torch.Generator):
        super().__init__(catalogue, replace(settings, layers=0), generator)
        self.settings = settings
        self.blocks = nn.ModuleList(FilterBlock(settings, generator) for _ in range(settings.layers))


# ------------------------------------------------------------------------------ BERT4Rec


class BidirectionalBlock(Block):
    """SASRec's block, each position attending to all that are `readable` (B, L)."""

    def forward(self, x: Tensor, readable: Tensor) -> Tensor:
        B, L, d = x.shape
        q, k, v = self.qkv(self.norm_attention(x)).view(B, L, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=readable[:, None, None, :])
        x = x + self.dropout(self.project(mixed.transpose(1, 2).reshape(B, L, d)))
        return x + self.dropout(self.contract(F.gelu(self.expand(self.norm_mlp(x)))))


class BERT4Rec(SASRec):
    """Bidirectional recommendation (Sun et al., CIKM 2019): the item at a [MASK] from both its sides.

    Behind the N items come two more indices (or columns of mixtures): N is [MASK], N + 1 is padding, which is not
    read. `ClozeSequences` makes training data of that form, `scorer` asks for the item at a [MASK]
    behind the history. In the paper [MASK] is a learned vector; here the feature of the last visible item before it
    is added, without which this model alone would have no warm start.
    """

    def __init__(self, catalogue: nn.Module, settings: ModelSettings, generator: torch.Generator):
        super().__init__(catalogue, replace(settings, layers=0, length=settings.length + 1), generator)
        self.settings = settings
        self.blocks = nn.ModuleList(BidirectionalBlock(settings, generator) for _ in range(settings.layers))
        self.mask_item = nn.Parameter(torch.zeros(settings.width))

    def forward(self, inputs: Tensor, features: Tensor) -> Tensor:
        """Hidden states (B, L, d), unit length; those at a [MASK] predict the item in its place.

        Parameters
        ----------
        inputs : (B, L) int64 below N + 2, or (B, L, N + 2) float
        features : (N, d)
        """
        n = len(features)
        if inputs.is_floating_point():
            return self.transform(inputs[..., :n] @ features, inputs[..., n] > 0.5, inputs[..., n + 1] > 0.5)
        return self.transform(features[inputs.clamp(max=n - 1)], inputs == n, inputs == n + 1)

    def transform(self, items: Tensor, masked: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        """The same of item features (B, L, d); `masked` and `padding` (B, L) bool say where they count for nothing."""
        if masked is None:
            masked = torch.zeros(items.shape[:2], dtype=torch.bool, device=items.device)
        readable = torch.ones_like(masked) if padding is None else ~padding
        place = torch.arange(items.shape[1], device=items.device)
        visible = (place * ~masked).cummax(1).values  # the place itself, or the last one before it without [MASK]
        items = items.gather(1, visible[..., None].expand_as(items)) + masked[..., None] * self.mask_item
        x = self.dropout(items * math.sqrt(self.settings.width) + self.positions[: items.shape[1]])
        for block in self.blocks:
            x = block(x, readable)
        return F.normalize(x, dim=-1)

    def scorer(self) -> Scorer:
        """Score all items for the place behind each history, reading its last L items."""
        self.eval()
        with torch.inference_mode():
            features = self.features()

        @torch.inference_mode()
        def score(histories: list[np.ndarray]) -> Tensor:
            recent, n = [history[-self.settings.length :] for history in histories], len(features)
            inputs = torch.full((len(recent), max(map(len, recent)) + 1), n + 1)
            for row, history in enumerate(recent):
                inputs[row, : len(history)] = torch.from_numpy(history)
                inputs[row, len(history)] = n
            inputs = inputs.to(features.device)
            return self.scores(self(inputs, features)[inputs == n], features)

        return score


@dataclass(frozen=True)
class ClozeSequences:
    """Training data for `BERT4Rec` from any other: which places are a [MASK] is drawn anew for each batch.

    A sequence is cut at a random place (with probability `cut`, else at its end) and a [MASK] put there: the
    question that is asked in use. Of the places before it, each but the first is a [MASK] with probability `share`,
    the Cloze task of the paper. The target at place t is the one that the data have for position t − 1. In real
    sequences that is the hidden item. In synthetic ones it is y, which says what follows the places *before* t,
    because a causal teacher made it. BERT4Rec also sees what comes after t, and is given the same label: nothing
    after t helps to predict it, so the model learns to do without, as it has to in use.
    """

    data: TrainingData
    n_items: int
    share: float = 0.2
    cut: float = 0.5

    def batches(self, generator: np.random.Generator) -> Iterable[Batch]:
        for batch in self.data.batches(generator):
            lengths = batch.mask.sum(1).cpu().numpy()
            ends = np.where(generator.random(len(lengths)) < self.cut, generator.integers(1, lengths + 1), lengths)
            drawn = generator.random((len(lengths), batch.mask.shape[1] + 1)) < self.share
            yield cloze(batch, torch.from_numpy(ends), torch.from_numpy(drawn), self.n_items)

    def loss(self, model: SASRec, batch: Batch) -> Tensor:
        return whole_loss(model, batch)


def cloze(batch: Batch, ends: Tensor, drawn: Tensor, n_items: int) -> Batch:
    """A batch of L + 1 places, the last item of which stands before `ends` (B,), where a [MASK] is.

    `drawn` (B, L + 1) bool: the further places to hide; the first, and those behind the end, stay as they are.
    """
    device = batch.inputs.device
    ends, place = ends.to(device)[:, None], torch.arange(drawn.shape[1], device=device)
    masked = (place == ends) | (drawn.to(device) & (place > 0) & (place < ends))
    row = torch.zeros_like(batch.mask, dtype=torch.long)
    row[batch.mask] = torch.arange(len(batch.targets), device=device)
    targets = batch.targets[row[masked[:, 1:]]]
    if batch.inputs.is_floating_point():
        inputs = F.pad(batch.inputs, (0, 2, 0, 1))  # two more columns, one more place
        inputs[masked | (place > ends)] = 0
        inputs[..., n_items], inputs[..., n_items + 1] = masked.to(inputs), (place > ends).to(inputs)
    else:
        inputs = F.pad(batch.inputs, (0, 1)).masked_fill(masked, n_items).masked_fill(place > ends, n_items + 1)
    return Batch(inputs, targets, masked)


# ------------------------------------------------------------------------------ all alike

BACKBONES: dict[str, type[SASRec]] = {"sasrec": SASRec, "gru4rec": GRU4Rec, "bert4rec": BERT4Rec, "fmlp": FMLP}


def build_backbone(name: str, catalogue: nn.Module, settings: ModelSettings, seed: int, device: str = "cpu") -> SASRec:
    """`sasrec.build_model` of any of `BACKBONES`: warm-started, equal seeds give equal weights."""
    check_known(name, BACKBONES, "backbone")
    if name == "sasrec":
        return build_model(catalogue, settings, seed, device)
    with torch.random.fork_rng(devices=[]):  # PyTorch's layers draw weights that are overwritten
        model = BACKBONES[name](catalogue, settings, torch.Generator().manual_seed(seed))
    model.warm_start(catalogue().detach().cpu()).to(device)
    if torch.device(device).type != "cpu":
        generator = torch.Generator(device=device).manual_seed(seed)
        for module in model.modules():
            if isinstance(module, Dropout):
                module.generator = generator
    return model


def scorer(model: SASRec) -> Scorer:
    """`recommender_scorer` of any of them."""
    return model.scorer() if isinstance(model, BERT4Rec) else recommender_scorer(model)


@dataclass(frozen=True)
class WholeBatch:
    """Training data of one batch: an epoch is a step.

    batch : its inputs are (B, L) items or (B, L, N) mixtures of items, its targets (T,) items or (T, N) probabilities
    """

    batch: Batch

    def batches(self, generator: np.random.Generator) -> Iterable[Batch]:
        yield self.batch

    def loss(self, model: SASRec, batch: Batch) -> Tensor:
        return whole_loss(model, batch)


def whole_loss(model: SASRec, batch: Batch) -> Tensor:
    """Mean cross-entropy of the targets over the whole catalogue."""
    features = model.features()
    return soft_cross_entropy(model.scores(model(batch.inputs, features)[batch.mask], features), batch.targets)


def training_form(backbone: str, data: TrainingData, n_items: int) -> TrainingData:
    """`data` as a backbone is trained on them: for BERT4Rec with [MASK]s."""
    return ClozeSequences(data, n_items) if backbone == "bert4rec" else data
