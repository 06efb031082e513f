"""Operators of `fastbn.torch`: their checks, derivatives, compiler and exporter."""

import copy

import pytest

torch = pytest.importorskip("torch")

import fastbn.torch as ft  # noqa: E402
from tests.adapters.torch_support import FORMATS, assert_close, leaf, network  # noqa: E402

pytestmark = pytest.mark.usefixtures("device")

# --- operators --------------------------------------------------------------------------------------------------------


def operator_arguments(dtype, memory_format, relu):
    def made(*shape):
        return leaf(*shape, dtype=dtype, memory_format=memory_format if len(shape) == 4 else torch.contiguous_format)

    x, r, w, b = made(3, 2, 4, 2), made(3, 2, 4, 2), made(2), made(2)
    y, mean, m2, rstd = (t.detach() for t in torch.ops.fastbn.batch_norm(x, w, b, r, relu, 1e-3))
    return {
        "batch_norm": (x, w, b, r, relu, 1e-3),
        "batch_norm_inference": (x, mean.to(dtype), (m2 / 24).to(dtype), w, b, r, relu, 1e-3),
        "batch_norm_backward": (r, x, y if relu else None, w, mean, rstd, None, None, False, relu),
    }


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of opcheck's own, from PyTorch 2.15 on
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_inference", "batch_norm_backward"])
def test_opcheck(name, relu, memory_format):
    """PyTorch's own check of schema, fake results, autograd registration and tracing."""
    arguments = operator_arguments(torch.float32, memory_format, relu)[name]
    torch.library.opcheck(getattr(torch.ops.fastbn, name).default, arguments)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_inference", "batch_norm_backward"])
def test_first_and_second_derivatives(name, relu):
    """By finite differences, those of the statistics among them."""
    arguments = operator_arguments(torch.float64, torch.contiguous_format, relu)[name]
    if name == "batch_norm_backward":  # its y tells a side of zero, and cannot move
        arguments = *arguments[:6], *(leaf(2, dtype=torch.float64) for _ in range(2)), *arguments[8:]
    arguments = tuple(
        a.detach().requires_grad_(not (relu and name == "batch_norm_backward" and i == 2))
        if isinstance(a, torch.Tensor) else a
        for i, a in enumerate(arguments)
    )  # fmt: skip
    op = getattr(torch.ops.fastbn, name)
    assert torch.autograd.gradcheck(op, arguments)
    assert torch.autograd.gradgradcheck(op, arguments)


# --- compiler and exporter --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own, within its compiler
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("where_faster", [True, None, False])
def test_compiled_in_one_graph(where_faster, training, backend):
    """Forwards, backwards and running statistics."""
    torch.compiler.reset()  # the 12 cases compile the same code object, and PyTorch's limit is 8 in a process
    model = ft.convert(network(), where_faster=where_faster).train(training)
    compiled_model = copy.deepcopy(model)
    compiled = torch.compile(compiled_model, fullgraph=True, backend=backend)
    x = torch.randn(4, 3, 8, 8)
    for _ in range(2):
        y, z = model(x), compiled(x)
        assert_close(y, z)
        y.square().sum().backward()
        z.square().sum().backward()
    # PyTorch's own two ways are 1.4e-3 apart, in the gradient of a bias before batch norm, which is 0.
    near = 1e-3 if where_faster is False else 5e-3
    for (name, p), q in zip(model.named_parameters(), compiled_model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=near, msg=name)
    for p, q in zip(model.buffers(), compiled_model.buffers(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("where_faster", [True, None, False])
def test_exported(where_faster):
    """With PyTorch's operators a program runs where fastbn is not installed; with fastbn's it keeps the statistics."""
    model = ft.convert(network(), where_faster=where_faster).eval()
    x = torch.randn(4, 3, 8, 8)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    names = [str(node.target) for node in exported.graph.nodes]
    assert sum("fastbn" in name for name in names) == (2 if where_faster is False else 0)
    assert sum("batch_norm" in name for name in names) == 2
    more = torch.randn(7, 3, 8, 8)
    assert_close(exported.module()(more), model(more))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gradients_of_expanded_tensors_lie_as_announced(axis):
    """As the operator's results under a compiler do, which allocates what it fuses by that."""
    shape = [4, 6, 8, 10]
    x = torch.randn([1 if i == axis else n for i, n in enumerate(shape)]).expand(shape)
    dy, residual = torch.randn(shape), torch.randn(shape)
    y, mean, _, rstd = torch.ops.fastbn.batch_norm(x, None, None, residual, True, 1e-5)
    found = torch.ops.fastbn.batch_norm_backward(dy, x, y, None, mean, rstd, None, None, False, True)
    assert found[0].stride() == found[3].stride() == torch.empty_like(x).stride()
    torch.testing.assert_close(found[3], torch.where(y > 0, dy, 0.0))
