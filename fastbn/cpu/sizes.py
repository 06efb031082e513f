"""How kernels cut arrays into parts: what both the plans and the compiled kernels compute, from shapes alone."""

from __future__ import annotations

from fastbn.cpu import records

# --- rows: a channel's rows one after the other -----------------------------------------------------------------------

CHUNK = 1024  # values: 32 float32 additions per lane (rounding below 1e-6), and L1 holds it for a second look
CHUNK_ROWS = 32  # at most: of rows shorter than a vector each is one addition per lane
SEGMENT = 64  # chunks
PIECE = 16384  # values of a row at most between places where elementwise work may be divided
PAD = 16  # values behind each table of channels, and each array of work: whole vectors are read and written


def chunk_grid(outer: int, inner: int) -> tuple[int, int]:
    """Rows and columns of a chunk: whole rows while two fit, else pieces of two rows, or of the only one."""
    if 2 * inner <= CHUNK:
        return min(CHUNK // max(inner, 1), CHUNK_ROWS), max(inner, 1)
    rows = min(2, outer)
    pieces = max(1, round(rows * inner / CHUNK))
    return rows, -(-inner // (16 * pieces)) * 16


def piece_count(shape: records.Shape) -> int:
    """Pieces of rows in the whole array, in the order of memory."""
    return shape.batch * shape.outer * shape.channel * -(-shape.inner // PIECE)


def chunk_count(shape: records.Shape | records.Slabs, largest: records.Chunks) -> int:
    """Chunks of a slab."""
    if 0 < shape.outer <= largest.rows and 0 < shape.inner <= largest.columns:  # divisions take as long as 20 values
        return 1
    return -(-shape.outer // largest.rows) * -(-shape.inner // largest.columns)


def segment_count(shape: records.Shape | records.Slabs, largest: records.Chunks) -> int:
    """Segments of a slab."""
    return -(-chunk_count(shape, largest) // SEGMENT)


def slabs_of_segment(slabs: int, values: int) -> int:
    """Slabs whose sums go together where each has so many values: about as many as a segment has."""
    return min(slabs, max(1, SEGMENT * CHUNK // max(1, values)))


def segments_of_slabs(shape: records.Slabs, largest: records.Chunks) -> int:
    """Segments of all slabs of a channel."""
    slabs = shape.far * shape.near
    together = slabs_of_segment(slabs, shape.outer * shape.inner)
    return -(-slabs // together) if together > 1 else slabs * segment_count(shape, largest)


def rows_of_part(inner: int) -> int:
    """Rows of a slab, at most, that a task of elementwise work has."""
    return max(1, PIECE // inner)


# --- columns: rows through all channels -------------------------------------------------------------------------------

ROW_CHUNK = 128  # rows: 32 + 2 float32 additions per sum keep its rounding below 1e-6
ROW_SEGMENT = 4096  # rows, at most: two float64 a cell and segment are 0.1 % of float32 data, 0.2 % of halves
COALESCED = 1024  # columns, about, of coalesced rows
MANY = 2048  # cells, of which two threads have tiles enough for themselves


def segment_rows(rows: int, cells: int) -> int:
    """Rows of a segment: an even number of equal segments, so that two threads have the same to do."""
    if rows < 2 * ROW_CHUNK or (rows <= ROW_SEGMENT and cells >= MANY):
        return max(rows, 1)
    return -(-rows // (2 * -(-rows // (2 * ROW_SEGMENT))))


def rows_together(rows: int, channels: int) -> int:
    """How many rows of a slab are taken as one, if they lie side by side; none is left over."""
    return next(n for n in range(max(1, min(COALESCED // channels, rows)), 0, -1) if rows % n == 0)


def padded(cells: int, tile: int) -> int:
    """Results of one segment, each tile's padded: vectors written across its last cell meet no other tile's."""
    return -(-cells // tile) * -(-tile // PAD) * PAD


def pitch(columns: int) -> int:
    """Numbers from row to row of a thread's table, which are not about a multiple of 2 kB apart.

    There a load waits for a store to another row, since the last 12 bits of their addresses are the same: sums of rows
    of 256, 512, 1024 or 2048 columns took up to 2.7 times as long.
    """
    return columns + 64 if (columns + 32) % 256 < 64 else columns


# --- arrays of a thread -----------------------------------------------------------------------------------------------

AFFINE, LINEAR = len(records.Affine._fields), len(records.Linear._fields)  # of each channel or column
COLUMN_MOMENTS, COLUMN_SUMS = len(records.ColumnMoments._fields), len(records.ColumnSums._fields)
ORIGINS, SUMS = 2, len(records.Sums._fields)  # in float64, of each cell: the origin and the centre; two sums
