"""FastV and SparseVLM through a whole decoder against the official implementations' hidden states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest

from tokzip_jax import config as c
from tokzip_jax import decoder_site, layers, layout
from tokzip_jax.compress import sparsevlm
from tokzip_jax.masks import TABLES
from tokzip_jax.types import IMAGE_ID, PAD, VISION

FASTV, SPARSE = official.read("fastv"), official.read("sparsevlm")


def model(depth):
    llm = c.LlmConfig(vocab_size=64, width=32, layers=depth, heads=4, kv_heads=4, head_dim=8, mlp_dim=64, norm_eps=1e-5)
    return c.ModelConfig(llm=llm)


def blocks(golden, depth):
    """Their layers as one stack of ours: theirs are [out, in]."""
    found = []
    for number in range(depth):
        at = f"sd/layers.{number}."
        heads = {n: golden[f"{at}self_attn.{n}_proj.weight"].T.reshape(32, 4, 8) for n in "qkv"}
        heads["o"] = golden[f"{at}self_attn.o_proj.weight"].T.reshape(4, 8, 32)
        found.append(
            {
                "norm1": {"scale": golden[f"{at}input_layernorm.weight"]},
                "norm2": {"scale": golden[f"{at}post_attention_layernorm.weight"]},
                "attn": {n: {"w": w} for n, w in heads.items()},
                "mlp": {n: {"w": golden[f"{at}mlp.{n}_proj.weight"].T} for n in ("gate", "up", "down")},
            }
        )
    return {"0": jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)}


@functools.partial(jax.jit, static_argnames=("depth", "visual", "method"))
def run(x, slots, stacked, scale, *, depth, visual, method):
    cfg = model(depth)
    hidden, after, runs = decoder_site.run(
        cfg, stacked, x, slots, jnp.asarray(TABLES["visible"]), method, images=1, visual=visual
    )
    return layers.apply(layers.RMSNorm(1e-5), {"scale": scale}, hidden), after, [part.stream for part in runs]


def row(prefix, visual, text):
    ids = np.array([[3] * prefix + [IMAGE_ID] + [5] * text], np.int32)
    ones = np.ones_like(ids)
    batch = {"ids": ids, "thread": 0 * ones, "sample": ones, "supervised": np.zeros(ids.shape, bool)}
    return jax.jit(layout.expand, static_argnames="voco")(batch, np.ones((1, 1, visual), bool), voco=0, voco_count=0)


CASES = [(1, 6, "gather"), (2, 12, "gather"), (3, 6, "gather"), (2, 6, "mask")]


@pytest.mark.parametrize(("cut", "keep", "form"), CASES)
def test_fastv(cut, keep, form):
    """Gathered against their in-place variant, masked against their mask variant; and the slots that are kept."""
    name = f"K{cut}_r{keep}/"
    kept = FASTV[f"{name}keep"]
    method = c.MethodConfig(decoder="fastv", decoder_layers=(cut,), decoder_keep=(keep,), decoder_form=form)
    x, scale = FASTV["inputs_embeds"], FASTV["sd/norm.weight"]
    hidden, after, _ = run(x, row(5, 24, 7), blocks(FASTV, 6), scale, depth=6, visual=24, method=method)
    real = np.asarray(after.stream.kind)[0] != PAD
    np.testing.assert_array_equal(np.asarray(after.stream.position)[0, real], kept)
    expected = FASTV[f"{name}inplace_last_hidden"][0] if form == "gather" else FASTV[f"{name}mask_last_hidden"][0, kept]
    np.testing.assert_allclose(np.asarray(hidden)[0, real], expected, atol=1e-4)


def test_sparsevlm_v1_5(monkeypatch):
    """Raters, kept tokens, lengths of every layer, merged tokens and the last states of a 17-layer model.

    With two clusters each token of a closest pair is as dense as the other, so that their noise decides.
    """
    noise = dict(zip((34, 38, 15), (jnp.asarray(SPARSE[f"merge{event}/noise"]) for event in range(3))))
    recycle = sparsevlm.recycle
    monkeypatch.setattr(sparsevlm, "recycle", lambda *given, most: recycle(*given, most=most, noise_BR=noise[most]))
    method = c.MethodConfig(decoder="sparsevlm", decoder_layers=(3, 7, 16), decoder_keep=(66, 30, 17))
    slots, x = row(5, 100, 9), SPARSE["inputs_embeds"]
    hidden, after, streams = run(
        x, slots, blocks(SPARSE, 17), SPARSE["sd/norm.weight"], depth=17, visual=100, method=method
    )
    found = sparsevlm.raters(x[:, 5:105], np.ones((1, 100), bool), x[:, 105:], np.ones((1, 9), bool))
    np.testing.assert_array_equal(np.flatnonzero(found[0]), SPARSE["prune0/t_idx"])
    lengths = [int(np.sum(np.asarray(stream.kind) != PAD)) for stream in streams]
    assert np.repeat(lengths, [3, 4, 9, 1]).tolist() == SPARSE["kv_lengths"].tolist()
    for stream in streams:
        real = np.asarray(stream.kind)[0] != PAD
        np.testing.assert_array_equal(np.asarray(stream.position)[0, real], np.arange(real.sum()))
    visual = np.asarray(after.visual)[0, np.asarray(after.stream.kind)[0] == VISION]
    alive = np.arange(100)
    for event in range(3):
        alive = alive[SPARSE[f"prune{event}/mask"][0]]
        # Merged tokens, which are no single visual token, stand behind the kept ones.
        alive = np.append(alive, [-1] * SPARSE[f"merge{event}/out"].shape[1])
    np.testing.assert_array_equal(visual, alive)
    real = np.asarray(after.stream.kind)[0] != PAD
    np.testing.assert_allclose(np.asarray(hidden)[0, real], SPARSE["last_hidden"][0], atol=1e-4)


def test_sparsevlm_recycling_is_the_official_one():
    """Scores, chosen tokens and merged ones of each event, from the arrays of that event."""
    for event in range(3):
        given, noise = (SPARSE[f"merge{event}/{name}"] for name in ("in", "noise"))
        score, mask = SPARSE[f"prune{event}/rel"], SPARSE[f"prune{event}/mask"]
        # The recycled tokens' states at their places; nobody reads the others.
        gone = np.flatnonzero(~mask[0])
        best = gone[np.argsort(-score[0, gone], kind="stable")][: given.shape[1]]
        x = np.full((1, mask.shape[1], 32), 7.0, np.float32)
        x[0, best] = given[0]
        found, real = sparsevlm.recycle(x, score, ~mask, most=len(gone), noise_BR=jnp.asarray(noise))
        assert real.all()
        np.testing.assert_allclose(found, SPARSE[f"merge{event}/out"], atol=1e-5)
        kept = sparsevlm.select(jnp.asarray(score), np.ones(mask.shape, bool), mask.sum(axis=1), most=int(mask.sum()))
        np.testing.assert_array_equal(kept, mask)
