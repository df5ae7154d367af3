"""`SyntheticSequences`: the handful of sequences that a fresh recommender trains on.

Every method that condenses the data returns this one type. A coreset holds real items and real
next items; with a teacher's labels the next items become probabilities; FOSTER makes the inputs
mixtures of items as well. Nothing grows with the catalogue: probabilities are kept as queries
z, and item j's probability is a softmax over z · f(e_j), with item features f(e) of its text
embedding e under the weights of an adapter.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor

from foster_lib.errors import FosterError
from foster_lib.paths import write_atomically
from foster_lib.sasrec import adapt
from foster_lib.subsets import Likeness, Subset, SyntheticBatch, likeness_scores, subset_inputs

POSITIONAL = ("items", "mask", "targets", "labels", "queries", "bonus", "further_labels")
"""Tensors of `SyntheticSequences` with an entry per position."""

MOST_PROBABLE = 3
"""Items of each label that every item subset holds."""

LIKENESS_ROWS = 512
"""Items of a subset that one step compares with all of it."""

COMPACT = {torch.float32: torch.float16, torch.int64: torch.int32}
"""Types on disk."""

SCALE = ".scale"
"""Ending of the names of what 8-bit tensors on disk are multiples of."""


@dataclass(frozen=True)
class SyntheticSequences:
    """n sequences of at most L positions.

    Attributes
    ----------
    items : (n, L) int64
        Anchors: the real item that each position starts from (padding: 0).
    mask : (n, L) bool
        Positions that have a target; left-aligned.
    targets : (n, L) int64
        The real next item, the hard target where there are no labels.
    adapter : weights of a `sasrec.Adapter` of width k, optional
        Of the item features f(e).
    labels : (n, L, k), optional
        z_y: the target at a position is y_j = softmax_j(z_y · f(e_j)).
    queries, bonus : (n, L, k) and (n, L), optional
        z_x and β: the input is the mixture p_j = softmax_j(z_x · f(e_j) + β·[j is the anchor]).
    alike : (), optional
        s: items i and j ≠ i are alike with probability softmax_j(s f(e_i) · f(e_j)). Absent where f has learnt
        nothing of how items are used.
    successors : (k + 1, k), optional
        A: what follows item i where nothing stands before it has the query z = [f(e_i), 1] A.
    further_labels : (n, L, R - 1, k), optional
        z_y of the further `reading`s.
    orders : (n, P, R - 1) int64, where there are further labels
        Which position stands at each of the P places of a further reading, -1: none.
    bits : int
        Of a number on disk: 16, or 8 for those of matrices, each row of which then has a scale of its own.
    """

    POSITION_BY_POSITION: ClassVar[bool] = True
    """Whether a window of the sequences is a sequence of the same kind."""

    items: Tensor
    mask: Tensor
    targets: Tensor
    adapter: dict[str, Tensor] | None = None
    labels: Tensor | None = None
    queries: Tensor | None = None
    bonus: Tensor | None = None
    alike: Tensor | None = None
    successors: Tensor | None = None
    further_labels: Tensor | None = None
    orders: Tensor | None = None
    bits: int = 16

    @classmethod
    def from_windows(cls, pieces: list[np.ndarray], length: int) -> SyntheticSequences:
        """Real windows (of 2 … `length` + 1 items) with their real next items."""
        items = torch.zeros(len(pieces), length, dtype=torch.long)
        targets, mask = items.clone(), torch.zeros(len(pieces), length, dtype=torch.bool)
        for row, piece in enumerate(pieces):
            items[row, : len(piece) - 1] = torch.from_numpy(piece[:-1])
            targets[row, : len(piece) - 1] = torch.from_numpy(piece[1:])
            mask[row, : len(piece) - 1] = True
        return cls(items, mask, targets)

    def __len__(self) -> int:
        return len(self.items)

    def joined(self, count: int) -> SyntheticSequences:
        """Every `count` sequences one after another, as one: n / count sequences of count · L positions."""
        tensors = self.positional()
        return replace(self, **{k: t.reshape(-1, count * t.shape[1], *t.shape[2:]) for k, t in tensors.items()})

    def positional(self) -> dict[str, Tensor]:
        """The tensors that have an entry per position, by name."""
        return {name: getattr(self, name) for name in POSITIONAL if getattr(self, name) is not None}

    # -------------------------------------------------------------------------- readings

    @property
    def readings(self) -> int:
        """R, orders that the positions are read in, each with labels of its own."""
        return 1 if self.further_labels is None else 1 + self.further_labels.shape[2]

    def reading(self, number: int) -> SyntheticSequences:
        """The sequences in another order, see `ORDERS`: a position then has another history, so another label.

        Reading 0 are the sequences themselves.
        """
        if number == 0:
            return replace(self, further_labels=None, orders=None)
        order = self.orders[:, :, number - 1]
        row, place = torch.arange(len(order), device=order.device)[:, None], order.clamp(min=0)
        names = [name for name in POSITIONAL[:-1] if getattr(self, name) is not None]
        now = {name: getattr(self, name)[row, place] for name in names}
        now["labels"] = self.further_labels[row, place, number - 1]
        return replace(self, **now | {"mask": now["mask"] & (order >= 0)}, further_labels=None, orders=None)

    # --------------------------------------------------------------------- probabilities

    def features(self, embeddings: Tensor) -> Tensor:
        """f(e) of text embeddings (N, width of the encoder): (N, k)."""
        if self.adapter is None:
            raise FosterError("these sequences hold real items only, no item features.")
        return adapt(embeddings, self.adapter)

    def input_probabilities(self, embeddings: Tensor) -> Tensor:
        """p over the whole catalogue (|V|, width of the encoder): (n, L, |V|)."""
        if self.queries is None:
            return F.one_hot(self.items, len(embeddings)).float()
        logits = self.queries @ self.features(embeddings).T
        logits = logits.scatter_add(-1, self.items[..., None], self.bonus[..., None])
        return logits.softmax(-1)

    def target_probabilities(self, embeddings: Tensor) -> Tensor:
        """y over the whole catalogue: (n, L, |V|)."""
        if self.labels is None:
            return F.one_hot(self.targets, len(embeddings)).float()
        return (self.labels @ self.features(embeddings).T).softmax(-1)

    # ------------------------------------------------------------------ what a step reads

    def probable(self, f: Tensor | None) -> Tensor:
        """The hard target, or the most probable items, of each position that has a target: (targets, 1 or more)."""
        if self.labels is None:
            return self.targets[self.mask][:, None]
        with torch.no_grad():
            parts = self.labels[self.mask].split(100)  # the scores of all items at once would fill the memory
            count = min(MOST_PROBABLE, len(f))
            return torch.cat([(z @ f.T).topk(count, dim=-1).indices for z in parts])

    def wanted(self, f: Tensor | None) -> Tensor:
        """Items that every subset holds: the `probable` ones.

        Where the catalogue is large, few items of a uniform subset are probable anywhere in S: the
        softmax over it would be about the order of items that are all out of the question.
        """
        return torch.unique(self.probable(f))

    def batch(self, subset: Subset, f: Tensor | None) -> SyntheticBatch:
        """The sequences seen through an item subset; differentiable with respect to their tensors.

        Parameters
        ----------
        subset : Subset
            Holds the `wanted` items.
        f : (|V|, k)
            Item features f(e) of the catalogue; None where there are neither labels nor queries.
        """
        p, own, y = None, torch.ones(self.items.shape, device=self.items.device), None
        if self.queries is not None:
            p, own = subset_inputs(self.queries, self.bonus, self.items, subset, f[subset.items], f[self.items])
        if self.labels is None:
            y = subset.positions(self.targets[self.mask])[0]
        else:
            y = (self.labels[self.mask] @ f[subset.items].T + subset.log_weight).softmax(-1)
        return SyntheticBatch(subset, self.items, self.mask, p, own, y)

    @torch.no_grad()
    def likeness(self, subset: Subset, f: Tensor, generator: np.random.Generator, weight: float) -> Likeness:
        """How alike items are, whatever the sequence, for `LIKENESS_ROWS` items of the subset, drawn at random; and
        what follows them, if S knows.

        A thousand labels say where an item stands as seen from a thousand contexts; this says where it stands
        among its neighbours.
        """
        rows = np.sort(generator.choice(len(subset.items), min(LIKENESS_ROWS, len(subset.items)), replace=False))
        rows = torch.from_numpy(rows).to(f.device)
        f = f[subset.items]
        y = likeness_scores(f, rows, self.alike, subset).softmax(-1)
        successors = None
        if self.successors is not None:
            z = F.pad(f[rows], (0, 1), value=1.0) @ self.successors
            successors = (z @ f.T + subset.log_weight).softmax(-1)
        return Likeness(rows, y, self.alike, weight, successors)

    # --------------------------------------------------------------------------- reading

    def decode(self, embeddings: Tensor, titles: list[str], top: int = 1) -> list[list[str]]:
        """The most probable items of every position, as titles joined by " | "."""
        best = self.input_probabilities(embeddings).topk(top, dim=-1).indices
        return [
            [" | ".join(titles[i] for i in position) for position, real in zip(row, mask) if real]
            for row, mask in zip(best.tolist(), self.mask.tolist())
        ]

    def decode_targets(self, embeddings: Tensor, titles: list[str], top: int = 1) -> list[list[str]]:
        """The most probable next items of every position, as titles joined by " | "."""
        best = self.target_probabilities(embeddings).topk(top, dim=-1).indices
        return [
            [" | ".join(titles[i] for i in position) for position, real in zip(row, mask) if real]
            for row, mask in zip(best.tolist(), self.mask.tolist())
        ]

    def size_in_bytes(self) -> int:
        """Bytes that the tensors take on disk (without the JSON)."""
        return sum(t.numel() * t.element_size() for t in self._stored().values())

    # --------------------------------------------------------------------------- on disk

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; the adapter's as `adapter.…`."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        del own["bits"]
        adapter = own.pop("adapter", {})
        return {**own, **{f"adapter.{name}": tensor for name, tensor in adapter.items()}}

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], bits: int) -> SyntheticSequences:
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("adapter.")}
        adapter = {name.removeprefix("adapter."): t for name, t in tensors.items() if name.startswith("adapter.")}
        return cls(**own, adapter=adapter or None, bits=bits)

    def _stored(self) -> dict[str, Tensor]:
        stored = {}
        for name, tensor in self.tensors().items():
            if self.bits == 8 and tensor.is_floating_point() and tensor.dim() > 1 and name != "bonus":
                stored[name], stored[name + SCALE] = rounded_to_bytes(tensor)
            else:
                stored[name] = tensor.to(COMPACT.get(tensor.dtype, tensor.dtype)).contiguous()
        return stored

    def stored(self) -> SyntheticSequences:
        """As they come back from the disk: probabilities' parameters rounded to so many `bits`."""
        return self._from_tensors(*_restored(self._stored()))

    def save(self, path: Path, description: dict | None = None) -> Path:
        """Write `path` (safetensors, rounded as `stored`) and beside it a JSON that describes it."""
        path = _tensor_path(path)
        data = save(self._stored())
        write_atomically(path, lambda temporary: temporary.write_bytes(data))
        text = {
            "format": "foster synthetic sequences 1",
            "sequences": len(self),
            "length": self.items.shape[1],
            "targets": int(self.mask.sum()),
            "bytes": self.size_in_bytes(),
            "tensors": {name: list(t.shape) for name, t in self._stored().items()},
            **(description or {}),
        }
        write_atomically(path.with_suffix(".json"), lambda temporary: temporary.write_text(json.dumps(text, indent=1)))
        return path

    @classmethod
    def load(cls, path: Path) -> SyntheticSequences:
        """Read what `save` wrote.

        Raises
        ------
        FosterError
            If the file is missing, damaged, or holds something else.
        """
        path = _tensor_path(path)
        try:
            tensors, bits = _restored(load(path.read_bytes()))
        except (OSError, safetensors.SafetensorError) as error:
            raise FosterError(f"{path}: no readable synthetic sequences ({error}). Distil them again.") from error
        known = {f.name for f in fields(cls)} - {"adapter"}
        own = {name for name in tensors if not name.startswith("adapter.")}
        if not {"items", "mask", "targets"} <= own <= known:
            raise FosterError(f"{path}: holds {sorted(tensors)}, not synthetic sequences. Distil them again.")
        return cls._from_tensors(tensors, bits)

    def detached(self) -> SyntheticSequences:
        """Without gradients, on the CPU."""
        return self._from_tensors({name: t.detach().cpu() for name, t in self.tensors().items()}, self.bits)

    def to(self, device: str | torch.device) -> SyntheticSequences:
        return self._from_tensors({name: tensor.to(device) for name, tensor in self.tensors().items()}, self.bits)


