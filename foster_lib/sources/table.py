"""Anyone's own interactions and items: CSV, TSV, JSON lines or parquet, with any column names."""

from __future__ import annotations

import gzip
import io
import zlib
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from foster_lib.errors import FosterError, check_known
from foster_lib.sources.base import Interaction, Source, identifier, whole_number
from foster_lib.sources.reading import LINE_LIMIT, SourceFile, rows

INTERACTION_COLUMNS = {"user": "user_id", "item": "item_id", "time": "timestamp"}
ITEM_COLUMNS = {
    "item": "item_id",
    "title": "title",
    "categories": "categories",
    "brand": "brand",
    "description": "description",
}
"""What is read, and the column it is read from unless another one is named."""

CHUNK = 100_000


def table(interactions_file: Path, items_file: Path, columns: dict[str, str], item_columns: dict[str, str]) -> Source:
    """The `Source` of two tables.

    Parameters
    ----------
    interactions_file, items_file : paths
        ``.csv``, ``.tsv`` (both may be gzipped), ``.jsonl``, ``.json``, or ``.parquet``.
    columns, item_columns : dict
        Column names that differ from `INTERACTION_COLUMNS` and `ITEM_COLUMNS`. Times are whole
        numbers of any unit, numbers with a fraction (then kept in millionths), or dates such as
        ``2024-05-01 13:00`` (then seconds since 1970, UTC).

    Raises
    ------
    FosterError
        For an unknown key, a missing column or an unreadable file.
    """
    names = _named(columns, INTERACTION_COLUMNS, "interactions")
    item_names = _named(item_columns, ITEM_COLUMNS, "items")
    scale, unit = _time_unit(interactions_file, names["time"])

    def interactions(counts: Counter, progress: str = "") -> Iterator[Interaction]:
        for chunk in _chunks(interactions_file, counts, list(names.values()), [], progress):
            times = _times(chunk[names["time"]], scale, unit)
            for user, item, time in zip(chunk[names["user"]], chunk[names["item"]], times):
                user, item = _plain(user), _plain(item)
                if not user or not item:
                    counts["malformed"] += 1
                elif time is None:
                    counts["without_time"] += 1
                else:
                    yield user, item, time

    required = [item_names["item"], item_names["title"]]
    optional = [name for key, name in item_names.items() if key not in ("item", "title")]

    def items(wanted: Container[str], counts: Counter, progress: str = "") -> Iterator[dict[str, Any]]:
        for chunk in _chunks(items_file, counts, required, optional, progress):
            for record in chunk.to_dict("records"):
                if (item := _plain(record[item_names["item"]])) in wanted:
                    raw = {key: record.get(name) for key, name in item_names.items()}
                    yield {**raw, "item_id": item}

    return Source("table", (interactions_file, items_file), interactions, items, unit)


def _named(given: dict[str, str], known: dict[str, str], which: str) -> dict[str, str]:
    for key in given:
        check_known(key, known, f"column of the {which} table:")
    return {**known, **given}


