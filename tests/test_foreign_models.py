"""VisionZip, ToMe and FastV on models that are not ours, with README's lines between: an NNX one, and a dict of arrays.

What was kept and merged is read once more by plain NumPy loops, from the arrays that went into README's functions.
"""

import functools
import types

import jax
import jax.numpy as jnp
import merging
import numpy as np
import pytest
import readme
from flax import nnx

WIDTH, HEADS, PATCHES, BLOCKS = 16, 2, 16, 2
TEXT, VISUAL, LAYERS = 6, 9, 3
zip_picture, merging_tower, fast_prefill = (
    readme.run(code)[name]
    for code, name in zip(
        readme.blocks("## In your own model"), ("zip_picture", "merging_tower", "fast_prefill"), strict=True
    )
)


class NnxBlock(nnx.Module):
    """A pre-norm ViT block, heads behind the tokens."""

    def __init__(self, rngs):
        heads = (HEADS, WIDTH // HEADS)
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.q, self.k, self.v = (nnx.LinearGeneral(WIDTH, heads, rngs=rngs) for _ in range(3))
        self.out = nnx.LinearGeneral(heads, WIDTH, axis=(-2, -1), rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def heads(self, x):
        x = self.norm1(x)
        return self.q(3 * x), self.k(3 * x), self.v(x)

    def attend(self, x, bias=None):
        bias = None if bias is None else bias[:, None, None, :]
        return x + self.out(jax.nn.dot_product_attention(*self.heads(x), bias=bias))

    def feed(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class NnxTower(nnx.Module):
    """Patches [B, P, 12] to blocks, with a CLS token."""

    def __init__(self, rngs):
        self.patch = nnx.Linear(12, WIDTH, rngs=rngs)
        self.cls = nnx.Param(jax.random.normal(rngs.params(), (1, 1, WIDTH)))
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(BLOCKS)])

    def embed(self, patches):
        cls = jnp.broadcast_to(self.cls[...], (len(patches), 1, WIDTH))
        return jnp.concatenate([cls, self.patch(patches)], axis=1)


class NnxLayer(nnx.Module):
    """A decoder layer: RMS norm, rotary positions, causal."""

    def __init__(self, rngs):
        heads = (HEADS, WIDTH // HEADS)
        self.norm1, self.norm2 = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
        self.q, self.k, self.v = (nnx.LinearGeneral(WIDTH, heads, use_bias=False, rngs=rngs) for _ in range(3))
        self.out = nnx.LinearGeneral(heads, WIDTH, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def heads(self, x, position):
        angle = (position[..., None] * 0.5 ** jnp.arange(WIDTH // HEADS // 2))[:, :, None]

        def turn(x):
            a, b = jnp.split(x, 2, axis=-1)
            return jnp.concatenate(
                [a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], -1
            )

        x = self.norm1(x)
        return turn(self.q(2 * x)), turn(self.k(2 * x)), self.v(x)

    def __call__(self, x, position, hidden=False):
        q, k, v = self.heads(x, position)
        seen = (position[:, :, None] >= position[:, None]) & ~jnp.broadcast_to(hidden, position.shape)[:, None]
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, mask=seen[:, None]))
        last = jnp.einsum("bnh,bsnh->bns", q[:, -1], k) * q.shape[-1] ** -0.5
        return x + self.down(nnx.silu(self.up(self.norm2(x)))), jax.nn.softmax(last, axis=-1)


def rms(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def draw(seed, count):
    """A dict model: blocks of arrays, one matrix for queries, keys and values, heads in front."""
    rng = np.random.default_rng(seed)
    head = WIDTH // HEADS
    shapes = {"qkv": (3, HEADS, WIDTH, head), "out": (HEADS, head, WIDTH), "up": (WIDTH, 32), "down": (32, WIDTH)}
    blocks = [{n: jnp.asarray(0.3 * rng.normal(size=s), jnp.float32) for n, s in shapes.items()} for _ in range(count)]
    return {"patch": 0.5 * rng.normal(size=(12, WIDTH)), "cls": rng.normal(size=(1, 1, WIDTH)), "blocks": blocks}


def dict_heads(w, x):
    return jnp.einsum("btd,cndh->cbnth", rms(x), w["qkv"])


def dict_attend(w, x, bias):
    """Softmax of logits + bias [B, N or 1, T or 1, S]."""
    q, k, v = dict_heads(w, x)
    weights = jax.nn.softmax(q @ k.mT * q.shape[-1] ** -0.5 + bias, axis=-1)
    return x + jnp.einsum("bnts,bnsh,nhd->btd", weights, v, w["out"]), weights


def dict_feed(w, x):
    return x + jnp.square(jax.nn.relu(rms(x) @ w["up"])) @ w["down"]


SLOPES = np.float32(0.5) ** np.arange(1, HEADS + 1, dtype=np.float32)[:, None, None]


def dict_layer(w, x, position, hidden=False):
    """A decoder layer with linear biases by distance (ALiBi)."""
    away = position[:, None, :, None] - position[:, None, None, :]
    hidden = jnp.broadcast_to(hidden, position.shape)[:, None, None, :]
    x, weights = dict_attend(w, x, jnp.where((away < 0) | hidden, -1e30, -SLOPES * away))
    return dict_feed(w, x), weights[:, :, -1]


def nnx_tower():
    """README's view of the NNX tower: embedding, (attention, MLP) of each block, queries and keys of each block."""
    tower = nnx.jit(lambda: NnxTower(nnx.Rngs(0)))()
    head_major = [lambda x, block=block: [part.swapaxes(1, 2) for part in block.heads(x)[:2]] for block in tower.blocks]
    pairs = [
        (lambda x, bias, block=block, heads=heads: (block.attend(x, bias), heads(x)[1]), block.feed)
        for block, heads in zip(tower.blocks, head_major)
    ]
    return tower.embed, pairs, head_major


def dict_tower():
    """The same of the dict."""
    weights = draw(0, BLOCKS)

    def embed(patches):
        cls = jnp.broadcast_to(weights["cls"], (len(patches), 1, WIDTH))
        return jnp.concatenate([cls, patches @ weights["patch"]], axis=1).astype(jnp.float32)

    heads = [lambda x, w=w: dict_heads(w, x)[:2] for w in weights["blocks"]]
    pairs = [
        (
            lambda x, bias, w=w: (dict_attend(w, x, bias[:, None, None])[0], dict_heads(w, x)[1]),
            functools.partial(dict_feed, w),
        )
        for w in weights["blocks"]
    ]
    return embed, pairs, heads


def nnx_decoder():
    """Layers, and what NumPy makes logits of: queries and keys [B, N, T, H] of a layer, and its bias by distance."""
    layers = nnx.jit(lambda: [NnxLayer(nnx.Rngs(seed)) for seed in range(LAYERS)])()
    heads = [lambda x, p, layer=layer: [part.swapaxes(1, 2) for part in layer.heads(x, p)[:2]] for layer in layers]
    return layers, heads, 0.0


def dict_decoder():
    weights = draw(1, LAYERS)["blocks"]
    layers = [functools.partial(dict_layer, w) for w in weights]
    return layers, [lambda x, p, w=w: dict_heads(w, x)[:2] for w in weights], SLOPES


TOWERS = pytest.mark.parametrize("tower", [nnx_tower, dict_tower])
PICTURES = np.random.default_rng(5).normal(size=(2, PATCHES, 12)).astype(np.float32)


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def zipped(x, q, k, dominant, contextual):
    """VisionZip of one picture by loops: [(patch or None, token, patches that it speaks for)]."""
    attention = softmax(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]))
    score, keys = attention[:, 0, 1:].sum(axis=0), k.mean(axis=0)[1:]
    keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    kept = sorted(sorted(range(PATCHES), key=lambda i: -score[i])[: dominant - 1])
    rest = [i for i in range(PATCHES) if i not in kept]
    targets = [rest[j * (len(rest) // contextual)] for j in range(contextual)]
    out = [(-1, x[0], [])] + [(i, x[1 + i], [i]) for i in kept]
    nearest = {i: max(targets, key=lambda t: keys[i] @ keys[t]) for i in rest if i not in targets}
    for target in targets:
        members = [i for i in nearest if nearest[i] == target]
        token = x[1 + target] + (np.mean([x[1 + i] for i in members], axis=0) if members else 0)
        out.append((target, token, [target, *members]))
    return out


@TOWERS
def test_visionzip(tower):
    embed, pairs, heads = tower()

    @jax.jit
    def run(patches):
        x = embed(patches)
        for attention, mlp in pairs:
            before = x
            x = mlp(attention(x, jnp.zeros(x.shape[:2]))[0])
        q, k = heads[-1](before)
        return x, q, k, zip_picture(x, q, k, dominant=6, contextual=3)

    x, q, k, found = jax.tree.map(np.asarray, run(PICTURES))
    for row in range(len(PICTURES)):
        expected = zipped(*(part[row].astype(np.float64) for part in (x, q, k)), dominant=6, contextual=3)
        np.testing.assert_array_equal(found.position_BM[row], [place for place, _, _ in expected])
        np.testing.assert_allclose(found.tokens_BMD[row], [token for _, token, _ in expected], atol=1e-5)
        for slot, (_, _, members) in enumerate(expected):
            np.testing.assert_array_equal(np.flatnonzero(found.source_BP[row] == slot), sorted(members))


@TOWERS
def test_tome(tower):
    """Block by block: what goes into an MLP is the plain merging of what came out of the attention."""
    embed, pairs, _ = tower()

    @jax.jit
    def run(patches):
        seen = []

        def spied(attention, mlp):
            def before(x, bias):
                out, keys = attention(x, bias)
                seen.append(types.SimpleNamespace(x=x, bias=bias, out=out, keys=keys))
                return out, keys

            def behind(x):
                seen[-1].merged, seen[-1].fed = x, mlp(x)
                return seen[-1].fed

            return before, behind

        found = merging_tower(embed(patches), [spied(*pair) for pair in pairs], 8)
        return found, [vars(block) for block in seen]

    found, seen = jax.tree.map(np.asarray, run(PICTURES))
    assert [block["x"].shape[1] for block in seen] == [17, 13] and found.tokens_BMD.shape == (2, 8, WIDTH)
    merging.assert_books(found, PATCHES)
    for row in range(len(PICTURES)):
        state = merging.first_tokens(seen[0]["x"][row], seen[0]["x"][row])
        for block in seen:
            np.testing.assert_array_equal([token["x"] for token in state], block["x"][row])
            np.testing.assert_allclose(
                np.exp(block["bias"][row]), [len(token["members"]) for token in state], rtol=1e-6
            )
            for token, x, key in zip(state, block["out"][row], block["keys"][row].mean(axis=0), strict=True):
                token |= {"x": x.astype(np.float64), "metric": key.astype(np.float64)}
            state = merging.step(state, 4, protected=True)
            np.testing.assert_allclose(block["merged"][row], [token["x"] for token in state], atol=1e-5)
            for token, x in zip(state, block["fed"][row], strict=True):
                token["x"] = x
        merging.assert_same(found, row, state, first=1)


@pytest.mark.parametrize("decoder", [nnx_decoder, dict_decoder])
def test_fastv(decoder):
    """The best by full attention are kept, and what is left goes on as if the others were hidden where they stand."""
    layers, heads, slopes = decoder()
    first, keep, cut = 2, 4, 2
    x = np.random.default_rng(7).normal(size=(2, first + VISUAL + TEXT, WIDTH)).astype(np.float32)
    length = x.shape[1]
    position = np.broadcast_to(np.arange(length), x.shape[:2])

    @jax.jit
    def run(x):
        between = x
        for layer in layers[: cut - 1]:
            between, _ = layer(between, position)
        return fast_prefill(x, layers, cut, first, VISUAL, keep), heads[cut - 1](between, position)

    (found, places), (q, k) = jax.tree.map(np.asarray, run(x))
    logits = q.astype(np.float64) @ k.swapaxes(2, 3).astype(np.float64) / np.sqrt(q.shape[-1])
    away = np.arange(length)[:, None] - np.arange(length)
    weights = softmax(np.where(away < 0, -np.inf, logits - slopes * away))
    score = weights[:, :, -1, first : first + VISUAL].mean(axis=1)
    kept = first + np.sort(np.argsort(-score, axis=1)[:, :keep], axis=1)
    text = [*range(first), *range(first + VISUAL, length)]
    expected = np.sort(np.concatenate([kept, np.broadcast_to(text, (2, len(text)))], axis=1), axis=1)
    np.testing.assert_array_equal(places, expected)
    assert len(set(map(tuple, kept))) == 2  # rows choose for themselves

    @jax.jit
    def masked(x, hidden):
        for number, layer in enumerate(layers):
            x, _ = layer(x, position, hidden if number >= cut else False)
        return x

    hidden = np.ones((2, length), bool)
    np.put_along_axis(hidden, expected, False, axis=1)
    whole = np.asarray(masked(x, hidden))
    np.testing.assert_allclose(found, np.take_along_axis(whole, expected[:, :, None], axis=1), atol=1e-5)
