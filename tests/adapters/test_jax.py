"""`fastbn.jax` beside formulas in JAX itself, under its transformations; XLA's way to the host."""

from functools import partial

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

import fastbn  # noqa: E402
import fastbn.jax as fj  # noqa: E402
from fastbn.jax import functional, xla  # noqa: E402
from tests import interpreters  # noqa: E402

SHAPES = {"last": ((4, 5, 6, 3), -1), "first": ((4, 3, 5, 6), 1), "dense": ((20, 3), 1), "zeroth": ((3, 7), 0)}
SEVERAL = {
    "instance": ((4, 5, 6, 3), (0, -1)), "instance first": ((4, 3, 5, 6), (1, 0)), "ghost": ((2, 5, 3, 4), (0, 2)),
    "one of a tuple": ((4, 5, 3), (2,)),
}  # fmt: skip
CLOSE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 4e-2, "float64": 1e-12}


@pytest.fixture(params=CLOSE)
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def kept(shape, axis):
    """The channel axes in the order of x."""
    return sorted(a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,)))


def case(shape, axis, dtype, seed=0):
    rng = np.random.default_rng(seed)
    x, residual, dy = (jnp.asarray(rng.standard_normal(shape)).astype(dtype) for _ in range(3))
    kind = "float64" if dtype == "float64" else "float32"
    channels = [shape[a] for a in kept(shape, axis)]
    gamma, beta, mean, var = (jnp.asarray(rng.random(channels) + 0.5).astype(kind) for _ in range(4))
    return x, residual, dy, gamma, beta, mean, var


def formula(x, gamma=1.0, beta=0.0, mean=None, var=None, residual=None, activation=None, axis=-1, eps=1e-5):
    """In float32 or wider, as plainly as JAX allows."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    axes = tuple(a for a in range(x.ndim) if a not in kept(x.shape, axis))
    shape = [n if a in kept(x.shape, axis) else 1 for a, n in enumerate(x.shape)]
    channels = [x.shape[a] for a in kept(x.shape, axis)]
    mean = wide.mean(axes) if mean is None else mean
    var = wide.var(axes) if var is None else var
    rows = [jnp.reshape(jnp.broadcast_to(a, channels), shape) for a in (mean, var, gamma, beta)]
    y = (wide - rows[0]) / jnp.sqrt(rows[1] + eps) * rows[2] + rows[3]
    y = y if residual is None else y + residual
    return (jax.nn.relu(y) if activation else y).astype(x.dtype)


def assert_close(ours, theirs, dtype):
    assert ours.dtype == theirs.dtype
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=CLOSE[dtype] * max(1, np.abs(theirs).max(initial=0)))


@pytest.mark.parametrize("fused", ["", "relu", "residual relu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients(dtype, name, training, fused):
    check_values_and_gradients(*SHAPES[name], dtype, training, fused)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SEVERAL)
def test_several_channel_axes(name, training):
    check_values_and_gradients(*SEVERAL[name], "float32", training, fused="residual relu" if name == "ghost" else "")


def check_values_and_gradients(shape, axis, dtype, training, fused):
    x, residual, dy, gamma, beta, mean, var = case(shape, axis, dtype)
    extra = {"activation": "relu"} if "relu" in fused else {}
    with_residual = "residual" in fused

    def ours(x, gamma, beta, mean, var, residual):
        fused_with = extra | ({"residual": residual} if with_residual else {})
        return fj.batch_norm(x, gamma, beta, mean, var, training=training, channel_axis=axis, **fused_with)[0]

    def theirs(x, gamma, beta, mean, var, residual):
        statistics = {} if training else {"mean": mean, "var": var}
        fused_with = extra | ({"residual": residual} if with_residual else {})
        return formula(x, gamma, beta, axis=axis, **statistics, **fused_with)

    arguments = x, gamma, beta, mean, var, residual
    answers = []
    for function in (ours, theirs):
        y, pull = jax.vjp(jax.jit(function), *arguments)
        answers.append((y, *pull(dy)))
    for a, b in zip(*answers, strict=True):
        assert_close(a, b, dtype)


def test_running_statistics():
    """As PyTorch's with correction 1, as Flax' with 0; new arrays, in the dtypes given, without a gradient."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 5, 3)), jnp.float32)
    mean, var = jnp.full(3, 2.0), jnp.full(3, 3.0, jnp.bfloat16)
    for correction in (0, 1):
        _, (new_mean, new_var) = jax.jit(partial(fj.batch_norm, rate=0.25, correction=correction))(
            x, running_mean=mean, running_var=var
        )
        assert (new_mean.dtype, new_var.dtype) == (mean.dtype, var.dtype)
        np.testing.assert_allclose(new_mean, 1.5 + 0.25 * x.mean((0, 1)), rtol=1e-5)
        np.testing.assert_allclose(
            np.asarray(new_var, np.float32), 2.25 + 0.25 * x.var((0, 1), ddof=correction), rtol=1e-2
        )
    gradient = jax.grad(lambda x: fj.batch_norm(x, running_mean=mean, running_var=var)[1][0].sum())(x)
    assert not gradient.any()
    np.testing.assert_array_equal(mean, 2.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3,), (1, 3), (4, 1), (), (1, 1)], ids=str)
