"""The gradient of relu in batch norm's backward pass: ``python -m benchmarks.relu``.

Without a residual it computes y again of x, and reads dy and x alone. Beside it: the same call without relu, the one
that reads y, which is what a residual takes, and PyTorch's two operations. All write into buffers that are there but
PyTorch's. Calls alternate in one process; the figures are medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import numpy as np

import fastbn
from benchmarks.host import get_num_threads
from benchmarks.turns import in_turn

BUFFERS = 3  # so many arrays in turn
EPS = 1e-5


class Images(NamedTuple):
    shape: tuple[int, ...]
    channel_axis: int
    dtype: str = "float32"

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{self.dtype} {size}, {'NCHW' if self.channel_axis == 1 else 'NHWC'}"


def cases() -> list[Images]:
    """Both layouts; halves of one size."""
    sizes = [(32, 64, 112, 112), (32, 256, 28, 28), (32, 512, 7, 7), (8, 64, 28, 28), (8, 16, 20, 20)]
    found = [Images((n, c, h, w) if axis == 1 else (n, h, w, c), axis) for n, c, h, w in sizes for axis in (1, -1)]
    return [*found, Images((32, 64, 112, 112), 1, "float16"), Images((32, 112, 112, 64), -1, "float16")]


def contenders(case: Images) -> dict[str, list[Callable[[], object]]]:
    rng = np.random.default_rng(0)
    x, dy = ([rng.standard_normal(case.shape).astype(case.dtype) for _ in range(BUFFERS)] for _ in range(2))
    gamma, beta = rng.standard_normal((2, case.shape[case.channel_axis])).astype(np.float32)
    plain = [fastbn.batch_norm(a, gamma, beta, channel_axis=case.channel_axis)[1] for a in x]
    made = [fastbn.batch_norm(a, gamma, beta, channel_axis=case.channel_axis, activation="relu") for a in x]
    by_y = [saved._replace(y=y, beta=None) for y, saved in made]
    out = np.empty_like(x[0])

    def calls(saved: list[fastbn.Saved]) -> list[Callable[[], object]]:
        return [lambda g=g, s=s: fastbn.batch_norm_backward(g, s, out=out) for g, s in zip(dy, saved, strict=True)]

    found = {"fastbn": calls([saved for _, saved in made]), "plain": calls(plain), "by y": calls(by_y)}
    return found | _of_pytorch(case, x, dy, gamma, [y for y, _ in made])


def _of_pytorch(case: Images, x: list[Any], dy: list[Any], gamma: Any, y: list[Any]) -> dict[str, Any]:
    """Relu's gradient, then batch norm's; nothing where it is not installed."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(get_num_threads())

    def tensor(a: Any) -> Any:
        t = torch.from_numpy(a)
        return t if case.channel_axis == 1 else t.movedim(-1, 1)

    weight = torch.from_numpy(gamma)
    calls = []
    for a, g, of in zip(map(tensor, x), map(tensor, dy), map(tensor, y), strict=True):
        _, mean, rstd = torch.native_batch_norm(a, weight, weight, None, None, True, 0.1, EPS)

        def call(a: Any = a, g: Any = g, of: Any = of, mean: Any = mean, rstd: Any = rstd) -> object:
            dz = torch.ops.aten.threshold_backward(g, of, 0)
            return torch.ops.aten.native_batch_norm_backward(
                dz, a, weight, None, None, mean, rstd, True, EPS, [True, True, True]
            )

        calls.append(call)
    return {"PyTorch": calls}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender (15)")
    options = parser.parse_args()
    print("| arrays | backward with relu, ms | x without relu | reading y: x its time | PyTorch: x its time |")
    print("|---|---|---|---|---|")
    for case in cases():
        times = {name: median(found) for name, found in in_turn(contenders(case), options.rounds, 0.0).items()}
        ours = times["fastbn"]
        ratios = [ours / times["plain"], times["by y"] / ours, times["PyTorch"] / ours if "PyTorch" in times else None]
        cells = " | ".join("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        print(f"| {case} | {1e3 * ours:.3f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
