"""What CUDA kernels are compiled to: the variants that plans ask for on devices of each architecture."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple
from unittest import mock

import numpy as np


class Chip(NamedTuple):
    """A device of a compute capability, where the planner depends on more than that."""

    processors: int
    shared: int
    threads: int
    """Of one multiprocessor."""


CHIPS = {
    70: Chip(80, 96 << 10, 2048),
    75: Chip(40, 64 << 10, 1024),
    80: Chip(108, 163 << 10, 2048),
    86: Chip(84, 99 << 10, 1536),
    89: Chip(128, 99 << 10, 1536),
    90: Chip(132, 227 << 10, 2048),
    100: Chip(148, 227 << 10, 2048),
    120: Chip(170, 99 << 10, 1536),
}
DTYPES = (
    "float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32",
    "uint64", "bool",
)  # fmt: skip
ITEMSIZES = (2, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 1)
ROWS = (25, 49, 169, 196)  # elements of a channel's row that vectors of 16 bytes run across, of some dtype
GRADIENTS = ("grad_sums", "backward", "grad_input")
REGISTERS = 65536  # of a multiprocessor


class Variant(NamedTuple):
    kernel: str
    macros: tuple[tuple[str, int], ...]

    def __getitem__(self, name: Any) -> Any:
        """A macro's value; what a kernel of plain numbers has not is 0, its numbers have any dtype."""
        return dict(self.macros).get(name, 0) if isinstance(name, str) else tuple.__getitem__(self, name)

    @property
    def of_numbers(self) -> bool:
        """Whether it works on numbers of channels alone, whose types it is told when it runs."""
        return "DTYPE" not in dict(self.macros)

    @property
    def strided(self) -> bool:
        """Whether it is of statistics of arrays as they lie, whose results have any dtype."""
        return "strided" in self.kernel

    @property
    def updates(self) -> int:
        """Places where running statistics are updated: in forward passes, where a block has a channel, and shares it.

        There floats are divided by a subroutine, for NumPy's bits, once for a channel; and stored in any of four types.
        """
        return {"forward": 2, "statistics": 1, "finish_moments": 1, "update_running": 1}.get(self.kernel, 0)

    @property
    def vector_bits(self) -> int:
        return 8 * self["VECTOR"] * ITEMSIZES[self["DTYPE"]]

    @property
    def transfers(self) -> tuple[int, int]:
        """Loads and stores of vectors that a chunk takes."""
        if self.kernel.startswith("finish") or self.of_numbers:
            return 0, 0
        if self.strided:
            return self["ITEMS_PER_THREAD"], 0
        relu, residual = self["RELU"], self["RESIDUAL"]
        if self.kernel in ("statistics", "forward", "normalize"):
            loads, stores = 1 + residual, self.kernel != "statistics"
        else:
            loads, stores = 2 + (relu == 1), 0 if self.kernel == "grad_sums" else 1 + residual
        return loads * self["ITEMS_PER_THREAD"], stores * self["ITEMS_PER_THREAD"]

    def __str__(self) -> str:
        if self.of_numbers or self.strided:
            return f"{self.kernel}, {', '.join(f'{name} {value}' for name, value in self.macros)}"
        layout = (
            "channels-last" if self["ALONG_CHANNELS"] else f"rows of {self['RUN']}" if self["RUN"] else "channels-first"
        )
        options = ", ".join(f"{name} {self[name]}" for name in ("WEIGHT", "RELU", "RESIDUAL", "WIDE") if self[name])
        cluster = f", CLUSTER {self['CLUSTER']}" if self["CLUSTER"] > 1 else ""
        sizes = ", ".join(f"{name} {self[name]}" for name in ("VECTOR", "LANES", "THREADS", "ITEMS_PER_THREAD"))
        return f"{self.kernel} {DTYPES[self['DTYPE']]} {layout}, {sizes}{cluster}{options and f', {options}'}"


@lru_cache(maxsize=16)
def planned(architecture: int) -> tuple[Variant, ...]:
    """All that the planner asks for, over a grid of problems, with every choice of options: widest loads first."""
    from fastbn.cuda import launch, plans, problems

    found: set[tuple[str, launch.Macros]] = set()

    def function(_number: int, kernel: str, macros: launch.Macros) -> None:
        found.add((kernel, macros))

    with (
        mock.patch.object(launch, "function", function),
        mock.patch.object(launch, "blocks_per_processor", return_value=2),
        mock.patch.dict(plans.FORCED),
    ):
        for problem in _problems(architecture):
            for choose in (plans.moments, plans.grad_sums, plans.normalize, plans.grad_input):
                choose.__wrapped__(problem)
            for choose, strategy in itertools.product((plans.forward, plans.backward), (None, *plans.STRATEGIES)):
                plans.FORCED["strategy"] = strategy
                choose.__wrapped__(problem)
        plans.update_running.__wrapped__(problem.device, 12, (3,) * 5, skip_nonfinite=False)
    variants = set()
    for kernel, macros in found:
        known = dict(macros)
        relus = (0, 1, 2) if kernel in GRADIENTS else (0, 1)
        options = {"WEIGHT": (1, 2, 3) if known.get("WEIGHT") else (0,), "RELU": relus, "RESIDUAL": (0, 1)}
        vectors_depend_on_it = known.get("RUN") or (known.get("ALONG_CHANNELS") and known.get("DTYPE") in (0, 1))
        fixed = ("RESIDUAL",) if vectors_depend_on_it else ()
        here = [name for name in options if name in launch.OPTIONAL[kernel] and name not in fixed]
        for values in itertools.product(*(options[name] for name in here)):
            changed = known | dict(zip(here, values, strict=True))
            if changed.get("RELU") == 2 and changed.get("RESIDUAL"):  # then y is read
                continue
            if "RELU" in changed and kernel == "backward":
                along, tuning = bool(changed["ALONG_CHANNELS"]), problems.tuning_of(architecture)
                changed["MIN_BLOCKS"] = plans.min_blocks(kernel, along, changed["DTYPE"], changed, tuning)
            variants.add(Variant(kernel, tuple((name, changed.get(name, value)) for name, value in macros)))
    first = ("VECTOR", "ITEMS_PER_THREAD", "THREADS")
    return tuple(sorted(variants, key=lambda v: (v.kernel, *(-v[name] for name in first), v.macros)))


