"""Modules of `fastbn.torch` in PyTorch's tracers, fusion, quantisation and exporters."""

import copy
import io
import warnings

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

with warnings.catch_warnings():  # PyTorch's own, of `torch.jit`, when it is imported for the first time
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.fx.experimental.optimization import fuse
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval  # noqa: E402

import fastbn.torch as ft  # noqa: E402
from tests.adapters.torch_support import assert_same, assert_same_state, pair  # noqa: E402

OPTIONS = [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"activation": None}]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_symbolic_traces():
    """pytorch#44802: batch norms are nodes that call the module, as PyTorch's, and follow its mode."""
    ours, theirs, x = pair()
    graph = torch.fx.symbolic_trace(ours)
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert called == ["conv", "norm", "conv2", "end"]
    for mode in (True, False, True):
        graph.train(mode), theirs.train(mode)
        assert_same(graph(x), theirs(x))
    assert_same_state(graph, theirs)
    again = torch.fx.symbolic_trace(copy.deepcopy(graph))
    assert_same(again.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("norm", [ft.BatchNorm2d(3), ft.BatchNormAct2d(3), ft.revert(ft.BatchNormAct2d(3))], ids=repr)
def test_a_batch_norm_alone_is_no_model_to_trace(norm):
    """Nor is PyTorch's."""
    for module in (norm, nn.BatchNorm2d(3)):
        with pytest.raises(torch.fx.proxy.TraceError):
            torch.fx.symbolic_trace(module)


def test_a_traced_residual():
    """Of which the tracer sees the residual alone."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = ft.BatchNormAct2d(2)
            self.register_buffer("x", torch.randn(3, 2, 2, 2))

        def forward(self, residual):
            return self.norm(self.x.clone(), residual=residual)

    model = Model().eval()
    graph, residual = torch.fx.symbolic_trace(model), torch.randn(3, 2, 2, 2)
    assert_same(graph(residual), model(residual))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own, within its compiler
def test_a_mode_set_in_a_compiled_graph():
    """It goes through the children of modules."""
    ours, theirs, x = pair()

    def evaluated(x, model=ours):
        model.eval()
        return model(x)

    assert_same(torch.compile(evaluated, fullgraph=True, backend="aot_eager")(x), theirs.eval()(x))


@pytest.mark.parametrize("reverted", [False, True])
def test_fusion_by_fx(reverted):
    """It knows PyTorch's classes; others are left in place, with the same results."""
    ours, theirs, x = pair()
    ours(x), theirs(x)
    ours.eval(), theirs.eval()
    fused = fuse(ft.revert(ours) if reverted else ours)
    called = [node.target for node in fused.graph.nodes if node.op == "call_module"]
    assert called == (["conv", "conv2", "end"] if reverted else ["conv", "norm", "conv2", "end"])
    assert_same(fused(x), theirs(x))


def test_fusion_by_state():
    conv, norm, x = nn.Conv2d(3, 4, 3), ft.BatchNorm2d(4), torch.randn(5, 3, 6, 6)
    norm(conv(x))
    assert_same(fuse_conv_bn_eval(conv.eval(), norm.eval())(x), norm(conv(x)))
    linear, norm, x = nn.Linear(3, 4), ft.BatchNorm1d(4), torch.randn(5, 3)
    norm(linear(x))
    assert_same(fuse_linear_bn_eval(linear.eval(), norm.eval())(x), norm(linear(x)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # PyTorch's
def test_quantised_after_revert():
    """By modules: fused, observed, converted; unlike a converted model, which says what to do."""
    from torch.ao import quantization

    ours, theirs, x = pair()
    ours(x), theirs(x)
    ours.eval(), theirs.eval()
    with pytest.raises(AssertionError, match="did not find fuser method"):
        quantization.fuse_modules(ours, ["conv", "norm"])
    with pytest.raises(RuntimeError, match=r"input: .* got torch.quint8; call fastbn\.torch\.revert"):
        ours.norm(torch.quantize_per_tensor(x[:, :1].expand(-1, 4, -1, -1), 0.1, 0, torch.quint8))
    fused = quantization.fuse_modules(ft.revert(ours), ["conv", "norm"])
    assert isinstance(fused.norm, nn.Identity)
    assert_same(fused(x), theirs(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # PyTorch's
@pytest.mark.parametrize("reverted", [False, True])
def test_quantised_by_fx(reverted):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    if "onednn" not in torch.backends.quantized.supported_engines:
        pytest.skip("PyTorch has no quantised convolutions here")
    ours, theirs, x = pair()
    ours(x), theirs(x)
    ours.eval(), theirs.eval()
    if reverted:
        ft.revert(ours)
    prepared = prepare_fx(ours, get_default_qconfig_mapping("onednn"), (x,))
    prepared(x)
    quantised = convert_fx(prepared)
    assert hasattr(quantised, "norm") != reverted  # fused into the convolution
    expected = theirs(x)
    assert (quantised(x) - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"activation": None}],
    ids=str,
)
def test_scripted_after_revert(options):
    norm = ft.BatchNormAct2d(4, **options)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), ft.BatchNorm2d(4), norm)
    expected, x = copy.deepcopy(model), torch.randn(5, 3, 4, 4)
    with pytest.raises(RuntimeError, match=r"torch.jit.script cannot compile BatchNorm2d; call fastbn\.torch\.revert"):
        torch.jit.script(model)
    with pytest.raises(RuntimeError, match="BatchNormAct2d; call"):
        torch.jit.script(norm)
    scripted = torch.jit.script(ft.revert(model))
    for mode in (True, True, False):
        scripted.train(mode), expected.train(mode)
        assert_same(scripted(x), expected(x))
    assert_same_state(scripted, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated", "ignore::torch.jit.TracerWarning")
def test_traced():
    ours, theirs, x = pair()
    ours.eval(), theirs.eval()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(ours, x), file)
    file.seek(0)
    more = torch.randn(2, 3, 5, 7)
    assert_same(torch.jit.load(file)(more), theirs(more))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # PyTorch's
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("reverted", [False, True])
@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_onnx(dynamo, reverted):
    """Of ONNX's own operators; computed by ONNX's reference."""
    onnx = pytest.importorskip("onnx")
    if dynamo:
        pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    ours, theirs, x = pair()
    ours(x), theirs(x)
    ours.eval(), theirs.eval()
    file = io.BytesIO()
    torch.onnx.export(ft.revert(ours) if reverted else ours, (x,), file, dynamo=dynamo)
    model = onnx.load_from_string(file.getvalue())
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    (y,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    assert_same(torch.from_numpy(y), theirs(x))
