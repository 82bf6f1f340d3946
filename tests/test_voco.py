"""Two-stage inference is the masked pass: every number of VoCo tokens, either padding side, many questions, frames."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model as tiny

from tokzip_jax import voco
from tokzip_jax.masks import TABLES
from tokzip_jax.types import IMAGE_ID, PAD, PREFIX, VOCO, VOCO_ID

CFG, LLM = tiny.MODEL, tiny.LLM
WIDE = dataclasses.replace(tiny.METHOD, voco_mask="prefix_visible")
METHODS = {"voco": tiny.METHOD, "prefix_visible": WIDE}
RNG = np.random.default_rng(0)
QUESTIONS = [tiny.words(RNG, count) for count in (6, 4, 8, 1)]
SEPARATED = [1, 9, IMAGE_ID, 8, VOCO_ID]  # BOS, a word, the picture, a separator, VoCo
PICTURES = [tiny.PICTURE, SEPARATED, tiny.PICTURE, [IMAGE_ID, VOCO_ID]]
TEXT = 11  # ids of a row: the longest picture part and question


def ids_of(questions, left=False):
    batch = tiny.batch([[question] for question in questions], 8, left=left)
    return batch["ids"]


build = jax.jit(voco.build, static_argnums=(0, 3), static_argnames="positions")
compact = jax.jit(functools.partial(voco.compact, LLM))
ask = jax.jit(voco.ask, static_argnums=0, static_argnames="max_new")


def caches(name, count, positions="original", left=False):
    """Stage one over four pictures; text that may stand behind them is not read."""
    batch = tiny.batch([[ids, [5, 6]] for ids in PICTURES], 8, left=left)
    cache = build(CFG, tiny.params(), batch, METHODS[name], voco_count=np.int32(count))
    return compact(cache) if positions == "compact" else cache


def stage_two(cache, questions=QUESTIONS, left=False):
    """Logits behind the last text token of every row, from the cache."""
    ids = ids_of(questions, left)
    return ask(CFG, tiny.params(), cache, ids, max_new=5).logits_BV


def one_pass(name, count, questions=QUESTIONS, left=False):
    """Logits behind the last text token of every row in one masked pass."""
    batch = tiny.batch([[ids, question] for ids, question in zip(PICTURES, questions)], 16, left=left)
    logits, layout = tiny.forward(tiny.params(), batch, TABLES[name], np.int32(count))
    return [tiny.logits_of_text(logits, layout, row)[-1] for row in range(len(questions))]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_two_stages_are_one_masked_pass(name, left):
    """For every k, and for pictures with and without prefix and separator."""
    for count in range(1, 9):
        found = stage_two(caches(name, count, left=left), left=left)
        tiny.close(found, one_pass(name, count, left=left), atol=1e-4)


def test_compact_positions_are_the_masked_pass_too():
    for count in (1, 3, 8):
        cache = caches("voco", count, "compact")
        np.testing.assert_array_equal(cache.next_position, [count] * 4)
        np.testing.assert_array_equal(cache.position[:, :count], np.tile(np.arange(count), (4, 1)))
        tiny.close(stage_two(cache), one_pass("voco", count), atol=1e-4)
    batch = tiny.batch([[ids, [5, 6]] for ids in PICTURES], 8)
    inside = build(CFG, tiny.params(), batch, tiny.METHOD, positions="compact")
    tiny.close(inside.k, caches("voco", 8, "compact").k)


def test_compacting_without_rotating_is_another_model():
    """Why it is not offered: the gap between VoCo tokens and text would close for the text only."""
    right = caches("voco", 3, "compact")
    wrong = dataclasses.replace(right, k=caches("voco", 3).k)
    assert np.abs(np.asarray(stage_two(wrong)) - np.array(one_pass("voco", 3)))[:3].max() > 0.1


def test_compacting_moves_a_visible_prefix_nearer():
    """So it is another model where more than the VoCo tokens of one picture is kept; with no prefix there is no gap."""
    exact = one_pass("prefix_visible", 3)
    found = stage_two(caches("prefix_visible", 3, "compact"))
    differ = np.abs(np.asarray(found) - np.array(exact)).max(axis=1)
    assert differ[:3].min() > 1e-3 and differ[3] < 1e-4


def turn(keys, position):
    """Half-split rotary positions as complex numbers, in float64."""
    half = LLM.head_dim // 2
    angle = np.asarray(position)[None, :, None, :, None] * LLM.rope_theta ** (-np.arange(half) / half)
    keys = np.asarray(keys, np.float64)
    turned = (keys[..., :half] + 1j * keys[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def test_rotation_moves_keys_to_their_new_places():
    cache = caches("prefix_visible", 3)
    moved = compact(cache, start=7)
    tiny.close(moved.k, turn(cache.k, np.asarray(moved.position) - np.asarray(cache.position)), atol=1e-5)
    tiny.close(moved.v, cache.v)
    used = np.asarray(cache.kind) != PAD
    for row in range(4):
        np.testing.assert_array_equal(np.asarray(moved.position)[row][used[row]], 7 + np.arange(used[row].sum()))
        assert int(moved.next_position[row]) == 7 + used[row].sum()


def test_what_is_kept():
    """The VoCo tokens alone, and under the wider mask the prefix before the picture; the separator has read it."""
    cache = caches("voco", 3)
    assert cache.k.shape == (LLM.layers, 4, LLM.kv_heads, 8, LLM.head_dim)
    np.testing.assert_array_equal(cache.kind, [[VOCO] * 3 + [PAD] * 5] * 4)
    np.testing.assert_array_equal(cache.position[0, :3], [17, 18, 19])
    np.testing.assert_array_equal(cache.next_position, [20, 22, 20, 19])
    assert cache.nbytes == 2 * 4 * cache.k.size
    wide = caches("prefix_visible", 3)
    kinds = [[PREFIX] + [VOCO] * 3, [PREFIX] * 2 + [VOCO] * 3, [PREFIX] + [VOCO] * 3, [VOCO] * 3]
    for row, expected in enumerate(kinds):
        np.testing.assert_array_equal(wide.kind[row], expected + [PAD] * (wide.kind.shape[1] - len(expected)))
    np.testing.assert_array_equal(wide.position[1, :5], [0, 1, 19, 20, 21])


def test_many_questions_about_one_picture():
    chosen = [2, 2, 0, 2]
    found = stage_two(caches("voco", 2).take(chosen))
    batch = tiny.batch([[PICTURES[row], question] for row, question in zip(chosen, QUESTIONS)], 16)
    batch["images"] = tiny.images(4)[chosen]
    logits, layout = tiny.forward(tiny.params(), batch, TABLES["voco"], np.int32(2))
    tiny.close(found, [tiny.logits_of_text(logits, layout, row)[-1] for row in range(4)], atol=1e-4)


@pytest.mark.parametrize("positions", voco.POLICIES)
def test_answers_are_those_of_one_pass(positions):
    """Greedy decoding behind the cache writes what decoding behind the whole masked prompt writes."""
    prompt = ask(CFG, tiny.params(), caches("voco", 2, positions), ids_of(QUESTIONS), max_new=5)
    tokens, length = continued(tiny.params(), prompt, TABLES["voco"], -1)
    batch = tiny.batch([[ids, question] for ids, question in zip(PICTURES, QUESTIONS)], TEXT)
    expected, _ = tiny.answer(tiny.params(), batch, TABLES["voco"], np.int32(2), -1)
    np.testing.assert_array_equal(tokens, expected)
    assert len(set(np.asarray(tokens).ravel().tolist())) > 4 and length.tolist() == [5] * 4


continued = jax.jit(tiny.continued)


@functools.cache
def frames(count):
    """Two frames cached alone, without a prefix, in a batch of two rows."""
    pictures = tiny.images(2, 2, seed=5)
    rows = [[[IMAGE_ID, VOCO_ID]]] * 2
    parts = [{**tiny.batch(rows, 2), "images": pictures[:, i : i + 1]} for i in range(2)]
    return pictures, [build(CFG, tiny.params(), part, tiny.METHOD, voco_count=np.int32(count)) for part in parts]


def test_frames_joined_are_one_masked_row():
    """Original positions: each frame takes all the places that it used, one behind the other."""
    pictures, parts = frames(2)
    cache = voco.join(LLM, parts, positions="original")
    np.testing.assert_array_equal(cache.next_position, [36, 36])
    np.testing.assert_array_equal(cache.segment[0], [1, 1, *[0] * 6, 2, 2, *[0] * 6])
    found = stage_two(cache, QUESTIONS[:2])
    row = [IMAGE_ID, VOCO_ID, IMAGE_ID, VOCO_ID]
    batch = {**tiny.batch([[row, question] for question in QUESTIONS[:2]], 16), "images": pictures}
    logits, layout = tiny.forward(tiny.params(), batch, TABLES["voco"], np.int32(2))
    tiny.close(found, [tiny.logits_of_text(logits, layout, row)[-1] for row in range(2)], atol=1e-4)


def test_frames_joined_compactly_stand_side_by_side():
    """Kept tokens only count, so the gaps close: keys are the raw ones rotated to 0, 1 and 2, 3."""
    _, parts = frames(2)
    cache = voco.join(LLM, parts)
    np.testing.assert_array_equal(cache.position[0], [0, 1, *[0] * 6, 2, 3, *[0] * 6])
    np.testing.assert_array_equal(cache.next_position, [4, 4])
    for number, start in ((0, 0), (1, 8)):
        raw = turn(parts[number].k, -np.asarray(parts[number].position))
        place = np.asarray(cache.position)[:, start : start + 8]
        tiny.close(cache.k[:, :, :, start : start + 2], turn(raw, place)[:, :, :, :2], atol=1e-5)
    alone = voco.join(LLM, parts[:1])
    tiny.close(alone.k, compact(parts[0]).k)


def test_prefix_of_the_first_frame_only():
    part = caches("prefix_visible", 2)
    cache = voco.join(LLM, [part, part])
    width = part.kind.shape[1]
    assert np.sum(cache.kind[:, :width] == PREFIX) == 4 and np.sum(cache.kind[:, width:] == PREFIX) == 0
    np.testing.assert_array_equal(cache.next_position, [5, 6, 5, 4])


def test_context_limit():
    _, parts = frames(2)
    small = dataclasses.replace(LLM, max_positions=36)
    voco.join(small, parts, positions="original")
    with pytest.raises(ValueError, match=r"37 positions \(cache and 1 text tokens\) exceed max_positions=36.*compact"):
        voco.join(small, parts, positions="original", text_length=1)
    voco.join(small, parts, text_length=32)
    joined = voco.join(LLM, parts, positions="original")
    with pytest.raises(ValueError, match="49 positions"):
        voco.ask(dataclasses.replace(CFG, llm=small), {}, joined, ids_of(QUESTIONS[:2]), max_new=5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_file(tmp_path, dtype):
    cache = caches("voco", 2)
    cache = dataclasses.replace(cache, k=cache.k.astype(dtype), v=cache.v.astype(dtype))
    voco.save(tmp_path / "picture.safetensors", cache, LLM)
    found = voco.load(tmp_path / "picture.safetensors", LLM)
    assert found.k.dtype == jnp.dtype(dtype) and found.kind.dtype == jnp.int32
    jax.tree.map(np.testing.assert_array_equal, found, cache)
    assert found.voco_mask == "voco"


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no VoCo cache at .*none"):
        voco.load(tmp_path / "none", LLM)
    voco.save(tmp_path / "cache", caches("voco", 2), LLM)
    other = dataclasses.replace(LLM, kv_heads=4, rope_theta=1e4)
    with pytest.raises(ValueError, match=r"another language model: kv_heads 2 -> 4, rope_theta 100.0 -> 10000.0"):
        voco.load(tmp_path / "cache", other)
    (tmp_path / "text").write_text("hello, I am no cache at all")
    (tmp_path / "half").write_bytes((tmp_path / "cache").read_bytes()[:-100])
    from safetensors.numpy import save_file

    save_file({"k": np.zeros(3)}, tmp_path / "weights")
    for name in ("text", "half", "weights"):
        with pytest.raises(ValueError, match=f"{name} is not a VoCo cache"):
            voco.load(tmp_path / name, LLM)


def test_what_cannot_be_is_one_sentence():
    batch = tiny.batch([[tiny.PICTURE]], 4)
    for method in (dataclasses.replace(tiny.METHOD, voco_mask="visible"), dataclasses.replace(tiny.METHOD, voco=0)):
        with pytest.raises(ValueError, match="leaves nothing to cache: two-stage inference needs voco >= 1 and"):
            voco.build(CFG, {}, batch, method)
    with pytest.raises(ValueError, match="positions='packed' is unknown; choose 'original' or 'compact'"):
        voco.build(CFG, {}, batch, tiny.METHOD, positions="packed")
    with pytest.raises(ValueError, match="give at least one frame"):
        voco.join(LLM, [])
    with pytest.raises(ValueError, match="different masks, prefix_visible and voco; use one"):
        voco.join(LLM, [caches("voco", 2), caches("prefix_visible", 2)])
    packed = tiny.batch([[tiny.PICTURE, (tiny.PICTURE, {"sample": 2})]], 6, count=2)
    with pytest.raises(ValueError, match=r"several samples .* reads one a row"):
        voco.build(CFG, tiny.params(), packed, tiny.METHOD)
    with pytest.raises(ValueError, match=r"2 questions need as many cache rows, not 4: use cache.take"):
        voco.ask(CFG, {}, caches("voco", 2), ids_of(QUESTIONS[:2]), max_new=5)
