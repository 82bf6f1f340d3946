"""The vision tower against a plain NumPy one in float64, its signals, and what it does not run."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model as tiny

from tokzip_jax import stack, vit

CFG = tiny.MODEL
PIXELS = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
ALL = vit.FEATURE_SIGNALS + vit.LAST_SIGNALS


def config(feature_layer=-2, **changes):
    tower = dataclasses.replace(CFG.vit, feature_layer=feature_layer, **changes)
    return dataclasses.replace(CFG, vit=tower)


def params(cfg):
    """The tiny tower's parameters, stored as this config stores them."""
    tower = tiny.params()["vit"]
    return {**tower, "layers": stack.split(stack.join(tower["layers"]), vit.cuts(cfg.vit))}


@functools.partial(jax.jit, static_argnums=0, static_argnames=("signals", "summary"))
def run(cfg, params, pixels, signals=ALL, summary=True):
    return vit.features(cfg, params, pixels, signals=signals, summary=summary)


def norm(p, x, eps=1e-5):
    x = x - x.mean(axis=-1, keepdims=True)
    return p["scale"] * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) + p["bias"]


ACTIVATIONS = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
}


def tower(activation="quick_gelu", window=4):
    """CLIP's vision tower, block by block: the states (block 0's input first), attention weights, queries and keys."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tiny.params()["vit"])
    side, grid = 8, 4
    patches = [
        np.einsum("hwc,hwcd->d", picture[r * side : (r + 1) * side, c * side : (c + 1) * side], p["patch"]["kernel"])
        for picture in PIXELS.astype(np.float64)
        for r in range(grid)
        for c in range(grid)
    ]
    x = np.concatenate([np.tile(p["cls"], (2, 1, 1)), np.array(patches).reshape(2, 16, -1)], axis=1) + p["pos"]
    x = norm(p["pre_norm"], x)
    blocks = stack.unstack(p["layers"])
    out = {"states": [x], "weights": [], "q": [], "k": []}
    for block in jax.tree.map(np.asarray, blocks):
        y = norm(block["norm1"], x)
        a = block["attn"]
        q, k, v = (np.einsum("btd,dnh->bnth", y, a[n]["w"]) + a[n]["b"][:, None] for n in ("q", "k", "v"))
        logits = np.einsum("bnth,bnsh->bnts", q, k) / np.sqrt(q.shape[-1])
        for one, other in np.ndindex(16, 16):
            if any(a // window != b // window for a, b in zip(divmod(one, 4), divmod(other, 4))):
                logits[:, :, 1 + one, 1 + other] = -np.inf
        if window < 4:
            logits[:, :, 1:, 0] = -np.inf
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed = np.einsum("bnts,bnsh->bnth", weights, v)
        x = x + np.einsum("bnth,nhd->btd", mixed, a["o"]["w"]) + a["o"]["b"]
        m = block["mlp"]
        hidden = ACTIVATIONS[activation](norm(block["norm2"], x) @ m["up"]["w"] + m["up"]["b"])
        x = x + hidden @ m["down"]["w"] + m["down"]["b"]
        out["states"].append(x)
        for name, value in (("weights", weights), ("q", q), ("k", k)):
            out[name].append(value)
    out["summary"] = norm(p["post_norm"], x[:, 0])
    return out


@pytest.mark.parametrize(
    ("feature_layer", "activation", "window"),
    [(-2, "quick_gelu", 0), (-1, "quick_gelu", 0), (-2, "gelu", 0), (-2, "quick_gelu", 2)],
)
def test_features_and_signals_are_those_of_the_naive_tower(feature_layer, activation, window):
    cfg = config(feature_layer, activation=activation, window=window)
    found, pooled = run(cfg, params(cfg), PIXELS)
    naive = tower(activation, window or 4)
    block = 3 + feature_layer  # whose output the features are
    tiny.close(found.patches_BPD, naive["states"][block + 1][:, 1:])
    tiny.close(found.cls_BD, naive["states"][block + 1][:, 0])
    tiny.close(pooled, naive["summary"])
    # Signals of the feature layer's block ...
    tiny.close(found.signals["cls_attention_BP"], naive["weights"][block][:, :, 0, 1:].sum(axis=1))
    tiny.close(found.signals["keys_BSH"], naive["k"][block].mean(axis=1))
    # ... and of the last one, heads side by side.
    for name, heads in (("last_queries_BSD", naive["q"][-1]), ("last_keys_BSD", naive["k"][-1])):
        tiny.close(found.signals[name], heads.swapaxes(1, 2).reshape(2, 17, 16))


def test_windows_drawn():
    mask = vit.window_mask(dataclasses.replace(CFG.vit, image_size=16, window=1))
    assert mask[0].astype(int).tolist() == [
        [1, 1, 1, 1, 1],
        [0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert vit.window_mask(CFG.vit) is None


def test_a_patch_is_about_its_own_window_and_cls_about_everything():
    """By gradient: which pixels the features of patch 5 (second row and column of 4 x 4) and of CLS depend on."""
    cfg = config(window=2)

    def read(pixels):
        found, _ = vit.features(cfg, params(cfg), pixels)
        return jnp.sum(jnp.sin(found.patches_BPD[:, 5])), jnp.sum(jnp.sin(found.cls_BD))

    patch, cls = (np.abs(grad).sum(axis=(0, 3)) for grad in jax.jit(jax.jacrev(read))(PIXELS))
    assert patch[:16, :16].min() > 0 and cls.min() > 0
    patch[:16, :16] = 0
    assert not patch.any()


def test_cls_attention_leaves_out_the_cls_column_only():
    cfg = config()
    found, _ = run(cfg, params(cfg), PIXELS)
    own = tower()["weights"][1][:, :, 0, 0].sum(axis=1)
    tiny.close(found.signals["cls_attention_BP"].sum(axis=1) + own, [CFG.vit.heads] * 2)


def blocks_run(program, *args):
    """Turns of all loops in a program."""
    return sum(int(turns) for turns in re.findall(r"\blength=(\d+)", str(jax.make_jaxpr(program)(*args))))


@pytest.mark.parametrize(
    ("feature_layer", "signals", "summary", "expected"),
    [
        (-2, (), False, 2),
        (-2, vit.FEATURE_SIGNALS, False, 2),
        (-2, (), True, 3),
        (-2, ("last_keys_BSD",), False, 3),
        (-3, vit.FEATURE_SIGNALS, False, 1),
        (-1, ALL, True, 3),
    ],
)
def test_blocks_behind_the_last_one_needed_are_not_run(feature_layer, signals, summary, expected):
    cfg = config(feature_layer)
    program = functools.partial(vit.features, cfg, signals=signals, summary=summary)
    assert blocks_run(program, params(cfg), PIXELS) == expected
    assert set(jax.eval_shape(program, params(cfg), PIXELS)[0].signals) == set(signals)


def test_cuts_stand_behind_the_features():
    assert vit.cuts(config(-2).vit) == (2,) and vit.cuts(config(-1).vit) == () == vit.cuts(config(-4).vit)
    assert stack.sizes(jax.eval_shape(lambda key: vit.init(CFG.vit, key), jax.random.key(0))["layers"]) == [2, 1]


def test_pictures_are_independent():
    cfg = config()
    both, _ = run(cfg, params(cfg), PIXELS)
    swapped, _ = run(cfg, params(cfg), PIXELS[::-1])
    tiny.close(swapped.patches_BPD[::-1], both.patches_BPD, atol=1e-6)


def test_normalise_is_clips():
    picture = np.zeros((1, 1, 2, 3), np.uint8)
    picture[0, 0, 1] = 255
    found = vit.normalise(picture)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    np.testing.assert_allclose(found[0, 0], [-mean / std, (1 - mean) / std], rtol=1e-6)
    assert vit.normalise(picture, jnp.bfloat16).dtype == jnp.bfloat16


def test_what_cannot_be_is_one_sentence():
    with pytest.raises(ValueError, match=r"unknown vision signals \['attention'\]; there are .*'keys_BSH'"):
        vit.features(CFG, {}, PIXELS, signals=("attention",))
    with pytest.raises(ValueError, match=r"pictures of shape \(16, 32, 3\) do not fit a tower for \(32, 32, 3\)"):
        vit.features(CFG, {}, PIXELS[:, :16])
