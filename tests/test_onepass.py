"""One text read twice in one pass: each reading is the pass of its own that it stands for, in values and gradients."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model as tiny

from tokzip_jax import distill, layout, llm, losses, onepass, sharding, step, vlm
from tokzip_jax.config import LossConfig, MeshConfig, MethodConfig, OptimConfig, StageConfig
from tokzip_jax.masks import ALWAYS, TABLES
from tokzip_jax.paths import flatten, map_with_path
from tokzip_jax.types import IMAGE_ID, PAD, PREFIX, TEACHER, TEXT, VISION, VOCO, VOCO_ID

CFG, KEY = tiny.MODEL, jax.random.key(0)
RNG = np.random.default_rng(0)
MASKS = ("voco", "prefix_visible")
METHODS = {mask: MethodConfig(voco=8, voco_mask=mask) for mask in MASKS}


def part(count, thread=0, sample=1, supervised=False):
    return tiny.words(RNG, count), {"thread": thread, "sample": sample, "supervised": supervised}


# Two questions in one row; a long prefix, a separator between picture and VoCo tokens, shared text, and an answer that
# the VoCo token itself predicts; text only; two samples, each with a picture of its own.
ROWS = [
    [tiny.PICTURE, part(2, 1), part(3, 1, supervised=True), part(1, 2), part(2, 2, supervised=True)],
    [[1, *tiny.words(RNG, 3), IMAGE_ID, 5, VOCO_ID], part(2, supervised=True), part(2), part(2, 1, supervised=True)],
    [part(3), part(4, supervised=True)],
    [
        (tiny.PICTURE, {"sample": 1}),
        part(2, sample=1, supervised=True),
        (tiny.PICTURE, {"sample": 2}),
        part(1, sample=2),
        part(3, sample=2, supervised=True),
    ],
]
BATCHES = {left: tiny.batch(ROWS, 14, left=left, count=2) for left in (False, True)}
BATCH = BATCHES[False]
TARGETS = int(BATCH["supervised"].sum())


@functools.partial(jax.jit, static_argnames=("mask", "joint"))
def readings(params, batch, count, *, mask, joint):
    """Logits and layouts of both, of every slot."""
    both = onepass.forward(CFG, params, batch, METHODS[mask], joint=joint, voco_count=count, key=KEY)
    return [(llm.logits(CFG, params["llm"], each.hidden_BTD), each.layout) for each in both]


def read_off(logits, slots):
    """Logits [n, V] at the slots that predict the supervised tokens, and these tokens' ids."""
    row, at = np.nonzero(slots.supervised)
    return np.asarray(logits)[row, np.asarray(slots.previous)[row, at]], np.asarray(slots.ids)[row, at]


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_each_reading_is_a_pass_of_its_own(mask, joint):
    """For 1 and 4 VoCo tokens of 8 slots, padding on either side: one program, and two of the plain model."""
    for left, count in ((False, 1), (False, 4), (True, 4)):
        batch = BATCHES[left]
        student, teacher = readings(tiny.params(), batch, np.int32(count), mask=mask, joint=joint)
        alone = tiny.forward(tiny.params(), batch, TABLES[mask], np.int32(count))
        plain = tiny.forward(tiny.params(), batch, TABLES["visible"], np.int32(0))
        real = np.asarray(alone[1].stream.kind) != PAD
        tiny.close(np.asarray(student[0])[real], np.asarray(alone[0])[real])
        for found, expected in ((student, alone), (teacher, plain)):
            (lines, ids), (wanted, labels) = read_off(*found), read_off(*expected)
            assert len(ids) == TARGETS
            np.testing.assert_array_equal(ids, labels)
            tiny.close(lines, wanted)
        # Not at the targets alone: every token of the text, in its order, and the prefix where it is read again.
        slots = np.asarray(teacher[1].stream.kind).copy()
        slots[:, : real.shape[1]] = PAD
        kinds = np.asarray(plain[1].stream.kind)
        copied = kinds == TEXT if joint else (kinds == TEXT) | (kinds == PREFIX)
        assert set(np.unique(slots)) == ({PAD, TEACHER} if joint else {PAD, PREFIX, TEACHER})
        np.testing.assert_array_equal((slots != PAD).sum(axis=1), copied.sum(axis=1))
        tiny.close(np.asarray(teacher[0])[slots != PAD], np.asarray(plain[0])[copied])
        for name in ("position", "thread", "sample", "segment"):
            values, expected = (np.asarray(getattr(each[1].stream, name)) for each in (teacher, plain))
            np.testing.assert_array_equal(values[slots != PAD], expected[copied], err_msg=name)


