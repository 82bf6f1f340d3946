"""What has to hold of every rule of the decoder site as a function of arrays, whatever it is told to look at."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokzip_jax.compress import sparsevlm
from tokzip_jax.compress.decoder import DECODER
from tokzip_jax.compress.decoder_entry import Look, Setting

G, N, R, V, D, KEEP = 5, 3, 6, 40, 4, 8
PLAIN = ("fastv", "fastv_paper", "pyramiddrop", "sparsevlm_plus")
MERGING = ("sparsevlm", "sparsevlm_v1", "sparsevlm_paper")
SETTINGS = {
    "sparsevlm_v1": Setting(KEEP, scale=2.5, bias=1.0),
    "sparsevlm_paper": Setting(KEEP, scale=0.87),
    "sparsevlm_plus": Setting(KEEP, heads=2, head_dim=8, theta=100.0),
}


def setting(name, keep=KEEP):
    return SETTINGS.get(name, Setting(keep))._replace(keep=keep)


@functools.cache
def looks(name, seed=0):
    """Five pictures: whole; with holes; fewer tokens than the budget; an empty slot; one that nobody asks about."""
    rng = np.random.default_rng(seed)
    valid = np.ones((G, V), bool)
    valid[1] = np.isin(np.arange(V), rng.permutation(V)[:25])
    valid[2] = np.isin(np.arange(V), rng.permutation(V)[:3])
    valid[3] = False
    attention = rng.exponential(size=(G, N, R, V)).astype(np.float32)
    attention /= attention.sum(axis=-1, keepdims=True)
    attention[0, :, 2] = attention[0, :, 1]  # three rows of rank two
    # Each row of a prompt that stands around its pictures.
    counts = np.array([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0], [0] * R, [0] * R], bool)
    if DECODER[name].rows == "last":
        counts &= np.arange(R)[None] == np.argmax(counts, axis=1, keepdims=True)
    place = np.array([0, 20, 41, 42, 43, 44])
    offset = np.broadcast_to(place[None, :, None] - np.arange(1, V + 1)[None, None], (G, R, V)).astype(np.int32)
    tokens = rng.standard_normal((G, V, D)).astype(np.float32)
    return Look(*map(jnp.asarray, (attention, counts, tokens, valid, offset)))


@functools.cache
def program(name, keep=KEEP):
    """Jitted look -> (gradient of a drawn sum of the merged tokens with respect to all tokens, choice); its traces."""
    traces = []
    probe = np.random.default_rng(7).uniform(0.5, 1.5, (max(DECODER[name].merged(V, keep), 1), D)).astype(np.float32)

    def run(look):
        traces.append(keep)

        def told(tokens):
            choice = DECODER[name].choose(look._replace(tokens_GVD=tokens), setting(name, keep))
            if choice.merged_GCD is None:
                return 0.0, choice
            return jnp.sum(jnp.where(choice.real_GC[:, :, None], choice.merged_GCD * probe[None], 0)), choice

        return jax.grad(told, has_aux=True)(look.tokens_GVD)

    return jax.jit(run), probe, traces


def chosen(name, look, keep=KEEP):
    return program(name, keep)[0](look)[1]


def same(found, expected):
    """The same tokens kept, and merged ones alike."""
    np.testing.assert_array_equal(found.kept_GV, expected.kept_GV)
    assert (found.merged_GCD is None) == (expected.merged_GCD is None)
    if found.merged_GCD is not None:
        np.testing.assert_array_equal(found.real_GC, expected.real_GC)
        real = np.asarray(found.real_GC)[:, :, None]
        merged = (np.where(real, choice.merged_GCD, 0) for choice in (found, expected))
        np.testing.assert_allclose(*merged, atol=1e-5, rtol=0)


def budget(name, look, keep):
    """How many tokens of each picture a method promises."""
    promised = []
    for weights, counts, _, valid, _ in zip(*map(np.asarray, look)):
        count, most = int(valid.sum()), keep
        if name in ("sparsevlm_v1", "sparsevlm_paper"):
            used = weights.mean(axis=0)[counts][:, valid]
            rank = np.linalg.matrix_rank(used) if used.size else 0
            scale, bias = setting(name).scale, setting(name).bias
            by_rank = min(int(scale * rank + bias), max(count - 1, 0))
            most = min(keep, by_rank if name == "sparsevlm_v1" else count - int(scale * (count - rank)))
        promised.append(min(count, most))
    return promised


def test_every_rule_is_here():
    assert {*PLAIN, *MERGING} == set(DECODER)


@pytest.mark.parametrize("name", DECODER)
def test_compiled_is_eager_is_one_by_one(name):
    """One by one with `vmap`, each picture a batch of its own."""
    look, rule = looks(name), DECODER[name]
    found = chosen(name, look)
    same(rule.choose(look, setting(name)), found)
    alone = jax.jit(jax.vmap(lambda one: rule.choose(one, setting(name))))(jax.tree.map(lambda x: x[:, None], look))
    same(jax.tree.map(lambda x: x[:, 0], alone), found)


@pytest.mark.parametrize(
    ("name", "keep"), [*((name, keep) for name in DECODER for keep in (KEEP, V)), *((name, 1) for name in PLAIN)]
)
def test_budgets(name, keep):
    """As many as promised, of the real ones alone, and as many merged ones as the deleted ones make."""
    look = looks(name)
    found = chosen(name, look, keep)
    kept, valid = np.asarray(found.kept_GV), np.asarray(look.valid_GV)
    assert kept.shape == (G, V) and kept.dtype == bool
    assert not np.any(kept & ~valid)
    assert kept.sum(axis=1).tolist() == budget(name, look, keep)
    slots = DECODER[name].merged(V, keep)
    if name in PLAIN:
        assert slots == 0 and found.merged_GCD is None
        return
    merged, real = np.asarray(found.merged_GCD), np.asarray(found.real_GC)
    assert merged.shape == (G, slots, D) and real.shape == (G, slots)
    for row, gone in enumerate(valid & ~kept):
        assert real[row].tolist() == [slot < sparsevlm.recycled(int(gone.sum()))[1] for slot in range(slots)]
        if gone.any():  # means of deleted tokens lie among them
            tokens = np.asarray(look.tokens_GVD)[row, gone]
            assert np.all(merged[row, real[row]] >= tokens.min(axis=0) - 1e-5)
            assert np.all(merged[row, real[row]] <= tokens.max(axis=0) + 1e-5)


@pytest.mark.parametrize("name", [*PLAIN, "sparsevlm"])
def test_a_budget_of_everything_is_the_identity(name):
    """Of the methods that count by rank v1 never keeps all."""
    look = looks(name)
    found = chosen(name, look, V)
    np.testing.assert_array_equal(found.kept_GV, look.valid_GV)
    assert found.merged_GCD is None or found.merged_GCD.shape == (G, 0, D)


@pytest.mark.parametrize("name", DECODER)
def test_only_real_tokens_and_rows_that_count_are_read(name):
    look = looks(name)
    valid, counts = look.valid_GV, look.counts_GR
    read = counts[:, None, :, None] & valid[:, None, None, :]
    other = look._replace(
        attention_GNRV=jnp.where(read, look.attention_GNRV, 50.0),
        tokens_GVD=jnp.where(valid[:, :, None], look.tokens_GVD, 1000.0),
        offset_GRV=jnp.where(read[:, 0], look.offset_GRV, 7),
    )
    (gradient, found), (moved, changed) = (program(name)[0](each) for each in (look, other))
    same(changed, found)
    np.testing.assert_allclose(moved, gradient, atol=1e-6)
    # And what is read matters.
    assert np.any(chosen(name, looks(name, 1)._replace(valid_GV=valid)).kept_GV != found.kept_GV)


@pytest.mark.parametrize("name", DECODER)
def test_the_order_of_the_slots_does_not_matter(name):
    """Of pictures that somebody asks about: without a score the lower index goes first."""
    look, order = looks(name), np.random.default_rng(5).permutation(V)
    attention, counts, tokens, valid, offset = look
    shuffled = Look(attention[..., order], counts, tokens[:, order], valid[:, order], offset[..., order])
    found, expected = chosen(name, shuffled), chosen(name, look)
    expected = expected._replace(kept_GV=expected.kept_GV[:, order])
    same(*(jax.tree.map(lambda x: x[:4], choice) for choice in (found, expected)))


@pytest.mark.parametrize("name", MERGING)
def test_gradients_of_merged_tokens(name):
    """Each merged token is a mean: the gradient's product with the tokens is the value, and nobody else has any."""
    look = looks(name)
    run, probe, _ = program(name)
    gradient, found = jax.tree.map(np.asarray, run(look))
    tokens = np.asarray(look.tokens_GVD, np.float64)
    gone = np.asarray(look.valid_GV) & ~found.kept_GV
    for row in range(G):
        real = found.real_GC[row]
        value = np.sum(found.merged_GCD[row, real] * probe[real])
        np.testing.assert_allclose(np.sum(gradient[row] * tokens[row]), value, atol=1e-5, rtol=0)
        np.testing.assert_allclose(gradient[row].sum(axis=0), probe[real].sum(axis=0), atol=1e-5, rtol=0)
        moved = np.any(gradient[row] != 0, axis=1)
        assert not np.any(moved & ~gone[row]) and moved.sum() == sparsevlm.recycled(int(gone[row].sum()))[0]
    for alike in (jnp.zeros_like(look.tokens_GVD), jnp.full_like(look.tokens_GVD, 3.0)):
        gradient, found = run(look._replace(tokens_GVD=alike))
        assert np.all(np.isfinite(gradient)) and np.all(np.isfinite(found.merged_GCD))


@pytest.mark.parametrize("name", DECODER)
def test_one_program_for_all_looks(name):
    run, _, traces = program(name)
    for seed in range(3):
        run(looks(name, seed))
    assert traces == [KEEP]
