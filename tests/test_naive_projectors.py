"""Projectors that compress against plain loops over tokens, heads and pixels, at shapes that no golden file has."""

import jax
import jax.numpy as jnp
import naive_projectors as naive
import numpy as np
import pytest
from test_projectors import drawn

from tokzip_jax import config as c
from tokzip_jax.compress import everything
from tokzip_jax.projectors import PROJECTORS, Context
from tokzip_jax.types import VisualTokens

WIDTH, OUTER, VOCABULARY, WORDS = 12, 8, 16, 5
RNG = np.random.default_rng(0)
CLS = RNG.standard_normal((2, WIDTH)).astype(np.float32)
IDS = RNG.integers(0, VOCABULARY, (2, WORDS)).astype(np.int32)
LENGTHS = (5, 2)  # of the second question three words are padding
REAL = np.arange(WORDS)[None] < np.array(LENGTHS)[:, None]


def model(grid, **sizes):
    """Three heads, one more word than a question has, and a picture of grid x grid patches."""
    sizes = {"queries": 3, "width": 6, "layers": 4, "heads": 3, "mlp_dim": 10, "text_length": WORDS + 1, **sizes}
    return c.ModelConfig(
        vit=c.VitConfig(image_size=grid, patch_size=1, width=WIDTH, heads=1),
        llm=c.LlmConfig(vocab_size=VOCABULARY, width=OUTER),
        projector=c.ProjectorConfig(**sizes),
    )


def patches(grid):
    return np.random.default_rng(grid).standard_normal((2, grid**2, WIDTH)).astype(np.float32)


def check(name, cfg, loop, visual=None, **options):
    """Both pictures of a batch are loop(parameters, patches, picture's number), in float64."""
    entry, method = PROJECTORS[name], c.MethodConfig(projector=name, **options)
    params = drawn(name, cfg)
    tokens = everything(jnp.asarray(patches(cfg.vit.grid))) if visual is None else visual
    entry.check("rows.x.method", cfg, method)

    @jax.jit
    def run(params, tokens, cls, ids, real):
        context = Context(cls_BD=cls, key=jax.random.key(0), question=(ids, real) if entry.question else None)
        return entry.apply(cfg, method, params, tokens, context)

    found = run(params, tokens, CLS, IDS, REAL)
    assert found.tokens_BMD.shape[1] == entry.count(cfg, method, tokens.tokens_BMD.shape[1])
    assert bool(found.valid_BM.all())
    for row in range(2):
        picture = np.asarray(tokens.tokens_BMD[row], np.float64)
        expected = loop(naive.wide(params), picture, row)
        np.testing.assert_allclose(found.tokens_BMD[row], expected, atol=1e-5, rtol=0)


def read(question, every):
    """The loop of either Q-Former, CLS in front of the patches."""

    def loop(params, picture, row):
        words = IDS[row, : LENGTHS[row]] if question else None
        return naive.qformer(params, np.concatenate([CLS[row : row + 1], picture]), words, every)

    return loop


READERS = {
    "one query": (4, 2, {"queries": 1}),
    "three queries, every layer reads the picture": (5, 1, {"layers": 2, "cross_every": 1}),
}


@pytest.mark.parametrize("case", READERS)
@pytest.mark.parametrize("name", ["qformer", "instructblip"])
def test_qformer(name, case):
    """Questions are of five words and of two."""
    grid, every, sizes = READERS[case]
    check(name, model(grid, **sizes), read(name == "instructblip", every))


@pytest.mark.parametrize(("grid", "content", "queries"), [(3, 0, 3), (4, 2, 1), (5, 1, 3)])
def test_llamavid(grid, content, queries):
    def loop(params, picture, row):
        cls = CLS[row].astype(np.float64)
        return naive.llamavid(params, cls, picture, IDS[row, : LENGTHS[row]], content)

    check("llamavid", model(grid, queries=queries, layers=2), loop, content_grid=content)


@pytest.mark.parametrize("grid", [1, 3, 4, 5])
def test_ldp(grid):
    check("ldp", model(grid), lambda params, picture, row: naive.ldp(params, picture))


@pytest.mark.parametrize(("grid", "pooled"), [(3, 2), (4, 4), (5, 3), (5, 1)])
def test_ldpv2(grid, pooled):
    """Windows that overlap (two of three, three of five), windows of one patch, and one window."""
    check("ldpv2", model(grid), lambda params, picture, row: naive.ldpv2(params, picture, pooled), pool_grid=pooled)


@pytest.mark.parametrize("keys", ["official", "paper"])
@pytest.mark.parametrize(("grid", "trained", "count"), [(3, 1, 0), (5, 4, 3), (3, 9, 0)])
def test_mqt(grid, trained, count, keys):
    """The queries' square is one place, smaller than the picture's grid, and as large."""

    def loop(params, picture, row):
        return naive.mqt(params, picture, range(grid**2), grid, count or trained, keys)

    check("mqt", model(grid, queries=trained), loop, queries=count, mqt_keys=keys)


PLACES = [[-1, 2, 3, 7], [0, 5, 8]]  # CLS and three patches; three patches and an empty slot


def selected():
    """What an encoder site passed on of the 3 x 3 pictures."""
    place = np.array([PLACES[0], [*PLACES[1], -1]])
    tokens = np.take_along_axis(patches(3), np.maximum(place, 0)[:, :, None], axis=1)
    tokens[0, 0] = CLS[0]
    valid = np.array([[True] * 4, [True] * 3 + [False]])
    source = np.full((2, 9), -1)
    for row, places in enumerate(PLACES):
        for slot, at in enumerate(places):
            source[row, at] = slot if at >= 0 else source[row, at]
    fields = tokens, valid, place.astype(np.int32), (place >= 0).astype(np.int32), source.astype(np.int32)
    return VisualTokens(*map(jnp.asarray, fields))


@pytest.mark.parametrize("name", ["instructblip", "mqt", "mqt paper"])
def test_behind_a_selection(name):
    """They read what was passed on, as it was, with nothing in front; MQT at the tokens' own places."""
    name, _, keys = name.partition(" ")

    def loop(params, picture, row):
        picture = picture[: len(PLACES[row])]
        if name == "mqt":
            return naive.mqt(params, picture, PLACES[row], 3, 4, keys or "official")
        return naive.qformer(params, picture, IDS[row, : LENGTHS[row]])

    options = {"mqt_keys": keys} if keys else {}
    check(name, model(3, queries=4, layers=2), loop, selected(), encoder="uniform", tokens=4, **options)