def shuffled(mask: Tensor, length: int, number: int, readings: int) -> Tensor:
    """The positions of each sequence that have a target in random order, those without one behind them: (n, L)."""
    chance = torch.from_numpy(np.random.default_rng(number).random(mask.shape))
    return (chance + ~mask).argsort(1)


def cut(mask: Tensor, length: int, number: int, readings: int) -> Tensor:
    """Each sequence cut elsewhere into windows of `length`, as real ones are in each epoch: the first ends
    `number` / R of a window after the start. (n, L + `length`), padding after the first and the last window.
    """
    first = number * length // readings
    order = torch.arange(mask.shape[1])
    parts = F.pad(order[:first], (0, length - first), value=-1), F.pad(order[first:], (0, first), value=-1)
    return torch.cat(parts).expand(len(mask), -1)


ORDERS = {"shuffled": shuffled, "cut": cut}
"""Orders of reading `number` (more than 0) of R `readings`, of sequences of which `mask` (n, L) says what is filled;
the model reads `length` positions at a time."""


def _tensor_path(path: Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")


def rounded_to_bytes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers of -127 … 127 and, of each row (…, 1), the scale that they are multiples of."""
    # Of eight digits, as bfloat16 has, times 127 is exact: rounding again changes nothing.
    scale = (tensor.abs().amax(-1, keepdim=True) / 127).bfloat16()
    multiples = tensor / scale.float().clamp(min=torch.finfo(torch.float).tiny)
    return multiples.round().to(torch.int8).contiguous(), scale


def _restored(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The tensors as `_stored` found them, rounded, and of how many bits they are."""
    wide = {torch.float16: torch.float32, torch.int32: torch.int64}
    scales = {name.removesuffix(SCALE): t.float() for name, t in tensors.items() if name.endswith(SCALE)}
    whole = {name: t.to(wide.get(t.dtype, t.dtype)) for name, t in tensors.items() if not name.endswith(SCALE)}
    return {name: t * scales[name] if name in scales else t for name, t in whole.items()}, 8 if scales else 16
