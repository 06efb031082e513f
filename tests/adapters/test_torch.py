"""`fastbn.torch` beside PyTorch: its own samples, transforms, errors, modules."""

import copy
import importlib.util
import inspect
from functools import partial
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402, N812
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import fastbn  # noqa: E402
import fastbn.torch as ft  # noqa: E402
from tests import interpreters  # noqa: E402
from tests.adapters.torch_support import DTYPES, FORMATS, assert_close, leaf, network  # noqa: E402

pytestmark = pytest.mark.usefixtures("device")

# --- beside torch.nn.functional.batch_norm ----------------------------------------------------------------------------


def both(x, arguments, keywords):
    """Results, gradients and running statistics of ours and theirs."""
    answers = []
    for function in (ft.batch_norm, F.batch_norm):
        given = [x, *arguments]
        given = [
            a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in given
        ]
        named = {
            k: v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v
            for k, v in keywords.items()
        }
        y = function(*given, **named)
        tensors = [a for a in (*given, *named.values()) if isinstance(a, torch.Tensor)]
        leaves = [a for a in tensors if a.requires_grad]
        grads = []
        if leaves and y.numel():
            torch.manual_seed(1)
            grads = torch.autograd.grad(y, leaves, torch.randn_like(y))
        answers.append((y, *grads, *(a for a in tensors if not a.requires_grad)))
    return answers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pytorchs_own_samples(dtype, device):
    """Those of its OpInfo for batch_norm."""
    pytest.importorskip("expecttest", reason="PyTorch's own tests need it")
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name)
    samples = list(info.sample_inputs(device, dtype, requires_grad=True))
    assert len(samples) > 5
    for sample in samples:
        for ours, theirs in zip(*both(sample.input, sample.args, sample.kwargs), strict=True):
            assert_close(ours, theirs, dtype)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_of_other_dtypes(dtype, training, memory_format):
    """Halves with float32 parameters and statistics, as PyTorch allows on the CPU."""
    x = leaf(4, 6, 5, 3, dtype=dtype, memory_format=memory_format)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    mean, var = torch.randn(6, dtype=kind), torch.rand(6, dtype=kind) + 0.5
    ours, theirs = both(x, (mean, var, leaf(6, dtype=kind), leaf(6, dtype=kind), training, 0.3, 1e-3), {})
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, dtype)
    assert ours[0].stride() == theirs[0].stride()


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 7), (2, 3, 4, 5, 6)])
def test_other_numbers_of_axes(shape):
    x = leaf(*shape)
    for training in (True, False):
        for ours, theirs in zip(*both(x, (torch.zeros(3), torch.ones(3), leaf(3), leaf(3), training), {}), strict=True):
            assert_close(ours, theirs)


@pytest.mark.parametrize("view", ["channel slice", "batch slice", "inner slice", "transposed", "expanded"])
def test_views(view):
    x = torch.randn(6, 8, 5, 4)
    x = {
        "channel slice": lambda: x[:, 2:5], "batch slice": lambda: x[::2], "inner slice": lambda: x[:, :, 1:-1, 1:],
        "transposed": lambda: x.transpose(0, 1), "expanded": lambda: x[:, :1].expand(6, 8, 5, 4),
    }[view]()  # fmt: skip
    y = ft.batch_norm(x, None, None, training=True)
    assert_close(y, F.batch_norm(x, None, None, training=True))
    fake = torch.empty_like(x)
    assert y.stride() == fake.stride()


