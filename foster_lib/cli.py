"""Command line: from anyone's interactions and item texts to twenty sequences and a recommender.

A user's mistake (`FosterError`) is one line on standard error and exit status 2. The library is
imported inside the commands, because PyTorch takes seconds that `--help` and a mistyped option
need not wait for.
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from foster_lib.errors import FosterError, complain

if TYPE_CHECKING:
    from foster_lib.config import Settings
    from foster_lib.runs import Run


class Commands(TyperGroup):
    """The group of commands; ends with one line where the user can mend it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FosterError as error:
            raise typer.Exit(complain(error)) from error


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="""Distil interactions and item texts into a handful of synthetic sequences.

    \b
    examples, in order (one page: docs/your_own_data.md):
      python -m foster_lib prepare shop --out data --interactions orders.csv --items products.csv
      python -m foster_lib distill data/shop --out shop20
      python -m foster_lib evaluate shop20 --data data/shop
      python -m foster_lib recommend shop20 "blue teapot" "green tea"
      python -m foster_lib export shop20 --format huggingface --out shop20-dataset
    """,
)

Data = Annotated[
    str, typer.Argument(metavar="DATA", help="ml-100k, a folder that `prepare` wrote, or its name below FOSTER_DATA.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder to write; must be new or empty.")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="What `distill` or `train` wrote with --out.")]
Profile = Annotated[str, typer.Option(help="Settings: quick, cpu (reuses the published runs), paper, smoke.")]
Split = Annotated[str, typer.Option(help="leave-one-out or temporal; default: the profile's.")]
Seed = Annotated[int, typer.Option(min=0, help="Of initial weights, the order of the data, and the method.")]
Change = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. full.epochs=12; repeat.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: CUDA where there is one.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Compute finished runs again.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Format = Literal["parquet", "recbole", "huggingface", "jsonl"]


@app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    short_help="Official files, or a CSV of your own, to the form that is read.",
)
def prepare(ctx: typer.Context) -> None:
    """Same as `python -m foster_lib.prepare`, which has its own --help."""
    from foster_lib.prepare import main

    raise typer.Exit(main(ctx.args or ["--help"]))


@app.command()
def train(
    data: Data,
    out: Out,
    profile: Profile = "quick",
    split: Split = "",
    seed: Seed = 0,
    change: Change = None,
    device: Device = "auto",
    fresh: Fresh = False,
    overwrite: Overwrite = False,
) -> None:
    """Train the recommender on all interactions.

    The run is the row "Full data" of Table 2: a second call with the same settings reuses it.

    \b
    examples:
      python -m foster_lib train ml-100k --out full
      python -m foster_lib train data/shop --out full --set full.epochs=12 --set model.width=128
    """
    run = _run(data, "full", profile, split, seed, change, out, overwrite)
    _execute(run, out, device, fresh, overwrite)


@app.command()
def distill(
    data: Data,
    out: Out,
    method: Annotated[
        str, typer.Option(help="foster, kd, td3, random, random+labels, ...: rows of Table 2.")
    ] = "foster",
    sequences: Annotated[int | None, typer.Option(help="How many; default: the profile's, 20.")] = None,
    profile: Profile = "quick",
    split: Split = "",
    seed: Seed = 0,
    change: Change = None,
    device: Device = "auto",
    fresh: Fresh = False,
    overwrite: Overwrite = False,
) -> None:
    """Distil the interactions, and train a recommender on the result alone.

    Writes the sequences and the recommender. The run is the method's row of Table 2: a second call
    with the same settings reuses it.

    \b
    examples:
      python -m foster_lib distill ml-100k --out ml20
      python -m foster_lib distill data/shop --out shop50 --sequences 50 --method kd
      python -m foster_lib distill data/shop --out shop20 --set methods.foster.iterations=200
    """
    from foster_lib.methods import METHODS, get_method, row_name

    method = row_name(method)
    if not get_method(method).condenses:
        condensing = ", ".join(name for name, row in METHODS.items() if row.condenses)
        raise FosterError(f"method '{method}' makes no sequences. Choose one of {condensing}; or use `train`.")
    change = [*(change or []), *([] if sequences is None else [f"sequences={sequences}"])]
    run = _run(data, method, profile, split, seed, change, out, overwrite)
    _execute(run, out, device, fresh or not run.distilled_path.is_file(), overwrite)


