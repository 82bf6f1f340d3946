"""LoRA: the base model where no delta reaches, the merged model where all do, one pass in two stages, plain exports."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model as tiny

from tokzip_jax import checkpoint, layers, llm, lora, onepass, step, vlm, voco
from tokzip_jax.config import (
    LoraConfig,
    LossConfig,
    StageConfig,
)
from tokzip_jax.masks import TABLES
from tokzip_jax.paths import flatten
from tokzip_jax.types import PAD, PREFIX, TEACHER, TEXT, VISION, VOCO, TokenStream

EVERYWHERE = (r"(vit|llm)/layers/\d+/.*/w", r"projector/.*/w")
OPEN = LoraConfig(rank=2, alpha=6.0, paths=EVERYWHERE)
GATED = LoraConfig(rank=2, alpha=6.0, paths=(r"llm/.*/w",), kinds=("voco", "text"))


@functools.cache
def adapted(cfg, seed=1):
    """The tiny model with both factors drawn, none of them zero; or with fresh ones (seed 0)."""
    params = tiny.params()
    if seed == 0:
        return lora.add(cfg, params, jax.random.key(5))
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: lora.init(cfg, params, jax.random.key(0)))
    drawn = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, leaf.dtype), shapes)
    return {**params, "lora": drawn}


# Two rows: prefix, picture, VoCo tokens and text; and two pictures, the second of which stands behind changed rows.
KINDS = np.array([[PREFIX] * 2 + [VISION] * 4 + [VOCO] * 2 + [TEXT] * 4, [VISION, VOCO] * 2 + [TEXT] * 6 + [PAD] * 2])
SEGMENT = np.array([[0] * 2 + [1] * 6 + [0] * 4, [1, 1, 2, 2] + [0] * 8])
PLACE = np.broadcast_to(np.arange(12), KINDS.shape)
STREAM = TokenStream(
    **{
        name: jnp.asarray(value, jnp.int32)
        for name, value in {
            "kind": KINDS,
            "segment": SEGMENT,
            "thread": 0 * KINDS,
            "sample": np.where(KINDS == PAD, 0, 1),
            "position": PLACE,
            "order": PLACE,
        }.items()
    }
)
X = jnp.asarray(np.random.default_rng(0).normal(size=(*KINDS.shape, tiny.LLM.width)), jnp.float32)
UNTOUCHED = np.isin(KINDS, (PREFIX, VISION))


def every_layer(params):
    """Hidden states behind every layer [L, B, T, D], and the keys and values of every layer."""
    x, states, read = X, [], []
    for layer in range(tiny.LLM.layers):
        blocks = params["llm"]["layers"]
        x, out = llm.run_layers(
            tiny.MODEL, blocks, x, STREAM, TABLES["voco"], lo=layer, hi=layer + 1, keep=True
        )
        states.append(x)
        read.append(jnp.stack([out["k"][0], out["v"][0]]))
    return jnp.stack(states), jnp.stack(read)


jitted = jax.jit(every_layer)


def bits_of_untouched(found):
    states, read = (np.asarray(part) for part in found)
    return states[:, UNTOUCHED], read.swapaxes(3, 4)[:, :, UNTOUCHED]


def test_nothing_changes_at_the_beginning_and_nothing_but_gated_rows_later():
    """Operation by operation: fused with a delta's, the same operations round as the compiler likes."""
    with jax.disable_jit():
        base, fresh, gated = (
            every_layer(params)
            for params in (
                tiny.params(),
                lora.attach(adapted(OPEN, 0), OPEN),
                lora.attach(adapted(GATED), GATED),
            )
        )
    for found, expected in zip(fresh, base):
        np.testing.assert_array_equal(found, expected)
    for found, expected in zip(bits_of_untouched(gated), bits_of_untouched(base)):
        np.testing.assert_array_equal(found, expected)
    changed = np.abs(np.asarray(gated[0] - base[0])).max(axis=-1)
    assert changed[:, np.isin(KINDS, (VOCO, TEXT))].min() > 0.01


