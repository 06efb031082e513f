"""Which kernels run, and how their work is divided: from shapes and strides to a `Program`.

A plan is made once for each shape, strides, dtype, options and number of threads. It chooses between

- `inner_reduction`, along a channel's contiguous rows, and `outer_reduction`, across rows through all channels;
- one trip over memory, where what is read twice stays in a core's cache, and two;
- plain stores and stores past the caches.

What changes the bits of sums (chunks and segments, for which see `sizes`, coalesced rows, the family of kernels)
follows from shape and strides alone.

Dtypes are named as kernels name arrays of them (`program.kind_of`).
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any, NamedTuple

from fastbn.cpu import sizes, team
from fastbn.cpu.memory import Nontemporal
from fastbn.cpu.program import Argument, Program, Strided
from fastbn.cpu.records import (
    Chunks,
    Distances,
    GradientParameters,
    Moments,
    Parameters,
    Part,
    SegmentSums,
    Shape,
    Strides,
    Sums,
    Tiles,
)

Kind = str
Kinds = tuple[Kind | None, ...]  # of vectors of parameters; None for one that has its default

NONTEMPORAL_ROW = 512  # bytes side by side from which nontemporal stores pay: their two ends are stored plainly
SHORT = 1024  # values of a row, below which rows of many channels are read in one go
FEW_ROWS = 8  # below so many, spreading each channel's numbers over its columns costs more than it saves
LINE = 16  # values of a channel's row from which elementwise passes go in the order of memory, whatever the channels
COALESCED = 1024  # columns, about, of coalesced rows
COALESCED_ROWS = 256  # rows of few channels are coalesced only while so many remain
TILE = 1024  # columns, at most, of which a task makes sums; 512 read half as fast, 2048 short rows slower
ROW = 2048  # columns of a row that are normalised in one go: parts of rows are no stream to the memory system
FUSED_WIDTH = 1024  # bytes of a row of a fused tile, at least: from memory, narrow tiles are slower than two passes
FROM_MEMORY = 4 << 20  # bytes of x from which it is taken to come from there
FUSED_BYTES = 192 << 10  # about so many are read twice by a thread; the next tile's are asked for meanwhile
FUSED_FROM = 2 << 20  # bytes of x from which fusing pays, if threads share it: two passes over less stay in cache
FUSED_MOST = 384 << 10  # what stays in a second-level cache of 512 kB beside the output

PIECES, FEWEST_ROWS = 16, 32  # of rows for each thread, and rows of one at least: each spreads its columns anew
FEW_PARTIALS = 8192  # sums of segments that are merged in some 20 us: less than threads gain


# --- what is planned --------------------------------------------------------------------------------------------------


class Problem:
    """Arrays of one shape, whose strides are known by the names that a program has for them.

    Parameters
    ----------
    program : Program
        To which launches are added.
    shape : Shape
    kind : str
        Of all arrays but the weight.
    num_threads : int
    strides : dict
        Of each array; None of one that is absent.
    """

    def __init__(
        self, program: Program, shape: Shape, kind: Kind, num_threads: int, strides: dict[str, Strides | None]
    ) -> None:
        self.program, self.shape, self.kind, self.num_threads, self.strides = program, shape, kind, num_threads, strides
        self.kept, self.itemsize = shape.batch * shape.channel, int(kind[1])
        self.weighted = strides.get("weight") is not None
        self.of_shape = program.record(shape)
        self.compute = "f8*" if kind == "f8*" else "f4*"  # what kernels compute in, and have in their workspace

    def given(self, *names: str) -> list[Strides]:
        """Strides of those arrays that are not absent."""
        return [s for s in map(self.strides.get, names) if s is not None]

    def arrays(self, *names: str) -> dict[str, Any]:
        """Arguments of a kernel, by the names of its parameters."""
        return {name: self.program.strided(self.program.array(name), self.strides[name]) for name in names}

    def halved(self) -> Problem:
        """With the only row of each channel as two, which are read faster than one; else as it is."""
        batch, outer, channel, inner = self.shape
        if outer > 1 or inner < 2 * sizes.CHUNK or inner % (2 * sizes.CHUNK) > 0:
            return self
        half = inner // 2
        strides = {name: None if s is None else s._replace(outer=half) for name, s in self.strides.items()}
        return Problem(self.program, Shape(batch, 2, channel, half), self.kind, self.num_threads, strides)

    def workspace(self, count: int) -> Argument:
        return self.program.temporary(count, self.compute)

    def nontemporal(self, whole_lines: bool) -> Argument | bool:
        """Whether a kernel writes past the caches: as a call's arrays decide, if it writes nothing but whole lines."""
        return whole_lines and self.program.at_least("nontemporal", Nontemporal.ALL)

    def nontemporal_rows(self, row: int) -> Argument | bool:
        """The same of a kernel that finds the first whole line of a row, which must be long."""
        long = row * self.itemsize >= NONTEMPORAL_ROW
        return long and self.program.at_least("nontemporal", Nontemporal.FROM_FIRST_LINE)


