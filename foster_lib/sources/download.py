"""Amazon's review data from their official addresses, resumed where a transfer broke off.

The data are for research (McAuley Lab, UC San Diego). No checksums are published, so the first
download is trusted: `remember` writes its sha256 beside it (`SHA256SUMS`, readable by
`sha256sum -c`) once the file could be read to its end, and every later use is checked against that.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import requests
import urllib3
from tqdm.auto import tqdm

from foster_lib.errors import FosterError, check_known
from foster_lib.paths import sha256_file, write_text

_SNAP = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
_UCSD = "https://mcauleylab.ucsd.edu/public_datasets/data/"
ADDRESSES = {
    "amazon-2014": (_SNAP + "reviews_{}_5.json.gz", _SNAP + "meta_{}.json.gz"),
    "amazon-2018": (
        _UCSD + "amazon_v2/categoryFilesSmall/{}_5.json.gz",
        _UCSD + "amazon_v2/metaFiles2/meta_{}.json.gz",
    ),
    "amazon-2023": (
        _UCSD + "amazon_2023/raw/review_categories/{}.jsonl.gz",
        _UCSD + "amazon_2023/raw/meta_categories/meta_{}.jsonl.gz",
    ),
}
"""Reviews and metadata of each edition, the name of the category left open."""

PAGES = {
    "amazon-2014": "https://jmcauley.ucsd.edu/data/amazon/index_2014.html",
    "amazon-2018": "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/",
    "amazon-2023": "https://amazon-reviews-2023.github.io/",
}
"""Names of the categories, terms of use and papers to cite."""

ATTEMPTS = 3
PIECE = 1 << 16
"""Bytes that are kept at once: what is lost at most when the process is killed."""
TIMEOUT = (15, 60)
"""Seconds to connect, and between two pieces of data."""


def fetch(edition: str, category: str, folder: Path, progress: bool = True) -> list[Path]:
    """Reviews and metadata of one category, from `folder` or else from their address.

    Parameters
    ----------
    edition : str
        A key of `ADDRESSES`.
    category : str
        As in the file names, such as ``Video_Games`` or ``Grocery_and_Gourmet_Food``.
    folder : path
        Where the files are kept. An unfinished one ends in ``.part`` and is resumed.

    Raises
    ------
    FosterError
        Without a network, for an unknown category, or if a file's sha256 is not the recorded one;
        with the command that fetches the file by hand.
    """
    check_known(edition, ADDRESSES, "edition")
    if not re.fullmatch(r"\w+", category):
        raise FosterError(f"category '{category}' is no name of a file: it looks like Video_Games.")
    addresses = [address.format(category) for address in ADDRESSES[edition]]
    files = {address: Path(folder) / address.rpartition("/")[2] for address in addresses}
    for address in files:
        missing = [(other, path) for other, path in files.items() if other == address or not path.exists()]
        commands = (f"curl -L --create-dirs -C - -o {shlex.quote(str(path))} {other}" for other, path in missing)
        _fetch(
            address,
            Path(folder),
            PAGES[edition],
            "Fetch by hand and run this again: " + " && ".join(commands),
            progress,
        )
    return list(files.values())


def remember(paths: Iterable[Path]) -> None:
    """Record the sha256 of files in `SHA256SUMS` beside them, unless it is recorded already."""
    for path in paths:
        known = _recorded(path.parent)
        if path.name not in known:
            known[path.name] = sha256_file(path)
            lines = [f"{digest}  {name}\n" for name, digest in sorted(known.items())]
            write_text(path.parent / "SHA256SUMS", "".join(lines))


def _fetch(address: str, folder: Path, page: str, by_hand: str, progress: bool) -> None:
    path = folder / address.rpartition("/")[2]
    known = _recorded(folder).get(path.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_there(path, known) and not _completed(address, path, known, progress):
            raise FosterError(
                f"{address} is not the file recorded in {folder / 'SHA256SUMS'}: it changed, or arrived damaged. "
                f"If you trust the new one, delete its line there. {by_hand}"
            )
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 404:
            raise FosterError(f"{address} does not exist: the names of the categories are at {page}.") from error
        reason = f"status {status}" if status else type(error).__name__
        raise FosterError(f"{address} cannot be fetched ({reason}); a part that came is kept. {by_hand}") from error
    except OSError as error:
        raise FosterError(
            f"{path} cannot be written ({error.strerror or error}). Free some space, or choose another "
            "folder with --downloads."
        ) from error


def _is_there(path: Path, known: str | None) -> bool:
    return path.is_file() and (known is None or sha256_file(path) == known)


def _recorded(folder: Path) -> dict[str, str]:
    path = folder / "SHA256SUMS"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines) if name}


def _completed(address: str, path: Path, known: str | None, progress: bool) -> bool:
    """Go on where `path`.part ends, after a broken connection too; False if the file is not the known one."""
    part = path.with_name(path.name + ".part")
    with _alone(part) as file:
        try:
            if _is_there(path, known):  # by another process, while this one waited for it
                return True
            for attempt in range(ATTEMPTS):
                try:
                    _transfer(address, file, part, progress)
                    break
                except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError):
                    if attempt == ATTEMPTS - 1:
                        raise
            right = known is None or sha256_file(part) == known
            if right:
                part.replace(path)
            else:
                file.truncate(0)
            return right
        finally:
            if part.exists() and not part.stat().st_size:
                part.unlink()
            if not part.exists():
                _tag(part).unlink(missing_ok=True)


@contextmanager
def _alone(part: Path) -> Iterator[BinaryIO]:
    """`part`, opened for appending, when no other process is at it: two of them would mix their pieces."""
    while True:
        with open(part, "ab") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if part.exists() and os.path.samestat(part.stat(), os.fstat(file.fileno())):  # else it was moved meanwhile
                yield file
                return


def _transfer(address: str, file: BinaryIO, part: Path, progress: bool) -> None:
    """Complete `part`, open as `file`. What is there is kept only if the server says that it is still the same file."""
    tag = _tag(part).read_text() if _tag(part).is_file() else ""
    have = part.stat().st_size if tag else 0
    headers = {"Accept-Encoding": "identity"}  # these files are packed already
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    with requests.get(address, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:  # nothing is left to send: the part is whole, or longer than the file
            if response.headers.get("Content-Range") == f"bytes */{have}":
                return
            file.truncate(0)
            raise requests.ConnectionError("the part on disk does not fit the file")
        response.raise_for_status()
        resumed = response.status_code == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            file.truncate(0)
            raise requests.ConnectionError("the server sent another range")
        if not resumed:
            file.truncate(0)  # before the new tag is written: it belongs to another version
        _tag(part).write_text(_validator(response.headers))
        total = int(response.headers.get("Content-Length", 0)) + (have if resumed else 0)
        label, initial = part.name.removesuffix(".part"), have if resumed else 0
        with tqdm(total=total, initial=initial, desc=label, unit="B", unit_scale=True, disable=not progress) as bar:
            # The raw stream: requests would unpack a file that the server declares as gzip-encoded.
            for piece in response.raw.stream(PIECE, decode_content=False):
                file.write(piece)
                file.flush()  # what has come is kept, whatever happens next
                bar.update(len(piece))


def _validator(headers: requests.structures.CaseInsensitiveDict) -> str:
    """What names this version of the file: a strong ETag, else the date of its last change."""
    etag = headers.get("ETag", "")
    return headers.get("Last-Modified", "") if not etag or etag.startswith("W/") else etag


def _tag(part: Path) -> Path:
    return part.with_name(part.name + ".tag")
