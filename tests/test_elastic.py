"""One model for every number of VoCo tokens: elastic is dedicated, draws repeat, questions choose for themselves."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model as tiny

from tokzip_jax import elastic, flops, layout, recipe, step, voco
from tokzip_jax.config import AutoConfig, LossConfig, OptimConfig, RowConfig, RunConfig, StageConfig
from tokzip_jax.evals import runner, table
from tokzip_jax.masks import TABLES, visibility
from tokzip_jax.types import IMAGE_ID, PAD, VOCO, VOCO_ID
from tokzip_jax.workdir import Workdir

CFG = tiny.MODEL
RNG = np.random.default_rng(0)
QUESTIONS = [tiny.words(RNG, count) for count in (6, 4, 8, 1)]
STARTS = [tiny.PICTURE, [1, IMAGE_ID, 8, VOCO_ID], [IMAGE_ID, VOCO_ID], [1]]
ROWS = [list(row) for row in zip(STARTS, QUESTIONS)]
LADDER = (1, 2, 4, 8)


def one_pass(count, table="voco", rows=ROWS):
    """Logits [B, V] behind each row's last token, from the elastic program with `count` of eight slots in use."""
    logits, slots = tiny.forward(tiny.params(), tiny.batch(rows, 16), TABLES[table], np.asarray(count, np.int32))
    return np.stack([tiny.logits_of_text(logits, slots, row)[-1] for row in range(len(rows))])


@jax.jit
def layouts(batch, valid):
    """For k = 1 .. 8 the layout and mask of eight slots with k in use (leading axis), and those of k slots (a list)."""

    def seen(slots):
        return slots, visibility(slots.stream, slots.stream, TABLES["voco"])

    counts = jnp.arange(1, 9)
    eight = jax.vmap(lambda count: seen(layout.expand(batch, valid, voco=8, voco_count=count)))(counts)
    return eight, [seen(layout.expand(batch, valid, voco=count, voco_count=count)) for count in range(1, 9)]


def dense(slots, seen, row):
    """A row of a layout without its padding: integers by name, places renumbered."""
    kept = np.flatnonzero(slots.stream.kind[row] != PAD)
    place = {-1: -1, **{int(old): new for new, old in enumerate(kept)}}
    named = {name: value for name, value in vars(slots.stream).items() if name != "order" and value is not None}
    values = {name: value[row][kept] for name, value in named.items()}
    values |= {name: getattr(slots, name)[row][kept] for name in ("ids", "visual", "voco", "supervised")}
    values["previous"] = np.array([place[int(at)] for at in slots.previous[row][kept]])
    return {**values, "seen": seen[row][np.ix_(kept, kept)]}


def test_slots_beyond_k_are_as_if_they_were_not_there():
    """Integers and mask of eight slots with k in use are those of k slots, for every k, with two questions a row."""
    marks = [{"thread": 1, "supervised": True}, {"thread": 2, "supervised": True}]
    rows = [[start, (QUESTIONS[0][:3], marks[0]), (QUESTIONS[1], marks[1])] for start in STARTS]
    batch = {name: values for name, values in tiny.batch(rows, 16).items() if name != "images"}
    eight, dedicated = jax.device_get(layouts(batch, np.ones((4, 1, 3), bool)))
    for count in range(1, 9):
        used = jax.tree.map(operator.itemgetter(count - 1), eight)
        for row in range(4):
            found, expected = dense(*used, row), dense(*dedicated[count - 1], row)
            assert np.sum(expected["kind"] == VOCO) == (count if row < 3 else 0)
            for name, value in expected.items():
                np.testing.assert_array_equal(found[name], value, err_msg=f"k={count}, row {row}, {name}")


