"""Batch norm of views beside arrays that lie in one piece: ``python -m benchmarks.views``.

A view is a part of images without their border, every second row, some columns: its axes do not collapse. It is
measured beside the same call on a copy that was made before (how much the strides cost; at best the gaps between rows)
and beside copying and then calling (what to do otherwise). Calls alternate in one process; the figures are medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import numpy as np

import fastbn
from benchmarks.turns import in_turn, memory_beside_result

NAMES = ("inference", "forward", "backward")
BUFFERS = 3  # so many arrays in turn, which no cache holds together


class View(NamedTuple):
    shape: tuple[int, ...]
    index: Any
    channel_axis: int = 1


VIEWS = {
    "NCHW, 224 of 230 columns": View((8, 16, 230, 230), np.s_[:, :, 3:-3, 3:-3]),
    "NCHW, 112 of 120": View((16, 32, 112, 120), np.s_[:, :, :, 4:-4]),
    "NCHW, 64 of 72": View((32, 64, 60, 72), np.s_[:, :, 2:-2, 4:-4]),
    "NCHW, every second row": View((16, 64, 112, 112), np.s_[:, :, ::2]),
    "NCHW, every second channel": View((32, 128, 56, 56), np.s_[:, ::2]),
    "NHWC, 56 of 60 rows and columns": View((32, 60, 60, 64), np.s_[:, 2:-2, 2:-2], -1),
    "NHWC, 64 of 96 channels": View((32, 56, 56, 96), np.s_[..., 16:80], -1),
    "NCDHW, without borders": View((4, 16, 36, 68, 68), np.s_[:, :, 2:-2, 2:-2, 2:-2]),
    "NCHW, 3 MB": View((8, 24, 64, 72), np.s_[:, :, 1:-1, 4:-4]),
    "NCHW, 6 MB": View((8, 48, 64, 72), np.s_[:, :, 1:-1, 4:-4]),
}


class Calls(NamedTuple):
    """Of one kind of arrays, buffer by buffer."""

    x: list[Any]
    dy: list[Any]
    axis: int

    def of(self, name: str) -> list[Callable[[], object]]:
        x, axis = self.x[0], self.axis
        mean, var, gamma, beta = np.random.default_rng(0).random((4, x.shape[axis]), np.float32) + 0.5
        if name == "inference":
            return [
                lambda x=x: fastbn.batch_norm_inference(x, mean, var, gamma, beta, channel_axis=axis) for x in self.x
            ]
        if name == "forward":
            return [lambda x=x: fastbn.batch_norm(x, gamma, beta, channel_axis=axis) for x in self.x]
        saved = [fastbn.batch_norm(x, gamma, beta, channel_axis=axis)[1] for x in self.x]
        return [lambda dy=dy, s=s: fastbn.batch_norm_backward(dy, s) for dy, s in zip(self.dy, saved, strict=True)]


def copying(*arrays: Any) -> Callable[[], object]:
    """What else callers do first."""
    return lambda: [a.copy() for a in arrays]


def contenders(view: View, name: str) -> dict[str, list[Callable[[], object]]]:
    """The call on views, on copies that were made before, and copying alone."""
    rng = np.random.default_rng(0)
    x, dy = ([rng.standard_normal(view.shape, np.float32)[view.index] for _ in range(BUFFERS)] for _ in range(2))
    apart = Calls([a.copy() for a in x], [a.copy() for a in dy], view.channel_axis)
    copies = [copying(*(both if name == "backward" else both[:1])) for both in zip(x, dy, strict=True)]
    return {"fastbn": Calls(x, dy, view.channel_axis).of(name), "one piece": apart.of(name), "copies": copies}


def measure(view: View, name: str, rounds: int) -> tuple[float, float, float]:
    """Milliseconds of a call of the view, and how often as fast as otherwise: in one piece, and with copies."""
    times = in_turn(contenders(view, name), rounds, 0.0)
    ours, dense, copies = (median(times[key]) for key in ("fastbn", "one piece", "copies"))
    return 1e3 * ours, dense / ours, (copies + dense) / ours


def memory(view: View) -> float:
    """What a forward pass into `out` takes, as a share of x."""
    x = np.random.default_rng(0).standard_normal(view.shape, np.float32)[view.index]
    out = np.empty_like(x)

    def forward() -> tuple[()]:
        fastbn.batch_norm(x, out=out, channel_axis=view.channel_axis)
        return ()

    forward()
    return memory_beside_result(forward) / x.nbytes


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender (15)")
    options = parser.parse_args()
    print("| view, float32 | MB |", *(f"{name}, ms | of one piece | x copying |" for name in NAMES), "memory |")
    print("|---|---|" + "---|---|---|" * len(NAMES) + "---|")
    for label, view in VIEWS.items():
        found = {name: measure(view, name, options.rounds) for name in NAMES}
        size = np.empty(view.shape, np.float32)[view.index].nbytes
        cells = [f"{found[name][0]:.2f} | {found[name][1]:.2f} | {found[name][2]:.1f} |" for name in NAMES]
        print(f"| {label} | {size / 1e6:.1f} |", *cells, f"{100 * memory(view):.1f} % |", flush=True)


if __name__ == "__main__":
    main()
