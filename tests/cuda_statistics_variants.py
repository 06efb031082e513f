"""What statistics of arrays as they lie are compiled to, for `tests.cuda_compile`."""

from __future__ import annotations

import itertools
from functools import lru_cache

from fastbn.dimensions import dimensions
from tests.cuda_variants import CHIPS, ITEMSIZES, Variant, covering


@lru_cache(maxsize=16)
def of_statistics(architecture: int) -> tuple[Variant, ...]:
    """What statistics of arrays as they lie are compiled to, in which every pair of choices occurs that can."""
    from fastbn.cuda import launch, strided

    chip, found = CHIPS[architecture], set()
    device = launch.Device(0, architecture, chip.processors, chip.shared)
    shapes = {  # and kept axes: rows, long and short, of several dimensions; columns; few of them
        (1 << 20,): (), (1 << 12, 7): (0,), (64, 1 << 10): (0,), (8, 16, 1 << 10): (1,), (8, 4, 30, 50): (1,),
        (4, 6, 4, 6, 4, 8): (1, 3), (1 << 12, 256): (1,), (1 << 12, 254): (1,), (1 << 12, 255): (1,),
        (16, 33, 64): (0, 2), (9, 33, 8, 65): (1, 3), (1 << 16, 3): (1,), (1 << 16, 33, 3): (2,),
    }  # fmt: skip
    for (shape, kept), sliced in itertools.product(shapes.items(), (False, True)):
        steps = [1]
        for n in shape[:0:-1]:
            steps.insert(0, steps[0] * (n + (4 if sliced else 0)))
        d, _ = dimensions(shape, tuple(steps), tuple(steps), (0,) * len(shape), frozenset(kept))
        wanted = ((True, False), (False, True), (True, True))
        for dtype, (sums, squares), *flags in itertools.product(range(13), wanted, *[(False, True)] * 3):
            wide, masked, nan = flags
            if (dtype > strided.FLOAT64 and (wide or nan)) or (dtype == strided.FLOAT64 and not wide):
                continue
            data = strided.Data(tuple(d), dtype, ITEMSIZES[dtype], 0, masked, nan, wide, sums, squares)
            division = strided.divide(data, device)
            assert division is not None
            found.add(Variant("strided_statistics", strided.macros_of(data, division)))
            found |= {Variant("finish_strided", strided.finishing_macros(data, threads)) for threads in (32, 256)}
    every = sorted(found)
    names = dict.fromkeys(name for variant in every for name, _ in variant.macros)
    return covering(every, lambda variant: (variant.kernel, *(variant[name] for name in names)))
