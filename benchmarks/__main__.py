"""`python -m benchmarks`: measure, and write results/benchmarks/ (a table of ratios, and each part as CSV)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable

import pandas as pd
import torch

from benchmarks import head_to_head
from foster_lib.errors import FosterError, check_known
from foster_lib.execution import resolve_device
from foster_lib.foster import FosterSettings
from foster_lib.paths import results_dir, shown, write_atomically, write_text
from foster_lib.records import environment
from foster_lib.sasrec import ModelSettings
from foster_lib.scaling import distillation_steps, ranking, ratio_of_ends, training_steps

PARTS = ("encoder", "training", "ranking", "distillation", "training_memory", "users")

INTRODUCTION = """# Benchmarks

Each ratio compares two things that were measured in turns, within one run on one machine. **Do not compare figures of
different machines, nor times of different runs**: what a core or its neighbours were doing is in all of them. Ratios,
and bytes and operations, which are counted, are what carries over. `make benchmark` measures anew.
"""

TITLES = {
    "encoder": "Encoder: operations on real tokens against a large matrix product",
    "training": "Training on ML-100K, SASRec of equal size with full softmax: medians over rounds",
    "ranking": "Full ranking of ML-100K's test users: medians over rounds",
    "distillation": "A step of distillation by catalogue size",
    "training_memory": "A step of full-data training by catalogue size",
    "users": "Full ranking of users that stream past",
}

NOTES = {
    "encoder": "`make reproduce-…` embeds a catalogue once and keeps it under a key of weights and texts.",
    "training": (
        "RecBole learns one target per sequence (each prefix of a history is one), ours all of a window: that is most "
        "of the difference in interactions. The last column compares the two per *sequence* read, where RecBole "
        "computes the softmax at one position and ours at all. Of RecBole the model's step alone is timed, not its "
        "loading of data."
    ),
    "ranking": "Ours counts exact ranks with ties; RecBole's scores, masking and top 20 are timed, not its metrics.",
    "distillation": (
        "*step*: most bytes that a step has allocated at once, beside *tables*: embeddings, their normalised copy and "
        "features, which are there throughout and grow with the catalogue, as does the *set-up* before the first step. "
        "*times floor*: seconds of a step, divided by those that its matrix products would take at the rate of a "
        "large one. 512 draws by importance are fewer items of a thousand, some of which come twice, than of a "
        "million: that is what operations grow by."
    ),
    "training_memory": (
        "The full softmax needs positions × items; over a drawn subset a step needs the same for any catalogue."
    ),
    "users": (
        "*peak*: alive at once while 10,000 users at a time are drawn, ranked and forgotten. Not streamed today: "
        "`Dataset` and `Queries` hold all histories (*held*), and `training.train` lists the batches of an epoch "
        "(*epoch*)."
    ),
}


def measure(part: str, quick: bool, device: str) -> pd.DataFrame:
    """The table of one part; `quick`: small sizes and a single round, to see that it runs."""
    sizes = (200, 2000) if quick else (10**3, 10**4, 10**5, 10**6)
    scale = {"device": device, "progress": part}
    if quick:
        scale |= {"model": ModelSettings(16, 32, 1, 2, 10), "embedding_width": 32}
    functions: dict[str, Callable[[], pd.DataFrame]] = {
        "encoder": lambda: head_to_head.encoder(64 if quick else 1682, 1 if quick else 3, device),
        "training": lambda: head_to_head.training(*((16, 1, 1) if quick else ()), device=device),
        "ranking": lambda: head_to_head.ranking(*((1, 50) if quick else ()), device=device),
        "distillation": lambda: distillation_steps(
            sizes,
            settings=FosterSettings(pool=1, subset=64, windows=4) if quick else None,
            sequences=4 if quick else 20,
            steps=1 if quick else 10,
            **scale,
        ),
        "training_memory": lambda: training_steps(sizes, steps=1 if quick else 10, **scale),
        "users": lambda: ranking(sizes, items=500, **scale),
    }
    return functions[part]()


def ratios(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per ratio: what, the ratio, what it should be."""
    rows: list[tuple[str, float, str]] = []
    if "encoder" in tables:
        share = tables["encoder"]["achieved_of_attainable"].median()
        rows.append(("encoder: achieved / attainable matrix throughput", share, "at least 0.5"))
    for part, unit, aim in (
        ("training", "interactions_per_second", "above 1"),
        ("training", "sequences_per_second", "–"),
        ("ranking", "users_per_second", "above 1"),
    ):
        if part in tables:
            names = tables[part]["who"].unique()
            for theirs in (name for name in names if name.startswith("RecBole")):
                for ours in (name for name in names if name.startswith("ours")):
                    what = f"{part}, {unit.replace('_', ' ')}: {ours} / {theirs}"
                    rows.append((what, head_to_head.paired(tables[part], ours, theirs, unit), aim))
    if "distillation" in tables:
        table = tables["distillation"]
        ends = f"{table['items'].max():,} / {table['items'].min():,} items"
        rows.append((f"distillation, seconds of a step: {ends}", ratio_of_ends(table, "step_seconds"), "at most 1.3"))
        rows.append((f"distillation, memory of a step: {ends}", ratio_of_ends(table, "step_mib"), "at most 1.3"))
        rows.append(("distillation: seconds of a step / floor (median of sizes)", table["times_floor"].median(), "–"))
    if "training_memory" in tables:
        for loss, table in tables["training_memory"].groupby("loss"):
            if loss.startswith("subset"):  # with a thousand items it is most of the catalogue
                table = from_ten_thousand(table, "items")
            ends = f"{table['items'].max():,} / {table['items'].min():,} items"
            aim = "at most 1.3" if loss.startswith("subset") else "–"
            rows.append((f"training, {loss}, memory of a step: {ends}", ratio_of_ends(table, "step_mib"), aim))
    if "users" in tables:
        streamed = from_ten_thousand(tables["users"], "users")
        ends = f"{streamed['users'].max():,} / {streamed['users'].min():,} users"
        rows.append((f"ranking, memory: {ends}", ratio_of_ends(streamed, "peak_mib", "users"), "about 1"))
    return pd.DataFrame(rows, columns=["what", "ratio", "aim"])


