"""Whole rows through the whole model: padding, packing and batches change nothing; cached decoding is the long way."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model as tiny

from tokzip_jax import compress, generate, llm, vlm
from tokzip_jax.config import MethodConfig
from tokzip_jax.masks import TABLES
from tokzip_jax.types import IMAGE_ID, PAD, TEXT, VISION, VOCO, VOCO_ID, VisualTokens

CFG = tiny.MODEL
RNG = np.random.default_rng(0)
QUESTIONS = [tiny.words(RNG, count) for count in (6, 4, 8, 1)]
# Pictures with BOS, with a separator and without a prefix, and a row of text only.
STARTS = [tiny.PICTURE, [1, IMAGE_ID, 8, VOCO_ID], [IMAGE_ID, VOCO_ID], [1]]
ROWS = list(zip(STARTS, QUESTIONS))
K = 3


def rows(parts, length=16, **options):
    return tiny.batch([list(row) for row in parts], length, **options)


def text_logits(batch, table="voco", count=K, params=None):
    """The logits of the text slots, row by row."""
    logits, slots = tiny.forward(params or tiny.params(), batch, TABLES[table], np.int32(count))
    return [tiny.logits_of_text(logits, slots, row, kind=TEXT) for row in range(len(slots.ids))]


@pytest.mark.parametrize("table", TABLES)
def test_padding_side_changes_nothing(table):
    for left, right in zip(text_logits(rows(ROWS, left=True), table), text_logits(rows(ROWS), table)):
        tiny.close(left, right)


def test_one_by_one_is_the_batch():
    """Rows of different lengths, each alone in a batch of one."""
    together = text_logits(rows(ROWS))
    for number, row in enumerate(ROWS):
        batch = {**rows([row]), "images": tiny.images(4)[number : number + 1]}
        tiny.close(text_logits(batch)[0], together[number])


def test_pictures_matter_and_text_only_rows_have_none():
    other = {**rows(ROWS), "images": tiny.images(4, seed=1)}
    for table in TABLES:
        differ = [np.abs(a - b).max() for a, b in zip(text_logits(rows(ROWS), table), text_logits(other, table))]
        assert min(differ[:3]) > 0.05 and differ[3] == 0
    tiny.close(text_logits(rows(ROWS), "voco")[3], text_logits(rows(ROWS), "visible")[3], atol=1e-6)


def test_unused_voco_slots_are_as_if_there_were_none():
    """Of the eight slots none in use: a model whose rows have no VoCo placeholder."""
    without = [([token for token in start if token != VOCO_ID], question) for start, question in ROWS]
    for found, expected in zip(text_logits(rows(ROWS), "visible", 0), text_logits(rows(without), "visible", 5)):
        # The separator is text where no VoCo tokens follow.
        tiny.close(found[-4:], expected[-4:])


def test_packed_questions_are_separate_questions():
    """Four questions about one picture in one row, in any order."""
    order = [2, 0, 3, 1]
    threads = [(QUESTIONS[q], {"thread": number}) for number, q in enumerate(order, start=1)]
    packed = {**tiny.batch([[tiny.PICTURE, *threads]] * 4, 22), "images": tiny.images(1).repeat(4, 0)}
    alone = {**rows([(tiny.PICTURE, question) for question in QUESTIONS]), "images": tiny.images(1).repeat(4, 0)}
    for table in TABLES:
        logits, slots = tiny.forward(tiny.params(), packed, TABLES[table], np.int32(K))
        separate = text_logits(alone, table)
        for number, q in enumerate(order, start=1):
            tiny.close(tiny.logits_of_text(logits, slots, 0, thread=number), separate[q])


def test_packed_samples_are_separate_samples():
    """Two pictures and a text-only sample in one row."""
    marks = [{"sample": number} for number in (1, 2, 3)]
    first, second, third = ROWS[0], (STARTS[2], QUESTIONS[3]), (STARTS[3], [7, 8])
    parts = [(ids, mark) for sample, mark in zip((first, second, third), marks) for ids in sample]
    pictures = tiny.images(2)
    packed = {**tiny.batch([parts] * 2, 16), "images": np.stack([pictures[:, 0], pictures[:, 0]])}
    alone = {**rows([first, second, third, third]), "images": pictures[[0, 1, 0, 0]]}
    for table in ("voco", "visible"):
        logits, slots = tiny.forward(tiny.params(), packed, TABLES[table], np.int32(K))
        for number, expected in enumerate(text_logits(alone, table)[:3], start=1):
            tiny.close(tiny.logits_of_text(logits, slots, 0, sample=number, kind=TEXT), expected)


def test_bfloat16_model_is_close_to_float32():
    """Every rounding errs by up to 0.2 % (8 bits), six blocks round some five times each, a sharp softmax multiplies
    it: a few per cent of the logits' size is what to expect, a wrong cast (of position angles, say) gives far more."""
    half = dataclasses.replace(CFG, dtype="bfloat16")
    batch = rows(ROWS)
    logits, slots = tiny.forward(tiny.params(), batch, TABLES["voco"], np.int32(K), cfg=half)
    exact, _ = tiny.forward(tiny.params(), batch, TABLES["voco"], np.int32(K))
    text = np.asarray(slots.stream.kind) == TEXT
    error = (np.asarray(logits) - np.asarray(exact))[text]
    assert logits.dtype == jnp.float32
    assert 1e-3 < error.std() / np.asarray(exact)[text].std() < 0.1