def _problems(architecture: int) -> Iterator[Any]:
    """Problems for which the planner comes to all it can: sizes from a block's to 2^31 vectors, all alignments."""
    from fastbn.cuda import launch, problems

    chip = CHIPS[architecture]
    device = launch.Device(0, architecture, chip.processors, chip.shared)
    for dtype, itemsize in enumerate(ITEMSIZES[:4]):
        offs = [off for off in (0, 2, 4, 8) if off % itemsize == 0]
        reduced = (8, 1 << 8, 1 << 12, 1 << 17, 1 << 23, 1 << 36)
        lasts = itertools.product((1, 2, 4, 8, 16, 32, 64), reduced)
        shapes = [(True, channels, n) for channels, n in lasts] + [(False, 64, n) for n in reduced]
        cases = itertools.product(shapes, offs, (0, 2), (False, True) if itemsize == 2 else (False,))
        for (along, channels, n), off, weight, residual in cases:
            shape = (1, n, channels, 1) if along else (1, 1, channels, n)
            strides = (0, channels, 1, 0) if along else (0, 0, n, 1)
            if n == 1 << 12:  # two reduced axes, between which there is a gap
                strides = (0, channels * (n + 1), 1, channels) if along else (0, 64 * n, n + 8, 1)
                shape = (1, 2, channels, n)
            operands = (("x", problems.Placement(strides, off)),)
            yield problems.Problem(
                device, shape, dtype, itemsize, operands, weight, strides, (), relu=False, residual=residual
            )
        for samples, n, residual in itertools.product((1, 32, 1 << 14), ROWS, (False, True)):
            operands = (("x", problems.Placement((0, 64 * n, n, 1), 0)),)
            yield problems.Problem(
                device, (1, samples, 64, n), dtype, itemsize, operands, 0, (), (), relu=False, residual=residual
            )


def covering(variants: Iterable[Variant], factors: Callable[[Variant], tuple[Any, ...]]) -> tuple[Variant, ...]:
    """Some of the variants, in which every pair of values of two factors occurs that occurs in any."""
    candidates = tuple(variants)
    numbers: dict[Any, int] = {}
    rows = [
        [numbers.setdefault((i, j, a, b), len(numbers)) for (i, a), (j, b) in itertools.combinations(values, 2)]
        for values in (tuple(enumerate(factors(variant))) for variant in candidates)
    ]
    pairs, missing = np.array(rows), np.ones(len(numbers), bool)
    chosen = []
    while missing.any():
        best = int(missing[pairs].sum(1).argmax())  # the first of the best
        missing[pairs[best]] = False
        chosen.append(candidates[best])
    return tuple(chosen)


@lru_cache(maxsize=16)
def pairwise(architecture: int) -> tuple[Variant, ...]:
    """Every pair of a kernel, dtype, layout, size or option that the planner can ask for together."""
    variants = planned(architecture)
    names = dict.fromkeys(name for variant in variants for name, _ in variant.macros)
    return covering(variants, lambda variant: (variant.kernel, *(variant[name] for name in names)))


@lru_cache(maxsize=16)
def hot(architecture: int) -> tuple[Variant, ...]:
    """Of each kernel what large arrays get: the widest loads, full blocks; every dtype and layout with each option."""
    every = [v for v in planned(architecture) if any(v.transfers) and not v["WIDE"] and v["CLUSTER"] == 1]
    like: dict[Any, Variant] = {}
    for v in every:  # the first of a kind has the widest loads and the most threads; of these the most lanes
        key = (v.kernel, *(v[name] for name in ("DTYPE", "ALONG_CHANNELS", "WEIGHT", "RELU", "RESIDUAL")))
        sizes = [
            tuple(w[name] for name in ("VECTOR", "ITEMS_PER_THREAD", "THREADS", "LANES")) for w in (like.get(key, v), v)
        ]
        like[key] = max(zip(sizes, (like.get(key, v), v), strict=True))[1]
    return covering(
        like.values(),
        lambda v: ((v.kernel, v["DTYPE"], v["ALONG_CHANNELS"]), *(v[name] for name in ("WEIGHT", "RELU", "RESIDUAL"))),
    )


def chosen(architecture: int, *, full: bool) -> tuple[Variant, ...]:
    """What is compiled for an architecture."""
    from tests.cuda_statistics_variants import of_statistics

    more = hot(architecture) if full else ()
    return tuple(dict.fromkeys(pairwise(architecture) + more + of_statistics(architecture)))
