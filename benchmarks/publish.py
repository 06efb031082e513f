"""The recorded history as pages and as a picture: ``python -m benchmarks.publish --pages FOLDER --picture FILE``.

The pages are asv's. It has them load their libraries from other people's servers; here these lie beside them, fetched
by npm once: the folder is whole, and any static host serves it (``python -m http.server --directory FOLDER`` here).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import itertools
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gate import ROOT, settings_of

LIBRARIES = {
    "jquery-3.3.1.min.js": ("jquery@3.3.1", "dist/jquery.min.js"),
    "jquery.flot.min.js": ("flot@0.8.3", "jquery.flot.js"),
    "jquery.flot.time.min.js": ("flot@0.8.3", "jquery.flot.time.js"),
    "jquery.flot.selection.min.js": ("flot@0.8.3", "jquery.flot.selection.js"),
    "jquery.flot.categories.min.js": ("flot@0.8.3", "jquery.flot.categories.js"),
    "jquery.flot.orderBars.js": ("flot-orderbars@1.0.0", "js/jquery.flot.orderBars.js"),
    "stupidtable.min.js": ("stupid-table-plugin@1.1.3", "stupidtable.min.js"),
    "md5.min.js": ("blueimp-md5@2.19.0", "js/md5.min.js"),
    "bootstrap.min.js": ("bootstrap@3.1.1", "dist/js/bootstrap.min.js"),
    "bootstrap.min.css": ("bootstrap@3.1.1", "dist/css/bootstrap.min.css"),
}
"""npm's package and its file for each that asv's page asks for; of flot there are no shortened ones."""
REMOTE = re.compile(r'(?P<before>(?:src|href)=")https://[^"]*/(?P<name>[^"/]+)" integrity="[^"]*"')

# --- pages ------------------------------------------------------------------------------------------------------------


def publish(folder: Path) -> None:
    """Asv's pages of all recorded results, and what they load."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = settings_of(ROOT / "asv.conf.json", ROOT / "benchmarks" / "results" / "asv")
        settings |= {"html_dir": str(folder.resolve()), "branches": ["HEAD"]}  # whatever this clone calls it
        path = Path(scratch, "asv.conf.json")
        path.write_text(json.dumps(settings), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "asv", "--config", str(path), "publish"], check=True)
        fetch_libraries(folder, Path(scratch))


def fetch_libraries(folder: Path, scratch: Path) -> None:
    """Have the page load its libraries from the folder, with checksums of what lies there."""
    page = folder / "index.html"
    text = page.read_text(encoding="utf-8")
    (folder / "libraries").mkdir(exist_ok=True)
    archives: dict[str, Path] = {}

    def local(found: re.Match[str]) -> str:
        name = found["name"]
        package, member = LIBRARIES[name]
        if package not in archives:
            command = ["npm", "pack", "--silent", package]
            packed = subprocess.run(command, cwd=scratch, stdout=subprocess.PIPE, text=True, check=True)
            archives[package] = scratch / packed.stdout.split()[-1]
        with tarfile.open(archives[package]) as archive:
            file = archive.extractfile(f"package/{member}")
            assert file is not None
            content = file.read()
        (folder / "libraries" / name).write_bytes(content)
        checksum = base64.b64encode(hashlib.sha512(content).digest()).decode()
        return f'{found["before"]}libraries/{name}" integrity="sha512-{checksum}"'

    page.write_text(REMOTE.sub(local, text), encoding="utf-8")


# --- picture ----------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """A recorded figure of one commit."""

    date: float
    commit: str
    value: float


def history(benchmark: str, wanted: Sequence[str]) -> list[Point]:
    """Values of a benchmark with these parameters, by the commits' dates."""
    from asv.results import iter_results  # only here: the pages are made by asv's command

    points = []
    for result in iter_results(str(ROOT / "benchmarks" / "results" / "asv")):
        if benchmark in result.get_all_result_keys():
            params = result.get_result_params(benchmark)
            value = dict(zip(_products(params), result.get_result_value(benchmark, params), strict=True))[tuple(wanted)]
            if value is not None and value == value:  # not failed, not left out
                points.append(Point(result.date / 1000, result.commit_hash[:7], value))
    return sorted(points)


def _products(params: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Combinations in asv's order; it keeps Python's text of each value."""
    return [tuple(word.strip("'") for word in words) for words in itertools.product(*params)]


def draw(path: Path) -> None:
    """Times over limits of the passes through a network, commit by commit."""
    from matplotlib.figure import Figure

    from benchmarks.kernels import LARGE, MIDDLE

    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    lines: dict[tuple[str, str], dict[str, Any]] = {
        (LARGE, "NCHW"): {"color": "tab:blue"},
        (LARGE, "NHWC"): {"color": "tab:orange"},
        (MIDDLE, "NCHW"): {"color": "tab:blue", "linestyle": "--"},
        (MIDDLE, "NHWC"): {"color": "tab:orange", "linestyle": "--"},
    }
    for panel, name in zip(panels, ("Forward", "Backward", "Inference"), strict=True):
        found = {key: history(f"kernels.{name}.track_times_limit", ("numpy", *key, "float32")) for key in lines}
        commits = sorted({(p.date, p.commit) for points in found.values() for p in points})
        for key, points in found.items():
            at = [commits.index((p.date, p.commit)) for p in points]
            panel.plot(at, [p.value for p in points], marker=".", label=" ".join(key), **lines[key])
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(title=name, yscale="log", yticks=(1, 2, 4), yticklabels=("1", "2", "4"), ylim=(0.7, 4))
        panel.minorticks_off()
        panel.set_xticks(range(len(commits)), [commit for _, commit in commits], rotation=90, fontsize="x-small")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("times the limit")
    panels[-1].legend(fontsize="x-small")
    figure.savefig(path, dpi=110, metadata={"Creation Time": datetime.now(UTC).strftime("%Y-%m-%d")})


def main(argv: Sequence[str] | None = None) -> int:
    """Publish, draw, or both."""
    parser = argparse.ArgumentParser("python -m benchmarks.publish", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pages", type=Path, help="write the pages into this folder")
    parser.add_argument("--picture", type=Path, help="draw the history into this file")
    options = parser.parse_args(argv)
    if options.pages is None and options.picture is None:
        parser.error("nothing to do: give --pages or --picture")
    if options.pages is not None:
        publish(options.pages)
    if options.picture is not None:
        draw(options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
