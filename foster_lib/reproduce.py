"""Run notebooks with parameters: `python -m foster_lib.reproduce table2 --profile cpu`.

papermill executes it; what papermill leaves loose is strict here: an unknown parameter is an
error, the executed notebook appears only when all cells succeeded (a failed one is kept as
`*.failed.ipynb`), and a manifest says what ran where. A name may also stand for a group of
notebooks, see `GROUPS`: each of them then gets the parameters that it knows.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from foster_lib.config import PROFILES
from foster_lib.errors import FosterError, check_known, complain
from foster_lib.execution import resolve_device
from foster_lib.paths import ROOT, results_dir, shown, unfinished, write_text
from foster_lib.records import environment

NOTEBOOKS = ROOT / "notebooks"
GROUPS = {"figures": ("fig_*",), "all": ("table*", "fig_*")}
"""Patterns of the notebooks that a name stands for, in this order."""


def plan(names: list[str], parameters: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The notebooks that names of notebooks and groups stand for, each with its parameters.

    A notebook that is named has to know all parameters. One that comes with a group goes without
    those that it does not know, as long as another notebook of the group knows them.

    Raises
    ------
    FosterError
        For an unknown name or parameter.
    """
    planned: dict[str, dict[str, Any]] = {}
    for name in names:
        if name in GROUPS:
            members = [path.stem for pattern in GROUPS[name] for path in sorted(NOTEBOOKS.glob(f"{pattern}.ipynb"))]
        else:
            check_known(name, [*GROUPS, *(path.stem for path in NOTEBOOKS.glob("*.ipynb"))], "notebook")
            members = [name]
        known = {member: _parameters(member) for member in members}
        for parameter in parameters:
            check_known(parameter, set().union(*known.values()), f"parameter of notebook '{name}':")
        for member in members:
            planned.setdefault(member, {key: value for key, value in parameters.items() if key in known[member]})
    return planned


def run_notebook(name: str, parameters: dict[str, Any], output: Path | None = None) -> Path:
    """Execute `notebooks/<name>.ipynb` with parameters; returns the executed notebook's path.

    Raises
    ------
    FosterError
        For an unknown notebook or parameter, or a failing cell (named in the message).
    """
    check_known(name, [path.stem for path in NOTEBOOKS.glob("*.ipynb")], "notebook")
    source = NOTEBOOKS / f"{name}.ipynb"
    known = _parameters(name)
    for parameter in parameters:
        check_known(parameter, known, f"parameter of notebook '{name}':")
    parameters = {key: _typed(key, value, known[key]["inferred_type_name"]) for key, value in parameters.items()}
    output = output or results_dir() / "notebooks" / f"{name}.ipynb"
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    start = time.time()
    try:
        with unfinished(output) as temporary:
            try:
                _execute(source, temporary, parameters)
            except PapermillExecutionError as error:
                temporary.replace(failed)
                raise FosterError(
                    f"notebook '{name}', cell {error.cell_index}: {error.ename}: {error.evalue} "
                    f"(the notebook so far: {failed})"
                ) from error
            temporary.chmod(0o644)
            temporary.replace(output)
        failed.unlink(missing_ok=True)
    except DeadKernelError as error:
        raise FosterError(
            f"notebook '{name}': Python died while it ran, most likely for lack of memory; try --jobs 1."
        ) from error
    except OSError as error:
        raise FosterError(
            f"{output} cannot be written ({error.strerror or error}). Free some space, or choose another folder with "
            "FOSTER_RESULTS."
        ) from error
    manifest = {
        "notebook": name,
        "parameters": parameters,
        "seconds": round(time.time() - start, 1),
        **environment(resolve_device(str(parameters.get("device") or "auto"))),
    }
    write_text(output.with_suffix(".json"), json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return output


def _execute(source: Path, target: Path, parameters: dict[str, Any]) -> None:
    papermill.execute_notebook(
        str(source), str(target), parameters, kernel_name="python3", progress_bar=False, log_output=True,
        stdout_file=sys.stdout, stderr_file=sys.stderr, cwd=str(ROOT),
        extra_arguments=["--log-level=ERROR"],  # ipykernel warns about its local socket
    )  # fmt: skip


def _parameters(name: str) -> dict[str, Any]:
    """What a notebook says about its parameters."""
    path = NOTEBOOKS / f"{name}.ipynb"
    try:
        return papermill.inspect_notebook(str(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, nbformat.ValidationError) as error:
        reason = str(error).strip().partition("\n")[0][:100]
        raise FosterError(f"{shown(path)}: no readable notebook ({reason}). Restore it with `git checkout`.") from error


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m foster_lib.reproduce",
        description="Run notebooks of this project with parameters and write their tables to results/.",
        epilog="example: python -m foster_lib.reproduce table2 --profile cpu --datasets 'ml-100k foods' --jobs 2",
    )
    parser.add_argument("notebooks", nargs="+", metavar="notebook",
                        help="names without .ipynb, e.g. table2; or " + ", ".join(GROUPS))  # fmt: skip
    parser.add_argument("--profile", help="one of " + ", ".join(sorted(path.stem for path in PROFILES.glob("*.yaml"))))
    parser.add_argument("--datasets", help="names separated by spaces, default: the profile's")
    parser.add_argument("--methods", help="rows separated by spaces, or all; default: the profile's")
    parser.add_argument("--seeds", help="numbers separated by spaces, default: the profile's")
    parser.add_argument("--split", help="leave-one-out or temporal, default: the profile's")
    parser.add_argument("--jobs", type=int, help="runs side by side, default: number of cores, at most 2")
    parser.add_argument("--device", help="cpu, cuda or auto")
    parser.add_argument("--fresh", action="store_true", default=None, help="compute finished runs again")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="any other parameter of the notebooks")  # fmt: skip
    options = vars(parser.parse_args(arguments))
    names, extra = options.pop("notebooks"), options.pop("parameter")
    parameters = {key: value for key, value in options.items() if value is not None and value != ""}
    parameters |= dict(extra)
    logging.basicConfig(level=logging.WARNING)
    # Runs compute on one thread; so do notebooks, whose small products two threads slow down where a core is busy.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        planned = plan(names, parameters)
    except FosterError as error:
        return complain(error)
    for name, own in planned.items():
        if left_out := parameters.keys() - own.keys():
            print(f"{name} knows no {', '.join(sorted(left_out))}: it runs without")
    failed = []
    for number, (name, own) in enumerate(planned.items(), 1):
        if len(planned) > 1:
            print(f"notebook {number} of {len(planned)}: {name}", flush=True)
        try:
            print(f"executed notebook: {run_notebook(name, own)}", flush=True)
        except FosterError as error:  # the others may succeed
            complain(error)
            failed.append(name)
    if failed and len(planned) > 1:
        print(f"error: {len(failed)} of {len(planned)} notebooks failed: {', '.join(failed)}", file=sys.stderr)
    return 2 if failed else 0


def _typed(name: str, value: Any, declared: str) -> Any:
    """A parameter from the command line, read as the type that the notebook declares for it."""
    if not isinstance(value, str) or declared in ("str", "None"):
        return value
    try:
        value = json.loads(value.lower() if declared == "bool" else value)
    except ValueError:
        pass
    if type(value).__name__ != declared and not (declared == "float" and isinstance(value, int)):
        raise FosterError(f"parameter '{name}' must be of type {declared}, not {value!r}.")
    return value


if __name__ == "__main__":
    sys.exit(main())