def test_memory_is_shared():
    """Of inputs, whatever the dtype and format, and of results."""
    from fastbn.torch.tensors import array, tensor

    for dtype in DTYPES:
        for memory_format in FORMATS:
            x = torch.randn(2, 3, 4, 5).to(dtype).to(memory_format=memory_format)
            a = array(x)
            assert (a.data.ptr if x.is_cuda else a.ctypes.data) == x.data_ptr()
            assert [s // a.itemsize for s in a.strides] == list(x.stride())
            back = tensor(a)
            assert (back.data_ptr(), back.stride(), back.dtype) == (x.data_ptr(), x.stride(), x.dtype)


def test_more_accurate_than_pytorch():
    """A mean a hundred times the spread, channels-last: PyTorch's float32 sums drift."""
    x = (100 + torch.rand(4, 4, 256, 256)).to(memory_format=torch.channels_last)
    mean = torch.zeros(4)
    ft.batch_norm(x, mean, None, training=True, momentum=1.0)
    exact = x.double().mean((0, 2, 3))
    assert (mean - exact).abs().max() < 1e-5


def test_residual_and_relu():
    x, r, w, b = leaf(4, 3, 5, 5), leaf(4, 3, 5, 5), leaf(3), leaf(3)
    dy = torch.randn(4, 3, 5, 5)
    for training in (True, False):
        stats = torch.zeros(3), torch.ones(3)
        ours = ft.batch_norm(x, *stats, w, b, training, residual=r, activation="relu")
        theirs = F.relu(F.batch_norm(x, torch.zeros(3), torch.ones(3), w, b, training) + r)
        assert_close(ours, theirs)
        for a, c in zip(*(torch.autograd.grad(y, (x, r, w, b), dy) for y in (ours, theirs)), strict=True):
            assert_close(a, c)


def test_second_derivatives():
    """Of the function that users call: the way that takes no operator."""
    x, w, b, r = (leaf(*s, dtype=torch.float64) for s in ((4, 2, 3), (2,), (2,), (4, 2, 3)))
    mean, var = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5
    for training, activation in ((True, None), (True, "relu"), (False, "relu")):

        def f(x, w, b, r, training=training, activation=activation):
            return ft.batch_norm(
                x, mean.clone(), var.clone(), w, b, training, residual=r, activation=activation
            )  # fmt: skip

        assert torch.autograd.gradcheck(f, (x, w, b, r))
        assert torch.autograd.gradgradcheck(f, (x, w, b, r))


def test_modes_and_transforms_see_operators():
    """A tracer and `torch.func.functional_call` under fake tensors meet ``torch.ops.fastbn``, not its kernels."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.randn(4, 3, 2)
    for tracing in ("real", "fake"):
        graph = make_fx(lambda x: ft.batch_norm(x, None, None, training=True), tracing_mode=tracing)(x)
        assert "fastbn.batch_norm" in graph.code
        assert_close(graph(x), ft.batch_norm(x, None, None, training=True))
    with FakeTensorMode() as mode:
        assert ft.batch_norm(mode.from_tensor(x), None, None, training=True).shape == x.shape


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of Python's ifs
@pytest.mark.parametrize("training", [True, False])
def test_a_trace_sees_operators(training):
    """With `torch.no_grad` too, where results of kernels that are called directly would be constants to it."""
    x, other = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    mean, var = torch.zeros(3), torch.ones(3)

    def f(x):
        return ft.batch_norm(x, None if training else mean, None if training else var, training=training)

    with torch.no_grad():
        traced = torch.jit.trace(f, x)
        assert "fastbn::batch_norm" in str(traced.graph)
        assert_close(traced(other), f(other))


def test_a_pytorch_that_does_not_tell(monkeypatch):
    """Who looks on is not public; without an answer everyone is shown operators, with the same results."""
    x, w, dy = leaf(4, 3, 5), leaf(3), torch.randn(4, 3, 5)
    answers = []
    for blind in (False, True):
        monkeypatch.setattr(ft.ops, "_BLIND", blind)
        mean, var = torch.zeros(3), torch.ones(3)
        y = ft.batch_norm(x, mean, var, w, None, True)
        assert ("Training" in str(y.grad_fn)) != blind
        z = ft.batch_norm(x, mean, var, w, None, False)
        answers.append([y, z, mean, var, *torch.autograd.grad((y, z), (x, w), (dy, dy))])
    for ours, others in zip(*answers, strict=True):
        assert_close(ours, others)


def test_meta_tensors():
    x = torch.empty(4, 3, 2, device="meta")
    for training in (True, False):
        y = ft.batch_norm(x, torch.empty(3, device="meta"), torch.empty(3, device="meta"), training=training)
        assert y.is_meta
        assert y.shape == x.shape


def test_checkpoints_and_hooks_of_saved_tensors():
    """What is saved goes by PyTorch's books: it can be dropped and computed again, or packed."""
    x, w, dy = leaf(4, 3, 5), leaf(3), torch.randn(4, 3, 5)

    def f(x):
        return ft.batch_norm(x * 2, None, None, w, None, True, activation="relu")

    expected = torch.autograd.grad(f(x), (x, w), dy)
    again = checkpoint(f, x, use_reentrant=False)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        hooked = f(x)
    assert len(packed) == 2  # x and the weight: relu's gradient does not take y
    for y in (again, hooked):
        for a, b in zip(torch.autograd.grad(y, (x, w), dy), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_relu_keeps_no_output(bias):
    """Which may then be written in place; second derivatives compute it again."""
    x, w, b, dy = leaf(4, 3, 5), leaf(3), leaf(3) if bias else None, torch.randn(4, 3, 5)
    given = [t for t in (x, w, b) if t is not None]

    def f(norm):
        return norm(x, None, None, w, b, True)

    y = f(partial(ft.batch_norm, activation="relu"))
    ours = torch.autograd.grad(y, given, dy, create_graph=True)
    theirs = torch.autograd.grad(F.relu(f(F.batch_norm)), given, dy, create_graph=True)
    second = [torch.autograd.grad(sum(g.square().sum() for g in grads), (x, w)) for grads in (ours, theirs)]
    y = f(partial(ft.batch_norm, activation="relu"))
    y.mul_(2)
    again = torch.autograd.grad(y, given, dy / 2)
    for found, expected in ((ours, theirs), second, (again, theirs)):
        for a, of_torch in zip(found, expected, strict=True):
            assert_close(a.detach(), of_torch.detach())


def test_function_transforms():
    x, dy = torch.randn(4, 3, 2), torch.randn(4, 3, 2)

    def loss(norm, x):
        return (norm(x, None, None, training=True) * dy).sum()

    for transform in (torch.func.grad, lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum())):
        ours, theirs = (transform(partial(loss, norm))(x) for norm in (ft.batch_norm, F.batch_norm))
        assert_close(ours, theirs)
    xs = torch.randn(2, 4, 3, 2)
    ours = torch.func.vmap(partial(loss, ft.batch_norm))(xs)
    assert_close(ours, torch.stack([loss(F.batch_norm, x) for x in xs]))


def test_gradients_that_are_not_asked_for():
    x, w = leaf(4, 3, 2, 2), torch.ones(3)
    y = ft.batch_norm(x, None, None, w, torch.zeros(3), True)
    y.sum().backward()
    assert w.grad is None
    assert x.grad is not None


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "match", "given"),
    [
        (ValueError, "Expected more than 1 value per channel when training, got input size", {"x": (1, 3)}),
        (ValueError, "Expected more than 1 value per channel", {"x": (1, 3, 1, 1)}),
        (ValueError, "input: expected at least 2 dimensions, got 1", {"x": (3,)}),
        (RuntimeError, "running_mean, running_var: expected both with training=False", {"training": False}),
        (RuntimeError, r"running_mean: expected 3 elements, one per channel, got \(4,\)", {"mean": torch.zeros(4)}),
        (RuntimeError, "running_var: expected 3 elements", {"var": torch.ones(2)}),
        (RuntimeError, "weight: expected 3 elements", {"weight": torch.ones(1)}),
        (RuntimeError, "bias: expected 3 elements", {"bias": torch.ones(3, 1)}),
        (
            RuntimeError,
            "bias: expected float16, bfloat16, float32 or float64, got torch.int64",
            {"bias": torch.ones(3).long()},
        ),
        (RuntimeError, "weight: expected a tensor on", {"weight": torch.ones(3, device="meta")}),
        (ValueError, "batch_norm eps must be positive during training, but got 0", {"eps": 0.0}),
        (ValueError, "residual: expected", {"residual": torch.ones(2, 3)}),
        (ValueError, "activation: expected None or 'relu', got 'gelu'", {"activation": "gelu"}),
    ],
)
def test_errors(error, match, given):
    given = {"x": (4, 3, 2), "training": True, "mean": None, "var": None} | given
    x = torch.ones(given.pop("x"))
    given = {
        k: v.to(x.device) if isinstance(v, torch.Tensor) and v.device.type != "meta" else v for k, v in given.items()
    }
    running = [given.pop("mean"), given.pop("var")]
    before = [None if r is None else r.clone() for r in running]
    with pytest.raises(error, match=match):
        ft.batch_norm(x, *running, **given)
    assert all(r is None or torch.equal(r, b) for r, b in zip(running, before, strict=True))


