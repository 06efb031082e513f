"""Numbers that `fastbn.cpu.statistics` and `kernels.statistics` share, and what dtypes and results are called there."""

OF_VALUES, OF_ROWS = 1, 2  # what a mask is of
DIMENSION = 4  # words: size, steps in x, mask and results
FIELDS = 4  # numbers of a part
BUFFER = 512  # values that are converted at once
OF_INNER = FIELDS * 8 + BUFFER + 8  # numbers that a thread of `inner` has for itself
VAR, STD, SUM_OF_SQUARES = range(3)
MOVED = {"n1*": -128, "n2*": -32768}  # what is added to unsigned ones first, so that there is room to add up squares
BYTES = 64  # of small integers that are added up at once
LEAST_SQUARE = 2.0**-900  # below which a sum of squares, unless it is 0, may have lost some
LEAST_WEIGHT = 2.0**-900  # below which the reciprocal of a sum of weights may be infinite
AHEAD_BYTES = 8 << 10  # that rows are prefetched ahead: processors do it within a page alone; 1.3 to 1.6 times as fast
