"""The table of ratios says what the measured tables say, and RecBole gets what it is meant to get."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.__main__ import PARTS, ratios, report
from benchmarks.head_to_head import _full_sort, _interaction, _prefixes, _rank_recbole, paired, recbole_sasrec

RECBOLE = "RecBole, 512 users at a time"


def rates(column: str, **by_round: list[float]) -> pd.DataFrame:
    names = {"ids": "ours, ids", "text": "ours, text", "theirs": RECBOLE}
    rows = [(number, names[who], value) for who, values in by_round.items() for number, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["round", "who", column])


def test_a_ratio_is_the_median_of_pairs():
    """A round in which the machine was slow for both says as much as any other."""
    table = rates("users_per_second", ids=[200, 20, 600], text=[50, 5, 100], theirs=[100, 10, 200])
    assert paired(table, "ours, ids", RECBOLE, "users_per_second") == 2
    found = ratios({"ranking": table}).set_index("what")["ratio"]
    assert found[f"ranking, users per second: ours, text / {RECBOLE}"] == 0.5 and len(found) == 2


def test_ratios_of_sizes_and_the_page():
    distillation = pd.DataFrame({"items": [1000, 10**6], "step_seconds": [0.5, 0.6], "step_mib": [40.0, 44.0]})
    distillation["times_floor"] = [3.0, 4.0]
    users = pd.DataFrame({"users": [1000, 10_000, 10**6], "peak_mib": [1.0, 9.0, 9.9]})
    encoder = pd.DataFrame({"achieved_of_attainable": [0.5, 0.7, 0.6]})
    tables = {"encoder": encoder, "distillation": distillation, "users": users}
    assert [round(ratio, 2) for ratio in ratios(tables)["ratio"]] == [0.6, 1.2, 1.1, 3.5, 1.1]
    place = {"load": [1.0, 2.0], "cores": 2, "threads": 1, "hardware": "X", "device": "cpu", "created": "now"}
    page = report(tables, {part: {**place, "packages": {"torch": "9.9"}} for part in PARTS})
    assert "Do not compare figures of\ndifferent machines" in page and "1,000,000 / 1,000 items" in page
    assert page.count("X (cpu), 1 threads, load 1.0 before, 2.0 after on 2 cores; PyTorch 9.9, now.") == 3


def test_recbole_learns_and_ranks_the_same_sequences():
    pytest.importorskip("recbole", reason="the package recbole is not installed")
    sequences = [np.array([0, 1, 2, 3]), np.arange(60)]
    prefixes = _prefixes(sequences)
    assert len(prefixes) == 3 + 59  # as many targets as ours
    assert prefixes[0][0].tolist() == [1] and prefixes[0][1] == 2  # item 0 is RecBole's padding
    assert len(prefixes[-1][0]) == 50 and prefixes[-1][0][-1] == 59 and prefixes[-1][1] == 60
    model, optimizer = recbole_sasrec(60, "cpu")
    batch = _interaction(prefixes[:8], "cpu")
    first = model.calculate_loss(batch)
    for _ in range(20):
        optimizer.zero_grad()
        loss = model.calculate_loss(batch)
        loss.backward()
        optimizer.step()
    assert first.item() == pytest.approx(np.log(61), abs=0.3) and loss.item() < 0.8 * first.item()
    histories = [np.arange(10), np.array([5])]
    [best] = _rank_recbole(model, [_full_sort(histories, "cpu")])
    assert best.shape == (2, 20) and not torch.isin(best[0], torch.arange(11)).any() and 6 not in best[1]