def test_integers():
    with pytest.raises(RuntimeError, match="input: expected float16, bfloat16, float32 or float64"):
        ft.batch_norm(torch.ones(2, 3, dtype=torch.int64), None, None, training=True)


def test_an_empty_batch():
    mean, var = torch.ones(3), torch.ones(3)
    x = leaf(0, 3, 4, 4)
    y = ft.batch_norm(x, mean, var, training=True)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 3, 4, 4)
    assert torch.equal(mean, torch.ones(3))


def test_without_pytorch():
    program = "import sys; sys.modules['torch'] = None\nimport fastbn\nimport fastbn.torch"
    ((_, err),) = interpreters.end(interpreters.begin(interpreters.python(program)), returns=1)
    assert 'fastbn.torch needs PyTorch, which is not installed: pip install "torch>=2.6"' in err


# --- modules ----------------------------------------------------------------------------------------------------------

MODULES = {
    "BatchNorm1d": (5, 4, 3), "BatchNorm2d": (5, 4, 3, 2), "BatchNorm3d": (5, 4, 3, 2, 2),
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"momentum": 0.4, "eps": 1e-2}],
    ids=str,
)
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, options):
    """Three steps of training, then evaluation, then the state dict, all as PyTorch's."""
    ours, theirs = getattr(ft, name)(4, **options), getattr(nn, name)(4, **options)
    assert isinstance(ours, type(theirs))
    for _ in range(3):
        x = torch.randn(MODULES[name])
        assert_close(ours(x), theirs(x))
    for a, b in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert a[0] == b[0]
        torch.testing.assert_close(a[1], b[1])
    ours.eval(), theirs.eval()
    assert_close(ours(x), theirs(x))
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert_close(copy.deepcopy(ours)(x), theirs(x))
    with pytest.raises(ValueError, match="expected"):
        ours(torch.ones(3))


