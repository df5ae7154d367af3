"""Synthetic sequences in the formats of other tools: parquet, RecBole, Hugging Face, JSON lines.

A position of a `SyntheticSequences` is a distribution over items, so every format holds the decoded
(most probable) item; all but RecBole's also keep the k most probable ones with their probabilities.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from torch import Tensor

from foster_lib.errors import FosterError
from foster_lib.paths import write_atomically
from foster_lib.recommender import check_target, write_folder
from foster_lib.synthetic import SyntheticSequences

SHARD_ROWS = 100_000
LINE_BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
"""Unicode's further line ends, which JSON allows in a string and many readers of JSON lines split at."""


@dataclass(frozen=True)
class Decoded:
    """The P real positions of n synthetic sequences, in order, and the catalogue they refer to.

    Attributes
    ----------
    sequence, position : (P,) int64, from 0
    anchors : (P,) int64
        The real item that each position started from; -1 where the method has no such items (TD3, Farzi).
    inputs, targets : (P, k) int64
        The most probable items, best first.
    input_probabilities, target_probabilities : (P, k) float32
        Zero where there are fewer than k possible items (a real item has probability 1).
    item_ids, titles : list of str, length |V|
    about : dict
        Data set, method, seed: for the dataset card.
    """

    sequence: np.ndarray
    position: np.ndarray
    anchors: np.ndarray
    inputs: np.ndarray
    input_probabilities: np.ndarray
    targets: np.ndarray
    target_probabilities: np.ndarray
    item_ids: list[str]
    titles: list[str]
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.sequence)

    def ends(self) -> np.ndarray:
        """(P,) bool: the last position of each sequence."""
        return np.append(self.sequence[1:] != self.sequence[:-1], True)


@torch.no_grad()
def decode(
    sequences: SyntheticSequences,
    embeddings: Tensor,
    item_ids: list[str],
    titles: list[str],
    top: int = 10,
    about: dict[str, Any] | None = None,
) -> Decoded:
    """The `top` most probable items of every position.

    Parameters
    ----------
    embeddings : (|V|, width of the encoder)
        Text embeddings of the catalogue that the sequences were distilled for.

    Raises
    ------
    FosterError
        If the catalogue is not theirs, or `top` is below 1.
    """
    if top < 1:
        raise FosterError(f"--top is {top}: at least 1 item per position is needed.")
    largest = int(torch.maximum(sequences.items, sequences.targets).max())
    width = embeddings.shape[1] if sequences.adapter is None else sequences.adapter["linear.weight"].shape[1]
    if largest >= len(embeddings) or width != embeddings.shape[1] or len(item_ids) != len(embeddings):
        raise FosterError(
            f"these sequences refer to other items or another encoder (item {largest}, width {width}) than the "
            f"catalogue has (items 0 to {len(embeddings) - 1}, width {embeddings.shape[1]}). Distil them again."
        )
    top, real = min(top, len(embeddings)), sequences.mask
    anchored = sequences.queries is None or bool(sequences.bonus.any())
    anchors = sequences.items if anchored else torch.full_like(sequences.items, -1)
    columns = [*real.nonzero(as_tuple=True), anchors[real]]
    # Inputs, then targets: each is n · L · |V| numbers, 80 MB for 20 sequences of 50 from 20,000 items.
    for probabilities in (sequences.input_probabilities, sequences.target_probabilities):
        best = probabilities(embeddings).topk(top, dim=-1)
        columns += [best.indices[real], best.values[real]]
    return Decoded(*(column.cpu().numpy() for column in columns), item_ids, titles, about or {})


def export(decoded: Decoded, kind: str, target: Path, overwrite: bool = False) -> Path:
    """Write `decoded` as one of `FORMATS`: a file, or for recbole and huggingface a folder.

    Raises
    ------
    FosterError
        If something is there already and `overwrite` is not set, or `target` cannot be written.
    """
    target = Path(target)
    check_target(target, overwrite)
    return FORMATS[kind](decoded, target, overwrite)


# ------------------------------------------------------------------------------ parquet


