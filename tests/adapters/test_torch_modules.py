"""Modules of `fastbn.torch` among PyTorch's tools: converters, copies, several processes."""

import copy
import io
import logging
import pickle
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402, N812
from torch import nn  # noqa: E402

import fastbn  # noqa: E402
import fastbn.torch as ft  # noqa: E402
from tests import interpreters  # noqa: E402
from tests.adapters.torch_support import CONVERTERS, Block, assert_same, assert_same_state, pair  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- convert and revert -----------------------------------------------------------------------------------------------


def every_kind():
    return nn.ModuleDict(
        {
            "one": nn.BatchNorm1d(3), "two": nn.BatchNorm2d(3, momentum=None), "three": nn.BatchNorm3d(3, affine=False),
            "sync": nn.SyncBatchNorm(3), "lazy": nn.LazyBatchNorm2d(), "others": nn.Sequential(nn.InstanceNorm2d(3)),
        }
    )  # fmt: skip


def test_revert_is_the_inverse():
    model = every_kind()
    kinds, state = [type(m) for m in model.modules()], copy.deepcopy(model["two"].state_dict())
    objects, before = list(model.modules()), {k: set(vars(m)) for k, m in model.items()}
    called = []
    model["two"].register_forward_hook(lambda *_: called.append(1))
    for _ in range(2):
        assert ft.revert(ft.convert(model)) is model
        assert [type(m) for m in model.modules()] == kinds
    assert all(a is b for a, b in zip(model.modules(), objects, strict=True))
    assert {k: set(vars(m)) for k, m in model.items()} == before
    assert_same_state(model["two"], type("", (), {"state_dict": lambda self: state})())
    model["two"](torch.randn(2, 3, 2, 2))
    assert called == [1]
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        ft.revert(3)


def test_a_fused_module_reverted():
    """It computes the same, is a `torch.nn.BatchNorm2d`, and is ours again by `convert`."""
    norm = ft.BatchNormAct2d(4)
    x, residual = torch.randn(2, 3, 4, 5, 5)
    expected = copy.deepcopy(norm)
    for _ in range(2):
        plain = ft.revert(norm)
        assert isinstance(plain, nn.BatchNorm2d)
        assert not isinstance(plain, ft.BatchNorm2d)
        assert plain is norm
        assert_same(plain(x, residual), expected(x, residual))
        assert_same(plain(x), expected(x))
        assert type(ft.convert(plain)) is ft.BatchNormAct2d
        assert_same(norm(x, residual), expected(x, residual))
        assert_same_state(norm, expected)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_modules_become_ours_with_their_first_batch():
    for axes, name in enumerate(("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"), 1):
        ours, theirs = (getattr(nn, f"Lazy{name}")() for _ in range(2))
        model = ft.convert(nn.Sequential(ours))
        x = torch.randn(3, 4, *(2,) * axes)
        for _ in range(2):
            assert_same(model(x), theirs(x))
        assert type(model[0]) is getattr(ft, name)
        assert_same_state(model[0], theirs)
        assert type(ft.revert(model)[0]) is getattr(nn, name)


class Mine(nn.BatchNorm2d):
    """An extension that fastbn does not know."""


class OfOurs(ft.BatchNorm2d):
    """One of ours."""


def test_what_is_left_alone_is_said(caplog):
    model = nn.Sequential(Mine(3), nn.Sequential(nn.BatchNorm2d(3), OfOurs(3)), nn.InstanceNorm2d(3))
    ft.convert(model)
    assert caplog.messages == [f"fastbn.torch.convert left alone: 0 ({__name__}.Mine)"]
    caplog.clear()
    ft.revert(model)
    assert caplog.messages == [f"fastbn.torch.revert left alone: 1.1 ({__name__}.OfOurs)"]
    caplog.clear()
    ft.SyncBatchNorm.convert_sync_batchnorm(model)
    (message,) = caplog.messages
    assert f"0 ({__name__}.Mine), 1.1 ({__name__}.OfOurs)" in message
    assert [type(m) for m in model[:2].modules() if not isinstance(m, nn.Sequential)] == [
        Mine, ft.SyncBatchNorm, OfOurs,
    ]  # fmt: skip
    caplog.clear()
    ft.convert(Mine(3))
    assert caplog.messages == [f"fastbn.torch.convert left alone: the model itself ({__name__}.Mine)"]
    caplog.clear()
    ft.convert(ft.convert(Block()))
    ft.revert(nn.Sequential(nn.BatchNorm2d(3)))
    assert not caplog.messages
    with caplog.at_level(logging.ERROR, "fastbn.torch"):
        ft.convert(model)
    assert not caplog.messages