def test_no_delta_reaches_a_picture_in_a_compiled_program():
    first, second = (jitted(lora.attach(adapted(GATED, seed), GATED)) for seed in (1, 2))
    for found, expected in zip(bits_of_untouched(first), bits_of_untouched(second)):
        np.testing.assert_array_equal(found, expected)
    assert np.abs(np.asarray(first[0] - second[0]))[:, np.isin(KINDS, (VOCO, TEXT))].max(axis=-1).min() > 0.01
    base = jitted(tiny.params())
    for found, expected in zip(bits_of_untouched(first), bits_of_untouched(base)):
        tiny.close(found, expected, atol=1e-5)


def test_deltas_that_reach_every_token_are_those_of_the_weights():
    """By the merged model, in the language model under either spelling of an open gate, and in tower and projector."""
    params = adapted(OPEN)
    merged = lora.merge(params, OPEN)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, tiny.params())
    everybody = dataclasses.replace(OPEN, paths=GATED.paths, kinds=("prefix", "vision", "voco", "text"))
    inside = {**params, "lora": {"llm": params["lora"]["llm"]}}
    expected, _ = jitted(merged)
    assert np.abs(np.asarray(expected - jitted(tiny.params())[0])).max() > 0.1
    for tree, cfg in ((params, OPEN), (inside, everybody)):
        found, _ = jitted(lora.attach(tree, cfg))
        real = KINDS != PAD
        tiny.close(np.asarray(found)[:, real], np.asarray(expected)[:, real], atol=1e-4)
    tiny.close(jitted(lora.merge(inside, everybody))[0], expected)
    encode = jax.jit(lambda p: vlm.encode(tiny.MODEL, p, tiny.images(2), tiny.METHOD, jax.random.key(0))[0].tokens_BMD)
    tiny.close(encode(lora.attach(params, OPEN)), encode(merged), atol=1e-4)
    assert np.abs(np.asarray(encode(merged) - encode(tiny.params()))).max() > 0.1
    again = flatten(lora.unmerge(merged, lora.split(params)[1], OPEN))
    for path, leaf in flatten(params).items():
        tiny.close(again[path], leaf, atol=1e-5)


def test_merged_weights_are_the_sums_written_out():
    params = jax.tree.map(np.asarray, adapted(OPEN))
    merged, flat = flatten(lora.merge(params, OPEN)), flatten(params)
    for path, sum_of in {
        "llm/layers/0/attn/k": "ldr,lrnh->ldnh",
        "llm/layers/0/attn/o": "lnhr,lrd->lnhd",
        "vit/layers/1/mlp/down": "lfr,lrd->lfd",
        "projector/mlp2x_gelu/fc1": "dr,re->de",
    }.items():
        delta = np.einsum(sum_of, flat[f"lora/{path}/a"].astype(np.float64), flat[f"lora/{path}/b"])
        tiny.close(merged[f"{path}/w"], flat[f"{path}/w"] + 3.0 * delta, atol=1e-6)
    assert np.array_equal(merged["llm/embed/table"], flat["llm/embed/table"])


def test_switched_off_deltas_are_the_program_without_them():
    attached = lora.attach(adapted(GATED), GATED)
    assert "lora_kinds" in attached["llm"]["layers"]["0"] and "lora_a" in attached["llm"]["layers"]["0"]["mlp"]["up"]
    plain = str(jax.make_jaxpr(every_layer)(tiny.params()))
    assert str(jax.make_jaxpr(every_layer)(layers.without_deltas(attached))) == plain
    assert str(jax.make_jaxpr(every_layer)(attached)) != plain
    blocks = layers.without_deltas((attached["llm"]["layers"]["0"],))
    assert flatten(blocks[0]).keys() == flatten(tiny.params()["llm"]["layers"]["0"]).keys()
    assert lora.attach(tiny.params(), GATED) is tiny.params()