def test_convert():
    model = network()
    before = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    called = []
    model[1].register_forward_hook(lambda *_: called.append(1))
    assert ft.convert(model) is model
    assert isinstance(model[1], ft.BatchNorm2d)
    assert isinstance(model[3][1], ft.BatchNorm2d)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    x = torch.randn(4, 3, 8, 8)
    for _ in range(2):
        assert_close(model(x), before(x))
    assert called == [1, 1]
    before.load_state_dict(model.state_dict())
    assert_close(model.eval()(x), before.eval()(x))
    norm = nn.BatchNorm1d(3)
    assert type(ft.convert(norm)) is ft.BatchNorm1d
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        ft.convert(3)


@pytest.mark.skipif("bias" not in inspect.signature(nn.BatchNorm2d).parameters, reason="came with PyTorch 2.13")
def test_a_module_without_bias():
    ours, theirs = ft.BatchNorm2d(3, bias=False), nn.BatchNorm2d(3, bias=False)
    x = torch.randn(4, 3, 5, 5)
    assert ours.bias is None
    assert_close(ours(x), theirs(x))


def test_others_stay():
    class Mine(nn.BatchNorm2d):
        pass

    model = nn.Sequential(Mine(3), nn.LazyBatchNorm2d(), nn.InstanceNorm2d(3))
    kinds = [type(m) for m in model]
    assert [type(m) for m in ft.convert(model)] == kinds


def test_fused_module():
    norm, plain = ft.BatchNormAct2d(4), nn.BatchNorm2d(4)
    x, r = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    assert_close(norm(x, r), F.relu(plain(x) + r))
    assert_close(norm(x), F.relu(plain(x)))
    assert "activation='relu'" in repr(norm)
    assert_close(ft.BatchNormAct2d(4, activation=None)(x), nn.BatchNorm2d(4)(x))


def test_grad_modes():
    norm = ft.BatchNorm2d(3)
    x = leaf(2, 3, 4, 4)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not norm(x).requires_grad
            assert not norm.eval()(x).requires_grad
        norm.train()
    assert norm(x).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    ours, theirs = ft.convert(network()), network()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 3, 8, 8)
    with torch.autocast(device, dtype):
        y, z = ours(x), theirs(x)
    assert y.dtype == z.dtype == dtype
    assert_close(y, z)
    y.float().sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


# --- around it --------------------------------------------------------------------------------------------------------


def test_the_example(capsys):
    """All networks learn the same in the same steps."""
    path = Path(__file__).parents[2] / "examples" / "resnet_torch.py"
    spec = importlib.util.spec_from_file_location("resnet_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--quick"])
    lines = capsys.readouterr().out.splitlines()[-2:]
    for line, layout in zip(lines, ("contiguous", "channels_last"), strict=True):
        assert line.startswith(layout)
        *others, first = (float(word.rstrip(",")) for word in line.split()[-3:])
        assert others == pytest.approx([first, first], rel=0.05)


def test_arrays_stay_numpys():
    """Outside of this module tensors are refused, with what to call instead."""
    with pytest.raises(TypeError, match=r"fastbn\.torch"):
        fastbn.batch_norm(torch.ones(2, 3))
    assert isinstance(fastbn.batch_norm(np.ones((2, 3), np.float32))[0], np.ndarray)