PICTURES = [[[1, IMAGE_ID, VOCO_ID], part(1), [IMAGE_ID, VOCO_ID], part(2, 1), part(1, 2)]] * 4


def test_several_pictures_in_one_sample():
    """They do not see each other or the text between; text stands behind its picture, and gaps stay where they were."""
    batch = tiny.batch(PICTURES, 14, count=2)
    count = 4
    _, (logits, slots) = readings(tiny.params(), batch, np.int32(count), mask="voco", joint=False)
    # BOS, 16 patches, 4 VoCo tokens (17 .. 20), one word: 21. The next picture: 22 .. 37. Words behind it: 38, 39; 38.
    row = jax.tree.map(lambda leaf: np.asarray(leaf[0]), slots)
    taught = np.flatnonzero(row.stream.kind == TEACHER)
    np.testing.assert_array_equal(row.stream.position[taught], [17, 38, 39, 38])
    np.testing.assert_array_equal(row.stream.position[row.stream.kind == VISION], [*range(1, 17), *range(22, 38)])

    @jax.jit
    def expected(params):
        x, found, _, _ = vlm.embed(CFG, params, batch, METHODS["voco"], voco_count=count, key=KEY)
        kind = jnp.where(found.stream.kind == VOCO, PAD, found.stream.kind)
        table = TABLES["voco"].copy()
        table[TEXT] = 0
        table[TEXT, [PREFIX, VISION, TEXT]] = ALWAYS
        position = found.stream.position - jnp.where(kind == TEXT, count, 0)
        stream = dataclasses.replace(found.stream, kind=kind, position=position)
        hidden, _ = llm.run_layers(CFG, params["llm"]["layers"], x, stream, table)
        return llm.logits(CFG, params["llm"], hidden), kind == TEXT

    whole, text = expected(tiny.params())
    tiny.close(np.asarray(logits)[np.asarray(slots.stream.kind) == TEACHER], np.asarray(whole)[np.asarray(text)])


def stage(mask="voco", **loss):
    return StageConfig(
        method=METHODS[mask],
        train=("projector/.*", "llm/.*", "voco/.*"),
        loss=LossConfig(**{"chunk": 8, "temperature": 2.0, **loss}),
        optim=OptimConfig(clip_norm=0.0),
    )


@functools.cache
def calm_params():
    """Attention less sharp than `tiny.params`, which magnifies the rounding of two ways to the same gradient."""
    return map_with_path(lambda path, leaf: leaf / 3 if re.search("attn/[qk]/", path) else leaf, tiny.params())


@functools.partial(jax.jit, static_argnums=0)
def gradients(stage, params, batch, count, teacher=None):
    return step.gradients(CFG, stage, params, batch, teacher=teacher, voco_count=count, key=KEY, max_targets=8)


@jax.jit
def reference(params, batch, count, table, weights):
    """Gradients of CE, KL to another pass of the same parameters, held constant, and CE of that pass, by weights."""
    trained, frozen = step.partition(params, stage().train)

    def loss(trained):
        params = step.merge(trained, frozen)

        def lines(table, count):
            out = vlm.forward(CFG, params, batch, METHODS["voco"], table=table, voco_count=count, key=KEY)
            read, label, valid = losses.targets(out.layout, 8)
            return llm.logits(CFG, params["llm"], losses.pick(out.hidden_BTD, read)), label, valid

        student, label, valid = lines(table, count)
        teacher, _, _ = lines(TABLES["visible"], 0)
        chosen = jax.nn.one_hot(label, CFG.llm.vocab_size)
        ce, taught = (-jnp.sum(chosen * jax.nn.log_softmax(z), axis=-1) for z in (student, teacher))
        p = jax.nn.softmax(jax.lax.stop_gradient(teacher) / 2)
        kl = 4 * jnp.sum(p * (jnp.log(p) - jax.nn.log_softmax(student / 2)), axis=-1)
        terms = {"ce": ce, "kl": kl, "teacher_ce": taught}
        terms = {name: jnp.sum(jnp.where(valid, term, 0)) / TARGETS for name, term in terms.items()}
        return sum(weights[name] * term for name, term in terms.items()), terms

    return jax.grad(loss, has_aux=True)(trained)


