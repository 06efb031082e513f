"""No call of the traffic table is bound by instructions or FP64, by the model of tests/cuda/slots.py."""

import pytest

from tests import cuda_compile
from tests.cuda import slots
from tests.support import some_slow

pytestmark = pytest.mark.skipif(cuda_compile.available() is not None, reason=str(cuda_compile.available()))

CASES = (
    ("H200", (256, 256, 14, 14), "NCHW", "float16", "forward"),
    ("H200", (256, 512, 7, 7), "NCHW", "float16", "backward"),
    ("H200", (256, 64, 112, 112), "NHWC", "float16", "forward"),
    ("H200", (32, 256, 56, 56), "NHWC", "float32", "backward"),
    ("RTX 5090", (256, 64, 112, 112), "NHWC", "float16", "forward"),
    ("B200", (32, 1024, 14, 14), "NHWC", "bfloat16", "forward"),
    ("RTX 5090", (256, 256, 56, 56), "NCHW", "float32", "forward"),
)
"""Of each way the ones that take most; `python -m tests.cuda.slots --above` asks of all."""


@pytest.mark.parametrize("case", some_slow(CASES, CASES[3:4]), ids=lambda case: " ".join(map(str, case)))
def test_memory_is_the_limit(case):
    device, *call = case
    found = slots.slots(device, tuple(call))
    assert 0.02 < found.issue <= slots.MOST
    assert 0.005 < found.doubles <= slots.MOST


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_bytes_in_flight_of_large_arrays(dtype):
    for layout in ("NCHW", "NHWC"):
        for operation in ("forward", "backward", "inference"):
            found = slots.slots("H200", ((256, 256, 56, 56), layout, dtype, operation))
            assert found.in_flight >= slots.ENOUGH, (layout, operation)


def test_what_a_loop_counts():
    loop = ("FADD.FTZ R1, R2, R3", "DADD R2, R4, R6", "@P0 DSETP.GT.AND P1, PT, R2, R4, PT", "F2F.F64.F32 R8, R1")
    assert slots.counted(loop) == slots.Counts(4, 2, 1)


def test_more_instructions_take_a_larger_share(monkeypatch):
    case = ((256, 64, 112, 112), "NHWC", "float32", "inference")
    cost = slots.Cost(slots.Counts(100, 10, 10), 2)
    shares = []
    for factor in (1, 2):
        counts = slots.Counts(*(factor * n for n in cost.counts))
        monkeypatch.setattr(slots, "_cost", lambda *_, counts=counts: slots.Cost(counts, 2))
        shares.append(slots.slots("H200", case))
    # 16 bytes read and 16 written: 100 instructions of 128 for each clock, 132 multiprocessors at 1.78 GHz, 4.8 TB/s
    assert shares[0].issue == pytest.approx(100 / 128 / (132 * 1.78e9) / (32 / 4.8e12))
    assert shares[1].issue == pytest.approx(2 * shares[0].issue)
    assert shares[0].doubles == pytest.approx((10 / 64 + 10 / 16) / (132 * 1.78e9) / (32 / 4.8e12))
