"""Synthetic data made of factors: what TD3 and Farzi share.

Both write the item probabilities of all positions as a product of small tensors, learn these by Adam with clipped
gradients, and store them alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from foster_lib.encoder import load_tensors
from foster_lib.errors import FosterError
from foster_lib.subsets import Subset, sample_subset
from foster_lib.synthetic import SyntheticSequences
from foster_lib.task import Task
from foster_lib.training import warmup_cosine


class FactorDescent:
    """Adam on the factors of synthetic data; the learning rate falls by a cosine, gradients are clipped.

    `settings` has `outer_steps`, `learning_rate` and `clip`.
    """

    def __init__(self, factors: list[Tensor], settings, weight_decay: float = 0.0):
        self.factors, self.settings, self.steps = factors, settings, 0
        self.optimizer = torch.optim.Adam(factors, lr=settings.learning_rate, weight_decay=weight_decay)

    def step(self, gradients: tuple[Tensor, ...]) -> None:
        if not all(torch.isfinite(gradient).all() for gradient in gradients):
            raise FosterError(f"distillation diverged at outer step {self.steps}: lower the learning rates.")
        for tensor, gradient in zip(self.factors, gradients):
            tensor.grad = gradient
        torch.nn.utils.clip_grad_norm_(self.factors, self.settings.clip)
        for group in self.optimizer.param_groups:
            done = (self.steps + 0.5) / self.settings.outer_steps
            group["lr"] = self.settings.learning_rate * warmup_cosine(done, warmup=0.0)
        self.optimizer.step()
        self.steps += 1


def draw_subset(task: Task, size: int, generator: np.random.Generator) -> Subset | None:
    """N items of the catalogue on the task's device; None, the whole catalogue, if `size` is 0 or no smaller."""
    return sample_subset(task.n_items, size, generator).to(task.device) if 0 < size < task.n_items else None


def real_mixtures(start: SyntheticSequences, features: Tensor, scale: float) -> Tensor:
    """Queries of n real sequences as mixtures, (n, R, k): s f(e) of the item at each of the R = L + 1 positions.

    softmax(query · f) then lies on the item and its likes. features : (|V|, k), f; scale : s
    """
    return scale * features[torch.cat([start.items, start.targets[:, -1:]], 1)]


def expected_mixtures(start: SyntheticSequences, features: Tensor, scale: float) -> Tensor:
    """As `real_mixtures`, each position but the first being what the teacher expects there after those before it."""
    return torch.cat([real_mixtures(start, features, scale)[:, :1], start.labels], 1)


def in_turn(p: Tensor, batch: int, step: int) -> Tensor:
    """The sequences that inner step `step` trains on: `batch` of them, taken in turn; 0: all."""
    return p[(torch.arange(batch, device=p.device) + step * batch) % len(p)] if 0 < batch < len(p) else p


def with_dropout(task: Task, dropout: float) -> Task:
    """The same task, its new models with another dropout."""
    return replace(task, model_settings=replace(task.model_settings, dropout=dropout))


@dataclass(frozen=True)
class FactoredSequences(SyntheticSequences):
    """`SyntheticSequences` whose probabilities are products of factors, which alone are stored.

    Every position has a target, the mixture of the next position; real items play no part (their
    bonus is 0). A subclass adds its factors as fields, names in `FACTORS` what is stored, in `OPTIONAL` what may be
    absent, and builds itself from these tensors in `from_factors`.
    """

    POSITION_BY_POSITION: ClassVar[bool] = False
    FACTORS: ClassVar[tuple[str, ...]] = ()
    OPTIONAL: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_factors(cls, **factors) -> FactoredSequences:
        raise NotImplementedError

    @staticmethod
    def tensors_of(queries: Tensor) -> dict[str, Tensor]:
        """The fields of `SyntheticSequences` from the queries of all R = L + 1 positions, (n, R, k)."""
        shape, device = (len(queries), queries.shape[1] - 1), queries.device
        nowhere = torch.zeros(shape, dtype=torch.long, device=device)
        return {
            "items": nowhere,
            "targets": nowhere,
            "mask": torch.ones(shape, dtype=torch.bool, device=device),
            "queries": queries[:, :-1],
            "bonus": torch.zeros(shape, dtype=queries.dtype, device=device),
            "labels": queries[:, 1:],
        }

    def _stored(self) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for name in self.FACTORS + self.OPTIONAL:
            value = getattr(self, name)
            if value is None:
                continue
            stored |= {f"{name}.{part}": t for part, t in value.items()} if isinstance(value, dict) else {name: value}
        return {name: tensor.half().contiguous() for name, tensor in stored.items()}

    @classmethod
    def _restored(cls, tensors: dict[str, Tensor]) -> FactoredSequences:
        factors: dict[str, Tensor | dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            group, _, member = name.partition(".")
            if member:
                factors.setdefault(group, {})[member] = tensor.float()
            else:
                factors[name] = tensor.float()
        return cls.from_factors(**factors)

    def stored(self) -> FactoredSequences:
        """As they come back from the disk: factors rounded to half precision."""
        return self._restored(self._stored())

    @classmethod
    def load(cls, path: Path) -> FactoredSequences:
        """Read what `save` wrote; raises `FosterError` if the file is no such thing."""
        path = Path(path)
        path = path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
        tensors = load_tensors(path)
        if tensors is None or {name.partition(".")[0] for name in tensors} - set(cls.OPTIONAL) != set(cls.FACTORS):
            raise FosterError(f"{path}: no readable {cls.__name__}. Distil them again.")
        return cls._restored(tensors)
