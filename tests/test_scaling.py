"""What the measuring functions measure, against sums done by hand."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from foster_lib.foster import FosterSettings
from foster_lib.measuring import MIB, MemoryMeter, in_turns, matmul_rate, operation_counter
from foster_lib.sasrec import ModelSettings
from foster_lib.scaling import distillation_steps, ranking, ratio_of_ends, training_steps

TINY = ModelSettings(width=16, adapter_hidden=32, layers=1, length=10)
SMALL = {"model": TINY, "embedding_width": 32}


def test_memory_is_what_is_alive_at_once():
    """Views and what is changed in place take nothing, what is freed counts no more, arrays count."""
    meter = MemoryMeter()
    meter.start()
    x = torch.zeros(1000, 100)
    x.view(-1).add_(1)
    for _ in range(3):
        y = x + 1  # at most two of these at once
    del x, y
    array = np.zeros(10**6, np.uint8)
    del array
    assert meter.stop() == pytest.approx(3 * 400_000 + 10**6, rel=0.05)


def test_memory_of_a_backward_pass():
    weight = torch.zeros(50, 1000, requires_grad=True)
    meter = MemoryMeter()
    meter.start()
    F.cross_entropy(torch.ones(64, 50) @ weight, torch.zeros(64, dtype=torch.long)).backward()
    # (64, 1000) logits and log-probabilities, the gradients of both in turn, then that of the weight
    assert 3 * 64 * 1000 * 4 <= meter.stop() <= 4 * 64 * 1000 * 4 + 50 * 1000 * 4


def test_operations_include_attention_on_the_cpu():
    q, k, v = (torch.randn(2, 3, 8, 4, requires_grad=True) for _ in range(3))
    with operation_counter() as counter:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert counter.get_total_flops() == 2 * (2 * 3 * 8 * 8 * 4 * 2)  # q·k and the mixture of v
    with operation_counter() as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * (2 * 3 * 8 * 8 * 4 * 2)
    assert matmul_rate(torch.float32, side=256) > 1e8


def test_a_step_of_distillation_does_not_grow_with_the_catalogue():
    """Drawn by importance as uniformly: at most N items, fewer of a small catalogue, which is drawn from twice."""
    settings = FosterSettings(pool=1, subset=64, windows=4, importance=0.5)
    table = distillation_steps((5000, 50_000), settings=settings, sequences=4, steps=1, repeats=1, **SMALL)
    assert ratio_of_ends(table, "step_mib") < 1.1 and ratio_of_ends(table, "gigaflop") < 1.1
    assert ratio_of_ends(table, "table_mib") == pytest.approx(10) and table["setup_mib"].is_monotonic_increasing
    # embeddings and normalised embeddings of width 32, features of width 16, in float32
    np.testing.assert_allclose(table["table_mib"] * MIB, table["items"] * (2 * 32 + 16) * 4)
    np.testing.assert_allclose(table["times_floor"] * table["floor_seconds"], table["step_seconds"])


def test_training_grows_with_the_full_softmax_and_not_with_a_subset():
    table = training_steps((500, 20_000), subsets=(0, 64), batch_size=8, steps=1, **SMALL).set_index(["loss", "items"])
    logits = 8 * 9 * 20_000 * 4 / MIB
    assert table.loc[("full softmax", 20_000), "step_mib"] > 2 * logits  # and their gradient
    small, large = (table.loc[("subset of 64", size), "step_mib"] for size in (500, 20_000))
    assert large < 1.5 * small < logits
    assert len(training_steps((500,), full_softmax_limit=100, steps=1, **SMALL)) == 1


def test_users_stream_past(monkeypatch):
    monkeypatch.setattr("foster_lib.scaling.CHUNK", 100)
    table = ranking((100, 1000), items=200, **SMALL)
    assert ratio_of_ends(table, "peak_mib", "users") < 1.2
    assert ratio_of_ends(table, "held_mib", "users") == pytest.approx(10)
    assert ratio_of_ends(table, "epoch_mib", "users") == pytest.approx(10, rel=0.1)
    assert table["held_mib"].iloc[1] * MIB == 1000 * (10 + 1) * 8  # ten items and a rank
    assert (table["users_per_second"] > 0).all()


def test_calls_take_turns_and_an_error_ends_them_all():
    said: list[str] = []

    def count(name: str, to: int, pause) -> None:
        for number in range(to):
            said.append(f"{name}{number}")
            if name == "c":
                raise ValueError("c cannot")
            pause()

    in_turns([partial(count, "a", 2), partial(count, "b", 1)], lambda: said.append("|"))
    assert said == ["a0", "b0", "|", "a1", "|", "|"]
    with pytest.raises(ValueError, match="c cannot"):
        in_turns([partial(count, "a", 9), partial(count, "c", 9)], lambda: None)
    assert said.count("a1") == 1


def test_ratio_of_ends_does_not_depend_on_the_order():
    assert ratio_of_ends(pd.DataFrame({"items": [100, 10, 50], "x": [6.0, 2.0, 1.0]}), "x") == 3
