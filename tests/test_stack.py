"""Stacked layers: any part, any way of storing and running them is the plain loop, and no part copies the weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model as tiny

from tokzip_jax import llm, stack, vit
from tokzip_jax.config import VitConfig
from tokzip_jax.layout import text_stream
from tokzip_jax.masks import TABLES

LAYERS, WIDTH = 5, 3
RNG = np.random.default_rng(0)
STACKED = {
    "w": RNG.normal(size=(LAYERS, WIDTH, WIDTH)).astype(np.float32),
    "deep": {"b": RNG.normal(size=(LAYERS, WIDTH)).astype(np.float32)},
}
INPUTS = RNG.normal(size=(LAYERS, WIDTH)).astype(np.float32)
X = RNG.normal(size=(2, WIDTH)).astype(np.float32)


def body(carry, layer, given):
    carry = jnp.tanh(carry @ layer["w"] + layer["deep"]["b"] + (0 if given is None else given))
    return carry, {"sum": jnp.sum(carry, axis=-1)}


def loop(lo, hi):
    """The same in NumPy."""
    x, sums = X.astype(np.float64), []
    for i in range(lo, hi):
        x = np.tanh(x @ STACKED["w"][i] + STACKED["deep"]["b"][i] + INPUTS[i])
        sums.append(x.sum(axis=-1))
    return x, np.array(sums)


@functools.partial(jax.jit, static_argnums=(1, 2))
def run(groups, lo, hi, inputs):
    return stack.run(body, X, groups, lo, hi, inputs=inputs)


# The whole, a part of one group, up to a border, over borders, one layer.
@pytest.mark.parametrize(("lo", "hi"), [(0, 5), (0, 4), (1, 3), (2, 5), (3, 4)])
@pytest.mark.parametrize("cuts", [(), (2,), (1, 4)])
def test_any_part_of_any_storage_is_the_loop(cuts, lo, hi):
    x, out = run(stack.split(STACKED, cuts), lo, hi, INPUTS[lo:hi])
    expected, sums = loop(lo, hi)
    np.testing.assert_allclose(x, expected, atol=1e-6)
    np.testing.assert_allclose(out["sum"], sums, atol=1e-6)


def test_a_tuple_of_layers_is_the_loop():
    blocks = stack.unstack(stack.split(STACKED, (2,)))
    x, out = run(blocks, 1, 4, tuple(INPUTS[1:4]))
    expected, sums = loop(1, 4)
    np.testing.assert_allclose(x, expected, atol=1e-6)
    np.testing.assert_allclose([layer["sum"] for layer in out], sums, atol=1e-6)


def test_no_layers_change_nothing():
    x, out = stack.run(body, X, stack.split(STACKED, (2,)), 2, 2, inputs=INPUTS[:0])
    assert x is X and out is None


def test_split_and_join_are_inverse_and_init_is_blind_to_cuts():
    groups = stack.split(STACKED, (1, 4))
    assert stack.sizes(groups) == [1, 3, 1]
    for whole in (stack.join(groups), stack.join(stack.split(stack.join(groups), ()))):
        jax.tree.map(np.testing.assert_array_equal, whole, STACKED)

    def block(key):
        return {"w": jax.random.normal(key, (WIDTH,))}

    one, three = (stack.init(block, jax.random.key(0), LAYERS, cuts) for cuts in ((), (1, 4)))
    assert stack.sizes(three) == [1, 3, 1] and list(one) == ["0"]
    np.testing.assert_array_equal(stack.join(three)["w"], one["0"]["w"])


ROW = np.array([[5, 6, 7, 8, 9], [0, 0, 3, 4, 5]], np.int32)


@functools.partial(jax.jit, static_argnames=("remat", "lo", "hi", "keep"))
def text(blocks, x, remat="none", lo=0, hi=None, keep=True):
    """The real decoder over two rows of text."""
    cfg = dataclasses.replace(tiny.MODEL, remat=remat)
    return llm.run_layers(cfg, blocks, x, text_stream(ROW), jnp.asarray(TABLES["visible"]), keep=keep, lo=lo, hi=hi)


def embedded():
    return tiny.params()["llm"]["layers"], tiny.params()["llm"]["embed"]["table"][ROW]


def test_scan_is_the_loop_of_real_blocks():
    groups, x = embedded()
    hidden, kv = text(groups, x)
    loop_hidden, loop_kv = text(stack.unstack(groups), x)
    # The same sums in the same order, but fused differently: float32's last bits.
    tiny.close(loop_hidden, hidden, atol=1e-5)
    for name in ("k", "v"):
        tiny.close(np.stack(loop_kv[name]), kv[name], atol=1e-5)


def test_two_partial_runs_are_one():
    groups, x = embedded()
    hidden, kv = text(groups, x)
    half, first = text(groups, x, hi=1)
    whole, second = text(groups, half, lo=1)
    tiny.close(whole, hidden, atol=1e-5)
    tiny.close(np.concatenate([first["k"], second["k"]]), kv["k"], atol=1e-5)


def test_remat_changes_neither_loss_nor_gradients():
    groups, x = embedded()

    def loss(groups, x, remat):
        return jnp.sum(text(groups, x, remat=remat, keep=False)[0] ** 2)

    results = {}
    for remat in ("none", "full", "dots"):
        program = jax.jit(jax.value_and_grad(functools.partial(loss, remat=remat), argnums=(0, 1))).lower(groups, x)
        # `jax.checkpoint` leaves barriers or repeated products behind; without it there is one product a use.
        results[remat] = program.compile()(groups, x), program.as_text().count("dot_general")
    plain, fewest = results["none"]
    for remat in ("full", "dots"):
        (value, grads), products = results[remat]
        tiny.close(value, plain[0])
        jax.tree.map(functools.partial(tiny.close, atol=1e-3), grads, plain[1])
        assert products > fewest
    assert results["full"][1] > results["dots"][1]


def temporaries(hi, signals=()):
    """Bytes of temporaries of `hi` of 8 vision blocks stored in one piece, whose weights outweigh the activations."""
    tower = VitConfig(image_size=32, patch_size=8, width=64, layers=8, heads=2, mlp_dim=512)
    cfg = dataclasses.replace(tiny.MODEL, vit=tower)
    shapes = jax.eval_shape(lambda key: vit.init(tower, key), jax.random.key(0))
    whole = jax.eval_shape(stack.join, shapes["layers"])
    x = jax.ShapeDtypeStruct((1, 17, 64), jnp.float32)
    program = jax.jit(lambda layers, x: vit.run_blocks(cfg, {"layers": {"0": layers}}, x, 0, hi, signals))
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(whole))
    return program.lower(whole, x).compile().memory_analysis().temp_size_in_bytes, weights // 8


def test_stopping_before_the_last_block_copies_no_weights():
    """Slicing the stack under jit would copy seven blocks; indexing it in the loop costs activations only."""
    full, block = temporaries(8)
    part, _ = temporaries(7, ("cls_attention_BP", "keys_BSH"))
    activations = 4 * 17 * 64 * 4  # a few arrays [17, 64] of float32
    assert activations < block / 10
    assert part - full < activations