# --- copies, casts, transforms, averages ------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["deepcopy", "pickle", "save", "state_dict"])
def test_copies_of_models(wrap):
    ours, theirs, x = pair()
    ft.SyncBatchNorm.convert_sync_batchnorm(ours.conv2)
    ours(x), theirs(x)
    file = io.BytesIO()
    if wrap == "save":
        torch.save(ours, file)
        file.seek(0)
    elif wrap == "state_dict":
        torch.save(ours.state_dict(), file)
        file.seek(0)
    made = {
        "deepcopy": lambda: copy.deepcopy(ours), "pickle": lambda: pickle.loads(pickle.dumps(ours)),
        "save": lambda: torch.load(file, weights_only=False),
        "state_dict": lambda: [m := ft.convert(Block()), m.load_state_dict(torch.load(file))][0],
    }[wrap]()  # fmt: skip
    assert [type(m) for m in made.modules()] == [type(m) for m in ours.modules()]
    for _ in range(2):
        assert_same(made(x), theirs(x))
    assert_same_state(made, theirs)
    assert_same(made.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "statistics stay", "channels-last"])
def test_casts(cast):
    """Of whole models, or of parameters alone."""
    ours, theirs, x = pair()
    if cast == "statistics stay":
        for model in (ours, theirs):
            for norm in (model.norm, model.end):
                norm.float()
        dtype = torch.float32
        x = x.to(dtype)
    elif cast == "channels-last":
        ours, theirs, x = (t.to(memory_format=torch.channels_last) for t in (ours, theirs, x))
        dtype = torch.float32
    else:
        dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}[cast]
        ours, theirs, x = ours.to(dtype), theirs.to(dtype), x.to(dtype)
    tolerance = {torch.float16: 0.02, torch.bfloat16: 0.2}.get(dtype, 2e-5)
    for mode in (True, False):
        y, z = ours.train(mode)(x), theirs.train(mode)(x)
        assert y.dtype == z.dtype == dtype
        torch.testing.assert_close(y, z, rtol=tolerance, atol=tolerance)
    assert {k: v.dtype for k, v in ours.state_dict().items()} == {k: v.dtype for k, v in theirs.state_dict().items()}


def test_averaged_models():
    """`update_bn` finds batch norms, resets them and averages over all batches."""
    from torch.optim.swa_utils import AveragedModel, update_bn

    ours, theirs, x = pair()
    averages = [AveragedModel(model) for model in (ours, theirs)]
    for average, model in zip(averages, (ours, theirs), strict=True):
        average.update_parameters(model)
        update_bn([x[:2], x[2:], x], average)
        average.eval()
    assert_same(averages[0](x), averages[1](x))
    assert_same_state(*averages)


def test_functional_calls():
    """With buffers given, which are updated in place of the module's, and gradients of them all."""
    ours, theirs, x = pair()
    found = []
    for model in (ours, theirs):
        before = copy.deepcopy(model.state_dict())
        parameters = {k: v.detach() for k, v in model.named_parameters()}
        buffers = {k: v.clone() for k, v in model.named_buffers()}

        def loss(parameters, buffers, model=model):
            return torch.func.functional_call(model, (parameters, buffers), (x,)).square().sum() / x.numel()

        grads = torch.func.grad(loss)(parameters, buffers)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
        found.append((grads, buffers))
    for ours, theirs in zip(*found, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


def test_functions_of_modules():
    """`apply`, `replace_all_batch_norm_modules_`, `skip_init`, parametrizations."""
    ours, theirs, x = pair()
    for model in (ours, theirs):
        model.apply(lambda m: m.reset_parameters() if isinstance(m, nn.BatchNorm2d) else None)
    assert_same(ours(x), theirs(x))
    for model in (ours, theirs):
        torch.func.replace_all_batch_norm_modules_(model)
    for mode in (True, False):
        assert_same(ours.train(mode)(x), theirs.train(mode)(x))
    for kind in (ft.BatchNorm2d, ft.BatchNormAct2d, ft.SyncBatchNorm, ft.SyncBatchNormAct):
        assert nn.utils.skip_init(kind, 3).weight.shape == (3,)

    class Twice(nn.Module):
        def forward(self, w):
            return 2 * w

    x = torch.randn(4, 3, 2, 2)
    answers = []
    for norm in (ft.BatchNorm2d(3), nn.BatchNorm2d(3)):
        nn.utils.parametrize.register_parametrization(norm, "weight", Twice())
        y = norm(x)
        answers.append((y, *torch.autograd.grad(y.square().mean(), norm.parametrizations.weight.original)))
        nn.utils.parametrize.remove_parametrizations(norm, "weight")
        assert type(norm) in (ft.BatchNorm2d, nn.BatchNorm2d)
    for a, b in zip(*answers, strict=True):
        assert_same(a, b)


# --- synchronised -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"activation": None}], ids=str
)
@pytest.mark.parametrize("converter", CONVERTERS)
def test_synchronised_modules_keep_relu_and_residual(converter, options):
    """timm#1254: relu gone, a residual a TypeError. Alone, within a model, and converted twice."""
    x, residual = torch.randn(2, 3, 4, 5, 5)
    norm = ft.BatchNormAct2d(4, eps=1e-3, **options).eval()
    expected, state, group = copy.deepcopy(norm), dict(norm.named_parameters()), object()
    model = nn.ModuleDict({"a": nn.ModuleDict({"norm": norm}), "plain": nn.Sequential(ft.BatchNorm1d(4))})
    for _ in range(2):
        model = CONVERTERS[converter](model, group)
    assert type(model["plain"][0]) is ft.SyncBatchNorm
    for made in (model["a"]["norm"], CONVERTERS[converter](copy.deepcopy(norm), group)):
        assert type(made) is ft.SyncBatchNormAct
        assert made.process_group is group
        assert not made.training
        assert list(made.state_dict()) == list(expected.state_dict())
        for mode in (False, True):
            made.train(mode), expected.train(mode)
            assert_same(made(x, residual), expected(x, residual))
            assert_same(made(x, residual=residual), expected(x, residual))
            assert_same(made(x), expected(x))
            assert made.extra_repr().startswith(expected.extra_repr())
        assert_same_state(made, expected)
        expected = copy.deepcopy(ft.BatchNormAct2d(4, eps=1e-3, **options).eval())
    assert all(p is state[name] for name, p in model["a"]["norm"].named_parameters())


