"""Plans for arrays in slabs (`records.Slabs`): see `plans`, and the kernels of `inner_slabs` and `outer_slabs`."""

from __future__ import annotations

from typing import Any

from fastbn.cpu import sizes
from fastbn.cpu.division import (
    FEW_PARTIALS,
    FEWEST_ROWS,
    PIECES,
    ROW,
    TILE,
    GradientOptions,
    ProblemInSlabs,
    option,
    tile_width,
)
from fastbn.cpu.program import Argument
from fastbn.cpu.records import Chunks, Part, SegmentSums, Shape, Slabs, SlabStrides, Strides, Tiles


def add_moments(problem: ProblemInSlabs, table: Argument, eps: Argument) -> None:
    p, channels = problem.program, problem.shape.channel
    given: dict[str, Any] = problem.arrays("x") | {"shape": problem.of_shape}
    own: dict[str, Any] = {}
    if _is_outer(problem.shape):
        tiled = TiledSlabs(problem, problem.given("x"), TILE, sums=True)
        count = tiled.partials(2) + sizes.ORIGINS * problem.num_threads * sizes.padded(tiled.width, tiled.width)
        given |= {"tiles": tiled.tiles, "partials": p.scratch(count, "f8*")}
        own["workspace"] = problem.workspace(tiled.of_threads(sizes.COLUMN_MOMENTS))
        family, tasks = "outer_slabs", tiled.tasks
    else:
        tasks = channels * _segments(problem.shape)
        count = len(Part._fields) * tasks
        given |= {"chunks": p.record(_chunks_of(problem.shape)), "partials": p.scratch(count, "f8*")}
        family = "inner_slabs"
    p.launch(f"{family}.moments_of_segments", tasks, **given, **own)
    p.launch(f"{family}.channel_moments", channels, count < FEW_PARTIALS, **given, table=table, eps=eps)


def add_normalize(
    problem: ProblemInSlabs, table: Argument, eps: Argument | float, given_rstd: bool, relu: bool
) -> None:  # fmt: skip
    p, names = problem.program, ("x", "y", "residual")
    arrays = problem.arrays(*names) | {"shape": problem.of_shape}
    numbers: dict[str, Any] = {"table": table, "eps": eps, "given_rstd": given_rstd}
    if _is_outer(problem.shape):
        tiled = TiledSlabs(problem, problem.given(*names), ROW)
        p.launch(
            "outer_slabs.normalize", tiled.tasks, **arrays, tiles=tiled.tiles, **numbers,
            workspace=problem.workspace(tiled.of_threads(sizes.AFFINE)), relu=option(relu),
            nontemporal=problem.nontemporal(tiled.whole_lines(problem.given("y"))),
        )  # fmt: skip
    else:
        tasks, rows = _parts(problem.shape)
        p.launch(
            "inner_slabs.normalize", tasks, **arrays, **numbers, workspace=_of_threads(problem, sizes.AFFINE),
            relu=option(relu), **_writing(problem, rows, problem.given("x", "residual"), problem.given("y")),
        )  # fmt: skip


def add_forward(problem: ProblemInSlabs, table: Argument, eps: Argument, relu: bool) -> bool:
    """In one launch, if threads have whole channels, which stay in a core's cache; whether it does."""
    p, shape, names = problem.program, problem.shape, ("x", "y", "residual")
    if _is_outer(shape) or not problem.whole_channels():
        return False
    p.launch(
        "inner_slabs.forward", shape.channel, **problem.arrays(*names), shape=problem.of_shape,
        chunks=p.record(_chunks_of(shape)), table=table, eps=eps, workspace=_of_threads(problem, sizes.AFFINE),
        relu=option(relu), **_writing(problem, shape.outer, problem.given("x", "residual"), problem.given("y")),
    )  # fmt: skip
    return True


