"""Derivatives of `fastbn.torch` in every order and nest that PyTorch has.

Beside them stand the textbook's formula in float64 by PyTorch's own operations, PyTorch's batch norm, and finite
differences.
"""

import copy
import itertools
from functools import partial

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402, N812
from torch import nn  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.autograd.functional import hessian, jacobian, vhp  # noqa: E402
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, linearize, vjp, vmap  # noqa: E402

import fastbn.torch as ft  # noqa: E402
from fastbn.torch import formulas, kernels  # noqa: E402
from tests.adapters.torch_support import TANGENTS_CLOSE, assert_all_close  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated"),  # PyTorch's own, in forward mode
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),  # likewise, of linearize
]


# --- functions --------------------------------------------------------------------------------------------------------

DOUBLES = {"dtype": torch.float64}


def arguments():
    """Input, weight, bias, residual, mean and variance."""
    x, w, b, r = (torch.randn(s, **DOUBLES) for s in ((4, 3, 2), 3, 3, (4, 3, 2)))
    return x, w, b, r, torch.randn(3, **DOUBLES), torch.rand(3, **DOUBLES) + 0.5


def textbook(training, relu, x, w, b, r, mean, var):
    if training:
        mean = x.mean((0, 2))
        var = (x - mean[:, None]).square().mean((0, 2))
    y = (x - mean[:, None]) / (var[:, None] + 1e-5).sqrt() * w[:, None] + b[:, None] + r
    return torch.where(y <= 0, 0.0, y) if relu else y


def function(training, relu, x, w, b, r, mean, var):
    statistics = (None, None) if training else (mean, var)
    return ft.batch_norm(x, *statistics, w, b, training, residual=r, activation="relu" if relu else None)


def operator(training, relu, x, w, b, r, mean, var):
    if training:
        return torch.ops.fastbn.batch_norm(x, w, b, r, relu, 1e-5)[0]
    return torch.ops.fastbn.batch_norm_inference(x, mean, var, w, b, r, relu, 1e-5)


# --- transforms -------------------------------------------------------------------------------------------------------

ALL = tuple(range(6))
ONE_BATCHED = (0, *(None,) * 5)


def loss(f):
    return lambda *given: (f(*given) ** 3).sum()


def several(given):
    """A batch of three calls' arguments."""
    return [torch.stack([a, 2 * a, a.abs()]) for a in given]


def mapped(f):
    """Along a batch that depends on x."""
    return lambda x, *others: vmap(f, ONE_BATCHED)(torch.stack([x, 2 * x]), *others)


def of_x(f, given):
    return lambda x: f(x, *given[1:])


def dual(f, given, tangents):
    with forward_ad.dual_level():
        made = (forward_ad.make_dual(a, t) for a, t in zip(given, tangents, strict=True))
        return forward_ad.unpack_dual(f(*made))[:]


def leaves_of(given):
    return [a.detach().clone().requires_grad_() for a in given]


def dual_of_gradients(f, given, tangents):
    with forward_ad.dual_level():
        leaves = leaves_of(given)
        y = loss(f)(*map(forward_ad.make_dual, leaves, tangents))
        found = torch.autograd.grad(y, leaves, allow_unused=True)
        return [None if g is None else forward_ad.unpack_dual(g)[:] for g in found]


def gradients_of_dual(f, given, tangents):
    with forward_ad.dual_level():
        leaves = leaves_of(given)
        y = loss(f)(*map(forward_ad.make_dual, leaves, tangents))
        return torch.autograd.grad(forward_ad.unpack_dual(y).tangent, leaves, allow_unused=True)


def dual_gradient_of_y(f, given, tangents):
    """That comes to a graph made before."""
    leaves = leaves_of(given)
    y = f(*leaves)
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(given[3], tangents[3])
        found = torch.autograd.grad(y, leaves, dy, allow_unused=True)
        return [None if g is None else forward_ad.unpack_dual(g)[:] for g in found]


def batch_of_gradients(f, given, *, create_graph=False):
    leaves = leaves_of(given)
    (dy,) = several(given[3:4])
    options = {"is_grads_batched": True, "create_graph": create_graph, "allow_unused": True}
    return torch.autograd.grad(f(*leaves), leaves, dy, **options)