def test_pytorchs_converter_of_reverted_and_extended_modules():
    """What PyTorch computes stays PyTorch's, with residual and relu; what extends ours keeps its kernels."""
    x, residual = torch.randn(2, 3, 4, 5, 5)

    class Extended(ft.BatchNormAct2d):
        pass

    expected = F.relu(nn.BatchNorm2d(4)(x) + residual)
    made = nn.SyncBatchNorm.convert_sync_batchnorm(ft.revert(ft.BatchNormAct2d(4)))
    assert isinstance(made, nn.SyncBatchNorm)
    assert_same(made(x, residual), expected)
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(4))) is nn.SyncBatchNorm
    made = nn.SyncBatchNorm.convert_sync_batchnorm(Extended(4))
    assert type(made) is ft.SyncBatchNormAct
    assert_same(made(x, residual), expected)
    assert isinstance(ft.revert(made), nn.SyncBatchNorm)
    assert_same(made(x, residual), expected)


def test_our_converter_keeps_objects():
    """Hooks fire, optimizers and shared modules hold on; lazy ones, with no state to share, are left."""
    shared, called = nn.BatchNorm2d(3), []
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.SyncBatchNorm(3), nn.LazyBatchNorm2d())
    shared.register_forward_hook(lambda *_: called.append(1))
    assert ft.SyncBatchNorm.convert_sync_batchnorm(model) is model
    assert model[0] is model[2] is shared
    assert [type(m) for m in model] == [
        ft.SyncBatchNorm, nn.ReLU, ft.SyncBatchNorm, ft.SyncBatchNorm, nn.LazyBatchNorm2d,
    ]  # fmt: skip
    model[:4](torch.randn(2, 3, 4, 4))
    assert called == [1, 1]
    with pytest.raises(ValueError, match="expected at least 2D input"):
        shared(torch.ones(3))
    with pytest.raises(ValueError, match="channels should be non-zero"):
        shared(torch.ones(3, 0))


PROGRAM = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import fastbn.torch as ft
from tests.adapters.torch_support import CONVERTERS, pair

rank, sizes, folder = int(sys.argv[1]), [int(n) for n in sys.argv[2].split(",")], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(sizes))
mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
for converter, convert in CONVERTERS.items():
    torch.manual_seed(0)
    model, _, _ = pair()
    x, dy = torch.randn(sum(sizes), 3, 6, 6), torch.randn(sum(sizes), 4, 6, 6)
    model = DistributedDataParallel(convert(model))
    x = x[mine].requires_grad_()
    for _ in range(2):  # the second time the buckets are as the first has found them
        model.zero_grad()
        y = model(x)
        (dx,) = torch.autograd.grad(y, x, dy[mine], retain_graph=True)
        y.backward(dy[mine])
    grads = [len(sizes) * p.grad for p in model.parameters()]  # of a sum, not a mean
    torch.save([y.detach(), dx, grads, model.module.state_dict()], f"{folder}/{converter}{rank}")

