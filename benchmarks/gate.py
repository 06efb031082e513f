"""Did a change make a kernel slower? ``python -m benchmarks.gate main HEAD`` says so, and exits with status 1.

It compares two commits by ``asv continuous`` in rounds that alternate between them. Compared are ratios of times that
were measured in turn in one process: a kernel's to a copy of the same bytes, a small call's to NumPy's formula, mean's
and var's to NumPy's. Between runs of one commit on a shared machine such ratios differ by a tenth at most, times
themselves by a half. What seems slower is measured again, on its own and longer; only what is slower each time counts.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHOSEN = (
    r"kernels\..*\.track_times_limit\('numpy', .*'float32'\)",
    r"calls\.SmallCall\.track_times_numpy\('numpy', ",
    r"calls\.Memory\.track_",
    r"calls\.Statistics\.track_times_numpy",
)
FACTOR = 1.15
ROUNDS = (2, 3, 4)  # of the comparison, and of those after it of what seemed slower in all before
ROW = re.compile(r"^\| [+!] .*\| (?P<name>[^|]+?) *\|$", re.MULTILINE)
"""Of asv's table, for a benchmark that is slower (+) or fails (!)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; 1 where something is slower each time, 2 where asv could not compare."""
    parser = argparse.ArgumentParser("python -m benchmarks.gate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", help="the commit, branch or tag to compare with")
    parser.add_argument("head", nargs="?", default="HEAD", help="the one that may be slower (HEAD)")
    parser.add_argument("--bench", action="append", help="regular expression of benchmarks, instead of the usual")
    parser.add_argument("--factor", type=float, default=FACTOR, help=f"from which a ratio counts as slower ({FACTOR})")
    options = parser.parse_args(argv)
    suspects = options.bench or list(CHOSEN)
    slower: list[str] = []
    for rounds in ROUNDS:
        status, printed = compare(options.base, options.head, suspects, options.factor, rounds)
        slower = sorted(set(ROW.findall(printed)))
        if status not in (0, 1) or (status == 1 and not slower):
            print(f"asv ended with status {status}: nothing is known", file=sys.stderr)
            return 2
        if not slower:
            print(f"{options.head} is not slower than {options.base}")
            return 0
        suspects = [f"^{re.escape(name)}$" for name in slower]
    print(f"{options.head} is slower than {options.base}, in {len(ROUNDS)} comparisons:")
    print("\n".join(f"  {name}" for name in slower))
    return 1


def compare(base: str, head: str, bench: Sequence[str], factor: float, rounds: int) -> tuple[int, str]:
    """Asv's status and what it printed; its results are kept nowhere."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder, "asv.conf.json")
        settings.write_text(json.dumps(settings_of(ROOT / "asv.conf.json", Path(folder))), encoding="utf-8")
        command = [
            sys.executable, "-m", "asv", "--config", str(settings), "continuous", "--interleave-rounds",
            "--factor", str(factor), "--attribute", f"rounds={rounds}",
            *(word for name in bench for word in ("--bench", name)), base, head,
        ]  # fmt: skip
        printed = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout
            for line in process.stdout:
                print(line, end="", flush=True)
                printed.append(line)
        return process.returncode, "".join(printed)


def settings_of(path: Path, results: Path) -> dict[str, object]:
    """Asv's settings with whole paths, and results elsewhere."""
    lines = path.read_text(encoding="utf-8").splitlines()
    settings = json.loads("\n".join(line for line in lines if not line.lstrip().startswith("//")))
    places = {name: str(path.parent / settings[name]) for name in ("repo", "benchmark_dir", "env_dir")}
    return dict(settings | places | {"results_dir": str(results)})


if __name__ == "__main__":
    sys.exit(main())
