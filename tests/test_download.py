"""Downloads from a local server: resumed, checked, and one clear error without a network."""

from __future__ import annotations

import gzip
import http.server
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from foster_lib.errors import FosterError
from foster_lib.paths import sha256_file
from foster_lib.sources import download as downloads


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` with ETags and ranges; sends at most `cut` bytes per answer, and logs the requests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cut: int | None = None
        self.pause = 0.0  # after each 4 KiB
        self.log: list[tuple[str, str | None, int]] = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        body, asked = self.server.files.get(self.path), self.headers.get("Range")
        if body is None:
            return self._answer(404, b"", {})
        tag = f'"{hash(body)}"'
        start = 0
        if asked and self.headers.get("If-Range") == tag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(body):
            return self._answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
        headers = {"ETag": tag, "Content-Encoding": "gzip"}  # as some servers declare a .gz file
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self._answer(206 if start else 200, body[start:], headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]):
        self.server.log.append((self.path, self.headers.get("Range"), status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = body[: self.server.cut]
        with suppress(ConnectionError):  # whoever asked may have been killed
            for start in range(0, len(body), 4096):
                self.wfile.write(body[start : start + 4096])
                time.sleep(self.server.pause)
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """A local server in the place of Amazon's data."""
    server = Server()
    monkeypatch.setitem(downloads.ADDRESSES, "amazon-2018", (server.address + "{}_5.gz", server.address + "meta_{}.gz"))
    server.files = {"/Toys_5.gz": gzip.compress(b"reviews" * 5000, mtime=0), "/meta_Toys.gz": gzip.compress(b"meta")}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def toys(folder: Path) -> list[Path]:
    return downloads.fetch("amazon-2018", "Toys", folder, progress=False)


def test_download_and_trust_on_first_use(tmp_path, server):
    """Bytes as served, though declared gzip-encoded; recorded once remembered, then neither fetched nor changed."""
    paths = toys(tmp_path)
    assert [path.read_bytes() for path in paths] == list(server.files.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Toys_5.gz", "meta_Toys.gz"]
    downloads.remember(paths)
    recorded = (tmp_path / "SHA256SUMS").read_text().splitlines()
    assert recorded == [f"{sha256_file(path)}  {path.name}" for path in paths]
    assert toys(tmp_path) == paths
    assert len(server.log) == 2
    paths[0].write_bytes(b"damaged here")
    toys(tmp_path)  # fetched again, since its hash is not the recorded one
    assert paths[0].read_bytes() == server.files["/Toys_5.gz"]
    paths[0].unlink()
    server.files["/Toys_5.gz"] = b"another file"
    with pytest.raises(FosterError, match="is not the file recorded in .*SHA256SUMS: it changed"):
        toys(tmp_path)
    downloads.remember(paths[1:])
    assert (tmp_path / "SHA256SUMS").read_text().splitlines() == recorded


def test_broken_download_is_resumed(tmp_path, server, monkeypatch):
    """Only the missing bytes are asked for, in this run and in the next one; nothing half looks whole."""
    monkeypatch.setattr(downloads, "ATTEMPTS", 2)
    body = server.files["/Toys_5.gz"] = bytes(range(256)) * 40
    server.cut = 1000
    with pytest.raises(FosterError, match=r"cannot be fetched .* a part that came is kept\. Fetch by hand .*curl -L"):
        toys(tmp_path)
    assert not (tmp_path / "Toys_5.gz").exists()
    assert (tmp_path / "Toys_5.gz.part").read_bytes() == body[:2000]
    server.cut = None
    assert toys(tmp_path)[0].read_bytes() == body
    assert [(asked, status) for path, asked, status in server.log if path == "/Toys_5.gz"] == [
        (None, 200), ("bytes=1000-", 206), ("bytes=2000-", 206),
    ]  # fmt: skip
    assert not list(tmp_path.glob("*.part*"))


def test_a_file_that_changed_between_two_parts_is_begun_anew(tmp_path, server, monkeypatch):
    """Halves of two versions are never glued together."""
    monkeypatch.setattr(downloads, "ATTEMPTS", 1)
    server.cut = 1000
    server.files["/Toys_5.gz"] = b"old" * 1000
    with pytest.raises(FosterError):
        toys(tmp_path)
    server.cut, server.files["/Toys_5.gz"] = None, b"new" * 1000
    assert toys(tmp_path)[0].read_bytes() == b"new" * 1000


def test_a_part_that_is_whole_or_too_long(tmp_path, server):
    """Killed after the last byte: moved into place. Longer than the file: begun anew."""
    body = server.files["/Toys_5.gz"]
    part, tag = tmp_path / "Toys_5.gz.part", tmp_path / "Toys_5.gz.part.tag"
    for content in (body, body + b"more"):
        part.write_bytes(content)
        tag.write_text(f'"{hash(body)}"')
        path = toys(tmp_path)[0]
        assert path.read_bytes() == body
        path.unlink()
    assert [status for path, _, status in server.log if path == "/Toys_5.gz"] == [416, 416, 200]


def test_offline_unknown_and_nonsense_categories(tmp_path, server):
    """No network: one error with the command to run by hand. An unknown category: the address is named."""
    with pytest.raises(FosterError, match=r"Tays_5\.gz does not exist: the names of the categories are at https"):
        downloads.fetch("amazon-2018", "Tays", tmp_path, progress=False)
    for category in ("../etc", "Video Games", ""):
        with pytest.raises(FosterError, match="is no name of a file"):
            downloads.fetch("amazon-2018", category, tmp_path, progress=False)
    with pytest.raises(FosterError, match="unknown edition"):
        downloads.fetch("amazon-2019", "Toys", tmp_path, progress=False)
    server.shutdown()
    server.server_close()
    curl = "curl -L --create-dirs -C - -o"
    commands = [f"{curl} '{tmp_path}/a b/{name}' {server.address}{name}" for name in ("Toys_5.gz", "meta_Toys.gz")]
    with pytest.raises(FosterError, match=r"Toys_5\.gz cannot be fetched \(ConnectionError\)") as caught:
        toys(tmp_path / "a b")
    assert str(caught.value).endswith(f": {' && '.join(commands)}")
    (tmp_path / "a b" / "Toys_5.gz").write_bytes(b"by hand")
    with pytest.raises(FosterError, match=r"meta_Toys\.gz cannot be fetched") as caught:
        toys(tmp_path / "a b")
    assert str(caught.value).endswith(f": {commands[1]}")


def test_files_fetched_by_hand_are_used(tmp_path, server):
    """What curl put there is read without a request."""
    for name in ("Toys_5.gz", "meta_Toys.gz"):
        (tmp_path / name).write_bytes(b"by hand")
    toys(tmp_path)
    assert server.log == []


def test_official_addresses():
    """The six kinds of addresses, as the data's pages give them."""
    found = [address.format("Video_Games") for pair in downloads.ADDRESSES.values() for address in pair]
    assert found == [
        "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/reviews_Video_Games_5.json.gz",
        "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/meta_Video_Games.json.gz",
        "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/categoryFilesSmall/Video_Games_5.json.gz",
        "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/metaFiles2/meta_Video_Games.json.gz",
        "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw/review_categories/Video_Games.jsonl.gz",
        "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw/meta_categories/meta_Video_Games.jsonl.gz",
    ]