def test_elastic_at_k_is_the_dedicated_model(count=3):
    """Logits of a program that has k slots and no others."""
    method = dataclasses.replace(tiny.METHOD, voco=count)
    logits, slots = tiny.forward(tiny.params(), tiny.batch(ROWS, 16), TABLES["voco"], np.int32(count), method=method)
    assert slots.ids.shape[1] == 16 + 15 + count - 1
    expected = np.stack([tiny.logits_of_text(logits, slots, row)[-1] for row in range(4)])
    tiny.close(one_pass(count), expected)
    assert np.abs(one_pass(count + 1) - expected)[:3].max(axis=1).min() > 1e-3


def test_every_row_may_have_its_own_number():
    mixed = one_pass([1, 7, 4, 2])
    for row, count in enumerate([1, 7, 4, 2]):
        tiny.close(mixed[row], one_pass(count)[row])


# Training: what is drawn, and that it is what the step uses.


STAGE = StageConfig(method=tiny.METHOD, voco_counts=(1, 8, 8), voco_draw="row")


@functools.partial(jax.jit, static_argnums=0)
def draws(stage, key, numbers):
    return jax.vmap(lambda number: elastic.draw(stage, key, number, 64))(numbers)


def test_draws_follow_from_key_and_step_alone():
    """In any order of the steps the same; numbers occur about as often as they are named."""
    key, numbers = jax.random.key(5), np.arange(60)
    every = np.asarray(draws(STAGE, key, numbers))
    assert every.shape == (60, 64) and len({tuple(line) for line in every.tolist()}) == 60
    np.testing.assert_array_equal(draws(STAGE, key, numbers[::-1]), every[::-1])
    assert np.any(draws(STAGE, jax.random.key(6), numbers) != every)
    assert [np.mean(every == count) for count in (1, 8)] == pytest.approx([1 / 3, 2 / 3], abs=0.05)
    steps = np.asarray(draws(dataclasses.replace(STAGE, voco_draw="random"), key, numbers))
    assert steps.shape == (60,) and set(steps.tolist()) == {1, 8}
    for wrong in ({"voco_draw": "turn"}, {"voco_counts": ()}):
        with pytest.raises(ValueError, match=r"is no draw; it takes 'random' or 'row' and at least one number"):
            elastic.draw(dataclasses.replace(STAGE, **wrong), key, 0, 4)


ANSWERED = [[start, (q, {"thread": 1}), ([5, 2], {"thread": 1, "supervised": True})] for start, q in ROWS]


@functools.partial(jax.jit, static_argnums=0)
def gradients(stage, params, batch, count):
    return step.gradients(
        CFG, stage, params, batch, teacher=None, voco_count=count, key=jax.random.key(0), max_targets=2
    )


def stage_of(parts):
    return StageConfig(
        method=tiny.METHOD, train=("voco/.*",), loss=LossConfig(chunk=8), optim=OptimConfig(accumulate=parts)
    )


def test_every_row_keeps_its_number_in_the_parts_of_a_step():
    """Gradients of a step with a number a row, in one piece and in two; embeddings beyond a number have none."""
    batch = tiny.batch(ANSWERED, 16)
    counts = np.array([1, 5, 3, 8], np.int32)  # row 3 has no picture
    whole, metrics = gradients(stage_of(1), tiny.params(), batch, counts)
    parts, summed = gradients(stage_of(2), tiny.params(), batch, counts)
    found = np.asarray(whole["voco"]["table"])
    tiny.close(parts["voco"]["table"], found)
    tiny.close(summed["ce"], metrics["ce"])
    assert np.all(found[5:] == 0) and np.abs(found[:5]).max(axis=1).min() > 1e-6
    turned, _ = gradients(stage_of(2), tiny.params(), batch, np.roll(counts, 1))
    assert np.abs(np.asarray(turned["voco"]["table"]) - found).max() > 1e-4


# Inference: the cache of k_max holds those of all k.

