"""Where things lie, and how files are written so that nothing half-written is ever read."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors

from foster_lib.errors import FosterError

PARTIAL = ".partial-"
"""Begins the names of files and folders that are not finished."""

WRITE_ERRORS = (OSError, safetensors.SafetensorError)
"""What writing raises on a full disk or in a read-only folder; safetensors has an exception of its own."""

# Relative folders count from here, because notebooks run in different working directories.
ROOT = Path(__file__).resolve().parent.parent


def cache_dir() -> Path:
    """Folder of recomputable artifacts (embeddings, checkpoints): `FOSTER_CACHE` or `.cache/`."""
    return ROOT / (os.environ.get("FOSTER_CACHE") or ".cache/foster")


def results_dir() -> Path:
    """Folder of manifests, tables and figures: `FOSTER_RESULTS` or `results/`."""
    return ROOT / (os.environ.get("FOSTER_RESULTS") or "results")


def shown(path: Path) -> str:
    """`path` as messages and notebooks show it: from the project's root, or from the variable that moved it."""
    path = Path(path)
    for variable, folder in (("", ROOT), ("$FOSTER_RESULTS", results_dir()), ("$FOSTER_CACHE", cache_dir())):
        if path.is_relative_to(folder):
            return (Path(variable) / path.relative_to(folder)).as_posix()
    return path.as_posix()


@contextmanager
def unfinished(path: Path, folder: bool = False) -> Iterator[Path]:
    """An empty hidden file (or folder) beside `path`, to be filled and moved; what is left of it in the end is removed.

    Its writer holds a lock on it. A process that is killed leaves its own behind, without the lock: the next one
    that writes into the same folder removes it. There are no lock files.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent)
    handle, temporary = _held(path, folder)
    try:
        yield temporary
    finally:
        _remove(temporary)
        os.close(handle)


def remove_abandoned(folder: Path) -> None:
    """Remove unfinished files and folders that no living process holds."""
    for path in Path(folder).glob(f"{PARTIAL}*"):
        with suppress(OSError):  # another process holds it, or has just removed it
            handle = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(handle)


def _held(path: Path, folder: bool) -> tuple[int, Path]:
    """A new file or folder beside `path`, and the open handle whose lock says that it is in use."""
    names = {"dir": path.parent, "prefix": PARTIAL, "suffix": f"-{path.name}"}
    while True:
        if folder:
            name = tempfile.mkdtemp(**names)
        else:
            handle, name = tempfile.mkstemp(**names)
            os.close(handle)
        with suppress(FileNotFoundError):  # taken for abandoned before the lock was there: once more
            handle = os.open(name, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks: nothing is ever taken for abandoned there
                fcntl.flock(handle, fcntl.LOCK_EX)
            if os.path.exists(name):
                return handle, Path(name)
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then move it into place.

    A killed or failing writer (no disk space, no permission) leaves the old file, or none.
    """
    path = Path(path)
    try:
        with unfinished(path) as temporary:
            write(temporary)
            temporary.chmod(0o644)
            temporary.replace(path)
    except WRITE_ERRORS as error:
        raise _unwritable(path, error) from error
    return path


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A hidden working folder beside `folder`, which takes its place when the block ends well.

    `folder` appears complete or not at all: where the block fails or is interrupted, what it wrote
    is removed. If there is one already, its files are replaced one by one: whoever reads them
    meanwhile finds each of them whole, the old or the new one.
    """
    folder = Path(folder)
    try:
        with unfinished(folder, folder=True) as working:
            yield working
            try:
                working.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
                old = {path.name for path in folder.iterdir()}
                for path in sorted(working.iterdir()):
                    path.replace(folder / path.name)
                    old.discard(path.name)
                for name in old:
                    _remove(folder / name)
    except WRITE_ERRORS as error:
        raise _unwritable(folder, error) from error


def _unwritable(path: Path, error: Exception) -> FosterError:
    return FosterError(
        f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}). "
        "Free some space or choose another folder with FOSTER_CACHE / FOSTER_RESULTS."
    )


def write_text(path: Path, text: str) -> Path:
    """Atomically write a UTF-8 text file."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
