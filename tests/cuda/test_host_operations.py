"""Operators, reductions and functions of CuPy arrays over host memory: as NumPy's, in CuPy's dtypes."""

import operator

import ml_dtypes
import numpy as np
import pytest

from tests.cuda.harness import numbers
from tests.simt.host_cupy import to_cupy, to_numpy
from tests.support import DTYPES

OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lt", "le", "eq", "ne", "gt", "ge")


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operators(host, cupy, name, dtype):
    operate = getattr(operator, name)
    a, b = numbers(4, 4, dtype=DTYPES[dtype]), numbers(4, 4, dtype=np.float32, seed=1).T
    pairs = [(a, b), (b, a), (a, a)]
    if name != "matmul":
        pairs += [(a, 2), (2.5, a), (a, np.float64(1.5)), (np.float32(3), a), (a, a[:1])]
    for left, right in pairs:
        with np.errstate(over="ignore"):
            expected = operate(left, right)
        result = operate(*(to_cupy(v) if isinstance(v, np.ndarray) else v for v in (left, right)))
        assert isinstance(result, cupy.ndarray)
        assert result.flags.c_contiguous  # kernels write in C order, whatever they read
        assert result.dtype == expected.dtype
        np.testing.assert_array_equal(to_numpy(result), expected)


@pytest.mark.parametrize("name", ["iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"])
def test_in_place_operators(host, name):
    a, b = numbers(3, 4, dtype=np.float32), numbers(4)
    for other in (b, 2, np.float64(1.5)):
        expected, c = a.copy(), to_cupy(a.copy())
        getattr(operator, name)(expected, other)
        assert getattr(operator, name)(c, to_cupy(other) if other is b else other) is c
        np.testing.assert_array_equal(to_numpy(c), expected)
    with pytest.raises(TypeError):
        getattr(operator, name)(to_cupy(np.ones(2, np.int32)), 1.5)


def test_subnormal_numbers_are_flushed(host, cupy):
    """As CuPy compiles kernels: of float32 and bfloat16, read and written; what only moves them keeps them."""
    for dtype, least in (("float32", 0.0), ("bfloat16", 0.0), ("float16", 2.0**-24), ("float64", 2.0**-1074)):
        small = np.array([least or 2.0**-130, -1.0, 2.0], DTYPES[dtype])
        a = to_cupy(small)
        kept = small[0] if least else 0
        assert to_numpy(a + a)[0] == 2 * kept
        assert to_numpy(a.astype(np.float64))[0] == kept
        assert to_numpy(cupy.maximum(a, 0))[0] == kept
        assert to_numpy(a.copy())[0] == small[0] != 0
        assert to_numpy(cupy.where(to_cupy(small > 0), a, a))[0] == small[0]
        c = to_cupy(small.copy())
        c *= 0.5
        assert to_numpy(c)[0] == (small * 0.5)[0] * (kept != 0)
    assert to_numpy(to_cupy(np.array([2.0**-130])).astype(np.float32))[0] == 0
    assert to_numpy(to_cupy(np.full(8, 2.0**-130, np.float32)).sum()) == 0


def test_operators_of_integers_and_bools(host):
    a, mask = np.arange(1, 9), np.arange(8) % 3 == 0
    for operate in (operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift):
        np.testing.assert_array_equal(to_numpy(operate(to_cupy(a), to_cupy(a[::-1]))), operate(a, a[::-1]))
    np.testing.assert_array_equal(to_numpy(~to_cupy(mask) & to_cupy(mask[::-1])), ~mask & mask[::-1])
    np.testing.assert_array_equal(to_numpy(-abs(-to_cupy(a))), -a)
    assert not (to_cupy(a) == None).any()  # noqa: E711 - elementwise, as in NumPy
    c = to_cupy(mask.copy())
    c &= to_cupy(mask[::-1])
    np.testing.assert_array_equal(to_numpy(c), mask & mask[::-1])


