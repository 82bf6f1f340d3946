"""Cuts between layers against a plain reading of each method, row by row, and what has to hold of all of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import naive_decoder
import numpy as np
import pytest
import tiny_model as tiny

from tokzip_jax import decoder_site, generate, layout, llm, stack, step, vlm
from tokzip_jax.config import MethodConfig
from tokzip_jax.masks import TABLES
from tokzip_jax.types import IMAGE_ID, PAD, TEXT, VISION

CFG, V = tiny.MODEL, 24
RNG = np.random.default_rng(3)
BLOCKS = tiny.params()["llm"]["layers"]
ANSWER = {"supervised": True}
# Two pictures with text between them; one, with an answer behind its question; text only; a picture of few tokens.
ROWS = [
    [[1, IMAGE_ID, 5, 6, IMAGE_ID, 7, 8, 9, 10, 11]],
    [[1, 4, IMAGE_ID, 7, 8, 9, 3], ([12, 13], ANSWER)],
    [[1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]],
    [[IMAGE_ID, 20, 21, 22]],
]
VALID = np.ones((4, 2, V), bool)
VALID[3, 0, [0, 5, *range(9, V)]] = False
METHODS = {
    "fastv": MethodConfig(decoder="fastv", decoder_layers=(1, 2), decoder_keep=(9, 5)),
    "fastv_paper": MethodConfig(decoder="fastv_paper", decoder_layers=(2,), decoder_keep=(5,)),
    "pyramiddrop": MethodConfig(decoder="pyramiddrop", decoder_layers=(1, 2), decoder_keep=(12, 3)),
    "sparsevlm": MethodConfig(decoder="sparsevlm", decoder_layers=(1, 2), decoder_keep=(10, 4)),
    "sparsevlm_v1": MethodConfig(
        decoder="sparsevlm_v1", decoder_layers=(1, 2), decoder_keep=(12, 6), decoder_scale=2.5, decoder_bias=1.0
    ),
    "sparsevlm_paper": MethodConfig(
        decoder="sparsevlm_paper", decoder_layers=(1, 2), decoder_keep=(20, 9), decoder_scale=0.4
    ),
    "sparsevlm_plus": MethodConfig(
        decoder="sparsevlm_plus", decoder_layers=(1, 2), decoder_keep=(9, 4), decoder_heads=2
    ),
}
expand = jax.jit(functools.partial(layout.expand, voco=0, voco_count=0))


def slots_of(rows=ROWS, valid=VALID, left=False):
    return expand(tiny.batch(rows, 12, left=left, count=2), valid)


def embeddings(slots, seed=0, same=True):
    """Random embeddings; the n-th real slot of a row has the same one on either padding side."""
    kind = np.asarray(slots.stream.kind)
    values = np.random.default_rng(seed).normal(size=(*kind.shape, CFG.llm.width)).astype(np.float32)
    x = np.zeros_like(values)
    for row in range(len(kind)):
        real = np.flatnonzero(kind[row] != PAD)
        x[row, real] = values[row, : len(real)]
    return x


@functools.partial(jax.jit, static_argnames="method")
def run(x, slots, method, blocks=BLOCKS):
    return decoder_site.run(CFG, blocks, x, slots, jnp.asarray(TABLES["visible"]), method, images=2, visual=V)[:2]


@functools.cache
def blocks64():
    return [jax.tree.map(np.float64, block) for block in stack.unstack(BLOCKS)]


def naive(x, slots, row, method):
    """The plain reading of a row of the batch."""
    stream = jax.tree.map(lambda leaf: np.asarray(leaf)[row], slots.stream)
    real = stream.kind != PAD
    answer = np.flatnonzero(np.asarray(slots.supervised)[row])
    prompt = np.arange(len(real)) < (answer[0] if len(answer) else len(real))
    picture = np.where(stream.kind == VISION, stream.segment, 0)
    plain = naive_decoder.Row(*(np.asarray(leaf)[real] for leaf in (x[row], stream.position, picture, prompt)))
    plain.x = plain.x.astype(np.float64)
    return naive_decoder.run(CFG.llm, blocks64(), method, plain)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_its_plain_reading(name, left):
    """States, order, pictures and position ids of all that is left, for each row of a batch on its own."""
    method, slots = METHODS[name], slots_of(left=left)
    x = embeddings(slots)
    hidden, found = jax.tree.map(np.asarray, run(x, slots, method))
    assert hidden.shape[1] < x.shape[1]
    for row in range(len(ROWS)):
        expected = naive(x, slots, row, method)
        real = found.stream.kind[row] != PAD
        np.testing.assert_array_equal(found.stream.position[row, real], expected.position)
        np.testing.assert_array_equal(
            np.where(found.stream.kind[row] == VISION, found.stream.segment[row], 0)[real], expected.picture
        )
        tiny.close(hidden[row, real], expected.x, atol=2e-4)
        # Text is never dropped, a visual token never there twice, and none is made up.
        before = np.asarray(slots.ids)[row]
        np.testing.assert_array_equal(found.ids[row][found.ids[row] > 0], before[before > 0])
        visual = found.visual[row][found.visual[row] >= 0]
        assert len(set(visual)) == len(visual) and set(visual) <= set(np.asarray(slots.visual)[row])
        # What is left stands together, each slot predicted from the one before it.
        np.testing.assert_array_equal(np.flatnonzero(real), np.arange(real.sum()))
        np.testing.assert_array_equal(found.previous[row][real], np.arange(-1, real.sum() - 1))
    assert np.asarray(found.supervised).sum() == 2


def test_budgets_are_met():
    slots = slots_of()
    x = embeddings(slots)
    five = [5, 5, 0, 5]
    counts = {"fastv": five, "fastv_paper": five, "pyramiddrop": [3, 3, 0, 3], "sparsevlm": five}
    for name, expected in counts.items():
        _, found = run(x, slots, METHODS[name])
        kind, segment = np.asarray(found.stream.kind), np.asarray(found.stream.segment)
        np.testing.assert_array_equal(np.sum((kind == VISION) & (segment == 1), axis=1), expected)
        np.testing.assert_array_equal(np.sum((kind == VISION) & (segment == 2), axis=1), [expected[0], 0, 0, 0])


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop"])
def test_masking_is_gathering(name):
    """Original position ids and compact ones."""
    slots = slots_of(left=True)
    x = embeddings(slots)
    short, left_over = run(x, slots, METHODS[name])
    whole, masked = run(x, slots, dataclasses.replace(METHODS[name], decoder_form="mask"))
    assert whole.shape == x.shape and short.shape[1] == x.shape[1] - 2 * (V - METHODS[name].decoder_keep[-1])
    for row in range(len(ROWS)):
        ours, theirs = (np.asarray(s.stream.kind)[row] != PAD for s in (left_over, masked))
        tiny.close(np.asarray(short)[row, ours], np.asarray(whole)[row, theirs], atol=1e-5)
        for field in ("ids", "visual", "supervised"):
            np.testing.assert_array_equal(
                np.asarray(getattr(left_over, field))[row, ours], np.asarray(getattr(masked, field))[row, theirs]
            )


def test_position_policies_differ_and_are_what_they_say():
    slots = slots_of()
    x = embeddings(slots)
    found = {}
    for policy in ("official", "compact"):
        method = dataclasses.replace(METHODS["fastv"], decoder_positions=policy)
        hidden, after = run(x, slots, method if policy == "compact" else METHODS["fastv"])
        real = np.asarray(after.stream.kind)[0] != PAD
        found[policy] = np.asarray(hidden)[0, real], np.asarray(after.stream.position)[0, real]
    assert np.abs(found["official"][0] - found["compact"][0]).max() > 1e-3
    np.testing.assert_array_equal(found["compact"][1], np.arange(len(found["compact"][1])))
    assert found["official"][1][-1] == np.asarray(slots.stream.position)[0].max()


def test_keeping_everything_is_the_plain_model():
    slots = slots_of()
    x = embeddings(slots)
    plain, _ = jax.jit(lambda x, s: llm.run_layers(CFG, BLOCKS, x, s.stream, TABLES["visible"]))(x, slots)
    real = np.asarray(slots.stream.kind) != PAD
    hidden, found = run(x, slots, dataclasses.replace(METHODS["sparsevlm"], decoder_keep=(V, V)))
    tiny.close(np.asarray(hidden)[real], np.asarray(plain)[real])
    np.testing.assert_array_equal(found.stream.kind, slots.stream.kind)


def test_the_choice_does_not_look_at_the_answer():
    """Other words behind the same question, marked as its answer, keep the same tokens; some other questions do not."""
    slots = slots_of()
    x = embeddings(slots)
    rng = np.random.default_rng(1)
    at = np.flatnonzero(np.asarray(slots.supervised)[1])

    def instead(where):
        other = x.copy()
        other[1, where] = 3 * rng.normal(size=(len(where), CFG.llm.width))
        return other

    rows = [x, instead(at), *(instead(np.arange(at[0] - 4, at[0])) for _ in range(5))]
    for name in METHODS:
        first, answered, *asked = (np.asarray(run(values, slots, METHODS[name])[1].visual)[1] for values in rows)
        np.testing.assert_array_equal(first, answered)
        assert not all(np.array_equal(first, other) for other in asked), name


def test_eager_is_jit_and_no_picture_compiles_again():
    slots, method = slots_of(), METHODS["fastv"]
    run(embeddings(slots), slots, method)
    programs = run._cache_size()
    left = slots_of(left=True)
    run(embeddings(left, 1), left, method)
    x = embeddings(slots, 2)
    jitted, _ = run(x, slots, method)
    assert run._cache_size() == programs
    eager, found = run.__wrapped__(x, slots, method)
    real = np.asarray(found.stream.kind) != PAD
    tiny.close(np.asarray(eager)[real], np.asarray(jitted)[real], atol=1e-4)


def test_a_split_stack_is_the_same_model():
    slots = slots_of()
    x = embeddings(slots)
    for name, expected in (("fastv", (1, 2)), ("fastv_paper", (1, 2)), ("pyramiddrop", (1, 2))):
        assert decoder_site.cuts(METHODS[name]) == expected
    assert decoder_site.cuts(MethodConfig()) == ()
    hidden, found = run(x, slots, METHODS["fastv_paper"])
    real = np.asarray(found.stream.kind) != PAD
    other, _ = run(x, slots, METHODS["fastv_paper"], stack.split(stack.join(BLOCKS), (1, 2)))
    tiny.close(np.asarray(other)[real], np.asarray(hidden)[real])


def test_gradients_are_those_of_finite_differences():
    """Through the merged tokens too; the weights' gradients are finite."""
    slots, method = slots_of(), METHODS["sparsevlm"]
    x = embeddings(slots)
    weights = RNG.normal(size=(CFG.llm.width,)).astype(np.float32)

    def loss(x, blocks):
        hidden, found = run.__wrapped__(x, slots, method, blocks)
        return jnp.sum(jnp.where((found.stream.kind == TEXT)[:, :, None], hidden * weights, 0))

    def value(x):
        hidden, found = run(x, slots, method)
        return np.sum(np.asarray(hidden, np.float64)[np.asarray(found.stream.kind) == TEXT] @ weights)

    of_x, of_blocks = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, BLOCKS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((of_x, of_blocks)))
    # A step so small that no choice changes.
    direction = RNG.normal(size=x.shape).astype(np.float32) * (np.asarray(slots.stream.kind) != PAD)[:, :, None]
    slope = (value(x + 1e-3 * direction) - value(x - 1e-3 * direction)) / 2e-3
    assert slope == pytest.approx(float(np.sum(of_x * direction)), rel=0.02)