MIXES = {
    "one pass": {"ce": 0.5, "kl": 2.0, "teacher": "self"},
    "joint": {"ce": 1.0, "kl": 0.5, "teacher_ce": 0.7, "teacher": "self"},
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("mask", MASKS)
def test_loss_and_gradients_are_those_of_two_programs(mask, mix):
    weights = {"ce": 0.0, "kl": 0.0, "teacher_ce": 0.0}
    weights |= {name: value for name, value in MIXES[mix].items() if name in weights}
    for count in (1, 4):
        grads, found = gradients(stage(mask, **MIXES[mix]), calm_params(), BATCH, np.int32(count))
        wanted, terms = reference(calm_params(), BATCH, np.int32(count), TABLES[mask], weights)
        for name, value in terms.items():
            tiny.close(found[name], value, atol=1e-5)
        tiny.close(found["loss"], sum(weights[name] * value for name, value in terms.items()), atol=1e-5)
        for path, leaf in flatten(wanted).items():
            assert float(jnp.abs(leaf).max()) > 1e-4, path
            np.testing.assert_allclose(flatten(grads)[path], leaf, rtol=1e-5, atol=1e-5, err_msg=path)


def test_the_teacher_has_no_gradient_unless_it_has_a_loss():
    """Whatever is made of its hidden states, in the student's slots too; the joint one's reach what it reads."""

    def total(joint):
        def of(params):
            options = {"joint": joint, "voco_count": 2, "key": KEY}
            return jnp.sum(onepass.forward(CFG, params, BATCH, METHODS["voco"], **options)[1].hidden_BTD ** 2)

        return flatten(jax.jit(jax.grad(of))(tiny.params()))

    assert all(np.all(np.asarray(leaf) == 0) for leaf in total(False).values())
    assert np.abs(total(True)["llm/layers/0/attn/q/w"]).max() > 0


def test_weights_mix_a_frozen_teacher_with_the_text_that_reads_the_picture():
    mixed = stage(kl=0.5, teacher_ce=0.7)
    _, found = gradients(mixed, tiny.params(), BATCH, np.int32(4), tiny.params(1))
    _, frozen = gradients(stage(kl=0.5), tiny.params(), BATCH, np.int32(4), tiny.params(1))
    _, joint = gradients(stage(**MIXES["joint"]), tiny.params(), BATCH, np.int32(4))
    tiny.close(found["kl"], frozen["kl"])
    assert abs(float(found["kl"]) - float(joint["kl"])) > 1e-3
    tiny.close(found["teacher_ce"], joint["teacher_ce"])
    tiny.close(found["loss"], found["ce"] + 0.5 * found["kl"] + 0.7 * found["teacher_ce"])


@pytest.mark.parametrize(("mask", "mix"), [("voco", "one pass"), ("voco", "joint"), ("prefix_visible", "one pass")])
def test_eight_devices_give_what_one_gives(mask, mix):
    batch, which = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf[::-1]]), BATCH), stage(mask, **MIXES[mix])
    mesh = sharding.make_mesh(MeshConfig(data=4, model=2))
    placed = jax.device_put(calm_params(), sharding.param_shardings(mesh, calm_params()))
    for count in (np.int32(1), np.int32(4)):
        expected, numbers = jax.device_get(gradients(which, calm_params(), batch, count))
        with jax.set_mesh(mesh):
            found, metrics = gradients(which, placed, sharding.shard_batch(mesh, batch), sharding.place(mesh, count))
        for name, value in numbers.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
        for path, value in flatten(expected).items():
            np.testing.assert_allclose(flatten(found)[path], value, rtol=1e-4, atol=1e-5, err_msg=path)