def position_table(decoded: Decoded) -> pa.Table:
    """One row per position: the decoded item and target, and the lists of the most probable ones."""
    ids, titles = np.array(decoded.item_ids, object), np.array(decoded.titles, object)
    columns: dict[str, pa.Array] = {
        "sequence": pa.array(decoded.sequence, pa.int32()),
        "position": pa.array(decoded.position, pa.int32()),
        "item_id": pa.array(ids[decoded.inputs[:, 0]], pa.string()),
        "title": pa.array(titles[decoded.inputs[:, 0]], pa.string()),
        "target_item_id": pa.array(ids[decoded.targets[:, 0]], pa.string()),
        "target_title": pa.array(titles[decoded.targets[:, 0]], pa.string()),
        "anchor_item_id": pa.array([ids[item] if item >= 0 else None for item in decoded.anchors], pa.string()),
    }
    for name, items, probabilities in (
        ("input", decoded.inputs, decoded.input_probabilities),
        ("target", decoded.targets, decoded.target_probabilities),
    ):
        possible = [row[chance > 0] for row, chance in zip(items, probabilities)]
        columns[f"{name}_item_ids"] = pa.array([ids[row].tolist() for row in possible], pa.list_(pa.string()))
        columns[f"{name}_titles"] = pa.array([titles[row].tolist() for row in possible], pa.list_(pa.string()))
        chances = [chance[chance > 0] for chance in probabilities]
        columns[f"{name}_probabilities"] = pa.array(chances, pa.list_(pa.float32()))
    return pa.table(columns)


def write_parquet(decoded: Decoded, target: Path, overwrite: bool = False) -> Path:
    """`position_table` as one parquet file."""
    table = position_table(decoded)
    return write_atomically(target, lambda temporary: pq.write_table(table, temporary))


# ------------------------------------------------------------------------------ RecBole


def write_recbole(decoded: Decoded, folder: Path, overwrite: bool = False) -> Path:
    """RecBole's atomic files `<folder>/<name of folder>.inter` and `.item`.

    A sequence is a "user": its decoded input items, then the decoded target of its last position;
    the timestamp is the position. Probabilities have no place in this format. Files are written as
    RecBole reads them, by pandas: quotes are doubled, control characters and line ends of a title
    become blanks, and a title that pandas would take for a missing value ("None") ends in a blank.
    """
    ids = [_token(item_id) for item_id in decoded.item_ids]
    rows = []
    for sequence, position, item, target, last in zip(
        decoded.sequence, decoded.position, decoded.inputs[:, 0], decoded.targets[:, 0], decoded.ends()
    ):
        rows.append((f"s{sequence}", ids[item], int(position)))
        if last:
            rows.append((f"s{sequence}", ids[target], int(position) + 1))
    inter = _tab_separated(("user_id:token", "item_id:token", "timestamp:float"), rows)
    item = _tab_separated(("item_id:token", "title:token_seq"), zip(ids, map(_words, decoded.titles)))
    name = folder.resolve().name

    def fill(working: Path) -> None:
        (working / f"{name}.item").write_text(item, encoding="utf-8")
        (working / f"{name}.inter").write_text(inter, encoding="utf-8")

    return write_folder(folder, fill, last=f"{name}.inter", overwrite=overwrite)


