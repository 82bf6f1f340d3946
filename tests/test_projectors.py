"""Every projector by itself: the struct it returns, independence of pictures, gradients, counts, FLOPs."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokzip_jax import config as c
from tokzip_jax.compress import everything, uniform
from tokzip_jax.compress.downsample import positions_matrix
from tokzip_jax.paths import flatten
from tokzip_jax.projectors import OPTIONS, PROJECTORS, Context, ldp

CFG = c.ModelConfig(
    vit=c.VitConfig(image_size=16, patch_size=4, width=12, heads=2),
    llm=c.LlmConfig(vocab_size=32, width=16),
    projector=c.ProjectorConfig(queries=9, width=8, layers=4, heads=2, mlp_dim=16, text_length=5),
)
OPTION = {
    "avgpool_linear": {"pool_grid": 4, "pool_rows": 1},
    "pool_linear": {"factor": 3},
    "pool_mlp": {"factor": 2, "pool": "max"},
    "mlp_pool": {"factor": 3, "pool": "bilinear"},
    "nested_pool": {"level": 1},
    "ldpv2": {"pool_grid": 2},
    "llamavid": {"content_grid": 2},
    "mqt": {"queries": 7},
}
METHODS = {name: c.MethodConfig(projector=name, **OPTION.get(name, {})) for name in PROJECTORS}
DRAWN = {name: dataclasses.replace(METHODS[name], draw_budget=True) for name in ("nested_pool", "mqt")}
DRAWN["nested_pool"] = dataclasses.replace(DRAWN["nested_pool"], level=0)
OTHER = {"mqt": c.MethodConfig(projector="mqt", mqt_keys="paper")}
CASES = {**METHODS, **{f"{name} drawn": m for name, m in DRAWN.items()}, **{f"{n} too": m for n, m in OTHER.items()}}
COUNTS = {
    "mlp2x_gelu": 16, "linear": 16, "avgpool_linear": 4, "pool_linear": 1, "pool_mlp": 4, "mlp_pool": 4,
    "nested_pool": 4, "pixel_unshuffle": 4, "ldp": 4, "ldpv2": 4, "qformer": 9, "instructblip": 9, "llamavid": 5,
    "mqt": 7, "nested_pool drawn": 16, "mqt drawn": 7, "mqt too": 9,
}  # fmt: skip
RNG = np.random.default_rng(0)
PATCHES = RNG.standard_normal((3, 16, 12)).astype(np.float32)
CLS = RNG.standard_normal((3, 12)).astype(np.float32)
IDS = RNG.integers(1, 32, (3, 5)).astype(np.int32)
REAL = np.arange(5)[None] < np.array([[5], [2], [3]])
KEYS = jax.random.split(jax.random.key(1), 3)


def drawn(name, cfg):
    """Parameters drawn by NumPy, no two alike and none of them zero; NumPy arrays, since who asks may be under jit."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        if path.endswith("scale"):
            return rng.uniform(0.5, 1.5, leaf.shape)
        fan = np.prod(leaf.shape[:-1]) if path.endswith("/w") else 4
        return rng.normal(size=leaf.shape) * 1.5 / np.sqrt(min(fan, 16))

    shapes = jax.eval_shape(functools.partial(PROJECTORS[name].init, cfg), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: draw(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf).astype(leaf.dtype),
        shapes,
    )


@functools.cache
def params(name):
    """Parameters of a projector of `CFG`."""
    return drawn(name, CFG)


def apply(case, params, patches, cls, ids, real, keys):
    entry = PROJECTORS[CASES[case].projector]
    context = Context(cls_BD=cls, key=keys, question=(ids, real) if entry.question else None)
    return entry.apply(CFG, CASES[case], params, everything(patches), context)


TRACES = collections.Counter()  # of the program of a case


@functools.cache
def program(case):
    """Jitted (parameters, patches, CLS, ids, validity, keys) -> (gradients of a drawn sum of the tokens, tokens).

    The gradients are those with respect to parameters and patches.
    """
    probe = np.random.default_rng(2).standard_normal((COUNTS[case], CFG.llm.width)).astype(np.float32)

    def loss(*inputs):
        TRACES[case] += 1
        out = apply(case, *inputs)
        return jnp.sum(jnp.where(out.valid_BM[:, :, None], out.tokens_BMD * probe[None], 0)), out

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))


def outcome(case, order=(0, 1, 2), **other):
    """Gradients and tokens of the three pictures, in an order of choice and with some of the inputs replaced."""
    order = np.array(order)
    inputs = {"patches": PATCHES, "cls": CLS, "ids": IDS, "real": REAL} | other
    return program(case)(params(CASES[case].projector), *(x[order] for x in inputs.values()), KEYS[order])


