"""The one exception a user is meant to read."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable

from tqdm import tqdm


class FosterError(ValueError):
    """A user's mistake or a missing file: one sentence that names the place and the remedy.

    Command lines print the sentence without a traceback and exit with status 2.
    """


def complain(error: FosterError) -> int:
    """Print the sentence as one line, however long the names in it; returns the exit status."""
    for bar in list(getattr(tqdm, "_instances", ())):  # else the sentence would begin behind what it was showing
        bar.close()
    line = " ".join(str(error).split())
    print(f"error: {line if len(line) < 2000 else line[:1000] + ' … ' + line[-500:]}", file=sys.stderr, flush=True)
    return 2


def check_known(name: str, valid: Iterable[str], what: str) -> None:
    """Raise `FosterError` unless `name` is one of `valid`; names the nearest valid word."""
    valid = sorted(valid)
    if name in valid:
        return
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.4)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise FosterError(f"unknown {what} '{name}'.{hint} Known: {', '.join(valid)}.")