# A rank that evaluates alone waits for nobody, with running statistics or without (pytorch#48988).
norms = [ft.SyncBatchNorm(3, track_running_stats=False).eval(), ft.SyncBatchNormAct(3).eval()]
if rank == 0:
    torch.manual_seed(1)
    torch.save([norm(torch.randn(4, 3, 5)) for norm in norms], f"{folder}/alone")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module", params=[(2, 5), pytest.param((3, 0, 2), marks=pytest.mark.slow)], ids=str)
def ranks(request, tmp_path_factory):
    """What processes over gloo have made, by converter and rank."""
    sizes, folder = request.param, tmp_path_factory.mktemp("ranks")
    environment = {"PYTHONPATH": ROOT, "NUMBA_NUM_THREADS": 1, "OMP_NUM_THREADS": 1}
    commands = [interpreters.python(PROGRAM, rank, ",".join(map(str, sizes)), folder) for rank in range(len(sizes))]
    interpreters.end(*(interpreters.begin(command, cwd=ROOT, **environment) for command in commands), timeout=180)
    return sizes, folder


@pytest.mark.parametrize("converter", CONVERTERS)
def test_data_parallel_ranks_are_one_process(converter, ranks):
    """pytorch#78078: on the CPU, over batches that differ in size or are empty; fused blocks among the modules."""
    sizes, folder = ranks
    made = [torch.load(folder / f"{converter}{rank}") for rank in range(len(sizes))]
    _, model, _ = pair()
    x, dy = torch.randn(sum(sizes), 3, 6, 6).requires_grad_(), torch.randn(sum(sizes), 4, 6, 6)
    for _ in range(2):
        model.zero_grad()
        y = model(x)
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        y.backward(dy)
    assert_same(torch.cat([m[0] for m in made]), y.detach())
    assert_same(torch.cat([m[1] for m in made]), dx)
    for _, _, grads, state in made:
        for ours, theirs in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=1e-4)
        assert list(state) == list(model.state_dict())
        for name, theirs in model.state_dict().items():
            assert_same(state[name], theirs)
            assert torch.equal(state[name], made[0][3][name]), "the same bits on every rank"


def test_a_rank_evaluates_alone(ranks):
    _, folder = ranks
    torch.manual_seed(1)
    batch = nn.BatchNorm1d(3, track_running_stats=False)(torch.randn(4, 3, 5))
    running = F.relu(nn.BatchNorm1d(3).eval()(torch.randn(4, 3, 5)))
    for ours, theirs in zip(torch.load(folder / "alone"), (batch, running), strict=True):
        assert_same(ours, theirs)


# --- whose kernel -----------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """How often fastbn's kernels were called, and PyTorch's."""
    counted = {"fastbn": 0, "torch": 0}

    def counting(name, function):
        def call(*args, **keywords):
            counted[name] += 1
            return function(*args, **keywords)

        return call

    monkeypatch.setattr(fastbn, "batch_norm", counting("fastbn", fastbn.batch_norm))
    monkeypatch.setattr(fastbn, "batch_norm_inference", counting("fastbn", fastbn.batch_norm_inference))
    monkeypatch.setattr(F, "batch_norm", counting("torch", F.batch_norm))
    return counted


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("where_faster", [True, None, False])
def test_where_faster(calls, where_faster, memory_format, training):
    """Small tensors are PyTorch's where that is asked for, large ones fastbn's; results are the same."""
    norm = ft.convert(nn.BatchNorm2d(4), where_faster=where_faster).train(training)
    plain = copy.deepcopy(ft.revert(copy.deepcopy(norm)))
    for side, small in ((4, True), (900, False)):
        x = torch.randn(1, 4, side, side).to(memory_format=memory_format)
        calls.update(fastbn=0, torch=0)
        y = norm(x)
        assert calls == ({"fastbn": 0, "torch": 1} if small and where_faster else {"fastbn": 1, "torch": 0})
        torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-4)
    assert "where_faster" not in vars(ft.revert(norm))


def test_where_faster_fused(calls):
    """A residual and relu by PyTorch's operators; and the function."""
    norm = ft.convert(ft.BatchNormAct2d(3))
    x, z = torch.randn(2, 2, 3, 4, 4)
    y = norm(x, residual=z)
    assert calls == {"fastbn": 0, "torch": 1}
    for where_faster in (True, None, False):
        same = ft.batch_norm(x, None, None, training=True, residual=z, activation="relu", where_faster=where_faster)
        torch.testing.assert_close(same, y)
    assert calls == {"fastbn": 2, "torch": 2}
