"""Attention in blocks: the masked products to rounding, without what nobody sees and without weights of a whole row."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model as tiny
from test_attention import naive

from tokzip_jax import attention, blocks
from tokzip_jax.config import MeshConfig
from tokzip_jax.masks import TABLES
from tokzip_jax.projectors.base import attention as projected
from tokzip_jax.projectors.base import init_attention
from tokzip_jax.sharding import make_mesh
from tokzip_jax.types import IMAGE_ID, PAD, VOCO_ID

B, N, K, T, S, H = 2, 4, 2, 45, 30, 8
BLOCK = 16  # of queries 3 x 16 with 3 that are padding, of keys 2 x 16 with 2
RNG = np.random.default_rng(0)
Q, KEYS, VALUES = (RNG.normal(size=shape).astype(np.float32) for shape in [(B, N, T, H), (B, K, S, H), (B, K, S, H)])
WEIGHT = RNG.normal(size=Q.shape).astype(np.float32)
# The first and the last keys for most queries of one row, the first for all queries of the other one.
MASK = RNG.random((B, T, S)) < 0.4
MASK[:, :, 0] = True
MASK[0, 16:32, :16], MASK[0, 16:32, 20] = False, True
MASK[1, :, 16:] = False
MASK[1, 16:32, 16:18] = True
MASK[0, :16, 16:] = False


def grouped(q, k, v, mask, block=BLOCK):
    return blocks.attend(q.reshape(B, K, N // K, *q.shape[2:]), k, v, mask, block).reshape(q.shape)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(function, q, k, v, mask):
    def loss(q, k, v):
        out = function(q, k, v, mask)
        return jnp.sum(out * WEIGHT), out

    (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, grads


def einsum(q, k, v, mask):
    return attention.attend(q, k, v, mask=mask, implementation="einsum")


def test_equals_the_naive_one():
    found, _ = with_gradients(grouped, Q, KEYS, VALUES, MASK)
    np.testing.assert_allclose(found, naive(Q, KEYS, VALUES, MASK)[0], atol=1e-6)


def test_gradients_are_those_of_masked_products():
    (_, found), (_, expected) = (with_gradients(f, Q, KEYS, VALUES, MASK) for f in (grouped, einsum))
    for name, ours, theirs in zip("qkv", found, expected):
        assert np.abs(theirs).max() > 0.5
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("shape", [(B, 1), (1, T), (1, 1)])
def test_a_mask_for_all_rows_or_all_queries(shape):
    mask = MASK[: shape[0], -shape[1] :]  # the last query of a row sees more than the first keys
    found, grads = with_gradients(grouped, Q, KEYS, VALUES, mask)
    np.testing.assert_allclose(found, naive(Q, KEYS, VALUES, np.broadcast_to(mask, MASK.shape))[0], atol=1e-6)
    for ours, theirs in zip(grads, with_gradients(einsum, Q, KEYS, VALUES, mask)[1]):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"mask \(2, 44, 30\) must be \[2 or 1, 45 or 1, 30\]"):
        grouped(Q, KEYS, VALUES, MASK[:, :-1])
    with pytest.raises(ValueError, match="do not fit keys"):
        grouped(Q, KEYS, VALUES[:, :, :-1], MASK)


def test_which_blocks_count():
    """Those of any row; drawn, with queries downwards."""
    mask = np.zeros((2, 6, 8), bool)
    mask[0, 0, 0] = mask[1, 3, 7] = mask[0, 5, 1] = mask[1, 4, 1] = True
    rows, columns, count = jax.jit(blocks.blocks, static_argnums=(1, 2))(mask, 2, 4)
    #   x .
    #   . x
    #   x .
    assert int(count) == 3 and rows.shape == columns.shape == (6,)
    assert [*zip(rows.tolist(), columns.tolist())][:3] == [(0, 0), (1, 1), (2, 0)]


def test_a_block_that_nobody_sees_is_not_read():
    """What is not a number stays out of everything else, forward and backward; one query is enough to let it in."""
    mask = MASK.copy()
    mask[:, :, 16:] = False
    keys, values = KEYS.copy(), VALUES.copy()
    keys[:, :, 16:] = values[:, :, 16:] = np.nan
    out, (dq, dk, dv) = with_gradients(grouped, Q, keys, values, mask)
    expected, (want_q, want_k, want_v) = with_gradients(grouped, Q, KEYS, VALUES, mask)
    for ours, theirs in zip((out, dq, dk, dv), (expected, want_q, want_k, want_v)):
        np.testing.assert_array_equal(ours, theirs)
    assert not dk[:, :, 16:].any() and not dv[:, :, 16:].any()
    mask[1, 40, 16] = True
    assert np.isnan(with_gradients(grouped, Q, keys, values, mask)[0]).any()


def test_a_blind_query_is_zero_and_learns_nothing():
    mask = MASK.copy()
    mask[1, 16:32] = False  # a whole block of one row, not of the other
    mask[0, 3] = False
    mask[:, 32:] = False  # whole blocks of all rows
    out, (dq, *others) = with_gradients(grouped, Q, KEYS, VALUES, mask)
    blind = np.broadcast_to(~mask.any(axis=-1)[:, None], out.shape[:3])
    assert not out[blind].any() and not dq[blind].any()
    np.testing.assert_allclose(out[~blind], naive(Q, KEYS, VALUES, MASK)[0][~blind], atol=1e-6)
    for found in others:
        assert np.isfinite(found).all() and np.abs(found).max() > 0.1


def test_logits_of_any_size():
    """The maximum is corrected from block to block, so that nothing overflows; every query looks at one key at last."""
    mask = np.tril(np.ones((T, S), bool))[None].repeat(B, axis=0)
    # Around 300, where exp(89) is no float32 any more and a logit's last place is 3e-5.
    keys = KEYS * np.linspace(1, 100, S, dtype=np.float32)[None, None, :, None]
    assert 200 < np.abs(Q[:, 0] @ keys[:, 0].swapaxes(1, 2)).max() * H**-0.5 < 1000
    out, grads = with_gradients(grouped, Q, keys, VALUES, mask)
    np.testing.assert_allclose(out, naive(Q, keys, VALUES, mask)[0], atol=1e-4)
    assert all(np.isfinite(found).all() for found in grads)


def test_half_precision():
    """Outputs and gradients are as the inputs, sums are float32: in bfloat16 8 more weights are lost from 2048 on."""
    q, k = jnp.zeros((1, 1, 1, 8, H), jnp.bfloat16), jnp.zeros((1, 1, 4096, H), jnp.bfloat16)
    v = jnp.broadcast_to(jnp.arange(4096)[:, None] % 3, (1, 1, 4096, H)).astype(jnp.bfloat16)

    def total(q, k, v):
        out = blocks.attend(q, k, v, jnp.ones((1, 8, 4096), bool), 8)
        return jnp.sum(out.astype(jnp.float32)), out

    grads, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    assert {out.dtype, *(found.dtype for found in grads)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(out.astype(np.float32), np.mean(np.arange(4096) % 3), rtol=2**-8)
    np.testing.assert_allclose(grads[2].astype(np.float32), 8 / 4096, rtol=2**-8)


def test_no_weights_of_a_whole_row():
    """Neither kept for the backward pass nor made: the compiled program has no float array of T x T."""
    length = 320

    def total(implementation, q, mask):
        return jnp.sum(attention.attend(q, q, q, mask=mask, implementation=implementation) ** 2)

    def program(implementation):
        shapes = jax.ShapeDtypeStruct((1, 2, length, 4), jnp.float32), jax.ShapeDtypeStruct((1, length, length), bool)
        return jax.jit(jax.grad(functools.partial(total, implementation))).lower(*shapes).compile().as_text()

    weights = re.compile(rf"f32\[[\d,]*{length},{length}\]")
    assert weights.search(program("einsum")) and not weights.search(program("auto"))


@pytest.mark.parametrize(
    "length, mask, bias, taken",
    [(96, True, False, True), (95, True, False, False), (96, False, False, False), (96, True, True, False)],
)
def test_when_auto_takes_blocks(length, mask, bias, taken):
    q = jnp.zeros((1, 1, length, 4))
    given = {"mask": jnp.ones((1, length, length), bool)} if mask else {}
    given |= {"bias": jnp.zeros((1, length))} if bias else {}
    assert ("while" in str(jax.make_jaxpr(functools.partial(attention.attend, **given))(q, q, q))) == taken


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_model_is_the_same(remat):
    """Sums of squared logits and their gradients, over rows of which some end in padding."""
    rng = np.random.default_rng(1)
    rows = [
        [[1, IMAGE_ID, VOCO_ID], *(({"thread": thread}, tiny.words(rng, 20))[::-1] for thread in (1, 2, 3))],
        [[1, *tiny.words(rng, 30), IMAGE_ID, VOCO_ID], tiny.words(rng, 40)],
    ]
    batch = tiny.batch(rows, 80)
    table = TABLES["voco"]

    def total(params, implementation):
        cfg = dataclasses.replace(tiny.MODEL, attention=implementation, remat=remat)
        logits, slots = tiny.forward(params, batch, table, np.int32(3), cfg=cfg)
        assert slots.stream.kind.shape[1] >= 96  # long enough for blocks
        real = (slots.stream.kind != PAD)[..., None]
        return jnp.mean(jnp.where(real, logits, 0) ** 2)

    (found, grads), (expected, want) = (
        jax.value_and_grad(total)(tiny.params(), implementation) for implementation in ("auto", "einsum")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1.0, np.abs(theirs).max()))


def test_rows_and_heads_stay_on_their_devices():
    expected = with_gradients(grouped, Q, KEYS, VALUES, MASK)
    mesh = make_mesh(MeshConfig(data=2, model=2), jax.devices()[:4])
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "model"))
    with jax.set_mesh(mesh):
        heads = [jax.device_put(x, split) for x in (Q, KEYS, VALUES)]
        rows = jax.device_put(MASK, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
        program = with_gradients.lower(grouped, *heads, rows).compile()
        found = program(*heads, rows)
    assert not re.search(r"f32\[[^=]*all-gather", program.as_text())
    assert all(x.sharding.shard_shape(x.shape) == (1, x.shape[1] // 2, *x.shape[2:]) for x in jax.tree.leaves(found))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_queries_of_a_projector():
    """As MQT and Q-Former give them: one mask for all queries, one row of queries for all pictures."""
    params = init_attention(jax.random.key(0), 16, 16, 2, "float32")
    x, keys = (jax.random.normal(jax.random.key(n), shape) for n, shape in ((1, (1, 96, 16)), (2, (2, 36, 16))))
    seen = np.ones((2, 1, 36), bool)
    seen[0, 0, 20:] = False

    @functools.partial(jax.jit, static_argnums=2)
    def run(params, x, implementation):
        def total(params, x):
            return jnp.sum(projected(params, x, keys, keys, seen, implementation) ** 2)

        return jax.value_and_grad(total, argnums=(0, 1))(params, x)

    found, expected = (jax.tree.leaves(run(params, x, name)) for name in ("auto", "einsum"))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_double_precision_around_it():
    with jax.enable_x64(True):
        q = RNG.normal(size=(1, 1, 1, 20, 4))
        out = jax.jit(blocks.attend)(q, q[:, 0], q[:, 0], np.tril(np.ones((1, 20, 20), bool)))
        assert out.dtype == np.float64


def test_forward_mode_is_that_of_explicit_products():
    q = Q[:, :2, : 2 * S : 2]

    def run(q, implementation):
        return attention.attend(q, KEYS, VALUES, mask=MASK[:, : q.shape[2]], implementation=implementation)

    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: run(q, "blocks"), (q,), (q,))
    assert np.isfinite(jax.jvp(lambda q: run(q, "einsum"), (q,), (q,))[1]).all()
