"""Which kernels run, and how their work is divided: from shapes and strides to a `Program`.

A plan is made once for each shape, strides, dtype, options and number of threads. It chooses between

- `rows`, a channel's rows one after the other, and `columns`, rows through all channels;
- one trip over memory, where what is read twice stays in a core's cache, and two;
- plain stores and stores past the caches.

What changes the bits of sums (chunks, segments, folding, the family of kernels) follows from shape and strides alone.

Dtypes are named as kernels name arrays of them (`program.kind_of`).
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any

from fastbn.cpu import sizes, team
from fastbn.cpu.memory import Nontemporal, Strides
from fastbn.cpu.program import Argument, Program

Shape = tuple[int, ...]
Kind = str
Kinds = tuple[Kind | None, ...]  # of vectors of parameters; None for one that has its default

NONTEMPORAL_ROW = 512  # bytes side by side from which nontemporal stores pay: their two ends are stored plainly
SHORT = 1024  # values of a row, below which rows of many channels are read in one go
FEW_ROWS = 8  # below so many, spreading each channel's numbers over its columns costs more than it saves
LINE = 16  # values of a channel's row from which elementwise passes go in the order of memory, whatever the channels
FOLDED = 1024  # columns, about, of folded rows
FOLDED_ROWS = 256  # rows of few channels are folded only while so many remain
TILE = 1024  # columns, at most, of which a task makes sums; 512 read half as fast, 2048 short rows slower
ROW = 2048  # columns of a row that are normalised in one go: parts of rows are no stream to the memory system
FUSED_WIDTH = 1024  # bytes of a row of a fused tile, at least: from memory, narrow tiles are slower than two passes
FROM_MEMORY = 4 << 20  # bytes of x from which it is taken to come from there
FUSED_BYTES = 192 << 10  # about so many are read twice by a thread; the next tile's are asked for meanwhile
FUSED_FROM = 2 << 20  # bytes of x from which fusing pays, if threads share it: two passes over less stay in cache
FUSED_MOST = 384 << 10  # what stays in a second-level cache of 512 kB beside the output

PIECES, FEWEST_ROWS = 16, 32  # of rows for each thread, and rows of one at least: each spreads its columns anew
FEW_PARTS = 8192  # sums of segments that are merged in some 20 us: less than threads gain
NOWHERE = (0, 0, 0, 0)


def is_outer(shape: Shape, *strides: Strides | None, weighted: bool = False) -> bool:
    """Whether the kernels of `columns` take these arrays: channels-last, or many short rows side by side."""
    _, outer, channel, inner = shape
    if inner == 1 or channel == 1:
        return channel > 1
    adjacent = all(s is None or s[3] == inner for s in strides)
    return inner <= SHORT and outer >= FEW_ROWS and not weighted and adjacent


def folding(shape: Shape, itemsize: int, *strides: Strides | None, weighted: bool = False) -> int:
    """How many rows of few channels are taken as one; whole cache lines of them where that is possible."""
    _, outer, channel, inner = shape
    fold = min(FOLDED // max(1, channel), outer // FOLDED_ROWS)
    lines = 64 // math.gcd(64, channel * itemsize)
    fold -= fold % lines if fold > lines else 0
    if inner > 1 or fold < 2 or weighted:
        return 1
    return fold if all(s is None or s[2] == channel for s in strides) else 1


def _tile(channels: int, size: int, itemsize: int, most: int) -> int:
    """Cells of a tile: ``most`` columns about, whole cache lines."""
    lines = 64 // math.gcd(64, size * itemsize)
    return min(max(1, channels), -(-max(1, most // size) // lines) * lines)


def _fused_tile(shape: Shape, itemsize: int, twice: int, num_threads: int) -> int:
    """Cells of a tile whose rows all stay in a core's cache between two passes over ``twice`` arrays, or 0."""
    batch, outer, channel, inner = shape
    tile = _tile(channel, inner, itemsize, min(TILE, FUSED_BYTES // max(1, outer * itemsize * twice)))
    if num_threads == 1 and math.prod(shape) < team.PARALLEL_FROM:
        return tile
    width = tile * inner * itemsize
    narrowest = FUSED_WIDTH if math.prod(shape) * itemsize >= FROM_MEMORY else FUSED_WIDTH // 8
    if (
        math.prod(shape) * itemsize < FUSED_FROM
        or width < narrowest
        or width * outer * twice > FUSED_MOST
        or batch * -(-channel // tile) < 2 * num_threads
    ):
        return 0
    return tile


def _whole_channels(shape: Shape, num_threads: int) -> bool:
    """Whether one thread does all, or there are channels enough to give each thread whole ones."""
    return num_threads == 1 or shape[0] * shape[2] >= 4 * num_threads


def _geometry(program: Program, shape: Shape, family: tuple[int, ...], *strides: Strides | None) -> Argument:
    """The integers of a kernel in one vector; see `fastbn.cpu.kernels.common`."""
    return program.integers([*shape, *family, *(step for s in strides for step in s or NOWHERE)])


def _compute(kind: Kind) -> Kind:
    """What kernels compute in, and keep in their work arrays."""
    return "f8*" if kind == "f8*" else "f4*"


def _size(kind: Kind) -> int:
    return int(kind[1])


def _chunks(shape: Shape) -> tuple[int, ...]:
    """The geometry's integers of the family `rows`, for one channel at a time."""
    return (*sizes.chunk_grid(shape[1], shape[3]), max(1, shape[3]), sizes.PAD)


def _halved(shape: Shape, *strides: Strides | None) -> tuple[Any, ...]:
    """Shape and strides with the only row of each channel as two, which are read faster than one; else as they are."""
    batch, outer, channel, inner = shape
    if outer > 1 or inner < 2 * sizes.CHUNK or inner % (2 * sizes.CHUNK) > 0:
        return shape, *strides
    half = inner // 2
    return (batch, 2, channel, half), *(None if s is None else (s[0], s[1], half, s[3]) for s in strides)


class _Inner:
    """A division of ``rows``' elementwise passes: equal parts of the values in the order of memory."""

    def __init__(self, shape: Shape, itemsize: int, num_threads: int, *strides: Strides | None) -> None:
        batch, outer, channel, inner = shape
        run = max(1, inner)  # values side by side in all arrays
        for axis, n in ((3, channel), (2, outer), (1, batch)):
            if any(s is not None and n > 1 and s[axis] != run for s in strides):
                break
            run *= n
        self.tasks = sizes.piece_count(shape)
        most = -(-self.tasks // num_threads) // max(1, -(-inner // sizes.PIECE)) + 2  # rows of a thread
        batches = most if outer == 1 else (most // max(1, outer * channel) + 2) * channel
        self.pitch = min(batch * channel, batches) + sizes.PAD
        self.family = (*sizes.chunk_grid(outer, inner), run, self.pitch)
        self.run = run


class _Outer:
    """A division of ``columns``: segments of rows for sums, parts of the rows, or whole tiles for both at once."""

    def __init__(
        self, shape: Shape, fold: int, tile: int, itemsize: int, num_threads: int,
        sums: int = 0, scratch: int = 0, workspace: int = 0, fused: bool = False,
    ) -> None:  # fmt: skip
        batch, outer, channel, inner = shape
        # Sums take whole folds and leave the rest to their last step; elementwise passes take the rest as a row.
        folded = outer // fold if sums else -(-outer // fold)
        self.fold, self.tile, self.itemsize, self.inner, self.cells = fold, tile, itemsize, inner, channel * fold
        of_segments = sizes.segment_rows(folded, self.cells)
        pieces = 1 if num_threads == 1 else max(num_threads, min(PIECES * num_threads, folded // FEWEST_ROWS))
        self.height = of_segments if sums or fused else max(1, -(-folded // pieces))
        segments = -(-folded // self.height)
        pieces = 1 if fused else segments
        self.tasks = batch * pieces * -(-self.cells // tile)
        pitch = tile * inner + sizes.PAD
        of_a_thread = scratch * (1 + segments if fused else 1) * sizes.padded(tile, tile)
        self.partials = sums * batch * segments * sizes.padded(self.cells, tile) + num_threads * of_a_thread
        self.workspace = num_threads * workspace * pitch
        self.family = (fold, tile, self.height, 0)

    def whole_lines(self, *strides: Strides | None) -> bool:
        """Whether every row of a tile is whole cache lines, if the array starts on one."""
        width = 0 if self.tile >= self.cells else self.tile * self.inner
        steps = [width, *(step for s in strides if s is not None for step in (s[0], s[1], s[2] * self.fold))]
        return all(step * self.itemsize % 64 == 0 for step in steps)


# --- plans ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def moments(
    shape: Shape, kind: Kind, xs: Strides, ws: Strides | None, weights: Kind | None, num_threads: int
) -> Program:
    """``program(x, weight, table, eps)``: see `common.write_moments`."""
    p = Program(num_threads, math.prod(shape), {"x": kind, "weight": weights, "table": "f8*"}, ["eps"])
    _add_moments(
        p, shape, kind, xs, ws, num_threads, p.array("x"), p.array("weight"), p.array("table"), p.number("eps")
    )
    return p


def _add_moments(
    p: Program, shape: Shape, kind: Kind, xs: Strides, ws: Strides | None, num_threads: int,
    x: Argument, weight: Argument, table: Argument, eps: Argument,
) -> None:  # fmt: skip
    kept, weighted = shape[0] * shape[2], ws is not None
    origins = p.scratch(kept if weighted else 0, "f8*")
    if is_outer(shape, xs, weighted=weighted):
        fold = folding(shape, _size(kind), xs, weighted=weighted)
        tile = _tile(shape[2] * fold, shape[3], _size(kind), TILE)
        c = _Outer(
            shape,
            fold,
            tile,
            _size(kind),
            num_threads,
            3 if weighted else 2,
            sizes.ORIGINS,
            workspace=sizes.SHIFT_AND_SUMS,
        )
        geometry = _geometry(p, shape, c.family, xs, ws)
        _add_origins(p, kept, x, weight, geometry, origins)
        partials, workspace = p.scratch(c.partials, "f8*"), p.temporary(c.workspace, _compute(kind))
        p.launch(
            "outer_reduction.segment_moments", c.tasks,
            x=x, weight=weight, geometry=geometry, origins=origins, partials=partials, workspace=workspace,
        )  # fmt: skip
        family, partials_of_all = "outer_reduction", c.partials
    else:
        shape, xs, ws = _halved(shape, xs, ws)
        segments = kept * sizes.segment_count(shape[1], shape[3])
        geometry = _geometry(p, shape, _chunks(shape), xs, ws)
        _add_origins(p, kept, x, weight, geometry, origins)
        partials = p.scratch(3 * segments, "f8*")
        p.launch(
            "inner_reduction.moments_of_segments",
            segments,
            x=x,
            weight=weight,
            geometry=geometry,
            origins=origins,
            partials=partials,
        )
        family, partials_of_all = "inner_reduction", 3 * segments
    p.launch(
        f"{family}.channel_moments", kept, partials_of_all < FEW_PARTS,
        x=x, weight=weight, geometry=geometry, origins=origins, partials=partials, table=table, eps=eps,
    )  # fmt: skip


def _add_origins(p: Program, kept: int, x: Argument, weight: Argument, geometry: Argument, origins: Argument) -> None:
    if weight.kind != "none":
        p.launch("common.find_origins", kept, x=x, weight=weight, geometry=geometry, origins=origins)


@lru_cache(maxsize=1024)
def normalize(
    shape: Shape,
    kind: Kind,
    xs: Strides,
    ys: Strides,
    rs: Strides | None,
    parameters: Kinds,
    relu: bool,
    num_threads: int,
) -> Program:
    """``program(x, y, residual, mean, spread, gamma, beta, eps, nontemporal)``.

    See `common.affine_of`; nontemporal is one of `memory.Nontemporal`.
    """
    names = ("mean", "spread", "gamma", "beta")
    arrays = {"x": kind, "y": kind, "residual": kind if rs else None, **dict(zip(names, parameters, strict=True))}
    p = Program(num_threads, math.prod(shape), arrays, ["eps", "nontemporal"])
    coefficients = coefficient_rows(p, shape, mean=0.0, spread=1.0, gamma=1.0, beta=0.0)
    _add_normalize(p, shape, kind, xs, ys, rs, relu, num_threads, p.array("x"), coefficients, p.number("eps"))
    return p


def coefficient_rows(p: Program, shape: Shape, **defaults: float) -> Argument:
    """Rows of float64, a channel's number in each, from vectors that a call gives."""
    kept = shape[0] * shape[2]
    rows = p.scratch(len(defaults) * kept, "f8*")
    for i, (name, default) in enumerate(defaults.items()):
        p.vector(name, kept, default, rows.after(i * kept))
    return rows


def _add_normalize(
    p: Program, shape: Shape, kind: Kind, xs: Strides, ys: Strides, rs: Strides | None, relu: bool, num_threads: int,
    x: Argument, coefficients: Argument, eps: Argument | float,
) -> None:  # fmt: skip
    if shape[3] < LINE and is_outer(shape, xs, ys, rs):
        fold = folding(shape, _size(kind), xs, ys, rs)
        tile = _tile(shape[2] * fold, shape[3], _size(kind), ROW)
        c = _Outer(shape, fold, tile, _size(kind), num_threads, workspace=sizes.AFFINE)
        geometry, nontemporal = _geometry(p, shape, c.family, xs, ys, rs), _if_aligned(p, c.whole_lines(ys))
        name, tasks, size = "outer_reduction.normalize", c.tasks, c.workspace
    else:
        r = _Inner(shape, _size(kind), num_threads, xs, ys, rs)
        geometry, nontemporal = _geometry(p, shape, r.family, xs, ys, rs), _if_long(p, r.run * _size(kind))
        name, tasks, size = "inner_reduction.normalize", r.tasks, sizes.AFFINE * num_threads * r.pitch
    p.launch(
        name, tasks, x=x, y=p.array("y"), residual=p.array("residual"), geometry=geometry,
        coefficients=coefficients, eps=eps, workspace=p.temporary(size, _compute(kind)), relu=relu or None,
        nontemporal=nontemporal,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def forward(
    shape: Shape, kind: Kind, xs: Strides, ws: Strides | None, weights: Kind | None, ys: Strides, rs: Strides | None,
    parameters: Kinds, relu: bool, num_threads: int,
) -> Program:  # fmt: skip
    """``program(x, weight, y, residual, gamma, beta, table, eps, nontemporal)``; see `common.write_moments`."""
    gamma, beta = parameters
    p = Program(
        num_threads,
        math.prod(shape),
        {
            "x": kind, "weight": weights, "y": kind, "residual": kind if rs else None, "gamma": gamma, "beta": beta,
            "table": "f8*",
        },
        ["eps", "nontemporal"],
    )  # fmt: skip
    of_y = ys if relu else None
    p.followed_by = partial(
        backward, shape, kind, xs, xs, of_y, ws, weights, xs, rs, ("f8*",) * 6, frozen=False, num_threads=num_threads
    )
    x, weight, table, eps = p.array("x"), p.array("weight"), p.array("table"), p.number("eps")
    weighted, kept = ws is not None, shape[0] * shape[2]
    p.vector("gamma", kept, 1.0, table.after(4 * kept))
    p.vector("beta", kept, 0.0, table.after(5 * kept))
    tile = 0
    if not weighted and is_outer(shape, xs, ys, rs) and folding(shape, _size(kind), xs) == 1:
        tile = _fused_tile(shape, _size(kind), 1, num_threads)
    if tile:
        c = _Outer(
            shape, 1, tile, _size(kind), num_threads, scratch=sizes.ORIGINS, workspace=sizes.SHIFT_AND_SUMS, fused=True
        )
        p.launch(
            "outer_reduction.forward", c.tasks, x=x, y=p.array("y"), residual=p.array("residual"),
            geometry=_geometry(p, shape, c.family, xs, ys, rs), table=table, eps=eps,
            partials=p.scratch(c.partials, "f8*"), workspace=p.temporary(c.workspace, _compute(kind)),
            relu=relu or None,
            nontemporal=_if_aligned(p, c.whole_lines(ys)),
        )  # fmt: skip
    elif _whole_channels(shape, num_threads) and not is_outer(shape, xs, weighted=weighted):
        shape, xs, ws, ys, rs = _halved(shape, xs, ws, ys, rs)
        geometry, origins = _geometry(p, shape, _chunks(shape), xs, ws, ys, rs), p.scratch(kept * weighted, "f8*")
        _add_origins(p, kept, x, weight, geometry, origins)
        p.launch(
            "inner_reduction.forward", kept, x=x, weight=weight, y=p.array("y"), residual=p.array("residual"),
            geometry=geometry, origins=origins, table=table, eps=eps,
            workspace=p.temporary(sizes.AFFINE * num_threads * sizes.PAD, _compute(kind)),
            relu=relu or None, nontemporal=_if_long(p, shape[3] * _size(kind)),
        )  # fmt: skip
    else:
        _add_moments(p, shape, kind, xs, ws, num_threads, x, weight, table, eps)
        _add_normalize(p, shape, kind, xs, ys, rs, relu, num_threads, x, table.after(2 * kept), -1.0)
    return p


def _if_long(p: Program, row_bytes: int) -> Argument | bool:
    """Whether a kernel of `inner_reduction` writes past the caches, as a call's arrays decide. Short rows are not."""
    return row_bytes >= NONTEMPORAL_ROW and p.at_least("nontemporal", Nontemporal.FROM_FIRST_LINE)


def _if_aligned(p: Program, whole_lines: bool) -> Argument | bool:
    """The same of `outer_reduction`, which writes whole lines if each row begins with one."""
    return whole_lines and p.at_least("nontemporal", Nontemporal.ALL)


@lru_cache(maxsize=1024)
def grad_sums(
    shape: Shape, kind: Kind, dys: Strides, xs: Strides, ys: Strides | None, ws: Strides | None, weights: Kind | None,
    parameters: Kinds, num_threads: int,
) -> Program:  # fmt: skip
    """``program(dy, x, y, weight, mean, rstd, out)``: (dgamma, dbeta)."""
    mean, rstd = parameters
    arrays = {"dy": kind, "x": kind, "y": kind if ys else None, "weight": weights}
    arrays |= {"mean": mean, "rstd": rstd, "out": "f8*"}
    p = Program(num_threads, math.prod(shape), arrays)
    coefficients = coefficient_rows(p, shape, mean=0.0, rstd=1.0)
    _add_grad_sums(p, shape, kind, dys, xs, ys, ws, num_threads, coefficients, None, False, False)
    return p


def _add_grad_sums(
    p: Program, shape: Shape, kind: Kind, dys: Strides, xs: Strides, ys: Strides | None, ws: Strides | None,
    num_threads: int, coefficients: Argument, linear: Argument | None, frozen: bool, mixed: bool,
) -> None:  # fmt: skip
    """For ``linear`` see `common.write_linear`."""
    dy, x, y, weight = (p.array(name) for name in ("dy", "x", "y", "weight"))
    kept, weighted = shape[0] * shape[2], ws is not None
    if is_outer(shape, dys, xs, ys, weighted=weighted):
        fold = folding(shape, _size(kind), dys, xs, ys, weighted=weighted)
        tile = _tile(shape[2] * fold, shape[3], _size(kind), TILE)
        c = _Outer(shape, fold, tile, _size(kind), num_threads, 2, workspace=sizes.SUMMED)
        geometry, partials = _geometry(p, shape, c.family, dys, xs, ys, ws), p.scratch(c.partials, "f8*")
        p.launch(
            "outer_gradients.segment_grad_sums", c.tasks, dy=dy, x=x, y=y, weight=weight, geometry=geometry,
            coefficients=coefficients, partials=partials, workspace=p.temporary(c.workspace, _compute(kind)),
        )  # fmt: skip
        p.launch(
            "outer_gradients.channel_grad_sums", kept, c.partials < FEW_PARTS, dy=dy, x=x, y=y, geometry=geometry,
            coefficients=coefficients, partials=partials, out=p.array("out"), linear=linear, frozen=frozen, mixed=mixed,
        )  # fmt: skip
    else:
        shape, dys, xs, ys, ws = _halved(shape, dys, xs, ys, ws)
        geometry = _geometry(p, shape, _chunks(shape), dys, xs, ys, ws)
        segments = kept * sizes.segment_count(shape[1], shape[3])
        partials = p.scratch(2 * segments, "f8*")
        p.launch(
            "inner_gradients.grad_sums_of_segments", segments, dy=dy, x=x, y=y, weight=weight, geometry=geometry,
            coefficients=coefficients, partials=partials,
        )  # fmt: skip
        p.launch(
            "inner_gradients.channel_grad_sums", kept, 2 * segments < FEW_PARTS, x=x, geometry=geometry,
            coefficients=coefficients, partials=partials, out=p.array("out"), linear=linear, frozen=frozen, mixed=mixed,
        )  # fmt: skip


@lru_cache(maxsize=1024)
def grad_input(
    shape: Shape, kind: Kind, dys: Strides, xs: Strides, ys: Strides | None, ws: Strides | None, weights: Kind | None,
    dxs: Strides, drs: Strides | None, parameters: Kinds, num_threads: int,
) -> Program:  # fmt: skip
    """``program(dy, x, y, weight, dx, dresidual, mean, rstd, gamma, count, dmean, dvar, dgamma, dbeta,
    nontemporal)``.
    """
    names = (*GRADIENT_COEFFICIENTS, "dgamma", "dbeta")
    arrays = {"dy": kind, "x": kind, "y": kind if ys else None, "weight": weights, "dx": kind}
    arrays |= {"dresidual": kind if drs else None, **dict(zip(names, parameters, strict=True))}
    p = Program(num_threads, math.prod(shape), arrays, ["nontemporal"])
    kept, x = shape[0] * shape[2], p.array("x")
    coefficients, mixed = _gradient_coefficients(p, shape, parameters)
    sums, linear = coefficient_rows(p, shape, dgamma=0.0, dbeta=0.0), p.scratch(5 * kept, "f8*")
    p.launch(
        "common.linear_rows", kept, True, x=x, coefficients=coefficients, kept=p.integers([kept]), mixed=mixed,
        sums=sums, linear=linear,
    )  # fmt: skip
    _add_grad_input(p, shape, kind, x, dys, xs, ys, ws, dxs, drs, num_threads, linear)
    return p


GRADIENT_COEFFICIENTS = ("mean", "rstd", "gamma", "count", "dmean", "dvar")


def _gradient_coefficients(p: Program, shape: Shape, parameters: Kinds) -> tuple[Argument, bool]:
    """Rows of coefficients as `common.input_coefficients` takes them, and whether dmean or dvar is among them."""
    mixed = parameters[4] is not None or parameters[5] is not None
    defaults = {"mean": 0.0, "rstd": 1.0, "gamma": 1.0, "count": 1.0} | ({"dmean": 0.0, "dvar": 0.0} if mixed else {})
    return coefficient_rows(p, shape, **defaults), mixed


def _add_grad_input(
    p: Program, shape: Shape, kind: Kind, x: Argument | None, dys: Strides, xs: Strides | None, ys: Strides | None,
    ws: Strides | None, dxs: Strides, drs: Strides | None, num_threads: int, coefficients: Argument,
) -> None:  # fmt: skip
    strides = (dys, xs, ys, ws, dxs, drs)
    if shape[3] < LINE and is_outer(shape, dys, xs, ys, dxs, drs, weighted=ws is not None):
        fold = folding(shape, _size(kind), dys, xs, ys, dxs, drs, weighted=ws is not None)
        tile = _tile(shape[2] * fold, shape[3], _size(kind), ROW // 2)  # with five numbers a column, not three
        c = _Outer(shape, fold, tile, _size(kind), num_threads, workspace=sizes.LINEAR)
        geometry, nontemporal = _geometry(p, shape, c.family, *strides), _if_aligned(p, c.whole_lines(dxs, drs))
        name, tasks, size = "outer_gradients.grad_input", c.tasks, c.workspace
    else:
        r = _Inner(shape, _size(kind), num_threads, *strides)
        geometry, nontemporal = _geometry(p, shape, r.family, *strides), _if_long(p, r.run * _size(kind))
        name, tasks, size = "inner_gradients.grad_input", r.tasks, sizes.LINEAR * num_threads * r.pitch
    p.launch(
        name, tasks, dy=p.array("dy"), x=x, y=p.array("y"), weight=p.array("weight"), dx=p.array("dx"),
        dresidual=p.array("dresidual"), geometry=geometry, coefficients=coefficients,
        workspace=p.temporary(size, _compute(kind)), nontemporal=nontemporal,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def backward(
    shape: Shape, kind: Kind, dys: Strides, xs: Strides, ys: Strides | None, ws: Strides | None, weights: Kind | None,
    dxs: Strides, drs: Strides | None, parameters: Kinds, frozen: bool, num_threads: int,
) -> Program:  # fmt: skip
    """``program(dy, x, y, weight, dx, dresidual, mean, rstd, gamma, count, dmean, dvar, out, nontemporal)``.

    See `common.input_coefficients`; ``out`` is for (dgamma, dbeta).
    """
    arrays = {"dy": kind, "x": kind, "y": kind if ys else None, "weight": weights, "dx": kind}
    arrays |= {
        "dresidual": kind if drs else None,
        **dict(zip(GRADIENT_COEFFICIENTS, parameters, strict=True)),
        "out": "f8*",
    }
    p = Program(num_threads, math.prod(shape), arrays, ["nontemporal"])
    dy, x, y, dx, dresidual = (p.array(name) for name in ("dy", "x", "y", "dx", "dresidual"))
    coefficients, mixed = _gradient_coefficients(p, shape, parameters)
    out, live = p.array("out"), None if frozen else x
    strides, kept = (dys, xs, ys, ws, dxs, drs), shape[0] * shape[2]
    tile = 0
    if ws is None and is_outer(shape, dys, xs, ys, dxs, drs) and folding(shape, _size(kind), dys, xs, ys) == 1:
        tile = _fused_tile(shape, _size(kind), 2, num_threads)
    if tile:
        c = _Outer(shape, 1, tile, _size(kind), num_threads, scratch=sizes.SUMS, workspace=sizes.LINEAR, fused=True)
        p.launch(
            "outer_gradients.backward", c.tasks, dy=dy, x=x, y=y, live=live, dx=dx, dresidual=dresidual,
            geometry=_geometry(p, shape, c.family, *strides), coefficients=coefficients, mixed=mixed, out=out,
            partials=p.scratch(c.partials, "f8*"), workspace=p.temporary(c.workspace, _compute(kind)),
            nontemporal=_if_aligned(p, c.whole_lines(dxs, drs)),
        )  # fmt: skip
    elif _whole_channels(shape, num_threads) and not is_outer(shape, dys, xs, ys, weighted=ws is not None):
        shape, *halved = _halved(shape, *strides)
        p.launch(
            "inner_gradients.backward", kept, dy=dy, x=x, y=y, live=live, weight=p.array("weight"), dx=dx,
            dresidual=dresidual, geometry=_geometry(p, shape, _chunks(shape), *halved), coefficients=coefficients,
            mixed=mixed, out=out, workspace=p.temporary(sizes.LINEAR * num_threads * sizes.PAD, _compute(kind)),
            nontemporal=_if_long(p, shape[3] * _size(kind)),
        )  # fmt: skip
    else:
        linear = p.scratch(5 * kept, "f8*")
        _add_grad_sums(p, shape, kind, dys, xs, ys, ws, num_threads, coefficients, linear, frozen, mixed)
        _add_grad_input(p, shape, kind, live, dys, None if frozen else xs, ys, ws, dxs, drs, num_threads, linear)
    return p
