"""The divergence of two models, held to its definition in NumPy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from daq_jax.analysis.predictions import kl_divergences


def project(weights, batch):
    return batch @ daq.dequantize(weights)


def log_softmax(logits):
    logits = np.float64(logits)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl(p, q):
    log_p, log_q = log_softmax(p), log_softmax(q)
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)


def logits_of(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("error", [1e-4, 1e-2, 0.3, 10.0])
def test_divergences_equal_their_definition_however_small(error):
    rng = np.random.default_rng(0)
    p = 3 * logits_of(rng, 20, 300)
    q = p + np.float32(error) * logits_of(rng, 20, 300)
    found = kl_divergences(*(jnp.asarray(log_softmax(x), jnp.float32) for x in (p, q)))
    np.testing.assert_allclose(found, kl(p, q), rtol=2e-3 if error < 1e-3 else 2e-5)


def test_divergences_are_never_negative_where_the_definition_is():
    rng = np.random.default_rng(0)
    p = 3 * logits_of(rng, 200, 300)
    q = p + np.float32(1e-6) * logits_of(rng, 200, 300)
    log_p, log_q = (jax.nn.log_softmax(jnp.asarray(x)) for x in (p, q))
    assert jnp.any(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1) < 0)
    assert jnp.all(kl_divergences(log_p, log_q) >= 0)


def test_impossible_entries_add_what_the_definition_says():
    inf = jnp.inf
    half = jnp.log(0.5)
    both = kl_divergences(jnp.array([half, half, -inf]), jnp.array([half, half, -inf]))
    first = kl_divergences(jnp.array([0.0, -inf]), jnp.array([half, half]))
    second = kl_divergences(jnp.array([half, half]), jnp.array([0.0, -inf]))
    np.testing.assert_allclose([both, first, second], [0, np.log(2), inf], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_positions_of_batches_of_any_size_weigh_the_same(dtype):
    rng = np.random.default_rng(0)
    w = jnp.asarray(logits_of(rng, 16, 48), dtype)
    q = daq.quantize(w, w, daq.recipes.absmax)
    batches = [jnp.asarray(logits_of(rng, *shape, 16), dtype) for shape in ((2, 7), (2, 7), (1, 3))]
    pairs = [(project(w, x), project(q, x)) for x in batches]
    expected = np.concatenate([kl(*pair).ravel() for pair in pairs])
    found = daq.divergence(project, w, q, iter(batches))
    assert found.positions == 31
    assert found.loss is found.quantized_loss is None
    np.testing.assert_allclose(found.kl, expected.mean(), rtol=1e-4)


def test_losses_are_those_of_the_targets_and_negative_targets_do_not_count():
    rng = np.random.default_rng(0)
    p, q = logits_of(rng, 2, 5, 9), logits_of(rng, 2, 5, 9)
    wanted = rng.integers(0, 9, (2, 5))
    wanted[0, 3:] = -100
    p[0, 4] = np.nan  # padding may be anything
    batch = {"rows": jnp.arange(2), "wanted": jnp.asarray(wanted)}
    found = daq.divergence(
        lambda w, batch: w[batch["rows"]],
        jnp.asarray(p),
        jnp.asarray(q),
        [batch],
        targets=lambda b: b["wanted"],
    )
    at = np.nonzero(wanted >= 0)
    losses = [-log_softmax(x)[(*at, wanted[at])].mean() for x in (p, q)]
    np.testing.assert_allclose([found.loss, found.quantized_loss], losses, rtol=1e-5)
    np.testing.assert_allclose(found.kl, kl(p, q)[at].mean(), rtol=1e-5)
    assert found.positions == 8


def test_a_model_does_not_diverge_from_itself_and_compiles_once():
    traced = []

    def apply(w, batch):
        traced.append(batch.shape)
        return batch @ w

    w, batches = jnp.eye(4), [jnp.ones((2, 4)), jnp.zeros((2, 4))]
    for _ in range(2):
        assert daq.divergence(apply, w, w, batches).kl == 0
    assert traced == [(2, 4)] * 2  # once for each model


def test_a_divergence_is_one_line_and_plain_numbers():
    w = jnp.eye(4)
    alone = daq.divergence(project, w, w, [w])
    known = daq.divergence(project, w, w, [w], targets=lambda batch: jnp.argmax(batch, axis=-1))
    assert str(alone) == "KL 0.00e+00 nats a position, over 4 positions"
    assert str(known) == "KL 0.00e+00 nats a position, over 4 positions; loss 0.7437 -> 0.7437"
    assert alone.to_dict() == {"kl": 0.0, "positions": 4, "loss": None, "quantized_loss": None}


W = np.ones((4, 6), np.float32)
X = np.ones((3, 4), np.float32)
HUGE = W * np.float32(3e38)
RULED_OUT = np.where(np.arange(6) == 2, -np.inf, W)


@pytest.mark.parametrize(
    ("arguments", "targets", "message"),
    [
        ((project, W, W, []), None, "at least one position to compare; got no batch"),
        ((project, W, W, [X]), lambda x: np.full(3, -1), "got 1 batches with no position that counts"),
        ((project, W, W, {"x": X}), None, r"got one mapping. Pass `\[batch\]`"),
        ((project, W, W[:, :5], [X]), None, r"must have one shape; got .*\(3, 6\).*\(3, 5\)"),
        ((lambda w, x: (x @ w, x), W, W, [X]), None, "for `params` it returned a tuple"),
        (
            (lambda w, x: jnp.argmax(x @ w, axis=-1), W, W, [X]),
            None,
            r"must return logits.*int32 of shape \(3,\)",
        ),
        ((project, W, HUGE, [X, X]), None, "`quantized` are NaN or infinite at 3 of 3 positions of batch 0"),
        ((lambda w, x: w, W, RULED_OUT, [X]), None, "divergence of batch 0 is not finite"),
        ((project, W, W, [X]), lambda x: np.full(3, 6), "3 targets of batch 0 are beyond the vocabulary"),
        ((project, W, W, [X]), lambda x: np.zeros(4, int), r"integers of shape \(3,\).*of shape \(4,\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, targets, message):
    with pytest.raises(daq.DaqError, match=message):
        daq.divergence(*arguments, targets=targets)


def test_an_apply_that_cannot_be_hashed_is_refused():
    class Model:
        __hash__ = None

        def __call__(self, w, x):
            return x @ w

    with pytest.raises(daq.DaqError, match=r"must be hashable, to be compiled once; .*Wrap it in a function"):
        daq.divergence(Model(), W, W, [X])