def test_parameters_that_broadcast(shape, training, dtype):
    """To the channel axes' shape; the gradient has the parameter's own."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((4, 5, 6, 3)), jnp.float32) for _ in range(2))
    gamma, beta, mean, var = (jnp.asarray(rng.random(shape) + 0.5).astype(dtype) for _ in range(4))
    running = {} if training else {"running_mean": mean, "running_var": var}
    answers = []
    for function, statistics in (
        (partial(fj.batch_norm, channel_axis=(0, 3), training=training), running),
        (partial(formula, axis=(0, 3)), {} if training else {"mean": mean, "var": var}),
    ):

        def call(gamma, beta, statistics, function=function):
            y = function(x, gamma, beta, **statistics)
            return y[0] if isinstance(y, tuple) else y

        y, pull = jax.vjp(call, gamma, beta, statistics)
        of_gamma, of_beta, of_statistics = pull(dy)
        answers.append((y, of_gamma, of_beta, *of_statistics.values()))
    for ours, theirs in zip(*answers, strict=True):
        assert_close(ours, theirs, dtype)
    if not training:
        given = fj.batch_norm(x, channel_axis=(0, 3), training=False, **running)[1]
        assert given[0] is mean
        assert given[1] is var


def test_running_statistics_of_several_axes():
    """Of each sample and channel; as fastbn's own."""
    x = np.random.default_rng(0).standard_normal((4, 5, 6, 3)).astype(np.float32)
    mean, var = np.full((4, 3), 2.0, np.float32), np.full((4, 3), 3.0, np.float32)
    for axis in ((0, 3), (-1, 0), [0, 3]):
        step = partial(fj.batch_norm, rate=0.25, channel_axis=axis)
        found = jax.jit(step)(x, running_mean=mean, running_var=var)[1]
        np.testing.assert_allclose(found[0], 1.5 + 0.25 * x.mean((1, 2)), rtol=1e-5)
        np.testing.assert_allclose(found[1], 2.25 + 0.25 * x.var((1, 2), ddof=1), rtol=1e-5)
    _, (_, untouched) = fj.batch_norm(x[:, :1, :1], running_mean=mean, running_var=var, channel_axis=(0, 3))
    np.testing.assert_array_equal(untouched, var)  # one value each has no variance


def test_no_axis_and_every_axis():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 5)), jnp.float32)
    y, (mean, var) = fj.batch_norm(x, running_mean=jnp.zeros(()), running_var=jnp.ones(()), channel_axis=(), rate=1)
    np.testing.assert_allclose(y, formula(x, axis=()), atol=1e-5)
    np.testing.assert_allclose([mean, var], [x.mean(), x.var(ddof=1)], rtol=1e-5)
    y, _ = fj.batch_norm(x, beta=jnp.full((4, 5), 2.0), channel_axis=(0, 1))
    np.testing.assert_array_equal(y, jnp.full((4, 5), 2.0))