def from_ten_thousand(table: pd.DataFrame, size: str) -> pd.DataFrame:
    """Rows of sizes from 10,000 on, or all where there are none."""
    large = table[table[size] >= 10_000]
    return large if len(large) else table


def report(tables: dict[str, pd.DataFrame], places: dict[str, dict]) -> str:
    """The Markdown page."""
    lines = [INTRODUCTION, ratios(tables).to_markdown(index=False, floatfmt=".2f"), ""]
    for part, table in tables.items():
        place = places[part]
        load = f"load {place['load'][0]:.1f} before, {place['load'][1]:.1f} after on {place['cores']} cores"
        shown_table = table.groupby("who", sort=False).median().drop(columns="round") if "who" in table else table
        lines += [
            f"## {TITLES[part]}", "",
            shown_table.astype(object).to_markdown(index="who" in table, floatfmt=",.3f", intfmt=","), "",
            NOTES[part], "",
            f"{place['hardware']} ({place['device']}), {place['threads']} threads, {load}; PyTorch "
            f"{place['packages']['torch']}, {place['created']}.", "",
        ]  # fmt: skip
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all. Others are kept as they were.")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--quick", action="store_true", help="to see that everything runs; figures mean nothing")
    options = parser.parse_args(arguments)
    folder = results_dir() / "benchmarks" / ("quick" if options.quick else "")
    try:
        device = resolve_device(options.device)
        for part in options.parts:
            check_known(part, PARTS, "part")
        for part in options.parts or PARTS:
            before = os.getloadavg()[0]
            table = measure(part, options.quick, device)
            write_atomically(folder / f"{part}.csv", lambda path, table=table: table.to_csv(path, index=False))
            place = {"load": [before, os.getloadavg()[0]], "cores": os.cpu_count(), "threads": torch.get_num_threads()}
            write_text(folder / f"{part}.json", json.dumps({**place, **environment(device)}, indent=1) + "\n")
        done = [part for part in PARTS if (folder / f"{part}.json").is_file()]
        tables = {part: pd.read_csv(folder / f"{part}.csv") for part in done}
        places = {part: json.loads((folder / f"{part}.json").read_text(encoding="utf-8")) for part in done}
        path = write_text(folder / "benchmarks.md", report(tables, places))
    except FosterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{ratios(tables).to_string(index=False)}\n-> {shown(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
