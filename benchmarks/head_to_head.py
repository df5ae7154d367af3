"""The encoder against the machine, and training and ranking against RecBole's SASRec, turn by turn."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from foster_lib.config import EncoderSettings
from foster_lib.encoder import TextEncoder, fast_precision, pad
from foster_lib.evaluation import rank_queries, recommender_scorer
from foster_lib.linear import id_model
from foster_lib.measuring import matmul_rate, operation_counter
from foster_lib.runs import load_catalogue, load_once
from foster_lib.sasrec import ModelSettings, build_model
from foster_lib.splits import Queries, leave_one_out
from foster_lib.training import RealSequences, TrainSettings, train

MODEL = ModelSettings(width=64, adapter_hidden=512, layers=2, heads=2, length=50, dropout=0.2)
BATCH = 64


def encoder(texts: int = 1682, repeats: int = 3, device: str = "cpu", name: str = "minilm") -> pd.DataFrame:
    """Embedding ML-100K's texts, tokenising included, between two large matrix products of the same type.

    Only operations on real tokens count: padding, softmax and normalisation are lost time.
    """
    loaded, chosen = TextEncoder.load(name), load_once("ml-100k").texts[:texts]
    dtype = torch.bfloat16 if fast_precision(device) == "bf16" else torch.float32
    operations, rows = _operations(loaded, chosen), []
    loaded.embed(chosen[:64], device=device, use_cache=False, progress=False)
    for _ in tqdm(range(repeats), desc="encoder", unit="round"):
        before = matmul_rate(dtype, device)
        start = time.perf_counter()
        loaded.embed(chosen, device=device, use_cache=False, progress=False)
        seconds = time.perf_counter() - start
        attainable = (before + matmul_rate(dtype, device)) / 2
        rows.append(
            {
                "texts_per_second": len(chosen) / seconds,
                "achieved_gflops": operations / seconds / 1e9,
                "attainable_gflops": attainable / 1e9,
                "achieved_of_attainable": operations / seconds / attainable,
                "dtype": str(dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
            }
        )
    return pd.DataFrame(rows)


def _operations(loaded: TextEncoder, texts: list[str]) -> int:
    """Of matrix products over all texts, each embedded alone, so without padding."""
    lengths, counts = np.unique([len(tokens) for tokens in loaded.tokenize(texts)], return_counts=True)
    total = 0
    for length, count in zip(lengths, counts):
        with operation_counter() as counter, torch.inference_mode():
            loaded(*pad([[0] * int(length)]))
        total += int(count) * counter.get_total_flops()
    return total


def training(users: int = 256, batches: int = 12, repeats: int = 3, device: str = "cpu") -> pd.DataFrame:
    """Interactions learnt from per second: ours by ids and by text, RecBole's at the same batch size and at its own.

    The same users, width, layers, heads, longest sequence, dropout and full softmax. Ours is `training.train`
    with all that belongs to it. RecBole learns one target a sequence, from each prefix of a history; what is timed of
    it is the model's own step with Adam, on batches that lie ready.
    """
    dataset = load_once("ml-100k")
    sequences = [np.asarray(s) for s in leave_one_out(dataset).train[:users]]
    settings = TrainSettings(epochs=1, batch_size=BATCH)
    text = load_catalogue("ml-100k", EncoderSettings(), device)
    models = {
        "ours, ids": id_model(dataset.n_items, MODEL, 0, device),
        "ours, text": build_model(text, MODEL, 0, device),
    }
    theirs = {size: recbole_sasrec(dataset.n_items, device) for size in (BATCH, 2048)}
    prefixes = _prefixes(sequences)
    data = RealSequences(sequences, MODEL.length, BATCH)
    windows = sum(len(b.inputs) for b in data.batches(np.random.default_rng(0)))
    rows = []

    def record(round_: int, who: str, seconds: float, targets: int, rows_read: int) -> None:
        rows.append(
            {
                "round": round_,
                "who": who,
                "interactions_per_second": targets / seconds,
                "sequences_per_second": rows_read / seconds,
            }
        )

    for round_ in tqdm(range(-1, repeats), desc="training", unit="round"):  # the first to warm up
        for who, model in models.items():
            log = train(model, data, settings, seed=round_ + 1, device=device)
            record(round_, who, log.seconds, sum(len(s) - 1 for s in sequences), windows)
        for size, (model, optimizer) in theirs.items():
            count = batches if size == BATCH else max(1, batches // 8)
            drawn = np.random.default_rng(round_ + 1).integers(len(prefixes), size=(count, size))
            ready = [_interaction([prefixes[i] for i in row], device) for row in drawn]
            start = time.perf_counter()
            model.train()
            for interaction in ready:
                optimizer.zero_grad()
                loss = model.calculate_loss(interaction)
                loss.item()
                loss.backward()
                optimizer.step()
            record(round_, f"RecBole, batches of {size}", time.perf_counter() - start, drawn.size, drawn.size)
    return pd.DataFrame([row for row in rows if row["round"] >= 0])


def ranking(repeats: int = 3, users: int = 943, device: str = "cpu") -> pd.DataFrame:
    """Users ranked per second over all items of ML-100K: ours with ranks, ties and masking; RecBole's scores with
    masking and its top 20, 512 users at a time and as many as its default allows."""
    dataset = load_once("ml-100k")
    whole = leave_one_out(dataset).test
    test = Queries(whole.users[:users], whole.histories[:users], whole.targets[:users])
    text = load_catalogue("ml-100k", EncoderSettings(), device)
    ours = {"ours, ids": id_model(dataset.n_items, MODEL, 0, device), "ours, text": build_model(text, MODEL, 0, device)}
    theirs, _ = recbole_sasrec(dataset.n_items, device)
    ready = {
        f"RecBole, {size} users at a time": [
            _full_sort(test.histories[start : start + size], device) for start in range(0, len(test), size)
        ]
        for size in (512, 4096 // (dataset.n_items + 1))
    }
    rows = []
    for round_ in tqdm(range(-1, repeats), desc="ranking", unit="round"):
        calls: dict[str, Callable[[], object]] = {
            who: lambda model=model: rank_queries(recommender_scorer(model), test, dataset.n_items)
            for who, model in ours.items()
        }
        calls |= {who: lambda parts=parts: _rank_recbole(theirs, parts) for who, parts in ready.items()}
        for who, call in calls.items():
            start = time.perf_counter()
            call()
            rows.append({"round": round_, "who": who, "users_per_second": len(test) / (time.perf_counter() - start)})
    return pd.DataFrame([row for row in rows if row["round"] >= 0])


def paired(table: pd.DataFrame, ours: str, theirs: str, column: str) -> float:
    """Median over rounds of ours / theirs, measured one after the other."""
    rates = table.pivot(index="round", columns="who", values=column)
    return float((rates[ours] / rates[theirs]).median())


# -------------------------------------------------------------------------------- RecBole


def recbole_sasrec(n_items: int, device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """RecBole 1.2.1's SASRec of our size with its Adam.

    The package is installed for MovieLens-100K's files and without what it depends on; of that the model needs
    nothing but names that print and draw.
    """
    for name in ("colorlog", "colorama", "texttable", "torch.utils.tensorboard"):
        sys.modules.setdefault(name, MagicMock())
    from recbole.model.sequential_recommender.sasrec import SASRec

    torch.autograd.set_detect_anomaly(False)  # which RecBole turns on as it is imported: slow, for both

    config = {
        "USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "LIST_SUFFIX": "_list", "NEG_PREFIX": "neg_",
        "ITEM_LIST_LENGTH_FIELD": "item_length", "MAX_ITEM_LIST_LENGTH": MODEL.length, "device": torch.device(device),
        "n_layers": MODEL.layers, "n_heads": MODEL.heads, "hidden_size": MODEL.width, "inner_size": 4 * MODEL.width,
        "hidden_dropout_prob": MODEL.dropout, "attn_dropout_prob": 0.0,  # as ours
        "hidden_act": "gelu", "layer_norm_eps": 1e-12, "initializer_range": 0.02, "loss_type": "CE",
    }  # fmt: skip
    data = MagicMock()
    data.num = lambda field: n_items + 1  # item 0 is padding
    with torch.random.fork_rng():
        model = SASRec(config, data).to(device)
    return model, torch.optim.Adam(model.parameters(), lr=1e-3)


def _prefixes(sequences: list[np.ndarray]) -> list[tuple[np.ndarray, int]]:
    """RecBole's training rows: for every interaction after the first, the last 50 items before it."""
    return [(s[max(0, end - MODEL.length) : end] + 1, int(s[end]) + 1) for s in sequences for end in range(1, len(s))]


