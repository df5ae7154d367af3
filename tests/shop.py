"""A shop to try the command line on: a CSV of orders, one of products, and the small profile `mini`."""

import socket

import yaml
from typer.testing import CliRunner

import foster_lib.config
from foster_lib.cli import app
from foster_lib.runs import load_catalogue, load_once
from tests.conftest import make_tables

PROFILE = {
    "sequences": 4,
    "encoder": {"name": "tiny"},
    "model": {"width": 16, "adapter_hidden": 8, "layers": 1, "heads": 2, "length": 6},
    "full": {"learning_rate": 1e-2, "epochs": 10, "batch_size": 16},
    "student": {"learning_rate": 2e-2, "epochs": 10, "validate_every": 5},
    "methods": {
        "foster": {"iterations": 2, "subset": 16, "windows": 4, "pool": 1},
        "foster-tied": {"iterations": 2, "subset": 16, "windows": 4, "pool": 1},
        "foster-decoded": {"iterations": 2, "subset": 16, "windows": 4, "pool": 1},
        "foster-late": {"iterations": 2, "subset": 16, "windows": 4, "pool": 1},
        "td3": {"outer_steps": 2, "inner_steps": 2, "window": 1},
        "farzi": {"outer_steps": 2, "inner_steps": 2},
    },
}


def make_shop(patch, folder):
    """Write the CSVs and the profile to `folder`; what prepare, distill and train make of them lies beside."""
    items, interactions = make_tables()
    items.loc[0, "title"] = "Büro, \"groß\"\tund 'klein'"
    items.loc[1:2, "title"] = "the same"
    items.rename(columns={"item_id": "sku"}).to_csv(folder / "products.csv", index=False)
    interactions.rename(columns={"user_id": "customer"}).to_csv(folder / "orders.csv", index=False)
    write_profile(folder, PROFILE)
    settle(patch, folder)
    ok("prepare", "shop", "--out", "data", "--interactions", "orders.csv", "--items", "products.csv", "--columns",
       "user=customer", "--item-columns", "item=sku")  # fmt: skip
    ok("distill", "data/shop", "--out", "shop4", "--profile", "mini")
    ok("train", "data/shop", "--out", "full", "--profile", "mini")
    return folder


def write_profile(folder, content):
    (folder / "profiles").mkdir(exist_ok=True)
    (folder / "profiles" / "mini.yaml").write_text(yaml.safe_dump(content))


def settle(patch, folder):
    """Work in `folder`, with the profile `mini` and without a network."""
    patch.chdir(folder)
    patch.setattr(foster_lib.config, "PROFILES", folder / "profiles")
    patch.setattr(socket.socket, "connect", _no_network)
    patch.setenv("FOSTER_DATA", str(folder / "data"))
    patch.setenv("FOSTER_RESULTS", str(folder / "results"))
    patch.setenv("FOSTER_CACHE", str(folder / "cache"))
    load_once.cache_clear()
    load_catalogue.cache_clear()


def _no_network(self, address):
    raise AssertionError(f"the network was asked: {address}")


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ok(*arguments):
    result = call(*arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
