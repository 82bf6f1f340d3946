"""What holds on one device holds on a mesh of eight: elastic and chosen numbers, joined and streamed caches, frames
apart, gated deltas."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model as tiny
from test_lora import GATED, adapted

from tokzip_jax import elastic, llm, lora, onepass, sharding, video, vlm, voco
from tokzip_jax.config import AutoConfig, MeshConfig
from tokzip_jax.masks import TABLES
from tokzip_jax.types import IMAGE_ID, TEACHER, TEXT, VISION, VOCO, VOCO_ID

CFG, TABLE = tiny.MODEL, TABLES["voco"]
RNG = np.random.default_rng(7)
QUESTIONS = [tiny.words(RNG, count) for count in (3, 2, 4, 1)]
FRAME = [IMAGE_ID, VOCO_ID]


@pytest.fixture(scope="module", autouse=True)
def mesh():
    """Four by two devices, for the whole file."""
    made = sharding.make_mesh(MeshConfig(data=4, model=2))
    with jax.set_mesh(made):
        yield made


def spread(mesh, params):
    """Parameters over the devices."""
    return jax.device_put(params, sharding.param_shardings(mesh, params))


def is_spread(array):
    return len(array.sharding.device_set) == 8


def test_elastic_at_k_is_the_dedicated_model(mesh, count=3):
    batch = sharding.shard_batch(mesh, tiny.batch([[tiny.PICTURE, question] for question in QUESTIONS], 8))
    params, found = spread(mesh, tiny.params()), []
    for slots in (8, count):
        method = dataclasses.replace(tiny.METHOD, voco=slots)
        logits, places = tiny.forward(params, batch, TABLE, np.int32(count), method=method)
        assert is_spread(logits)
        logits, places = jax.device_get((logits, places))
        found.append(np.stack([tiny.logits_of_text(logits, places, row, kind=TEXT)[-1] for row in range(4)]))
    tiny.close(*found)
    assert np.abs(found[0]).max() > 0.1


def test_joined_caches_are_one_masked_pass(mesh):
    """Two frames, each cached alone."""
    pictures = tiny.images(4, 2, seed=5)
    params, count = spread(mesh, tiny.params()), np.int32(2)
    build = jax.jit(voco.build, static_argnums=(0, 3))
    parts = []
    for frame in range(2):
        batch = {**tiny.batch([[FRAME]] * 4, 2), "images": pictures[:, frame : frame + 1]}
        parts.append(build(CFG, params, sharding.shard_batch(mesh, batch), tiny.METHOD, voco_count=count))
    cache = voco.join(CFG.llm, parts, positions="original")
    assert is_spread(cache.k)
    ids = tiny.batch([[question] for question in QUESTIONS], 8)["ids"]
    found = jax.jit(voco.ask, static_argnums=0, static_argnames="max_new")(CFG, params, cache, ids, max_new=1)
    batch = {**tiny.batch([[FRAME * 2, question] for question in QUESTIONS], 12), "images": pictures}
    logits, places = jax.device_get(tiny.forward(params, sharding.shard_batch(mesh, batch), TABLE, count))
    expected = [tiny.logits_of_text(logits, places, row, kind=TEXT)[-1] for row in range(4)]
    tiny.close(found.logits_BV, expected, atol=1e-4)


def test_a_streamed_video_is_one_masked_pass(mesh):
    """Frame by frame into a cache of fixed size, its positions compact in the pass as well."""
    method = dataclasses.replace(tiny.METHOD, voco=2, positions="compact")
    params, pictures = spread(mesh, tiny.params()), tiny.images(4, 3, seed=6)
    builder = video.Builder(CFG, params, method, frames=3, rows=4, text_length=8)
    for frame in range(3):
        batch = {**tiny.batch([[FRAME]] * 4, 2), "images": pictures[:, frame : frame + 1]}
        builder.add(sharding.shard_batch(mesh, batch))
    assert is_spread(builder.cache.k)
    ids = tiny.batch([[question] for question in QUESTIONS], 8)["ids"]
    found = jax.jit(voco.ask, static_argnums=0, static_argnames="max_new")(CFG, params, builder.cache, ids, max_new=1)
    batch = {**tiny.batch([[FRAME * 3, question] for question in QUESTIONS], 12), "images": pictures}
    placed = sharding.shard_batch(mesh, batch)
    logits, places = jax.device_get(tiny.forward(params, placed, TABLE, np.int32(2), method=method))
    expected = [tiny.logits_of_text(logits, places, row, kind=TEXT)[-1] for row in range(4)]
    tiny.close(found.logits_BV, expected, atol=1e-4)


def test_numbers_are_chosen_as_on_one_device(mesh):
    """k=auto: of each question the same number, and the logits of a reading with that many tokens."""
    auto = AutoConfig(ladder=(1, 2, 8), threshold=0.3)
    batch = tiny.batch([[FRAME]] * 4, 2)
    ids = tiny.batch([[question] for question in QUESTIONS], 8)["ids"]
    build = jax.jit(voco.build, static_argnums=(0, 3))
    ask = jax.jit(elastic.ask, static_argnums=(0, 4), static_argnames="max_new")
    cache = build(CFG, spread(mesh, tiny.params()), sharding.shard_batch(mesh, batch), tiny.METHOD)
    prompt, chosen = ask(CFG, spread(mesh, tiny.params()), cache, ids, auto, max_new=1)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=1, model=1), jax.devices()[:1])):
        params = jax.device_get(tiny.params())
        expected, numbers = ask(CFG, params, build(CFG, params, batch, tiny.METHOD), ids, auto, max_new=1)
    np.testing.assert_array_equal(chosen, numbers)
    assert len(set(np.asarray(numbers).tolist())) > 1
    tiny.close(prompt.logits_BV, expected.logits_BV, atol=1e-4)


def test_frames_do_not_see_one_another(mesh):
    """The gradient of the second frame's VoCo keys and values by the first one's pixels, and the other way round."""
    pictures = np.random.default_rng(1).normal(size=(4, 2, 32, 32, 3)).astype(np.float32)
    batch = sharding.shard_batch(mesh, {**tiny.batch([[[1], FRAME * 2]] * 4, 8), "images": pictures})

    @jax.jit
    def influence(params, batch):
        def read(pictures, frame):
            inputs = {**batch, "images": pictures}
            x, slots, _, _ = vlm.embed(CFG, params, inputs, tiny.METHOD, voco_count=2, key=jax.random.key(0))
            _, kv = llm.run_layers(CFG, params["llm"]["layers"], x, slots.stream, jnp.asarray(TABLE), keep=True)
            own = (slots.stream.kind == VOCO) & (slots.stream.segment == frame)
            return jnp.sum(jnp.where(own[None, :, None, :, None], kv["k"] + 2 * kv["v"] ** 2, 0))

        grads = [jax.grad(read)(batch["images"], frame) for frame in (1, 2)]
        return jnp.stack([jnp.abs(grad).max(axis=(0, 2, 3, 4)) for grad in grads])

    found = np.asarray(influence(spread(mesh, tiny.params()), batch))
    assert np.diagonal(found).min() > 1e-3
    np.testing.assert_array_equal(found[~np.eye(2, dtype=bool)], 0)


@pytest.mark.parametrize("joint", [False, True])
def test_deltas_change_no_bit_of_vision_and_teacher_rows(mesh, joint):
    """In one program, whatever the deltas are: also where they are zero, which is the base model."""
    rows = [[tiny.PICTURE, (question, {"supervised": True})] for question in QUESTIONS]
    batch = sharding.shard_batch(mesh, tiny.batch(rows, 8))
    read = functools.partial(onepass.forward, CFG, method=tiny.METHOD, joint=joint)

    @jax.jit
    def both(params, batch):
        student, teacher = read(lora.attach(params, GATED), batch, voco_count=3, key=jax.random.key(0))
        return student.hidden_BTD, teacher.hidden_BTD, student.layout, teacher.layout

    def rows_of(seed):
        student, teacher, own, all_slots = jax.device_get(both(spread(mesh, adapted(GATED, seed)), batch))
        kind = all_slots.stream.kind
        assert np.sum(kind == TEACHER) and np.sum(kind == VISION) == 4 * 16
        return student[own.stream.kind == TEXT], teacher[np.isin(kind, (VISION, TEACHER))]

    base, first, second = map(rows_of, (0, 1, 2))
    for student, untouched in (first, second):
        np.testing.assert_array_equal(untouched, base[1])
        assert np.abs(student - base[0]).max(axis=-1).min() > 0.01