# --- a rate that is traced --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["float32", "bfloat16", "int32"])
def test_traced_rate(of):
    """As the same number known beforehand, in any dtype of either; running statistics keep theirs."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)), jnp.float32)
    for rate in (0, 1) if of == "int32" else (0.0, 0.25, 1.0):
        for kind in ("float32", "float16"):
            running = jnp.full(3, 2.0, kind), jnp.full(3, 3.0, kind)
            step = jax.jit(lambda rate, running=running: fj.batch_norm(x, None, None, *running, rate=rate)[1])
            found = step(jnp.asarray(rate, of))
            for ours, start, batch in zip(found, running, (x.mean(0), x.var(0, ddof=1)), strict=True):
                assert ours.dtype == kind
                expected = (1 - rate) * np.asarray(start, float) + rate * np.asarray(batch, float)
                np.testing.assert_allclose(ours, expected, rtol=1e-6 if kind == "float32" else 1e-3)
            known = fj.batch_norm(x, None, None, *running, rate=rate)[1]
            np.testing.assert_allclose(np.asarray(found, float), np.asarray(known, float), rtol=1e-6)


def test_a_rate_that_is_scanned():
    """1/n makes the running mean the average of all batches."""
    xs = jnp.asarray(np.random.default_rng(0).standard_normal((5, 16, 3)) + 2, jnp.float32)

    def step(state, x):
        n, *running = state
        _, running = fj.batch_norm(x, None, None, *running, rate=1 / n)
        return (n + 1, *running), None

    start = (jnp.ones(()), jnp.full(3, jnp.nan), jnp.full(3, jnp.inf))
    (_, mean, var), _ = jax.jit(lambda state: jax.lax.scan(step, state, xs))(start)
    np.testing.assert_allclose(mean, xs.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(var, xs.var(1, ddof=1).mean(0), rtol=1e-5)


def test_the_derivative_by_the_rate():
    """Batch less running, at the ends as well; and of a batch of rates."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)), jnp.float32)
    mean, var = jnp.full(3, 2.0), jnp.full(3, 3.0)

    def total(rate):
        new_mean, new_var = fj.batch_norm(x, None, None, mean, var, rate=rate)[1]
        return new_mean.sum() + new_var.sum()

    expected = (x.mean(0) - mean).sum() + (x.var(0, ddof=1) - var).sum()
    rates = jnp.array([0.0, 0.3, 1.0])
    for derivative in (jax.grad, jax.jacrev):
        np.testing.assert_allclose(jax.vmap(derivative(total))(rates), jnp.full(3, expected), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(total))(0.5), expected, rtol=1e-5)


@pytest.mark.parametrize("traced", [False, True])
def test_what_weighs_nothing_may_be_infinite(traced):
    x, infinite = jnp.ones((4, 3)), jnp.full(3, jnp.inf)
    rates = [jnp.asarray(float(rate)) if traced else rate for rate in (0, 1)]
    _, (mean, _) = fj.batch_norm(jnp.full((4, 3), jnp.inf), None, None, jnp.ones(3), jnp.ones(3), rate=rates[0])
    np.testing.assert_array_equal(mean, jnp.ones(3))
    _, (mean, var) = fj.batch_norm(x, None, None, infinite, -infinite, rate=rates[1])
    np.testing.assert_array_equal([mean, var], [jnp.ones(3), jnp.zeros(3)])