def batch_of_second_gradients(f, given):
    leaves = leaves_of(given)
    (dx,) = torch.autograd.grad(loss(f)(*leaves), leaves[0], create_graph=True)
    (ddx,) = several(given[3:4])
    return torch.autograd.grad(dx, leaves, ddx, is_grads_batched=True, allow_unused=True)


def slope(f, x, _):
    return grad(f)(x).square().sum()


def directional(f, x, dx):
    return jvp(f, (x,), (dx,))[1]


def thrice(derivative):
    """Along x."""

    def of(f, given, tangents):
        f = of_x(loss(f), given)
        for _ in range(3):
            f = partial(lambda f, x: derivative(f, x, tangents[0]), f)
        return f(given[0])

    return of


TRANSFORMS = {
    "jvp": jvp,
    "jvp of x": lambda f, a, t: jvp(of_x(f, a), a[:1], t[:1]),
    "jvp of weight and bias": lambda f, a, t: jvp(lambda w, b: f(a[0], w, b, *a[3:]), a[1:3], t[1:3]),
    "jvp of weight": lambda f, a, t: jvp(lambda w: f(a[0], w, *a[2:]), a[1:2], t[1:2]),
    "jvp of bias": lambda f, a, t: jvp(lambda b: f(*a[:2], b, *a[3:]), a[2:3], t[2:3]),
    "jvp of residual": lambda f, a, t: jvp(lambda r: f(*a[:3], r, *a[4:]), a[3:4], t[3:4]),
    "jvp of statistics": lambda f, a, t: jvp(lambda m, v: f(*a[:4], m, v), a[4:], t[4:]),
    "linearize": lambda f, a, t: linearize(f, *a)[1](*t),
    "jacfwd": lambda f, a, t: jacfwd(f, ALL)(*a),
    "jacrev": lambda f, a, t: jacrev(f, ALL)(*a),
    "hessian": lambda f, a, t: torch.func.hessian(loss(f), ALL)(*a),
    "jacrev of jacrev": lambda f, a, t: jacrev(jacrev(loss(f), ALL), ALL)(*a),
    "jacfwd of jacfwd": lambda f, a, t: jacfwd(jacfwd(loss(f), ALL), ALL)(*a),
    "jacrev of jacfwd": lambda f, a, t: jacrev(jacfwd(loss(f), ALL), ALL)(*a),
    "jvp of jvp": lambda f, a, t: jvp(lambda *a: jvp(f, a, t)[1], a, t),
    "jvp of grad": lambda f, a, t: jvp(grad(loss(f), ALL), a, t),
    "grad of jvp": lambda f, a, t: grad(lambda *a: jvp(loss(f), a, t)[1], ALL)(*a),
    "vjp of jvp": lambda f, a, t: vjp(lambda *a: jvp(f, a, t)[1], *a)[1](a[3]),
    "third gradients": thrice(slope),
    "third tangents": thrice(directional),
    "vmap": lambda f, a, t: vmap(f)(*several(a)),
    "vmap of x": lambda f, a, t: vmap(of_x(f, a))(*several(a[:1])),
    "vmap of weight": lambda f, a, t: vmap(lambda w: f(a[0], w, *a[2:]))(*several(a[1:2])),
    "vmap of other axes": lambda f, a, t: vmap(f, (2, 1, None, 0, None, 1), 1)(
        *(s.movedim(0, axis) if axis else s for s, axis in zip(several(a[:2]), (2, 1), strict=True)),
        a[2], *several(a[3:4]), a[4], several(a[5:])[0].T,
    ),
    "vmap of vmap": lambda f, a, t: vmap(vmap(lambda x, w: f(x, w, *a[2:]), (0, None)), (None, 0))(*several(a[:2])),
    "vmap of grad": lambda f, a, t: vmap(grad(loss(f), ALL), ONE_BATCHED)(*several(a[:1]), *a[1:]),
    "vmap of jacrev": lambda f, a, t: vmap(jacrev(f, ALL))(*several(a)),
    "vmap of jvp": lambda f, a, t: vmap(lambda *at: jvp(f, at[:6], at[6:]))(*several((*a, *t))),
    "grad of vmap": lambda f, a, t: grad(loss(mapped(f)), ALL)(*a),
    "jvp of vmap": lambda f, a, t: jvp(mapped(f), a, t),
    "functionalize": lambda f, a, t: torch.func.functionalize(grad(loss(f), ALL))(*a),
    "grad of functionalize": lambda f, a, t: grad(torch.func.functionalize(loss(f)), ALL)(*a),
    "dual numbers": dual,
    "dual of gradients": dual_of_gradients,
    "gradients of dual": gradients_of_dual,
    "dual gradient of y": dual_gradient_of_y,
    "is_grads_batched": lambda f, a, t: batch_of_gradients(f, a),
    "is_grads_batched, create_graph": lambda f, a, t: batch_of_gradients(f, a, create_graph=True),
    "is_grads_batched of gradients": lambda f, a, t: batch_of_second_gradients(f, a),
    "jacobian, vectorize": lambda f, a, t: jacobian(f, a, vectorize=True),
    "jacobian, forward-mode": lambda f, a, t: jacobian(f, a, vectorize=True, strategy="forward-mode"),
    "hessian, vectorize": lambda f, a, t: hessian(loss(f), a, vectorize=True),
    "hessian, forward-mode": lambda f, a, t: hessian(
        loss(f), a, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "vhp": lambda f, a, t: vhp(loss(f), a, t),
}  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_as_the_textbook(transform):
    """Of the function and of the operator itself (functorch#867, pytorch#96655, #196699, #73541)."""
    given = arguments()
    tangents = tuple(torch.randn_like(a) for a in given)
    for training, relu in itertools.product((True, False), (False, True)):
        expected = TRANSFORMS[transform](partial(textbook, training, relu), given, tangents)
        for ours in (function, operator):
            assert_all_close(TRANSFORMS[transform](partial(ours, training, relu), given, tangents), expected)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_as_finite_differences(training, relu):
    """Forwards, backwards, both in both orders, and batches of them."""
    given = leaves_of(arguments())
    f = partial(function, training, relu)
    if training:  # no function of given statistics
        f, given = (lambda *a: function(True, relu, *a, None, None)), given[:4]
    both = {"check_batched_grad": True}
    assert torch.autograd.gradcheck(f, given, check_forward_ad=True, check_batched_forward_grad=True, **both)
    assert torch.autograd.gradgradcheck(f, given, check_fwd_over_rev=True, **both)


def test_tangents_of_statistics():
    """Results of one operator, inputs of another, which PyTorch has none of."""
    x, w, b, r, mean, var = leaves_of(arguments())
    ops = torch.ops.fastbn
    assert torch.autograd.gradcheck(lambda *a: ops.batch_norm(*a, False, 1e-3), (x, w, b, r), check_forward_ad=True)
    for frozen, through in ((True, ()), (False, leaves_of((mean, var)))):

        def f(dy, x, w, mean, rstd, *through, frozen=frozen):
            through = through or (None, None)
            return ops.batch_norm_backward(dy, x, None, w, mean, rstd, *through, frozen, False)[:3]

        assert torch.autograd.gradcheck(f, (r, x, w, mean, var, *through), check_forward_ad=True)


SHAPES = [(5, 3), (4, 3, 2, 3), (2, 3, 4, 1, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TANGENTS_CLOSE, ids=str)
def test_dtypes_shapes_and_layouts(dtype, shape):
    """Tangents and per-sample gradients, with parameters in float32 beside halves, against float64."""
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    x, r, dx, dr = (torch.randn(shape).to(dtype).transpose(0, -1).contiguous().transpose(0, -1) for _ in range(4))
    if len(shape) == 4:
        x, dx = (a.to(memory_format=torch.channels_last) for a in (x, dx))
    w, b, dw, db = (torch.randn(3, dtype=kind) for _ in range(4))
    mean, var = torch.randn(3, dtype=kind), torch.rand(3, dtype=kind) + 0.5

    def f(norm, training, x, w, b, r):
        return norm(x, *((None, None) if training else (mean.to(w.dtype), var.to(w.dtype))), w, b, training) + r

    def mine(training, x, w, b, r):
        statistics = (None, None) if training else (mean, var)
        return ft.batch_norm(x, *statistics, w, b, training, residual=r)

    for training in (True, False):
        exact = partial(f, F.batch_norm, training)
        doubles = [a.double() for a in (x, w, b, r, dx, dw, db, dr)]
        y, dy = jvp(partial(mine, training), (x, w, b, r), (dx, dw, db, dr))
        assert dy.dtype == y.dtype == dtype
        assert_all_close((y, dy), jvp(exact, tuple(doubles[:4]), tuple(doubles[4:])), dtype)
        ours = vmap(grad(lambda *a: (mine(training, *a) * dr.double()).sum(), (0, 1, 2, 3)), (0, None, None, None))  # noqa: B023
        theirs = vmap(grad(lambda *a: (exact(*a) * doubles[7]).sum(), (0, 1, 2, 3)), (0, None, None, None))  # noqa: B023
        found = ours(torch.stack([x, -x]), w, b, r)
        assert [g.dtype for g in found] == [dtype, kind, kind, dtype]
        assert_all_close(found, theirs(torch.stack([doubles[0], -doubles[0]]), *doubles[1:4]), dtype)


def test_kernels_do_first_derivatives_and_batches(monkeypatch):
    """Tangents and batches do without the formulas; a batch is one call."""
    for name in ("batch_norm", "batch_norm_inference", "batch_norm_backward"):
        monkeypatch.setattr(formulas, name, None)
    calls = []
    original = kernels.normalized
    monkeypatch.setattr(kernels, "normalized", lambda saved, x, *a: calls.append(x.shape) or original(saved, x, *a))
    given = arguments()
    for training in (True, False):
        f = partial(function, training, False)
        jvp(f, given, given)
        vmap(grad(loss(f), ALL))(*several(given))
    assert calls == [(4, 3, 2), (4, 9, 2)]


def test_a_missing_or_partial_tangent():
    """Of a sum of a dual and a plain number; and none at all."""
    x, w, *_ = arguments()
    with forward_ad.dual_level():
        y = ft.batch_norm(x, None, None, forward_ad.make_dual(w, w), None, True)
        expected = F.batch_norm(x, None, None, w, None, True)
        assert_all_close(forward_ad.unpack_dual(y).tangent, expected)
        assert forward_ad.unpack_dual(ft.batch_norm(x, None, None, w, None, True)).tangent is None


# --- compiler and tracer ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own, within its compiler
@pytest.mark.parametrize("transform", ["jvp", "vmap of grad", "jacfwd", "dual numbers"])
def test_compiled_and_traced(transform):
    from torch.fx.experimental.proxy_tensor import make_fx

    given = arguments()
    tangents = tuple(torch.randn_like(a) for a in given)

    def f(norm, *given):
        return TRANSFORMS[transform](partial(norm, True, True), given, tangents)

    expected = f(textbook, *given)
    compiled = torch.compile(partial(f, function), backend="aot_eager")
    assert_all_close(compiled(*given), expected)
    assert_all_close(make_fx(partial(f, function))(*given)(*given), expected)


# --- running statistics -----------------------------------------------------------------------------------------------


def test_running_statistics_under_vmap():
    """One for each call is updated, as PyTorch's; one for all is refused, as by PyTorch, and nothing written."""
    xs, running = torch.randn(2, 5, 3), torch.randn(2, 3).abs()
    for x, axis in ((xs, 0), (xs[0], None)):
        answers = []
        for norm in (ft.batch_norm, F.batch_norm):
            mean, var = running.clone(), running.clone() + 1
            y = vmap(partial(norm, training=True, momentum=0.3), (axis, 0, 0))(x, mean, var)
            answers.append((y, mean, var))
        assert_all_close(*answers)
    for which, axes in (("running_mean", (0, None, None)), ("running_var", (0, 0, None))):
        mean, var = running if axes[1] == 0 else running[0].clone(), running[0].clone()
        before = mean.clone(), var.clone()
        with pytest.raises(RuntimeError, match=f"{which}: expected one for each call under vmap"):
            vmap(partial(ft.batch_norm, training=True), axes)(xs, mean, var)
        assert torch.equal(mean, before[0])
        assert torch.equal(var, before[1])


@pytest.mark.parametrize("transform", ["jvp of x", "jvp of jvp", "hessian", "dual numbers", "vmap of weight"])
def test_running_statistics_of_a_closure(transform):
    """They move once a call, with numbers and not with tangents."""
    given = arguments()
    answers = []
    for norm in (ft.batch_norm, F.batch_norm):
        mean, var = torch.zeros(3, **DOUBLES), torch.ones(3, **DOUBLES)

        def f(x, w, b, r, *_, norm=norm, mean=mean, var=var):
            return norm(x, mean, var, w, b, True) + r

        TRANSFORMS[transform](f, given, given)
        answers.append((mean, var))
    assert_all_close(*answers)
    assert forward_ad.unpack_dual(answers[0][0], level=0).tangent is None


def test_running_statistics_that_cannot_be_updated():
    x, var = torch.randn(4, 3), torch.ones(3)
    for mean, expected in (
        (torch.zeros(3, requires_grad=True), "requires_grad=False in training"),
        (torch.zeros(1).expand(3), "memory of its own, which training updates, got an expanded tensor"),
    ):
        with pytest.raises(RuntimeError, match=f"running_mean: expected {expected}"):
            ft.batch_norm(x, mean, var, training=True)
        assert torch.equal(var, torch.ones(3))
        assert_all_close(ft.batch_norm(x, mean, var), F.batch_norm(x, mean.detach(), var))


# --- modules ----------------------------------------------------------------------------------------------------------


def network(**options):
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, **options), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()


@pytest.mark.parametrize("training", [True, False])
def test_modules(training):
    """Tangents of a network's input and parameters, and its curvature along them."""
    theirs = network(track_running_stats=False) if training else network().eval()
    ours = ft.convert(copy.deepcopy(theirs))
    x = torch.randn(3, 2, 5, 5, **DOUBLES)
    tangents = {name: torch.randn_like(p) for name, p in theirs.named_parameters()}

    def along(model):
        def f(x, parameters):
            return functional_call(model, parameters, (x,))

        point = x, dict(model.named_parameters())
        curvature = jvp(grad(lambda *a: f(*a).square().sum(), (0, 1)), point, (x, tangents))[1]
        return jvp(f, point, (x, tangents))[1], curvature

    assert_all_close(along(ours), along(theirs))


def test_the_fused_module():
    fused, plain = ft.BatchNormAct2d(3).double(), nn.BatchNorm2d(3).double()
    x, r, dx, dr = torch.randn(4, 4, 3, 2, 2, **DOUBLES)
    for training in (True, False):
        fused.train(training), plain.train(training)
        with forward_ad.dual_level():
            given = forward_ad.make_dual(x, dx), forward_ad.make_dual(r, dr)
            ours, theirs = fused(*given), F.relu(plain(given[0]) + given[1])
            assert_all_close(forward_ad.unpack_dual(ours)[:], forward_ad.unpack_dual(theirs)[:])
        assert_all_close(fused.running_var, plain.running_var)


def test_gradients_per_sample():
    """In evaluation, where samples do not meet."""
    theirs = network().eval()
    ours = ft.convert(copy.deepcopy(theirs))
    xs = torch.randn(4, 2, 5, 5, **DOUBLES)

    def of(model):
        def f(parameters, x):
            return functional_call(model, parameters, (x[None],)).square().sum()

        return vmap(grad(f), (None, 0))(dict(model.named_parameters()), xs)

    assert_all_close(of(ours), of(theirs))


def test_an_ensemble_in_training():
    """Several models at once: each has its running statistics, all are updated."""
    models = [nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).double() for _ in range(3)]
    x = torch.randn(5, 2, 4, 4, **DOUBLES)
    answers = []
    for change in (ft.convert, lambda model: model):
        parameters, buffers = torch.func.stack_module_state([change(copy.deepcopy(m)) for m in models])
        model = change(copy.deepcopy(models[0]))

        def f(parameters, buffers, model=model):
            return functional_call(model, (parameters, buffers), (x,)).pow(3).sum()

        answers.append((vmap(grad(f))(parameters, buffers), buffers))
    assert_all_close(*([a[0], a[1]["1.running_mean"], a[1]["1.running_var"]] for a in answers))


def test_synchronised_tangents_are_refused(monkeypatch):
    """Never zeros."""
    from fastbn.torch import sync

    monkeypatch.setattr(sync, "torch_gather", lambda group: lambda vector: vector[None])
    x = torch.randn(4, 3)
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
        sync.synchronised(forward_ad.make_dual(x, x), None, None, None, None, 0.1, 1e-5, None)
