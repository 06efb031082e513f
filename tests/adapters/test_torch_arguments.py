"""Arguments of all kinds for `fastbn.torch`: numbers, halves that overflow, tensors of other kinds."""

import contextlib
import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402, N812
from torch import nn  # noqa: E402

import fastbn.torch as ft  # noqa: E402
from tests.adapters.torch_support import assert_all_close  # noqa: E402

pytestmark = pytest.mark.usefixtures("device")

# --- scalars ----------------------------------------------------------------------------------------------------------

NUMBERS = [
    torch.tensor(0.3),
    torch.tensor(1),
    torch.tensor(True),
    1,
    True,
    np.float32(0.3),
    np.float64(0.3),
    np.int64(1),
]


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_numbers(value):
    """What PyTorch takes for `momentum` and `eps`."""
    x = torch.randn(5, 3)
    answers = []
    for norm in (ft.batch_norm, F.batch_norm):
        mean, var = torch.zeros(3), torch.ones(3)
        y = norm(x, mean, var, training=True, momentum=value, eps=value)
        answers.append((y, mean, var, norm(x, mean, var, eps=value)))
    assert_all_close(*answers)


@pytest.mark.parametrize(
    "value", [None, "0.1", 1j, [0.1], np.ones(1), torch.ones(1), torch.ones((), requires_grad=True)]
)
@pytest.mark.parametrize("name", ["momentum", "eps"])
@pytest.mark.parametrize("training", [True, False])
def test_no_numbers(training, name, value):
    """PyTorch refuses them too; ``momentum=None`` is for modules."""
    x, mean, var = torch.randn(5, 3), torch.zeros(3), torch.ones(3)
    with pytest.raises(TypeError):
        F.batch_norm(x, mean, var, training=training, **{name: value})
    with pytest.raises(TypeError, match=f"{name}: expected a number or a tensor without axes"):
        ft.batch_norm(x, mean, var, training=training, **{name: value})
    assert torch.equal(mean, torch.zeros(3))


# --- silence ----------------------------------------------------------------------------------------------------------

HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("kind", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_overflow_is_silent(dtype, kind):
    """Also where NumPy is told to raise (pytorch#126525): results are PyTorch's, whose arithmetic is in float32."""
    with np.errstate(all="raise"):
        for value, statistic in itertools.product(
            (1.0, torch.finfo(dtype).max, np.inf), (1.0, torch.finfo(kind).max, np.inf)
        ):
            x = torch.randn(4, 3, 5).to(dtype)
            x[1, 0] = value
            x.requires_grad_()
            running = [torch.full((3,), s, dtype=kind) for s in (statistic, -statistic)]
            w = torch.full((3,), 300.0, dtype=kind, requires_grad=True)
            y = ft.batch_norm(x, *running, w, None, True)
            torch.autograd.grad(y, (x, w), torch.full_like(y, value))
            ft.batch_norm(x.detach(), *running, w, None, False)
            if statistic == np.inf and value == 1.0:
                assert (running[0] == np.inf).all()
                assert (running[1] == -np.inf).all()
    mean, var = torch.zeros(3, dtype=torch.float16), torch.zeros(3, dtype=torch.float16)
    with np.errstate(all="raise"):
        ft.batch_norm(1000 * torch.randn(64, 3), mean, var, training=True)
    assert (var == np.inf).all()
    assert mean.isfinite().all()


# --- tensors of other kinds -------------------------------------------------------------------------------------------


def test_lazily_negated_tensors():
    """The imaginary part of a conjugate, as any argument and as gradient."""

    def lazy(*shape):
        found = torch.randn(*shape, dtype=torch.complex64).conj().imag
        assert found.is_neg()
        return found

    x, r, dy, w, b, mean = lazy(4, 3, 5), lazy(4, 3, 5), lazy(4, 3, 5), lazy(3), lazy(3), lazy(3)
    var = torch._neg_view(-torch.rand(3) - 0.5)
    for training in (True, False):
        for gradient in (False, True):
            leaves = [a.requires_grad_(gradient) for a in (x, w, b, r)] if gradient else (x, w, b, r)
            statistics = (None, None) if training else (mean, var)
            y = ft.batch_norm(leaves[0], *statistics, leaves[1], leaves[2], training, residual=leaves[3])
            plain = [a.detach().resolve_neg().clone().requires_grad_(gradient) for a in leaves]
            z = F.batch_norm(
                plain[0], *(None if s is None else s.resolve_neg() for s in statistics), *plain[1:3], training
            )
            z = z + plain[3]
            assert_all_close(y, z)
            if gradient:
                found = torch.autograd.grad(y, leaves, dy)
                assert_all_close(found, torch.autograd.grad(z, plain, dy.resolve_neg()))


def test_lazily_negated_running_statistics():
    """Updated in the memory that they are seen through."""
    x, memory = torch.randn(4, 3), torch.zeros(2, 3)
    mean, var = torch._neg_view(memory[0]), torch._neg_view(memory[1])
    ft.batch_norm(x, mean, var, training=True, momentum=1.0)
    assert_all_close((mean.resolve_neg(), var.resolve_neg()), (x.mean(0), x.var(0)))
    assert_all_close(memory[0], -x.mean(0))


def test_subclasses():
    class Weight(nn.Parameter):
        pass

    class Mine(torch.Tensor):
        pass

    x = torch.randn(4, 3)
    w = Weight(torch.rand(3))
    y = ft.batch_norm(x.as_subclass(Mine), None, None, w, None, True)
    assert type(y) is Mine
    expected = F.batch_norm(x, None, None, w, None, True)
    assert_all_close(y.as_subclass(torch.Tensor), expected)
    assert_all_close(*(torch.autograd.grad(a.as_subclass(torch.Tensor), w, x) for a in (y, expected)))


@pytest.mark.filterwarnings("ignore:.*prototype:UserWarning")
def test_layouts_without_memory():
    x = torch.randn(4, 3, 2, 2)
    others = [x.to_sparse(), torch.nested.nested_tensor([x[0], x[1]])]
    with contextlib.suppress(RuntimeError):  # built without
        others.append(x.to_mkldnn())
    for training, other in itertools.product((True, False), others):
        with pytest.raises(RuntimeError, match=r"input: expected a dense tensor \(torch.strided\), got"):
            ft.batch_norm(other, torch.zeros(3), torch.ones(3), training=training)
    with pytest.raises(RuntimeError, match=r"weight: expected a dense tensor \(torch.strided\), got torch.sparse_coo"):
        ft.batch_norm(x, None, None, torch.ones(3).to_sparse(), training=True)
    with pytest.raises(ValueError, match=r"residual: expected .* torch.strided, as input is, got .* torch.sparse_coo"):
        ft.batch_norm(x, None, None, training=True, residual=x.to_sparse())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_are_in_the_dtype_of_their_parameter(training, create_graph):
    """A float32 bias beside a float16 weight: a sum of 262 144 is no infinity."""
    x = torch.ones(4096, 2, 8, 8)
    weight, bias = torch.ones(2, dtype=torch.float16, requires_grad=True), torch.zeros(2, requires_grad=True)
    y = ft.batch_norm(x, torch.zeros(2), torch.ones(2), weight, bias, training)
    of_weight, of_bias = torch.autograd.grad(y.sum(), (weight, bias), create_graph=create_graph)
    assert (of_weight.dtype, of_bias.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(of_bias.detach(), torch.full((2,), 262144.0))


@pytest.mark.parametrize("where_faster", [True, None, False])
@pytest.mark.parametrize(
    ("x", "statistics", "parameters"),
    [
        ("float32", "float64", "float32"), ("float32", "float32", "float64"), ("bfloat16", "float64", "float32"),
        ("bfloat16", "float32", "float32"), ("float64", "float32", "float64"), ("float16", "float16", "float32"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("training", [True, False])
def test_mixed_dtypes_whoever_computes(x, statistics, parameters, training, where_faster):
    """PyTorch has no kernels for most of them."""
    x, statistics, parameters = (getattr(torch, name) for name in (x, statistics, parameters))
    data = torch.randn(6, 3, 4, 4)
    mean, var, weight, bias = torch.zeros(3), torch.ones(3), torch.rand(3), torch.rand(3)
    y = ft.batch_norm(
        data.to(x), mean.to(statistics), var.to(statistics), weight.to(parameters), bias.to(parameters), training,
        where_faster=where_faster,
    )  # fmt: skip
    expected = torch.nn.functional.batch_norm(data, mean, var, weight, bias, training)
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=3e-2)
