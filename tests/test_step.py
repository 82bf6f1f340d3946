"""Training and scoring steps: accumulation, freezing, the terms of the loss, and scoring as a real decode would."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_model as tiny

from tokzip_jax import losses, step, vit, vlm
from tokzip_jax.config import LossConfig, MethodConfig, OptimConfig, StageConfig
from tokzip_jax.masks import TABLES
from tokzip_jax.paths import flatten

CFG, K = tiny.MODEL, 3
RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def answered(*pairs):
    """A row about one picture: a thread for each (question, answer), the answer supervised."""
    row = [tiny.PICTURE]
    for thread, (question, reply) in enumerate(pairs, start=1):
        row += [(question, {"thread": thread}), (reply, {"thread": thread, "supervised": True})]
    return row


def words(count):
    return tiny.words(RNG, count)


# Rows of different fullness: 7, 2, 5 and 1 supervised tokens.
ROWS = [
    answered((words(2), [*words(3), 2]), (words(1), [*words(2), 2])),
    answered((words(4), [*words(1), 2])),
    answered((words(3), [*words(2), 2]), (words(2), [*words(1), 2])),
    answered((words(1), [2])),
]


def batch():
    captions = RNG.integers(3, 32, (4, 3)).astype(np.int32)
    captions[2] = captions[0]
    return {**tiny.batch(ROWS, 16), "captions": captions}


BATCH = batch()


def stage(parts=1, **loss):
    return StageConfig(
        method=tiny.METHOD,
        train=("projector/.*", "llm/layers/.*", "voco/.*"),
        loss=LossConfig(**{"chunk": 8, **loss}),
        optim=OptimConfig(accumulate=parts),
    )


@functools.partial(jax.jit, static_argnums=0, static_argnames="max_targets")
def gradients(stage, params, batch, teacher=None, count=K, max_targets=8):
    options = {"teacher": teacher, "voco_count": count, "key": KEY, "max_targets": max_targets}
    return step.gradients(CFG, stage, params, batch, **options)


def test_accumulation_changes_no_gradient():
    """In 1, 2 and 4 parts, though the parts hold 12 + 3 and 7, 2, 5, 1 supervised tokens."""
    whole, metrics = gradients(stage(kl=0.5), tiny.params(), BATCH, tiny.params(1), np.int32(K))
    assert float(metrics["tokens"]) == 15
    assert set(flatten(whole)) == {p for p in flatten(tiny.params()) if re.match("projector/|llm/layers/|voco/", p)}
    assert min(float(jnp.abs(leaf).max()) for leaf in flatten(whole).values()) > 1e-5
    for parts in (2, 4):
        grads, summed = gradients(stage(parts, kl=0.5), tiny.params(), BATCH, tiny.params(1), np.int32(K))
        jax.tree.map(functools.partial(tiny.close, atol=1e-5), grads, whole)
        assert set(summed) == set(metrics) == {"loss", "accuracy", "tokens", "ce", "kl"}
        for name, value in metrics.items():
            tiny.close(summed[name], value)


def test_every_part_draws_on_its_own(monkeypatch):
    """What is random in a step (selection, dropped tokens) is drawn anew in each of its parts."""

    def drawn(cfg, stage, params, batch, *, key, **_):
        return {"ce": jax.random.uniform(key) + 0 * jnp.sum(params["voco"]["table"])}

    monkeypatch.setattr(step, "loss_terms", drawn)
    options = {"teacher": None, "voco_count": K, "key": KEY, "max_targets": 8}
    _, metrics = step.gradients(CFG, stage(4), tiny.params(), BATCH, **options)
    lots = [float(jax.random.uniform(key)) for key in jax.random.split(KEY, 4)]
    assert float(metrics["ce"]) == pytest.approx(sum(lots) / 15)


terms = jax.jit(
    lambda stage, params, batch, teacher, count: step.loss_terms(
        CFG, stage, params, batch, teacher=teacher, voco_count=count, key=KEY, max_targets=8
    ),
    static_argnums=0,
)


def answers(params, table, count, method=tiny.METHOD):
    """Log probabilities [15, V] at the supervised tokens, by the token before each in its thread, and the labels."""
    logits, slots = tiny.forward(params, BATCH, TABLES[table], np.int32(count), method=method)
    row, at = np.nonzero(slots.supervised)
    lines = np.asarray(logits, np.float64)[row, np.asarray(slots.previous)[row, at]]
    return lines - np.log(np.exp(lines).sum(axis=-1, keepdims=True)), np.asarray(slots.ids)[row, at]


def test_terms_of_the_loss():
    """CE and KL as from the whole logits of two passes; the teacher reads no VoCo tokens, and sees the picture."""
    found = terms(stage(kl=1.0), tiny.params(), BATCH, tiny.params(1), np.int32(K))
    student, label = answers(tiny.params(), "voco", K)
    teacher, _ = answers(tiny.params(1), "visible", 0)
    assert float(found["count"]) == len(label) == 15
    tiny.close(found["ce"], -student[np.arange(15), label].sum(), atol=1e-4)
    tiny.close(found["correct"], (student.argmax(axis=-1) == label).sum())
    tiny.close(found["kl"], (np.exp(teacher) * (teacher - student)).sum(), atol=1e-4)
    # A teacher that knows no VoCo token, such as a converted LLaVA, teaches the same.
    plain = {name: part for name, part in tiny.params(1).items() if name not in ("voco", "contrast")}
    tiny.close(terms(stage(kl=1.0), tiny.params(), BATCH, plain, np.int32(K))["kl"], found["kl"])


FEW = dataclasses.replace(stage(kl=1.0, contrast=1.0), method=MethodConfig(encoder="uniform", tokens=5, voco=8))


def test_teacher_reads_the_whole_picture_whatever_the_student_is_given():
    """A student with 5 of 16 tokens has fewer slots than its teacher; each target still meets its own."""
    found = terms(FEW, tiny.params(), BATCH, tiny.params(), np.int32(K))
    student, _ = answers(tiny.params(), "visible", K, FEW.method)
    teacher, _ = answers(tiny.params(), "visible", 0)
    tiny.close(found["kl"], (np.exp(teacher) * (teacher - student)).sum(), atol=1e-4)


def test_contrastive_term_is_that_of_cls_and_caption():
    found = terms(FEW, tiny.params(), BATCH, tiny.params(), np.int32(K))
    params = jax.tree.map(np.asarray, tiny.params())
    pixels = vit.normalise(BATCH["images"][:, 0])
    _, summary = jax.jit(lambda p, x: vit.features(CFG, p, x, summary=True))(params["vit"], pixels)
    caption = params["llm"]["embed"]["table"][BATCH["captions"]].mean(axis=1)
    image, text, scale = (params["contrast"][name] for name in ("image", "text", "scale"))
    expected = jax.jit(losses.contrastive)(summary @ image["w"], caption @ text["w"], scale)
    tiny.close(found["contrast"], expected)


def test_a_contrastive_stage_runs_no_language_model():
    def program(params):
        which = stage(contrast=1.0, ce=0.0)
        options = {"teacher": None, "voco_count": jnp.int32(K), "key": KEY, "max_targets": 8}
        return step.loss_terms(CFG, which, params, BATCH, **options)

    assert set(jax.eval_shape(program, tiny.params())) == {"contrast"}
    turns = re.findall(r"\blength=(\d+)", str(jax.make_jaxpr(program)(tiny.params())))
    assert sum(map(int, turns)) == CFG.vit.layers


def test_padding_of_a_caption_does_not_count():
    short = np.array([[5, 6, 0], [0, 0, 0]], np.int32)
    found = jax.jit(step.caption_embedding)(tiny.params(), short)
    table = np.asarray(tiny.params()["llm"]["embed"]["table"])
    tiny.close(found[0], table[[5, 6]].mean(axis=0) @ np.asarray(tiny.params()["contrast"]["text"]["w"]))
    assert np.all(np.asarray(found[1]) == 0)


def test_partition_and_merge():
    params = tiny.params()
    trained, frozen = step.partition(params, ("voco/.*", "llm/norm/scale"))
    assert set(flatten(trained)) == {"voco/table", "llm/norm/scale"}
    assert not set(flatten(trained)) & set(flatten(frozen))
    again = step.merge(trained, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params)))
    # A pattern has to match the whole path.
    assert not flatten(step.partition(params, ("voco",))[0])


VOCAB = 4099  # a prime, to be found again in the compiled program


def test_a_step_trains_what_it_should_and_holds_no_logits_of_every_slot():
    cfg = dataclasses.replace(CFG, llm=dataclasses.replace(CFG.llm, vocab_size=VOCAB))
    shapes = jax.eval_shape(functools.partial(vlm.init, cfg, "mlp2x_gelu"), KEY)
    params = jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape).astype(np.float32) / 4, shapes)
    which = stage(contrast=0.1)
    tx = optax.adam(1e-2)
    trained, frozen = step.partition(params, which.train)
    state = step.TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(trained))

    @jax.jit
    def run(state, batch):
        return step.train_step(cfg, which, tx, state, batch, voco_count=jnp.int32(K), key=KEY, max_targets=8)

    program = run.lower(state, BATCH).compile()
    new, metrics = program(state, BATCH)
    assert int(new.step) == 1 and set(metrics) == {"loss", "ce", "contrast", "accuracy", "tokens", "grad_norm"}
    for path, leaf in flatten(new.params).items():
        same = np.array_equal(leaf, flatten(params)[path])
        assert same == (path in flatten(frozen)), path
    # Text of optimised programs names every array: those with the vocabulary are tables and chunks of 8 positions.
    shapes = re.findall(r"\w+\[([\d,]*\b4099\b[\d,]*)\]", program.as_text())
    others = {np.prod([int(n) for n in shape.split(",")]) // VOCAB for shape in shapes}
    assert others and max(others) <= CFG.llm.width < 4 * 16


@functools.partial(jax.jit, static_argnames="questions")
def score(params, batch, table, questions=2):
    options = {"table": table, "voco_count": jnp.int32(K), "questions": questions, "max_targets": 10}
    return step.score_step(CFG, tiny.METHOD, params, batch, **options)


@pytest.mark.parametrize("seed", range(3))
def test_scoring_is_what_a_greedy_decode_would_write(seed):
    """Answers are the model's own, whole, cut short, or with one token changed, two questions a row."""
    rng = np.random.default_rng(seed)
    params, table = tiny.params(seed), TABLES["voco"]
    questions = [tiny.words(rng, count) for count in (3, 1, 4, 2)]
    pictures = tiny.images(1, seed=seed).repeat(4, 0)
    asked = {**tiny.batch([[tiny.PICTURE, question] for question in questions], 11), "images": pictures}
    written = np.asarray(tiny.answer(params, asked, table, np.int32(K), np.int32(-1))[0])
    outcomes = set()
    for turn in range(4):
        pairs, expected = [], []
        for question, own in zip(questions, written):
            reply = own[: rng.integers(1, 4)].tolist()
            if rng.random() < 0.5:
                reply[rng.integers(len(reply))] = int(rng.integers(3, 32))
            pairs.append((question, reply))
            expected.append(reply == own[: len(reply)].tolist())
        rows = [answered(*pairs[:2]), answered(*pairs[2:]), answered(pairs[turn])]
        scored = {**tiny.batch(rows, 16, left=turn % 2 == 0), "images": pictures[:3]}
        found = np.asarray(score(params, scored, table))
        np.testing.assert_array_equal(found, [expected[:2], expected[2:], [expected[turn], False]])
        outcomes |= set(expected)
    assert outcomes == {True, False}


def test_mask_table():
    np.testing.assert_array_equal(step.mask_table(tiny.METHOD), TABLES["voco"])
