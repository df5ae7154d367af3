"""A tiny data set, a random encoder and a small task, shared by all tests. No test needs a network."""

from __future__ import annotations

import os

os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # ranx, an oracle, would compile for a minute

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from foster_lib.config import EncoderSettings, Settings, StudentSettings
from foster_lib.datasets import load_dataset
from foster_lib.encoder import FrozenCatalogue, TextEncoder
from foster_lib.runs import _split, load_catalogue, load_once
from foster_lib.sasrec import ModelSettings, build_model
from foster_lib.splits import leave_one_out
from foster_lib.task import Task
from foster_lib.training import RealSequences, TrainSettings, train

USERS, ITEMS = 60, 40
SMALL = ModelSettings(width=16, layers=1, heads=2, length=6, dropout=0.1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("FOSTER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _no_anomaly_mode():
    """RecBole, an oracle, turns it on when it is imported: gradients that are no numbers would then raise elsewhere."""
    yield
    torch.autograd.set_detect_anomaly(False)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def make_tables(seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """60 users who mostly walk along a ring of 40 items, 8 to 15 steps, in real time."""
    rng = np.random.default_rng(seed)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    items = pd.DataFrame(
        {
            "item_id": [f"i{j}" for j in range(ITEMS)],
            "title": [f"{''.join(rng.choice(letters, 4 + j % 7))}{j}" for j in range(ITEMS)],
            "categories": [("games", "books", "food", "tools")[j % 4] for j in range(ITEMS)],
        }
    )
    rows = []
    for user in range(USERS):
        item, time = int(rng.integers(ITEMS)), int(rng.integers(1000))
        for _ in range(int(rng.integers(8, 16))):
            rows.append((f"u{user}", f"i{item}", time))
            item = (item + 1) % ITEMS if rng.random() < 0.8 else int(rng.integers(ITEMS))
            time += int(rng.integers(1, 100))
    return items, pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])


def write_tables(root, items: pd.DataFrame, interactions: pd.DataFrame, name: str = "toy"):
    """Write both tables as `load_dataset(name, root)` expects them; returns the folder."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    items.to_parquet(folder / "items.parquet", index=False)
    interactions.to_parquet(folder / "interactions.parquet", index=False)
    return folder


@pytest.fixture
def tables():
    """Fresh (items, interactions) frames that a test may damage."""
    return make_tables()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder with the tiny data set, loaded as "toy" by name; results go there as well."""
    monkeypatch.setenv("FOSTER_DATA", str(tmp_path))
    monkeypatch.setenv("FOSTER_RESULTS", str(tmp_path / "results"))
    write_tables(tmp_path, *make_tables())
    forget_data()
    yield tmp_path
    forget_data()  # the test may have written others by the same name


def forget_data():
    """Nothing that this process has read of a data set is kept."""
    for kept in (load_once, load_catalogue, _split):
        kept.cache_clear()


@pytest.fixture
def settings(toy):
    """A profile for the tiny data set."""
    return Settings(
        dataset="toy",
        profile="cpu",
        split="leave-one-out",
        sequences=4,
        encoder=EncoderSettings("tiny"),
        model=SMALL,
        full=TrainSettings(learning_rate=1e-2, epochs=3, batch_size=16),
        student=StudentSettings(epochs=4, validate_every=2),
    )


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """The tiny data set, written as parquet and loaded: 60 users, 40 items."""
    root = tmp_path_factory.mktemp("data")
    write_tables(root, *make_tables())
    return load_dataset("toy", root)


@pytest.fixture(scope="session")
def encoder():
    """The `tiny` encoder; tests that change it load their own."""
    return TextEncoder.load("tiny")


@pytest.fixture(scope="session")
def catalogue(dataset, encoder) -> FrozenCatalogue:
    return encoder.catalogue(dataset.texts, use_cache=False, progress=False)


@pytest.fixture(scope="session")
def split(dataset):
    return leave_one_out(dataset)


@pytest.fixture(scope="session")
def task(dataset, split, catalogue, tmp_path_factory) -> Task:
    """A task with the trajectory of a short full-data training and its best model as teacher."""
    folder = tmp_path_factory.mktemp("trajectory")
    task = Task(dataset, split.train, split.train_timestamps, split.validation, catalogue, SMALL, folder)
    model = task.new_model(seed=0)
    data = RealSequences(task.train, task.length, batch_size=16)
    settings = TrainSettings(learning_rate=1e-2, epochs=30, patience=0)
    train(
        model,
        data,
        settings,
        seed=0,
        validate=task.validate,
        on_epoch=lambda epoch, m: save_file(m.state_dict(), folder / f"epoch-{epoch:03d}.safetensors"),
    )
    save_file(model.state_dict(), folder / "best.safetensors")
    return task


@pytest.fixture
def model(catalogue):
    return build_model(catalogue, SMALL, seed=0)


@pytest.fixture
def data(split):
    return RealSequences(split.train, SMALL.length, batch_size=16)


@pytest.fixture
def own_encoder(monkeypatch):
    """An encoder that the test may change; float32 on every machine."""
    monkeypatch.setattr("foster_lib.encoder.fast_precision", lambda device: "fp32")
    return TextEncoder.load("tiny")
