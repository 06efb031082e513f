"""A ResNet-18 trained on the CPU by PyTorch, before and after ``fastbn.torch.convert``: the time of a step.

He et al. (2015), "Deep residual learning for image recognition", table 1, with ten classes. Both networks start from
the same weights and see the same images (noise about ten prototypes); their steps alternate, so that whatever else the
machine does meets both. ``python examples/resnet_torch.py``
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import Tensor, nn

import fastbn.torch


class Block(nn.Module):
    """Two 3x3 convolutions, each with batch norm, and a shortcut."""

    def __init__(self, channels: int, to: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, to, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(to)
        self.second = nn.Conv2d(to, to, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(to)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != to:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, to, 1, stride, bias=False), nn.BatchNorm2d(to))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(h)) + self.shortcut(x))


def resnet18(classes: int = 10) -> nn.Sequential:
    """The network: a 7x7 convolution, four stages of two blocks, and the mean over all positions."""
    stages = [
        Block(channels, to, stride)
        for first, to in ((64, 64), (64, 128), (128, 256), (256, 512))
        for channels, stride in ((first, 1 if first == to else 2), (to, 1))
    ]
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes),
    )  # fmt: skip


def steps(options: argparse.Namespace, memory_format: torch.memory_format) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of a step, and the last loss, of PyTorch's batch norms and of fastbn's."""
    torch.manual_seed(0)
    model = resnet18().to(memory_format=memory_format)
    models = {"PyTorch": model, "fastbn": fastbn.torch.convert(copy.deepcopy(model))}
    optimizers = {name: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for name, m in models.items()}
    prototypes = torch.randn(10, 3, options.size, options.size)
    times: dict[str, list[float]] = {name: [] for name in models}
    losses = {}
    for step in range(options.steps + 1):
        labels = torch.randint(10, (options.batch,))
        images = prototypes[labels] + torch.randn(options.batch, 3, options.size, options.size)
        images = images.to(memory_format=memory_format)
        for name, network in models.items():
            start = time.perf_counter()
            optimizers[name].zero_grad()
            loss = F.cross_entropy(network(images), labels)
            loss.backward()
            optimizers[name].step()
            if step:  # the first compiles kernels
                times[name].append(time.perf_counter() - start)
            losses[name] = loss.item()
        if options.progress:
            print(f"  step {step:3}: " + ", ".join(f"{name} loss {loss:.4f}" for name, loss in losses.items()))
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}, losses


def main(argv: Sequence[str] | None = None) -> None:
    """Train both networks in both layouts, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=112, help="of the square images, in pixels")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="two steps on small images")
    parser.add_argument("--progress", action="store_true", help="print every step's losses")
    options = parser.parse_args(argv)
    if options.quick:
        options.batch, options.size, options.steps = 4, 32, 2
    print(f"ResNet-18, {options.batch} images of {options.size}x{options.size}, {torch.get_num_threads()} threads")
    print(f"{'layout':<16}{'PyTorch':>12}{'fastbn':>12}{'speed':>8}   last losses")
    for name in ("contiguous_format", "channels_last"):
        times, losses = steps(options, getattr(torch, name))
        print(
            f"{name.removesuffix('_format'):<16}{1e3 * times['PyTorch']:9.0f} ms{1e3 * times['fastbn']:9.0f} ms"
            f"{times['PyTorch'] / times['fastbn']:7.2f}x   {losses['PyTorch']:.4f}, {losses['fastbn']:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
