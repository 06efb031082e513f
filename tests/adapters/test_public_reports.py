"""Public reports against other projects, tried on fastbn's adapters; see ``tests/api/test_public_reports.py``."""

import numpy as np
import pytest

from fastbn import reference
from tests.cases.reports import F32, exact_var, hold, normal, reports

# --- PyTorch ----------------------------------------------------------------------------------------------------------


def constant_channels(torch, ft):
    x = torch.tensor([[-1e10], [1e8], [100.3], [0.1], [7.0]]).expand(5, 100).reshape(1, 5, 10, 10)
    formats = torch.contiguous_format, torch.channels_last
    return [ft.batch_norm(x.contiguous(memory_format=f), None, None, training=True) for f in formats], 0


def large_values(torch, ft):
    x = 1e30 * torch.randn(8, 3, 4, 4)
    return ft.batch_norm(x, None, None, training=True), reference.batch_norm(x.numpy()).y, 1e-4


def gradients_of_layout(torch, ft, x, dy):
    """As the formulas have them, whatever the strides of x and dy."""
    weight, bias = torch.tensor([[1.5, -0.5, 2], [0.25, 1, 0]], dtype=torch.double).requires_grad_()
    x = x.detach().requires_grad_()
    y = ft.batch_norm(x, None, None, weight, bias, training=True)
    grads = torch.autograd.grad(y, (x, weight, bias), dy)
    forward = reference.batch_norm(x.detach().numpy(), weight.detach().numpy(), bias.detach().numpy())
    for actual, expected in zip(grads, reference.batch_norm_backward(dy.numpy(), forward), strict=False):
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


def transposed_sequence(torch, ft):
    x = torch.randn(1, 4, 3, dtype=torch.double).unsqueeze(-1).transpose(1, 2)
    gradients_of_layout(torch, ft, x, torch.randn(1, 3, 4, 1, dtype=torch.double))


def one_picture(torch, ft):
    x = torch.randn(5, 7, 3, dtype=torch.double).permute(2, 0, 1)[None]
    gradients_of_layout(torch, ft, x, torch.randn(1, 3, 5, 7, dtype=torch.double))


def permuted_in_evaluation(torch, ft):
    x = torch.arange(6.0).reshape(1, 3, 2, 1).permute(0, 2, 1, 3)
    return ft.batch_norm(x, torch.zeros(2), torch.ones(2), eps=0).flatten(), [0, 2, 4, 1, 3, 5]


def accumulated_gradients(torch, ft):
    norm, x = ft.BatchNorm2d(3), torch.arange(12.0).reshape(1, 3, 2, 2).requires_grad_()
    for _ in range(3):
        y = norm(x)
        (y * y).sum().backward()
    assert norm.bias.grad.abs().max() < 1e-5
    return norm.weight.grad, 24, 1e-5


def running_average(torch, ft):
    norm = ft.BatchNorm1d(4, momentum=1.0)
    norm(torch.tensor([[2.0, 15, 2, 1], [2, 17, 2, 1], [-4, -2, -2, -1]]))
    return [*norm.running_mean, *norm.running_var], [0, 10, 2 / 3, 1 / 3, 12, 109, 16 / 3, 4 / 3], 1e-6


def averaged_batches(torch, ft):
    model, batches = torch.nn.Sequential(ft.BatchNorm1d(3)), [torch.randn(4, 3) for _ in range(3)]
    torch.optim.swa_utils.update_bn(batches, model)
    return model[0].running_mean, torch.stack(batches).mean((0, 1)), 1e-4


def wrong_sizes(torch, ft):
    with pytest.raises(RuntimeError, match="running_mean: expected 3 elements"):
        ft.batch_norm(torch.randn(4, 3), torch.zeros(2), torch.ones(3), training=True)
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        ft.batch_norm(torch.randn(2), torch.zeros(2), torch.ones(2), training=True)


def one_value(torch, ft):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ft.BatchNorm1d(2)(torch.ones(1, 2))


