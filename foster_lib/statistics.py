"""Table 1: what the data sets are like. `python -m foster_lib.statistics` writes it from the data, in seconds."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from foster_lib.datasets import EMBEDDED, Dataset, load_dataset
from foster_lib.encoder import TextEncoder
from foster_lib.errors import FosterError, complain
from foster_lib.paths import results_dir, shown, write_atomically, write_text
from foster_lib.splits import knows_time, make_split
from foster_lib.tables import latex_table

BENCHMARKS = (EMBEDDED, "games", "foods", "yelp")

TITLES = {
    "dataset": "Data set",
    "users": "Users",
    "items": "Items",
    "interactions": "Interactions",
    "density_percent": "Density %",
    "mean_length": "Length mean",
    "median_length": "median",
    "max_length": "max",
    "mean_tokens": "Tokens mean",
    "median_tokens": "median ",
    "max_tokens": "max ",
    "cut_texts_percent": "Texts cut %",
    "repeats": "Repeats",
    "cold_items": "Cold items",
    "cold_test_percent": "Cold test %",
    "equal_times_percent": "Equal times %",
}
"""Columns of the frame, and as people read them (blanks tell equal ones apart)."""

NOTES = (
    "After the iterative 5-core. *Length*: interactions per user. *Tokens*: word pieces of an item's text for the "
    "encoder, two special ones included; *texts cut*: longer than the {limit} that it reads. *Repeats*: interactions "
    "of a user with an item met before. *Cold items*: targets of validation or test that training ({split}) never "
    "shows; *cold test*: test users with such a target. *Equal times*: neighbours in a sequence that share a "
    "timestamp, so that the order of the file decides; – where only the order is known."
)


def statistics_row(dataset: Dataset, encoder: TextEncoder, split: str = "leave-one-out") -> dict[str, object]:
    """One row of Table 1, by the keys of `TITLES`.

    Parameters
    ----------
    encoder : TextEncoder
        Its tokenizer counts the tokens; texts are not cut for this.
    split : str
        Decides which items are cold, see `make_split`.
    """
    known = {key: value for key, value in dataset.statistics().items() if key in TITLES}
    tokens = encoder.tokenizer(dataset.texts, truncation=False, verbose=False)["input_ids"]
    counts = np.array([len(ids) for ids in tokens])
    parts = make_split(dataset, split)
    trained = np.zeros(dataset.n_items, bool)
    for sequence in parts.train:
        trained[sequence] = True
    targets = np.concatenate([parts.validation.targets, parts.test.targets])
    return {
        "dataset": dataset.name,
        **known,
        "mean_tokens": round(float(counts.mean()), 2),
        "median_tokens": float(np.median(counts)),
        "max_tokens": int(counts.max()),
        "cut_texts_percent": round(100 * float((counts > encoder.max_tokens).mean()), 2),
        "cold_items": int((~trained[np.unique(targets)]).sum()),
        "cold_test_percent": round(100 * float((~trained[parts.test.targets]).mean()), 2),
        "equal_times_percent": equal_times_percent(dataset),
    }


def equal_times_percent(dataset: Dataset) -> float:
    """Share of neighbours in the sequences that have the same timestamp; NaN where times only count interactions."""
    if not knows_time(dataset):
        return float("nan")
    equal = sum(int((np.diff(time) == 0).sum()) for time in dataset.timestamps)
    neighbours = sum(len(time) - 1 for time in dataset.timestamps)
    return round(100 * equal / neighbours, 2)


def statistics_table(datasets: Iterable[Dataset], encoder: TextEncoder, split: str = "leave-one-out") -> pd.DataFrame:
    """Table 1 as numbers: a row per data set, columns by the keys of `TITLES`."""
    return pd.DataFrame([statistics_row(dataset, encoder, split) for dataset in datasets], columns=list(TITLES))


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table as people read it: all cells are text."""
    return pd.DataFrame({title: [_cell(value, key) for value in table[key]] for key, title in TITLES.items()})


def write_table1(table: pd.DataFrame, folder: Path, *, limit: int, split: str = "leave-one-out") -> Path:
    """Write table1.csv (numbers), .md and .tex (formatted) of one frame; returns the Markdown's path.

    `limit` and `split` are named in the notes: the tokens that the encoder reads, and the split.
    """
    text = readable(table)
    write_atomically(folder / "table1.csv", lambda path: table.to_csv(path, index=False))
    write_text(folder / "table1.tex", latex_table(text.rename(columns=str.strip)))
    markdown = text.to_markdown(index=False, disable_numparse=True, colalign=("left", *["right"] * (len(TITLES) - 1)))
    note = NOTES.format(limit=limit, split=split)
    return write_text(folder / "table1.md", f"# Table 1: data sets\n\n{markdown}\n\n{note}\n")


def available() -> list[str]:
    """The benchmarks at hand: the embedded one, and those below ``FOSTER_DATA``."""
    root = os.environ.get("FOSTER_DATA")
    return [name for name in BENCHMARKS if name == EMBEDDED or (root and (Path(root).expanduser() / name).is_dir())]


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m foster_lib.statistics", description="Write Table 1.")
    parser.add_argument("--datasets", default="", help="names separated by spaces; default: "
                        f"{EMBEDDED}, and {', '.join(BENCHMARKS[1:])} where FOSTER_DATA holds them")  # fmt: skip
    parser.add_argument("--split", default="leave-one-out", help="leave-one-out or temporal")
    parser.add_argument("--encoder", default="minilm", help="whose tokenizer counts, see TextEncoder.load")
    options = parser.parse_args(arguments)
    try:
        names = options.datasets.split() or available()
        if missing := [name for name in BENCHMARKS if not options.datasets and name not in names]:
            print(f"without {', '.join(missing)}: not below FOSTER_DATA, see `python -m foster_lib.prepare --help`")
        encoder = TextEncoder.load(options.encoder)
        table = statistics_table((load_dataset(name) for name in names), encoder, options.split)
        folder = results_dir() / ("table1" if options.split == "leave-one-out" else f"table1-{options.split}")
        path = write_table1(table, folder, limit=encoder.max_tokens, split=options.split)
    except FosterError as error:
        return complain(error)
    print(path.read_text(encoding="utf-8"))
    print(f"written: {shown(path)}, .csv, .tex")
    return 0


def _cell(value: object, key: str) -> str:
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return "–"
    if float(value).is_integer() and not key.endswith("percent") and not key.startswith("mean"):
        return f"{int(value):,}"
    return f"{value:.{3 if key == 'density_percent' else 1 if key.startswith('median') else 2}f}"


if __name__ == "__main__":
    sys.exit(main())