def test_two_stages_and_decoding_with_deltas_are_one_pass():
    """Stage one, stage two and three decoded tokens, against the whole row at once."""
    params, count, table = lora.attach(adapted(GATED), GATED), np.int32(3), TABLES["voco"]
    rng = np.random.default_rng(3)
    questions = [tiny.words(rng, 4) for _ in range(2)]
    pictures = tiny.batch([[tiny.PICTURE]] * 2, 3)

    @jax.jit
    def answer(params, batch, ids):
        cache = voco.build(tiny.MODEL, params, batch, tiny.METHOD, voco_count=count)
        prompt = voco.ask(tiny.MODEL, params, cache, ids, max_new=3)
        return prompt.logits_BV, tiny.continued(params, prompt, table, np.int32(-1), max_new=3)[0]

    first, written = (np.asarray(part) for part in answer(params, pictures, np.array(questions, np.int32)))
    rows = [[tiny.PICTURE, question, own.tolist()] for question, own in zip(questions, written)]
    logits, layout = tiny.forward(params, tiny.batch(rows, 10), table, count)
    assert written.min() > 0  # id 0 would be padding in these rows
    for row in range(2):
        lines = tiny.logits_of_text(logits, layout, row)[-4:-1]
        tiny.close(lines[0], first[row], atol=1e-4)
        np.testing.assert_array_equal(lines.argmax(axis=-1), written[row])
    plain, _ = tiny.forward(tiny.params(), tiny.batch(rows, 10), table, count)
    assert np.abs(np.asarray(plain - logits)).max() > 0.1


def test_the_model_without_its_deltas_is_the_teacher():
    """With no weights given, the KL is the one to the base model given as weights; deltas of a teacher count."""
    rows = [[tiny.PICTURE, ([5, 6, 7], {"thread": 1}), ([8, 9], {"thread": 1, "supervised": True})]]
    batch = tiny.batch(rows, 8)
    stage = StageConfig(method=tiny.METHOD, lora=GATED, train=("lora/.*",), loss=LossConfig(kl=1.0, chunk=8))
    options = {"voco_count": jnp.int32(3), "key": jax.random.key(0), "max_targets": 4}

    @jax.jit
    def divergences(params):
        teachers = (None, tiny.params(), params)
        return [step.loss_terms(tiny.MODEL, stage, params, batch, teacher=t, **options)["kl"] for t in teachers]

    itself, given, with_deltas = map(float, divergences(adapted(GATED)))
    assert itself == pytest.approx(given, rel=1e-6) and itself > 1e-3
    assert abs(with_deltas - itself) > 1e-4


def test_the_twin_in_one_pass_is_the_base_model():
    """A teacher that shares the student's pass reads as if there were no deltas, whatever they are."""
    rows = [[tiny.PICTURE, ([5, 6, 7], {"thread": 1}), ([8, 9], {"thread": 1, "supervised": True})]]
    loss = LossConfig(ce=0.0, kl=1.0, teacher="self", chunk=8)
    stage = StageConfig(method=tiny.METHOD, lora=GATED, train=("lora/.*",), loss=loss)
    options = {"teacher": None, "voco_count": jnp.int32(3), "key": jax.random.key(0), "max_targets": 4}

    @jax.jit
    def terms(params):
        return step.loss_terms(tiny.MODEL, stage, params, tiny.batch(rows, 8), **options)

    first, second, base = (terms(params) for params in (adapted(GATED), adapted(GATED, 2), tiny.params()))
    assert float(first["teacher_ce"]) == float(second["teacher_ce"]) > 0
    tiny.close(first["teacher_ce"], base["teacher_ce"])
    assert abs(float(first["kl"] - second["kl"])) > 1e-3 and abs(float(first["kl"] - base["kl"])) > 1e-3


