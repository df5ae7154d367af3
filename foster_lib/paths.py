"""Where things lie, and how files are written so that nothing half-written is ever read."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from foster_lib.errors import FosterError

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


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then move it into place.

    A killed or failing writer (no disk space, no permission) leaves the old file, or none.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A hidden working folder beside `folder`, which takes its place when the block ends well.

    `folder` appears complete or not at all: where the block fails or is interrupted, what it wrote
    is removed. Of two processes that make the same folder, one keeps its own.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        working = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield working
        shutil.rmtree(folder, ignore_errors=True)
        try:
            working.rename(folder)
        except OSError as error:
            if not folder.is_dir():  # else another process has put its own there in between
                raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _unwritable(path: Path, error: OSError) -> FosterError:
    return FosterError(
        f"{path}: cannot be written ({error.strerror or error}). "
        "Free some space or choose another folder with FOSTER_CACHE / FOSTER_RESULTS."
    )


def write_text(path: Path, text: str) -> Path:
    """Atomically write a UTF-8 text file."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
