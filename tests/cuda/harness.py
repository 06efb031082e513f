"""What tests of CuPy arrays share: arguments on the device, tests of NumPy arrays to run there, what calls launch."""

import functools
import itertools

import numpy as np
import pytest

import fastbn
from tests.cases.arguments import GOOD, batch, data, label
from tests.simt import host_cupy
from tests.support import LAYOUTS, OPTIONS, make_case


def on_device(value, device=0):
    """Arguments as CuPy arrays over the same memory."""
    if type(value) is np.ndarray:
        return host_cupy.to_cupy(value, device)
    if isinstance(value, dict):
        return {name: on_device(item, device) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [on_device(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def calls(test, *marks, **parameters):
    """A test of another file with every combination of parameters, which tables label; "a,b" are two of them."""
    tables = [p.items() if isinstance(p, dict) else [(value, value) for value in p] for p in parameters.values()]
    for chosen in itertools.product(*tables):
        given = {}
        for names, (_, value) in zip(parameters, chosen, strict=True):
            split = names.split(",")
            given |= zip(split, value if len(split) > 1 else [value], strict=True)
        label = "-".join(
            [test.__name__.removeprefix("test_"), *(getattr(name, "__name__", str(name)) for name, _ in chosen)]
        )
        yield pytest.param(functools.partial(test, **given), id=label, marks=marks)


def by_call(*groups):
    """Of equal calls the first counts."""
    cases = {}
    for case in itertools.chain(*groups):
        cases.setdefault(case.id, case)
    return pytest.mark.parametrize("call", list(cases.values()))


slow = pytest.mark.slow

NOT_ON_A_DEVICE = ("unaligned", "swapped bytes")  # no such arrays exist there
ON_A_DEVICE = [name for name in LAYOUTS if name not in NOT_ON_A_DEVICE]
by_layout = pytest.mark.parametrize("layout", ["NCHW", "NHWC"])

# All functions that never wait for the device (`average` does, for its weights), with arguments that they take.
EVERY = GOOD | {
    fastbn.std: GOOD[fastbn.var],
    fastbn.nanmean: GOOD[fastbn.mean],
    fastbn.nanvar: GOOD[fastbn.var],
    fastbn.nanstd: GOOD[fastbn.var],
    fastbn.mean_var: lambda: {"x": data(), "axis": (0, 2), "where": data((4, 3, 5), bool)},
    fastbn.Moments.var: lambda: {"self": batch(), "correction": 1},
    fastbn.Moments.std: lambda: {"self": batch()},
    fastbn.Moments.rstd: lambda: {"self": batch()},
}
by_function = pytest.mark.parametrize("function", EVERY, ids=label)


def leaves(value):
    """What results consist of."""
    if isinstance(value, tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def scalars(arrays):
    """The package for NumPy arrays on a device, of which those without dimensions are the scalars that NumPy gives."""

    class Scalars(type(arrays)):
        def __call__(self, *args, **keywords):
            result = super().__call__(*args, **keywords)
            if keywords.get("out") is not None:
                return result
            if type(result) is tuple:
                return tuple(map(self._scalar, result))
            return self._scalar(result)

        @staticmethod
        def _scalar(value):
            return value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value

    return Scalars()


class Counted:
    """What a call launched, did besides, and allocated."""

    def __init__(self, device):
        self.device = device

    def __call__(self, function, /, *args, **keywords):
        assert host_cupy.operations["get"] == 0
        self.device.launches.clear()
        host_cupy.operations.clear()
        host_cupy.allocations.clear()
        return function(*args, **keywords)

    @property
    def kernels(self):
        return [step.kernel for step in self.device.launches]

    @property
    def operations(self):
        return dict(host_cupy.operations)

    @property
    def allocations(self):
        return list(host_cupy.allocations)


def arguments_of(layout, options):
    """Of a training step: x, dy and the keywords of `batch_norm`, as CuPy arrays."""
    case = make_case(LAYOUTS[layout], "float32", OPTIONS[options])
    parameters = {} if case.gamma is None else {"gamma": case.gamma, "beta": case.beta}
    return on_device((case.x, case.dy, parameters | case.keywords | case.epilogue))


def numbers(*shape, dtype=np.float64, seed=0):
    return (np.random.default_rng(seed).random(shape) * 8 + 0.5).astype(dtype)
