"""Interactions and item texts: loading, validation, iterative k-core, statistics.

Two sources share one normalised form, two tables:

* ``items``: ``item_id``, ``title`` and further text columns;
* ``interactions``: ``user_id``, ``item_id``, ``timestamp`` (non-negative numbers; any unit,
  only the order is used).

``ml-100k`` arrives with the pip package ``recbole``; every other name is a folder with
``items.parquet`` and ``interactions.parquet`` below the folder that ``FOSTER_DATA`` names.
"""

from __future__ import annotations

import hashlib
import html
import importlib.util
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from foster_lib.errors import FosterError
from foster_lib.paths import sha256_file

TEXT_FIELDS = ("title", "categories", "brand")
EMBEDDED = "ml-100k"
LONGEST_TEXT = 20_000  # characters of a column that are kept: far more than an encoder reads


@dataclass(frozen=True)
class Dataset:
    """Chronological item sequences of all users, and the text of all items.

    Attributes
    ----------
    name : str
    item_ids, titles, texts : list of str, length |V|
        `texts` is what the language model reads.
    user_ids : list of str, length |U|
    sequences : list of int64 arrays, length |U|
        Item indices (0 … |V|−1), oldest first.
    timestamps : list of int64 (or float) arrays, length |U|
        Time of each interaction, same shapes as `sequences`.
    sha256 : dict of str to str
        Checksums of the files that were read.
    """

    name: str
    item_ids: list[str]
    titles: list[str]
    texts: list[str]
    user_ids: list[str]
    sequences: list[np.ndarray]
    timestamps: list[np.ndarray]
    sha256: dict[str, str] = field(default_factory=dict)

    @cached_property
    def content(self) -> str:
        """Hash of what is learned from: texts, sequences and their times, whatever files they came in."""
        digest = hashlib.sha256(json.dumps([self.item_ids, self.texts, self.user_ids]).encode())
        for arrays in (self.sequences, self.timestamps):
            digest.update(np.cumsum([len(array) for array in arrays]).astype(np.int64).tobytes())
            digest.update(str(arrays[0].dtype).encode() + np.concatenate(arrays).tobytes())
        return digest.hexdigest()[:16]

    @property
    def n_items(self) -> int:
        return len(self.item_ids)

    @property
    def n_users(self) -> int:
        return len(self.user_ids)

    def statistics(self) -> dict[str, float]:
        """Row of the statistics table (Table 1): sizes, density, lengths, repeats."""
        lengths = np.array([len(sequence) for sequence in self.sequences])
        repeats = sum(len(sequence) - len(np.unique(sequence)) for sequence in self.sequences)
        return {
            "users": self.n_users,
            "items": self.n_items,
            "interactions": int(lengths.sum()),
            "density_percent": round(100 * float(lengths.sum()) / (self.n_users * self.n_items), 3),
            "mean_length": round(float(lengths.mean()), 2),
            "median_length": float(np.median(lengths)),
            "max_length": int(lengths.max()),
            "repeats": int(repeats),
            "mean_text_words": round(float(np.mean([len(text.split()) for text in self.texts])), 2),
        }


def load_dataset(
    name: str,
    data_root: str | Path | None = None,
    *,
    text_fields: tuple[str, ...] = TEXT_FIELDS,
    core: int = 5,
    min_users: int = 20,
) -> Dataset:
    """Load, validate and filter one data set.

    Parameters
    ----------
    name : str
        ``ml-100k`` (embedded), or a folder name below `data_root`.
    data_root : path, optional
        Default: the environment variable ``FOSTER_DATA``.
    text_fields : tuple of str
        Columns joined to the item's text, in this order; columns that are absent are left out,
        except the first, which must exist.
    core : int
        Iterative k-core: drop users and items with fewer interactions until none is left.
    min_users : int
        Fewer users after the k-core are an error.

    Raises
    ------
    FosterError
        For every defect of the input, naming file, row and remedy.
    """
    if name == EMBEDDED:
        items, interactions, files = _read_movielens()
    else:
        items, interactions, files = _read_parquet(name, data_root)
    items_file, interactions_file = files
    items = _validated_items(items, items_file, text_fields)
    interactions = _validated_interactions(interactions, interactions_file, items, items_file)
    interactions = k_core(interactions, core)
    n_users = interactions["user_id"].nunique()
    if n_users < min_users:
        raise FosterError(
            f"{interactions_file}: only {n_users} users are left after the {core}-core, "
            f"at least {min_users} are needed. Lower `core`, or bring more interactions."
        )
    return _assemble(name, items, interactions, {path.name: sha256_file(path) for path in files})


