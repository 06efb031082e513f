"""What a call by an adapter costs over the bare kernel: ``python -m benchmarks.frameworks``.

A forward pass in training, of a small array and of a large one; calls alternate, figures are medians of bursts, in
microseconds. Of frameworks that are not installed there is no row. asv imports this file: nothing runs before `main`.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import fastbn
from benchmarks.host import Host
from benchmarks.workloads import fill

SHAPES = {"small": (2, 8, 4, 4), "large": (32, 64, 56, 56)}
ROUNDS, BURST_SECONDS = 15, 5e-3

Calls = dict[str, Callable[[], object]]


def bare(x: np.ndarray[Any, Any]) -> Calls:
    """The functions themselves, in the two layouts."""
    one, zero = np.ones((2, x.shape[1]), np.float32)
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    return {
        "fastbn.batch_norm, NCHW": lambda: fastbn.batch_norm(x, one, zero),
        "fastbn.batch_norm, NHWC": lambda: fastbn.batch_norm(last, one, zero, channel_axis=-1),
    }


def torchs(x: np.ndarray[Any, Any]) -> Calls:
    """PyTorch's module and ours, in training with running statistics, without and with a gradient to come."""
    if (torch := Host().torch) is None:
        return {}
    import fastbn.torch

    t = torch.from_numpy(x)
    wanted = torch.from_numpy(x.copy()).requires_grad_()
    modules = {"torch.nn.BatchNorm2d": torch.nn.BatchNorm2d, "fastbn.torch.BatchNorm2d": fastbn.torch.BatchNorm2d}
    calls: Calls = {}
    for name, module in modules.items():
        norm = module(x.shape[1])
        dy = torch.ones_like(t)

        def forward(norm: Any = norm) -> object:
            with torch.no_grad():
                return norm(t)

        calls[f"{name}, NCHW"] = forward
        calls[f"{name}, forward and backward"] = lambda norm=norm, dy=dy: norm(wanted).backward(dy)
    return calls


def jaxs(x: np.ndarray[Any, Any]) -> Calls:
    """The jitted function by XLA's interface, by a callback, and XLA's own formula."""
    if importlib.util.find_spec("jax") is None:
        return {}
    import jax
    import jax.numpy as jnp

    import fastbn.jax

    last = jnp.asarray(np.moveaxis(x, 1, -1))
    one, zero = jnp.ones(x.shape[1]), jnp.zeros(x.shape[1])

    def on_host(a: Any) -> np.ndarray[Any, Any]:
        return fastbn.batch_norm(np.asarray(a), np.asarray(one), np.asarray(zero), channel_axis=-1)[0]

    def plain(a: Any) -> Any:
        axes = tuple(range(a.ndim - 1))
        return (a - a.mean(axes)) / jnp.sqrt(a.var(axes) + 1e-5) * one + zero

    like = jax.ShapeDtypeStruct(last.shape, last.dtype)
    functions = {
        "fastbn.jax.batch_norm, NHWC": jax.jit(lambda a: fastbn.jax.batch_norm(a, one, zero)[0]),
        "by jax.pure_callback, NHWC": jax.jit(lambda a: jax.pure_callback(on_host, like, a)),
        "XLA's own, NHWC": jax.jit(plain),
    }
    return {name: (lambda f=f: f(last).block_until_ready()) for name, f in functions.items()}


def medians(calls: Calls) -> Iterator[tuple[str, float]]:
    """Seconds of each call, a burst of each in turn."""
    bursts = {}
    for name, call in calls.items():
        call(), call()
        bursts[name] = max(1, int(BURST_SECONDS / _seconds(call, 1)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            time.sleep(0.02)  # OpenMP's threads spin on for 10 ms
            call()
            times[name].append(_seconds(call, bursts[name]))
    return ((name, float(np.median(found))) for name, found in times.items())


def _seconds(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def main() -> int:
    """Print a table."""
    rows: dict[str, list[float]] = {}
    for shape in SHAPES.values():
        x = np.empty(shape, np.float32)
        fill(x, 0)
        for name, seconds in medians(bare(x) | torchs(x) | jaxs(x)):
            rows.setdefault(name, []).append(1e6 * seconds)
    print("| call, us | " + " | ".join("x".join(map(str, shape)) for shape in SHAPES.values()) + " |")
    print("|---" * (len(SHAPES) + 1) + "|")
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.0f}" for value in values) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
