"""What a mask leaves out, and the loss does not use, reaches no gradient, whatever it holds."""

import numpy as np
import pytest

import fastbn
from fastbn import reference
from tests.support import DTYPES, LAYOUTS, Layout

LAYOUT = {
    "rows": LAYOUTS["NCHW"],
    "long rows": Layout((3, 2, 3, 1200)),
    "columns": LAYOUTS["NHWC many rows"],
    "wide columns": LAYOUTS["NHWC wide"],
    "instance": LAYOUTS["instance NHWC"],
    "spatial slice": LAYOUTS["spatial slice"],
}
GARBAGE = {"nan": np.nan, "inf": np.inf, "both infinities": (np.inf, -np.inf)}


def case(layout, dtype, kind, seed=0):
    """x, clean and with garbage under the mask; dy, 0 there; the mask; keywords for either kind of weight."""
    rng = np.random.default_rng(seed)
    clean = layout.place(rng.standard_normal(layout.shape).astype(DTYPES[dtype]))
    mask = rng.random(layout.weight_shape) < 0.6
    mask.flat[:2] = True, False
    out = np.broadcast_to(~mask, layout.shape)
    dy = layout.place(np.where(out, 0, rng.standard_normal(layout.shape)).astype(DTYPES[dtype]))
    if kind == "where":
        return clean, dy, out, {"where": mask}
    return clean, dy, out, {"weights": mask * rng.integers(1, 4, mask.shape).astype(np.float64)}


def soiled(x, out, garbage, layout):
    values = np.array(x, order="C")
    values[out] = np.resize(garbage, out.sum())
    return layout.place(values)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("kind", ["where", "weights"])
@pytest.mark.parametrize("options", ["plain", "relu residual"])
@pytest.mark.parametrize("layout", LAYOUT)
@pytest.mark.parametrize(
    "dtype", ["float32", *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES if d != "float32")]
)
def test_backward(dtype, layout, options, kind, garbage):
    """The same bits as with ordinary numbers there; and those of the formula."""
    layout = LAYOUT[layout]
    clean, dy, out, keywords = case(layout, dtype, kind)
    keywords["channel_axis"] = layout.channel_axis
    epilogue = {}
    if options != "plain":
        epilogue = {"activation": "relu", "residual": layout.place(np.abs(clean))}
    gamma = np.linspace(-1, 2, int(np.prod(layout.channels))).reshape(layout.channels)
    results = []
    for x in (clean, soiled(clean, out, GARBAGE[garbage], layout)):
        _, saved = fastbn.batch_norm(x, gamma, **keywords, **epilogue)
        for hook in (None, lambda vector: vector[np.newaxis]):
            if hook is not None:
                _, saved = fastbn.batch_norm(x, gamma, gather=hook, **keywords, **epilogue)
            grads = fastbn.batch_norm_backward(dy, saved, gather=hook)
            sums = fastbn.grad_sums(dy, x, saved.mean, saved.rstd, **keywords)
            dx = fastbn.grad_input(dy, x, saved.mean, saved.rstd, gamma, *sums, saved.count, **keywords)
            results.append((*grads[:3], *sums, dx))
    for found, expected in zip(results[2] + results[3], results[0] + results[1], strict=True):
        np.testing.assert_array_equal(found, expected)
    assert (results[2][0][out] == 0).all()
    y = fastbn.batch_norm(clean, gamma, **keywords, **epilogue)[0]  # decides relu, where it counts
    with np.errstate(invalid="ignore"):
        forward = reference.batch_norm(soiled(clean, out, GARBAGE[garbage], layout), gamma, **keywords, **epilogue)
        dx, dgamma, dbeta, _ = reference.batch_norm_backward(dy, forward, y=y)
    rounding = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-5, "float64": 1e-12}[dtype]
    np.testing.assert_allclose(results[2][1], dgamma, rtol=rounding, atol=rounding * out.size**0.5)
    np.testing.assert_allclose(results[2][2], dbeta, rtol=rounding, atol=rounding * out.size**0.5)
    np.testing.assert_allclose(results[2][0].astype(float), dx, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("axis", [1, -1])
def test_what_the_loss_uses_counts(axis):
    """A gradient that reaches a position left out of the statistics counts in the sums, as the formula says."""
    layout = LAYOUT["rows"] if axis == 1 else LAYOUT["columns"]
    x, dy, out, keywords = case(layout, "float64", "where")
    dy = dy + out
    _, saved = fastbn.batch_norm(x, channel_axis=axis, **keywords)
    grads = fastbn.batch_norm_backward(dy, saved)
    dx, dgamma, dbeta, _ = reference.batch_norm_backward(dy, reference.batch_norm(x, channel_axis=axis, **keywords))
    np.testing.assert_allclose(grads.gamma, dgamma, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(grads.beta, dbeta, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(grads.x, dx, rtol=1e-11, atol=1e-12)
    x[out] = np.nan
    poisoned = fastbn.batch_norm_backward(dy, saved._replace(x=x))
    assert np.isnan(poisoned.gamma).any()


@pytest.mark.parametrize("axis", [1, -1])
def test_a_channel_without_samples(axis):
    """Its statistics are NaN and dx too, but not where nothing is asked of it."""
    x = np.random.default_rng(0).standard_normal((5, 4, 3, 4))
    where = np.zeros((5, 1, 1, 4) if axis == 1 else (5, 4, 3, 1), bool)
    dy = np.zeros_like(x)
    dy[0] = 1
    _, saved = fastbn.batch_norm(x, channel_axis=axis, where=where)
    grads = fastbn.batch_norm_backward(dy, saved)
    assert np.isnan(grads.x[0]).all()
    assert (grads.x[1:] == 0).all()
