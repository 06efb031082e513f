"""The recorded history: asv's pages, opened in a browser that reaches no other server, and the picture."""

import contextlib
import functools
import http.server
import json
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest

from tests.conftest import missing

publish = pytest.importorskip("benchmarks.publish", reason="installed without the benchmarks")
RECORDED = publish.ROOT / "benchmarks" / "results" / "asv"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=20000",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--window-size=1400,1000",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(request):
    """Opens a page of the published site; gives its document and its picture."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    for what, found in (("a browser (Debian's chromium)", program), ("npm", shutil.which("npm"))):
        if found is None:
            missing(request, f"{what} is not installed", "--require-browser")
    pytest.importorskip("asv")
    git = subprocess.run(["git", "cat-file", "-e", oldest()], cwd=publish.ROOT, capture_output=True, check=False)
    if git.returncode:
        pytest.skip("not a clone with its history")
    return program


def oldest():
    return min(RECORDED.glob("*/*-*.json"), key=lambda path: json.loads(path.read_text())["date"]).name.split("-")[0]


@pytest.fixture(scope="module")
def site(browser, tmp_path_factory):
    """The pages on a server of this machine, and what was asked of it."""
    folder = tmp_path_factory.mktemp("site")
    publish.publish(folder)
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, line, *args):
            asked.append(line % args)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", folder, asked
        finally:
            server.shutdown()
            thread.join()


def opened(browser, url, tmp_path):
    """The document after its scripts ran, and its pixels."""
    picture = tmp_path / "page.png"
    outputs = []
    for option in ("--dump-dom", f"--screenshot={picture}"):
        command = [browser, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", option, url]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        outputs.append(run.stdout)
    from matplotlib.image import imread

    return outputs[0], imread(picture)


def coloured(pixels):
    """Where pixels are neither grey nor pale."""
    return np.ptp(pixels[..., :3], axis=-1) > 0.3


@pytest.mark.parametrize("benchmark", ["kernels.Forward.track_times_limit", "kernels.Backward.time_call"])
def test_graphs_are_drawn(browser, site, tmp_path, benchmark):
    url, _, asked = site
    document, pixels = opened(browser, f"{url}#{benchmark}?x-axis=commit", tmp_path)
    assert document.count('class="flot-base"') == 2  # the graph, and the one to choose a part of it
    assert "backend-numpy; dtype-float32; layout-NHWC; workload-resnet50_56x56x256" in document
    assert "Failed to load" not in document
    graph = coloured(pixels[100:860, 640:1370])  # right of the legend
    columns = graph.any(axis=0)
    assert columns.mean() > 0.7, "lines go from commit to commit"
    assert graph.sum() > 1000
    assert any(re.search(r"GET /graphs/.*/kernels\.\w+\.\w+\.json.* 200", line) for line in asked)
    assert not [line for line in asked if " 404 " in line]


def test_every_library_lies_beside_the_page(site):
    _, folder, asked = site
    assert {path.name for path in (folder / "libraries").iterdir()} == set(publish.LIBRARIES)
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert not re.search(r'<(script|link)[^>]*(src|href)="https?:', page)
    assert any("GET /libraries/jquery-3.3.1.min.js" in line for line in asked)


def test_the_picture(tmp_path):
    pytest.importorskip("asv")
    path = tmp_path / "history.png"
    assert publish.main(["--picture", str(path)]) == 0
    assert path.stat().st_size < 150_000
    from matplotlib.image import imread

    assert coloured(imread(path)).sum() > 1000


def test_the_history_got_better():
    """Of commits since the kernels became fast; the last is not the slowest."""
    pytest.importorskip("asv")
    for name in ("Forward", "Backward", "Inference"):
        points = publish.history(
            f"kernels.{name}.track_times_limit", ("numpy", "resnet50_56x56x256", "NHWC", "float32")
        )
        assert len(points) >= 5
        assert points[-1].value < points[0].value


def test_nothing_asked(capsys):
    with contextlib.suppress(SystemExit):
        publish.main([])
    assert "nothing to do" in capsys.readouterr().err


def test_recorded_runs_say_nothing_of_their_place():
    for path in RECORDED.rglob("*.json"):
        assert not re.search(r"/(work|home|root|tmp)/", path.read_text(encoding="utf-8")), path
