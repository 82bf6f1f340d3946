"""Loss terms, in float32, on the positions that are read and nowhere else.

Hidden states are gathered at the supervised positions first, and their logits exist one chunk at a time: a training
step never holds [B, T, V] floats.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tokzip_jax.layout import Layout
from tokzip_jax.types import Array

# (hidden states [1, C, D]) -> logits [1, C, V]
Head = Callable[[Array], Array]


def targets(slots: Layout, count: int) -> tuple[Array, Array, Array]:
    """The supervised slots of a batch, in `count` static places a row.

    Args:
        slots: the layout [B, T'].
        count: at least as many as the fullest row holds; the rest is left over as invalid.

    Returns:
        read [B, count], the slot whose output predicts the target; label [B, count], its id; valid [B, count] bool.
    """
    count = min(count, slots.supervised.shape[1])
    index = jnp.argsort(~slots.supervised, axis=1, stable=True)[:, :count]
    valid = jnp.take_along_axis(slots.supervised, index, axis=1)
    read = jnp.maximum(jnp.take_along_axis(slots.previous, index, axis=1), 0)
    return read, jnp.take_along_axis(slots.ids, index, axis=1), valid


def pick(hidden_BTD: Array, read_BQ: Array) -> Array:
    """[B, Q, D]: the hidden states at the given slots."""
    return jnp.take_along_axis(hidden_BTD, read_BQ[:, :, None], axis=1)


def cross_entropy(logits_QV: Array, label_Q: Array) -> Array:
    """[..., Q] float32 negative log likelihood of the labels."""
    logits_QV = logits_QV.astype(jnp.float32)
    return jax.nn.logsumexp(logits_QV, axis=-1) - jnp.take_along_axis(logits_QV, label_Q[..., None], axis=-1)[..., 0]


def divergence(student_QV: Array, teacher_QV: Array, temperature: float) -> Array:
    """[..., Q] float32 KL(teacher || student) at a temperature T, times T^2.

    The square keeps the gradient's size where T changes (arXiv 1503.02531, section 2); the direction is the one of
    VoCo-LLaMA's equation for the uncompressed model as target. No gradient flows to the teacher.
    """
    student = jax.nn.log_softmax(student_QV.astype(jnp.float32) / temperature)
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_QV).astype(jnp.float32) / temperature)
    return temperature**2 * jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def token_losses(
    hidden_BQD: Array,
    label_BQ: Array,
    valid_BQ: Array,
    head: Head,
    *,
    teacher: tuple[Array, Head] | None = None,
    teacher_ce: bool = False,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> dict[str, Array]:
    """Sums of the token terms over the supervised positions.

    Args:
        hidden_BQD: hidden states at the supervised positions.
        label_BQ, valid_BQ: their labels, and which places hold one.
        head: final norm and output head.
        teacher: hidden states [B, Q, D] of another model at the same targets, and its head; None = no "kl". No
            gradient of the KL flows there.
        teacher_ce: also the teacher's own cross entropy. It has a gradient, unless `teacher` has none.
        temperature: of the KL.
        chunk: positions whose logits exist at once, over all devices. A chunk is some positions of every row, so that
            rows which are split over devices stay where they are.

    Returns:
        float32 scalars "ce" (and "kl", "teacher_ce") summed, "correct" (arg-max hits), "count" of valid positions.
        Invalid positions add exactly 0, to the value and to the gradient, whatever stands there.
    """
    rows, length = label_BQ.shape
    chunks = -(-length // max(1, chunk // rows))
    width = -(-length // chunks)

    def cut(values: Array) -> Array:
        padded = jnp.pad(values, [(0, 0), (0, chunks * width - length)] + [(0, 0)] * (values.ndim - 2))
        return padded.reshape(rows, chunks, width, *values.shape[2:]).swapaxes(0, 1)

    def clean(hidden: Array, valid: Array) -> Array:
        # Before the head, so that a NaN in a padded place cannot reach the gradient through 0 * NaN.
        return jnp.where(valid[:, :, None], hidden, 0)

    def body(sums: dict[str, Array], part: tuple[Array, ...]) -> tuple[dict[str, Array], None]:
        hidden, label, valid, *teacher_hidden = part
        logits = head(clean(hidden, valid))
        terms = {"ce": cross_entropy(logits, label), "correct": jnp.argmax(logits, axis=-1) == label}
        if teacher is not None:
            taught = teacher[1](clean(teacher_hidden[0], valid))
            terms["kl"] = divergence(logits, taught, temperature)
            if teacher_ce:
                terms["teacher_ce"] = cross_entropy(taught, label)
        terms["count"] = jnp.ones_like(terms["ce"])
        return {n: sums[n] + jnp.sum(jnp.where(valid, terms[n], 0.0)) for n in sums}, None

    parts = [cut(hidden_BQD), cut(label_BQ), cut(valid_BQ)]
    names = ["ce", "correct", "count"]
    if teacher is not None:
        parts.append(cut(teacher[0] if teacher_ce else jax.lax.stop_gradient(teacher[0])))
        names += ["kl", "teacher_ce"] if teacher_ce else ["kl"]
    zero = {name: jnp.zeros((), jnp.float32) for name in names}
    return jax.lax.scan(jax.checkpoint(body), zero, tuple(parts))[0]


def contrastive(image_BE: Array, text_BE: Array, log_scale: Array) -> Array:
    """CLIP's symmetric softmax loss (arXiv 2103.00020, figure 3), a float32 scalar.

    Pictures with equal captions need no special care: their text embeddings are equal, and then sharing the target
    between them gives the same value. SigLIP's sigmoid would need its bias (-10, made for batches of thousands) tuned
    to the batch: as published it leaves a small batch next to no gradient.

    Args:
        image_BE, text_BE: embeddings of pictures and of their captions; normalised here.
        log_scale: learned scalar, the logarithm of the inverse temperature.
    """

    def unit(x: Array) -> Array:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)

    logits = jnp.exp(log_scale) * (unit(image_BE) @ unit(text_BE).T)
    each = [jnp.mean(jnp.diagonal(jax.nn.log_softmax(way))) for way in (logits, logits.T)]
    return -(each[0] + each[1]) / 2