def k_core(interactions: pd.DataFrame, k: int) -> pd.DataFrame:
    """Largest subset in which every user and every item has at least `k` interactions."""
    while len(interactions):
        users = interactions["user_id"].map(interactions["user_id"].value_counts())
        items = interactions["item_id"].map(interactions["item_id"].value_counts())
        keep = (users >= k) & (items >= k)
        if keep.all():
            break
        interactions = interactions[keep]
    return interactions


def _assemble(name: str, items: pd.DataFrame, interactions: pd.DataFrame, sha256: dict[str, str]) -> Dataset:
    """Number users and items by first appearance in the files, order each user by time.

    The sort is stable: interactions with equal timestamps keep the order of the file, so the
    sequences are the same on every machine.
    """
    used = items[items["item_id"].isin(interactions["item_id"].unique())]
    index_of = pd.Series(np.arange(len(used)), index=used["item_id"])
    users, user_ids = pd.factorize(interactions["user_id"])
    time = interactions["timestamp"].to_numpy()
    item = index_of[interactions["item_id"]].to_numpy(np.int64)
    order = np.lexsort((time, users))  # lexsort is stable, its last key is the first criterion
    ends = np.cumsum(np.bincount(users))[:-1]
    sequences, timestamps = np.split(item[order], ends), np.split(time[order], ends)
    return Dataset(
        name=name,
        item_ids=used["item_id"].tolist(),
        titles=used["title"].tolist(),
        texts=used["text"].tolist(),
        user_ids=user_ids.tolist(),
        sequences=sequences,
        timestamps=timestamps,
        sha256=sha256,
    )


# ---------------------------------------------------------------------------------- reading


def _read_movielens() -> tuple[pd.DataFrame, pd.DataFrame, tuple[Path, Path]]:
    """MovieLens-100K as RecBole's atomic files: title, year and genres of 1,682 films."""
    package = importlib.util.find_spec("recbole")
    if package is None or package.origin is None:
        raise FosterError(
            "MovieLens-100K comes with the package recbole, which is not installed: run "
            "`pip install --no-deps recbole==1.2.1` (or `make install`, which does)."
        )
    folder = Path(package.origin).parent / "dataset_example" / "ml-100k"
    files = folder / "ml-100k.item", folder / "ml-100k.inter"
    for path in files:
        if not path.is_file():
            raise FosterError(f"{path} is missing: reinstall with `pip install --no-deps recbole==1.2.1`.")
    films = pd.read_csv(files[0], sep="\t", dtype=str, keep_default_na=False)
    films.columns = [column.split(":")[0] for column in films.columns]
    items = pd.DataFrame(
        {
            "item_id": films["item_id"],
            "title": films["movie_title"].str.strip() + " (" + films["release_year"] + ")",
            "categories": films["class"].str.strip().str.replace(" ", ", "),
        }
    )
    interactions = pd.read_csv(files[1], sep="\t", dtype={0: str, 1: str})
    interactions.columns = [column.split(":")[0] for column in interactions.columns]
    return items, interactions[["user_id", "item_id", "timestamp"]], files