MISSING = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>"}
MISSING |= {"N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
"""What `pandas.read_csv`, and so RecBole, reads as a missing value."""


def _token(item_id: str) -> str:
    """An id that survives the table: percent-encoded where it holds a control character, a quote or a percent sign."""
    if item_id in MISSING:
        return "".join(f"%{byte:02X}" for byte in item_id.encode()) or "%"
    return re.sub(r'[\x00-\x1f\x7f-\x9f\u2028\u2029"%]', lambda found: quote(found[0], safe=""), item_id)


def _words(title: str) -> str:
    """A title as blank-separated words, on one line."""
    words = one_line(title)
    return words + " " if words in MISSING else words


def _tab_separated(header: tuple[str, ...], rows: Any) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def one_line(text: str) -> str:
    """`text` with each run of blanks, control characters and line ends as one blank."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text).strip()


# ------------------------------------------------------------------------- Hugging Face


def write_huggingface(decoded: Decoded, folder: Path, overwrite: bool = False) -> Path:
    """A folder that `datasets.load_dataset(folder)` reads: parquet shards and a dataset card.

    Two configurations: `positions` (the default), as `position_table`, and `items`, the catalogue.
    """
    items = pa.table(
        {"item_id": pa.array(decoded.item_ids, pa.string()), "title": pa.array(decoded.titles, pa.string())}
    )
    tables = {"positions": position_table(decoded), "items": items}

    def fill(working: Path) -> None:
        for name, table in tables.items():
            (working / name).mkdir()
            count = max(1, -(-len(table) // SHARD_ROWS))
            for shard in range(count):
                path = working / name / f"train-{shard:05d}-of-{count:05d}.parquet"
                pq.write_table(table.slice(shard * SHARD_ROWS, SHARD_ROWS), path)
        (working / "README.md").write_text(dataset_card(decoded), encoding="utf-8")

    return write_folder(folder, fill, last="README.md", overwrite=overwrite)


def dataset_card(decoded: Decoded) -> str:
    """README.md of a Hugging Face dataset: YAML header and text."""
    count, size = len(np.unique(decoded.sequence)), len(decoded)
    about = {"dataset": "unknown", "method": "unknown", "seed": "unknown", **decoded.about}
    header = {
        "pretty_name": one_line(f"{count} synthetic sequences of {about['dataset']} ({about['method']})"),
        "tags": ["recommendation", "sequential-recommendation", "dataset-distillation", "synthetic"],
        "size_categories": ["n<1K" if size < 1000 else "1K<n<10K" if size < 10_000 else "10K<n<100K"],
        "configs": [
            {"config_name": name, "data_files": [{"split": "train", "path": f"{name}/*.parquet"}], **more}
            for name, more in (("positions", {"default": True}), ("items", {}))
        ],
    }
    return f"""---
{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---

# {header["pretty_name"]}

{count} synthetic interaction sequences ({size} positions) for text-based sequential recommendation, made by the method
`{about["method"]}` from the data set `{about["dataset"]}` (seed {about["seed"]}).

```python
from datasets import load_dataset

positions = load_dataset("path/to/this/folder", "positions", split="train")
items = load_dataset("path/to/this/folder", "items", split="train")
```

| column | what |
|---|---|
| `sequence`, `position` | counted from 0 |
| `item_id`, `title` | the most probable item at this position |
| `target_item_id`, `target_title` | the most probable next item |
| `anchor_item_id` | the real item that the position started from; empty if the method has none |
| `input_item_ids`, `input_titles`, `input_probabilities` | the most probable items, best first |
| `target_item_ids`, `target_titles`, `target_probabilities` | the most probable next items, best first |

Titles, and for methods that select real windows the sequences as well, are those of the source data: its licence
applies. State it here before you publish this folder.
"""


# --------------------------------------------------------------------------- JSON lines


def prompts(decoded: Decoded) -> Iterator[dict[str, Any]]:
    """Chat examples: the titles so far, and the next title as the answer; one per position.

    `weight` is the probability of the answer, `next` the most probable next items with theirs.
    Messages have titles on one line each; `next` has them as they are.
    """
    history: list[str] = []
    for row in range(len(decoded)):
        history = history if decoded.position[row] else []
        history.append(one_line(decoded.titles[decoded.inputs[row, 0]]))
        listed = "\n".join(f"{number}. {title}" for number, title in enumerate(history, 1))
        following = [
            {"item_id": decoded.item_ids[i], "title": decoded.titles[i], "probability": round(float(chance), 6)}
            for i, chance in zip(decoded.targets[row], decoded.target_probabilities[row])
            if chance > 0
        ]
        question = f"Items so far, oldest first:\n{listed}\nWhich item comes next? Answer with its title only."
        yield {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": one_line(following[0]["title"])},
            ],
            "weight": following[0]["probability"],
            "next": following,
            "sequence": int(decoded.sequence[row]),
            "position": int(decoded.position[row]),
        }


def write_jsonl(decoded: Decoded, target: Path, overwrite: bool = False) -> Path:
    """`prompts`, one JSON object a line."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for prompt in prompts(decoded):
                file.write(json.dumps(prompt, ensure_ascii=False).translate(LINE_BREAKS) + "\n")

    return write_atomically(target, write)


FORMATS: dict[str, Callable[[Decoded, Path, bool], Path]] = {
    "parquet": write_parquet,
    "recbole": write_recbole,
    "huggingface": write_huggingface,
    "jsonl": write_jsonl,
}