def test_every_option_is_read_by_somebody_and_set_in_a_case():
    assert set(COUNTS) == set(CASES)
    for name, default in OPTIONS.items():
        assert name == "unshuffle_order" or any(getattr(method, name) != default for method in CASES.values()), name


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_their_struct(case):
    method, entry = CASES[case], PROJECTORS[CASES[case].projector]
    _, out = outcome(case)
    slots = entry.count(CFG, method, 16)
    assert out.tokens_BMD.shape == (3, slots, CFG.llm.width) == (3, COUNTS[case], 16)
    assert out.valid_BM.shape == (3, slots) and out.valid_BM.dtype == bool
    assert out.position_BM.dtype == out.size_BM.dtype == out.source_BP.dtype == jnp.int32
    assert np.all(np.asarray(out.valid_BM).sum(axis=1) >= 1) and ("drawn" in case or bool(out.valid_BM.all()))
    for row in range(3):
        source, place = np.asarray(out.source_BP[row]), np.asarray(out.position_BM[row])
        assert source.shape == (16,) and source.max() < slots
        np.testing.assert_array_equal(out.size_BM[row], np.bincount(source[source >= 0], minlength=slots))
        assert np.all(np.asarray(out.valid_BM[row])[source[source >= 0]])
        # A token with a place stands on a patch of its own.
        placed = np.flatnonzero(np.asarray(out.size_BM[row]) > 0)
        np.testing.assert_array_equal(source[place[placed]], placed)
        assert np.all(place[np.asarray(out.valid_BM[row]) & (np.asarray(out.size_BM[row]) == 0)] == -1)


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_independent(case):
    """In another order they give the same in that order, and nothing of one is in another."""
    _, out = outcome(case)
    order = np.array([2, 0, 1])
    _, moved = outcome(case, order)
    changed = {"patches": PATCHES, "cls": CLS, "ids": IDS}
    changed = {name: np.concatenate([x[:1, ..., ::-1], x[1:]]) for name, x in changed.items()}
    _, other = outcome(case, **changed)
    for a, b, c_ in zip(*(jax.tree.leaves(tokens) for tokens in (out, moved, other)), strict=True):
        np.testing.assert_allclose(a[order], b, atol=1e-5)
        np.testing.assert_allclose(a[1:], c_[1:], atol=1e-5)
    assert np.abs(out.tokens_BMD[0] - other.tokens_BMD[0]).max() > 1e-3


# A constant added to all keys changes no softmax.
IDLE = re.compile(r"(.*/)?(attn|cross)/k/b|key/b")
IDLE_OF = {"mqt": {"norm2/bias"}}  # there it is a constant of the keys alone


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_a_finite_gradient(case):
    (grads, _), _ = outcome(case)
    largest = {path: float(jnp.abs(leaf).max()) for path, leaf in flatten(grads).items()}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    most = max(largest.values())
    for path, value in largest.items():
        if IDLE.fullmatch(path) or path in IDLE_OF.get(CASES[case].projector, ()):
            assert value < 1e-6 * most, path
        else:
            assert value > 5e-6 * most, path


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_odd_pictures(case):
    """Pictures of zeros and of one patch again and again, and questions without a word: finite, and no new program."""
    (_, moved), _ = outcome(case)
    assert np.all(np.abs(moved).max(axis=(1, 2)) > 1e-4)
    alike = np.concatenate([np.zeros_like(PATCHES[:2]), np.broadcast_to(PATCHES[2:, :1], PATCHES[2:].shape)])
    odd = outcome(case, patches=alike, cls=np.zeros_like(CLS), real=np.zeros_like(REAL))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(odd))
    assert TRACES[case] == 1


def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("case", METHODS)
def test_compiled_is_eager(case):
    weights = jax.tree.map(jnp.asarray, params(case))
    close(apply(case, weights, *map(jnp.asarray, (PATCHES, CLS, IDS, REAL)), KEYS), outcome(case)[1])


@pytest.mark.parametrize("case", METHODS)
def test_a_batch_is_its_pictures_one_by_one(case):
    """Each a batch of its own, along a new axis in front."""
    run = jax.jit(jax.vmap(functools.partial(apply, case), (None, 0, 0, 0, 0, 0)))
    alone = run(params(case), *(x[:, None] for x in (PATCHES, CLS, IDS, REAL, KEYS)))
    close(jax.tree.map(lambda x: x[:, 0], alone), outcome(case)[1])


@pytest.mark.parametrize("case", ["instructblip", "llamavid"])
def test_only_real_words_are_read(case):
    _, out = outcome(case)
    _, padded = outcome(case, ids=np.where(REAL, IDS, 31 - IDS))
    np.testing.assert_array_equal(out.tokens_BMD, padded.tokens_BMD)
    _, asked = outcome(case, ids=np.where(REAL, 31 - IDS, IDS))
    assert np.abs(out.tokens_BMD - asked.tokens_BMD).max(axis=(1, 2)).min() > 1e-3


def test_drawn_budgets():
    """The levels and counts that are drawn, over many pictures: all of them, about equally often, by key alone."""
    many = everything(jnp.zeros((2000, 16, 12)))
    for name, sizes in (("nested_pool", [1, 4, 16]), ("mqt", [2, 4, 6])):
        entry = PROJECTORS[name]

        def count(params, key, entry=entry, name=name):
            context = Context(cls_BD=jnp.zeros((2000, 12)), key=key)
            return entry.apply(CFG, DRAWN[name], params, many, context).valid_BM.sum(axis=1)

        found = np.asarray(jax.jit(count)(params(name), jax.random.key(5)))
        assert sorted(set(found.tolist())) == sizes
        # A third each: 667 +- 21 (one standard deviation).
        assert all(abs(np.sum(found == size) - 2000 / 3) < 5 * 21 for size in sizes)