build = jax.jit(voco.build, static_argnums=(0, 3), static_argnames="positions")
ask = jax.jit(voco.ask, static_argnums=0, static_argnames="max_new")
auto_ask = jax.jit(elastic.ask, static_argnums=(0, 4), static_argnames="max_new")
PICTURES = [tiny.PICTURE, [1, 9, IMAGE_ID, 8, VOCO_ID], tiny.PICTURE, [IMAGE_ID, VOCO_ID]]
ROWS_WITH_PICTURES = [list(row) for row in zip(PICTURES, QUESTIONS)]


@functools.cache
def cache_of(count, mask="voco", positions="original"):
    batch = tiny.batch([[ids] for ids in PICTURES], 8)
    method = dataclasses.replace(tiny.METHOD, voco_mask=mask)
    cache = build(CFG, tiny.params(), batch, method, voco_count=np.int32(count))
    return jax.jit(functools.partial(voco.compact, CFG.llm))(cache) if positions == "compact" else cache


def ids_of(questions=QUESTIONS):
    return tiny.batch([[question] for question in questions], 8)["ids"]


@pytest.mark.parametrize("positions", voco.POLICIES)
@pytest.mark.parametrize("mask", ["voco", "prefix_visible"])
def test_the_first_slots_of_a_large_cache_are_the_small_cache(mask, positions):
    """Integers exactly, keys and values to rounding, for every k."""
    for count in range(1, 9):
        found, expected = elastic.first(cache_of(8, mask, positions), np.int32(count)), cache_of(count, mask, positions)
        for name in ("kind", "segment", "position", "next_position"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=f"k={count}, {name}")
        used = (np.asarray(expected.kind) != PAD)[None, :, None, :, None]
        for name in ("k", "v"):
            tiny.close(np.where(used, getattr(found, name), 0), np.where(used, getattr(expected, name), 0), atol=1e-6)


def test_a_static_number_cuts_the_cache():
    small = elastic.first(cache_of(8), 2)
    assert small.nbytes * 4 == cache_of(8).nbytes and small.kind.shape == (4, 2)
    rows = elastic.first(cache_of(8), np.array([1, 2, 3, 8]))
    np.testing.assert_array_equal(np.sum(rows.kind == VOCO, axis=1), [1, 2, 3, 8])
    np.testing.assert_array_equal(rows.next_position, cache_of(8).next_position - np.array([7, 6, 5, 0]))
    for count in (1, 2):
        found = ask(CFG, tiny.params(), elastic.first(cache_of(8), count), ids_of(), max_new=5).logits_BV
        tiny.close(found, one_pass(count, rows=ROWS_WITH_PICTURES), atol=1e-4)
    with pytest.raises(ValueError, match="count=0 must be >= 1"):
        elastic.first(cache_of(8), 0)
    with pytest.raises(ValueError, match="count=9, but the cache holds 8 VoCo tokens of a picture: give at most that"):
        elastic.first(cache_of(8), 9)
    joined = voco.join(CFG.llm, [cache_of(2), cache_of(2)])
    with pytest.raises(ValueError, match="several pictures: take the first tokens of each one before they are joined"):
        elastic.first(joined, 1)


# k = auto: the rule.


