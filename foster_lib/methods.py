"""The rows of Table 2. A new row is one function and one line here.

A method is called as `function(task, sequences=n, seed=s, **parameters)` and returns either
`SyntheticSequences`, on which a fresh student is trained, or a `Scorer`, which ranks as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from foster_lib import coresets, foster, references
from foster_lib.errors import check_known


@dataclass(frozen=True)
class Method:
    """A row.

    function : what is called; title : how tables name it; condenses : returns sequences for a
    student; needs_teacher : reads the full-data run of the same seed; seeded : differs by seed.
    """

    function: Callable
    title: str
    condenses: bool = True
    needs_teacher: bool = False
    seeded: bool = True


METHODS: dict[str, Method] = {
    "full": Method(references.full, "Full data", condenses=False, needs_teacher=True),
    "untrained": Method(references.untrained, "Untrained (text similarity)", condenses=False),
    "popularity": Method(references.popularity, "Popularity", condenses=False, seeded=False),
    "item-knn": Method(references.item_knn, "Item-kNN", condenses=False, seeded=False),
    "random": Method(coresets.random, "Random"),
    "k-center": Method(coresets.k_center, "K-Center"),
    "kd": Method(coresets.kd, "KD (k-means + teacher's labels)", needs_teacher=True),
    "foster": Method(foster.foster, "FOSTER", needs_teacher=True),
}


def get_method(name: str) -> Method:
    """Look a method up by the name used in options and tables."""
    check_known(name, METHODS, "method")
    return METHODS[name]


def check_parameters(name: str, parameters: dict) -> None:
    """Raise `FosterError` if a method does not know one of its configured parameters."""
    function = get_method(name).function
    known = set(inspect.signature(function).parameters) - {"task", "sequences", "seed"}
    if function is foster.foster:
        known |= set(foster.FosterSettings.__dataclass_fields__)
    known -= {"parameters", "progress"}
    for key in parameters:
        check_known(key, known, f"parameter of method '{name}':")