def test_eps_is_not_traced():
    x = jnp.ones((4, 3))
    with pytest.raises(TypeError, match=r"^eps: expected a number, got a traced one; make it static"):
        jax.jit(lambda eps: fj.batch_norm(x, eps=eps)[0])(1e-5)
    static = jax.jit(lambda x, eps: fj.batch_norm(x, eps=eps)[0], static_argnames="eps")
    np.testing.assert_array_equal(static(x, eps=0.5), fj.batch_norm(x, eps=jnp.asarray(0.5))[0])


def test_batches_that_tell_nothing():
    mean, var = jnp.full(3, 2.0), jnp.full(3, 3.0)
    y, found = fj.batch_norm(jnp.zeros((0, 3)), running_mean=mean, running_var=var)
    assert y.shape == (0, 3)
    np.testing.assert_array_equal(found, [mean, var])
    _, (_, found) = fj.batch_norm(jnp.ones((1, 3)), running_mean=mean, running_var=var)
    np.testing.assert_array_equal(found, var)


def test_vmap():
    xs = jnp.asarray(np.random.default_rng(0).standard_normal((3, 6, 4)), jnp.float32)
    np.testing.assert_array_equal(
        jax.vmap(lambda x: fj.batch_norm(x)[0])(xs), jnp.stack([fj.batch_norm(x)[0] for x in xs])
    )
    gradients = jax.vmap(jax.grad(lambda x: (fj.batch_norm(x)[0] ** 3).sum()))(xs)
    expected = jnp.stack([jax.grad(lambda x: (formula(x) ** 3).sum())(x) for x in xs])
    assert_close(gradients, expected, "float32")


def test_a_training_loop():
    """`lax.scan` carries the running statistics."""
    xs = jnp.asarray(np.random.default_rng(0).standard_normal((5, 16, 3)) + 2, jnp.float32)

    def step(running, x):
        y, running = fj.batch_norm(x, None, None, *running)
        return running, y.mean()

    (mean, _), _ = jax.jit(lambda running: jax.lax.scan(step, running, xs))((jnp.zeros(3), jnp.ones(3)))
    expected = np.zeros(3)
    for x in xs:
        expected = 0.9 * expected + 0.1 * np.asarray(x).mean(0)
    np.testing.assert_allclose(mean, expected, rtol=1e-5)