def distributions(rungs, questions, seed=0):
    """Random walks of logits, so that later rungs are nearer to the last one; log probabilities in float64."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(size=(rungs, questions, 12)) * 0.6 ** np.arange(rungs)[:, None, None]
    logits = np.cumsum(steps, axis=0)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("against", elastic.AGAINST)
@pytest.mark.parametrize("measure", elastic.MEASURES)
def test_the_rule_is_a_plain_loop(measure, against):
    log_p = distributions(4, 30)
    change = np.asarray(elastic.changes(jnp.asarray(log_p, jnp.float32), measure=measure, against=against))
    for threshold in (0.0, 0.01, 0.1, 0.5, np.inf):
        chosen = np.asarray(elastic.choose(change, threshold))
        for question in range(30):
            p = np.exp(log_p[:, question])
            for rung in range(4):
                other = p[3] if against == "largest" else p[min(rung + 1, 3)]
                kl, most = np.sum(other * np.log(other / p[rung])), np.max(np.abs(other - p[rung]))
                distance = kl if measure == "kl" else most
                assert change[rung, question] == pytest.approx(distance, abs=1e-5)
                if distance <= threshold:
                    break
            assert chosen[question] == rung


def test_thresholds_are_monotone_and_their_ends_are_the_ends():
    change = np.asarray(elastic.changes(jnp.asarray(distributions(4, 200), jnp.float32)))
    chosen = [np.asarray(elastic.choose(change, t)) for t in (0.0, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0, np.inf)]
    assert np.all(chosen[0] == 3) and np.all(chosen[-1] == 0)
    assert np.all(np.diff(chosen, axis=0) <= 0) and len({tuple(line) for line in chosen}) > 4
    # Where nothing changes at all, the fewest tokens do at a threshold of 0 too.
    still = jnp.broadcast_to(jnp.asarray(distributions(1, 5), jnp.float32), (4, 5, 12))
    for against in elastic.AGAINST:
        assert not np.any(elastic.choose(elastic.changes(still, against=against), 0.0))


# k = auto: on the model.


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@functools.cache
def reference(against="largest"):
    """Change of the first answer token at every rung, from whole masked passes: [R, B]."""
    log_p = np.stack([log_softmax(one_pass(count, rows=ROWS_WITH_PICTURES)) for count in LADDER])
    other = log_p[-1:] if against == "largest" else np.concatenate([log_p[1:], log_p[-1:]])
    return np.sum(np.exp(other) * (other - log_p), axis=-1)


def between(change):
    """A threshold that parts the questions, away from every value that is compared with it."""
    values = np.sort(change[:-1].ravel())
    at = len(values) // 2
    assert values[at] - values[at - 1] > 1e-3
    return float(values[at - 1 : at + 1].mean())


def test_asking_chooses_as_whole_passes_would_and_answers_as_they_do():
    threshold = between(reference())
    expected = np.array(LADDER)[np.argmax(reference() <= threshold, axis=0)]
    assert len(set(expected.tolist())) > 1
    auto = AutoConfig(ladder=LADDER, threshold=threshold)
    prompt, chosen = auto_ask(CFG, tiny.params(), cache_of(8), ids_of(), auto, max_new=5)
    np.testing.assert_array_equal(chosen, expected)
    rows = np.stack([one_pass(count, rows=ROWS_WITH_PICTURES)[row] for row, count in enumerate(expected)])
    tiny.close(prompt.logits_BV, rows, atol=1e-4)
    tokens, _ = jax.jit(tiny.continued)(tiny.params(), prompt, TABLES["voco"], -1)
    batch = tiny.batch(ROWS_WITH_PICTURES, 16)
    whole, _ = tiny.answer(tiny.params(), batch, TABLES["voco"], expected.astype(np.int32), -1)
    np.testing.assert_array_equal(tokens, whole)
    # A question chooses alone: the same ones in another order and company.
    order = [2, 2, 0, 3]
    ids = ids_of([QUESTIONS[row] for row in order])
    _, again = auto_ask(CFG, tiny.params(), cache_of(8).take(order), ids, auto, max_new=5)
    np.testing.assert_array_equal(again, expected[order])


def test_asking_refuses():
    with pytest.raises(ValueError, match=r"auto\.ladder is empty"):
        elastic.ask(CFG, {}, cache_of(8), ids_of(), AutoConfig(), max_new=1)
    with pytest.raises(ValueError, match=r"2 questions need as many cache rows, not 4"):
        elastic.ask(CFG, {}, cache_of(8), ids_of(QUESTIONS[:2]), AutoConfig(ladder=(1, 8)), max_new=1)


score = jax.jit(elastic.score_step, static_argnums=(0, 1, 4), static_argnames=("questions", "max_targets"))
plain = jax.jit(step.score_step, static_argnums=(0, 1), static_argnames=("questions", "max_targets"))


@pytest.mark.parametrize("against", elastic.AGAINST)
def test_scoring_a_ladder(against):
    """Right or wrong is that of each rung by itself, the change that of whole passes, and no answer is looked at."""
    # The answer that the model itself gives at k = 1, so that some are right.
    first = np.argmax(one_pass(1, rows=ROWS_WITH_PICTURES), axis=-1)

    def batch(answers):
        answer = {"thread": 1, "supervised": True}
        rows = [[start, (q, {"thread": 1}), ([int(a)], answer)] for (start, q), a in zip(ROWS_WITH_PICTURES, answers)]
        return tiny.batch(rows, 16)

    auto = AutoConfig(ladder=LADDER, against=against)
    options = {"table": TABLES["voco"], "questions": 2, "max_targets": 3}
    right, change = score(CFG, tiny.METHOD, tiny.params(), batch(first), auto, **options)
    assert right.shape == change.shape == (4, 4, 2)
    for rung, count in enumerate(LADDER):
        alone = plain(CFG, tiny.METHOD, tiny.params(), batch(first), voco_count=np.int32(count), **options)
        np.testing.assert_array_equal(right[rung], alone)
    assert np.all(right[0, :, 0]) and not np.all(right[3, :, 0]) and not np.any(right[:, :, 1])
    tiny.close(change[:, :, 0], reference(against), atol=1e-4)
    _, other = score(CFG, tiny.METHOD, tiny.params(), batch(first % 29 + 3), auto, **options)
    np.testing.assert_array_equal(other[:, :, 0], change[:, :, 0])
    auto = dataclasses.replace(auto, threshold=between(reference(against)))
    found, chosen = elastic.pick(right[:, :, 0], change[:, :, 0], auto, np.arange(4))
    rung = np.argmax(reference(against) <= auto.threshold, axis=0)
    np.testing.assert_array_equal(chosen, np.array(LADDER)[rung])
    np.testing.assert_array_equal(found, np.asarray(right)[rung, np.arange(4), 0])


def test_a_picture_keeps_what_its_questions_need():
    """Pictures 3, 0 and 2: the largest number that one of its questions picks, for all of them."""
    auto = AutoConfig(ladder=(1, 2, 8), threshold=0.5)
    change = np.array([[0.1, 0.9, 0.2, 0.9, 0.6], [0.0, 0.4, 0.0, 0.7, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    right = np.array([[1, 1, 0, 0, 1], [0, 1, 1, 0, 0], [0, 0, 1, 1, 1]], bool)
    pictures = np.array([3, 3, 0, 2, 2])
    found, chosen = elastic.pick(right, change, auto, pictures)
    assert chosen.tolist() == [1, 2, 1, 8, 2] and found.tolist() == [True, True, False, True, False]
    found, chosen = elastic.pick(right, change, dataclasses.replace(auto, per="picture"), pictures)
    assert chosen.tolist() == [2, 2, 1, 8, 8] and found.tolist() == [False, True, False, True, True]


# In a run.


def test_a_stage_draws_by_its_key_and_the_number_of_its_step(monkeypatch, tmp_path):
    """What `run_step` hands on is the draw of that step, wherever the training goes on; in turn it is the host's."""

    def only_count(cfg, stage, tx, state, batch, *, voco_count, **_):
        return dataclasses.replace(state, step=state.step + 1), {"count": jnp.broadcast_to(voco_count, (64,))}

    monkeypatch.setattr(recipe.step, "train_step", only_count)
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    batch = {"ids": np.zeros((64, 4), np.int32)}

    def counts(kind, numbers):
        stage = StageConfig(steps=9, method=tiny.METHOD, voco_counts=(1, 8), voco_draw=kind, train=("voco/.*",))
        ready = recipe.prepare(RunConfig(model=CFG, stages={"s": stage}), "s", mesh, Workdir(tmp_path))
        state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), ready.abstract)
        state = dataclasses.replace(state, step=np.int32(numbers[0]))
        found = []
        for number in numbers:
            state, metrics = ready.run_step(state, batch, None, ready.given(number))
            found.append(np.asarray(metrics["count"]).tolist())
        return found

    straight = counts("row", [0, 1, 2, 3])
    assert len({tuple(line) for line in straight}) == 4 and {x for line in straight for x in line} == {1, 8}
    assert counts("row", [2, 3]) == straight[2:]  # a stage that is made anew and goes on at step 2
    assert counts("turn", [0, 1, 2]) == [[1] * 64, [8] * 64, [1] * 64]


