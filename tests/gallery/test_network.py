"""Layers of `examples/network.py` beside finite differences and plain loops; the helpers of `examples/gallery.py`."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal


@pytest.fixture
def network(example):
    return example("network")


@pytest.fixture
def gallery(example):
    return example("gallery")


def double(layer):
    """The layer with everything it holds in float64."""
    for name, value in vars(layer).items():
        if isinstance(value, np.ndarray):
            setattr(layer, name, value.astype(np.float64))
    return layer


def every_layer(network):
    rng = np.random.default_rng(0)
    layers = [
        network.Convolution(2, 3, 0.3, rng),
        network.ReLU(),
        network.BatchNorm(3),
        network.Convolution(3, 4, 0.3, rng, bias=False),
        network.BatchNorm(4, activation="relu", gather=lambda vector: vector[np.newaxis]),
        network.MeanPool(),
        network.Flatten(),
        network.Dense(16, 6, 0.3, rng),
        network.Tanh(),
        network.Dropout(0.3, rng),
        network.Dense(6, 5, 0.3, rng, bias=False),
        network.BatchNorm(5),
        network.Sigmoid(),
        network.Dense(5, 3, 0.3, rng),
    ]
    built = network.Network(double(layer) for layer in layers)
    for parameter in built.parameters():
        parameter += rng.normal(0, 0.1, parameter.shape)  # biases and beta are not 0, gamma not 1
    return built


@pytest.mark.parametrize("batch", [None, 20])
@pytest.mark.parametrize("training", [True, False])
def test_gradients(network, training, batch):
    """Central differences of every parameter and input, in training and by running statistics."""
    built = every_layer(network)
    rng = np.random.default_rng(1)
    x, labels = rng.standard_normal((8, 4, 4, 2)), rng.integers(0, 3, 8)
    (dropout,) = (layer for layer in built.layers if isinstance(layer, network.Dropout))

    def loss():
        dropout.rng = np.random.default_rng(2)  # the same mask each time
        return network.softmax_loss(built.forward(x, training), labels, batch)

    dx = built.backward(loss()[1])
    gradients = [dx, *(gradient.copy() for gradient in built.gradients())]
    parameters = [x, *built.parameters()]
    assert len(parameters) == 1 + 2 * 2 + 2 * 3 + 2 + 2
    for parameter, gradient in zip(parameters, gradients, strict=True):
        expected = np.empty_like(parameter)
        for index in np.ndindex(parameter.shape):
            value, step = parameter[index], 1e-5
            parameter[index] = value + step
            above = loss()[0]
            parameter[index] = value - step
            expected[index] = (above - loss()[0]) / (2 * step)
            parameter[index] = value
        assert np.abs(expected).max() > 1e-4
        assert_allclose(gradient, expected, rtol=0, atol=1e-9)  # of gradients of 1e-3 to 1; rounding is 1e-11


def test_parts_of_a_batch_add_up(network):
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((10, 4)), rng.integers(0, 4, 10)
    whole, gradient = network.softmax_loss(logits, labels)
    parts = [network.softmax_loss(logits[part], labels[part], 10) for part in (slice(7), slice(7, 10), slice(0))]
    assert_allclose(sum(value for value, _ in parts), whole, rtol=1e-14)
    assert_allclose(np.concatenate([d for _, d in parts]), gradient, rtol=1e-14)
    dense = network.Network([double(network.Dense(4, 4, 0.5, rng))])
    values = [dense.loss(logits[part], labels[part], 10) for part in (slice(7), slice(7, 10))]
    assert_allclose(sum(values), dense.loss(logits, labels), rtol=1e-14)


def test_softmax_of_large_logits(network):
    loss, gradient = network.softmax_loss(np.array([[1000, 0], [-1000, 0]], np.float32), np.array([0, 0]))
    assert loss == 500
    assert_array_equal(gradient, np.array([[0, 0], [-0.5, 0.5]], np.float32))
    assert gradient.dtype == np.float32


@pytest.mark.parametrize("bias", [True, False])
def test_convolution(network, bias):
    rng = np.random.default_rng(0)
    layer = double(network.Convolution(2, 3, 1, rng, bias=bias))
    layer.bias += [1, 2, 3]
    x = rng.standard_normal((2, 4, 5, 2))
    expected = np.zeros((2, 4, 5, 3)) + (layer.bias if bias else 0)
    weight = layer.weight.reshape(3, 3, 2, 3)
    for i, j, down, right in np.ndindex(4, 5, 3, 3):
        row, column = i + down - 1, j + right - 1
        if 0 <= row < 4 and 0 <= column < 5:
            expected[:, i, j] += x[:, row, column] @ weight[down, right]
    assert_allclose(layer.forward(x, True), expected, rtol=0, atol=1e-14)


def test_mean_pool(network):
    x = np.arange(16.0, dtype=np.float32).reshape(1, 4, 4, 1)
    assert_array_equal(network.MeanPool().forward(x, True).ravel(), [2.5, 4.5, 10.5, 12.5])


def test_dropout(network):
    x = np.full((100, 100), 3, np.float32)
    layer = network.Dropout(0.25, np.random.default_rng(0))
    y = layer.forward(x, True)
    assert_array_equal(np.unique(y), [0, 4])
    assert abs(np.mean(y == 0) - 0.25) < 0.02  # 4 standard deviations
    assert_array_equal(layer.backward(x), y)
    assert layer.forward(x, False).dtype == y.dtype == np.float32
    assert_array_equal(layer.forward(x, False), x)


def test_batch_norm_by_running_statistics(network):
    rng = np.random.default_rng(0)
    layer, x = network.BatchNorm(2), (rng.standard_normal((50, 2)) * [1, 3] + [5, 0]).astype(np.float32)
    layer.forward(x, True)
    mean, var = 0.1 * x.mean(axis=0), 0.9 + 0.1 * x.var(axis=0, ddof=1)
    assert_allclose(layer.forward(x, False), (x - mean) / np.sqrt(var + 1e-5), rtol=0, atol=1e-5)
    assert_allclose([layer.mean, layer.var], [mean, var], rtol=1e-5)  # float32, and inference leaves them


@pytest.mark.parametrize(("momentum", "weights"), [(0.0, (1.9, 1.6)), (0.5, (1.9, 1.55))])
def test_sgd(network, momentum, weights):
    """v: 1, then 3 or 3.5; steps of 0.1."""
    dense = network.Dense(1, 1, 0.0, np.random.default_rng(0), bias=False)
    dense.weight += 2
    optimizer = network.SGD(network.Network([dense]), 0.1, momentum)
    for gradient, expected in zip((1, 3), weights, strict=True):
        dense.gradients = {"weight": np.full((1, 1), gradient, np.float64)}
        optimizer.step()
        assert_allclose(dense.weight, expected, rtol=1e-6)
    assert dense.weight.dtype == np.float32


def test_accuracy(network):
    identity = network.Dense(3, 3, 0.0, np.random.default_rng(0))
    identity.weight += np.eye(3, dtype=np.float32)
    built = network.Network([identity])
    assert built.accuracy(np.eye(3, dtype=np.float32), np.array([0, 1, 1])) == pytest.approx(2 / 3)


# --- the gallery's helpers --------------------------------------------------------------------------------------------


def test_digits(gallery):
    train, test, labels, test_labels = gallery.digits()
    assert (train.shape, test.shape, labels.shape, test_labels.shape) == ((1347, 64), (450, 64), (1347,), (450,))
    assert train.dtype == np.float32
    assert (train.min(), train.max()) == (0, 1)
    assert np.bincount(test_labels).min() >= 43  # each digit is a tenth
    *images, again, test_again = gallery.digits(images=True)  # the same split
    for array, image in zip((train, test), images, strict=True):
        assert_array_equal(array.reshape(-1, 8, 8, 1), image)
    assert_array_equal(np.concatenate([labels, test_labels]), np.concatenate([again, test_again]))
    assert list(test_labels[:8]) == [2, 0, 4, 9, 4, 1, 2, 4]


def test_table(gallery, capsys):
    gallery.table(("name", "x"), [("a longer one", 0.123456), ("b", 3), ("c", np.float32(1e-7))])
    assert capsys.readouterr().out.split("\n") == [
        "        name      x",
        "a longer one  0.123",
        "           b      3",
        "           c  1e-07",
        "",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="zip"):
        gallery.table(("name", "x"), [("a",)])


def test_progress_is_cleared(gallery, capsys):
    gallery.progress("a text")
    gallery.progress("")
    assert capsys.readouterr().err == "\r" + f"{'a text':<72}" + "\r" + " " * 72 + "\r"


def test_pictures(gallery, tmp_path):
    from PIL import Image

    figure, axes = gallery.panels("ab;ac", ("first", "second", "third"), (4, 3))
    titles = {letter: axis.get_title(loc="left") for letter, axis in axes.items()}
    assert titles == {"a": "(a) first", "b": "(b) second", "c": "(c) third"}
    axes["a"].plot([0, 1], color=gallery.BLUE)
    output = tmp_path / "picture.png"
    gallery.save(figure, str(output))
    with Image.open(output) as picture:
        assert picture.format == "PNG"
        assert picture.size == (440, 330)
        assert len(picture.getcolors()) > 2


def test_spreads(gallery):
    _, axes = gallery.panels("a", ("one",))
    gallery.spreads(axes["a"], np.array([1, 2]), np.array([[3.0, 6.0], [1.0, 5.0]]), color=gallery.BLUE)
    (line,), (ranges,) = axes["a"].lines, axes["a"].collections
    assert_array_equal(line.get_xydata(), [[1, 4.5], [2, 3]])
    assert_array_equal(ranges.get_segments(), [[[1, 3], [1, 6]], [[2, 1], [2, 5]]])


def test_options(gallery):
    parsed = gallery.options("What it shows.\n\nMore.", "name.png").parse_args(["--quick"])
    assert vars(parsed) == {"quick": True, "seed": 0, "output": "name.png"}
    assert gallery.options("What it shows.\n\nMore.", "name.png").description == "What it shows."
    assert gallery.options(None, "name.png").parse_args([]).seed == 0  # python -OO takes docstrings away