def is_outer(shape: Shape, strides: list[Strides], weighted: bool = False) -> bool:
    """Whether the kernels of `outer_reduction` take these arrays: channels-last, or many short rows side by side."""
    if shape.inner == 1 or shape.channel == 1:
        return shape.channel > 1
    adjacent = all(s.channel == shape.inner for s in strides)
    return shape.inner <= SHORT and shape.outer >= FEW_ROWS and not weighted and adjacent


def coalescing(shape: Shape, itemsize: int, strides: list[Strides], weighted: bool = False) -> int:
    """How many rows of few channels are taken as one; whole cache lines of them where that is possible."""
    rows = min(COALESCED // max(1, shape.channel), shape.outer // COALESCED_ROWS)
    lines = 64 // math.gcd(64, shape.channel * itemsize)
    rows -= rows % lines if rows > lines else 0
    if shape.inner > 1 or rows < 2 or weighted:
        return 1
    return rows if all(s.outer == shape.channel for s in strides) else 1


def table_of(program: Program, kept: int, defaults: NamedTuple, names: tuple[str, ...] | None = None) -> Argument:
    """A table of one of `records`, in float64, from the vectors of its fields' names (or others) that a call gives."""
    table = program.scratch(len(defaults) * kept, "f8*")
    for i, (name, default) in enumerate(zip(names or defaults._fields, defaults, strict=True)):
        program.vector(name, kept, default, table.after(i * kept))
    return table


# --- how work is divided ----------------------------------------------------------------------------------------------


def _tile(channels: int, size: int, itemsize: int, most: int) -> int:
    """Cells of a tile: ``most`` columns about, whole cache lines."""
    lines = 64 // math.gcd(64, size * itemsize)
    return min(max(1, channels), -(-max(1, most // size) // lines) * lines)


def _fused_tile(problem: Problem, twice: int) -> int:
    """Cells of a tile whose rows all stay in a core's cache between two passes over ``twice`` arrays, or 0."""
    (batch, outer, channel, inner), itemsize = problem.shape, problem.itemsize
    size = math.prod(problem.shape)
    tile = _tile(channel, inner, itemsize, min(TILE, FUSED_BYTES // max(1, outer * itemsize * twice)))
    if problem.num_threads == 1 and size < team.PARALLEL_FROM:
        return tile
    width = tile * inner * itemsize
    narrowest = FUSED_WIDTH if size * itemsize >= FROM_MEMORY else FUSED_WIDTH // 8
    if (
        size * itemsize < FUSED_FROM
        or width < narrowest
        or width * outer * twice > FUSED_MOST
        or batch * -(-channel // tile) < 2 * problem.num_threads
    ):
        return 0
    return tile


def _whole_channels(problem: Problem) -> bool:
    """Whether one thread does all, or there are channels enough to give each thread whole ones."""
    return problem.num_threads == 1 or problem.kept >= 4 * problem.num_threads


def _chunks(shape: Shape) -> Chunks:
    return Chunks(*sizes.chunk_grid(shape.outer, shape.inner))


class InOrder:
    """A division of `inner_reduction`'s elementwise passes: equal parts of the values in the order of memory."""

    def __init__(self, problem: Problem, strides: list[Strides]) -> None:
        batch, outer, channel, inner = problem.shape
        run = max(1, inner)  # values side by side in all arrays
        for axis, n in (("channel", channel), ("outer", outer), ("batch", batch)):
            if any(n > 1 and getattr(s, axis) != run for s in strides):
                break
            run *= n
        self.run, self.tasks = run, sizes.piece_count(problem.shape)
        rows = -(-self.tasks // problem.num_threads) // max(1, -(-inner // sizes.PIECE)) + 2  # of a thread, at most
        channels = rows if outer == 1 else (rows // max(1, outer * channel) + 2) * channel
        self.pitch = min(batch * channel, channels) + sizes.PAD  # between rows of a thread's table


class Tiled:
    """A division of `outer_reduction`: segments of rows for sums, parts of the rows, or whole tiles for both at once.

    Parameters
    ----------
    problem : Problem
    coalesced, width : int
        Rows taken as one, cells of a tile.
    sums : int
        In float64, of each cell and segment.
    scratch : int
        In float64, of each cell of a thread's tile.
    workspace : int
        In the type that kernels compute in, of each column of a thread's tile.
    fused : bool
        Whether tiles are whole.
    """

    def __init__(
        self, problem: Problem, coalesced: int, width: int, *,
        sums: int = 0, scratch: int = 0, workspace: int = 0, fused: bool = False,
    ) -> None:  # fmt: skip
        batch, outer, channel, inner = problem.shape
        num_threads, self._itemsize, self._cells = problem.num_threads, problem.itemsize, channel * coalesced
        # Sums take whole groups of rows and leave the rest to their last step; elementwise passes take it as a row.
        rows = outer // coalesced if sums else -(-outer // coalesced)
        pieces = 1 if num_threads == 1 else max(num_threads, min(PIECES * num_threads, rows // FEWEST_ROWS))
        of_segment = sizes.segment_rows(rows, self._cells)
        height = of_segment if sums or fused else max(1, -(-rows // pieces))
        segments = -(-rows // height)
        self.tiles, self._columns = Tiles(coalesced, width, height), width * inner
        self.tasks = batch * (1 if fused else segments) * -(-self._cells // width)
        of_thread = scratch * (1 + segments if fused else 1) * sizes.padded(width, width)
        self.partials = sums * batch * segments * sizes.padded(self._cells, width) + num_threads * of_thread
        self.workspace = num_threads * workspace * (self._columns + sizes.PAD)

    def whole_lines(self, strides: list[Strides]) -> bool:
        """Whether every row of a tile is whole cache lines, if the array starts on one."""
        columns = 0 if self.tiles.width >= self._cells else self._columns
        steps = [columns, *(step for s in strides for step in (s.batch, s.outer * self.tiles.coalesced))]
        return all(step * self._itemsize % 64 == 0 for step in steps)


# --- statistics and y -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def moments(
    shape: Shape, kind: Kind, xs: Strides, ws: Strides | None, weights: Kind | None, num_threads: int
) -> Program:
    """``program(x, weight, table, eps)``: the table is of `records.Moments`."""
    p = Program(num_threads, math.prod(shape), {"x": kind, "weight": weights, "table": "f8*"}, ["eps"])
    problem = Problem(p, shape, kind, num_threads, {"x": xs, "weight": ws})
    _add_moments(problem, p.array("table"), p.number("eps"))
    return p


def _add_moments(problem: Problem, table: Argument, eps: Argument) -> None:
    p, kept, weighted = problem.program, problem.kept, problem.weighted
    own: dict[str, Any] = {}
    if is_outer(problem.shape, problem.given("x"), weighted):
        coalesced = coalescing(problem.shape, problem.itemsize, problem.given("x"), weighted)
        width = _tile(problem.shape.channel * coalesced, problem.shape.inner, problem.itemsize, TILE)
        tiled = Tiled(
            problem, coalesced, width, sums=3 if weighted else 2, scratch=sizes.ORIGINS,
            workspace=sizes.COLUMN_MOMENTS,
        )  # fmt: skip
        family, tasks, count = "outer_reduction", tiled.tasks, tiled.partials
        division, own["workspace"] = {"tiles": p.record(tiled.tiles)}, problem.workspace(tiled.workspace)
    else:
        problem = problem.halved()
        tasks = kept * sizes.segment_count(problem.shape.outer, problem.shape.inner)
        family, count = "inner_reduction", len(Part._fields) * tasks
        division = {"chunks": p.record(_chunks(problem.shape))}
    given: dict[str, Any] = problem.arrays("x", "weight") | {"shape": problem.of_shape} | division
    given |= {"origins": _add_origins(problem), "partials": p.scratch(count, "f8*")}
    p.launch(f"{family}.moments_of_segments", tasks, **given, **own)
    p.launch(f"{family}.channel_moments", kept, count < FEW_PARTIALS, **given, table=table, eps=eps)


def _add_origins(problem: Problem) -> Argument:
    """Found ahead where there are weights; else kernels find them."""
    p = problem.program
    origins = p.scratch(problem.kept if problem.weighted else 0, "f8*")
    if problem.weighted:
        given = problem.arrays("x", "weight")
        p.launch("common.find_origins", problem.kept, **given, shape=problem.of_shape, origins=origins)
    return origins


@lru_cache(maxsize=1024)
def normalize(
    shape: Shape, kind: Kind, xs: Strides, ys: Strides, rs: Strides | None, parameters: Kinds, given_rstd: bool,
    relu: bool, num_threads: int,
) -> Program:  # fmt: skip
    """``program(x, y, residual, mean, spread, gamma, beta, eps, nontemporal)``: see `records.Parameters`.

    Nontemporal is one of `memory.Nontemporal`.
    """
    arrays = {"x": kind, "y": kind, "residual": kind if rs else None}
    arrays |= dict(zip(Parameters._fields, parameters, strict=True))
    p = Program(num_threads, math.prod(shape), arrays, ["eps", "nontemporal"])
    problem = Problem(p, shape, kind, num_threads, {"x": xs, "y": ys, "residual": rs})
    table = table_of(p, problem.kept, Parameters(mean=0.0, spread=1.0, gamma=1.0, beta=0.0))
    _add_normalize(problem, table, p.number("eps"), given_rstd, relu)
    return p


def _add_normalize(
    problem: Problem, table: Argument, eps: Argument | float, given_rstd: bool, relu: bool
) -> None:  # fmt: skip
    p, shape, itemsize = problem.program, problem.shape, problem.itemsize
    strides = problem.given("x", "y", "residual")
    given = problem.arrays("x", "y", "residual") | {"shape": problem.of_shape}
    numbers: dict[str, Any] = {"table": table, "eps": eps, "given_rstd": given_rstd}
    if shape.inner < LINE and is_outer(shape, strides):
        coalesced = coalescing(shape, itemsize, strides)
        width = _tile(shape.channel * coalesced, shape.inner, itemsize, ROW)
        tiled = Tiled(problem, coalesced, width, workspace=sizes.AFFINE)
        p.launch(
            "outer_reduction.normalize", tiled.tasks, **given, tiles=p.record(tiled.tiles), **numbers,
            workspace=problem.workspace(tiled.workspace), relu=_option(relu),
            nontemporal=problem.nontemporal(tiled.whole_lines(problem.given("y"))),
        )  # fmt: skip
    else:
        order = InOrder(problem, strides)
        p.launch(
            "inner_reduction.normalize", order.tasks, **given, run=order.run, pitch=order.pitch, **numbers,
            workspace=problem.workspace(sizes.AFFINE * problem.num_threads * order.pitch), relu=_option(relu),
            nontemporal=problem.nontemporal_rows(order.run),
        )  # fmt: skip


def _option(on: bool) -> bool | None:
    """For an option, kernels are compiled with it or, if it is None, without."""
    return True if on else None


@lru_cache(maxsize=1024)
def forward(
    shape: Shape, kind: Kind, xs: Strides, ws: Strides | None, weights: Kind | None, ys: Strides, rs: Strides | None,
    parameters: Kinds, relu: bool, num_threads: int,
) -> Program:  # fmt: skip
    """``program(x, weight, y, residual, gamma, beta, table, eps, nontemporal)``: the table is of `records.Moments`."""
    arrays = {"x": kind, "weight": weights, "y": kind, "residual": kind if rs else None}
    arrays |= {**dict(zip(("gamma", "beta"), parameters, strict=True)), "table": "f8*"}
    p = Program(num_threads, math.prod(shape), arrays, ["eps", "nontemporal"])
    p.followed_by = partial(
        backward, shape, kind, xs, xs, ys if relu else None, ws, weights, xs, rs, ("f8*",) * 6, frozen=False,
        num_threads=num_threads,
    )  # fmt: skip
    problem = Problem(p, shape, kind, num_threads, {"x": xs, "weight": ws, "y": ys, "residual": rs})
    kept, table, eps = problem.kept, p.array("table"), p.number("eps")
    rows = Moments(*(table.after(i * kept) for i in range(len(Moments._fields))))
    p.vector("gamma", kept, 1.0, rows.gamma)
    p.vector("beta", kept, 0.0, rows.beta)
    tile = 0
    if not problem.weighted and is_outer(shape, problem.given("x", "y", "residual")):
        tile = _fused_tile(problem, 1) if coalescing(shape, problem.itemsize, [xs]) == 1 else 0
    if tile:
        tiled = Tiled(problem, 1, tile, scratch=sizes.ORIGINS, workspace=sizes.COLUMN_MOMENTS, fused=True)
        p.launch(
            "outer_reduction.forward", tiled.tasks, **problem.arrays("x", "y", "residual"), shape=problem.of_shape,
            tiles=p.record(tiled.tiles), table=table, eps=eps, partials=p.scratch(tiled.partials, "f8*"),
            workspace=problem.workspace(tiled.workspace), relu=_option(relu),
            nontemporal=problem.nontemporal(tiled.whole_lines([ys])),
        )  # fmt: skip
    elif _whole_channels(problem) and not is_outer(shape, [xs], problem.weighted):
        problem = problem.halved()
        origins = _add_origins(problem)
        p.launch(
            "inner_reduction.forward", kept, **problem.arrays("x", "weight", "y", "residual"), shape=problem.of_shape,
            chunks=p.record(_chunks(problem.shape)), origins=origins, table=table, eps=eps,
            workspace=problem.workspace(sizes.AFFINE * num_threads * sizes.PAD), relu=_option(relu),
            nontemporal=problem.nontemporal_rows(problem.shape.inner),
        )  # fmt: skip
    else:
        _add_moments(problem, table, eps)
        _add_normalize(problem, rows.mean, 0.0, True, relu)
    return p


# --- gradients --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def grad_sums(
    shape: Shape, kind: Kind, dys: Strides, xs: Strides, ys: Strides | None, ws: Strides | None, weights: Kind | None,
    parameters: Kinds, num_threads: int,
) -> Program:  # fmt: skip
    """``program(dy, x, y, weight, mean, rstd, sums)``: these are `records.Sums`."""
    arrays = {"dy": kind, "x": kind, "y": kind if ys else None, "weight": weights}
    arrays |= {**dict(zip(("mean", "rstd"), parameters, strict=True)), "sums": "f8*"}
    p = Program(num_threads, math.prod(shape), arrays)
    problem = Problem(p, shape, kind, num_threads, {"dy": dys, "x": xs, "y": ys, "weight": ws})
    table = p.scratch(2 * problem.kept, "f8*")  # the first rows of `records.GradientParameters`
    p.vector("mean", problem.kept, 0.0, table)
    p.vector("rstd", problem.kept, 1.0, table.after(problem.kept))
    _add_grad_sums(problem, table, None, False, False)
    return p


def _add_grad_sums(
    problem: Problem, parameters: Argument, distances: Argument | None, frozen: bool, mixed: bool
) -> None:
    """And, if they are asked for, the `records.Distances` of dx."""
    p, kept, weighted = problem.program, problem.kept, problem.weighted
    strides = problem.given("dy", "x", "y")
    if is_outer(problem.shape, strides, weighted):
        coalesced = coalescing(problem.shape, problem.itemsize, strides, weighted)
        width = _tile(problem.shape.channel * coalesced, problem.shape.inner, problem.itemsize, TILE)
        tiled = Tiled(problem, coalesced, width, sums=2, workspace=sizes.COLUMN_SUMS)
        tiles, partials = p.record(tiled.tiles), p.scratch(tiled.partials, "f8*")
        p.launch(
            "outer_gradients.grad_sums_of_segments", tiled.tasks, **problem.arrays("dy", "x", "y", "weight"),
            shape=problem.of_shape, tiles=tiles, parameters=parameters, partials=partials,
            workspace=problem.workspace(tiled.workspace),
        )  # fmt: skip
        p.launch(
            "outer_gradients.channel_grad_sums", kept, tiled.partials < FEW_PARTIALS, **problem.arrays("dy", "x", "y"),
            shape=problem.of_shape, tiles=tiles, parameters=parameters, partials=partials, sums=p.array("sums"),
            distances=distances, frozen=frozen, mixed=mixed,
        )  # fmt: skip
    else:
        problem = problem.halved()
        segments = kept * sizes.segment_count(problem.shape.outer, problem.shape.inner)
        count = len(SegmentSums._fields) * segments
        given: dict[str, Any] = {
            "shape": problem.of_shape,
            "chunks": p.record(_chunks(problem.shape)),
            "parameters": parameters,
        }
        partials = p.scratch(count, "f8*")
        p.launch(
            "inner_gradients.grad_sums_of_segments", segments, **problem.arrays("dy", "x", "y", "weight"),
            **given, partials=partials,
        )  # fmt: skip
        p.launch(
            "inner_gradients.channel_grad_sums", kept, count < FEW_PARTIALS, x=p.array("x"), **given,
            partials=partials, sums=p.array("sums"), distances=distances, frozen=frozen, mixed=mixed,
        )  # fmt: skip


@lru_cache(maxsize=1024)
def grad_input(
    shape: Shape, kind: Kind, dys: Strides, xs: Strides, ys: Strides | None, ws: Strides | None, weights: Kind | None,
    dxs: Strides, drs: Strides | None, parameters: Kinds, num_threads: int,
) -> Program:  # fmt: skip
    """``program(dy, x, y, weight, dx, dresidual, *GradientParameters, *Sums, nontemporal)``; both of `records`."""
    arrays = {"dy": kind, "x": kind, "y": kind if ys else None, "weight": weights, "dx": kind}
    names = (*GradientParameters._fields, *Sums._fields)
    arrays |= {"dresidual": kind if drs else None, **dict(zip(names, parameters, strict=True))}
    p = Program(num_threads, math.prod(shape), arrays, ["nontemporal"])
    strides = {"dy": dys, "x": xs, "y": ys, "weight": ws, "dx": dxs, "dresidual": drs}
    problem = Problem(p, shape, kind, num_threads, strides)
    table, mixed = _gradient_parameters(problem, parameters)
    sums, distances = (
        table_of(p, problem.kept, Sums(dgamma=0.0, dbeta=0.0)),
        p.scratch(len(Distances._fields) * problem.kept, "f8*"),
    )
    p.launch(
        "common.find_distances", problem.kept, True, x=p.array("x"), parameters=table, kept=problem.kept, mixed=mixed,
        sums=sums, distances=distances,
    )  # fmt: skip
    _add_grad_input(problem, distances, False)
    return p


def _gradient_parameters(problem: Problem, parameters: Kinds) -> tuple[Argument, bool]:
    """A table of `records.GradientParameters`, and whether dmean or dvar is among them; else there are no such rows."""
    kinds = GradientParameters(*parameters[: len(GradientParameters._fields)])
    mixed = kinds.dmean is not None or kinds.dvar is not None
    defaults = GradientParameters(mean=0.0, rstd=1.0, gamma=1.0, count=1.0, dmean=0.0, dvar=0.0)
    table = problem.program.scratch((6 if mixed else 4) * problem.kept, "f8*")
    for i, (name, default) in enumerate(zip(defaults._fields, defaults, strict=True)):
        if mixed or name not in ("dmean", "dvar"):
            problem.program.vector(name, problem.kept, default, table.after(i * problem.kept))
    return table, mixed


def _add_grad_input(problem: Problem, distances: Argument, frozen: bool) -> None:
    """Frozen statistics have no gradients, so that dx does not depend on x."""
    p, shape, itemsize = problem.program, problem.shape, problem.itemsize
    arrays = problem.arrays("dy", "x", "y", "weight", "dx", "dresidual") | {"shape": problem.of_shape}
    strides = problem.given("dy", "y", "dx", "dresidual")
    arrays["x"] = _live(problem, frozen)
    strides += [] if frozen else problem.given("x")
    if shape.inner < LINE and is_outer(shape, strides, problem.weighted):
        coalesced = coalescing(shape, itemsize, strides, problem.weighted)
        width = _tile(
            shape.channel * coalesced, shape.inner, itemsize, ROW // 2
        )  # with five numbers a column, not three
        tiled = Tiled(problem, coalesced, width, workspace=sizes.LINEAR)
        p.launch(
            "outer_gradients.grad_input", tiled.tasks, **arrays, tiles=p.record(tiled.tiles), distances=distances,
            workspace=problem.workspace(tiled.workspace),
            nontemporal=problem.nontemporal(tiled.whole_lines(problem.given("dx", "dresidual"))),
        )  # fmt: skip
    else:
        order = InOrder(problem, strides + problem.given("weight"))
        p.launch(
            "inner_gradients.grad_input", order.tasks, **arrays, run=order.run, pitch=order.pitch, distances=distances,
            workspace=problem.workspace(sizes.LINEAR * problem.num_threads * order.pitch),
            nontemporal=problem.nontemporal_rows(order.run),
        )  # fmt: skip


@lru_cache(maxsize=1024)
def backward(
    shape: Shape, kind: Kind, dys: Strides, xs: Strides, ys: Strides | None, ws: Strides | None, weights: Kind | None,
    dxs: Strides, drs: Strides | None, parameters: Kinds, frozen: bool, num_threads: int,
) -> Program:  # fmt: skip
    """``program(dy, x, y, weight, dx, dresidual, *GradientParameters, sums, nontemporal)``; the sums are `Sums`."""
    arrays = {"dy": kind, "x": kind, "y": kind if ys else None, "weight": weights, "dx": kind}
    arrays |= {"dresidual": kind if drs else None}
    arrays |= {**dict(zip(GradientParameters._fields, parameters, strict=True)), "sums": "f8*"}
    p = Program(num_threads, math.prod(shape), arrays, ["nontemporal"])
    strides = {"dy": dys, "x": xs, "y": ys, "weight": ws, "dx": dxs, "dresidual": drs}
    problem = Problem(p, shape, kind, num_threads, strides)
    table, mixed = _gradient_parameters(problem, parameters)
    kept, sums = problem.kept, p.array("sums")
    tile = 0
    if ws is None and is_outer(shape, problem.given("dy", "x", "y", "dx", "dresidual")):
        tile = _fused_tile(problem, 2) if coalescing(shape, problem.itemsize, problem.given("dy", "x", "y")) == 1 else 0
    if tile:
        tiled = Tiled(problem, 1, tile, scratch=sizes.SUMS, workspace=sizes.LINEAR, fused=True)
        p.launch(
            "outer_gradients.backward", tiled.tasks, **problem.arrays("dy", "x", "y", "dx", "dresidual"),
            live=_live(problem, frozen), shape=problem.of_shape, tiles=p.record(tiled.tiles), parameters=table,
            mixed=mixed, sums=sums, partials=p.scratch(tiled.partials, "f8*"),
            workspace=problem.workspace(tiled.workspace),
            nontemporal=problem.nontemporal(tiled.whole_lines(problem.given("dx", "dresidual"))),
        )  # fmt: skip
    elif _whole_channels(problem) and not is_outer(shape, problem.given("dy", "x", "y"), problem.weighted):
        problem = problem.halved()
        p.launch(
            "inner_gradients.backward", kept, **problem.arrays("dy", "x", "y", "weight", "dx", "dresidual"),
            live=_live(problem, frozen), shape=problem.of_shape, chunks=p.record(_chunks(problem.shape)),
            parameters=table, mixed=mixed, sums=sums,
            workspace=problem.workspace(sizes.LINEAR * num_threads * sizes.PAD),
            nontemporal=problem.nontemporal_rows(problem.shape.inner),
        )  # fmt: skip
    else:
        distances = p.scratch(len(Distances._fields) * kept, "f8*")
        _add_grad_sums(problem, table, distances, frozen, mixed)
        _add_grad_input(problem, distances, frozen)
    return p


def _live(problem: Problem, frozen: bool) -> Strided:
    """The array x again; of frozen statistics dx does not depend on it."""
    return problem.program.strided(problem.program.array("x"), None if frozen else problem.strides["x"])
