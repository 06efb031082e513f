"""`fold` of layers whose kernels have the output channels of one group: transposed and depthwise convolutions."""

import numpy as np
import pytest

import fastbn
from fastbn import reference


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def batch_norm_of(channels, seed=1):
    """Mean, var, gamma and beta, all of them away from 0 and 1."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(channels), rng.random(channels) + 0.2, rng.uniform(-2, 2, channels), rng.random(channels)


def normalised(y, mean, var, gamma, beta, eps=1e-5):
    return reference.normalize(y, mean, 1 / np.sqrt(var + eps), gamma, beta)


def transposed(x, kernel, bias, groups):
    """A transposed convolution of stride 1 in one dimension, (N, in, L) by (in, out / groups, K), value by value."""
    n, inputs, length = x.shape
    _, outputs, width = kernel.shape
    y = np.zeros((n, groups * outputs, length + width - 1)) + np.reshape(bias, (-1, 1))
    for i in range(inputs):
        group = i // (inputs // groups)
        for o in range(outputs):
            for k in range(width):
                y[:, group * outputs + o, k : k + length] += x[:, i] * kernel[i, o, k]
    return y


def depthwise(x, kernel, bias):
    """Keras' depthwise convolution in one dimension, (N, L, in) by (K, in, multiplier): output in * multiplier + m."""
    width, inputs, multiplier = kernel.shape
    length = x.shape[1] - width + 1
    y = np.zeros((x.shape[0], length, inputs * multiplier)) + bias
    for i in range(inputs):
        for m in range(multiplier):
            for k in range(width):
                y[..., i * multiplier + m] += x[:, k : k + length, i] * kernel[k, i, m]
    return y


@pytest.fixture(params=["numpy", "cupy"])
def kind(request):
    return fastbn if request.param == "numpy" else request.getfixturevalue("cuda_arrays")


@pytest.mark.parametrize("axis", [1, -2])
@pytest.mark.parametrize("groups", [1, 2, 3, 6, np.int64(2)], ids=str)
def test_transposed(groups, axis, kind):
    """The layer with the folded kernel is the layer and its batch norm."""
    x, kernel, bias = numbers(2, 6, 5), numbers(6, 4, 3, seed=2), numbers(4 * groups, seed=3)
    norm = batch_norm_of(4 * groups)
    for b in (bias, None):
        folded = kind.fold(kernel, b, *norm, axis=axis, groups=groups)
        expected = normalised(transposed(x, kernel, np.zeros_like(bias) if b is None else b, groups), *norm)
        np.testing.assert_allclose(transposed(x, *folded, groups), expected, rtol=1e-11, atol=1e-12)
        for ours, oracle in zip(folded, reference.fold(kernel, b, *norm, axis=axis, groups=groups), strict=True):
            np.testing.assert_allclose(ours, oracle, rtol=1e-14)


@pytest.mark.parametrize("multiplier", [1, 3])
def test_depthwise(multiplier, kind):
    x, kernel, bias = numbers(2, 7, 4), numbers(3, 4, multiplier, seed=2), numbers(4 * multiplier, seed=3)
    norm = batch_norm_of(4 * multiplier)
    folded = kind.fold(kernel, bias, *norm, axis=-1, groups=4)
    mean, var, gamma, beta = norm
    expected = (depthwise(x, kernel, bias) - mean) / np.sqrt(var + 1e-5) * gamma + beta
    np.testing.assert_allclose(depthwise(x, *folded), expected, rtol=1e-11, atol=1e-12)


def test_groups_are_folded_one_by_one():
    """In any dtype, with the bits of each group's own kernel; statistics that broadcast; other layouts."""
    kernel = numbers(6, 2, 3, 5).astype(np.float32)
    mean, var, gamma, beta = (a.astype(np.float32) for a in batch_norm_of(6))
    for a in (kernel, np.asfortranarray(kernel), np.repeat(kernel, 2, axis=2)[:, :, ::2]):
        folded, bias = fastbn.fold(a, None, mean, var, gamma, beta, axis=1, groups=3)
        assert folded.dtype == bias.dtype == np.float32
        for g in range(3):
            own = [p[2 * g : 2 * g + 2] for p in (mean, var, gamma, beta)]
            alone = fastbn.fold(kernel[2 * g : 2 * g + 2], None, *own, axis=1)
            np.testing.assert_array_equal(folded[2 * g : 2 * g + 2], alone[0])
            np.testing.assert_array_equal(bias[2 * g : 2 * g + 2], alone[1])
    shared = fastbn.fold(kernel, None, mean[:1], np.array(4.0), axis=1, groups=3, eps=0)
    np.testing.assert_array_equal(shared[0], kernel / 2)
    np.testing.assert_array_equal(shared[1], np.full(6, -mean[0] / 2))