def test_remat_and_fused_attention_are_the_same_model():
    other = dataclasses.replace(CFG, remat="full", attention="xla")
    batch = rows(ROWS)
    logits, slots = tiny.forward(tiny.params(), batch, TABLES["voco"], np.int32(K), cfg=other)
    exact, _ = tiny.forward(tiny.params(), batch, TABLES["voco"], np.int32(K))
    real = np.asarray(slots.stream.kind) != PAD
    tiny.close(np.asarray(logits)[real], np.asarray(exact)[real])


@jax.jit
def look(params, batch):
    """What `voco_attention` says, and the scores of each row's first VoCo slot over all slots, [L, B, N, T']."""
    x, slots, _, _ = vlm.embed(CFG, params, batch, tiny.METHOD, voco_count=8, key=jax.random.key(0))
    first = jnp.argmax(slots.stream.kind == VOCO, axis=1)[:, None]
    table = jnp.asarray(TABLES["voco"])
    _, out = llm.run_layers(CFG, params["llm"]["layers"], x, slots.stream, table, rows=first)
    return vlm.voco_attention(CFG, params, batch, tiny.METHOD), out["scores"][:, :, :, 0], slots.stream.kind


def test_where_voco_tokens_look():
    """Attention, mean over heads, from each VoCo token to its patches, wherever they stand in the row."""
    found, scores, kind = (np.asarray(value) for value in look(tiny.params(), rows(ROWS[:3], left=True)))
    assert found.shape == (CFG.llm.layers, 3, 8, 16)
    share = found.sum(axis=-1)
    assert np.all(share > 0) and np.all(share < 1)  # the rest goes to the prefix and to VoCo tokens
    for row in range(3):
        tiny.close(found[:, row, 0], scores.mean(axis=2)[:, row][:, kind[row] == VISION], atol=1e-5)


def greedy(parts, table, count, steps, **options):
    """Answers by repeated whole passes: append the arg-max of the last text slot, start again."""
    parts = [[*start, *question] for start, question in parts]
    written = [[] for _ in parts]
    for _ in range(steps):
        batch = rows([([*ids, *new],) for ids, new in zip(parts, written)], **options)
        for new, logits in zip(written, text_logits(batch, table, count)):
            new.append(int(np.argmax(logits[-1])))
    return np.array(written)


def decoded(parts, table="voco", count=K, eos_id=-1, **options):
    return tiny.answer(tiny.params(), rows(parts, 11, **options), TABLES[table], np.int32(count), np.int32(eos_id))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("table", TABLES)
def test_cached_greedy_decoding_is_repeated_full_passes(table, left):
    """For rows of different lengths; the cache is padded on one side, the whole passes on the other."""
    tokens, length = decoded(ROWS, table, left=left)
    np.testing.assert_array_equal(tokens, greedy(ROWS, table, K, 5, left=not left))
    assert length.tolist() == [5] * 4


