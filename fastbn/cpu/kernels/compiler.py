"""How kernels become machine code: `inline`, `kernel`, `plain`, `object_code`.

Numba types and lowers, and does no more than that (`fastbn.numba_parts.compiling`).
What comes out is an object file with one function of plain words, ``kernel(params, thread, first, last)``: ``params``
points to its arguments, 8 bytes each. It refers to neither Python nor Numba, so that llvmlite alone can load it
(`fastbn.cpu.code`).
"""

import contextlib
import gc
import inspect
import itertools
from collections import namedtuple
from types import FunctionType

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types

from fastbn.cpu.kernels.llvm import INTEGER_ARRAYS
from fastbn.cpu.machines import machine_for
from fastbn.cpu.records import ARRAYS, GROUPS, INTEGER_RECORDS
from fastbn.numba_parts.compiling import OF_PARTS, lock, lowered, target

llvm.initialize_native_asmparser()  # for `flags`; Numba, that has no assembly of its own, leaves it out

_OF_A_TASK = 3  # parameters of every kernel: the thread, the first task and the one behind the last
_I64, _VOID = ir.IntType(64), ir.VoidType()
_WORDS = _I64.as_pointer()

# What an argument is, as plans name it.
KINDS = {
    "u1*": types.CPointer(types.uint8),
    "u2*": types.CPointer(types.uint16),
    "i2*": types.CPointer(types.int16),
    "f4*": types.CPointer(types.float32),
    "f8*": types.CPointer(types.float64),
    "i8*": types.CPointer(types.int64),
    "i8": types.int64,
    "f8": types.float64,
    "bool": types.boolean,
    "none": types.none,
} | {name: types.NamedUniTuple(types.int64, len(record._fields), record) for name, record in INTEGER_RECORDS.items()}
KINDS |= {
    kind.rstrip("*") + mark: types.NamedTuple([KINDS[kind], *[types.int64] * (len(array._fields) - 1)], array)
    for kind in ("u1*", "u2*", "i2*", "f4*", "f8*", "none")
    for mark, array in ARRAYS.items()
}
KINDS |= {name: types.CPointer(integer) for name, integer in INTEGER_ARRAYS.items()}


def _kind(name):
    """What an argument is: one of these, or some as a group, ``Group(kind|kind)``."""
    group, _, members = name.partition("(")
    return types.NamedTuple(map(_kind, members[:-1].split("|")), GROUPS[group]) if members else KINDS[name]


def inline(function):
    """A function that kernels call: compiled into them, never called from Python.

    Inlined by force: a call costs some 10 ns, as much as a row of 49 values.
    """
    return njit(nogil=True, error_model="numpy", **OF_PARTS)(function)


def shared(function):
    """A function that plans call, with those that it calls, for kernels."""
    known, names = function.__globals__, function.__code__.co_names
    called = {name: shared(known[name]) for name in names if inspect.isfunction(known.get(name))}
    return inline(FunctionType(function.__code__, known | called))


def kernel(function):
    """A kernel, ``function(thread, first, last, *arguments)``: the tasks from first to last, on one thread."""
    function.entry = _enter_kernel
    return function


def plain(function):
    """A function of words, which it is called with."""
    function.entry = _enter_plain
    return function


def offsets(record):
    """Where the words of a record of integers are in memory, in bytes, by its names."""
    return record._make(range(0, 8 * len(record._fields), 8))


def offsets_of_arguments(function):
    """The same of a kernel's arguments, each a word, for kernels that call it."""
    return offsets(namedtuple(function.__name__, list(inspect.signature(function).parameters)[_OF_A_TASK:]))


@contextlib.contextmanager
def _garbage_left():
    """What compiling makes is in use while it lasts: to look for garbage in it takes a tenth of the time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


@lock
@_garbage_left()
def object_code(function, kinds, symbol, levels):
    """Object files with a `kernel` for such arguments (``name:kind`` each), or a `plain` function, as ``symbol``.

    One for each of the named levels of processors, or with None for this one. Typing and lowering, three quarters of
    the time, are done once.
    """
    names, given = list(inspect.signature(function).parameters), [kind.partition(":") for kind in kinds]
    own = names[len(names) - len(given) :]
    if own != [name for name, _, _ in given]:
        raise TypeError(f"{function.__qualname__}: expected {own}, got {kinds}")
    signature = (*[types.int64] * (len(names) - len(own)), *(_kind(kind) for _, _, kind in given))
    module = lowered(inline(function), signature, symbol, function.entry)
    return [machine.emit_object(_optimized(module.clone(), symbol, machine)) for machine in map(machine_for, levels)]


def _enter_kernel(module, symbol, call, signature):
    """``symbol(params, thread, first, last)`` takes the arguments from where ``params`` points to."""
    function = ir.Function(module, ir.FunctionType(_VOID, [_WORDS, _I64, _I64, _I64]), symbol)
    builder = ir.IRBuilder(function.append_basic_block())
    params, *tasks = function.args
    words = (builder.load(builder.gep(params, [ir.Constant(_I64, i)])) for i in itertools.count())
    arguments = [_argument(builder, words, kind) for kind in signature[_OF_A_TASK:]]
    call(builder, [*tasks, *arguments])
    builder.ret_void()


def _enter_plain(module, symbol, call, signature):
    """``symbol(words)``, with a word as result."""
    function = ir.Function(module, ir.FunctionType(_I64, [_I64] * len(signature)), symbol)
    builder = ir.IRBuilder(function.append_basic_block())
    result = call(builder, function.args)
    builder.ret(result if result.type == _I64 else ir.Constant(_I64, 0))


def _argument(builder, words, kind):
    """Of the next words: a record of integers is where its word points to, an array has a word more before."""
    if not isinstance(kind, types.BaseNamedTuple):
        return _from_word(builder, next(words), kind)
    if kind.instance_class in GROUPS.values():
        members = [_argument(builder, words, member) for member in kind]
        return target.make_tuple(builder, kind, members)
    values = [_from_word(builder, next(words), kind[0])] if kind.instance_class in ARRAYS.values() else []
    integers = builder.inttoptr(next(words), _WORDS)
    places = [builder.gep(integers, [ir.Constant(_I64, i)]) for i in range(len(kind) - len(values))]
    absent = kind[0] == types.none
    values += [ir.Constant(_I64, 0) if absent else builder.load(place) for place in places]
    return target.make_tuple(builder, kind, values)


def _from_word(builder, word, kind):
    if kind == types.int64:
        return word
    if kind == types.none:
        return target.get_dummy_value()
    if kind == types.boolean:
        return builder.icmp_unsigned("!=", word, ir.Constant(_I64, 0))
    to = target.get_value_type(kind)
    return builder.bitcast(word, to) if kind == types.float64 else builder.inttoptr(word, to)


def _optimized(module, symbol, machine):
    """All but ``symbol`` is for it alone, so that what is inlined does not stay as well."""
    for definition in (*module.functions, *module.global_variables):
        if not definition.is_declaration and definition.name != symbol:
            definition.linkage = "internal"
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.slp_vectorization = options.loop_vectorization = False  # kernels say themselves what is a vector
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    module.verify()
    return module