QUESTIONS = [tiny.words(RNG, count) for count in (6, 3, 9)]


def rows_with(questions, answers=None):
    """One picture a row, a question, and an answer that is marked as such."""
    parts = [[tiny.PICTURE[:2], (question, {"thread": 1})] for question in questions]
    if answers is not None:
        parts = [[*part, (answer, {"thread": 1, **ANSWER})] for part, answer in zip(parts, answers)]
    return tiny.batch(parts, 16, left=answers is None)


def written(name):
    """A method, and what it answers to rows of different lengths, [3, 5]."""
    method = dataclasses.replace(METHODS[name], decoder_keep=(9, 4))
    batch, table = rows_with(QUESTIONS), TABLES["visible"]
    return method, np.asarray(tiny.answer(tiny.params(), batch, table, np.int32(0), np.int32(-1), method=method)[0])


@pytest.mark.parametrize("name", ["sparsevlm", "sparsevlm_v1", "sparsevlm_paper", "sparsevlm_plus", "pyramiddrop"])
def test_cached_decoding_is_a_full_pass_with_the_same_tokens(name):
    """Prefill drops once, and a whole pass over prompt and answer chooses the same and agrees."""
    method, tokens = written(name)
    batch = rows_with(QUESTIONS, tokens.tolist())
    logits, slots = tiny.forward(tiny.params(), batch, TABLES["visible"], np.int32(0), method=method)
    for row in range(3):
        text = tiny.logits_of_text(logits, slots, row, kind=TEXT)
        np.testing.assert_array_equal(np.argmax(text[-6:-1], axis=-1), tokens[row])