def test_decoding_without_voco_tokens_and_one_row_alone():
    tokens, _ = decoded(ROWS, "visible", 0)
    np.testing.assert_array_equal(tokens, greedy(ROWS, "visible", 0, 5))
    # Each row four times over, with its own picture: no row minds the others.
    together, _ = decoded(ROWS)
    for number, row in enumerate(ROWS):
        batch = {**rows([row] * 4, 11), "images": tiny.images(4)[[number] * 4]}
        alone, _ = tiny.answer(tiny.params(), batch, TABLES["voco"], np.int32(K), np.int32(-1))
        np.testing.assert_array_equal(alone, np.tile(together[number], (4, 1)))


def test_rows_stop_at_their_end():
    """Whatever token is declared the end: a row is cut behind its first one, and the others go on."""
    tokens, _ = decoded(ROWS)
    tokens = np.asarray(tokens)
    ends = [int(tokens[row, step]) for row, step in [(0, 0), (1, 2), (2, 4), (3, 1)]]
    for end in ends:
        found, length = decoded(ROWS, eos_id=end)
        for row in range(4):
            expected = np.append(tokens[row], end).tolist().index(end) + 1
            assert int(length[row]) == min(expected, 5)
            np.testing.assert_array_equal(found[row, :expected], tokens[row, :expected])
            assert not np.any(found[row, expected:])


prefill = jax.jit(
    lambda params, batch: generate.prefill(CFG, params, batch, tiny.METHOD, max_new=6, voco_count=jnp.int32(K))
)


def test_room_may_be_left_over_but_not_missing():
    prompt = prefill(tiny.params(), rows(ROWS, 11))
    assert prompt.free == 6
    tokens, _ = jax.jit(tiny.continued)(tiny.params(), prompt, TABLES["voco"], -1)
    np.testing.assert_array_equal(tokens, decoded(ROWS)[0])
    for max_new in (0, 7):
        with pytest.raises(ValueError, match=f"max_new={max_new} does not fit the 6 free slots behind the prompt"):
            generate.decode(CFG, tiny.params(), (), prompt, max_new=max_new, eos_id=2, table=TABLES["voco"])


def test_sampling_needs_a_key():
    prompt = prefill(tiny.params(), rows(ROWS, 11))
    for options in ({"temperature": 1.0}, {"temperature": -1.0, "key": jax.random.key(0)}):
        with pytest.raises(ValueError, match="needs a value >= 0, and a key"):
            generate.decode(CFG, tiny.params(), (), prompt, max_new=1, eos_id=2, table=TABLES["voco"], **options)


@functools.partial(jax.jit, static_argnums=2)
def samples(params, prompt, temperature, keys):
    def draw(key):
        return tiny.continued(params, prompt, TABLES["voco"], -1, max_new=2, temperature=temperature, key=key)[0]

    return jax.vmap(draw)(keys)


def test_sampling_follows_the_softmax_and_the_key():
    prompt = prefill(tiny.params(), rows(ROWS, 11))
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = np.asarray(samples(tiny.params(), prompt, 2.0, keys))
    np.testing.assert_array_equal(drawn, samples(tiny.params(), prompt, 2.0, keys))
    assert np.any(drawn[0] != drawn[1])
    probability = np.asarray(jax.nn.softmax(prompt.logits_BV / 2.0))
    for row in range(4):
        counts = np.bincount(drawn[:, row, 0], minlength=CFG.llm.vocab_size)
        expected = 2000 * probability[row]
        # Five standard deviations of a binomial, and one for rare tokens.
        assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected) + 1)
    # Rows and steps draw on their own: with one distribution for all they still differ.
    flat = {**tiny.params(), "llm": {**tiny.params()["llm"], "head": {"w": jnp.zeros((CFG.llm.width, 32))}}}
    even = dataclasses.replace(prompt, logits_BV=jnp.zeros_like(prompt.logits_BV))
    drawn = np.asarray(samples(flat, even, 2.0, keys))
    assert 0.01 < np.mean(drawn[:, 0, 0] == drawn[:, 0, 1]) < 0.06 > np.mean(drawn[:, 0, 0] == drawn[:, 1, 0])