def test_statistics_keep_float64_on_their_way_back():
    """A mean of 50 000 standard deviations: its rounding to float32 alone would move dgamma by a hundredth of one."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((4096, 2)) + 50_000).astype(np.float32), rng.standard_normal((4096, 2))
    dy = dy.astype(np.float32)
    _, pull = jax.vjp(lambda x, g: fj.batch_norm(x, g)[0], jnp.asarray(x), jnp.ones(2))
    dx, dgamma = pull(jnp.asarray(dy))
    _, saved = fastbn.batch_norm(x, np.ones(2, np.float32))
    expected = fastbn.batch_norm_backward(dy, saved)
    np.testing.assert_array_equal(dx, expected.x)
    np.testing.assert_array_equal(dgamma, expected.gamma.astype(np.float32))


@pytest.mark.parametrize("axis", [-1, (0, 2)], ids=str)
def test_the_way_of_other_devices(axis, monkeypatch):
    """By a callback, with the same bits."""
    x, residual, dy, gamma, beta, mean, var = case((4, 5, 3), axis, "float32")
    answers = []
    for there in (False, True):
        if there:
            monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
            jax.clear_caches()
        for training in (True, False):
            call = partial(fj.batch_norm, residual=residual, activation="relu", training=training, channel_axis=axis)
            y, pull = jax.vjp(lambda x, g, call=call: call(x, g, beta, mean, var)[0], x, gamma)
            answers.append((y, *pull(dy)))
    for ours, theirs in zip(answers[:2], answers[2:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
    jax.clear_caches()


# --- XLA's interface --------------------------------------------------------------------------------------------------


def test_buffers_are_xlas_own(monkeypatch):
    """Inputs and outputs of a call on the host lie where XLA has them."""
    seen = []
    x = jnp.ones((4, 3))

    def watched(attributes, inputs, outputs):
        seen.append((attributes, inputs[0].ctypes.data, outputs[0].shape))
        outputs[0][...] = inputs[0]

    xla.register("fastbn_test_watched", watched)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    found = jax.ffi.ffi_call("fastbn_test_watched", out)(x, one=np.int64(-5), two=np.float64(0.1))
    np.testing.assert_array_equal(found, x)
    assert seen == [({"one": -5, "two": 0.1}, x.unsafe_buffer_pointer(), (4, 3))]


def test_what_the_host_raises_is_xlas_error():
    def fails(attributes, inputs, outputs):
        raise ValueError("no luck")

    xla.register("fastbn_test_fails", fails)
    call = jax.ffi.ffi_call("fastbn_test_fails", jax.ShapeDtypeStruct((), jnp.float32), has_side_effect=True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="ValueError: no luck"):
        jax.block_until_ready(call())


def test_names_of_functions():
    assert set(functional.HOST) == {"forward", "inference", "backward", "frozen"}


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "match", "given"),
    [
        (TypeError, "x: expected float16, bfloat16, float32 or float64, got int32", {"x": jnp.ones((2, 3), int)}),
        (ValueError, "channel_axis: expected an axis of 2 dimensions, got 2", {"channel_axis": 2}),
        (ValueError, r"gamma: expected shape \(3,\), got \(2,\)", {"gamma": jnp.ones(2)}),
        (ValueError, r"beta: expected shape \(3,\), got \(\)", {"beta": jnp.ones(())}),
        (ValueError, r"mean: expected shape \(3,\), got \(3, 1\)", {"running_mean": jnp.ones((3, 1))}),
        (TypeError, "gamma: expected float16", {"gamma": jnp.ones(3, int)}),
        (ValueError, "running_mean, running_var: expected both with training=False", {"training": False}),
        (ValueError, "residual: expected", {"residual": jnp.ones((2, 3), jnp.float16)}),
        (ValueError, "activation: expected None or 'relu', got 'gelu'", {"activation": "gelu"}),
        (ValueError, r"channel_axis: expected an axis of 2 dimensions, got \(0, -3\)", {"channel_axis": (0, -3)}),
        (ValueError, "repeated axis in `channel_axis`", {"channel_axis": (1, -1)}),
        (TypeError, "channel_axis: expected an int or a tuple of ints, got 1.0", {"channel_axis": 1.0}),
        (TypeError, "channel_axis: expected an int or a tuple of ints, got None", {"channel_axis": None}),
        (
            ValueError,
            r"gamma: expected a shape that broadcasts to \(2, 3\), got \(2,\)",
            {"gamma": jnp.ones(2), "channel_axis": (0, 1)},
        ),
        (
            ValueError,
            r"running_var: expected shape \(2, 3\), got \(3,\)",
            {"running_var": jnp.ones(3), "channel_axis": (0, 1)},
        ),
        (
            ValueError,
            r"running_mean: expected a shape that broadcasts to \(3,\), got \(2, 3\)",
            {"running_mean": jnp.ones((2, 3)), "channel_axis": (1,), "training": False},
        ),
        (ValueError, r"rate: expected a number in \[0, 1\], got 1.5", {"rate": 1.5}),
        (ValueError, r"rate: expected a number in \[0, 1\], got nan", {"rate": np.nan}),
        (ValueError, r"rate: expected a number, got an array of shape \(3,\)", {"rate": jnp.ones(3)}),
        (TypeError, "rate: expected a real number, got str", {"rate": "0.1"}),
        (TypeError, "rate: expected a real number, got dtype complex64", {"rate": jnp.asarray(1j)}),
        (ValueError, "eps: expected a finite number >= 0, got -1", {"eps": -1}),
        (TypeError, "eps: expected a real number, got NoneType", {"eps": None}),
    ],
)
def test_errors(error, match, given):
    with pytest.raises(error, match=match):
        fj.batch_norm(**({"x": jnp.ones((2, 3))} | given))


def test_without_jax():
    program = "import sys; sys.modules['jax'] = None\nimport fastbn\nimport fastbn.jax"
    ((_, err),) = interpreters.end(interpreters.begin(interpreters.python(program)), returns=1)
    assert 'fastbn.jax needs JAX, which is not installed: pip install "jax>=0.5"' in err


def test_a_variance_near_the_end_of_float32():
    """The sum of squares is beyond it, and the variance is not."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1000, 2)) * 1e18, jnp.float32)
    _, (_, var) = fj.batch_norm(x, None, None, jnp.zeros(2), jnp.ones(2), rate=1.0)
    np.testing.assert_allclose(var, np.asarray(x, np.float64).var(0, ddof=1), rtol=1e-5)


