"""A fault in a CUDA kernel."""

from typing import NamedTuple


class Fault(NamedTuple):
    name: str
    kernel: str
    """In whose text it is."""
    text: str
    """Of the kernel, where it is found once."""
    wrong: str
    run: str
    """What finds it, under one of the schedules."""
    rule: str = ""
    """Of the model of memory, which finds it in every schedule: `race`, or `first-level cache`. Else results do."""
