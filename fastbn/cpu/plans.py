"""Which kernels run, and how their work is divided: from shapes and strides to a `Program`.

A plan is made once for each shape, strides, dtype, options and number of threads. It chooses between

- `inner_reduction`, along a channel's contiguous rows, and `outer_reduction`, across rows through all channels;
- one trip over memory, where what is read twice stays in a core's cache, and two;
- plain stores and stores past the caches.

What changes the bits of sums (chunks and segments, for which see `sizes`, coalesced rows, the family of kernels)
follows from shape and strides alone.

Dtypes are named as kernels name arrays of them (`program.kernel_type`).
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any

from fastbn.cpu import sizes, slab_plans
from fastbn.cpu.division import (
    FEW_PARTIALS,
    MEMORY_ORDER_FROM,
    ROW,
    TILE,
    AnyStrides,
    InOrder,
    Kind,
    Kinds,
    Problem,
    ProblemInSlabs,
    Tiled,
    chunks_of,
    coalescing,
    is_outer,
    option,
    problem_of,
    table_of,
    tile_width,
)
from fastbn.cpu.gradient_plans import backward
from fastbn.cpu.program import Argument, Program
from fastbn.cpu.records import GradientParameters, MomentRows, Parameters, Part, Shape, Slabs, Strides


@lru_cache(maxsize=1024)
def moments(
    shape: Shape | Slabs, kind: Kind, xs: AnyStrides, ws: Strides | None, weights: Kind | None, num_threads: int
) -> Program:
    """``program(x, weight, table, eps)``: the table is of `records.MomentRows`."""
    p = Program(num_threads, math.prod(shape), {"x": kind, "weight": weights, "table": "f8*"}, ["eps"])
    problem = problem_of(p, shape, kind, num_threads, {"x": xs, "weight": ws})
    _add_moments(problem, p.array("table"), p.number("eps"))
    return p


def _add_moments(problem: Problem | ProblemInSlabs, table: Argument, eps: Argument) -> None:
    if isinstance(problem, ProblemInSlabs):
        slab_plans.add_moments(problem, table, eps)
        return
    p, kept, weighted = problem.program, problem.kept, problem.weighted
    own: dict[str, Any] = {}
    if is_outer(problem.shape, problem.given("x"), weighted):
        coalesced = coalescing(problem.shape, problem.itemsize, problem.given("x"), weighted)
        width = tile_width(problem.shape.channel * coalesced, problem.shape.inner, problem.itemsize, TILE)
        tiled = Tiled(
            problem, coalesced, width, sums=3 if weighted else 2, scratch=sizes.ORIGINS,
            workspace=sizes.COLUMN_MOMENTS,
        )  # fmt: skip
        family, tasks, count = "outer_reduction", tiled.tasks, tiled.partials
        division, own["workspace"] = {"tiles": p.record(tiled.tiles)}, problem.workspace(tiled.workspace)
    else:
        problem = problem.halved()
        tasks = kept * sizes.segment_count(problem.shape, chunks_of(problem))
        family, count = "inner_reduction", len(Part._fields) * tasks
        division = {"chunks": p.record(chunks_of(problem))}
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
    shape: Shape | Slabs, kind: Kind, xs: AnyStrides, ys: AnyStrides, rs: AnyStrides | None, parameters: Kinds,
    given_rstd: bool, relu: bool, num_threads: int,
) -> Program:  # fmt: skip
    """``program(x, y, residual, mean, spread, gamma, beta, eps, nontemporal)``: see `records.Parameters`.

    Nontemporal is one of `memory.Nontemporal`.
    """
    arrays = {"x": kind, "y": kind, "residual": kind if rs else None}
    arrays |= dict(zip(Parameters._fields, parameters, strict=True))
    p = Program(num_threads, math.prod(shape), arrays, ["eps", "nontemporal"])
    problem = problem_of(p, shape, kind, num_threads, {"x": xs, "y": ys, "residual": rs})
    table = table_of(p, problem.kept, Parameters(mean=0.0, spread=1.0, gamma=1.0, beta=0.0))
    _add_normalize(problem, table, p.number("eps"), given_rstd, relu)
    return p


def _add_normalize(
    problem: Problem | ProblemInSlabs, table: Argument, eps: Argument | float, given_rstd: bool, relu: bool
) -> None:  # fmt: skip
    if isinstance(problem, ProblemInSlabs):
        slab_plans.add_normalize(problem, table, eps, given_rstd, relu)
        return
    p, shape, itemsize = problem.program, problem.shape, problem.itemsize
    names = "x", "y", "residual"
    strides, given = problem.given(*names), problem.arrays(*names) | {"shape": problem.of_shape}
    numbers: dict[str, Any] = {"table": table, "eps": eps, "given_rstd": given_rstd}
    if shape.inner < MEMORY_ORDER_FROM and is_outer(shape, strides):
        coalesced = coalescing(shape, itemsize, strides)
        width = tile_width(shape.channel * coalesced, shape.inner, itemsize, ROW)
        tiled = Tiled(problem, coalesced, width, workspace=sizes.AFFINE)
        p.launch(
            "outer_reduction.normalize", tiled.tasks, **given, tiles=p.record(tiled.tiles), **numbers,
            workspace=problem.workspace(tiled.workspace), relu=option(relu),
            nontemporal=problem.nontemporal(tiled.whole_lines(problem.given("y"))),
        )  # fmt: skip
    else:
        order = InOrder(problem, ["x", "residual"], ["y"])
        given = order.problem.arrays(*names) | {"shape": order.problem.of_shape, "walk": p.record(order.walk)}
        p.launch(
            "inner_reduction.normalize", order.tasks, **given, **numbers,
            workspace=problem.workspace(sizes.AFFINE * problem.num_threads * order.pitch), relu=option(relu),
            nontemporal=problem.nontemporal_rows(order.walk.run),
        )  # fmt: skip


@lru_cache(maxsize=1024)
def forward(
    shape: Shape | Slabs, kind: Kind, xs: AnyStrides, ws: Strides | None, weights: Kind | None, ys: AnyStrides,
    rs: AnyStrides | None, parameters: Kinds, relu: bool, num_threads: int,
) -> Program:  # fmt: skip
    """``program(x, weight, y, residual, gamma, beta, table, eps, nontemporal)``; the table: `records.MomentRows`."""
    arrays = {"x": kind, "weight": weights, "y": kind, "residual": kind if rs else None}
    arrays |= {**dict(zip(("gamma", "beta"), parameters, strict=True)), "table": "f8*"}
    p = Program(num_threads, 2 * math.prod(shape), arrays, ["eps", "nontemporal"])
    p.followed_by = partial(
        backward, shape, kind, xs, xs, ys if relu and rs else None, ws, weights, xs, rs,
        ("f8*",) * len(GradientParameters._fields), frozen=False, recompute=relu and not rs, num_threads=num_threads,
    )  # fmt: skip
    problem = problem_of(p, shape, kind, num_threads, {"x": xs, "weight": ws, "y": ys, "residual": rs})
    kept, table, eps = problem.kept, p.array("table"), p.number("eps")
    rows = MomentRows(*(table.after(i * kept) for i in range(len(MomentRows._fields))))
    p.vector("gamma", kept, 1.0, rows.gamma)
    p.vector("beta", kept, 0.0, rows.beta)
    if not _add_fused(problem, table, eps, relu):
        _add_moments(problem, table, eps)
        _add_normalize(problem, rows.mean, 0.0, True, relu)
    return p


def _add_fused(problem: Problem | ProblemInSlabs, table: Argument, eps: Argument, relu: bool) -> bool:
    """A forward pass in one launch, if what it reads twice stays in a core's cache; whether it does."""
    if isinstance(problem, ProblemInSlabs):
        return slab_plans.add_forward(problem, table, eps, relu)
    p, names, of_x = problem.program, ("x", "y", "residual"), problem.given("x")
    tile = 0
    if not problem.weighted and is_outer(problem.shape, problem.given(*names)):
        tile = problem.fused_tile(1) if coalescing(problem.shape, problem.itemsize, of_x) == 1 else 0
    if tile:
        tiled = Tiled(problem, 1, tile, scratch=sizes.ORIGINS, workspace=sizes.COLUMN_MOMENTS, fused=True)
        p.launch(
            "outer_reduction.forward", tiled.tasks, **problem.arrays(*names), shape=problem.of_shape,
            tiles=p.record(tiled.tiles), table=table, eps=eps, partials=p.scratch(tiled.partials, "f8*"),
            workspace=problem.workspace(tiled.workspace), relu=option(relu),
            nontemporal=problem.nontemporal(tiled.whole_lines(problem.given("y"))),
        )  # fmt: skip
        return True
    if problem.whole_channels() and not is_outer(problem.shape, of_x, problem.weighted):
        problem = problem.halved()
        origins = _add_origins(problem)
        p.launch(
            "inner_reduction.forward", problem.kept, **problem.arrays("x", "weight", "y", "residual"),
            shape=problem.of_shape, chunks=p.record(chunks_of(problem)), origins=origins, table=table, eps=eps,
            workspace=problem.workspace(sizes.AFFINE * problem.num_threads * sizes.PAD), relu=option(relu),
            nontemporal=problem.nontemporal_rows(problem.shape.inner),
        )  # fmt: skip
        return True
    return False