def _interaction(rows: list[tuple[np.ndarray, int]], device: str) -> dict[str, Tensor]:
    items = torch.zeros(len(rows), MODEL.length, dtype=torch.long)
    for row, (history, _) in enumerate(rows):
        items[row, : len(history)] = torch.from_numpy(history)
    lengths, targets = torch.tensor([len(h) for h, _ in rows]), torch.tensor([target for _, target in rows])
    columns = {"item_list": items, "item_length": lengths, "item": targets}
    return {name: tensor.to(device) for name, tensor in columns.items()}


def _full_sort(histories: list[np.ndarray], device: str) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    rows = np.repeat(np.arange(len(histories)), [len(h) for h in histories])
    seen = torch.from_numpy(rows).to(device), torch.from_numpy(np.concatenate(histories) + 1).to(device)
    return _interaction([(h[-MODEL.length :] + 1, 0) for h in histories], device), seen


@torch.no_grad()
def _rank_recbole(model: nn.Module, parts: list) -> list[Tensor]:
    """As RecBole's trainer: scores of all items, padding and history masked, the 20 best."""
    model.eval()
    best = []
    for interaction, seen in parts:
        scores = model.full_sort_predict(interaction)
        scores[:, 0] = -torch.inf
        scores[seen] = -torch.inf
        best.append(scores.topk(20).indices)
    return best