def test_groups_on_axis_0():
    """The output channels of all groups are there."""
    kernel, norm = numbers(6, 2, 3), batch_norm_of(6)
    for ours, expected in zip(
        fastbn.fold(kernel, None, *norm, groups=2), fastbn.fold(kernel, None, *norm), strict=True
    ):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"groups": 4}, ValueError, r"^groups: expected a divisor of kernel.shape\[0\], which is 6, got 4"),
        ({"groups": 0}, ValueError, r"^groups: expected a divisor of kernel.shape\[0\], which is 6, got 0"),
        ({"groups": -2}, ValueError, "^groups: expected a divisor .* got -2"),
        ({"groups": 2.0}, TypeError, "^groups: expected an int, got float"),
        ({"groups": None}, TypeError, "^groups: expected an int, got NoneType"),
        ({"groups": 2, "axis": -1}, ValueError, r"^groups: expected a divisor of kernel.shape\[1\], which is 5, got 2"),
        ({"groups": 4, "axis": 0}, ValueError, r"^groups: expected a divisor of kernel.shape\[0\], which is 6, got 4"),
        ({"groups": 3}, ValueError, r"^beta: expected a shape that broadcasts to \(15,\), got \(10,\)"),
        ({"groups": 1}, ValueError, r"^beta: expected a shape that broadcasts to \(5,\), got \(10,\)"),
        ({"mean": np.ones((2, 5))}, ValueError, r"^mean: expected a shape that broadcasts to \(10,\), got \(2, 5\)"),
        ({"kernel_bias": np.ones(5)}, ValueError, r"^kernel_bias: expected a shape that .* \(10,\), got \(5,\)"),
    ],
)
def test_refused(changes, error, match):
    mean, var, gamma, beta = batch_norm_of(10)
    good = {"kernel": numbers(6, 5, 3), "kernel_bias": None, "mean": mean, "var": var, "gamma": gamma, "beta": beta,
            "axis": 1, "groups": 2}  # fmt: skip
    fastbn.fold(**good)
    with pytest.raises(error, match=match):
        fastbn.fold(**good | changes)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_like_pytorchs_layers(groups, dimensions):
    """Its transposed convolutions, and its others by the same call, and its batch norm in evaluation."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    norm = getattr(torch.nn, f"BatchNorm{dimensions}d")(12).double().eval()
    for p in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        p.data.uniform_(0.2, 2)
    x = torch.randn(2, 8, *(5, 4, 3)[:dimensions], dtype=torch.float64)
    statistics = [p.detach().numpy() for p in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
    for name, axis in (("ConvTranspose", 1), ("Conv", 0)):
        layer = getattr(torch.nn, f"{name}{dimensions}d")(8, 12, 2, stride=2, groups=groups).double()
        with torch.no_grad():
            expected = norm(layer(x))
            kernel, bias = (p.detach().numpy() for p in (layer.weight, layer.bias))
            kernel, bias = fastbn.fold(kernel, bias, *statistics, eps=norm.eps, axis=axis, groups=layer.groups)
            layer.weight.copy_(torch.from_numpy(kernel))
            layer.bias.copy_(torch.from_numpy(bias))
            torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-12)


def test_read_only_parameters():
    kernel, bias, norm = numbers(4, 3), numbers(3, seed=2), batch_norm_of(3)
    expected = [a.copy() for a in fastbn.fold(kernel, bias, *norm, axis=1)]
    for array in (kernel, bias, *norm):
        array.flags.writeable = False
    for found, other in zip(fastbn.fold(kernel, bias, *norm, axis=1), expected, strict=True):
        np.testing.assert_array_equal(found, other)