def test_encoder_site_and_projector_change_the_number_of_slots():
    for method, expected in (
        (MethodConfig(), 16),
        (MethodConfig(encoder="uniform", tokens=5), 5),
        (MethodConfig(encoder="visionzip", tokens=6, options={"contextual": 2}), 6),
        (MethodConfig(projector="avgpool_linear", pool_grid=2), 4),
        (MethodConfig(projector="avgpool_linear", pool_grid=4, pool_rows=2), 8),
    ):
        assert vlm.visual_slots(CFG, method) == expected
    method = MethodConfig(encoder="visionzip", tokens=6, options={"contextual": 2})
    shapes = jax.eval_shape(lambda p, b: vlm.forward(CFG, p, b, method), tiny.params(), rows(ROWS))
    assert shapes.visual.tokens_BMD.shape == (4, 6, CFG.llm.width) and shapes.hidden_BTD.shape == (4, 16 + 5, 16)


def test_a_picture_is_selected_from_by_its_own_key():
    """A key a row: what is kept of a picture does not depend on its batch; one row's pictures draw on their own."""
    method = MethodConfig(encoder="random", tokens=5)
    pictures = tiny.images(3, 2)
    keys = jax.random.split(jax.random.key(7), 3)
    run = jax.jit(lambda pictures, keys: vlm.encode(CFG, tiny.params(), pictures, method, keys)[0].position_BM)
    found = np.asarray(run(pictures, keys)).reshape(3, 2, 5)
    order = np.array([2, 0, 1])
    np.testing.assert_array_equal(np.asarray(run(pictures[order], keys[order])).reshape(3, 2, 5), found[order])
    assert len({tuple(place) for place in found.reshape(6, 5).tolist()}) == 6


def test_dropped_tokens():
    """All of a share of the pictures lose tokens, never all of them, in every number; what was invalid stays so."""
    valid = np.ones((600, 16), bool)
    valid[:, 3] = False
    ints = jnp.zeros((600, 16), jnp.int32)
    visual = VisualTokens(jnp.zeros((600, 16, 2)), jnp.asarray(valid), ints, ints, ints)
    dropped = jax.jit(vlm.drop_tokens)
    none, some, every = (np.asarray(dropped(visual, share, jax.random.key(0)).valid_BM) for share in (0.0, 0.5, 1.0))
    np.testing.assert_array_equal(none, valid)
    assert not some[:, 3].any() and not every[:, 3].any()
    count = every.sum(axis=1)
    assert set(count) == set(range(1, 16))
    # P(rate <= 1/4) = P(u <= 1/2) = 1/2 of the pictures keep four of fifteen tokens or about that.
    assert 0.35 < np.mean(count <= 4) < 0.6
    assert 0.4 < np.mean(some.sum(axis=1) == 15) < 0.65
    # No place is preferred.
    assert np.ptp(np.delete(every, 3, axis=1).mean(axis=0)) < 0.12


def test_dropped_tokens_are_as_if_they_had_not_been_there():
    """Text after pictures of which tokens 4 .. 15 were dropped, against a selection that passed on the others."""
    batch = rows(ROWS[:1])
    method = dataclasses.replace(tiny.METHOD, voco_mask="visible")
    few = dataclasses.replace(method, encoder="first")
    first = compress.Encoder(
        function=lambda found, ask: compress.ops.keep(found.patches_BPD, jnp.arange(16)[None] < 4, 4),
        budget=lambda tower, tokens, options: None,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compress.ENCODER, "first", first)
        short = dataclasses.replace(few, tokens=4)
        run = functools.partial(vlm.forward, CFG, voco_count=K)
        expected = jax.jit(functools.partial(run, method=short))(tiny.params(), batch)
        four = jnp.arange(16)[None] < 4
        patch.setattr(vlm, "drop_tokens", lambda tokens, share, key: dataclasses.replace(tokens, valid_BM=four))
        found = jax.jit(functools.partial(run, method=method, token_dropout=0.5))(tiny.params(), batch)
    text = [np.asarray(out.hidden_BTD)[np.asarray(out.layout.stream.kind) == TEXT] for out in (found, expected)]
    tiny.close(*text)
