"""Frames streamed into one cache: they are one masked row, see nothing of one another, and cost the same each."""

import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model as tiny

from tokzip_jax import layout, llm, video, vlm, voco
from tokzip_jax.masks import TABLES
from tokzip_jax.types import IMAGE_ID, PAD, PREFIX, TEXT, VISION, VOCO, VOCO_ID

CFG = tiny.MODEL
RNG = np.random.default_rng(0)
QUESTIONS = [tiny.words(RNG, count) for count in (6, 4)]
FRAMES = 3
PICTURES = tiny.images(2, FRAMES, seed=5)
FRAME = [IMAGE_ID, VOCO_ID]
# What may stand before and inside a frame: nothing; BOS before the first one; a separator in each.
PARTS = {"bare": ([], FRAME), "prefix": ([1], FRAME), "separator": ([1, 9], [IMAGE_ID, 8, VOCO_ID])}


def method(count):
    return dataclasses.replace(tiny.METHOD, voco=count, positions="compact")


def frame_batches(start, frame, pictures=PICTURES):
    ids = tiny.batch([[start, frame]] * len(pictures), 5)
    return [{**ids, "images": pictures[:, i : i + 1]} for i in range(pictures.shape[1])]


@functools.cache
def streamed(count, parts):
    """The frames in a cache of 24 slots, whatever their number of tokens: one program then reads them all."""
    builder = video.Builder(CFG, tiny.params(), method(count), frames=24 // count, rows=2)
    for batch in frame_batches(*PARTS[parts]):
        builder.add(batch)
    return builder.cache


ask = jax.jit(voco.ask, static_argnums=0, static_argnames="max_new")


def stage_two(cache, cfg=CFG, questions=QUESTIONS):
    """Logits behind the last token of every question, from a cache."""
    ids = tiny.batch([[question] for question in questions], 8)["ids"]
    return ask(cfg, tiny.params(), cache, ids, max_new=1).logits_BV


def one_row(count, parts, positions="compact"):
    """The same from one masked pass over a row with all frames, as a training has it."""
    start, frame = PARTS[parts]
    rows = [[start, frame * FRAMES, question] for question in QUESTIONS]
    batch = {**tiny.batch(rows, 18), "images": PICTURES}
    how = dataclasses.replace(method(8), positions=positions)
    logits, slots = tiny.forward(tiny.params(), batch, TABLES["voco"], np.int32(count), method=how)
    return np.stack([tiny.logits_of_text(logits, slots, row, kind=TEXT)[-1] for row in range(2)])


@pytest.mark.parametrize(("count", "parts"), [(1, "separator"), (2, "bare"), (2, "prefix"), (8, "prefix")])
def test_streamed_frames_are_one_masked_row(count, parts):
    """With 1, 2 and 8 tokens a frame, and whatever stands in front of the frames."""
    cache, slots = streamed(count, parts), FRAMES * count
    np.testing.assert_array_equal(cache.kind, np.tile(np.where(np.arange(24) < slots, VOCO, PAD), (2, 1)))
    np.testing.assert_array_equal(cache.segment[0, :slots], np.repeat(np.arange(1, FRAMES + 1), count))
    np.testing.assert_array_equal(cache.position[1, :slots], np.arange(slots))
    np.testing.assert_array_equal(cache.next_position, [slots] * 2)
    tiny.close(stage_two(cache), one_row(count, parts), atol=1e-4)


def test_a_training_by_original_ids_is_another_model():
    for parts in PARTS:
        apart = np.abs(one_row(2, parts) - one_row(2, parts, "original"))
        assert apart.max(axis=1).min() > 1e-2


@functools.cache
def joined(parts):
    """The frames cached alone, not knowing their place, then rotated to it."""
    how = dataclasses.replace(tiny.METHOD, voco=2)
    caches = [build(CFG, tiny.params(), batch, how) for batch in frame_batches(*PARTS[parts])]
    return join(caches)


build = jax.jit(voco.build, static_argnums=(0, 3))
join = jax.jit(functools.partial(voco.join, CFG.llm))


def test_frames_cached_alone_are_the_same_without_a_prefix():
    """With one, each frame alone has it next to itself, in a row and in a stream only the first one has."""
    found, expected = joined("bare"), streamed(2, "bare")
    for name in ("k", "v"):
        tiny.close(getattr(found, name), getattr(expected, name)[:, :, :, :6])
    np.testing.assert_array_equal(found.position, expected.position[:, :6])
    other, stream = np.asarray(joined("prefix").v), np.asarray(streamed(2, "prefix").v)
    tiny.close(other[:, :, :, :2], stream[:, :, :, :2])
    assert np.abs(other - stream[:, :, :, :6])[1:, :, :, 2:].max() > 1e-3


def test_a_video_that_has_ended_keeps_its_frames():
    """A row of padding adds nothing: the shorter video is as if it had been read alone."""
    batches = frame_batches(*PARTS["prefix"])
    ended = {**batches[1], **{name: batches[1][name].copy() for name in ("ids", "sample")}}
    ended["ids"][1] = ended["sample"][1] = 0
    builder = video.Builder(CFG, tiny.params(), method(2), frames=12, rows=2)
    for batch in (batches[0], ended, batches[2]):
        builder.add(batch)
    np.testing.assert_array_equal(builder.cache.next_position, [6, 4])
    np.testing.assert_array_equal(builder.cache.kind[1, :6], [VOCO, VOCO, PAD, PAD, VOCO, VOCO])
    whole = streamed(2, "prefix")
    tiny.close(builder.cache.k[:, 0], whole.k[:, 0])
    tiny.close(stage_two(builder.cache)[0], stage_two(whole)[0])


@jax.jit
def influence(pictures, weights):
    """[F, I]: how much picture i of a row moves the VoCo keys and values of frame f, by exact gradients."""
    batch = {**tiny.batch([[[1], FRAME * FRAMES]], 8), "images": pictures}
    how = dataclasses.replace(tiny.METHOD, voco=2, positions="compact")

    def read(pictures, frame):
        inputs = {**batch, "images": pictures}
        x, slots, _, _ = vlm.embed(CFG, tiny.params(), inputs, how, voco_count=2, key=jax.random.key(0))
        table = jnp.asarray(TABLES["voco"])
        _, kv = llm.run_layers(CFG, tiny.params()["llm"]["layers"], x, slots.stream, table, keep=True)
        of_frame = (slots.stream.kind == VOCO) & (slots.stream.segment == frame)
        both = jnp.einsum("LBKSH,LKH->BS", kv["k"] + 2 * kv["v"], weights)
        return jnp.sum(jnp.where(of_frame, both, 0))

    grads = jax.vmap(jax.grad(read), (None, 0))(pictures, jnp.arange(1, FRAMES + 1))
    return jnp.abs(grads).max(axis=(1, 3, 4, 5))


def test_frames_do_not_see_one_another():
    """The gradient of a frame's keys and values by another frame's pixels is zero, not merely small."""
    pictures = np.random.default_rng(1).normal(size=(1, FRAMES, 32, 32, 3)).astype(np.float32)
    weights = np.random.default_rng(2).normal(size=(CFG.llm.layers, CFG.llm.kv_heads, CFG.llm.head_dim))
    found = np.asarray(influence(pictures, weights.astype(np.float32)))
    assert np.diagonal(found).min() > 1e-3
    np.testing.assert_array_equal(found[~np.eye(FRAMES, dtype=bool)], 0)


# Compact positions by themselves, in letters: p prefix, v vision, c VoCo, t text.


@jax.jit
def numbers(batch):
    slots = layout.expand(batch, np.ones((1, 2, 3), bool), voco=2, voco_count=2)
    return layout.compact_positions(slots.stream)


def numbered(*parts):
    """{letter: positions} of one row with three-token pictures, under compact positions."""
    batch = {name: values for name, values in tiny.batch([list(parts)], 10).items() if name != "images"}
    stream = jax.device_get(numbers(batch))
    letters = {PREFIX: "p", VISION: "v", VOCO: "c", TEXT: "t"}
    return {letter: stream.position[0][stream.kind[0] == kind].tolist() for kind, letter in letters.items()}


def test_compact_positions_by_hand():
    assert numbered([1, *FRAME, 5, 6]) == {"p": [-4], "v": [-3, -2, -1], "c": [0, 1], "t": [2, 3]}
    two = numbered([1, IMAGE_ID, 8, VOCO_ID, *FRAME, 5])
    assert two == {"p": [-5, -1], "v": [-4, -3, -2, -1, 0, 1], "c": [0, 1, 2, 3], "t": [4]}
    # Text between two pictures takes its place; a row without a picture, and questions in threads, go on as ever.
    assert numbered([*FRAME, 7, *FRAME, 5])["c"] == [0, 1, 3, 4]
    assert numbered([1, 5, 6])["t"] == [0, 1, 2]
    threads = numbered(FRAME, ([5, 6], {"thread": 1}), ([7], {"thread": 2}))
    assert threads["t"] == [2, 3, 2]
    # A second sample begins anew, and its pictures are counted from its own.
    samples = numbered([1, *FRAME, 5], ([1, *FRAME, 5], {"sample": 2}))
    assert samples == {"p": [-4, -4], "v": [-3, -2, -1] * 2, "c": [0, 1] * 2, "t": [2, 2]}


def test_one_picture_is_the_same_model_by_either_numbering():
    """Nothing but the origin moves, so a checkpoint of pictures is where a training on videos can start."""
    rows = [[[1, 9, IMAGE_ID, 8, VOCO_ID], question] for question in QUESTIONS]
    batch = tiny.batch(rows, 18)
    batch["images"] = PICTURES  # the second and third are in no row
    found = []
    for positions in voco.POLICIES:
        how = dataclasses.replace(method(8), positions=positions)
        logits, slots = tiny.forward(tiny.params(), batch, TABLES["voco"], np.int32(2), method=how)
        found.append(np.asarray(logits)[np.asarray(slots.stream.kind) == TEXT])
    tiny.close(*found)


# Length.

LONG = dataclasses.replace(CFG, llm=dataclasses.replace(CFG.llm, max_positions=2100))
THOUSAND = 1000


def per_frame(frames):
    """The compiled program that appends a frame to a cache with room for `frames`."""
    cache = jax.eval_shape(functools.partial(video.empty, LONG, method(2), frames=frames))
    batch = frame_batches(*PARTS["bare"], pictures=tiny.images(1, 1))[0]
    lowered = video._append.lower(LONG, tiny.params(), cache, batch, method(2), np.int32(0))
    return lowered.compile().memory_analysis(), 2 * 4 * cache.k.size


def test_a_frame_costs_the_same_whatever_came_before():
    """Its temporaries do not grow with the room of the cache, which is updated in place."""
    (small, few), (large, many) = per_frame(10), per_frame(THOUSAND)
    assert many == 100 * few
    assert large.temp_size_in_bytes == small.temp_size_in_bytes
    assert large.alias_size_in_bytes >= many and small.alias_size_in_bytes >= few


def live_bytes():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_a_thousand_frames_in_one_context():
    pictures = tiny.images(1, 4, seed=7)
    batches = [jax.device_put(batch) for batch in frame_batches(*PARTS["bare"], pictures=pictures)]
    builder = video.Builder(LONG, tiny.params(), method(2), frames=THOUSAND, text_length=9)
    held = []
    for number in range(THOUSAND):
        builder.add(batches[number % 3 if number < 700 else 3])  # the last three hundred show something else
        if number in (3, THOUSAND - 1):
            held.append(live_bytes())
    assert held[0] == held[1]
    assert builder.number == THOUSAND and int(builder.cache.next_position[0]) == 2 * THOUSAND
    # Four frames cached alone say what every one of the thousand has to be, at its own place.
    alone = build(
        LONG, tiny.params(), {**tiny.batch([[FRAME]] * 4, 2), "images": pictures.swapaxes(0, 1)}, method(2)
    )
    shown = np.array([number % 3 if number < 700 else 3 for number in range(THOUSAND)])
    k, v = (np.asarray(leaf)[:, shown].swapaxes(1, 2).reshape(3, 2, -1, 4) for leaf in (alone.k, alone.v))
    tiny.close(builder.cache.v[:, 0], v)
    # What a frame says does not depend on when it is shown: frame 699 shows what frame 0 does.
    np.testing.assert_array_equal(builder.cache.v[:, 0, :, :2], builder.cache.v[:, 0, :, 1398:1400])
    turned = turn(k, 2 * np.repeat(np.arange(THOUSAND), 2))
    tiny.close(builder.cache.k[:, 0], turned, atol=1e-3)  # float32 angles of 2,000 radians are good to 1e-4
    logits = stage_two(builder.cache, LONG, QUESTIONS[:1])
    assert np.all(np.isfinite(logits))
    # The answer hears all of them: without its last three hundred frames it is another one.
    fewer = dataclasses.replace(builder.cache, kind=builder.cache.kind.at[:, 1400:].set(PAD))
    assert np.abs(stage_two(fewer, LONG, QUESTIONS[:1]) - logits).max() > 1e-3
    with pytest.raises(ValueError, match="the cache is full: it was made for frames=1000"):
        builder.add(batches[0])


def turn(keys, by):
    """Half-split rotary positions as complex numbers, in float64: keys [..., S, H] turned by as many places [S]."""
    half = CFG.llm.head_dim // 2
    angle = by[:, None] * CFG.llm.rope_theta ** (-np.arange(half) / half)
    turned = (keys[..., :half].astype(np.float64) + 1j * keys[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def test_what_cannot_be_is_one_sentence():
    # 128 positions; 8 text tokens leave 120.
    assert video.empty(CFG, method(2), frames=60, text_length=8).kind.shape == (1, 120)
    for frames in (0, 61):
        with pytest.raises(ValueError, match=rf"frames={frames} must lie between 1 and 60: with 2 tokens a frame"):
            video.empty(CFG, method(2), frames=frames, text_length=8)
    for wrong in ({"voco_mask": "prefix_visible"}, {"voco_mask": "visible"}, {"voco": 0}):
        with pytest.raises(ValueError, match="frames are streamed with voco >= 1 under the mask 'voco'"):
            video.empty(CFG, dataclasses.replace(method(2), **wrong), frames=1)
    batch = {**tiny.batch([[FRAME]], 2), "images": tiny.images(1, 2)}
    with pytest.raises(ValueError, match=r"a frame at a time: batch\['images'\] holds 2 images a row, not 1"):
        video.append(CFG, {}, video.empty(CFG, method(2), frames=2), batch, method(2), 0)
