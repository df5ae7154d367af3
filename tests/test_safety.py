"""What this project never does, found by reading its code: the library, the notebooks and their helpers."""

from __future__ import annotations

import ast
import json
import sys

import pytest

from foster_lib.paths import ROOT

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
"""They read files that can run code."""

FORBIDDEN_CALLS = {
    "torch.load", "torch.save", "np.load", "np.save", "yaml.load", "yaml.full_load", "yaml.load_all",
    "yaml.dump", "os.system", "os.popen", "eval", "exec", "compile", "torch.manual_seed", "np.random.seed",
}  # fmt: skip
FORBIDDEN_METHODS = {"to_pickle", "read_pickle", "extractall", "extract", "unpack_archive"}
NETWORK = {"requests", "urllib3", "urllib.request", "http.client", "socket", "ftplib", "aiohttp", "httpx", "pooch"}
MAY_DOWNLOAD = {"foster_lib/sources/download.py"}


def sources() -> dict[str, str]:
    """Code of the library by file, and of the notebooks by cell."""
    found = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in (ROOT / "foster_lib").rglob("*.py")}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for number, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"]):
            if cell["cell_type"] == "code":
                found[f"notebooks/{path.name}, cell {number}"] = "".join(cell["source"])
    return found


def complaints(code: str, place: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(code)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            if name.partition(".")[0] in FORBIDDEN_MODULES:
                found.append(f"imports {name}")
            if place not in MAY_DOWNLOAD and (name in NETWORK or name.partition(".")[0] in NETWORK):
                found.append(f"imports {name}")
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called in FORBIDDEN_CALLS or called.rpartition(".")[2] in FORBIDDEN_METHODS:
                found.append(f"calls {called}")
            if given.get("shell", "False") != "False" or given.get("allow_pickle", "False") != "False":
                found.append(f"calls {called} with shell or allow_pickle")
            if given.get("trust_remote_code", "False") != "False":
                found.append(f"calls {called} with trust_remote_code")
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values):
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code" and ast.unparse(value) != "False":
                    found.append("sets trust_remote_code")
    return found


def test_nothing_reads_code_from_data_or_asks_the_network_unasked():
    assert len(sources()) > 60
    assert {place: found for place, code in sources().items() if (found := complaints(code, place))} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "torch.load('x', weights_only=True)",
        "archive.extractall('.')",
        "yaml.load(text, Loader=yaml.Loader)",
        "np.load('x', allow_pickle=True)",
        "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "options = {'trust_remote_code': allowed}",
        "import requests",
        "eval('1')",
    ],
)
def test_the_guard_sees_what_it_is_for(code):
    assert complaints(code, "foster_lib/new.py")


def test_templates_escape_what_they_show():
    """Jinja's escaping is on by default in the site; what is put in as HTML has been made from text by its renderer."""
    for path in (ROOT / "foster_lib" / "site_template").glob("*.j2"):
        assert "autoescape false" not in path.read_text("utf-8")
    assert "autoescape=True" in (ROOT / "foster_lib" / "site.py").read_text("utf-8")


def test_the_library_is_read_without_pickle_in_sight():
    """No committed file is a pickle or an archive of one."""
    for path in (ROOT / "results").rglob("*"):
        if path.is_file():
            assert path.suffix not in (".pt", ".pth", ".bin", ".pkl", ".npy", ".npz", ".joblib"), path
    assert sys.version_info >= (3, 11)
