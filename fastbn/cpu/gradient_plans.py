"""Plans of gradients: see `plans`."""

from __future__ import annotations

import math
from functools import lru_cache

from fastbn.cpu import sizes, slab_plans
from fastbn.cpu.division import (
    FEW_PARTIALS,
    MEMORY_ORDER_FROM,
    ROW,
    TILE,
    AnyStrides,
    GradientOptions,
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
from fastbn.cpu.program import Argument, Program
from fastbn.cpu.records import Distances, GradientParameters, SegmentSums, Shape, Slabs, Strides, Sums

DEFAULTS = GradientParameters(mean=0.0, rstd=1.0, gamma=1.0, count=1.0, beta=0.0, dmean=0.0, dvar=0.0)


@lru_cache(maxsize=1024)
def grad_sums(
    shape: Shape | Slabs, kind: Kind, dys: AnyStrides, xs: AnyStrides, ys: AnyStrides | None, ws: Strides | None,
    weights: Kind | None, parameters: Kinds, recompute: bool, num_threads: int,
) -> Program:  # fmt: skip
    """``program(dy, x, y, weight, *GradientParameters, sums)``: these are `records.Sums`."""
    arrays = {"dy": kind, "x": kind, "y": kind if ys else None, "weight": weights}
    arrays |= {**dict(zip(GradientParameters._fields, parameters, strict=True)), "sums": "f8*"}
    p = Program(num_threads, 2 * math.prod(shape), arrays)
    problem = problem_of(p, shape, kind, num_threads, {"dy": dys, "x": xs, "y": ys, "weight": ws})
    table = table_of(p, problem.kept, DEFAULTS, before="dmean" if recompute else "gamma")
    _add_grad_sums(problem, table, None, GradientOptions(recompute=recompute))
    return p


def _add_grad_sums(
    problem: Problem | ProblemInSlabs, parameters: Argument, distances: Argument | None, how: GradientOptions
) -> None:
    """And, if they are asked for, the `records.Distances` of dx."""
    if isinstance(problem, ProblemInSlabs):
        slab_plans.add_grad_sums(problem, parameters, distances, how)
        return
    frozen, mixed, recompute = how
    p, kept, weighted = problem.program, problem.kept, problem.weighted
    strides = problem.given("dy", "x", "y")
    if is_outer(problem.shape, strides, weighted):
        coalesced = coalescing(problem.shape, problem.itemsize, strides, weighted)
        width = tile_width(problem.shape.channel * coalesced, problem.shape.inner, problem.itemsize, TILE)
        tiled = Tiled(problem, coalesced, width, sums=2, workspace=sizes.COLUMN_SUMS)
        tiles, partials = p.record(tiled.tiles), p.scratch(tiled.partials, "f8*")
        p.launch(
            "outer_gradients.grad_sums_of_segments", tiled.tasks, **problem.arrays("dy", "x", "y", "weight"),
            shape=problem.of_shape, tiles=tiles, parameters=parameters, partials=partials,
            workspace=problem.workspace(tiled.workspace), affine=problem.affine(tiled.columns, recompute),
        )  # fmt: skip
        p.launch(
            "outer_gradients.channel_grad_sums", kept, tiled.partials < FEW_PARTIALS, **problem.arrays("dy", "x", "y"),
            shape=problem.of_shape, tiles=tiles, parameters=parameters, partials=partials, sums=p.array("sums"),
            distances=distances, frozen=frozen, mixed=mixed, recompute=option(recompute),
        )  # fmt: skip
    else:
        problem = problem.halved()
        segments = kept * sizes.segment_count(problem.shape, chunks_of(problem))
        count = len(SegmentSums._fields) * segments
        partials = p.scratch(count, "f8*")
        p.launch(
            "inner_gradients.grad_sums_of_segments", segments, **problem.arrays("dy", "x", "y", "weight"),
            shape=problem.of_shape, chunks=p.record(chunks_of(problem)), parameters=parameters, partials=partials,
            recompute=option(recompute),
        )  # fmt: skip
        p.launch(
            "inner_gradients.channel_grad_sums", kept, count < FEW_PARTIALS, x=p.array("x"), kept=kept,
            segments=segments // max(1, kept), parameters=parameters, partials=partials, sums=p.array("sums"),
            distances=distances, frozen=frozen, mixed=mixed,
        )  # fmt: skip


@lru_cache(maxsize=1024)
def grad_input(
    shape: Shape | Slabs, kind: Kind, dys: AnyStrides, xs: AnyStrides, ys: AnyStrides | None, ws: Strides | None,
    weights: Kind | None, dxs: AnyStrides, drs: AnyStrides | None, parameters: Kinds, recompute: bool, num_threads: int,
) -> Program:  # fmt: skip
    """``program(dy, x, y, weight, dx, dresidual, *GradientParameters, *Sums, nontemporal)``; both of `records`."""
    arrays = {"dy": kind, "x": kind, "y": kind if ys else None, "weight": weights, "dx": kind}
    names = (*GradientParameters._fields, *Sums._fields)
    arrays |= {"dresidual": kind if drs else None, **dict(zip(names, parameters, strict=True))}
    p = Program(num_threads, 2 * math.prod(shape), arrays, ["nontemporal"])
    strides = {"dy": dys, "x": xs, "y": ys, "weight": ws, "dx": dxs, "dresidual": drs}
    problem = problem_of(p, shape, kind, num_threads, strides)
    table, mixed = _gradient_parameters(problem, parameters, recompute)
    sums, distances = (
        table_of(p, problem.kept, Sums(dgamma=0.0, dbeta=0.0)),
        p.scratch(len(Distances._fields) * problem.kept, "f8*"),
    )
    p.launch(
        "common.find_distances", problem.kept, True, x=p.array("x"), parameters=table, kept=problem.kept, mixed=mixed,
        sums=sums, distances=distances,
    )  # fmt: skip
    _add_grad_input(problem, table, distances, GradientOptions(recompute=recompute))
    return p


def _gradient_parameters(
    problem: Problem | ProblemInSlabs, parameters: Kinds, recompute: bool
) -> tuple[Argument, bool]:
    """A table of `records.GradientParameters`, and whether dmean or dvar is among them."""
    kinds = GradientParameters(*parameters[: len(GradientParameters._fields)])
    mixed = kinds.dmean is not None or kinds.dvar is not None
    before = None if mixed else "dmean" if recompute else "beta"
    return table_of(problem.program, problem.kept, DEFAULTS, before=before), mixed


def _add_grad_input(
    problem: Problem | ProblemInSlabs, parameters: Argument, distances: Argument, how: GradientOptions
) -> None:
    """Kernels have the parameters only where they compute y again."""
    frozen, recompute = how.frozen, how.recompute
    if isinstance(problem, ProblemInSlabs):
        slab_plans.add_grad_input(problem, parameters, distances, how)
        return
    p, shape, itemsize = problem.program, problem.shape, problem.itemsize
    names = "dy", "x", "y", "weight", "dx", "dresidual"
    read, written = ["dy", "y"] if frozen else ["dy", "x", "y"], ["dx", "dresidual"]
    strides = problem.given(*read, *written)
    if shape.inner < MEMORY_ORDER_FROM and is_outer(shape, strides, problem.weighted):
        coalesced = coalescing(shape, itemsize, strides, problem.weighted)
        width = tile_width(
            shape.channel * coalesced, shape.inner, itemsize, ROW // 2
        )  # with five numbers a column, not three
        tiled = Tiled(problem, coalesced, width, workspace=sizes.LINEAR)
        arrays = problem.arrays(*names) | {"x": problem.array("x", absent=frozen), "shape": problem.of_shape}
        p.launch(
            "outer_input_gradients.grad_input", tiled.tasks, **arrays, tiles=p.record(tiled.tiles),
            parameters=parameters if recompute else None, distances=distances,
            workspace=problem.workspace(tiled.workspace), affine=problem.affine(tiled.columns, recompute),
            nontemporal=problem.nontemporal(tiled.whole_lines(problem.given("dx", "dresidual"))),
        )  # fmt: skip
    else:
        order = InOrder(problem, [*read, "weight"], written)
        arrays = order.problem.arrays(*names) | {"x": order.problem.array("x", absent=frozen)}
        arrays |= {"shape": order.problem.of_shape, "walk": p.record(order.walk)}
        p.launch(
            "inner_gradients.grad_input", order.tasks, **arrays, parameters=parameters if recompute else None,
            distances=distances, workspace=problem.workspace(sizes.LINEAR * problem.num_threads * order.pitch),
            affine=problem.affine(problem.num_threads * order.pitch, recompute),
            nontemporal=problem.nontemporal_rows(order.walk.run),
        )  # fmt: skip


@lru_cache(maxsize=1024)
def backward(
    shape: Shape | Slabs, kind: Kind, dys: AnyStrides, xs: AnyStrides, ys: AnyStrides | None, ws: Strides | None,
    weights: Kind | None, dxs: AnyStrides, drs: AnyStrides | None, parameters: Kinds, frozen: bool, recompute: bool,
    num_threads: int,
) -> Program:  # fmt: skip
    """``program(dy, x, y, weight, dx, dresidual, *GradientParameters, sums, nontemporal)``; the sums are `Sums`."""
    arrays = {"dy": kind, "x": kind, "y": kind if ys else None, "weight": weights, "dx": kind}
    arrays |= {"dresidual": kind if drs else None}
    arrays |= {**dict(zip(GradientParameters._fields, parameters, strict=True)), "sums": "f8*"}
    p = Program(num_threads, 3 * math.prod(shape), arrays, ["nontemporal"])
    strides = {"dy": dys, "x": xs, "y": ys, "weight": ws, "dx": dxs, "dresidual": drs}
    problem = problem_of(p, shape, kind, num_threads, strides)
    table, mixed = _gradient_parameters(problem, parameters, recompute)
    how = GradientOptions(frozen, mixed, recompute)
    if not _add_fused(problem, table, how):
        distances = p.scratch(len(Distances._fields) * problem.kept, "f8*")
        _add_grad_sums(problem, table, distances, how)
        _add_grad_input(problem, table, distances, how)
    return p


def _add_fused(problem: Problem | ProblemInSlabs, table: Argument, how: GradientOptions) -> bool:
    """A backward pass in one launch, if what it reads twice stays in a core's cache; whether it does."""
    if isinstance(problem, ProblemInSlabs):
        return slab_plans.add_backward(problem, table, how)
    frozen, mixed, recompute = how
    p, read, written = problem.program, ("dy", "x", "y"), ("dx", "dresidual")
    sums, tile = p.array("sums"), 0
    if not problem.weighted and is_outer(problem.shape, problem.given(*read, *written)):
        fits = coalescing(problem.shape, problem.itemsize, problem.given(*read)) == 1
        tile = problem.fused_tile(2) if fits else 0
    if tile:
        tiled = Tiled(problem, 1, tile, scratch=sizes.SUMS, workspace=sizes.LINEAR, fused=True)
        p.launch(
            "outer_input_gradients.backward", tiled.tasks, **problem.arrays(*read, *written),
            live=problem.array("x", absent=frozen), shape=problem.of_shape, tiles=p.record(tiled.tiles),
            parameters=table, mixed=mixed, sums=sums,
            partials=p.scratch(tiled.partials, "f8*"), workspace=problem.workspace(tiled.workspace),
            affine=problem.affine(tiled.columns, recompute),
            nontemporal=problem.nontemporal(tiled.whole_lines(problem.given(*written))),
        )  # fmt: skip
        return True
    if problem.whole_channels() and not is_outer(problem.shape, problem.given(*read), problem.weighted):
        problem = problem.halved()
        p.launch(
            "inner_gradients.backward", problem.kept, **problem.arrays(*read, "weight", *written),
            live=problem.array("x", absent=frozen), shape=problem.of_shape, chunks=p.record(chunks_of(problem)),
            parameters=table, mixed=mixed, sums=sums,
            workspace=problem.workspace(sizes.LINEAR * problem.num_threads * sizes.PAD),
            affine=problem.affine(problem.num_threads * sizes.PAD, recompute),
            nontemporal=problem.nontemporal_rows(problem.shape.inner),
        )  # fmt: skip
        return True
    return False
