"""The rows of Table 2. A new row is one function and one line here.

A method is called as `function(task, sequences=n, seed=s, **parameters)` and returns either
`SyntheticSequences`, on which a fresh student is trained, or a `Scorer`, which ranks as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from foster_lib import (
    coresets,
    dconrec,
    dealrec,
    decoded,
    distribution_matching,
    farzi,
    foster,
    free,
    goracs,
    late,
    linear,
    linear_labels,
    matching,
    references,
    scores,
    selection,
    starts,
    td3,
    tied,
)
from foster_lib.config import refused
from foster_lib.errors import FosterError, check_known
from foster_lib.synthetic import SyntheticSequences


@dataclass(frozen=True)
class Method:
    """A row.

    function : what is called; title : how tables name it; condenses : returns sequences for a
    student; needs_teacher : reads the full-data run of the same seed; seeded : differs by seed;
    labelled : the teacher's labels then take the place of real next items; soft : the sequences have labels of the
    method's own; settings : dataclass whose fields the function takes as parameters; form : type of the sequences.
    """

    function: Callable
    title: str
    condenses: bool = True
    needs_teacher: bool = False
    seeded: bool = True
    labelled: bool = False
    soft: bool = False
    settings: type | None = None
    form: type[SyntheticSequences] = SyntheticSequences


REFERENCES = {
    "full": Method(references.full, "Full data", condenses=False, needs_teacher=True),
    "teachers": Method(references.teachers, "Full data, mean of the teachers", condenses=False, needs_teacher=True),
    "id-sasrec": Method(linear.id_sasrec, "Full data, ids without text", condenses=False),
    "untrained": Method(references.untrained, "Untrained (text similarity)", condenses=False),
    "text-knn": Method(linear.text_knn, "Text-kNN (whole history)", condenses=False, seeded=False),
    "popularity": Method(references.popularity, "Popularity", condenses=False, seeded=False),
    "item-knn": Method(references.item_knn, "Item-kNN", condenses=False, seeded=False),
    "linear": Method(linear.ease, "Linear (EASE)", condenses=False, seeded=False),
    "linear-text": Method(
        linear_labels.linear_text,
        "Linear (EASE) + text-kNN",
        condenses=False,
        seeded=False,
        settings=linear_labels.ScoreSettings,
    ),
}

CORESETS = {
    "random": Method(coresets.random, "Random"),
    "longest": Method(selection.longest, "Longest"),
    "herding": Method(selection.herding, "Herding"),
    "k-center": Method(coresets.k_center, "K-Center"),
    "k-means": Method(coresets.k_means, "k-means", needs_teacher=True),
    "cluster-medoids": Method(selection.cluster_medoids, "Cluster medoids (TF-DCon)"),
    "grand": Method(scores.grand, "GraNd", needs_teacher=True),
    "el2n": Method(scores.el2n, "EL2N", needs_teacher=True),
    "forgetting": Method(scores.forgetting, "Forgetting", needs_teacher=True),
    "dealrec": Method(dealrec.dealrec, "DEALRec", needs_teacher=True),
    "goracs": Method(goracs.goracs, "GORACS"),
}

LABELS = "+labels"
"""Ends the name of a row that puts the teacher's labels on the windows of a coreset."""

# Soft labels alone are worth much at twenty sequences, so every coreset has them too; k-means with
# labels is KD.
LABELLED = {
    name + LABELS: replace(method, title=f"{method.title} + labels", needs_teacher=True, labelled=True)
    for name, method in CORESETS.items()
    if name != "k-means"
}
LABELLED["kd"] = Method(coresets.kd, "KD (k-means + teacher's labels)", needs_teacher=True)
LABELLED["kd-start"] = Method(starts.kd_start, "KD, as FOSTER starts", needs_teacher=True)

DISTILLATION = {
    "dconrec": Method(dconrec.dconrec, "DConRec", needs_teacher=True),
    "gradient-matching": Method(matching.gradient_matching, "Gradient matching (DC)", needs_teacher=True),
    "distribution-matching": Method(
        distribution_matching.distribution_matching, "Distribution matching (DM)", needs_teacher=True
    ),
    "trajectory-matching": Method(matching.trajectory_matching, "Trajectory matching (MTT)", needs_teacher=True),
    "farzi": Method(farzi.farzi, "Farzi", needs_teacher=True, settings=farzi.FarziSettings, form=farzi.LatentSequences),
    "td3": Method(td3.td3, "TD3", needs_teacher=True, settings=td3.TD3Settings, form=td3.TuckerSequences),
    "kd-linear": Method(
        linear_labels.kd_linear, "Labels of a linear model", soft=True, settings=linear_labels.LinearSettings
    ),
    "foster-tied": Method(
        tied.foster_tied,
        "FOSTER, tied, without a teacher",
        soft=True,
        settings=tied.TiedSettings,
        form=tied.TiedSequences,
    ),
    "foster-free": Method(free.foster_free, "FOSTER, without a teacher", soft=True, settings=free.FreeSettings),
    "foster-decoded": Method(
        decoded.foster_decoded,
        "FOSTER, decoded",
        needs_teacher=True,
        settings=foster.FosterSettings,
        form=decoded.DecodedSequences,
    ),
    "foster-late": Method(late.foster_late, "FOSTER, late resets", needs_teacher=True, settings=foster.FosterSettings),
    "foster": Method(foster.foster, "FOSTER", needs_teacher=True, settings=foster.FosterSettings),
}

METHODS: dict[str, Method] = {**REFERENCES, **CORESETS, **LABELLED, **DISTILLATION}
"""In the order of the table."""

SYNONYMS = {f"k-means{LABELS}": "kd"}
"""Names that options know besides; tables, files and keys have the other one."""


NO_PARAMETERS = ("task", "sequences", "seed", "parameters", "progress", "on_step")
"""What a method's function takes besides its parameters."""


def get_method(name: str) -> Method:
    """Look a method up by the name used in options and tables."""
    check_known(name, METHODS, "method")
    return METHODS[name]


def row_name(name: str) -> str:
    """The name of the row that an option means, which may be a synonym; see `get_method` for the row itself."""
    return SYNONYMS.get(name, name)


def base_name(name: str) -> str:
    """Whose parameters a method has: those of the coreset if it is one with labels, else its own."""
    return name.removesuffix(LABELS)


def defaults(name: str) -> dict:
    """The parameters of a method with their defaults."""
    method = get_method(name)
    known = {key: each.default for key, each in inspect.signature(method.function).parameters.items()}
    if method.settings:
        known |= {field.name: field.default for field in fields(method.settings)}
    return {key: default for key, default in known.items() if key not in NO_PARAMETERS}


def check_parameters(name: str, parameters: dict) -> None:
    """Raise `FosterError` if a method does not know one of its configured parameters, or not such a value."""
    known = defaults(name)
    for key, value in parameters.items():
        check_known(key, known, f"parameter of method '{name}':")
        if what := refused(key, value, known[key]):
            raise FosterError(f"methods.{base_name(name)}: {key} must be {what}, not {value!r}.")