def changed_statistics(torch, ft):
    norm, x = ft.BatchNorm2d(3), torch.randn(2, 3, 1, 1, requires_grad=True)
    norm.eval()
    y = norm(x)
    norm.train()
    norm(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def half_statistics(torch, ft):
    x, mean, var = 1000 * torch.tensor([[-1.0, -2], [1, 2]]).half(), torch.zeros(2).half(), torch.ones(2).half()
    with np.errstate(all="raise"):
        ft.batch_norm(x, mean, var, training=True)
    return [*mean, *var], [0, 0, np.inf, np.inf]


def formula(torch, x, weight=None, eps=1e-5):
    centred = x - x.mean(0)
    xhat = centred / (centred.pow(2).mean(0) + eps).sqrt()
    return xhat if weight is None else xhat * weight


def differentiated(torch, norm, times):
    x = torch.tensor([[0.0, 1], [1, 5], [3, 2], [4, 4]], dtype=torch.double, requires_grad=True)
    found = norm(x).pow(3).sum()
    for _ in range(times):
        found = (torch.autograd.grad(found, x, create_graph=True)[0] * torch.arange(8).view(4, 2)).sum()
    return found.detach()


def higher_derivatives(times):
    def report(torch, ft):
        ours = differentiated(torch, lambda x: ft.batch_norm(x, None, None, training=True, eps=0.5), times)
        return ours, differentiated(torch, lambda x: formula(torch, x, eps=0.5), times), 1e-10

    return report


def nested_tangents(torch, ft):
    """The report's own function and value."""

    def f(t):
        x = torch.stack([(i + 1) * t + (i % 3 - 1) * t * t + i for i in range(8)]).reshape(2, 2, 2)
        weight, bias = torch.tensor([[1.5, -0.5], [0.25, 1]], dtype=t.dtype)
        y = ft.batch_norm(x, None, None, weight, bias, training=True, eps=0.25)
        return (y * torch.arange(1, 9).reshape(2, 2, 2)).sum()

    t = torch.tensor(-6.0, dtype=torch.double)
    one = torch.ones_like(t)
    second = torch.func.jvp(lambda t: torch.func.jvp(f, (t,), (one,))[1], (t,), (one,))[1]
    return second, -0.20703015646993195, 1e-9


def evaluations_tangent(torch, ft):
    x, weight, bias = (torch.randn(*shape, dtype=torch.double) for shape in ((3, 2, 5), (2,), (2,)))
    mean, var = torch.tensor([1.5, 5], dtype=torch.double), torch.tensor([5, 0.75], dtype=torch.double)
    along = tuple(torch.randn_like(a) for a in (x, weight, bias))

    def f(x, weight, bias):
        return ft.batch_norm(x, mean, var, weight, bias, eps=1e-5)

    tangent = torch.func.jvp(f, (x, weight, bias), along)[1]
    rstd = (var + 1e-5).rsqrt()[:, None]
    expected = along[0] * rstd * weight[:, None] + (x - mean[:, None]) * rstd * along[1][:, None] + along[2][:, None]
    np.testing.assert_allclose(tangent, expected, rtol=1e-10, atol=1e-10)


def sample_jacobians(torch, ft):
    """Each sample is a batch by itself: statistics are its own."""
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), ft.BatchNorm2d(3, track_running_stats=False)).double()
    x = torch.randn(4, 1, 2, 4, 4, dtype=torch.double)
    found = torch.vmap(torch.func.jacrev(model))(x)
    expected = torch.stack([torch.autograd.functional.jacobian(model, sample) for sample in x])
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-9, atol=1e-9)


def sample_gradients(torch, ft):
    norm, x = ft.BatchNorm1d(3).double().eval(), torch.randn(4, 3, dtype=torch.double)

    def loss(weight, x):
        return ft.batch_norm(x[None], norm.running_mean, norm.running_var, weight, norm.bias).pow(2).sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(norm.weight.detach(), x)
    return found.detach(), 2 * x**2 / (1 + 1e-5), 1e-9


def traced(torch, ft):
    """Or the error names the way back to PyTorch's modules, which can be traced."""
    model, x = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), ft.BatchNorm2d(2)), torch.randn(2, 1, 5, 5)
    expected = model(x).detach()
    try:
        graph = torch.fx.symbolic_trace(model)
    except Exception as error:
        if "revert" not in str(error):
            raise
        graph = torch.fx.symbolic_trace(ft.revert(model))
    np.testing.assert_allclose(graph(x).detach(), expected, rtol=0, atol=1e-5)


def converted_to_synchronised(torch, ft):
    x, residual = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    norm = ft.BatchNormAct2d(3)
    expected = norm(x, residual=residual).detach()
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(torch.nn.Sequential(norm))[0]
    assert "SyncBatchNorm" in type(converted).__name__
    assert expected.min() == 0
    np.testing.assert_allclose(converted(x, residual=residual).detach(), expected, rtol=0, atol=1e-5)