def test_a_row_of_the_table_whose_questions_choose(monkeypatch):
    """Accuracy at the chosen numbers and their mean as tokens; a question is read at each of them, and a picture keeps
    the largest one, or the mean of what pictures keep; fillers are not counted."""
    auto = AutoConfig(ladder=(1, 2, 8), threshold=0.5)
    row = RowConfig(method=tiny.METHOD, auto=auto)
    examples = [{"types": ["shape", "yes/no"], "answers": ["red", "no"]}, {"types": ["shape"], "answers": ["blue"]}]
    # Three rungs, two rows and a filler, two questions: the first keeps to 1, the second needs 2, the third 8.
    change = np.array([[[0.1, 0.6], [0.7, 0.0], [0, 0]], [[0.9, 0.5], [0.6, 0.0], [0, 0]], np.zeros((3, 2))])
    right = np.array([[[1, 0], [1, 1], [1, 1]], [[0, 1], [1, 1], [1, 1]], [[0, 0], [0, 1], [1, 1]]], bool)
    question = np.array([[0, 1], [0, -1], [-1, -1]])
    batch = {name: np.zeros((3, 1), np.int32) for name in runner.MODEL_INPUTS}
    batch |= {"example": np.array([0, 1, -1], np.int32), "question": question}
    asked = []
    monkeypatch.setattr(runner, "_scorer", lambda *settings: asked.append(settings[-1]) or (lambda *_: (right, change)))
    monkeypatch.setattr(runner.Runner, "batches", lambda self, order: [batch])
    monkeypatch.setattr(runner.Runner, "load", lambda self, row: {"voco": {}})
    monkeypatch.setattr(runner.Runner, "question_tokens", 7)
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    found = runner.Runner(RunConfig(model=CFG), None, mesh, None, examples).measure("auto", row)
    assert asked == [dataclasses.replace(auto, threshold=0.0)]  # one program for every threshold
    assert found.visual_tokens == pytest.approx((1 + 2 + 8) / 3)
    assert found.accuracy == pytest.approx(2 / 3) and found.accuracy_by_type == {"shape": 0.5, "yes/no": 1.0}
    read = {count: flops.ledger(CFG, tiny.METHOD, text_tokens=7, read_voco=count) for count in auto.ladder}
    assert found.kv_bytes == read[8].kv_bytes
    assert found.prefill_flops == sum(read[count].prefill_flops for count in auto.ladder)
    assert found.note == "means; of 1, 2, 8 tokens the fewest within 0.5 (kl) of the largest"
    lines = table.text_table([found]).splitlines()
    assert "3.67" in lines[2] and found.note in lines[2]
    # The first picture's questions need 2 tokens, that of the second one 8.
    row = dataclasses.replace(row, auto=dataclasses.replace(auto, per="picture"))
    kept = runner.Runner(RunConfig(model=CFG), None, mesh, None, examples).measure("auto", row)
    assert asked[1:] == asked[:1] and kept.note.endswith("of the largest for all questions of a picture")
    assert kept.visual_tokens == 4 and kept.accuracy == pytest.approx(1 / 3)
    assert kept.kv_bytes == 4 * read[1].kv_bytes and kept.prefill_flops == found.prefill_flops