def test_scoring_is_what_a_greedy_decode_would_write():
    method, tokens = written("fastv")
    wrong = tokens.copy()
    wrong[[0, 2], [4, 0]] = wrong[[0, 2], [4, 0]] % 29 + 3
    score = jax.jit(lambda b: step.score_step(CFG, method, tiny.params(), b, questions=1, max_targets=5))
    assert np.asarray(score(rows_with(QUESTIONS, tokens.tolist()))).ravel().tolist() == [True] * 3
    assert np.asarray(score(rows_with(QUESTIONS, wrong.tolist()))).ravel().tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"2 questions a row, but decoder = 'fastv' chooses by one"):
        step.score_step(CFG, method, tiny.params(), {}, questions=2, max_targets=5)


def test_caches_are_as_long_as_what_each_run_of_layers_saw():
    method = METHODS["sparsevlm"]
    shapes = jax.eval_shape(
        lambda p, b: generate.prefill(CFG, p, b, method, max_new=3), tiny.params(), rows_with([[5], [6]])
    )
    # 16 patches: 10 + 1 merged, then 4 + 1; 16 text ids of which the picture is one, and three free slots.
    assert [(s.lo, s.hi, s.cache.k.shape) for s in shapes.stages] == [
        (lo, lo + 1, (1, 2, CFG.llm.kv_heads, 15 + visual + 3, CFG.llm.head_dim))
        for lo, visual in enumerate((16, 11, 5))
    ]