def _plain(value: Any) -> str:
    """An id as text, "" if it is missing; 7.0, which pandas makes of 7 beside an empty cell, is 7 again."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        return identifier(str(value)) if pd.notna(value) else ""
    except ValueError:
        return ""


def _chunks(
    path: Path, counts: Counter, required: list[str], optional: list[str], progress: str = ""
) -> Iterator[pd.DataFrame]:
    """Frames of at most `CHUNK` rows with the required columns and those optional ones that exist."""
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    reader = {"csv": _csv, "tsv": _csv, "jsonl": _json, "json": _json, "parquet": _parquet}
    check_known(kind, reader, f"kind of table ({path.name}):")
    bar = tqdm(desc=progress, unit="row", unit_scale=True, disable=not progress)
    try:
        for chunk in reader[kind](path, counts):
            bar.update(len(chunk))
            for column in required:
                if column not in chunk.columns:
                    raise FosterError(
                        f"{path}: column '{column}' is missing (found: {', '.join(map(str, chunk.columns))}). Name "
                        "the right one with --columns user=…,item=…,time=… or --item-columns item=…,title=…"
                    )
            yield chunk[required + [column for column in optional if column in chunk.columns]]
    except (
        pd.errors.ParserError,
        pd.errors.EmptyDataError,
        pa.ArrowException,
        EOFError,
        zlib.error,
        UnicodeError,
    ) as error:
        raise FosterError(f"{path} cannot be read as {kind} ({error}). Check it, or export it again.") from error
    except OSError as error:
        raise FosterError(f"{path} cannot be read ({error.strerror or error}). Check the path.") from error
    finally:
        bar.close()


def _csv(path: Path, counts: Counter) -> Iterator[pd.DataFrame]:
    separator, opener = (
        ("\t" if ".tsv" in path.name.lower() else ","),
        gzip.open if path.name.lower().endswith(".gz") else open,
    )
    with opener(path, "rb") as stream, io.BufferedReader(_ShortLines(stream, path)) as file:
        for chunk in pd.read_csv(
            file, sep=separator, chunksize=CHUNK, dtype=str, keep_default_na=False, na_values=[""]
        ):
            counts["lines"] += len(chunk)
            yield chunk


class _ShortLines(io.RawIOBase):
    """A stream that ends in an error before a line without end has filled the memory."""

    def __init__(self, stream: BinaryIO, path: Path):
        self.stream, self.path, self.length = stream, path, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self.stream.read(len(buffer))
        buffer[: len(piece)] = piece
        end = piece.rfind(b"\n")
        self.length = self.length + len(piece) if end < 0 else len(piece) - end - 1
        if self.length > LINE_LIMIT:
            raise FosterError(
                f"{self.path}: a line is longer than {LINE_LIMIT >> 20} MiB. Check that it is the right file, and its "
                "line ends."
            )
        return len(piece)


def _parquet(path: Path, counts: Counter) -> Iterator[pd.DataFrame]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(CHUNK):
            counts["lines"] += len(batch)
            # Lists of categories become Python lists, which pandas' own conversion would not do.
            yield pd.DataFrame({name: pd.Series(batch[name].to_pylist(), dtype=object) for name in batch.schema.names})


def _json(path: Path, counts: Counter) -> Iterator[pd.DataFrame]:
    held: list[dict] = []
    for record in rows(SourceFile(path), dict, counts):
        held.append(record)
        if len(held) == CHUNK:
            yield pd.DataFrame(held, dtype=object)
            held = []
    if held:
        yield pd.DataFrame(held, dtype=object)


def _time_unit(path: Path, column: str) -> tuple[int, str]:
    """(ticks per unit, unit) that hold all times of a column as whole numbers."""
    numeric, fractions = None, False
    for chunk in _chunks(path, Counter(), [column], []):
        present = chunk[column].dropna()
        if numeric is None and len(present):
            numeric = bool(pd.to_numeric(present[:1], errors="coerce").notna().all())
        if numeric is False:
            return 1, "s"
        numbers = pd.to_numeric(present, errors="coerce").dropna()
        fractions |= not np.issubdtype(numbers.dtype, np.integer) and bool((numbers % 1 != 0).any())
    return (1_000_000, "unknown") if fractions else (1, "unknown")


def _times(column: pd.Series, scale: int, unit: str) -> list[int | None]:
    """Times as whole numbers, None where there is none."""
    if unit == "s":
        dates = pd.to_datetime(column, utc=True, errors="coerce", format="mixed")
        seconds = dates.dt.tz_localize(None).to_numpy("datetime64[s]").astype(np.int64).tolist()
        return [None if gone else whole_number(second) for second, gone in zip(seconds, dates.isna())]
    return [_ticks(value, scale) for value in column.tolist()]


def _ticks(value: Any, scale: int) -> int | None:
    """A number, or its text, times `scale`; whole numbers do not pass through a float, which would round large ones."""
    if isinstance(value, int) or (isinstance(value, str) and value.strip().isdecimal()):
        return whole_number(int(value) * scale)
    try:
        return whole_number(round(float(value) * scale))
    except (TypeError, ValueError, OverflowError):  # nothing, a word, NaN, infinity
        return None
