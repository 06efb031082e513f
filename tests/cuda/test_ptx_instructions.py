"""The interpreter of PTX by one instruction at a time, against numbers worked out in another way."""

import ctypes
import ctypes.util
import itertools
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from tests.ptx.handwritten import each, execute
from tests.ptx.text import Unknown

RNG = np.random.default_rng(0)
EDGES = (0, 1, 2, 3, 5, 31, 32, 127, 128, 255, 256, 32767, 32768, 65535, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)


def integers(bits, count=60):
    """Edges and random numbers, as unsigned bits."""
    edges = [n & ((1 << bits) - 1) for n in (*EDGES, -2, -7, (1 << (bits - 1)) - 1)]
    more = RNG.integers(0, 1 << bits, count, f"u{bits // 8}")
    return np.concatenate([np.array(edges, f"u{bits // 8}"), more])


def signed(value, bits):
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def quotient(a, b):
    return int(Fraction(a, b))  # towards 0


# Of integers as the type says: bits of the operands and of the result, and what it is.
INTEGERS = {
    "add.s16": (16, 16, lambda a, b: a + b),
    "add.s32": (32, 32, lambda a, b: a + b),
    "add.s64": (64, 64, lambda a, b: a + b),
    "sub.s32": (32, 32, lambda a, b: a - b),
    "sub.s64": (64, 64, lambda a, b: a - b),
    "mul.lo.s32": (32, 32, lambda a, b: a * b),
    "mul.lo.s64": (64, 64, lambda a, b: a * b),
    "mul.hi.s32": (32, 32, lambda a, b: a * b >> 32),
    "mul.hi.u32": (32, 32, lambda a, b: a * b >> 32),
    "mul.wide.s16": (16, 32, lambda a, b: a * b),
    "mul.wide.u16": (16, 32, lambda a, b: a * b),
    "mul.wide.s32": (32, 64, lambda a, b: a * b),
    "mul.wide.u32": (32, 64, lambda a, b: a * b),
    "div.s32": (32, 32, lambda a, b: quotient(a, b) if b else None),
    "div.u32": (32, 32, lambda a, b: quotient(a, b) if b else None),
    "div.s64": (64, 64, lambda a, b: quotient(a, b) if b else None),
    "div.u64": (64, 64, lambda a, b: quotient(a, b) if b else None),
    "rem.u32": (32, 32, lambda a, b: a - quotient(a, b) * b if b else None),
    "rem.s32": (32, 32, lambda a, b: a - quotient(a, b) * b if b else None),
    "min.s32": (32, 32, min),
    "min.u32": (32, 32, min),
    "min.s64": (64, 64, min),
    "max.s32": (32, 32, max),
    "max.u32": (32, 32, max),
    "max.s64": (64, 64, max),
    "and.b16": (16, 16, lambda a, b: a & b),
    "and.b32": (32, 32, lambda a, b: a & b),
    "or.b64": (64, 64, lambda a, b: a | b),
    "xor.b32": (32, 32, lambda a, b: a ^ b),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_two_integers(name):
    bits, wide, formula = INTEGERS[name]
    a, b = (x.ravel() for x in np.meshgrid(integers(bits, 8), integers(bits, 8)))
    sign = name.split(".")[-1][0] == "s"
    read = (lambda n: signed(n, bits)) if sign else (lambda n: n)
    expected = [formula(read(x), read(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    known = np.array([e is not None for e in expected])
    found = each(f"{name} {{d}}, {{a}}, {{b}};", f"u{wide // 8}", a[known], b[known])
    assert found.tolist() == [e & ((1 << wide) - 1) for e in expected if e is not None]


@pytest.mark.parametrize(
    ("name", "bits"), [("shl.b32", 32), ("shr.u32", 32), ("shr.s32", 32), ("shl.b64", 64), ("shr.u64", 64)]
)
@pytest.mark.parametrize("constant", [False, True])
def test_shifts(name, bits, constant):
    """By the width and more, zeros, or signs, are left."""
    a, by = integers(bits, 8), [0, 1, 7, bits - 1, bits, bits + 1, 200, (1 << 32) - 1]
    for amount in by:
        read = (lambda n: signed(n, bits)) if ".s" in name else (lambda n: n)
        shift = min(amount, bits)
        expected = [(n << shift if "shl" in name else read(n) >> shift) & ((1 << bits) - 1) for n in a.tolist()]
        if constant:
            found = each(f"{name} {{d}}, {{a}}, {amount};", a.dtype, a)
        else:
            found = each(f"{name} {{d}}, {{a}}, {{b}};", a.dtype, a, np.uint32(amount))
        assert found.tolist() == expected


def test_bits():
    a, b, c = integers(32), integers(32)[::-1], integers(32)
    assert each("not.b32 {d}, {a};", "u4", a).tolist() == [n ^ 0xFFFFFFFF for n in a.tolist()]
    assert each("brev.b32 {d}, {a};", "u4", a).tolist() == [int(f"{n:032b}"[::-1], 2) for n in a.tolist()]
    heights = [0xFFFFFFFF if n == 0 else 32 - n.bit_length() for n in a.tolist()]
    assert each("bfind.shiftamt.u32 {d}, {a};", "u4", a).tolist() == heights
    inserted = [(y & ~(0xFF << 4)) | (x & 0xFF) << 4 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert each("bfi.b32 {d}, {a}, {b}, 4, 8;", "u4", a, b).tolist() == inserted
    total = [x * y + z & 0xFFFFFFFF for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    assert each("mad.lo.s32 {d}, {a}, {b}, {c};", "u4", a, b, c).tolist() == total
    assert each("neg.s32 {d}, {a};", "u4", a).tolist() == [-n & 0xFFFFFFFF for n in a.tolist()]
    assert each("abs.s32 {d}, {a};", "u4", a).tolist() == [abs(signed(n, 32)) & 0xFFFFFFFF for n in a.tolist()]


def test_dot_products_of_parts():
    a, b, c = integers(32), integers(32)[::-1], integers(32)
    read = {"s32": signed, "u32": lambda n, bits: n & ((1 << bits) - 1)}
    parts = {}
    for p, q in itertools.product(read, read):
        one, other = read[p], read[q]
        parts[f"dp4a.{p}.{q}"] = lambda x, y, f=one, g=other: sum(f(x >> 8 * k, 8) * g(y >> 8 * k, 8) for k in range(4))
        for first, half in enumerate(("lo", "hi")):
            parts[f"dp2a.{half}.{p}.{q}"] = lambda x, y, f=one, g=other, h=16 * first: sum(
                f(x >> 16 * k, 16) * g(y >> h + 8 * k, 8) for k in range(2)
            )
    for name, dot in parts.items():
        expected = [dot(x, y) + z & 0xFFFFFFFF for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
        assert each(f"{name} {{d}}, {{a}}, {{b}}, {{c}};", "u4", a, b, c).tolist() == expected


@pytest.mark.parametrize("select", [0x3210, 0x7604, 0x7531, 0x0123, 0xF8A9])
def test_bytes_are_permuted(select):
    a, b = integers(32), integers(32)[::-1]
    expected = []
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        parts = [(x | y << 32) >> 8 * (select >> 4 * k & 7) & 255 for k in range(4)]
        parts = [(p >> 7) * 255 if select >> 4 * k & 8 else p for k, p in enumerate(parts)]
        expected.append(sum(p << 8 * k for k, p in enumerate(parts)))
    assert each(f"prmt.b32 {{d}}, {{a}}, {{b}}, {select};", "u4", a, b).tolist() == expected


def test_pairs_of_registers():
    a = integers(64)
    halves = "mov.b64 {{%r1, %r2}}, {a}; mov.b64 {d}, {{%r2, %r1}};"
    assert each(halves, "u8", a).tolist() == [n >> 32 | (n & 0xFFFFFFFF) << 32 for n in a.tolist()]
    b = integers(32)
    halves = "mov.b32 {{%rs1, %rs2}}, {a}; mov.b32 {d}, {{%rs2, %rs1}};"
    assert each(halves, "u4", b).tolist() == [n >> 16 | (n & 0xFFFF) << 16 for n in b.tolist()]
    assert each("mov.b64 {{%r1, %r2}}, {a}; mov.b32 {d}, %r2;", "u4", np.float64([1, -2])).tolist() == [
        0x3FF00000,
        0xC0000000,
    ]


# --- comparisons and choices ------------------------------------------------------------------------------------------

COMPARED = {"eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
            "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b}  # fmt: skip


@pytest.mark.parametrize("compare", COMPARED)
@pytest.mark.parametrize("kind", ["s16", "s32", "u32", "s64", "u64"])
def test_integers_are_compared(compare, kind):
    bits = int(kind[1:])
    a, b = (x.ravel() for x in np.meshgrid(integers(bits, 4), integers(bits, 4)))
    read = (lambda n: signed(n, bits)) if kind[0] == "s" else (lambda n: n)
    expected = [COMPARED[compare](read(x), read(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert each(f"setp.{compare}.{kind} {{d}}, {{a}}, {{b}};", bool, a, b).tolist() == expected


@pytest.mark.parametrize("compare", COMPARED)
@pytest.mark.parametrize(("kind", "dtype"), [("f64", "f8"), ("ftz.f32", "f4"), ("f32", "f4")])
def test_floats_are_compared(compare, kind, dtype):
    """Ordered comparisons are false with NaN, those with a u true; ftz sees subnormal numbers as zeros."""
    numbers = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40], dtype)
    a, b = (x.ravel() for x in np.meshgrid(numbers, numbers))
    seen = [(0.0 if kind == "ftz.f32" and abs(x) < 1e-38 else x, 0.0 if kind == "ftz.f32" and abs(y) < 1e-38 else y)
            for x, y in zip(a.tolist(), b.tolist(), strict=True)]  # fmt: skip
    odd = [x != x or y != y for x, y in seen]
    plain = [COMPARED[compare](x, y) for x, y in seen]
    found = each(f"setp.{compare}.{kind} {{d}}, {{a}}, {{b}};", bool, a, b)
    assert found.tolist() == [p and not o for p, o in zip(plain, odd, strict=True)]
    found = each(f"setp.{compare}u.{kind} {{d}}, {{a}}, {{b}};", bool, a, b)
    assert found.tolist() == [p or o for p, o in zip(plain, odd, strict=True)]
    assert each(f"setp.nan.{kind} {{d}}, {{a}}, {{b}};", bool, a, b).tolist() == odd
    assert each(f"setp.num.{kind} {{d}}, {{a}}, {{b}};", bool, a, b).tolist() == [not o for o in odd]


def test_predicates():
    a, b = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert each("and.pred {d}, {a}, {b};", bool, a, b).tolist() == [True, False, False, False]
    assert each("or.pred {d}, {a}, {b};", bool, a, b).tolist() == [True, True, True, False]
    assert each("xor.pred {d}, {a}, {b};", bool, a, b).tolist() == [False, True, True, False]
    assert each("not.pred {d}, {a};", bool, a).tolist() == [False, False, True, True]
    assert each("mov.pred {d}, -1;", bool, a).all()
    assert each("selp.b32 {d}, {a}, {b}, {c};", "u4", np.uint32(7), np.uint32(9), a).tolist() == [7, 7, 9, 9]
    assert each("selp.f64 {d}, 0d3FF0000000000000, {b}, {a};", "f8", a, np.float64(2)).tolist() == [1, 1, 2, 2]


# --- floats -----------------------------------------------------------------------------------------------------------

LIBM = ctypes.CDLL(ctypes.util.find_library("m"))
LIBM.fma.restype, LIBM.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
LIBM.fmaf.restype, LIBM.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3


def floats(dtype, count=400, spread=None):
    """Of all magnitudes, with special ones."""
    info = np.finfo(dtype)
    low, high = spread or (info.minexp - 5, info.maxexp)
    with np.errstate(all="ignore"):
        numbers = np.ldexp(RNG.uniform(1, 2, count) * RNG.choice([-1, 1], count), RNG.integers(low, high, count))
        special = [0.0, -0.0, np.inf, -np.inf, np.nan, info.tiny, info.tiny / 2, info.max, 1.0, -1.0]
        return np.concatenate([numbers, special, special[::-1]]).astype(dtype)


def flushed(x):
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def assert_same(found, expected):
    """Bit for bit, but for NaN."""
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(found), nan)
    view = f"u{found.itemsize}"
    assert found[~nan].view(view).tolist() == expected[~nan].view(view).tolist()


@pytest.mark.parametrize("spread", [None, (-3, 4), (-130, -100)])
def test_fma_float32(spread):
    a, b, c = (RNG.permutation(floats("f4", spread=spread)) for _ in range(3))
    with np.errstate(all="ignore"):
        c[::3] = (a.astype(float) * b)[::3] * -(1 + 2.0**-23)  # what nearly cancels
    plain = np.array([LIBM.fmaf(*t) for t in zip(a, b, c, strict=True)], "f4")
    assert_same(each("fma.rn.f32 {d}, {a}, {b}, {c};", "f4", a, b, c), plain)
    inputs = [flushed(x) for x in (a, b, c)]
    plain = flushed(np.array([LIBM.fmaf(*t) for t in zip(*inputs, strict=True)], "f4"))
    assert_same(each("fma.rn.ftz.f32 {d}, {a}, {b}, {c};", "f4", a, b, c), plain)


def test_fma_float32_is_rounded_once():
    """A product that float64 holds, and a sum that float64 would round to a tie."""
    a, b, c = np.float32(1 + 2**-12), np.float32(1 + 2**-12), np.float32(2**-60)
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    below, above = np.float32(1 + 2**-11), np.float32(1 + 2**-11 + 2**-23)
    assert Fraction(float(below)) + Fraction(float(above)) < 2 * exact
    assert each("fma.rn.f32 {d}, {a}, {b}, {c};", "f4", a, b, c)[0] == above
    assert each("fma.rn.f32 {d}, {a}, {b}, {c};", "f4", a, b, -c)[0] == below


@pytest.mark.parametrize("spread", [None, (-3, 4), (-500, -400), (400, 520)])
def test_fma_float64(spread):
    a, b, c = (RNG.permutation(floats("f8", spread=spread)) for _ in range(3))
    with np.errstate(all="ignore"):
        c[::3] = (a * b)[::3] * -(1 + 2.0**-52)
        c[1::3] = (a * b)[1::3] * RNG.uniform(-(2.0**-53), 2.0**-53, c[1::3].size)
    expected = np.array([LIBM.fma(*t) for t in zip(a, b, c, strict=True)])
    assert_same(each("fma.rn.f64 {d}, {a}, {b}, {c};", "f8", a, b, c), expected)


@pytest.mark.parametrize("rounding", ["rz", "rm", "rp"])
def test_directed_rounding(rounding):
    """The last number on that side of the exact one."""
    for dtype, ptx, spread in (("f4", "f32", (-40, 40)), ("f8", "f64", (-300, 300))):
        a, b, c = (floats(dtype, 60, spread)[:60] for _ in range(3))
        terms = {
            "fma": ("{a}, {b}, {c}", lambda x, y, z: x * y + z),
            "add": ("{a}, {b}", lambda x, y, z: x + y),
            "mul": ("{a}, {b}", lambda x, y, z: x * y),
            "sub": ("{a}, {b}", lambda x, y, z: x - y),
        }
        for name, (operands, formula) in terms.items():
            given = (a, b, c)[: operands.count("{")]
            found = each(f"{name}.{rounding}.{ptx} {{d}}, {operands};", dtype, *given)
            for result, *numbers in zip(found, a, b, c, strict=True):
                exact = formula(*(Fraction(float(n)) for n in numbers))
                down = rounding == "rm" or (rounding == "rz" and exact > 0)
                next_one = np.nextafter(result, result.dtype.type(np.inf if down else -np.inf))
                here, beyond = Fraction(float(result)), Fraction(float(next_one))
                assert (here <= exact < beyond) if down else (here >= exact > beyond)


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_sums_and_products(name):
    formula = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    with np.errstate(all="ignore"):
        a, b = RNG.permutation(floats("f8")), RNG.permutation(floats("f8"))
        assert_same(each(f"{name}.f64 {{d}}, {{a}}, {{b}};", "f8", a, b), formula(a, b))
        a, b = RNG.permutation(floats("f4")), RNG.permutation(floats("f4"))
        assert_same(each(f"{name}.f32 {{d}}, {{a}}, {{b}};", "f4", a, b), formula(a, b))
        expected = flushed(formula(flushed(a), flushed(b)))
        assert_same(each(f"{name}.ftz.f32 {{d}}, {{a}}, {{b}};", "f4", a, b), expected)


def test_signs_and_extremes():
    a, b = (RNG.permutation(floats("f8", 40)) for _ in range(2))
    assert_same(each("neg.f64 {d}, {a};", "f8", a), -a)
    assert_same(each("abs.f64 {d}, {a};", "f8", a), np.abs(a))
    single = floats("f4")
    assert_same(each("abs.ftz.f32 {d}, {a};", "f4", single), np.abs(flushed(single)))
    zeros = np.array([0.0, -0.0])
    assert np.signbit(each("min.f64 {d}, {a}, {b};", "f8", zeros, zeros[::-1])).tolist() == [True, True]
    assert np.signbit(each("max.f64 {d}, {a}, {b};", "f8", zeros, zeros[::-1])).tolist() == [False, False]
    several = (a != 0) | (b != 0)
    assert_same(each("min.f64 {d}, {a}, {b};", "f8", a[several], b[several]), np.fmin(a, b)[several])
    assert_same(each("max.f64 {d}, {a}, {b};", "f8", a[several], b[several]), np.fmax(a, b)[several])
    single, zero = floats("f4"), np.float32(0)
    positive = np.where(np.isnan(single), zero, np.maximum(flushed(single), zero)) + zero
    assert_same(each("max.ftz.f32 {d}, {a}, 0f00000000;", "f4", single), positive)
    with np.errstate(all="ignore"):
        assert_same(each("div.rn.f64 {d}, {a}, {b};", "f8", a, b), a / b)


def test_constants_are_flushed_too():
    assert each("add.ftz.f32 {d}, {a}, 0f00400000;", "f4", np.float32([0, 1])).tolist() == [0, 1]
    assert each("add.f32 {d}, {a}, 0f00400000;", "f4", np.float32([0, 1])).tolist() == [2.0**-127, 1]


# --- conversions ------------------------------------------------------------------------------------------------------


def test_between_floats():
    halves = np.arange(65536, dtype="u2")[::7]
    assert_same(each("cvt.f32.f16 {d}, {a};", "f4", halves), halves.view("f2").astype("f4"))
    with np.errstate(all="ignore"):
        singles = np.concatenate([floats("f4"), halves.view("f2").astype("f4") * np.float32(1 + 2**-11)])
    nan = np.isnan(singles)
    with np.errstate(all="ignore"):
        found = each("cvt.rn.f16.f32 {d}, {a};", "u2", singles)
        assert found[~nan].tolist() == singles.astype("f2").view("u2")[~nan].tolist()
        assert (found[nan] == 0x7FFF).all()
        found = each("cvt.rn.bf16.f32 {d}, {a};", "u2", singles)
        assert found[~nan].tolist() == singles.astype(ml_dtypes.bfloat16).view("u2")[~nan].tolist()
        assert (found[nan] == 0x7FFF).all()
        doubles = floats("f8", spread=(-160, 140))
        assert_same(each("cvt.rn.f32.f64 {d}, {a};", "f4", doubles), doubles.astype("f4"))
        assert_same(each("cvt.rn.ftz.f32.f64 {d}, {a};", "f4", doubles), flushed(doubles.astype("f4")))
    assert_same(each("cvt.f64.f32 {d}, {a};", "f8", singles), singles.astype("f8"))
    assert_same(each("cvt.ftz.f64.f32 {d}, {a};", "f8", singles), flushed(singles).astype("f8"))


def test_towards_0_is_another_number():
    x = np.float32([1 + 2**-10 * 0.75, -(1 + 2**-10 * 0.75)])
    assert each("cvt.rn.f16.f32 {d}, {a};", "u2", x).view("f2").tolist() == [1 + 2**-10, -(1 + 2**-10)]
    assert each("cvt.rz.f16.f32 {d}, {a};", "u2", x).view("f2").tolist() == [1, -1]
    wide = np.float64([1 + 2**-23 * 0.75, -(1 + 2**-23 * 0.75), 1e300])
    assert each("cvt.rz.f32.f64 {d}, {a};", "f4", wide).tolist() == [1, -1, np.finfo("f4").max]


@pytest.mark.parametrize("source", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("to", ["f32", "f64"])
def test_integers_as_floats(source, to):
    bits = int(source[1:])
    numbers = integers(bits)
    dtype = f"f{int(to[1:]) // 8}"
    values = [signed(n, bits) if source[0] == "s" else n for n in numbers.tolist()]
    found = each(f"cvt.rn.{to}.{source} {{d}}, {{a}};", dtype, numbers)
    for result, exact in zip(found, values, strict=True):
        others = [np.nextafter(result, result.dtype.type(limit)) for limit in (-np.inf, np.inf)]
        error = abs(Fraction(float(result)) - exact)
        assert all(error <= abs(Fraction(float(other)) - exact) for other in others)


def test_floats_as_integers():
    """Within the range of the integers; NaN is the bit of the sign."""
    x = np.array([0.0, 0.9, -0.9, 1.5, 2.0**63, 2.0**64, -5.0, 1e300, np.inf, -np.inf, np.nan])
    expected = [0, 0, 0, 1, 1 << 63, (1 << 64) - 1, 0, (1 << 64) - 1, (1 << 64) - 1, 0, 1 << 63]
    assert each("cvt.rzi.u64.f64 {d}, {a};", "u8", x).tolist() == expected


@pytest.mark.parametrize(
    ("to", "source"),
    [("u16", "u32"), ("u32", "u16"), ("u32", "u64"), ("u64", "u16"), ("u64", "u32"), ("s32", "s16"), ("s32", "s8"),
     ("s16", "s8"), ("s64", "s32")],
)  # fmt: skip
def test_between_integers(to, source):
    """From a part of a register, widened by its sign or by zeros."""
    bits, wide = int(source[1:]), max(int(to[1:]), 16)
    numbers = integers(max(bits, 16))
    part = [signed(n, bits) if source[0] == "s" else n & ((1 << bits) - 1) for n in numbers.tolist()]
    found = each(f"cvt.{to}.{source} {{d}}, {{a}};", f"u{wide // 8}", numbers)
    assert found.tolist() == [n & ((1 << int(to[1:])) - 1) for n in part]


# --- approximations ---------------------------------------------------------------------------------------------------


def test_approximate_reciprocal_of_float32():
    """Less than a unit in the last place off, on both sides, and exact where there is nothing between."""
    x = floats("f4", 2000, (-120, 120))[:2000]
    found = each("rcp.approx.ftz.f32 {d}, {a};", "f4", x)
    errors = [(Fraction(float(r)) - 1 / Fraction(float(n))) / Fraction(float(np.spacing(np.abs(r))))
              for r, n in zip(found, x, strict=True)]  # fmt: skip
    assert max(map(abs, errors)) < 1
    assert {e > 0 for e in errors if e} == {True, False}
    ends = each("rcp.approx.ftz.f32 {d}, {a};", "f4", np.float32([0, -0.0, np.inf, -np.inf, 1e-40, 2, 3e38]))
    assert ends.tolist() == [np.inf, -np.inf, 0, 0, np.inf, 0.5, 0]
    assert np.signbit(ends).tolist() == [False, True, False, True, False, False, False]


@pytest.mark.parametrize(("name", "power"), [("rcp", -1), ("rsqrt", -0.5)])
def test_gross_approximations_of_float64(name, power):
    """Twenty bits of the result, of as many of the number, a few units off."""
    x = np.abs(floats("f8", 2000, (-900, 900))[:2000])
    found = each(f"{name}.approx.ftz.f64 {{d}}, {{a}};", "f8", x)
    assert not (found.view("u8") & 0xFFFFFFFF).any()
    error = np.abs(found / x**power - 1)
    assert 2**-20 < error.max() < 2**-17
    same = each(f"{name}.approx.ftz.f64 {{d}}, {{a}};", "f8", (x.view("u8") | 0xFFFFFFFF).view("f8"))
    assert np.array_equal(
        same, each(f"{name}.approx.ftz.f64 {{d}}, {{a}};", "f8", (x.view("u8") >> 32 << 32).view("f8"))
    )
    ends = each(f"{name}.approx.ftz.f64 {{d}}, {{a}};", "f8", np.array([0, -0.0, np.inf, 1e-310, np.nan]))
    assert ends[:4].tolist() == [np.inf, -np.inf, 0, np.inf]
    assert ends.view("u8")[4] == 0x7FFFFFFF00000000


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED = [
    "add.sat.f32 %f1, %f1, %f1;", "add.rn.ftz.f64 %fd1, %fd1, %fd1;", "fma.f32 %f1, %f1, %f1, %f1;",
    "cvt.rn.sat.f32.f64 %f1, %fd1;", "cvt.rna.tf32.f32 %r1, %f1;", "cvt.f16.f32 %rs1, %f1;", "rcp.rn.f64 %fd1, %fd1;",
    "sqrt.rn.f32 %f1, %f1;", "setp.lt.and.f32 %p1, %f1, %f1, %p2;", "setp.lt.b32 %p1, %r1, %r1;",
    "add.s32 %r1, %r1, %rd1;", "add.f32 %f1, %f1, 1.5;", "mov.u32 %r1, %clock;", "mov.u32 %r1, %laneid;",
    "add.s32 %q1, %q1, 1;", "bar.sync 1;", "bar.sync 0, 64;", "barrier.cluster.arrive.relaxed;", "membar.cta;",
    "fence.acq_rel.gpu;", "ld.local.u32 %r1, [%rd1];", "ld.global.v8.u32 %r1, [%rd1];", "ld.global.b128 %r1, [%rd1];",
    "ld.acquire.gpu.global.u32 %r1, [%rd1];", "st.volatile.global.u32 [%rd1], %r1;", "st.param.u32 [%rd1], %r1;",
    "atom.global.cas.b32 %r1, [%rd1], %r2, %r3;", "red.global.add.u32 [%rd1], %r1;", "prefetch.global.L2 [%rd1];",
    "shfl.sync.up.b32 %r1|%p1, %r1, 1, 0, -1;", "shfl.sync.bfly.b32 %r1|%p1, %r1, 1, 7183, -1;",
    "vote.sync.any.pred %p1, %p2, -1;", "@%p1 add.s32 %r1, %r1, 1;", "bra nowhere;", "call foo;",
    "shl.u32 %r1, %r1, 1;", "mul.s32 %r1, %r1, %r1;", "mul.wide.u64 %rd1, %rd1, %rd1;", "div.approx.f32 %f1, %f1, %f1;",
    "lop3.b32 %r1, %r1, %r1, %r1, 1;", ".local .b8 stack[16];", "{ .reg .b32 %t<2>; }", "min.NaN.f32 %f1, %f1, %f1;",
    "cvta.global.u64 %rd1, %rd1;", "cvta.to.shared.u64 %rd1, %rd1;", "bfi.b32 %r1, %r1, %r1, %r2, 3;",
]  # fmt: skip


@pytest.mark.parametrize("instruction", REFUSED)
def test_what_is_not_known_is_refused(instruction):
    with pytest.raises(Unknown, match=r"line \d+: .*\S: .* not|declared|no such label|predicates|constant places"):
        execute(instruction)


@pytest.mark.parametrize("directives", [".maxnreg 32", ".reqntid 32, 1, 1", ".reqnctapercluster 2, 2, 1"])
def test_directives_that_are_not_known_are_refused(directives):
    with pytest.raises(Unknown, match="directive"):
        execute("", directives=directives)


def test_products_of_all_edges():
    """Of 64 bits by 64, the lower half."""
    pairs = np.array(list(itertools.product(EDGES, EDGES)), np.uint64)
    found = each("mul.lo.s64 {d}, {a}, {b};", "u8", pairs[:, 0], pairs[:, 1])
    assert found.tolist() == [a * b & ((1 << 64) - 1) for a, b in pairs.tolist()]
