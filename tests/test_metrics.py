"""Metrics against their definitions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from tests import oracles
from tests.cases import METRICS, rng_for

EACH = pytest.mark.parametrize(("metric", "oracle"), METRICS, ids=["cosine", "sign_rate", "neg_mse"])


def changes(tiles=7, elements=333):
    rng = rng_for("changes")
    d = rng.normal(0, 3e-5, (tiles, elements)).astype(np.float32)
    q = (d + rng.normal(0, 6e-5, d.shape)).astype(np.float32)
    q[:, ::5] = 0
    return d, q


@EACH
def test_metric_agrees_with_float64(metric, oracle):
    d, q = changes()
    wanted = [
        oracle(*pair)[0] for pair in zip(d.astype(np.float64), q.astype(np.float64)[:, None], strict=True)
    ]
    score = metric(jnp.asarray(d), jnp.asarray(q))
    assert score.shape == (7,)
    assert score.dtype == jnp.float32
    np.testing.assert_allclose(score, wanted, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(metric)(d, q), wanted, rtol=1e-5)


@EACH
def test_metric_is_best_when_nothing_is_lost_and_finite_when_nothing_changed(metric, oracle):
    d = jnp.array([[0.0, 0.0], [1.0, -2.0]])
    best = 0.0 if metric is daq.neg_mse else 1.0
    np.testing.assert_allclose(jax.jit(metric)(d, d), [best, best], rtol=1e-6)
    assert np.isfinite(metric(d, 0 * d)).all()
    assert np.isfinite(metric(0 * d, d)).all()


def test_sign_rate_counts_only_what_is_above_the_threshold():
    threshold = 2.0**-10
    d = jnp.array([[threshold, 2 * threshold, -2 * threshold, 3 * threshold]])
    q = jnp.array([[-1.0, 1e-9, 1e-9, 0.0]])
    np.testing.assert_allclose(daq.SignRate(threshold)(d, q), [1 / 3], rtol=1e-6)
    assert daq.SignRate(1.0)(d, q) == 1  # nothing to keep: all kept


def test_sign_rate_is_a_checked_value():
    assert daq.SignRate() == daq.SignRate(1e-5) == daq.SignRate(threshold=1e-5)
    assert hash(daq.SignRate()) == hash(daq.SignRate(1e-5))
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="threshold"):
            daq.SignRate(wrong)


def test_cosine_does_not_depend_on_the_size_of_the_weights():
    d, q = changes()
    for size in (1e-12, 1e15):
        d_far, q_far = d * np.float32(size), q * np.float32(size)
        wanted = oracles.cosine(d_far.astype(np.float64), q_far.astype(np.float64))
        np.testing.assert_allclose(daq.cosine(jnp.asarray(d_far), jnp.asarray(q_far)), wanted, rtol=1e-5)
