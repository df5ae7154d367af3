"""Manifests: what a run was, on what it ran, and what came out.

A run is stored under a key made of everything that determines its result: all resolved
settings, the content of the data set as it was read, and the code that computes it. A change of comments or
docstrings keeps the key; a change of code does not, so no number outlives the code it came from.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import math
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
import pyarrow.parquet
import torch

from foster_lib.errors import FosterError
from foster_lib.evaluation import METRICS, Ranks
from foster_lib.paths import ROOT, results_dir, write_atomically, write_text

SCHEMA = 1
COMPACT = {
    "compression": "brotli",
    "compression_level": 11,
    "use_dictionary": False,
    "write_statistics": False,
    "store_schema": False,
    "column_encoding": {"user": "DELTA_BINARY_PACKED", "higher": "BYTE_STREAM_SPLIT", "tied": "BYTE_STREAM_SPLIT"},
}
"""How ranks are written: users count up, ranks are small, so that their higher bytes are mostly zero. For 943 users it
takes a seventh of pandas' default."""
NEEDED = ("dataset", "split", "profile", "method", "seed", "code", "data", "details", "seconds", "validation", "test")
CORE_MODULES = (
    *("splits", "encoder", "sasrec", "ensemble", "batches", "subsets", "optimizers"),
    *("training", "synthetic", "synthetic_data", "task", "evaluation", "recipes"),
)
PACKAGES = ("torch", "transformers", "numpy", "pandas", "scikit-learn", "scipy", "safetensors", "recbole")


def code_fingerprint(*modules: str) -> str:
    """Hash of the code of `CORE_MODULES` and `modules`, comments and docstrings left out."""
    digest = hashlib.sha256()
    for module in sorted({*CORE_MODULES, *modules}):
        digest.update(module.encode() + _code_of(module).encode())
    return digest.hexdigest()[:16]


def modules_behind(module: str) -> list[str]:
    """`module` and what it imports from this library, directly or not, besides the core and `errors`."""
    found, waiting = set(), {module}
    while waiting:
        found |= waiting
        waiting = {imported for name in waiting for imported in _imports_of(name)} - found
    return sorted(found)


@functools.cache
def _imports_of(module: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(_code_of(module))):
        if isinstance(node, ast.ImportFrom) and node.module == "foster_lib":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("foster_lib."):
            names.add(node.module.split(".")[1])
    return names - {*CORE_MODULES, "errors"}


@functools.cache
def _code_of(module: str) -> str:
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0] = ast.Pass()
    return ast.unparse(tree)


def content_key(description: dict[str, Any]) -> str:
    """Short hash of a JSON-serialisable description."""
    text = json.dumps(description, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def environment(device: str) -> dict[str, Any]:
    """Where a run took place: commit, packages, processor."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": _git(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": device,
        "hardware": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else _processor(),
    }


def manifest_path(profile: str, dataset: str, method: str, seed: str, key: str) -> Path:
    return results_dir() / "runs" / profile / dataset / f"{method}-seed{seed}-{key}.json"


def read_manifest(path: Path) -> dict[str, Any] | None:
    """A finished run's manifest; None if it is absent, or has a `defect`."""
    try:
        return _checked(path)
    except (OSError, ValueError):
        return None


def defect(path: Path) -> str:
    """Why the manifest at `path` cannot be used; "" if it can, or if there is none."""
    try:
        _checked(path)
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _checked(path: Path) -> dict[str, Any]:
    """The manifest at `path`; OSError or ValueError says what is wrong with it or with the ranks beside it."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError):
        raise ValueError("it is damaged") from None
    if schema != SCHEMA:
        raise ValueError(f"its schema is {schema!r}, this version of the code reads {SCHEMA}")
    if missing := [name for name in NEEDED if name not in manifest]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    figures = [manifest["test"].get(metric) for metric in METRICS]
    if not all(isinstance(figure, float) and math.isfinite(figure) for figure in figures):
        raise ValueError("a metric is missing or no number")
    try:
        pyarrow.parquet.read_metadata(path.with_suffix(".parquet"))
    except (OSError, pyarrow.ArrowException):
        raise ValueError("the ranks beside it are missing or damaged") from None
    return manifest


def write_manifest(path: Path, manifest: dict[str, Any], ranks: Ranks) -> Path:
    """Write the per-user ranks, then the manifest: a run without its ranks is never seen."""
    table = pyarrow.table(dict(ranks.to_frame().items()))
    write_atomically(
        path.with_suffix(".parquet"), lambda temporary: pyarrow.parquet.write_table(table, temporary, **COMPACT)
    )
    return write_text(path, json.dumps({"schema": SCHEMA, **manifest}, indent=1, sort_keys=True) + "\n")


def read_ranks(path: Path) -> Ranks:
    """Per-user test ranks beside a manifest.

    Raises
    ------
    FosterError
        If the file is missing or damaged.
    """
    path = path.with_suffix(".parquet")
    try:
        return Ranks.from_frame(pd.read_parquet(path))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise FosterError(f"{path}: no readable ranks ({error}). Delete it, then its run is computed again.") from error


def _git() -> dict[str, Any]:
    def run(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        return {"commit": run("rev-parse", "HEAD"), "dirty": bool(run("status", "--porcelain", "--", "foster_lib"))}
    except (OSError, subprocess.TimeoutExpired):
        return {"commit": "", "dirty": None}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"