VOCAB = 4099  # a prime, to be found again in the compiled program


@pytest.mark.parametrize("mix", MIXES)
def test_a_compiled_step_holds_no_logits_of_every_slot(mix):
    cfg = dataclasses.replace(CFG, llm=dataclasses.replace(CFG.llm, vocab_size=VOCAB, layers=1))
    abstract = jax.eval_shape(functools.partial(vlm.init, cfg, "mlp2x_gelu"), KEY)
    which = stage(**MIXES[mix])

    def run(params, batch):
        return step.gradients(cfg, which, params, batch, teacher=None, voco_count=2, key=KEY, max_targets=8)

    text = jax.jit(run).lower(abstract, BATCH).compile().as_text()
    shapes = re.findall(r"\w+\[([\d,]*\b4099\b[\d,]*)\]", text)
    others = {np.prod([int(n) for n in shape.split(",")]) // VOCAB for shape in shapes}
    # Tables of the width, and chunks of 8 positions; a row has 14 places for text, and the batch 4 rows.
    assert others and max(others) <= cfg.llm.width < 4 * 8


def test_layout_of_the_copy_by_hand():
    """`previous` of a copy: its own text, or the picture's last token, or a prefix token where that is not copied."""
    batch = tiny.batch([[[1, IMAGE_ID, VOCO_ID], part(2, supervised=True)]], 6, count=1)
    slots = jax.jit(functools.partial(layout.expand, voco=2))(batch, np.ones((1, 1, 3), bool), voco_count=np.int32(2))
    # p v v v c c t t . : the text stands at 6 and 7.
    for prefix, kinds, previous, position in (
        (True, [PREFIX, TEACHER, TEACHER], [-1, 3, 10], [0, 4, 5]),
        (False, [TEACHER, TEACHER], [3, 9], [4, 5]),
    ):
        own, index = onepass.copy_text(slots, 6, prefix=prefix)
        assert slots.ids.shape[1] == 9
        np.testing.assert_array_equal(index[0, : len(kinds)], [0, 6, 7][-len(kinds) :])
        for name, wanted in (("kind", kinds), ("position", position)):
            np.testing.assert_array_equal(getattr(own.stream, name)[0], wanted + [0] * (6 - len(kinds)))
        np.testing.assert_array_equal(own.previous[0, : len(kinds)], previous)
        supervised = [kind == TEACHER for kind in kinds] + [False] * (6 - len(kinds))
        np.testing.assert_array_equal(own.supervised[0], supervised)


BAD = {
    "stages.a.loss.teacher = 'frozn' is unknown": stage(kl=1.0, teacher="frozn"),
    "loss.kl = 1.0 needs a teacher: set stages.a.init_from": stage(kl=1.0),
    "loss.teacher = 'self' teaches nothing: stages.a.loss.kl must be above 0": stage(teacher="self"),
    "loss.teacher = 'self' needs a student that reads VoCo tokens": dataclasses.replace(
        stage(kl=1.0, teacher="self"), method=MethodConfig(voco=8)
    ),
    "loss.teacher_ce = 0.5 needs a student that reads VoCo tokens": dataclasses.replace(
        stage(teacher_ce=0.5), method=MethodConfig()
    ),
}


@pytest.mark.parametrize("words", BAD)
def test_losses_that_cannot_be(words):
    with pytest.raises(ValueError, match=re.escape(words)):
        distill.check("stages.a", BAD[words])
    distill.check("stages.a", stage(**MIXES["joint"]))


def test_a_self_teacher_needs_an_anchor():
    alone = LossConfig(ce=0.0, kl=1.0, teacher="self")
    paths = list(flatten(tiny.params()))
    with pytest.raises(ValueError, match=r"stages\.a\.loss\.teacher = 'self' with kl alone has no anchor.*teacher_ce"):
        distill.check_anchor("stages.a", alone, paths, ("voco/.*",))
    distill.check_anchor("stages.a", alone, ["voco/table"], ("voco/.*",))
    for anchored in ({"ce": 0.1}, {"teacher_ce": 0.1}, {"teacher": "frozen"}):
        distill.check_anchor("stages.a", dataclasses.replace(alone, **anchored), paths, ("voco/.*",))