REDUCTIONS = {
    "sum": [{}, {"axis": 0}, {"axis": (0, 2), "keepdims": True}, {"dtype": np.float64}],
    "mean": [{}, {"axis": -1}],
    "prod": [{"axis": 1}],
    "min": [{}, {"axis": (0, 1)}],
    "max": [{}, {"axis": 2, "keepdims": True}],
    "any": [{}, {"axis": 0}],
    "all": [{}, {"axis": 0}],
    "var": [{}, {"axis": 0, "ddof": 1}],
    "std": [{"axis": 1}],
    "argmax": [{}, {"axis": 1}],
    "cumsum": [{"axis": 1}],
}


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_reductions(host, cupy, name, dtype):
    a = numbers(3, 4, 5, dtype=DTYPES[dtype])
    for keywords in REDUCTIONS[name]:
        expected = getattr(np, name)(a, **keywords)
        for result in (getattr(to_cupy(a), name)(**keywords), getattr(cupy, name)(to_cupy(a), **keywords)):
            assert isinstance(result, cupy.ndarray)  # full reductions have no axes; NumPy returns a scalar
            assert (result.shape, result.dtype) == (np.shape(expected), expected.dtype)
            np.testing.assert_allclose(to_numpy(result), expected, rtol=2e-3 if dtype == "float16" else 1e-6)
    if name in ("sum", "max"):
        out = cupy.empty(4, a.dtype)
        assert getattr(to_cupy(a), name)(axis=(0, 2), out=out) is out
        np.testing.assert_allclose(to_numpy(out), getattr(a, name)(axis=(0, 2)), rtol=2e-3)


def test_halves_are_summed_in_float32(host):
    ones = np.ones(5000, ml_dtypes.bfloat16)  # whose own running sum ends at 256
    assert float(to_cupy(ones).sum()) == float(ml_dtypes.bfloat16(5000))
    assert float(to_cupy(ones).mean()) == 1


X, Y, V = numbers(3, 4), numbers(3, 4, seed=1), numbers(4, seed=2)
OF_ONE = (
    "abs", "ascontiguousarray", "asarray", "array", "atleast_3d", "copy", "count_nonzero", "cumsum", "exp", "floor",
    "isfinite", "isnan", "log", "ones_like", "ravel", "reciprocal", "sign", "sort", "sqrt", "square", "squeeze",
    "transpose", "unique", "zeros_like",
)  # fmt: skip
OF_TWO = ("allclose", "array_equal", "isclose", "maximum", "minimum", "logical_and", "power")
FUNCTIONS = {
    **dict.fromkeys(OF_ONE, (X,)),
    **dict.fromkeys(OF_TWO, (X, Y)),
    "arange": (2, 11, 3),
    "broadcast_to": (V, (3, 4)),
    "clip": (X, 2, 4),
    "concatenate": ([X, Y],),
    "einsum": ("ij,ij->j", X, Y),
    "expand_dims": (X, 1),
    "full": ((2, 3), 1.5),
    "full_like": (X, 7),
    "hstack": ([X, Y],),
    "linspace": (0, 1, 7),
    "matmul": (X, Y.T),
    "moveaxis": (X, 0, 1),
    "ones": ((2, 3), np.float32),
    "reshape": (X, (4, 3)),
    "split": (X, 3),
    "stack": ([X, Y],),
    "take": (X, np.array([0, 2])),
    "tile": (X, (2, 1)),
    "vstack": ([X, Y],),
    "where": (X > 4, X, 0.0),
    "zeros": (5,),
}


def on_gpu(value):
    if isinstance(value, list):
        return list(map(on_gpu, value))
    return to_cupy(value) if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(host, cupy, name):
    arguments = FUNCTIONS[name]
    expected, result = getattr(np, name)(*arguments), getattr(cupy, name)(*map(on_gpu, arguments))
    several = isinstance(expected, list)
    for value, wanted in zip(result if several else [result], expected if several else [expected], strict=True):
        assert isinstance(value, cupy.ndarray)
        assert value.dtype == np.asarray(wanted).dtype
        np.testing.assert_array_equal(to_numpy(value), wanted)


def test_functions_of_numpy_on_them(host, cupy):
    c = to_cupy(X)
    for result, expected in (
        (np.sqrt(c), np.sqrt(X)),
        (np.maximum(c, 3), np.maximum(X, 3)),
        (np.where(c > 4, c, 0), np.where(X > 4, X, 0)),
        (np.concatenate([c, c]), np.concatenate([X, X])),
        (np.broadcast_to(c, (2, 3, 4)), np.broadcast_to(X, (2, 3, 4))),
        (np.sum(c, axis=0), X.sum(axis=0)),
        (np.float64(2) * c, 2 * X),
    ):
        assert isinstance(result, cupy.ndarray)
        np.testing.assert_array_equal(to_numpy(result), expected)