def _read_parquet(name: str, data_root: str | Path | None) -> tuple[pd.DataFrame, pd.DataFrame, tuple[Path, Path]]:
    root = data_root or os.environ.get("FOSTER_DATA")
    if not root:
        raise FosterError(
            f"data set '{name}' needs the environment variable FOSTER_DATA: the folder that holds "
            f"{name}/items.parquet and {name}/interactions.parquet "
            f"(README, section 'Other data sets'); '{EMBEDDED}' needs no files."
        )
    folder = Path(root).expanduser() / name
    files = folder / "items.parquet", folder / "interactions.parquet"
    frames = []
    for path in files:
        if not path.is_file():
            raise FosterError(
                f"{path} is missing: put the normalised tables there, or set FOSTER_DATA to the "
                "folder that holds them (README, section 'Other data sets')."
            )
        try:
            frames.append(pd.read_parquet(path))
        except Exception as error:  # pyarrow raises several unrelated types for damaged files
            raise FosterError(f"{path} is not a readable parquet file ({error}): fetch it again.") from error
    return frames[0], frames[1], files


# ------------------------------------------------------------------------------- validation


def _require_columns(frame: pd.DataFrame, columns: tuple[str, ...], path: Path) -> None:
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise FosterError(
            f"{path}: column '{missing[0]}' is missing (found: {', '.join(map(str, frame.columns))}). "
            "Rename or add it; the README's section 'Other data sets' lists the columns."
        )


def _first(mask: pd.Series) -> int:
    """Position of the first true row, counted from 0 as pandas does."""
    return int(np.flatnonzero(mask.to_numpy())[0])


def _validated_items(items: pd.DataFrame, path: Path, text_fields: tuple[str, ...]) -> pd.DataFrame:
    _require_columns(items, ("item_id", text_fields[0]), path)
    items = items.reset_index(drop=True)
    missing = items["item_id"].isna()
    if missing.any():
        raise FosterError(f"{path}, row {_first(missing)}: item_id is empty. Give every item an id.")
    items = items.assign(item_id=items["item_id"].astype(str))
    twice = items["item_id"].duplicated()
    if twice.any():
        row = _first(twice)
        raise FosterError(f"{path}, row {row}: item_id '{items['item_id'][row]}' appears twice. Keep one row per item.")
    parts = [
        items[column].fillna("").astype(str).str[:LONGEST_TEXT].map(html.unescape).str.strip()
        for column in text_fields
        if column in items.columns
    ]
    text = pd.Series([". ".join(part for part in row if part) for row in zip(*parts)], dtype=object)
    empty = text.str.strip() == ""
    if empty.any():
        row = _first(empty)
        raise FosterError(
            f"{path}, row {row}: item '{items['item_id'][row]}' has no text in "
            f"{', '.join(text_fields)}. Fill one of these columns or drop the item."
        )
    title = parts[0].where(parts[0] != "", text)
    return pd.DataFrame({"item_id": items["item_id"], "title": title, "text": text})


def _validated_interactions(
    interactions: pd.DataFrame, path: Path, items: pd.DataFrame, items_path: Path
) -> pd.DataFrame:
    _require_columns(interactions, ("user_id", "item_id", "timestamp"), path)
    interactions = interactions.reset_index(drop=True)
    for column in ("user_id", "item_id"):
        missing = interactions[column].isna()
        if missing.any():
            raise FosterError(f"{path}, row {_first(missing)}: {column} is empty. Drop or fill the row.")
    time = pd.to_numeric(interactions["timestamp"], errors="coerce")
    bad = ~np.isfinite(time.to_numpy(float)) | (time < 0) | (time >= 2.0**63)  # these turn negative as int64
    if bad.any():
        row = _first(bad)
        raise FosterError(
            f"{path}, row {row}: timestamp is {interactions['timestamp'][row]!r}; it must be a "
            "number that is not negative, below 2^63. Drop or mend the row."
        )
    interactions = pd.DataFrame(
        {
            "user_id": interactions["user_id"].astype(str),
            "item_id": interactions["item_id"].astype(str),
            "timestamp": time.astype(np.int64) if (time % 1 == 0).all() else time.astype(float),
        }
    )
    unknown = ~interactions["item_id"].isin(items["item_id"])
    if unknown.any():
        row = _first(unknown)
        raise FosterError(
            f"{path}, row {row}: item '{interactions['item_id'][row]}' is not in {items_path.name} "
            f"({int(unknown.sum())} such rows). Add its text there or drop these rows."
        )
    return interactions
