"""Small kernels in PTX, for tests of the interpreter itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptx.machine import Launch
from tests.ptx.memory import Allocations
from tests.ptx.program import Program

HEADER = """.version 8.8
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 dynamic[];

.visible .entry kernel(
    .param .align 8 .b8 kernel_param_0[64]
)
"""
PREFIXES = {"p": "pred", "rs": "b16", "r": "b32", "f": "f32", "rd": "b64", "fd": "f64"}
DECLARED = " ".join(f".reg .{kind} %{prefix}<99>;" for prefix, kind in PREFIXES.items())

REGISTERS = {"u2": "rs", "i2": "rs", "u4": "r", "i4": "r", "u8": "rd", "i8": "rd", "f4": "f", "f8": "fd"}
"""By NumPy's types."""


def text(body: str, directives: str = "") -> str:
    """A kernel; %r90 is the thread's number in the grid, %r91 in its block, %rd90 to %rd97 its parameters."""
    loads = "\n".join(f"ld.param.u64 %rd{90 + k}, [kernel_param_0+{8 * k}];" for k in range(8))
    numbers = "mov.u32 %r91, %tid.x; mov.u32 %r92, %ctaid.x; mov.u32 %r93, %ntid.x; mad.lo.s32 %r90, %r92, %r93, %r91;"
    return f"{HEADER}{directives}\n{{\n{DECLARED}\n{loads}\n{numbers}\n{body}\nret;\n}}\n"


def line_of(body: str, part: str) -> int:
    """The line of a part of a body in its text."""
    whole = text(body)
    return whole.count("\n", 0, whole.index(part)) + 1


def execute(
    body: str, *arrays: np.ndarray, grid: int = 1, threads: int = 32, shared: int = 0, cluster: int = 1,
    cooperative: bool = False, known: Any = None, directives: str = "",
) -> Launch:  # fmt: skip
    """Run a kernel whose first parameters are the arrays' addresses; `known` are those that it may use."""
    allocations = Allocations()
    for array in arrays if known is None else known:
        allocations.add(array.ctypes.data, array.nbytes, array)
    params = np.zeros(8, np.uint64)
    params[: len(arrays)] = [array.ctypes.data for array in arrays]
    program = Program(text(body, directives))
    launch = Launch(program, grid, threads, params.tobytes(), shared, allocations, cluster, cooperative)
    launch.run()
    return launch


def each(instruction: str, result: Any, *inputs: Any) -> np.ndarray:
    """An instruction for every set of numbers: ``each("add.s32 {d}, {a}, {b};", "i4", a, b)``.

    Registers are {a}, {b}, {c} and the result {d}; booleans are predicates.
    """
    given = [np.array(x) for x in np.broadcast_arrays(*map(np.atleast_1d, inputs))]
    count = -(-given[0].size // 32) * 32
    truth, dtype = result is bool, np.dtype(result)
    out = np.zeros(count, np.uint32 if truth else dtype)
    arrays, lines, names = [], [], {}
    for k, (name, x) in enumerate(zip("abc", given, strict=False)):
        values = np.zeros(count, np.uint32 if x.dtype == bool else x.dtype)
        values[: x.size] = x.ravel()
        values[x.size :] = values[0]
        arrays.append(values)
        register, move = _moved("ld", values.dtype, 10 + k, 91 + k)
        lines.append(move)
        if x.dtype == bool:
            lines.append(f"setp.ne.s32 %p{10 + k}, {register}, 0;")
            register = f"%p{10 + k}"
        names[name] = register
    register, store = _moved("st", out.dtype, 20, 90)
    if truth:
        store = f"selp.u32 {register}, 1, 0, %p20; {store}"
        names["d"] = "%p20"
    else:
        names["d"] = register
    execute("\n".join([*lines, instruction.format(**names), store]), out, *arrays, threads=count)
    found = out[: given[0].size].reshape(given[0].shape)
    return found.astype(bool) if truth else found


def _moved(how: str, dtype: Any, number: int, pointer: int) -> tuple[str, str]:
    """A register and what loads or stores a thread's number of an array there."""
    kind = dtype.kind + str(dtype.itemsize)
    register = f"%{REGISTERS[kind]}{number}"
    form = f"{'f' if kind[0] == 'f' else 'u'}{8 * dtype.itemsize}"
    at = f"%rd{number + 40}"
    operands = (register, f"[{at}]") if how == "ld" else (f"[{at}]", register)
    find = f"mul.wide.u32 {at}, %r90, {dtype.itemsize}; add.s64 {at}, {at}, %rd{pointer};"
    return register, f"{find} {how}.global.{form} {', '.join(operands)};"
