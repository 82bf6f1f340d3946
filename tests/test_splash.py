"""Splash attention under a static mask: equal to masked products, and the empty blocks are really not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokzip_jax import llm, masks, splash
from tokzip_jax.attention import attend
from tokzip_jax.config import LlmConfig, MeshConfig, ModelConfig, RunConfig
from tokzip_jax.config_check import validate
from tokzip_jax.sharding import make_mesh
from tokzip_jax.types import PAD, PREFIX, TEXT, VISION, VOCO, TokenStream

# BOS, one image of 130 patches, 3 VoCo tokens, text. Of three blocks of 128 the last holds text only.
KIND = np.array([PREFIX] + [VISION] * 130 + [VOCO] * 3 + [TEXT] * 240)
SEGMENT = np.where((KIND == VISION) | (KIND == VOCO), 1, 0)
# The second row is shorter than the first.
SAMPLE = np.ones((2, KIND.size), np.int32)
SAMPLE[1, -37:] = 0


def stream_of(kind, segment, thread=0, sample=1):
    order = np.broadcast_to(np.arange(kind.shape[-1]), kind.shape)
    values = {"kind": kind, "segment": segment, "thread": thread, "sample": sample, "position": order, "order": order}
    return TokenStream(**{n: jnp.asarray(np.broadcast_to(v, kind.shape), jnp.int32) for n, v in values.items()})


def dense(kind, segment, table, **more):
    stream = stream_of(kind, segment, **more)
    return masks.visibility(stream, stream, masks.TABLES[table])


@functools.cache
def heads():
    """Queries of 4 heads, keys and values of 2, and weights that ask nothing of padding."""
    rng = np.random.default_rng(0)
    q, k, v, weight = (rng.normal(size=(2, n, KIND.size, 8)).astype(np.float32) for n in (4, 2, 2, 4))
    return (q, k, v), weight * SAMPLE[:, None, :, None]


def splashed(table, interpret=True):
    row_mask = splash.mask(KIND, masks.TABLES[table], segment=SEGMENT)
    return lambda q, k, v: splash.attend(q, k, v, row_mask, segment_ids=jnp.asarray(SAMPLE), interpret=interpret)


def with_gradients(function, *arguments):
    weight = heads()[1]

    def loss(q, k, v):
        out = function(q, k, v)
        return jnp.sum(out * weight), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arguments)
    return np.where(weight != 0, out, 0), grads


@pytest.mark.parametrize("table", sorted(masks.TABLES))
def test_blocks_follow_the_rule(table):
    kind = np.array([PREFIX, VISION, VISION, VOCO, VISION, PREFIX, VOCO, TEXT, TEXT, TEXT, PAD, TEXT])
    segment = np.array([0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0])
    thread = np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 2])
    made = splash.mask(kind, masks.TABLES[table], segment=segment, thread=thread)
    want = np.array(dense(kind[None], segment, table, thread=thread, sample=np.where(kind == PAD, 0, 1)))[0]
    want[10, 10] = True  # padding sees itself, or its softmax would be over nothing
    np.testing.assert_array_equal(made[:, :], want)
    np.testing.assert_array_equal(made[4:9, 2:7], want[4:9, 2:7])
    longer = made.padded(16)
    np.testing.assert_array_equal(longer[:12, :12], want)
    np.testing.assert_array_equal(longer[12:, :], np.eye(16, dtype=bool)[12:])
    assert not longer[:12, 12:].any()


def test_masks_of_one_layout_are_one():
    first, second = (splash.mask(KIND, masks.TABLES["voco"], segment=SEGMENT) for _ in range(2))
    assert first == second and hash(first) == hash(second)
    assert first != splash.mask(KIND, masks.TABLES["visible"], segment=SEGMENT)
    assert first != splash.mask(KIND[::-1], masks.TABLES["voco"], segment=SEGMENT[::-1])


@pytest.mark.parametrize("table", ["voco", "visible"])
def test_equals_masked_products(table):
    mask = dense(np.where(SAMPLE > 0, KIND, PAD), SEGMENT, table, sample=SAMPLE)
    out, grads = with_gradients(splashed(table), *heads()[0])
    want, want_grads = with_gradients(lambda q, k, v: attend(q, k, v, mask=mask), *heads()[0])
    np.testing.assert_allclose(out, want, atol=1e-5)
    for name, got, expected in zip("qkv", grads, want_grads):
        np.testing.assert_allclose(got, expected, atol=1e-4, err_msg=name)
        assert np.abs(expected).max() > 0.1


def test_text_by_vision_blocks_are_absent():
    blocks = {}
    for table in ("voco", "visible"):
        row_mask = splash.mask(KIND, masks.TABLES[table], segment=SEGMENT).padded(384)
        kernel = splash.kernel(row_mask, 4, interpret=True)
        # Blocks that run, as (row of queries, column of keys): the grid is shrunk to the longest row.
        info = kernel.fwd_mask_info
        blocks[table] = {(int(i), int(info.data_next[0, i, j])) for _, i, j in np.argwhere(info.block_mask)}
        for other in (kernel.dq_mask_info, kernel.dkv_mask_info):
            assert np.count_nonzero(other.block_mask) == len(blocks[table])
    # The last 128 queries are text, the first 128 keys BOS and vision.
    assert blocks["visible"] == {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)}
    assert blocks["voco"] == blocks["visible"] - {(2, 0)}


def test_lowers_for_tpu():
    gradient = jax.jit(jax.grad(lambda q, k, v: jnp.sum(splashed("voco", interpret=False)(q, k, v)), argnums=(0, 1, 2)))
    exported = jax.export.export(gradient, platforms=["tpu"])(*heads()[0])
    # Forward, gradient of the queries, gradient of keys and values.
    assert exported.mlir_module().count("tpu_custom_call") == 3


def test_rows_and_heads_stay_on_their_devices():
    out = splashed("voco")(*heads()[0])
    with jax.set_mesh(make_mesh(MeshConfig(data=2, model=4))):
        # Two key heads do not divide by four devices, so heads stay whole there.
        whole = jax.jit(splashed("voco"))(*heads()[0])
    assert whole.sharding.spec[0] == "data"
    np.testing.assert_allclose(whole, out, atol=1e-6)


def test_language_model_takes_it():
    cfg = ModelConfig(
        llm=LlmConfig(vocab_size=16, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_dim=16),
    )
    kind, segment = KIND[100:200], SEGMENT[100:200]
    stream, table = stream_of(kind[None], segment), masks.TABLES["voco"]
    bound = functools.partial(splash.attend, row_mask=splash.mask(kind, table, segment=segment), interpret=True)

    @jax.jit
    def both(key):
        layers = llm.init(cfg.llm, key)["layers"]
        x = jax.random.normal(key, (1, kind.size, 16))
        want, _ = llm.run_layers(cfg, layers, x, stream, table)
        return want, llm.run_layers(cfg, layers, x, stream, table, attention=bound, keep=True)

    want, (got, kept) = both(jax.random.key(0))
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert kept["k"].shape == (2, 1, 1, kind.size, 8)
    cache = llm.empty_cache(cfg, 1, 128)
    for more in ({"cache": cache}, {"rows": jnp.zeros((1, 1), jnp.int32)}):
        with pytest.raises(ValueError, match="neither a cache nor rows"):
            llm.run_layers(cfg, {}, jnp.zeros((1, 100, 16)), stream, table, attention=bound, **more)


def test_refuses_what_does_not_fit():
    (q, k, v), _ = heads()
    row_mask = splash.mask(KIND, masks.TABLES["voco"], segment=SEGMENT)
    with pytest.raises(ValueError, match="a mask of 374 tokens does not fit rows of 300"):
        splash.attend(q[:, :, :300], k[:, :, :300], v[:, :, :300], row_mask)
    with pytest.raises(ValueError, match="must agree in all but the heads"):
        splash.attend(q[:, :3], k, v, row_mask)
    with pytest.raises(ValueError, match="block = 64 must be a multiple of 128"):
        splash.attend(q, k, v, row_mask, block=64)
    with pytest.raises(ValueError, match="must be \\[T\\]"):
        splash.mask(KIND, masks.TABLES["voco"], segment=SEGMENT[1:])
    with pytest.raises(ValueError, match="kind is traced, but a splash mask is static"):
        jax.jit(lambda kind: splash.mask(kind, masks.TABLES["voco"])[:1, :1])(KIND)


def test_a_config_says_where_it_is_for():
    with pytest.raises(ValueError, match=r"model\.attention = 'splash' is no setting of a run.*splash\.attend"):
        validate(RunConfig(model=ModelConfig(attention="splash")))
