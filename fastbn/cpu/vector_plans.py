"""Programs of `kernels.vectors`: small work on a number per kept index, which one thread does."""

from __future__ import annotations

from functools import lru_cache

from fastbn.cpu.division import Kind, Kinds, table_of
from fastbn.cpu.program import Program
from fastbn.cpu.records import Part, Running, Scale


@lru_cache(maxsize=1024)
def find_beyond(kept: int, parameters: Kinds) -> Program:
    """``program(rstd, gamma, out)``."""
    p = Program(1, kept, dict(zip(("rstd", "gamma"), parameters, strict=True)) | {"out": "f8*"})
    table = table_of(p, kept, Scale(rstd=1.0, gamma=1.0))
    p.launch("vectors.find_beyond", 1, table=table, kept=kept, out=p.array("out"))
    return p


@lru_cache(maxsize=1024)
def update_running(kept: int, parameters: Kinds, skip_nonfinite: bool) -> Program:
    """``program(mean, var, count, batch_mean, m2, new_mean, new_var, rate, correction)``; new ones are f4* or f8*."""
    names = (*Running._fields, "new_mean", "new_var")
    p = Program(1, kept, dict(zip(names, parameters, strict=True)), ["rate", "correction"])
    table = table_of(p, kept, Running(0.0, 0.0, 0.0, 0.0, 0.0))
    p.launch(
        "vectors.update_running", 1, table=table, kept=kept, rate=p.number("rate"),
        correction=p.number("correction"), skip_nonfinite=skip_nonfinite, new_mean=p.array("new_mean"),
        new_var=p.array("new_var"),
    )  # fmt: skip
    return p


@lru_cache(maxsize=1024)
def merge(kept: int, parameters: tuple[Kinds, ...], begin: bool, end: bool) -> Program:
    """``program(state, *counts_means_and_m2s)``: the first part begins a state, the last one ends it, if so."""
    names = [(f"count{i}", f"mean{i}", f"m2{i}") for i in range(len(parameters))]
    arrays: dict[str, Kind | None] = {"state": "f8*"}
    for three, kinds in zip(names, parameters, strict=True):
        arrays |= zip(three, kinds, strict=True)
    p = Program(1, kept, arrays)
    state = p.array("state")
    for i, three in enumerate(names):
        part = table_of(p, kept, Part(0.0, 0.0, 0.0), names=three)
        step = "begin_union" if begin and i == 0 else "add_to_union"
        p.launch(f"vectors.{step}", 1, part=part, kept=kept, state=state)
    if end:
        p.launch("vectors.end_union", 1, kept=kept, state=state)
    return p
