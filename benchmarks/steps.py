"""Whole training and evaluation steps of PyTorch models, before and after `convert`: ``python -m benchmarks.steps``.

Eager and compiled; the two models have the same weights and inputs, their steps alternate, figures are medians of
milliseconds and of the ratios of neighbours. ``--layers`` instead compares single batch norms by size and layout: where
the lines cross is what `fastbn.torch.choice` knows. asv imports this file: nothing runs before `main`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

ROUNDS, SECONDS = 15, 0.2  # of each model; steps shorter than these seconds are taken in bursts


def cnn(channels: int) -> Any:
    """Three convolutions with batch norm and relu, on 32x32 images."""
    from torch import nn

    layers: list[Any] = []
    for before, after in ((3, channels), (channels, 2 * channels), (2 * channels, 2 * channels)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * channels, 10))


def mlp(width: int) -> Any:
    """Three dense layers, two of them with batch norm and relu."""
    from torch import nn

    hidden = [nn.Linear(784, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width)]
    return nn.Sequential(*hidden, nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10))


def resnet() -> Any:
    """ResNet-18 for small images, by torchvision's names for its parts."""
    from torch import nn
    from torch.nn import functional as F  # noqa: N812  # as everybody calls it

    class Block(nn.Module):
        def __init__(self, channels: int, to: int, stride: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(channels, to, 3, stride, 1, bias=False), nn.BatchNorm2d(to)
            self.conv2, self.bn2 = nn.Conv2d(to, to, 3, 1, 1, bias=False), nn.BatchNorm2d(to)
            self.downsample: Any = nn.Identity()
            if stride > 1 or channels != to:
                self.downsample = nn.Sequential(nn.Conv2d(channels, to, 1, stride, bias=False), nn.BatchNorm2d(to))

        def forward(self, x: Any) -> Any:
            h = F.relu(self.bn1(self.conv1(x)))
            return F.relu(self.bn2(self.conv2(h)) + self.downsample(x))

    plan = ((64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2))
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    blocks = [Block(*sizes) for sizes in (*plan, (512, 512, 1))]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


MODELS: dict[str, tuple[Callable[[], Any], tuple[int, ...], tuple[int, ...]]] = {
    "CNN, 8 channels": (lambda: cnn(8), (3, 32, 32), (1, 8, 64)),
    "CNN, 32 channels": (lambda: cnn(32), (3, 32, 32), (1, 8, 64)),
    "MLP, 256 wide": (lambda: mlp(256), (784,), (2, 64, 512)),
    "MLP, 1024 wide": (lambda: mlp(1024), (784,), (64,)),
    "ResNet-18, 32x32": (resnet, (3, 32, 32), (1, 16)),
}


SIZES = ((4, 8, 1), (8, 16, 2), (8, 32, 8), (16, 32, 8), (16, 64, 16), (32, 64, 16), (56, 64, 16), (56, 64, 64))
"""Side, channels and batch of single layers: 128 to 13 million elements."""


def steps(model: Any, x: Any, training: bool, compiled: bool) -> Callable[[], object]:
    """One step of it: forward, and in training backward and stochastic gradient descent."""
    import torch
    from torch.nn import functional as F  # noqa: N812

    model.train(training)
    run = torch.compile(model) if compiled else model
    labels = torch.randint(10, (len(x),))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def train() -> None:
        optimizer.zero_grad()
        F.cross_entropy(run(x), labels).backward()
        optimizer.step()

    def evaluate() -> Any:
        with torch.no_grad():
            return run(x)

    return train if training else evaluate


def compared(before: Callable[[], object], after: Callable[[], object]) -> tuple[float, float, float]:
    """Medians of seconds, and of how many times as fast `after` is as `before` at its side."""
    for step in (before, after) * 2:
        step()
    burst = max(1, int(SECONDS / ROUNDS / max(_seconds(before, 1), 1e-6)))
    times: list[tuple[float, float]] = []
    for number in range(ROUNDS):
        pair = (before, after) if number % 2 else (after, before)
        first, second = (_seconds(step, burst) for step in pair)
        times.append((first, second) if number % 2 else (second, first))
    a, b = zip(*times, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in times)


def _seconds(step: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - start) / count


def rows(names: Sequence[str], modes: Sequence[str], options: dict[str, Any]) -> Iterator[str]:
    """Of a table, as they are measured."""
    import torch

    import fastbn.torch

    for name in names:
        make, shape, batches = MODELS[name]
        for batch in batches:
            for mode in modes:
                training = "training" in mode
                if training and batch == 1 and len(shape) == 1:
                    continue
                torch.manual_seed(0)
                torch._dynamo.reset()
                model, x = make(), torch.randn(batch, *shape)
                if "channels-last" in mode and len(shape) == 3:
                    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
                ours = fastbn.torch.convert(copy.deepcopy(model), **options)
                pair = (steps(m, x, training, "compiled" in mode) for m in (model, ours))
                before, after, speed = compared(*pair)
                yield f"| {name}, {batch} | {mode} | {1e3 * before:.2f} | {1e3 * after:.2f} | {speed:.2f}x |"


def layers() -> Iterator[str]:
    """Single batch norms, forward and backward in training, by size and layout, with `fastbn`'s kernels always."""
    import torch

    import fastbn.torch

    for memory_format in (torch.contiguous_format, torch.channels_last):
        for side, channels, batch in SIZES:
            x = torch.randn(batch, channels, side, side).to(memory_format=memory_format)
            for training in (True, False):
                kinds = torch.nn.BatchNorm2d, fastbn.torch.BatchNorm2d
                before, after, speed = compared(*(layer(kind(channels).train(training), x) for kind in kinds))
                yield (
                    f"| {tuple(x.shape)} {str(memory_format).removeprefix('torch.')} "
                    f"| {'training' if training else 'evaluation'} | {1e6 * before:.0f} us | {1e6 * after:.0f} us "
                    f"| {speed:.2f}x |"
                )


def layer(norm: Any, x: Any) -> Callable[[], object]:
    """Forward, and in training backward."""
    import torch

    wanted, dy = x.clone().requires_grad_(), torch.ones_like(x)

    def evaluate() -> object:
        with torch.no_grad():
            return norm(x)

    return (lambda: norm(wanted).backward(dy)) if norm.training else evaluate


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument(
        "--modes", nargs="*",
        default=["training", "training, channels-last", "evaluation", "training, compiled", "evaluation, compiled"],
    )  # fmt: skip
    parser.add_argument("--layers", action="store_true", help="single batch norms instead")
    parser.add_argument("--always", action="store_true", help="fastbn's kernels everywhere: where_faster=False")
    options = parser.parse_args(argv)
    print("| step | how | before, ms | after, ms | speed |\n|---|---|---|---|---|", flush=True)
    found = (
        layers()
        if options.layers
        else rows(options.models, options.modes, {"where_faster": False} if options.always else {})
    )
    for row in found:
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
