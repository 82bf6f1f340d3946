"""VoCo-LLaMA against the official implementation's numbers: the mask, one masked pass, and two stages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest

from tokzip_jax import layout, masks, voco
from tokzip_jax.config import MethodConfig
from tokzip_jax.types import PAD, TEXT, VISION, VOCO

CFG = official.VOCO
METHOD = MethodConfig(voco=2, voco_mask="voco")
TWO_STAGE = official.read("voco_two_stage")
FILES = ["voco_mask_single", "voco_mask_leftpad"]


def rows(golden, *, left=True):
    # Their rows are padded on the right before the image is put in, and on the left behind it.
    return official.batch(
        golden["input_ids"], golden["attention_mask_2d_text"], golden["labels"], golden["pixel_values"], left=left
    )


def real_slots(stream, golden):
    """For every row: where ours and where their real slots are."""
    return [(np.flatnonzero(ours != PAD), np.flatnonzero(theirs)) for ours, theirs in zip(stream.kind, golden)]


@jax.jit
def seen(batch):
    """The stream of every slot, and who sees whom."""
    valid = jnp.ones((batch["ids"].shape[0], 1, 16), bool)
    stream = layout.expand(batch, valid, voco=2, voco_count=2).stream
    return stream, masks.visibility(stream, stream, masks.TABLES["voco"])


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_mask_and_kinds(name, left):
    golden = official.read(name)
    stream, sees = jax.tree.map(np.asarray, seen(rows(golden, left=left)))
    for row, (ours, theirs) in enumerate(real_slots(stream, golden["token_kind"])):
        assert len(ours) == len(theirs)
        if left:
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(sees[row][np.ix_(ours, ours)], golden["allow"][row][np.ix_(theirs, theirs)])
        assert sees[row][ours].sum() == golden["allow"][row][theirs].sum()  # padding is seen by nobody
        kind, official_kind = stream.kind[row, ours], golden["token_kind"][row, theirs]
        np.testing.assert_array_equal(kind == VISION, official_kind == 2)
        np.testing.assert_array_equal(kind == VOCO, official_kind == 3)
        assert kind[-1] == TEXT


@pytest.mark.parametrize(("name", "left"), [(FILES[0], True), (FILES[1], True), (FILES[1], False)])
def test_one_masked_pass(name, left):
    golden = official.read(name)
    out = official.score(CFG, official.voco_params(), rows(golden, left=left), method=METHOD)
    for row, (ours, theirs) in enumerate(real_slots(out["slots"].stream, golden["token_kind"])):
        np.testing.assert_allclose(out["x"][row, ours], golden["inputs_embeds"][row, theirs], atol=1e-5)
        np.testing.assert_allclose(out["hidden"][row, ours], golden["last_hidden"][row, theirs], atol=1e-4)
        logits = np.asarray(out["logits"])[row, ours]
        np.testing.assert_allclose(logits[:, :64], golden["logits64"][row, theirs], atol=1e-4)
        np.testing.assert_allclose(logits[:, 32000], golden["logit_voco"][row, theirs], atol=1e-4)
    np.testing.assert_allclose(out["loss"], golden["loss"], atol=1e-5)


@functools.cache
def cache(positions):
    """Stage one on the two-stage picture."""
    ids = TWO_STAGE["input_ids"]
    batch = official.batch(ids, np.ones_like(ids, bool), None, TWO_STAGE["pixel_values"])
    build = jax.jit(functools.partial(voco.build, CFG, method=METHOD, positions=positions))
    return build(official.voco_params(), batch)


@jax.jit
def ask(params, kept, ids):
    return voco.ask(CFG, params, kept, ids, max_new=1).logits_BV[:, :64]


def text_logits(kept):
    """Logits at each of the ten text tokens, all asked at once: row i reads the first i + 1 of them."""
    text = TWO_STAGE["input_ids"][0, 5:]
    ids = np.where(np.tri(len(text), dtype=bool), text, 0)
    return ask(official.voco_params(), kept.take([0] * len(text)), ids)


@pytest.mark.parametrize(("positions", "key"), [("original", "cache_k"), ("compact", "cache_k_rerotated")])
def test_stage_one_keeps_the_official_keys_and_values(positions, key):
    kept = cache(positions)
    for layer in range(2):
        np.testing.assert_allclose(kept.k[layer], TWO_STAGE[f"{key}_{layer}"], atol=1e-5)
        np.testing.assert_allclose(kept.v[layer], TWO_STAGE[f"cache_v_{layer}"], atol=1e-5)
    start = TWO_STAGE["first_voco"] if positions == "original" else 0
    np.testing.assert_array_equal(kept.position, [[start, start + 1]])
    assert int(kept.next_position[0]) == start + 2


def test_stage_two_at_the_original_positions_is_the_masked_pass():
    assert int(cache("original").next_position[0]) == TWO_STAGE["stage2_position_ids"][0, 0]
    logits = text_logits(cache("original"))
    np.testing.assert_allclose(logits, TWO_STAGE["two_stage_text_logits64"][0], atol=1e-4)
    np.testing.assert_allclose(logits, TWO_STAGE["single_pass_text_logits64"][0], atol=1e-4)


def test_stage_two_at_compact_positions_with_turned_keys_is_the_masked_pass():
    logits = text_logits(cache("compact"))
    np.testing.assert_allclose(logits, TWO_STAGE["two_stage_rerotated_compact_logits64"][0], atol=1e-4)
    np.testing.assert_allclose(logits, TWO_STAGE["single_pass_text_logits64"][0], atol=1e-4)


def test_compact_positions_without_turning_the_keys_would_be_wrong():
    wrong = TWO_STAGE["two_stage_compact_positions_logits64"][0]
    assert np.abs(text_logits(cache("compact")) - wrong).max() > 0.1
    # The same mistake on our cache gives their wrong numbers: the keys are all that differs.
    numbers = cache("compact")
    mistaken = dataclasses.replace(cache("original"), position=numbers.position, next_position=numbers.next_position)
    np.testing.assert_allclose(text_logits(mistaken), wrong, atol=1e-4)
