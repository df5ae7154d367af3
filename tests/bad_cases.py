"""Bad input by name: how it is made, the command that meets it, and what the answer must say."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.shop import PROFILE

Damage = Callable[[Path], object]

PREPARE = ["prepare", "new", "--out", "data", "--interactions", "orders.csv", "--items", "products.csv", "--columns"]
PREPARE += ["user=customer", "--item-columns", "item=sku", "--quiet"]
TRAIN = ["train", "data/shop", "--out", "new", "--profile", "mini", "--device", "cpu"]
DISTIL = ["distill", "data/shop", "--out", "new", "--profile", "mini", "--device", "cpu"]
RECOMMEND = ["recommend", "shop4", "i1"]
EXPORT = ["export", "shop4", "--format", "parquet", "--out", "new.parquet"]
ITEMS, BOUGHT = "data/shop/items.parquet", "data/shop/interactions.parquet"
WEIGHTS, SEQUENCES = "shop4/weights.safetensors", "shop4/sequences.safetensors"
NOTEBOOK = ["reproduce", "table2", "--profile", "mini"]
YELP = ["prepare", "yelp", "--source", "yelp.tar", "--out", "data", "--quiet"]


def put(name: str, content: bytes | str) -> Damage:
    """The file `name` with other content."""
    data = content.encode() if isinstance(content, str) else content
    return lambda shop: (shop / name).write_bytes(data)


def cut(name: str, share: float = 0.5) -> Damage:
    def damage(shop: Path) -> None:
        path = shop / name
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return damage


def gone(name: str) -> Damage:
    return lambda shop: (shop / name).unlink()


def replaced_by_folder(name: str) -> Damage:
    def damage(shop: Path) -> None:
        (shop / name).unlink(missing_ok=True)
        (shop / name).mkdir()

    return damage


def linked(name: str, target: str) -> Damage:
    def damage(shop: Path) -> None:
        (shop / name).unlink(missing_ok=True)
        (shop / name).symlink_to(target)

    return damage


def column(name: str, key: str, change: Callable[[pd.Series], object]) -> Damage:
    """Another column of a parquet file."""

    def damage(shop: Path) -> None:
        table = pd.read_parquet(shop / name)
        table.assign(**{key: change(table[key])}).to_parquet(shop / name, index=False)

    return damage


def table(name: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Damage:
    return lambda shop: change(pd.read_parquet(shop / name)).to_parquet(shop / name, index=False)


def one(value: object, row: int = 3) -> Callable[[pd.Series], pd.Series]:
    """One cell of a column."""
    return lambda cells: cells.astype(object).where(np.arange(len(cells)) != row, value)


def number(value: float, row: int = 3) -> Callable[[pd.Series], pd.Series]:
    return lambda cells: cells.astype(float).where(np.arange(len(cells)) != row, value)


def tensor(name: str, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def damage(shop: Path) -> None:
        tensors = load_file(shop / name)
        save_file({**tensors, key: change(tensors[key])}, shop / name)

    return damage


def described(**changes: object) -> Damage:
    """Other entries of recommender.json; a dictionary changes a group of settings."""

    def damage(shop: Path) -> None:
        path = shop / "shop4" / "recommender.json"
        about = json.loads(path.read_text())
        for key, value in changes.items():
            about["settings"][key] = {**about["settings"][key], **value}
        path.write_text(json.dumps(about))

    return damage


def profile(**changes: object) -> Damage:
    """The profile with other keys; a dictionary changes a section."""
    content = {key: {**PROFILE.get(key, {}), **value} if isinstance(value, dict) else value
               for key, value in changes.items()}  # fmt: skip
    return put("profiles/mini.yaml", yaml.safe_dump({**PROFILE, **content}))


def orders(change: Callable[[pd.DataFrame], pd.DataFrame], name: str = "orders.csv", **options) -> Damage:
    return lambda shop: change(pd.read_csv(shop / "orders.csv")).to_csv(shop / name, index=False, **options)


def products(lines: str) -> Damage:
    return put("products.csv", "sku,title\n" + lines)


def archive(*entries: tuple[str, str | bytes]) -> Damage:
    """yelp.tar of members with content, or of links (content: where to)."""

    def damage(shop: Path) -> None:
        with tarfile.open(shop / "yelp.tar", "w") as tar:
            for name, content in entries:
                info = tarfile.TarInfo(name)
                if isinstance(content, str):
                    info.type, info.linkname = tarfile.SYMTYPE, content
                    tar.addfile(info)
                else:
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))

    return damage


def named(command: list[str], **files: str) -> list[str]:
    """A command with other files in the place of orders.csv and products.csv."""
    return [files.get(word.partition(".")[0], word) for word in command]


BILLION = gzip.compress(b"a" * 10**7) * 100  # gzip files may be written one after the other

REVIEW = b'{"review_id": "r", "user_id": "u", "business_id": "b", "date": "2019-01-01"}\n'
BUSINESS = b'{"business_id": "b", "name": "n"}\n'

nothing: Damage = lambda shop: None  # noqa: E731

CASES: dict[str, tuple[Damage, list[str], str]] = {
    # ------------------------------------------------------- a CSV of one's own
    "CSV: empty": (put("orders.csv", ""), PREPARE, "orders.csv cannot be read as csv .No columns.*export it again"),
    "CSV: header only": (put("orders.csv", "customer,item_id,timestamp\n"), PREPARE, "no interaction is left"),
    "CSV: binary": (put("orders.csv", bytes(range(256)) * 9), PREPARE, "orders.csv cannot be read as csv"),
    "CSV: UTF-16": (put("orders.csv", "customer,item_id\n".encode("utf-16")), PREPARE, "cannot be read as csv"),
    "CSV: Latin-1": (put("orders.csv", b"customer,item_id,timestamp\nBj\xf6rn,i1,1\n"), PREPARE, "as csv .*utf-8"),
    "CSV: semicolons": (orders(lambda x: x, sep=";"), PREPARE, "is missing .found: customer;item_id"),
    "CSV: ragged": (put("orders.csv", "customer,item_id,timestamp\na,b,1\na,b,c,d,e\n"), PREPARE, "line 3, saw 5"),
    "CSV: open quote": (put("orders.csv", 'customer,item_id,timestamp\n"a,i1,1\na,i2,2\n'), PREPARE, "inside string"),
    "CSV: columns twice": (put("orders.csv", "customer,customer,timestamp\na,b,1\n"), PREPARE, "'item_id' is missing"),
    "CSV: a folder": (replaced_by_folder("orders.csv"), PREPARE, "orders.csv cannot be read .Is a directory"),
    "CSV: absent": (gone("orders.csv"), PREPARE, "orders.csv cannot be read .No such file"),
    "CSV: link to nowhere": (linked("orders.csv", "/nowhere"), PREPARE, "orders.csv cannot be read .No such file"),
    "CSV: link to itself": (linked("orders.csv", "orders.csv"), PREPARE, "orders.csv cannot be read .Too many levels"),
    "CSV: is parquet": (
        lambda shop: shutil.copy(shop / ITEMS, shop / "products.csv"), PREPARE,
        "products.csv cannot be read as csv|column 'sku' is missing",
    ),
    "CSV: a title of a billion characters": (
        put("products.csv.gz", BILLION), named(PREPARE, products="products.csv.gz"),
        "products.csv.gz: a line is longer than 16 MiB.*right file",
    ),
    "CSV: times that are none": (
        orders(lambda x: x.assign(timestamp=np.resize(["noon", "NaN", "inf", "-1", ""], len(x)))), PREPARE,
        "no interaction is left .*without time",
    ),
    "CSV: items of another shop": (products("x,Teapot\ny,Cup\n"), PREPARE, "no interaction is left .*not in metadata"),
    "CSV: no titles": (
        lambda shop: pd.read_csv(shop / "products.csv").assign(title=" ", categories="").to_csv(shop / "products.csv"),
        PREPARE, "no interaction is left .*without text",
    ),
    "gzip: cut off": (
        lambda shop: (shop / "o.csv.gz").write_bytes(gzip.compress((shop / "orders.csv").read_bytes())[:900]),
        named(PREPARE, orders="o.csv.gz"), "o.csv.gz cannot be read",
    ),
    "gzip: none": (
        put("o.csv.gz", "customer,item_id"), named(PREPARE, orders="o.csv.gz"), "cannot be read .Not a gzip",
    ),
    "parquet: is CSV": (
        lambda shop: shutil.copy(shop / "orders.csv", shop / "o.parquet"), named(PREPARE, orders="o.parquet"),
        "o.parquet cannot be read as parquet",
    ),
    "JSON lines: lists": (put("o.jsonl", "[1, 2]\n" * 20), named(PREPARE, orders="o.jsonl"), "are no records"),
    "JSON lines: nested without end": (put("o.jsonl", '{"customer":' * 20_000), named(PREPARE, orders="o.jsonl"),
                                       "o.jsonl.* no records"),
    "JSON lines: cut off": (
        put("o.jsonl", '{"customer": "a", "item_id": "i1", "timestamp": 1}\n{"cust'), named(PREPARE, orders="o.jsonl"),
        "o.jsonl is cut off",
    ),
    "JSON lines: a title of a billion characters": (
        put("p.jsonl.gz", BILLION), named(PREPARE, products="p.jsonl.gz"), "p.jsonl.gz: line 1 is longer than 16 MiB",
    ),
    "table: unknown kind": (put("o.xlsx", "PK"), named(PREPARE, orders="o.xlsx"), "unknown kind of table .o.xlsx"),
    "table: unknown key": (nothing, [*PREPARE, "--columns", "who=customer"], "unknown column .* 'who'"),
    "table: core below zero": (nothing, [*PREPARE, "--core", "-1"], "--core is -1"),
    "table: name with a path": (nothing, ["prepare", "../up", *PREPARE[2:]], "cannot name a data set"),
    "table: days of plain numbers": (nothing, [*PREPARE, "--since", "2019-01-01"], "plain numbers, so --since"),
    "table: out is a file": (nothing, named(PREPARE, data="orders.csv"), "new cannot be written"),
    "table: out cannot be written": (nothing, named(PREPARE, data="/proc/data"), "/proc/data/new cannot be written"),
    # --------------------------------------------------------------- official archives and downloads
    "archive: zip": (put("yelp.zip", "PK\3\4"), named(YELP, yelp="yelp.zip")[:1] + ["yelp", "--source", "yelp.zip",
                     "--out", "data"], "is a zip archive: unzip it"),
    "archive: cut off": (
        lambda shop: (archive(("review.json", REVIEW * 999), ("business.json", BUSINESS))(shop), cut("yelp.tar")(shop)),
        YELP, "yelp.tar.* cut off or damaged",
    ),
    "archive: a link out of the folder": (
        archive(("review.json", REVIEW), ("business.json", "/etc/passwd")), YELP, "found the reviews of yelp .*not its",
    ),
    "archive: members with paths, nothing in them": (
        archive(("../../review.json", REVIEW), ("/tmp/business.json", BUSINESS)), [*YELP, "--since", "2020-01-01"],
        "no interaction is left .*outside dates",
    ),
    "archive: empty": (put("yelp.tar", ""), YELP, "Yelp's licence|there is no file of records|no file has the fields"),
    "download: unknown category": (
        nothing, ["prepare", "toys", "--source", "amazon-2018:../etc", "--out", "data"], "'../etc' is no name of",
    ),
    # -------------------------------------------------------------------- a prepared data set
    "items: cut off": (cut(ITEMS), TRAIN, "items.parquet is not a readable .*fetch it again"),
    "items: empty": (put(ITEMS, ""), TRAIN, "items.parquet is not a readable"),
    "items: absent": (gone(ITEMS), [*TRAIN[:1], "shop", *TRAIN[2:]], "items.parquet is missing"),
    "items: a device": (linked(ITEMS, "/dev/zero"), TRAIN, "items.parquet is missing"),
    "items: a folder": (replaced_by_folder(ITEMS), TRAIN, "items.parquet is missing"),
    "items: no title": (table(ITEMS, lambda x: x.drop(columns="title")), TRAIN, "'title' is missing"),
    "items: an id twice": (column(ITEMS, "item_id", one("i0")), TRAIN, "row 3: item_id 'i0' .*twice"),
    "items: no id": (column(ITEMS, "item_id", one(None)), TRAIN, "row 3: item_id is empty"),
    "items: no text": (
        table(ITEMS, lambda x: x.assign(title="", categories="", brand=None)), TRAIN,
        "row 0: item '.*' has no text",
    ),
    "interactions: is JSON": (put(BOUGHT, "{}"), TRAIN, "not a readable parquet"),
    "interactions: none": (table(BOUGHT, lambda x: x[:0]), TRAIN, "only 0 users are left"),
    "interactions: few": (table(BOUGHT, lambda x: x[:100]), TRAIN, "at least 20 are needed"),
    "interactions: no user": (column(BOUGHT, "user_id", one(None)), TRAIN, "user_id is empty"),
    "interactions: unknown item": (
        column(BOUGHT, "item_id", one("ghost")), TRAIN, "row 3: item 'ghost' is not in items",
    ),
    "interactions: NaN": (column(BOUGHT, "timestamp", number(np.nan)), TRAIN, "timestamp is .*nan"),
    "interactions: infinite": (
        column(BOUGHT, "timestamp", number(np.inf)), TRAIN, "timestamp is .*inf",
    ),
    "interactions: before all time": (
        column(BOUGHT, "timestamp", number(-1)), TRAIN, "timestamp is .*not negative",
    ),
    "interactions: words for times": (
        column(BOUGHT, "timestamp", lambda x: x.astype(str) + " o'clock"), TRAIN, "row 0: timestamp",
    ),
    "data set: unknown": (nothing, ["train", "shoq", *TRAIN[2:]], "shoq.items.parquet is missing"),
    "data set: only positions": (
        table(BOUGHT, lambda x: x.assign(timestamp=x.groupby("user_id").cumcount())),
        [*TRAIN, "--split", "temporal"], "a temporal split is not possible",
    ),
    # ------------------------------------------------------------------ a recommender's folder
    "recommender: empty": (put("shop4/recommender.json", ""), RECOMMEND, "recommender.json is damaged.*Train again"),
    "recommender: a list": (put("shop4/recommender.json", "[]"), RECOMMEND, "recommender.json is damaged"),
    "recommender: binary": (put("shop4/recommender.json", b"\xff\xfe\0"), RECOMMEND, "recommender.json is damaged"),
    "recommender: a width of zero": (
        described(model={"width": 0}), RECOMMEND, "width must be a whole number of at least",
    ),
    "recommender: no such encoder": (
        described(encoder={"name": "/nowhere"}), RECOMMEND, "encoder '/nowhere' cannot be",
    ),
    "weights: cut off": (cut(WEIGHTS), RECOMMEND, "shop4 is damaged .*Train again"),
    "weights: empty": (put(WEIGHTS, ""), RECOMMEND, "shop4 is damaged"),
    "weights: a pickle": (put(WEIGHTS, pickle.dumps({"a": 1})), RECOMMEND, "shop4 is damaged"),
    "weights: NaN": (
        tensor(WEIGHTS, "adapter.linear.bias", lambda x: x * torch.nan), RECOMMEND, "not finite",
    ),
    "weights: of another shape": (
        tensor(WEIGHTS, "adapter.linear.bias", lambda x: x[:1].clone()), RECOMMEND, "does not fit",
    ),
    "catalogue: cut off": (cut("shop4/items.parquet"), RECOMMEND, "shop4 is damaged"),
    "catalogue: another column": (
        table("shop4/items.parquet", lambda x: x.drop(columns="text")), RECOMMEND, "is damaged",
    ),
    "catalogue: an item less": (table("shop4/items.parquet", lambda x: x[1:]), RECOMMEND, "not as it was written"),
    "catalogue: an id twice": (column("shop4/items.parquet", "item_id", one("i0")), RECOMMEND, "not as it was written"),
    "catalogue: no title": (column("shop4/items.parquet", "title", one(None)), RECOMMEND, "not as it was written"),
    "sequences: cut off": (cut(SEQUENCES), EXPORT, "no readable.*Distil"),
    "sequences: empty": (put(SEQUENCES, ""), EXPORT, "no readable"),
    "sequences: NaN": (tensor(SEQUENCES, "labels", lambda x: x * torch.nan), EXPORT, "is damaged"),
    "sequences: infinite": (tensor(SEQUENCES, "bonus", lambda x: x + torch.inf), EXPORT, "is damaged"),
    "sequences: other shapes": (
        tensor(SEQUENCES, "mask", lambda x: x[:, :1].clone()), EXPORT, "shapes that differ",
    ),
    "sequences: of other items": (
        tensor(SEQUENCES, "items", lambda x: x + 1000), EXPORT, "refer to other items",
    ),
    "sequences: described by a list": (put("shop4/sequences.json", "[]"), EXPORT, "does not name the method"),
    "export: cannot be written": (nothing, [*EXPORT[:-1], "/proc/new.parquet"], "new.parquet: cannot be written"),
    "export: over a folder": (
        replaced_by_folder("new.parquet"), [*EXPORT, "--overwrite"], "cannot be written .Is a dir",
    ),
    # ------------------------------------------------------------------------------- profiles
    "profile: unknown": (nothing, [*TRAIN, "--profile", "mino"], "unknown profile 'mino'. Did you mean 'mini'"),
    "profile: empty": (put("profiles/mini.yaml", ""), TRAIN, "a profile holds keys and values"),
    "profile: a list": (put("profiles/mini.yaml", "- a\n- b\n"), TRAIN, "keys and values, this file a list"),
    "profile: a text": (put("profiles/mini.yaml", "epochs 3"), TRAIN, "keys and values, this file a str"),
    "profile: no YAML": (put("profiles/mini.yaml", "full: {epochs: 3"), TRAIN, "mini.yaml: not valid YAML"),
    "profile: binary": (put("profiles/mini.yaml", b"\xff\xfe\0\1"), TRAIN, "mini.yaml: not valid YAML"),
    "profile: code": (
        put("profiles/mini.yaml", "full: !!python/object/apply:os.system ['touch obeyed']"), TRAIN, "not valid YAML",
    ),
    "profile: cut off": (put("profiles/mini.yaml", "full: {epochs: 1"), TRAIN, "mini.yaml.*not valid YAML"),
    "profile: unknown key": (profile(ful={}), TRAIN, "'ful'. Did you mean 'full'"),
    "profile: unknown base": (profile(base="cqu"), TRAIN, "unknown base of profile mini.yaml: 'cqu'"),
    "profile: its own base": (profile(base="mini"), TRAIN, "mini.yaml: the profile extends itself"),
    "profile: a number for a section": (profile(full=3), TRAIN, "full must hold keys and values, not 3"),
    "profile: a number for a method": (profile(methods={"foster": 3}), DISTIL, "methods.foster must hold keys"),
    "profile: a number for a data set": (profile(per_dataset={"shop": 3}), TRAIN, "per_dataset.shop must hold keys"),
    "profile: a word for the seeds": (profile(seeds="all"), TRAIN, "seeds must be a list, not 'all'"),
    "profile: no width": (profile(model={"width": 0}), TRAIN, "width must be a whole number of at least 1, not 0"),
    "profile: no heads": (profile(model={"heads": 0}), TRAIN, "heads must be a whole number"),
    "profile: dropout of all": (profile(model={"dropout": 1.0}), TRAIN, "dropout must be .* below 1, not 1.0"),
    "profile: epochs below zero": (profile(full={"epochs": -1}), TRAIN, "epochs must be a whole number"),
    "profile: half an epoch": (profile(full={"epochs": 2.5}), TRAIN, "epochs must be a whole number"),
    "profile: yes": (profile(full={"epochs": True}), TRAIN, "epochs must be a number .*, not True"),
    "profile: no batch": (profile(full={"batch_size": 0}), TRAIN, "batch_size must be a whole number"),
    "profile: learning rate NaN": (
        profile(full={"learning_rate": float("nan")}), TRAIN, "learning_rate must .* not nan",
    ),
    "profile: learning rate infinite": (
        profile(full={"learning_rate": float("inf")}), TRAIN, "learning_rate must .*inf",
    ),
    "profile: never validated": (
        profile(student={"validate_every": 0}), DISTIL, "validate_every must be a whole number",
    ),
    "profile: sequences below zero": (profile(sequences=-3), DISTIL, "sequences must be a whole number"),
    "profile: no students": (profile(students=0), TRAIN, "students must be a whole number"),
    "profile: unknown encoder": (profile(encoder={"name": "tinny"}), TRAIN, "encoder 'tinny' cannot be loaded"),
    "profile: layers that are not there": (profile(encoder={"tuned_layers": 9}), TRAIN, "tuned_layers=9 does not fit"),
    "method: no iterations": (profile(methods={"foster": {"iterations": 0}}), DISTIL, "iterations must be a whole"),
    "method: a subset below zero": (profile(methods={"foster": {"subset": -5}}), DISTIL, "subset must be a whole"),
    "method: unknown": (nothing, [*DISTIL, "--method", "foser"], "'foser'. Did you mean 'foster'"),
    "method: unknown parameter": (profile(methods={"foster": {"iteration": 3}}), DISTIL, "'iteration'. Did you mean"),
    "training: explodes": (
        nothing, [*TRAIN, "--set", "full.learning_rate=1.0e+29"], "loss is (nan|inf) at step .*Lower the learning rate",
    ),
    "distillation: explodes": (
        nothing, [*DISTIL, "--set", "methods.foster.label_learning_rate=1.0e+29"], "diverged.*ower the learning rate",
    ),
    "sequences: more than users": (nothing, [*DISTIL, "--method", "random", "--sequences", "61"], "61 .*60 users"),
    "results: a file": (
        put("results2", ""), TRAIN, "cannot be written .Not a directory|cannot be written .File exists",
    ),
    # ------------------------------------------------------------------- notebooks and tables
    "notebook: cut off": (cut("notebooks/table2.ipynb"), NOTEBOOK, "no readable notebook.*git checkout"),
    "notebook: empty": (put("notebooks/table2.ipynb", ""), NOTEBOOK, "table2.ipynb: no readable notebook"),
    "notebook: a list": (put("notebooks/table2.ipynb", "[]"), NOTEBOOK, "table2.ipynb: no readable notebook"),
    "notebook: unknown": (nothing, ["reproduce", "tabel2"], "unknown notebook 'tabel2'. Did you mean 'table2'"),
    "notebook: unknown parameter": (nothing, [*NOTEBOOK, "-p", "seeed", "1"], "'seeed'. Did you mean 'seed'"),
    "notebook: a word for a number": (nothing, [*NOTEBOOK, "-p", "seed", "one"], "'seed' must be of type int"),
    "notebook: nowhere to write": (put("results2", ""), NOTEBOOK, "table2.ipynb cannot be written"),
    "table: absent": (
        nothing, ["verify", "--profile", "mini", "--datasets", "shop"], "no readable table. Make it with",
    ),
    "table: other columns": (
        lambda shop: (shop / "results/table2").mkdir() or put("results/table2/table2.csv", "a,b\n1,2\n")(shop),
        ["verify", "--profile", "mini", "--datasets", "shop"], "no readable table",
    ),
    "table: of another data set": (nothing, ["verify", "--profile", "mino"], "unknown profile 'mino'"),
    "search: unknown data set": (nothing, ["tune", "--datasets", "shop"], "unknown data set in search.yaml: 'shop'"),
    "statistics: unknown data set": (nothing, ["statistics", "--datasets", "shoq", "--encoder", "tiny"], "is missing"),
    "statistics: unknown split": (
        nothing, ["statistics", "--datasets", "shop", "--encoder", "tiny", "--split", "d"], "unknown split 'd'",
    ),
    "site: over something else": (nothing, ["site", "--out", "data"], "data: holds something else than a site"),
    "device: unknown": (nothing, [*TRAIN, "--device", "gpu"], "unknown device 'gpu'"),
    "recommend: a title of a million characters": (nothing, ["recommend", "shop4", "a" * 10**6], "no item has the id"),
    "recommend: below zero": (nothing, [*RECOMMEND, "-k", "-3"], "ask for at least one"),
    "export: below zero": (nothing, [*EXPORT, "--top", "-1"], "--top is -1"),
    "sequences: below zero": (nothing, [*DISTIL, "--sequences", "-2"], "sequences is -2"),
}  # fmt: skip