@app.command()
def evaluate(
    folder: Folder,
    data: Annotated[str, typer.Option(help="The data set it was trained on, as for `train`; default: by name.")] = "",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Rank every user's test item among all items; the untrained model, popularity and item-kNN stand beside it.

    \b
    examples:
      python -m foster_lib evaluate shop20 --data data/shop
      python -m foster_lib evaluate full --json
    """
    import pandas as pd

    from foster_lib.evaluation import rank_queries, recommender_scorer
    from foster_lib.execution import execute, resolve_device
    from foster_lib.recommender import Recommender
    from foster_lib.runs import Run, load_once
    from foster_lib.splits import make_split

    device = resolve_device(device)
    recommender = Recommender.load(folder, device)
    dataset = load_once(_dataset(data or recommender.settings.dataset))
    recommender.check_data(dataset)
    split = make_split(dataset, recommender.settings.split)
    score = recommender_scorer(recommender.model)
    rows = {folder.resolve().name: rank_queries(score, split.test, dataset.n_items).metrics()}
    settings, seed = replace(recommender.settings, dataset=dataset.name), recommender.about["seed"]
    runs = [Run(settings, method, seed) for method in ("untrained", "popularity", "item-knn")]
    manifests = execute(runs, device=device, progress=False, say=lambda line: None)
    rows |= {run.method: manifest["test"] for run, manifest in zip(runs, manifests)}
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        typer.echo(f"{dataset.name}, {split.name}, test set, {len(split.test)} users, {dataset.n_items} items")
        typer.echo(pd.DataFrame(rows).T.map("{:.4f}".format).to_string())


@app.command()
def recommend(
    folder: Folder,
    history: Annotated[list[str], typer.Argument(metavar="ITEM", help="Item ids or titles, oldest first.")],
    k: Annotated[int, typer.Option("-k", help="How many items.")] = 10,
    as_json: AsJson = False,
) -> None:
    """What comes next after these items?

    \b
    examples:
      python -m foster_lib recommend ml20 "Toy Story (1995)" "Babe (1995)"
      python -m foster_lib recommend shop20 SKU-17 SKU-4 -k 5 --json
    """
    from foster_lib.export import one_line
    from foster_lib.recommender import Recommender

    best = Recommender.load(folder).recommend(history, k)
    if as_json:
        typer.echo(best.to_json(orient="records", force_ascii=False))
    else:
        for row in best.itertuples():
            typer.echo(f"{row.rank:3d}  {row.probability:6.2%}  {one_line(row.title)}  [{one_line(row.item_id)}]")


@app.command()
def export(
    folder: Folder,
    kind: Annotated[Format, typer.Option("--format", help="jsonl: prompts to fine-tune a language model.")],
    out: Annotated[Path, typer.Option("--out", help="File (parquet, jsonl) or folder (recbole, huggingface).")],
    top: Annotated[int, typer.Option(help="Items kept per position, with their probabilities.")] = 10,
    overwrite: Overwrite = False,
) -> None:
    """Write the distilled sequences for other tools.

    \b
    examples:
      python -m foster_lib export shop20 --format parquet --out shop20.parquet
      python -m foster_lib export shop20 --format recbole --out recbole/shop20
      python -m foster_lib export shop20 --format huggingface --out shop20-dataset --top 50
      python -m foster_lib export shop20 --format jsonl --out prompts.jsonl
    """
    from foster_lib.export import decode
    from foster_lib.export import export as write
    from foster_lib.recommender import Recommender, check_target, load_sequences

    check_target(out, overwrite)
    recommender, sequences = Recommender.load(folder), load_sequences(folder)
    about = {name: recommender.about.get(name) for name in ("dataset", "method", "seed")}
    decoded = decode(sequences, recommender.embeddings, recommender.item_ids, recommender.titles, top, about)
    write(decoded, kind, out, overwrite)
    typer.echo(f"{len(sequences)} sequences, {len(decoded)} positions -> {out}")


# ------------------------------------------------------------------------------- shared


def _dataset(data: str) -> str:
    """The name of a data set; a path to its folder is told to the loader through FOSTER_DATA."""
    path = Path(data).expanduser()
    if path.is_dir() and ((path / "items.parquet").exists() or len(path.parts) > 1):
        os.environ["FOSTER_DATA"] = str(path.resolve().parent)
        return path.resolve().name
    if len(path.parts) > 1:
        raise FosterError(f"{data} is no folder. `prepare` makes it, or give a name below FOSTER_DATA.")
    return data


DEPTH = {"sequences": 0, "methods": 2}
"""Groups before the last key of a setting; others are in one group, as full.epochs."""


def changed_settings(data: str, profile: str, split: str, change: list[str]) -> Settings:
    """The profile's settings for a data set, `KEY=VALUE` changes laid over them."""
    import yaml

    from foster_lib.config import load_profile

    name, base = _dataset(data), load_profile(profile)
    own = copy.deepcopy(base.raw.get("per_dataset", {}).get(name, {}))
    for text in change:
        key, sign, value = text.partition("=")
        *groups, last = key.strip().split(".")
        if not sign or len(groups) != DEPTH.get(key.split(".")[0], 1):
            raise FosterError(f"--set {text}: write it as full.epochs=12 or methods.foster.iterations=200.")
        place = own
        for group in groups:
            place = place.setdefault(group, {})
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise FosterError(f"--set {text}: the value cannot be read as YAML.") from None
    raw = {**base.raw, "per_dataset": {**base.raw.get("per_dataset", {}), name: own}}
    return replace(base, raw=raw).settings(name, split or None)


def _run(
    data: str, method: str, profile: str, split: str, seed: int, change: list[str] | None, out: Path, overwrite: bool
) -> Run:
    """The run, with all that can be wrong found before anything is computed."""
    from foster_lib.recommender import check_target
    from foster_lib.runs import Run, load_once
    from foster_lib.splits import make_split

    check_target(out, overwrite)
    run = Run(changed_settings(data, profile, split, change or []), method, seed)
    run.description()  # unknown parameters, and values that cannot be
    settings = run.settings
    if type(settings.sequences) is not int or settings.sequences < 1:
        raise FosterError(f"sequences is {settings.sequences!r}: give a whole number above 0.")
    make_split(load_once(settings.dataset), settings.split)
    return run


def _execute(run: Run, out: Path, device: str, fresh: bool, overwrite: bool) -> None:
    """Make the run or find it finished, then write the recommender to `out`."""
    from foster_lib.execution import Call, execute, parallel, resolve_device
    from foster_lib.runs import train_full_run, trained

    device = resolve_device(device)
    execute([run], device=device, fresh=fresh, say=typer.echo)
    # Published runs come without the weights of full-data training, which are too large to publish.
    published = run.method == "full" and not trained(run)
    calls = [Call(train_full_run, run)] if published else []
    calls.append(Call(_save, (run, out, overwrite)))
    # As all runs in one thread, so that the weights are those that the run evaluated.
    parallel(calls, jobs=1, device=device, label="", say=typer.echo)


def _save(item: tuple[Run, Path, bool], device: str, progress: bool) -> str:
    from foster_lib.recommender import of_run

    run, out, overwrite = item
    recommender, sequences = of_run(run, device, progress)
    recommender.save(out, sequences, overwrite)
    ndcg, recall = (recommender.about["test"][metric] for metric in ("ndcg@10", "recall@10"))
    return f"{run.settings.dataset} {run.method}: NDCG@10 {ndcg:.4f}, Recall@10 {recall:.4f} on the test set -> {out}"
