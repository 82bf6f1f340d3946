"""Loss terms against NumPy in float64, with NaN in every place that nobody may read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokzip_jax import layout, losses
from tokzip_jax.types import IMAGE_ID, VOCO_ID

B, Q, D, V = 2, 5, 3, 7
RNG = np.random.default_rng(0)
HIDDEN, TEACHER = (RNG.normal(size=(B, Q, D)).astype(np.float32) for _ in range(2))
HEAD, TEACHER_HEAD = (2 * RNG.normal(size=(D, V)).astype(np.float32) for _ in range(2))
LABEL = RNG.integers(0, V, (B, Q)).astype(np.int32)
VALID = np.array([[True, True, False, True, False], [False, True, True, True, False]])
HOLES = np.where(VALID[:, :, None], HIDDEN, np.nan).astype(np.float32)
TEACHER_HOLES = np.where(VALID[:, :, None], TEACHER, np.inf).astype(np.float32)


def log_softmax(x):
    x = x.astype(np.float64)
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def naive(temperature):
    """Sums over the valid places, one at a time; KL(teacher || student) T^2 at temperature T."""
    out = {"ce": 0.0, "kl": 0.0, "correct": 0.0, "count": 0.0}
    for b, q in zip(*np.nonzero(VALID)):
        student, teacher = HIDDEN[b, q] @ HEAD, TEACHER[b, q] @ TEACHER_HEAD
        out["ce"] -= log_softmax(student)[LABEL[b, q]]
        s, t = log_softmax(student / temperature), log_softmax(teacher / temperature)
        out["kl"] += temperature**2 * sum(np.exp(t[v]) * (t[v] - s[v]) for v in range(V))
        out["correct"] += student.argmax() == LABEL[b, q]
        out["count"] += 1
    return out


def terms(hidden, head, teacher_hidden, valid, temperature, chunk):
    return losses.token_losses(
        hidden,
        LABEL,
        valid,
        lambda x: x @ head,
        teacher=(teacher_hidden, lambda x: x @ TEACHER_HEAD),
        temperature=temperature,
        chunk=chunk,
    )


run = jax.jit(terms, static_argnames="chunk")


# 5 places in each of 2 rows: all at once, with a remainder, one at a time, and a chunk larger than there are places.
@pytest.mark.parametrize("chunk", [10, 6, 4, 1, 1024])
def test_token_terms_equal_the_loop_for_every_chunk(chunk):
    for temperature in (1.0, 3.0):
        found, expected = run(HOLES, HEAD, TEACHER_HOLES, VALID, temperature, chunk), naive(temperature)
        assert set(found) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def loss(hidden, head, teacher_hidden, valid, weights):
    found = terms(hidden, head, teacher_hidden, valid, 2.0, 4)
    return weights[0] * found["ce"] + weights[1] * found["kl"]


grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


def test_gradient_of_padding_is_zero_even_of_nan():
    """And the head's gradient is that of clean hidden states; nothing flows to the teacher."""
    hidden, head, teacher = grads(HOLES, HEAD, TEACHER_HOLES, VALID, jnp.ones(2))
    clean_hidden, clean_head, _ = grads(HIDDEN, HEAD, TEACHER, VALID, jnp.ones(2))
    np.testing.assert_array_equal(hidden, clean_hidden)
    np.testing.assert_array_equal(head, clean_head)
    assert np.all(np.asarray(hidden)[~VALID] == 0) and np.all(np.asarray(hidden)[VALID] != 0)
    assert np.all(np.asarray(teacher) == 0)


def test_gradient_is_softmax_minus_target():
    """Of CE, and of the KL: T (softmax(s/T) - softmax(t/T)), T^2 having made up for one of the two 1/T."""
    for weights, expected in (
        ([1.0, 0.0], np.exp(log_softmax(HIDDEN @ HEAD)) - np.eye(V)[LABEL]),
        ([0.0, 1.0], 2 * (np.exp(log_softmax(HIDDEN @ HEAD / 2)) - np.exp(log_softmax(TEACHER @ TEACHER_HEAD / 2)))),
    ):
        hidden, _, _ = grads(HOLES, HEAD, TEACHER_HOLES, VALID, jnp.array(weights))
        np.testing.assert_allclose(hidden, np.where(VALID[:, :, None], expected @ HEAD.T, 0), atol=2e-6)


def test_no_valid_place_gives_zero():
    found = run(HOLES * np.nan, HEAD, TEACHER_HOLES, VALID & False, 1.0, 4)
    assert all(float(value) == 0 for value in found.values())


