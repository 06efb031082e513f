"""A ResNet-18 trained on the CPU by PyTorch, before and after ``fastbn.torch.convert``: the time of a step.

He et al. (2015), "Deep residual learning for image recognition", table 1, with ten classes. The third network has
`fastbn.torch.BatchNormAct2d`, where a batch norm, the shortcut's sum and the relu after it are one pass. All start from
the same weights and see the same images (noise about ten prototypes); their steps alternate, so that whatever else the
machine does meets all. What batch norm takes of PyTorch's step says how much there is to gain.
``python examples/resnet_torch.py``
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # its name in PyTorch's own documentation
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fastbn.torch


class Block(nn.Module):
    """Two 3x3 convolutions, each with batch norm, and a shortcut."""

    def __init__(self, channels: int, to: int, stride: int, fused: bool) -> None:
        super().__init__()
        norm = fastbn.torch.BatchNormAct2d if fused else nn.BatchNorm2d
        self.fused = fused
        self.first = nn.Conv2d(channels, to, 3, stride, 1, bias=False)
        self.first_norm = norm(to)
        self.second = nn.Conv2d(to, to, 3, 1, 1, bias=False)
        self.second_norm = norm(to)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != to:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, to, 1, stride, bias=False), nn.BatchNorm2d(to))

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return self.second_norm(self.second(self.first_norm(self.first(x))), residual=self.shortcut(x))
        h = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(h)) + self.shortcut(x))


def resnet18(classes: int = 10, fused: bool = False) -> nn.Sequential:
    """The network: a 7x7 convolution, four stages of two blocks, and the mean over all positions."""
    stages = [
        Block(channels, to, stride, fused)
        for first, to in ((64, 64), (64, 128), (128, 256), (256, 512))
        for channels, stride in ((first, 1 if first == to else 2), (to, 1))
    ]
    norm = (fastbn.torch.BatchNormAct2d(64), nn.Identity()) if fused else (nn.BatchNorm2d(64), nn.ReLU())
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), *norm, nn.MaxPool2d(3, 2, 1),
        *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes),
    )  # fmt: skip


class Steps(NamedTuple):
    """Of each network the seconds of its steps, how many times as fast as PyTorch's at its side, and its last loss."""

    seconds: dict[str, float]
    speeds: dict[str, float]
    losses: dict[str, float]
    share: float  # of PyTorch's step that its batch norms take


def steps(options: argparse.Namespace, memory_format: torch.memory_format) -> Steps:
    """Medians over alternating steps."""
    torch.manual_seed(0)
    model = resnet18()
    models = {"PyTorch": model, "convert": fastbn.torch.convert(copy.deepcopy(model)), "fused": resnet18(fused=True)}
    models["fused"].load_state_dict(model.state_dict())
    fastbn.torch.convert(models["fused"])  # those of the shortcuts
    optimizers = {}
    for name, network in models.items():
        network.to(memory_format=memory_format)
        optimizers[name] = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    prototypes = torch.randn(10, 3, options.size, options.size)
    times: dict[str, list[float]] = {name: [] for name in models}
    losses = {}

    def step(name: str) -> None:
        optimizers[name].zero_grad()
        loss = F.cross_entropy(models[name](images), labels)
        loss.backward()
        optimizers[name].step()
        losses[name] = loss.item()

    for number in range(options.steps + 1):
        labels = torch.randint(10, (options.batch,))
        images = prototypes[labels] + torch.randn(options.batch, 3, options.size, options.size)
        images = images.to(memory_format=memory_format)
        for name in models:
            start = time.perf_counter()
            step(name)
            if number:  # the first compiles kernels
                times[name].append(time.perf_counter() - start)
        if options.progress:
            print(f"  step {number:3}: " + ", ".join(f"{name} loss {loss:.4f}" for name, loss in losses.items()))
    speeds = {
        name: statistics.median(a / b for a, b in zip(times["PyTorch"], t, strict=True)) for name, t in times.items()
    }
    seconds = {name: statistics.median(t) for name, t in times.items()}
    return Steps(seconds, speeds, dict(losses), share_of_batch_norm(lambda: step("PyTorch")))


def share_of_batch_norm(step: Callable[[], None]) -> float:
    """Of the time of five steps."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(5):
            step()
    times = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    return sum(t for key, t in times.items() if "batch_norm" in key) / sum(times.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Train the networks in both layouts, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224, help="of the square images, in pixels; 224 are the paper's")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="two steps on small images")
    parser.add_argument("--progress", action="store_true", help="print every step's losses")
    options = parser.parse_args(argv)
    if options.quick:
        options.batch, options.size, options.steps = 4, 32, 2
    print(f"ResNet-18, {options.batch} images of {options.size}x{options.size}, {torch.get_num_threads()} threads")
    print(f"{'layout':<14}{'PyTorch':>10}{'convert':>18}{'fused':>18}   batch norm's share, last losses")
    for name in ("contiguous_format", "channels_last"):
        found = steps(options, getattr(torch, name))
        cells = "".join(f"{1e3 * found.seconds[n]:8.0f} ms {found.speeds[n]:5.3f}x" for n in ("convert", "fused"))
        print(
            f"{name.removesuffix('_format'):<14}{1e3 * found.seconds['PyTorch']:7.0f} ms{cells}   {found.share:.1%}, "
            + ", ".join(f"{loss:.4f}" for loss in found.losses.values()),
            flush=True,
        )


if __name__ == "__main__":
    main()
