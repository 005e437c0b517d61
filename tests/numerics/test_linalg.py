"""Triangular factors of stacks of matrices, against NumPy's in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from daq_jax.numerics.linalg import factor, inverse_factor

SHAPES = [(8, 8), (1, 16, 16), (5, 8, 8), (2, 3, 16, 16)]


def positive(shape):
    x = np.random.default_rng(0).normal(size=(*shape[:-1], 2 * shape[-1])).astype(np.float32)
    return (x @ x.mT / shape[-1]).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_are_those_of_numpy(shape):
    gram = positive(shape)
    expected = np.linalg.cholesky(gram.astype(np.float64))
    np.testing.assert_allclose(factor(jnp.asarray(gram)), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(inverse_factor(jnp.asarray(gram)), np.linalg.inv(expected), rtol=0, atol=1e-4)


def test_a_matrix_that_is_not_positive_definite_gives_nan_and_leaves_the_others():
    gram = positive((3, 8, 8))
    gram[1] = -gram[1]
    for found in (factor(jnp.asarray(gram)), inverse_factor(jnp.asarray(gram))):
        assert np.isnan(np.tril(found[1])).any()
        assert np.isfinite(found[0]).all()
        assert np.isfinite(found[2]).all()


@pytest.mark.parametrize("function", [factor, inverse_factor])
def test_a_cpu_never_gets_a_stack(function):
    """The calls of jaxlib 0.10 for stacks wait for threads that may all be waiting in such calls."""
    program = jax.jit(function).lower(jnp.zeros((4, 2, 8, 8))).compile().as_text()
    calls = re.findall(
        r"f32\[([\d,]*)\]\S* custom-call.*lapack|\(f32\[([\d,]*)\].*custom-call.*lapack", program
    )
    shapes = {a or b for a, b in calls}
    assert shapes == {"8,8"}, program