@pytest.mark.parametrize("joint", [False, True])
def test_vision_and_teacher_rows_are_the_base_models_bit_for_bit(joint):
    """Operation by operation, against the plain model (`test_eight_devices.py` has the compiled program)."""
    rows = [[tiny.PICTURE, ([5, 6, 7], {"thread": 1}), ([8, 9], {"thread": 1, "supervised": True})]]
    batch, options = tiny.batch(rows, 8), {"voco_count": 3, "key": jax.random.key(0), "joint": joint}
    with jax.disable_jit():
        base, gated = (
            onepass.forward(tiny.MODEL, params, batch, tiny.METHOD, **options)[1]
            for params in (tiny.params(), lora.attach(adapted(GATED), GATED))
        )
    kind = np.asarray(base.layout.stream.kind)
    untouched, own = np.isin(kind, (VISION, TEACHER)), np.isin(kind, (VOCO, TEXT))
    assert np.sum(kind == TEACHER) >= 5
    found, expected = np.asarray(gated.hidden_BTD), np.asarray(base.hidden_BTD)
    np.testing.assert_array_equal(found[untouched], expected[untouched])
    assert np.abs(found - expected)[own].max(axis=-1).min() > 0.01


def test_merged_export_is_a_plain_checkpoint(tmp_path):
    shapes = jax.eval_shape(functools.partial(vlm.init, tiny.MODEL, "mlp2x_gelu"), jax.random.key(0))
    path = str(tmp_path / "merged")
    lora.export(path, adapted(OPEN), OPEN, info={"from": "a test"})
    assert checkpoint.absent(path, shapes) == [] and set(checkpoint.stored_paths(path)) == set(flatten(shapes))
    assert checkpoint.read_info(path) == {"from": "a test"}
    found = flatten(checkpoint.load_params(path, shapes))
    for name, leaf in flatten(lora.merge(adapted(OPEN), OPEN)).items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    with pytest.raises(ValueError, match=r"'text'\) cannot be merged: .* for prefix, vision tokens too"):
        lora.export(path, adapted(GATED), GATED)
    with pytest.raises(ValueError, match=r"lora\.rank = 3, but the parameters hold lora/llm/.* of rank 2"):
        lora.merge(adapted(OPEN), dataclasses.replace(OPEN, rank=3))
    bfloat = {**adapted(OPEN), "projector": jax.tree.map(lambda w: w.astype(jnp.bfloat16), tiny.params()["projector"])}
    assert {leaf.dtype for leaf in jax.tree.leaves(lora.merge(bfloat, OPEN)["projector"])} == {jnp.bfloat16.dtype}


def test_first_factors():
    key = jax.random.key(2)
    official, paper = (
        flatten(lora.init(dataclasses.replace(GATED, init=name, rank=4), tiny.params(), key))
        for name in lora.INITS
    )
    for path, leaf in official.items():
        inputs = np.prod(leaf.shape[1:-1])
        if path.endswith("/b"):
            assert not np.any(leaf) and not np.any(paper[path]), path
        else:
            assert 0.9 * inputs**-0.5 < np.abs(leaf).max() <= inputs**-0.5, path
            assert leaf.dtype == jnp.float32
    drawn = np.concatenate([np.ravel(leaf) for path, leaf in paper.items() if path.endswith("/a")])
    assert np.std(drawn) == pytest.approx(1 / 4, rel=0.1) and np.abs(drawn).max() > 0.5
    # What is drawn for a matrix does not depend on which others are chosen.
    alone = flatten(lora.init(dataclasses.replace(GATED, rank=4, paths=("llm/.*/up/w",)), tiny.params(), key))
    assert len(alone) == 2
    for path, leaf in alone.items():
        np.testing.assert_array_equal(leaf, official[path])
    assert len({float(np.ravel(leaf)[0]) for path, leaf in official.items() if path.endswith("/a")}) == 7