def add_grad_sums(
    problem: ProblemInSlabs, parameters: Argument, distances: Argument | None, how: GradientOptions
) -> None:
    """And, if they are asked for, the `records.Distances` of dx."""
    frozen, mixed, recompute = how
    p, names, channels = problem.program, ("dy", "x", "y"), problem.shape.channel
    results: dict[str, Any] = {"sums": p.array("sums"), "distances": distances, "frozen": frozen, "mixed": mixed}
    arrays = problem.arrays(*names) | {"shape": problem.of_shape}
    if _is_outer(problem.shape):
        tiled = TiledSlabs(problem, problem.given(*names), TILE, sums=True)
        partials = p.scratch(tiled.partials(2), "f8*")
        p.launch(
            "outer_slabs.grad_sums_of_segments", tiled.tasks, **arrays, tiles=tiled.tiles, parameters=parameters,
            partials=partials, workspace=problem.workspace(tiled.of_threads(sizes.COLUMN_SUMS)),
            affine=problem.affine(tiled.of_threads(1), recompute),
        )  # fmt: skip
        # The kernel reads rows that are left behind coalesced ones; slabs leave none, so steps do not matter.
        nowhere = {name: p.strided(p.array(name), problem.strides[name] and Strides(0, 0, 0, 0)) for name in names}
        p.launch(
            "outer_gradients.channel_grad_sums", channels, tiled.partials(2) < FEW_PARTIALS, **nowhere,
            shape=p.record(Shape(1, tiled.slabs * tiled.coalesced, channels, 1)), tiles=tiled.tiles,
            parameters=parameters, partials=partials, **results, recompute=option(recompute),
        )  # fmt: skip
    else:
        segments = _segments(problem.shape)
        count = len(SegmentSums._fields) * channels * segments
        partials = p.scratch(count, "f8*")
        p.launch(
            "inner_slabs.grad_sums_of_segments", channels * segments, **arrays,
            chunks=p.record(_chunks_of(problem.shape)), parameters=parameters, partials=partials,
            recompute=option(recompute),
        )  # fmt: skip
        p.launch(
            "inner_gradients.channel_grad_sums", channels, count < FEW_PARTIALS, x=p.array("x"), kept=channels,
            segments=segments, parameters=parameters, partials=partials, **results,
        )  # fmt: skip