TORCH = {
    "pytorch#5410 constant channels": constant_channels,
    "pytorch#162489 values of 1e30": large_values,
    "pytorch#64039 a transposed sequence's gradients": transposed_sequence,
    "pytorch#78611 gradients of one channels-last picture": one_picture,
    "pytorch#63224 permuted input": permuted_in_evaluation,
    "mxnet#18499, #16297 accumulated gradients": accumulated_gradients,
    "pytorch#7028, #19902 momentum of 1": running_average,
    "pytorch#15298 momentum None averages": averaged_batches,
    "pytorch#194798, #105458 sizes and dimensions": wrong_sizes,
    "pytorch#1381, #77014 one value per channel": one_value,
    "pytorch#13402 statistics changed before backward": changed_statistics,
    "pytorch#126525 half running statistics overflow": half_statistics,
    "pytorch#2264, #2309 second derivatives": higher_derivatives(2),
    "pytorch#186256 third derivatives": higher_derivatives(3),
    "pytorch#196699 tangents of tangents": nested_tangents,
    "pytorch#73541 evaluation's tangents": evaluations_tangent,
    "functorch#867 Jacobians of samples": sample_jacobians,
    "pytorch#96655, functorch#115 gradients of samples": sample_gradients,
    "pytorch#44802 symbolic tracing": traced,
    "timm#1254, pytorch#187298 relu and residual through convert_sync_batchnorm": converted_to_synchronised,
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # forward differentiation in PyTorch itself
@reports(TORCH)
def test_torch(report):
    torch = pytest.importorskip("torch")
    import fastbn.torch as ft

    torch.manual_seed(0)
    hold(report(torch, ft))


# --- dask and JAX -----------------------------------------------------------------------------------------------------


def dask_masked(da, fd):
    x = da.from_array(np.ma.masked_array([1, 2, 777, 3], mask=[0, 0, 1, 0]), chunks=2, asarray=False)
    return fd.mean(x).compute(), 2


def dask_all_masked(da, fd):
    found = fd.std(da.ma.masked_array(np.array([1.0, 2]), mask=[True, True], chunks=1)).compute()
    assert np.ma.getmaskarray(found).all()


def dask_infinities(da, fd):
    x = np.array([[1, 2, np.inf, 4], [np.inf, 2, 3, 4], [np.inf, 2, 3, np.inf]])
    return [fd.mean(da.from_array(x, chunks=(3, n)), axis=1).compute() for n in (1, 2, 3)], np.inf


def dask_far_from_zero(da, fd):
    x = np.random.default_rng(0).normal(1e8, 1, 1000)
    return fd.var(da.from_array(x, chunks=77), correction=1).compute(), exact_var(x, 1), 1e-13


def dask_complex(da, fd):
    with pytest.raises(TypeError, match="x: expected real numbers"):
        fd.std(da.from_array(np.ones(4) * 1j, chunks=2))


DASK = {
    "dask#2095 a masked array in blocks": dask_masked,
    "dask#5338 all is masked": dask_all_masked,
    "dask#6105 NaN in blocks, without a warning": lambda da, fd: (
        fd.std(da.from_array(np.array([1.0, 2, np.nan, np.nan]), chunks=2)).compute(),
        np.nan,
    ),
    "xarray#7541 complex numbers are refused": dask_complex,
    "datatable#314 infinities in blocks": dask_infinities,
    "scanpy#3740, polars#27392 far from 0, in blocks": dask_far_from_zero,
}


@reports(DASK)
def test_dask(report):
    da = pytest.importorskip("dask.array")
    import fastbn.dask as fd

    hold(report(da, fd))


JAX = {
    "flax#1491, haiku#396, keras#18795 mean 1e4, std 1": lambda jax, norm: (
        norm(x := normal(64, 3, loc=1e4))[0],
        reference.batch_norm(x).y,
        2e-3,  # of numbers near 0
    ),
    "flax#4760, #3319, haiku#786 nested vmap": lambda jax, norm: (
        jax.vmap(jax.vmap(lambda x: norm(x)[0]))(x := normal(2, 3, 8, 4)),
        [[norm(part)[0] for part in parts] for parts in x],
    ),
    "onnxruntime#29790 y does not depend on the running rate": lambda jax, norm: (
        norm(x := normal(8, 3), running_mean=np.zeros(3, F32), running_var=np.ones(3, F32), rate=0.9)[0],
        norm(x)[0],
    ),
    "tensorflow#34062 the running variance of one value": lambda jax, norm: (
        norm(np.ones((1, 3), F32), running_mean=np.zeros(3, F32), running_var=np.ones(3, F32))[1][1],
        1,
    ),
}


@reports(JAX)
def test_jax(report):
    jax = pytest.importorskip("jax")
    import fastbn.jax

    hold(report(jax, fastbn.jax.batch_norm))
