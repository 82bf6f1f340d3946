"""Attention against a naive one in NumPy, whatever implementation, heads, mask and bias."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokzip_jax.attention import attend, score_rows

B, N, K, T, S, H = 2, 4, 2, 3, 5, 4
RNG = np.random.default_rng(0)
Q, KEYS, VALUES = (RNG.normal(size=shape).astype(np.float32) for shape in [(B, N, T, H), (B, K, S, H), (B, K, S, H)])
# Every query sees the first key, so that none is blind.
MASK = (RNG.random((B, T, S)) < 0.5) | (np.arange(S) == 0)
BIASES = {
    "none": None,
    "of keys": RNG.normal(size=(B, S)).astype(np.float32),
    "of pairs": RNG.normal(size=(B, T, S)).astype(np.float32),
}
run = jax.jit(attend, static_argnames="implementation")


def naive(q, k, v, mask=None, bias=None):
    """(mixed, weights), one query, head and key at a time, in float64."""
    batch, heads, queries, dim = q.shape
    group = heads // k.shape[1]
    out, weights = np.zeros(q.shape), np.zeros((batch, heads, queries, k.shape[2]))
    for b, n, t in np.ndindex(batch, heads, queries):
        logits = np.array([np.dot(q[b, n, t].astype(float), key) for key in k[b, n // group]]) / np.sqrt(dim)
        if bias is not None:
            logits = logits + (bias[b] if bias.ndim == 2 else bias[b, t])
        if mask is not None:
            logits = np.where(mask[b, t], logits, -np.inf)
        weights[b, n, t] = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        out[b, n, t] = weights[b, n, t] @ v[b, n // group]
    return out, weights


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "implementation, bias", [*itertools.product(["einsum", "xla"], BIASES), ("blocks", "none"), ("auto", "none")]
)
def test_equals_the_naive_one(implementation, masked, bias):
    mask, bias = MASK if masked else None, BIASES[bias]
    found = run(Q, KEYS, VALUES, mask=mask, bias=bias, implementation=implementation)
    np.testing.assert_allclose(found, naive(Q, KEYS, VALUES, mask, bias)[0], atol=1e-6)


def test_gradients_of_the_implementations_agree():
    def total(implementation, q, k, v):
        return jnp.sum(attend(q, k, v, mask=MASK, bias=BIASES["of keys"], implementation=implementation) ** 2)

    grads = [
        jax.jit(jax.grad(functools.partial(total, name), argnums=(0, 1, 2)))(Q, KEYS, VALUES)
        for name in ("einsum", "xla")
    ]
    for ours, theirs in zip(*grads):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_score_rows_are_rows_of_the_weights():
    rows = np.array([2, 0])
    found = jax.jit(score_rows)(Q[:, :, rows], KEYS, mask=MASK[:, rows])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, naive(Q, KEYS, VALUES, MASK)[1][:, :, rows], atol=1e-6)


@pytest.mark.parametrize("implementation", ["einsum", "xla", "blocks"])
def test_a_blind_query_is_finite_and_has_finite_gradients(implementation):
    """As padding rows are; what they give is not read, but a NaN would spread through the gradient."""
    mask = MASK.copy()
    mask[1, 2] = False

    def total(q, k, v):
        out = attend(q, k, v, mask=mask, implementation=implementation)
        return jnp.sum(out[:, :, :2]), out

    grads, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(Q, KEYS, VALUES)
    assert all(np.isfinite(value).all() for value in (*grads, out))
    seeing = mask.any(axis=-1)[:, None]
    expected = naive(Q, KEYS, VALUES, MASK)[0]
    np.testing.assert_allclose(np.where(seeing[..., None], out, 0), np.where(seeing[..., None], expected, 0), atol=1e-6)


def test_masked_keys_do_not_count_however_large():
    """Also where the bias is large: the mask has the last word."""
    keys, bias = KEYS.copy(), np.zeros((B, S), np.float32)
    keys[:, :, 4], bias[:, 4] = 1e4, 1e4
    mask = np.broadcast_to(np.arange(S) < 4, (B, T, S))
    found = run(Q, keys, VALUES, mask=mask, bias=bias, implementation="einsum")
    np.testing.assert_allclose(found, naive(Q, KEYS[:, :, :4], VALUES[:, :, :4])[0], atol=1e-6)


def test_softmax_of_half_precision_is_float32():
    """A thousand equal keys: in bfloat16 a weight of 1/1000 is right to 3 digits, their sum is not."""
    k = jnp.zeros((1, 1, 1000, H), jnp.bfloat16)
    v = jnp.ones((1, 1, 1000, H), jnp.bfloat16)
    out = run(jnp.ones((1, 1, 1, H), jnp.bfloat16), k, v, implementation="einsum")
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1.0, atol=0.01)
    weights = score_rows(jnp.ones((1, 1, 1, H), jnp.bfloat16), k)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, 1e-3, rtol=1e-6)


def test_what_cannot_be_is_one_sentence():
    with pytest.raises(ValueError, match="attention='flash' is unknown; choose one of auto, blocks, cudnn, einsum"):
        attend(Q, KEYS, VALUES, implementation="flash")
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
        attend(Q[:, :3], KEYS, VALUES)