def test_without_a_teacher_there_is_no_kl():
    found = jax.jit(lambda hidden: losses.token_losses(hidden, LABEL, VALID, lambda x: x @ HEAD, chunk=4))(HOLES)
    np.testing.assert_allclose(found["ce"], naive(1.0)["ce"], rtol=1e-5)
    assert "kl" not in found


def test_half_precision_logits_are_summed_in_float32():
    logits = RNG.normal(size=(4, 1000)).astype(jnp.bfloat16)
    label = np.arange(4)
    wide = logits.astype(np.float32)
    found = jax.jit(losses.cross_entropy)(logits, label)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, -log_softmax(wide)[label, label], rtol=1e-6)
    divergence = jax.jit(losses.divergence)
    student, teacher = log_softmax(wide / 2), log_softmax(wide[::-1] / 2)
    expected = 4 * np.sum(np.exp(teacher) * (teacher - student), axis=-1)
    np.testing.assert_allclose(divergence(logits, logits[::-1], 2.0), expected, rtol=1e-5)


def softmax_loss(image, text, same, log_scale):
    """CLIP's loss pair by pair, over the texts of each picture and the pictures of each text; targets are shared."""
    count = len(image)
    logits = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            cosine = image[i] @ text[j] / np.linalg.norm(image[i]) / np.linalg.norm(text[j])
            logits[i, j] = np.exp(log_scale) * cosine
    total = 0.0
    for i in range(count):
        for table in (logits, logits.T):
            likely = [table[i, j] - np.log(np.exp(table[i]).sum()) for j in range(count) if same[i, j]]
            total -= np.mean(likely) / 2
    return total / count


contrastive = jax.jit(losses.contrastive)


@given(seed=st.integers(0, 1000), scale=st.floats(-1, 3), equal=st.booleans())
@settings(max_examples=20)
def test_contrastive_equals_the_double_loop(seed, scale, equal):
    rng = np.random.default_rng(seed)
    image, text = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    same = np.eye(4, dtype=bool)
    if equal:  # pictures 0 and 2 have equal captions: both are positives of both, which needs no code of its own
        same[0, 2] = same[2, 0] = True
        text[2] = text[0]
    np.testing.assert_allclose(contrastive(image, text, scale), softmax_loss(image, text, same, scale), rtol=2e-5)


def test_contrastive_of_a_zero_row_has_a_finite_gradient():
    """A caption of nothing but padding has a zero embedding."""
    text = np.zeros((2, 3), np.float32)
    grad = jax.jit(jax.grad(functools.partial(losses.contrastive, np.ones((2, 3), np.float32))))
    assert np.isfinite(grad(text, 1.0)).all()


def test_targets_are_the_supervised_slots_and_what_predicts_them():
    """A question and, in its own thread, a caption that the last VoCo token predicts; the second row is shorter."""
    ids = np.array([[1, IMAGE_ID, VOCO_ID, 5, 6, 2, 7, 8, 2], [0, 0, 1, IMAGE_ID, VOCO_ID, 5, 9, 2, 0]], np.int32)
    answer = np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1, 0]], bool)
    thread = np.array([[0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 1, 1, 1, 0]], np.int32)
    batch = {"ids": ids, "thread": thread, "sample": np.int32(ids != 0), "supervised": answer}
    slots = jax.jit(functools.partial(layout.expand, voco=2, voco_count=2))(batch, np.ones((2, 1, 3), bool))
    # p v v v c c 5 6 2 7 8 2   and   . . p v v v c c 5 9 2 .
    targets = jax.jit(losses.targets, static_argnums=1)
    read, label, valid = (np.asarray(value) for value in targets(slots, 5))
    np.testing.assert_array_equal(label[valid], [6, 2, 7, 8, 2, 9, 2])
    np.testing.assert_array_equal(valid, [[True] * 5, [True] * 2 + [False] * 3])
    np.testing.assert_array_equal(read[valid], [6, 7, 5, 9, 10, 8, 9])
    # More places than slots are as many as there are slots, none of them invented.
    read, _, valid = (np.asarray(value) for value in targets(slots, 100))
    assert read.shape == (2, slots.ids.shape[1]) and valid.sum() == 7
    picked = np.asarray(jax.jit(losses.pick)(np.arange(24.0).reshape(2, 12, 1), read))
    np.testing.assert_array_equal(picked[valid][:, 0], [6, 7, 5, 9, 10, 12 + 8, 12 + 9])
