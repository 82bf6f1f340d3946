"""The decoder against a plain NumPy one in float64, and who depends on whom, by gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model as tiny

from tokzip_jax import layout, llm, stack, vlm
from tokzip_jax.masks import TABLES, visibility
from tokzip_jax.types import IMAGE_ID, PREFIX, TEXT, VISION, VOCO, VOCO_ID

CFG, VISUAL, USED = tiny.MODEL, 4, 2
RNG = np.random.default_rng(0)
# Two frames with two VoCo tokens each (of three slots), and text; the second row stands behind padding.
FRAMES = [IMAGE_ID, VOCO_ID, IMAGE_ID, VOCO_ID]
BATCH = tiny.batch([[[1], FRAMES, [5, 6, 7]], [FRAMES, [8, 9]]], 8, left=True, count=2)
SLOTS = jax.jit(functools.partial(layout.expand, voco=3, voco_count=USED))(BATCH, np.ones((2, 2, VISUAL), bool))
KIND, SEGMENT = np.asarray(SLOTS.stream.kind), np.asarray(SLOTS.stream.segment)
X = (RNG.normal(size=(*KIND.shape, CFG.llm.width)) * (KIND > 0)[:, :, None]).astype(np.float32)


def decoder(x, position, mask):
    """LLaMA's layers, one by one: (hidden, attention weights [L, B, N, T, S])."""
    cfg, scores = CFG.llm, []
    half = cfg.head_dim // 2
    angle = position[:, None, :, None] * cfg.rope_theta ** (-np.arange(half) / half)

    def rms(p, x):
        return p["scale"] * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + cfg.norm_eps)

    def turn(x):
        """As complex numbers: component i turns with component i + H/2."""
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    for block in jax.tree.map(np.float64, stack.unstack(tiny.params()["llm"]["layers"])):
        y = rms(block["norm1"], x)
        q, k, v = (np.einsum("btd,dnh->bnth", y, block["attn"][name]["w"]) for name in "qkv")
        k, v = (np.repeat(heads, cfg.heads // cfg.kv_heads, axis=1) for heads in (turn(k), v))
        logits = np.einsum("bnth,bnsh->bnts", turn(q), k) / np.sqrt(cfg.head_dim)
        # A blind query (padding) averages everything, as in the real one; nobody reads it.
        logits = np.where(mask[:, None], logits, -1e30)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        scores.append(weights)
        x = x + np.einsum("bnts,bnsh,nhd->btd", weights, v, block["attn"]["o"]["w"])
        y = rms(block["norm2"], x)
        gate = y @ block["mlp"]["gate"]["w"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ block["mlp"]["up"]["w"])) @ block["mlp"]["down"]["w"]
    return x, np.array(scores)


@functools.partial(jax.jit, static_argnames="cfg")
def run(x, table, cfg=CFG):
    rows = jnp.array([[6, 16], [0, 17]])
    blocks = jax.tree.map(lambda leaf: leaf.astype(cfg.param_dtype), tiny.params()["llm"]["layers"])
    hidden, out = llm.run_layers(cfg, blocks, x.astype(cfg.dtype), SLOTS.stream, table, rows=rows)
    return hidden, out["scores"], rows


@pytest.mark.parametrize("mode", TABLES)
def test_layers_and_scores_are_those_of_the_naive_decoder(mode):
    hidden, scores, rows = run(X, TABLES[mode])
    mask = np.asarray(visibility(SLOTS.stream, SLOTS.stream, TABLES[mode]))
    expected, weights = decoder(X.astype(np.float64), np.asarray(SLOTS.stream.position), mask)
    tiny.close(np.asarray(hidden)[KIND > 0], expected[KIND > 0], atol=1e-4)
    for row in range(2):
        for at, slot in enumerate(np.asarray(rows)[row]):
            if KIND[row, slot]:
                tiny.close(scores[:, row, :, at], weights[:, row, :, slot], atol=1e-5)
    assert scores.dtype == jnp.float32


def test_eager_is_jit():
    hidden, _, _ = run(X, TABLES["voco"])
    eager, _ = llm.run_layers(CFG, tiny.params()["llm"]["layers"], X, SLOTS.stream, TABLES["voco"])
    tiny.close(np.asarray(eager)[KIND > 0], np.asarray(hidden)[KIND > 0], atol=1e-5)


def test_bfloat16_is_close_to_float32():
    """bfloat16 keeps 8 bits, so each rounding errs by up to 2^-9 = 0.2 %.

    Three blocks round the residual stream twice each, and what goes into a softmax is off by 0.2 % of logits of about
    5, i.e. weights by 1 %: together a few per cent of the hidden states' size.
    """
    half = dataclasses.replace(CFG, dtype="bfloat16", param_dtype="bfloat16", logits_dtype="bfloat16")
    hidden, scores, _ = run(X, TABLES["voco"], half)
    exact, _, _ = run(X, TABLES["voco"])
    assert hidden.dtype == jnp.bfloat16 and scores.dtype == jnp.float32
    error = (np.asarray(hidden, np.float32) - np.asarray(exact))[KIND > 0]
    size = np.asarray(exact)[KIND > 0].std()
    assert 1e-4 * size < error.std() < 0.05 * size


def test_tied_head_reads_the_embedding_table():
    params = tiny.params()["llm"]
    tied = dataclasses.replace(CFG, llm=dataclasses.replace(CFG.llm, tied_head=True))
    untied = {**params, "head": {"w": params["embed"]["table"].T}}
    tiny.close(llm.logits(tied, params, X), llm.logits(CFG, untied, X))
    assert "head" not in jax.eval_shape(lambda key: llm.init(tied.llm, key), jax.random.key(0))
    half = dataclasses.replace(CFG, logits_dtype="bfloat16")
    assert llm.logits(half, params, X).dtype == jnp.bfloat16


def dependence(x, table, readers, weights):
    """How the hidden states of `readers`, in a random combination, depend on every slot's embedding: [B, T]."""

    def read(x):
        hidden, _, _ = run(x, table)
        return jnp.sum(jnp.where(readers[:, :, None], hidden * weights, 0))

    return jnp.abs(jax.grad(read)(x)).sum(axis=-1)


depends = jax.jit(dependence)


def test_frames_do_not_see_one_another():
    """Nor does a frame see the other's VoCo tokens; text depends on both frames."""
    weights = RNG.normal(size=X.shape).astype(np.float32)
    first, second = (SEGMENT == 1) & (KIND > 0), (SEGMENT == 2) & (KIND > 0)
    for mode in ("voco", "prefix_visible"):
        of_second = np.asarray(depends(X, TABLES[mode], second, weights))
        assert np.all(of_second[first] == 0) and np.all(of_second[second] > 0)
        assert np.all(of_second[KIND == PREFIX][0] > 0)
        of_text = np.asarray(depends(X, TABLES[mode], KIND == TEXT, weights))
        assert np.all(of_text[first] > 0) and np.all(of_text[second] > 0)
    # What the VoCo mask cuts is there without it.
    assert np.all(np.asarray(depends(X, TABLES["visible"], second, weights))[first] > 0)


def hold(x, table, held, weights, text):
    """Text read from the keys and values of what stands before it, those of the `held` slots taken as constants."""
    _, kv = llm.run_layers(CFG, tiny.params()["llm"]["layers"], x, SLOTS.stream, table, keep=True)
    held = held[None, :, None, :, None]
    fixed = {name: jnp.where(held, jax.lax.stop_gradient(value), value) for name, value in kv.items()}
    cache = llm.KvCache(**jax.tree.map(lambda leaf: leaf[:, :, :, :text], fixed), stream=first(SLOTS.stream, text))
    after = jax.tree.map(lambda leaf: leaf[:, text:], SLOTS.stream)
    cache, after = llm.write_stream(llm.extend(cache, x.shape[1] - text), after, text)
    hidden, _ = llm.run_layers(
        CFG, tiny.params()["llm"]["layers"], x[:, text:], after, table, cache=cache, offset=text
    )
    logits = llm.logits(CFG, tiny.params()["llm"], hidden)
    return jnp.sum(jnp.where((after.kind == TEXT)[:, :, None], logits * weights, 0))


def first(stream, count):
    return jax.tree.map(lambda leaf: leaf[:, :count], stream)


through = jax.jit(lambda *args: jnp.abs(jax.grad(functools.partial(hold, text=15))(*args)).sum(axis=-1))


def test_text_depends_on_vision_through_voco_keys_and_values_only():
    """With VoCo's keys and values held fixed the derivative of text with respect to any picture is exactly zero."""
    assert np.sum(KIND[:, 15:] == TEXT) == 5 and not np.any(KIND[:, :15] == TEXT)
    weights = RNG.normal(size=(2, 3, CFG.llm.vocab_size)).astype(np.float32)
    voco, nobody = KIND == VOCO, KIND < 0
    for mode in ("voco", "prefix_visible"):
        fixed = np.asarray(through(X, TABLES[mode], voco, weights))
        assert np.all(fixed[KIND == VISION] == 0) and np.all(fixed[voco] == 0)
        assert np.all(fixed[KIND == TEXT] > 0)
        # The prefix is cut off under the official mask, and is the only other thing seen under the wider one.
        assert np.all((fixed[KIND == PREFIX] > 0) == (mode == "prefix_visible"))
        free = np.asarray(through(X, TABLES[mode], nobody, weights))
        assert np.all(free[KIND == VISION] > 0) and np.all(free[voco] > 0)
    # And the test can tell: plain causal text does see the pictures.
    assert np.all(np.asarray(through(X, TABLES["visible"], voco, weights))[KIND == VISION] > 0)


def test_cache_written_in_two_pieces_is_one_pass():
    """Keys and values kept by one run serve the next, at a static and at a traced offset."""
    blocks, table = tiny.params()["llm"]["layers"], TABLES["voco"]
    whole, _, _ = run(X, table)
    cut = 9

    @functools.partial(jax.jit, static_argnums=1)
    def second(x, offset, traced=None):
        cache = llm.empty_cache(CFG, 2, x.shape[1])
        cache, head = llm.write_stream(cache, first(SLOTS.stream, cut), 0)
        _, kv = llm.run_layers(CFG, blocks, x[:, :cut], head, table, cache=cache, offset=0, keep=True)
        cache = dataclasses.replace(cache, **kv)
        at = offset if traced is None else traced
        cache, tail = llm.write_stream(cache, jax.tree.map(lambda leaf: leaf[:, cut:], SLOTS.stream), at)
        hidden, _ = llm.run_layers(CFG, blocks, x[:, cut:], tail, table, cache=cache, offset=at)
        return hidden

    real = KIND[:, cut:] > 0
    for found in (second(X, cut), second(X, None, jnp.int32(cut))):
        tiny.close(np.asarray(found)[real], np.asarray(whole)[:, cut:][real], atol=1e-5)


def test_splice_puts_every_vector_in_its_slot():
    params = tiny.params()
    visual = RNG.normal(size=(2, 2 * VISUAL, CFG.llm.width)).astype(np.float32)
    x = np.asarray(vlm.splice(CFG, params, SLOTS, visual))
    table, voco = np.asarray(params["llm"]["embed"]["table"]), np.asarray(params["voco"]["table"])
    ids = [token for token in BATCH["ids"][0] if token > 0]
    np.testing.assert_array_equal(x[0][(KIND[0] == TEXT) | (KIND[0] == PREFIX)], table[ids])
    np.testing.assert_array_equal(x[0][KIND[0] == VISION], visual[0])
    np.testing.assert_array_equal(x[0][KIND[0] == VOCO], voco[[0, 1, 0, 1]])
    np.testing.assert_array_equal(x[1][KIND[1] == VISION], visual[1])
    assert np.all(x[KIND == 0] == 0)
    shared = {**params, "voco": {"table": params["voco"]["table"][:1]}}
    one = dataclasses.replace(CFG, voco_embeddings=1)
    x = np.asarray(vlm.splice(one, shared, SLOTS, visual))
    np.testing.assert_array_equal(x[0][KIND[0] == VOCO], np.repeat(voco[:1], 4, axis=0))