def add_grad_input(problem: ProblemInSlabs, parameters: Argument, distances: Argument, how: GradientOptions) -> None:
    frozen, recompute = how.frozen, how.recompute
    p, written, given = problem.program, ("dx", "dresidual"), parameters if recompute else None
    read = ("dy", "y") if frozen else ("dy", "x", "y")
    arrays = problem.arrays("dy", "x", "y", *written) | {"x": problem.array("x", absent=frozen)}
    if _is_outer(problem.shape):
        tiled = TiledSlabs(problem, problem.given(*read, *written), ROW // 2)
        p.launch(
            "outer_slabs.grad_input", tiled.tasks, **arrays, shape=problem.of_shape, tiles=tiled.tiles,
            parameters=given, distances=distances, workspace=problem.workspace(tiled.of_threads(sizes.LINEAR)),
            affine=problem.affine(tiled.of_threads(1), recompute),
            nontemporal=problem.nontemporal(tiled.whole_lines(problem.given(*written))),
        )  # fmt: skip
    else:
        tasks, rows = _parts(problem.shape)
        p.launch(
            "inner_slabs.grad_input", tasks, **arrays, shape=problem.of_shape, parameters=given, distances=distances,
            workspace=_of_threads(problem, sizes.LINEAR), affine=_affine(problem, recompute),
            **_writing(problem, rows, problem.given(*read), problem.given(*written)),
        )  # fmt: skip


def add_backward(problem: ProblemInSlabs, parameters: Argument, how: GradientOptions) -> bool:
    """As `add_forward`."""
    frozen, mixed, recompute = how
    p, shape, read, written = problem.program, problem.shape, ("dy", "x", "y"), ("dx", "dresidual")
    if _is_outer(shape) or not problem.whole_channels():
        return False
    p.launch(
        "inner_slabs.backward", shape.channel, **problem.arrays(*read, *written),
        live=problem.array("x", absent=frozen), shape=problem.of_shape, chunks=p.record(_chunks_of(shape)),
        parameters=parameters, mixed=mixed, sums=p.array("sums"), workspace=_of_threads(problem, sizes.LINEAR),
        affine=_affine(problem, recompute),
        **_writing(problem, shape.outer, problem.given(*read), problem.given(*written)),
    )  # fmt: skip
    return True


# --- channels-first ---------------------------------------------------------------------------------------------------


def _is_outer(shape: Slabs) -> bool:
    return shape.inner == 1


def _chunks_of(shape: Slabs) -> Chunks:
    """Whole pairs of rows, which come from two halves."""
    rows, columns = sizes.chunk_grid(shape.outer, shape.inner)
    return Chunks(rows - rows % 2 if rows > 1 else rows, columns)


def _segments(shape: Slabs) -> int:
    """Of each channel."""
    return sizes.segments_of_slabs(shape, _chunks_of(shape))


def _parts(shape: Slabs) -> tuple[int, int]:
    """Tasks of an elementwise pass, and rows of each."""
    rows = min(sizes.rows_of_part(shape.inner), shape.outer)
    return shape.far * shape.near * shape.channel * -(-shape.outer // rows), rows


def _of_threads(problem: ProblemInSlabs, numbers: int) -> Argument:
    """So many of each thread's channel."""
    return problem.workspace(numbers * problem.num_threads * sizes.PAD)


def _affine(problem: ProblemInSlabs, recompute: bool) -> Argument | None:
    return problem.affine(problem.num_threads * sizes.PAD, recompute)


def _writing(
    problem: ProblemInSlabs, rows: int, read: list[SlabStrides], written: list[SlabStrides]
) -> dict[str, Any]:  # fmt: skip
    """Whether so many rows are written in one run, and past the caches."""
    inner = problem.shape.inner
    side_by_side = all(s.outer == inner for s in written) and all(s.outer >= inner for s in read)
    run = rows * inner if side_by_side else inner
    return {"side_by_side": side_by_side, "nontemporal": problem.nontemporal_rows(run)}


# --- channels-last ----------------------------------------------------------------------------------------------------


class TiledSlabs:
    """A division: some slabs of a tile are a task.

    Parameters
    ----------
    problem : ProblemInSlabs
    strides : list of SlabStrides
        Of all arrays.
    width : int
        Columns of a tile, about.
    sums : bool
        Whether a task writes sums: then all about it follows from shape and strides.
    """

    def __init__(self, problem: ProblemInSlabs, strides: list[SlabStrides], width: int, sums: bool = False) -> None:
        far, near, outer, channels, _inner = problem.shape
        self.slabs, self._itemsize, self._threads = far * near, problem.itemsize, problem.num_threads
        side_by_side = all(s.outer == channels for s in strides)
        self.coalesced = sizes.rows_together(outer, channels) if side_by_side else 1
        self._cells, rows = channels * self.coalesced, outer // self.coalesced
        self.width = tile_width(self._cells, 1, problem.itemsize, width)
        if sums:
            height = sizes.segment_rows(self.slabs * rows, self._cells) // rows
        else:
            height = self.slabs // max(1, min(PIECES * problem.num_threads, self.slabs * rows // FEWEST_ROWS))
        self._segments, height = -(-self.slabs // max(1, height)), max(1, height)
        self.tasks = self._segments * -(-self._cells // self.width)
        self.tiles = problem.program.record(Tiles(self.coalesced, self.width, height))

    def of_threads(self, rows: int) -> int:
        """Numbers of each thread's tile, in so many rows."""
        return self._threads * rows * sizes.pitch(self.width + sizes.PAD)

    def partials(self, sums: int) -> int:
        """Of so many sums of each cell and segment."""
        return sums * self._segments * sizes.padded(self._cells, self.width)

    def whole_lines(self, strides: list[SlabStrides]) -> bool:
        """Whether every row of a tile is whole cache lines, if the array starts on one."""
        columns = 0 if self.width >= self._cells else self.width
        steps = [columns, *(step for s in strides for step in (s.far, s.near, s.outer * self.coalesced))]
        return all(step * self._itemsize % 64 == 0 for step in steps)
