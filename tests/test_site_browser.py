"""The site on a phone, in headless Chromium."""

import http.server
import json
import shutil
import subprocess
import threading

import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_markdown_cell

from foster_lib.site import write_site
from tests.site_project import make, write, write_project

CHECK = """<!DOCTYPE html><meta charset="utf-8"><link rel="icon" href="data:,"><body style="margin:0"><script>
(async () => {
  const found = {};
  for (const name of %s) {
    const frame = document.createElement("iframe");
    frame.style = "width:390px;height:800px;border:0";
    frame.src = name;
    await new Promise(done => { frame.onload = done; document.body.append(frame); });
    const page = frame.contentDocument;
    found[name] = {
      width: page.documentElement.scrollWidth,
      broken: [...page.images].filter(image => !(image.complete && image.naturalWidth > 0)).map(image => image.src),
      images: page.images.length,
      font: frame.contentWindow.getComputedStyle(page.body).maxWidth,
    };
    frame.remove();
  }
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
})();
</script>"""


@pytest.fixture
def project(tmp_path):
    return write_project(tmp_path / "project")


@pytest.fixture
def browser():
    """Headless Chromium's path."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if shutil.which(name):
            return shutil.which(name)
    pytest.skip("no Chromium found; on Debian: apt-get install chromium")


def test_a_phone_shows_every_page(project, browser, tmp_path):
    """In a frame 390 px wide: no page scrolls sideways, all pictures load, the console is silent."""
    long = "+".join(f"x_{{{number}}}" for number in range(60))
    texts = [f"Long ${long}$ and {'word' * 40} and `{'code' * 40}`.", f"$${long}$$", f"# {'heading' * 20}"]
    write(project / "notebooks/learn_1.ipynb", new_markdown_cell("# Long\n\n" + "\n\n".join(texts)))
    make(project)
    write_site(tmp_path / "real")
    folders = ("real", "project/site")
    names = [path.relative_to(tmp_path).as_posix() for name in folders for path in (tmp_path / name).glob("*.html")]
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def do_GET(self):
            if self.path != "/check":
                return super().do_GET()
            content = (CHECK % json.dumps(names)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(content)

        def log_request(self, code="-", size="-"):
            asked.append((self.path, int(code)))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--no-first-run", "--disable-background-networking", "--hide-scrollbars"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        command += [f"--user-data-dir={tmp_path / 'browser'}", "--enable-logging=stderr", "--window-size=1200,900"]
        command += ["--virtual-time-budget=60000", "--dump-dom", f"http://127.0.0.1:{server.server_address[1]}/check"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        server.shutdown()
    result = BeautifulSoup(done.stdout, "html.parser").find(id="result")
    assert result, done.stderr[-2000:]
    found = json.loads(result.string)
    assert set(found) == set(names)
    assert {name: page["width"] for name, page in found.items() if page["width"] > 390} == {}
    assert {name: page["broken"] for name, page in found.items() if page["broken"]} == {}
    assert sum(page["images"] for page in found.values()) > len(names)
    assert {page["font"] for page in found.values()} == {"960px"}  # the style sheet is applied
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert [request for request in asked if request[1] not in (200, 304)] == []