@pytest.mark.parametrize("narrow", ["float16", "bfloat16"])
def test_gradients_of_narrow_statistics(narrow):
    """They are rounded in the end, not on their way."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal((8, 4)), jnp.float32) for _ in range(2))
    gamma = jnp.full(4, 4.0, narrow)

    def loss(mean, var):
        return (fj.batch_norm(x, gamma, None, mean, var, training=False)[0] * w).sum() * 1e-5

    of_mean, of_var = jax.grad(loss, (0, 1))(jnp.zeros(4), jnp.full(4, 1e-3, narrow))
    var, scale = np.asarray(jnp.full(4, 1e-3, narrow), np.float64) + 1e-5, 1e-5 * np.asarray(w, np.float64)
    expected = -4 * scale.sum(0) / np.sqrt(var), -2 * (scale * np.asarray(x)).sum(0) / var**1.5
    assert (of_mean.dtype, of_var.dtype) == (jnp.float32, jnp.dtype(narrow))
    np.testing.assert_allclose(of_mean, expected[0], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(of_var, np.float64), expected[1], rtol=1e-3 if narrow == "float16" else 8e-3)


SHARDED = """
import jax, numpy as np, jax.numpy as jnp, fastbn.jax as fj
from jax.sharding import AxisType, PartitionSpec as P
mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
x, w = (jnp.asarray(rng.standard_normal((8, 4)), jnp.float32) for _ in range(2))
gamma, beta, mean, var = jnp.arange(1.0, 5.0), jnp.zeros(4), jnp.zeros(4), jnp.ones(4)

def of_shards(training):
    def local(x, gamma, beta, mean, var):
        return fj.batch_norm(x, gamma, beta, mean, var, training=training, activation="relu")[0]
    return jax.shard_map(local, mesh=mesh, in_specs=(P("d"), *[P()] * 4), out_specs=P("d"))

def by_hand(training):
    def whole(x, gamma, beta, mean, var):
        x = x.reshape(2, 4, 4)
        m, v = (x.mean(1, keepdims=True), x.var(1, keepdims=True)) if training else (mean, var)
        return jax.nn.relu(gamma * (x - m) / jnp.sqrt(v + 1e-5) + beta).reshape(8, 4)
    return whole

given = x, gamma, beta, mean, var
for training in (True, False):
    for jit in (lambda f: f, jax.jit):
        loss = lambda f: jit(lambda *a: (f(training)(*a) * w).sum())
        for a, b in zip(*(jax.grad(loss(f), (0, 1, 2))(*given) for f in (of_shards, by_hand)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
try:
    jax.shard_map(
        lambda x: fj.batch_norm(x, None, None, mean, var)[1][0], mesh=mesh, in_specs=P("d"), out_specs=P()
    )(x)
except ValueError as error:
    assert "replication" in str(error), error
    print("refused")
"""


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="JAX knows no shard_map outside of its experiments")
def test_shards():
    """Gradients of what is the same on all devices are sums over them; other statistics are not taken for the same."""
    flags = "--xla_force_host_platform_device_count=2"
    assert interpreters.run(interpreters.python(SHARDED), XLA_FLAGS=flags) == "refused\n"