def test_fewer_queries_are_the_first_ones():
    """MQT: the tail is dropped, the rest does not know it."""
    whole = CASES["mqt too"]
    few = dataclasses.replace(whole, queries=3)
    context = Context(cls_BD=CLS, key=KEYS)
    apply = functools.partial(PROJECTORS["mqt"].apply, CFG)
    run = jax.jit(lambda p: [apply(m, p, everything(PATCHES), context).tokens_BMD for m in (whole, few)])
    every, first = run(params("mqt"))
    np.testing.assert_allclose(first, every[:, :3], atol=1e-6)


def test_queries_read_what_an_encoder_site_passed_on():
    """Behind a selection: the tokens that came, at their own places; padding slots are not seen."""
    some = uniform(PATCHES, tokens=5)
    padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:, :2]], axis=1), some)
    padded = dataclasses.replace(padded, source_BP=some.source_BP, valid_BM=jnp.arange(7)[None] < jnp.array([[5]] * 3))
    shifted = dataclasses.replace(some, position_BM=some.position_BM + 1)
    for name in ("qformer", "mqt"):
        method = dataclasses.replace(CASES[name], encoder="uniform", tokens=5)

        @jax.jit
        def run(tokens, name=name, method=method):
            return PROJECTORS[name].apply(CFG, method, params(name), tokens, Context(cls_BD=CLS, key=KEYS)).tokens_BMD

        np.testing.assert_allclose(run(some), run(padded), atol=1e-5)
        moved = np.abs(run(some) - run(shifted)).max()
        assert (moved > 1e-3) == (name == "mqt")


def cubic(distance):
    """Keys' kernel with a = -0.75."""
    d, a = abs(distance), -0.75
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


@pytest.mark.parametrize(("source", "target"), [(16, 24), (3, 4), (4, 3), (5, 5), (1, 4)])
def test_bicubic_weights(source, target):
    expected = np.zeros((target, source))
    for i in range(target):
        at = (i + 0.5) * source / target - 0.5
        for tap in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            expected[i, min(max(tap, 0), source - 1)] += cubic(at - tap)
    np.testing.assert_allclose(positions_matrix(source, target), expected, atol=1e-12)


@pytest.mark.parametrize(("side", "stride"), [(7, 2), (4, 2), (5, 1)])
def test_depthwise_equals_the_loop(side, stride):
    x, kernel = RNG.standard_normal((2, side, side, 3)), RNG.standard_normal((3, 3, 3))
    out = (side - 1) // stride + 1
    expected = np.zeros((2, out, out, 3))
    for y, x_, dy, dx in np.ndindex(out, out, 3, 3):
        row, column = y * stride + dy - 1, x_ * stride + dx - 1
        if 0 <= row < side and 0 <= column < side:
            expected[:, y, x_] += x[:, row, column] * kernel[dy, dx]
    found = jax.jit(ldp.depthwise, static_argnums=2)(kernel.astype(np.float32), x.astype(np.float32), stride)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_squeezed_widths():
    # MobileVLM's widths, and small ones where rounding matters.
    assert [ldp.squeezed(width) for width in (2048, 2560, 4096, 32, 44, 16)] == [512, 640, 1024, 8, 16, 8]


REAL_SIZE = c.ModelConfig(
    llm=c.LlmConfig(width=2048, vocab_size=1000),
    projector=c.ProjectorConfig(queries=256, heads=16, layers=2, text_length=64),
    attention="einsum",  # blocks are gone through in a loop, whose body XLA counts once
)
FLOPS = METHODS | {
    "llamavid": c.MethodConfig(projector="llamavid", content_grid=12),
    "mqt": c.MethodConfig(projector="mqt"),
}


@pytest.mark.parametrize("name", PROJECTORS)
def test_flops_within_five_percent_of_xla(name):
    """One picture of CLIP-L, one group of Q-Former layers (XLA counts a loop's body once)."""
    method, entry = FLOPS[name], PROJECTORS[name]
    shapes = jax.eval_shape(functools.partial(entry.init, REAL_SIZE), jax.random.key(0))

    def run(params, patches, cls, ids):
        context = Context(cls_BD=cls, key=jax.random.key(0), question=(ids, ids > 0) if entry.question else None)
        return entry.apply(REAL_SIZE, method, params, everything(patches), context).tokens_BMD

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    lowered = jax.jit(run).lower(shapes, shape(1, 576, 1024), shape(1, 1024), shape(1, 64, dtype=jnp.int32))
    counted = lowered.cost_analysis()["flops"]
    assert entry.flops(REAL_SIZE, method, 576, 64) == pytest.approx(counted, rel=0.05)
