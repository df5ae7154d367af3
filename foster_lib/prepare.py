"""From official source files to the normalised form: `python -m foster_lib.prepare games --source FOLDER`.

Writes `items.parquet`, `interactions.parquet` and `report.json` below the folder that
``FOSTER_DATA`` names, where `load_dataset` finds them. They appear when all is written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from datetime import date
from pathlib import Path
from typing import Any

from foster_lib.datasets import EMBEDDED
from foster_lib.errors import FosterError, complain
from foster_lib.paths import sha256_file, unfinished
from foster_lib.sources import FORMATS, Source, open_source
from foster_lib.sources.download import ADDRESSES, PAGES, fetch, remember
from foster_lib.sources.normalise import normalise
from foster_lib.sources.table import INTERACTION_COLUMNS, ITEM_COLUMNS, table
from foster_lib.sources.yelp import STEPS

KNOWN = {"games": "amazon-2018:Video_Games", "foods": "amazon-2014:Grocery_and_Gourmet_Food"}
"""What is downloaded for a name without --source."""

FILES = ("items.parquet", "interactions.parquet", "report.json")

EXAMPLES = """examples:
  export FOSTER_DATA=/path/to/folder
  python -m foster_lib.prepare games                                  # downloads Amazon 2018, Video Games
  python -m foster_lib.prepare games --source Video_Games_5.json.gz meta_Video_Games.json.gz
  python -m foster_lib.prepare foods --source /path/to/folder         # the folder holds reviews and metadata
  python -m foster_lib.prepare beauty --source amazon-2023:All_Beauty --core 5
  python -m foster_lib.prepare yelp --source yelp_dataset.tar --since 2019-01-01 --until 2019-12-31
  python -m foster_lib.prepare shop --format table --interactions orders.csv --items products.csv \\
      --columns user=customer,item=sku,time=ordered_at --item-columns item=sku,title=name
