"""ToMe and FOLDER between the halves of our vision tower's blocks, against a plain NumPy tower that merges there."""

import dataclasses
import functools

import jax
import merging
import numpy as np
import pytest
import tiny_model as tiny

from tokzip_jax import stack, vit
from tokzip_jax.attention import attend
from tokzip_jax.compress.folder import PENALTY
from tokzip_jax.compress.folder import between as folder_between
from tokzip_jax.compress.tome import between, merge_step, merged, removals

CFG = tiny.MODEL  # three blocks, of which the first two make the features; 16 patches
WINDOWS = dataclasses.replace(CFG, vit=dataclasses.replace(CFG.vit, window=2))
PIXELS = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
STEPS = {
    "tome": between(removals(16, 9, 2)),
    "folder": folder_between(16, 5, CFG.vit.feature_blocks - 1),
    "first": {0: functools.partial(merge_step, removed=6)},
}


@functools.partial(jax.jit, static_argnames=("name", "proportional", "signals", "summary", "cfg"))
def run(params, name, proportional=False, signals=(), summary=False, cfg=CFG):
    return vit.features(
        cfg, params, PIXELS, between=STEPS[name], proportional=proportional, signals=signals, summary=summary
    )


def visual(found):
    signals = found.signals
    return merged(found.patches_BPD, signals["position_BM"], signals["size_BM"], signals["source_BP"])


def norm(p, x):
    x = x - x.mean(axis=-1, keepdims=True)
    return p["scale"] * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) + p["bias"]


def apart(one, other, window):
    """A token of the 4 x 4 patches does not see another one: CLS sees all, others those whose windows they stand in."""
    if one["place"] == 0:
        return False
    if other["place"] == 0:
        return True
    return any(a // window != b // window for a, b in zip(*(divmod(t["place"] - 1, 4) for t in (one, other))))


def block(p, state, step, proportional, window=0):
    """One block on a list of tokens; `step` merges them between the halves."""
    x = np.array([token["x"] for token in state])
    y, a = norm(p["norm1"], x), p["attn"]
    q, k, v = (np.einsum("td,dnh->nth", y, a[n]["w"]) + a[n]["b"][:, None] for n in ("q", "k", "v"))
    logits = np.einsum("nth,nsh->nts", q, k) / np.sqrt(q.shape[-1])
    if proportional:
        logits += np.log([len(token["members"]) for token in state])
    if window:
        logits += np.array([[-np.inf if apart(one, other, window) else 0.0 for other in state] for one in state])
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    x = x + np.einsum("nts,nsh,nhd->td", weights, v, a["o"]["w"]) + a["o"]["b"]
    rows = zip(state, x, k.mean(axis=0), weights[:, 0].mean(axis=0))
    state = step([{**token, "x": xi, "metric": ki, "attention": ai} for token, xi, ki, ai in rows])
    m = p["mlp"]
    for token in state:
        hidden = norm(p["norm2"], token["x"]) @ m["up"]["w"] + m["up"]["b"]
        hidden = hidden / (1 + np.exp(-1.702 * hidden))
        token["x"] = token["x"] + hidden @ m["down"]["w"] + m["down"]["b"]
    return state


def tower(row, steps, proportional=False, blocks=2, window=0):
    """The tokens behind `blocks` blocks of one picture."""
    params = tiny.params()["vit"]
    first = np.asarray(vit.embed(CFG.vit, params, PIXELS)[row], float)
    state = merging.first_tokens(first, first)
    for p, step in zip(stack.unstack(params["layers"])[:blocks], steps, strict=True):
        state = block(jax.tree.map(lambda leaf: np.asarray(leaf, float), p), state, step, proportional, window)
    return state


def fold_all(state, removed):
    while removed:
        count = min((len(state) - 1) // 2, removed)
        state, removed = merging.step(state, count, protected=True, penalty=PENALTY), removed - count
    return state


PLAIN = {
    "tome": [functools.partial(merging.step, removed=count, protected=True) for count in removals(16, 9, 2)],
    "folder": [lambda state: state, functools.partial(fold_all, removed=11)],
    "first": [functools.partial(merging.step, removed=6, protected=True), lambda state: state],
}


@pytest.mark.parametrize(
    ("name", "proportional", "window"),
    [("tome", False, 0), ("tome", True, 0), ("folder", False, 0), ("tome", True, 2), ("folder", False, 2)],
)
def test_merges_as_the_plain_tower(name, proportional, window):
    found, _ = run(tiny.params()["vit"], name, proportional, cfg=WINDOWS if window else CFG)
    result = visual(found)
    merging.assert_books(result, 16)
    for row in range(2):
        expected = tower(row, PLAIN[name], proportional, window=window)
        merging.assert_same(result, row, expected, first=1, atol=1e-4)
        np.testing.assert_allclose(found.cls_BD[row], expected[0]["x"], atol=1e-4)


def test_sizes_count_in_the_signals_and_the_blocks_behind():
    """Merged in block 0 alone: signals of block 1 and of the last block are of merged tokens, weighed by their size."""
    params = tiny.params()["vit"]
    found, pooled = run(params, "first", True, signals=("cls_attention_BP", "keys_BSH", "last_keys_BSD"), summary=True)
    assert found.signals["last_keys_BSD"].shape == (2, 11, 16)
    for row in range(2):
        state = tower(row, PLAIN["first"][:1], True, blocks=1)
        seen = []
        weights = jax.tree.map(lambda leaf: np.asarray(leaf, float), stack.unstack(params["layers"])[1])
        state = block(weights, state, lambda tokens, seen=seen: seen.extend(dict(t) for t in tokens) or tokens, True)
        expected = np.array([token["attention"] for token in seen])[1:] * CFG.vit.heads
        np.testing.assert_allclose(found.signals["cls_attention_BP"][row], expected, atol=1e-5)
        np.testing.assert_allclose(found.signals["keys_BSH"][row], [token["metric"] for token in seen], atol=1e-4)
        last = tower(row, [*PLAIN["first"], lambda state: state], True, blocks=3)
        norm_p = jax.tree.map(np.asarray, params["post_norm"])
        np.testing.assert_allclose(pooled[row], norm(norm_p, last[0]["x"]), atol=1e-4)


def test_gradients_pass_through_the_merging():
    def loss(params):
        found, _ = run(params, "folder")
        return (found.patches_BPD**2).sum()

    grads = jax.jit(jax.grad(loss))(tiny.params()["vit"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    blocks = stack.unstack(grads["layers"])
    assert np.any(grads["patch"]["kernel"]) and all(np.any(p["mlp"]["up"]["w"]) for p in blocks[:2])


def test_what_cannot_be_is_one_sentence():
    with pytest.raises(
        ValueError, match=r"between: block 2 is not among those before the features; it must be 0 \.\. 1"
    ):
        vit.features(CFG, {}, PIXELS, between={2: merge_step})
    q = np.zeros((1, 1, 2, 4), np.float32)
    with pytest.raises(ValueError, match="attention='cudnn' takes no bias"):
        attend(q, q, q, bias=np.zeros((1, 2), np.float32), implementation="cudnn")