def test_sites_compose():
    """VisionZip before PyramidDrop, pooling before FastV."""
    zipped = MethodConfig(
        encoder="visionzip",
        tokens=8,
        options={"contextual": 2},
        decoder="pyramiddrop",
        decoder_layers=(1,),
        decoder_keep=(3,),
    )
    out = jax.eval_shape(lambda p, b: vlm.forward(CFG, p, b, zipped), tiny.params(), rows_with([[5, 6], [7]]))
    assert out.visual.tokens_BMD.shape == (2, 8, CFG.llm.width)
    assert out.hidden_BTD.shape == (*out.layout.ids.shape, CFG.llm.width) == (2, 15 + 3, CFG.llm.width)
    pooled = MethodConfig(projector="avgpool_linear", pool_grid=2)
    pooled = dataclasses.replace(pooled, decoder="fastv", decoder_layers=(1,), decoder_keep=(3,))
    assert [step.before for step in decoder_site.check(pooled, vlm.visual_slots(CFG, pooled), CFG.llm)] == [4]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder": "fast"}, "decoder = 'fast' is unknown; choose one of 'none', 'fastv'"),
        ({"decoder": "none"}, r"decoder_layers = \(1, 2\) and decoder_keep = \(9, 5\) need a decoder"),
        ({"decoder_keep": (9,)}, r"decoder_keep = \(9,\) must name one number of tokens for each layer"),
        ({"decoder_layers": (), "decoder_keep": ()}, "there must be at least one"),
        ({"decoder_layers": (2, 1)}, r"decoder_layers = \(2, 1\) must increase strictly and lie between 1 and 2"),
        ({"decoder_layers": (1, 3)}, "must increase strictly and lie between 1 and 2"),
        ({"decoder_layers": (0, 1)}, "must increase strictly and lie between 1 and 2"),
        ({"decoder_keep": (5, 9)}, "asks for 9 tokens at layer 2, where 5 arrive; it must lie between 1 and 5"),
        ({"decoder_keep": (25, 9)}, "asks for 25 tokens at layer 1, where 24 arrive"),
        ({"decoder_keep": (9, 0)}, "asks for 0 tokens at layer 2"),
        ({"decoder_form": "drop"}, "decoder_form = 'drop' is unknown; choose one of 'gather', 'mask'"),
        (
            {"decoder": "none", "decoder_layers": (), "decoder_keep": (), "decoder_form": "drop"},
            "decoder_form = 'drop' is unknown",
        ),
        ({"decoder_positions": "new"}, "decoder_positions = 'new' is unknown"),
        (
            {"voco": 2, "voco_mask": "voco"},
            "decoder = 'fastv' drops vision tokens that text reads, but under voco_mask",
        ),
        ({"decoder": "sparsevlm", "decoder_form": "mask"}, "decoder_form = 'mask' adds no tokens"),
        ({"decoder_scale": 1.0}, "decoder_scale = 1.0 is nothing that decoder = 'fastv' reads; leave it at 13.5"),
        ({"decoder": "sparsevlm_paper", "decoder_scale": 0.4, "decoder_bias": 1.0}, "decoder_bias = 1.0 is nothing"),
        ({"decoder": "sparsevlm_v1", "decoder_heads": 4}, "decoder_heads = 4 is nothing that decoder = 'sparsevlm_v1'"),
        (
            {"decoder": "none", "decoder_layers": (), "decoder_keep": (), "decoder_heads": 4},
            "decoder_heads = 4 is nothing that decoder = 'none' reads",
        ),
        (
            {"decoder": "none", "decoder_layers": (), "decoder_keep": (), "decoder_form": "mask"},
            "decoder_form = 'mask' is nothing that decoder = 'none' reads; leave it at 'gather'",
        ),
        ({"decoder": "sparsevlm_plus"}, "decoder_heads = 14 must lie between 1 and the model's 4 heads"),
        (
            {"decoder": "sparsevlm_v1", "decoder_scale": -1.0},
            "decoder_scale = -1.0 and decoder_bias = 0.0 must be >= 0",
        ),
        ({"decoder": "sparsevlm_paper"}, "decoder_scale = 13.5 must lie between 0 and 1: decoder = 'sparsevlm_paper'"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        decoder_site.check(dataclasses.replace(METHODS["fastv"], **fields), V, CFG.llm)


def test_several_questions_are_refused():
    threads = [([5, 6], {"thread": number}) for number in (1, 2)]
    slots = expand(tiny.batch([[[1, IMAGE_ID], *threads]], 12, count=2), np.ones((1, 2, V), bool))
    with pytest.raises(ValueError, match=r"a row holds several questions .* pack one a row"):
        run.__wrapped__(embeddings(slots), slots, METHODS["fastv"])