"""


def prepare(name: str, source: Source, root: Path, *, overwrite: bool = False, **options: Any) -> dict[str, Any]:
    """Write the data set `name` below `root` and return its report, see `normalise`.

    Parameters
    ----------
    overwrite : bool
        Replace what an earlier run wrote; without it, that is an error.
    options
        Of `normalise`: since, until, core, progress.

    Raises
    ------
    FosterError
        For a defect of the source or a folder that cannot be written; nothing is left behind then.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name == EMBEDDED:
        raise FosterError(f"'{name}' cannot name a data set: use letters, digits, '.', '_', '-', and not {EMBEDDED}.")
    if options.get("core", 0) < 0:
        raise FosterError(f"--core is {options['core']}: give 0, which keeps everything, or the K of the K-core.")
    target = Path(root).expanduser() / name
    _check_target(target, overwrite)
    try:
        with unfinished(target, folder=True) as temporary:
            report = {
                "name": name,
                **normalise(source, temporary, **options),
                "options": {key: str(value) for key, value in options.items() if value and key != "progress"},
                "sha256": {path.name: sha256_file(path) for path in source.paths},
            }
            (temporary / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            target.mkdir(exist_ok=True)
            for file in FILES:  # `load_dataset` notices interactions that do not belong to the items
                (temporary / file).replace(target / file)
    except OSError as error:
        raise FosterError(
            f"{target} cannot be written ({error.strerror or error}). Free some space, or choose another folder "
            "with --out or FOSTER_DATA."
        ) from error
    return report


def _check_target(target: Path, overwrite: bool) -> None:
    there = [file for file in FILES if (target / file).exists()]
    if there and not overwrite:
        raise FosterError(f"{target / there[0]} exists already. Add --overwrite to replace it, or choose another name.")


def summary(report: dict[str, Any], folder: Path) -> str:
    """The report as people read it."""
    written, lines = report["written"], []
    lines.append(
        f"{report['name']} ({report['format']}): {written['users']:,} users, {written['items']:,} items, "
        f"{written['interactions']:,} interactions (reading takes the 5-core) -> {folder}"
    )
    for title, counts in (("interactions", report["interaction_lines"]), ("items", report["item_lines"])):
        dropped = [
            f"{count:,} {reason.replace('_', ' ')}"
            for reason, count in counts.items()
            if reason not in ("lines", "written")
        ]
        lines.append(f"  {title}: {counts['lines']:,} lines; left out: {', '.join(dropped) or 'none'}")
    titles = [f"{count:,} {reason.replace('_', ' ')}" for reason, count in report["titles"].items()]
    lines.append(f"  titles: {', '.join(titles) or 'all present'}")
    lines.append(f"  items without a line in the metadata: {report['items_not_in_metadata']:,}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        root = options.out or os.environ.get("FOSTER_DATA")
        if not root:
            raise FosterError("where to? Set FOSTER_DATA to the folder of your data sets, or give --out FOLDER.")
        root = Path(root).expanduser()
        _check_target(root / options.name, options.overwrite)  # before anything is downloaded
        source, downloaded = _source(options, root)
        report = prepare(
            options.name,
            source,
            root,
            overwrite=options.overwrite,
            since=options.since,
            until=options.until,
            core=options.core,
            progress="" if options.quiet else options.name,
        )
        if downloaded:
            remember(source.paths)
    except FosterError as error:
        return complain(error)
    print(summary(report, root / options.name))
    return 0


def _source(options: argparse.Namespace, root: Path) -> tuple[Source, bool]:
    """The source that the command line names, and whether it was downloaded."""
    if options.format == "table" or options.interactions or options.items:
        if not (options.interactions and options.items) or options.source:
            raise FosterError("tables of your own need --interactions FILE and --items FILE, and no --source.")
        columns, item_columns = _pairs(options.columns, "--columns"), _pairs(options.item_columns, "--item-columns")
        return table(options.interactions, options.items, columns, item_columns), False
    if options.columns or options.item_columns:
        raise FosterError("--columns and --item-columns belong to --interactions and --items.")
    wanted = options.source or ([KNOWN[options.name]] if options.name in KNOWN else [])
    if not wanted:
        raise FosterError(
            f"{STEPS}." if options.name == "yelp" else f"where is '{options.name}'? Name its files with --source."
        )
    edition, colon, category = wanted[0].partition(":")
    if len(wanted) == 1 and colon and edition in ADDRESSES and not Path(wanted[0]).exists():
        if options.format not in (None, edition):
            raise FosterError(f"--format {options.format} does not fit --source {wanted[0]}: leave it out.")
        folder = options.downloads or root / "downloads"
        print(f"{edition}, {category}: for research use, terms and papers to cite are at {PAGES[edition]}")
        return open_source(fetch(edition, category, folder, progress=not options.quiet), edition), True
    return open_source(wanted, options.format), False


def _pairs(text: str, option: str) -> dict[str, str]:
    """`user=customer,item=sku` as a dictionary."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    if any(not key or not name for key, _, name in pairs):
        raise FosterError(f"{option} {text}: write it as user=NAME,item=NAME, without blanks.")
    return {key: name for key, _, name in pairs}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m foster_lib.prepare",
        description="Turn official source files into items.parquet and interactions.parquet.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="name of the data set: games, foods, yelp, or one of your own")
    parser.add_argument("--source", nargs="+", metavar="PATH", help="folder, archive or files; or EDITION:CATEGORY to "
                        f"download ({', '.join(ADDRESSES)}); default for games and foods: "
                        + ", ".join(KNOWN.values()))  # fmt: skip
    parser.add_argument("--format", choices=FORMATS, help="default: found out from the fields of the files")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="holds one folder per data set; default: FOSTER_DATA"
    )
    parser.add_argument("--downloads", type=Path, metavar="FOLDER", help="default: downloads/ in the folder of --out")
    parser.add_argument("--since", type=_day, metavar="DAY", help="first day to keep, as 2019-01-01 (UTC)")
    parser.add_argument("--until", type=_day, metavar="DAY", help="last day to keep")
    parser.add_argument("--core", type=int, default=0, metavar="K", help="drop users and items outside the K-core now: "
                        "smaller files, and up to K = 5 the same data set, since reading takes the 5-core")  # fmt: skip
    parser.add_argument("--interactions", type=Path, metavar="FILE", help="CSV, TSV, JSON lines or parquet of your own")
    parser.add_argument("--items", type=Path, metavar="FILE", help="the same for the items")
    parser.add_argument("--columns", default="", metavar="KEY=NAME,…", help=_keys(INTERACTION_COLUMNS))
    parser.add_argument("--item-columns", default="", metavar="KEY=NAME,…", help=_keys(ITEM_COLUMNS))
    parser.add_argument("--overwrite", action="store_true", help="replace the data set if it is there")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def _keys(columns: dict[str, str]) -> str:
    return "names of your columns where they differ: " + ", ".join(f"{key}={name}" for key, name in columns.items())


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no day; write it as 2019-01-31") from None


if __name__ == "__main__":
    sys.exit(main())
