"""The built documentation in a browser that reaches no other server: on a desk and on a phone."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from html import unescape

import numpy as np
import pytest

from tests import interpreters
from tests.conftest import missing
from tests.pages import DOCS, ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
DESK, PHONE = 1280, 390
A_SCREEN = 1000

# A page that opens others in a frame, one after the other, and says what is seen there. A frame may be as narrow as a
# phone; the browser's window may not.
LOOKER = """<!doctype html><iframe id="frame" style="width: WIDTHpx; height: 800px; border: 0"></iframe>
<pre id="seen"></pre><script>
const pages = PAGES, seen = {}, frame = document.getElementById("frame");
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const shown = (element) => {
  if (!element || !frame.contentWindow.getComputedStyle(element).visibility.includes("visible")) return false;
  const box = element.getBoundingClientRect();
  return box.width > 0 && box.height > 0 && box.left >= 0 && box.left < WIDTH;
};
const look = async (page) => {
  await new Promise((done) => { frame.onload = done; frame.src = page; });
  const inside = frame.contentDocument;
  const summary = () => inside.querySelector(".search-summary")?.textContent;
  for (let i = 0; i < 100 && page.includes("?q=") && !/finished/.test(summary()); i++) await sleep(100);
  const images = [...inside.querySelectorAll("article img")];
  for (let i = 0; i < 100 && !images.every((image) => image.complete); i++) await sleep(100);
  const found = {
    title: inside.title,
    width: Math.max(...["html", ".content", "article"].map((part) => inside.querySelector(part)?.scrollWidth ?? 0)),
    height: inside.querySelector("article").getBoundingClientRect().height,
    code: inside.querySelectorAll("article pre").length,
    copy: inside.querySelectorAll("button.copybtn").length,
    tables: inside.querySelectorAll("article table").length,
    images: images.map((image) => image.naturalWidth),
    widest: Math.max(0, ...images.map((image) => image.getBoundingClientRect().width)),
    search: shown(inside.querySelector("input.sidebar-search")),
    results: [...inside.querySelectorAll("#search-results li a")].map((link) => link.textContent),
  };
  const menu = inside.querySelector("label.nav-overlay-icon");
  found.menu = shown(menu);
  if (found.menu) {
    inside.head.insertAdjacentHTML("beforeend", "<style>* { transition: none !important }</style>");  // no frames pass
    menu.click();
    await sleep(10);
    found.search = shown(inside.querySelector("input.sidebar-search"));
  }
  return found;
};
(async () => {
  for (const page of pages) seen[page] = await look(page);
  document.getElementById("seen").textContent = JSON.stringify(seen);
  frame.src = pages[0];
})();
</script>"""


@pytest.fixture(scope="module")
def browser(request):
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        missing(request, "a browser (Debian's chromium) is not installed", "--require-browser")
    return program


@pytest.fixture(scope="module")
def built(request, tmp_path_factory):
    """The pages, made as CONTRIBUTING says."""
    for module in ("sphinx", "furo", "myst_parser", "sphinx_copybutton"):
        try:
            __import__(module)
        except ImportError:
            pytest.skip(f"{module} is not installed")
    if not (ROOT / "benchmarks" / "results").is_dir():
        pytest.skip("installed without the recorded results, whose pictures the pages show")
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", str(DOCS), str(folder)]
    interpreters.run(command, timeout=500, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def site(built):
    """Its address, and what was asked of it."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, line, *args):
            asked.append(line % args)

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            """The browser has gone on to another page."""

    with Server(("127.0.0.1", 0), functools.partial(Handler, directory=built)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", built, asked
        finally:
            server.shutdown()
            thread.join()


def looked_at(browser, site, tmp_path, pages, width):
    """What a window of a width shows of each page."""
    url, folder, _ = site
    text = LOOKER.replace("PAGES", json.dumps(pages)).replace("WIDTH", str(width))
    (folder / "looker.html").write_text(text, encoding="utf-8")
    command = [
        browser, *QUIET, "--virtual-time-budget=120000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
        f"--window-size={max(width, 500)},900", f"{url}looker.html",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    seen = re.search(r'<pre id="seen">(.*?)</pre>', run.stdout, re.DOTALL)[1]
    assert seen, run.stdout[-2000:]
    return json.loads(unescape(seen))


def pages_of(folder):
    made = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.html"))
    return [page for page in made if page not in ("looker.html", "genindex.html", "py-modindex.html", "search.html")]


def test_all_pages_on_a_phone(browser, site, tmp_path):
    """Only tables and code scroll sideways, pictures are there and fit, and behind the menu is the search."""
    pages = pages_of(site[1])
    seen = looked_at(browser, site, tmp_path, pages, PHONE)
    assert len(seen) == len(pages) > 40
    assert {page: found["width"] for page, found in seen.items() if found["width"] > PHONE} == {}
    assert {page for page, found in seen.items() if found["widest"] > PHONE} == set()
    assert {page for page, found in seen.items() if not all(found["images"])} == set()
    programs = [page for page in pages if page.startswith("gallery/") and page != "gallery/index.html"]
    assert {page for page in programs if not (seen[page]["code"] and seen[page]["images"])} == set()
    assert {page for page, found in seen.items() if not (found["menu"] and found["search"])} == set()


def test_pages_on_a_desk(browser, site, tmp_path):
    pages = [
        "index.html", "performance.html", "gallery/index.html", "gallery/digits.html",
        "api/generated/fastbn.batch_norm.html", "conventions.html",
    ]  # fmt: skip
    start = [page for page in pages_of(site[1]) if page.startswith("start/")]
    pages += start
    seen = looked_at(browser, site, tmp_path, pages, DESK)
    for page, found in seen.items():
        assert found["search"], page
        assert found["width"] <= DESK, page
        assert all(found["images"]), page
    for page in ("index.html", "gallery/digits.html", "api/generated/fastbn.batch_norm.html", *start):
        assert seen[page]["code"] >= 1, page
        assert seen[page]["copy"] == seen[page]["code"], page
    assert len(start) == 6
    assert {page for page in start if seen[page]["height"] > A_SCREEN} == set()
    assert seen["performance.html"]["tables"] >= 6
    assert len(seen["performance.html"]["images"]) == 2
    assert len(seen["gallery/index.html"]["images"]) == len(list((ROOT / "examples").glob("*.png")))
    assert seen["conventions.html"]["tables"] == 7


def test_search_finds(browser, site, tmp_path):
    wanted = {"batch_norm": "batch_norm_backward", "cuDNN": "Conventions and migration", "whitening": "Whitening"}
    found = looked_at(browser, site, tmp_path, [f"search.html?q={word}" for word in wanted], DESK)
    for word, title in wanted.items():
        results = found[f"search.html?q={word}"]["results"]
        assert any(title in result for result in results), (word, results)


def test_nothing_is_asked_of_other_servers(site):
    _, folder, asked = site
    for page in folder.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//', text), page
    assert not [line for line in asked if " 404 " in line and "favicon" not in line]


def test_what_sticks_out_is_seen(browser, site, tmp_path):
    """The measure itself, on a page of the site with a line and a picture too much."""
    _, folder, _ = site
    page = (folder / "index.html").read_text(encoding="utf-8")
    wide = '<p style="width: 900px">x</p><img src="no.png">'
    (folder / "wide.html").write_text(page.replace("</article>", f"{wide}</article>"), encoding="utf-8")
    found = looked_at(browser, site, tmp_path, ["wide.html"], PHONE)["wide.html"]
    (folder / "wide.html").unlink()
    assert found["width"] > PHONE
    assert found["images"] == [0]


def test_a_screenshot_of_the_first_page(browser, site, tmp_path):
    """Text on white and a coloured code block, not an empty page."""
    picture = tmp_path / "page.png"
    command = [browser, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}",
               "--window-size=1280,1000", f"{site[0]}index.html"]  # fmt: skip
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    assert pixels.shape == (1000, 1280, 3)
    assert np.mean(pixels.min(axis=-1) > 0.9) > 0.7
    assert np.sum(np.ptp(pixels, axis=-1) > 0.3) > 1000
