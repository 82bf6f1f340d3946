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
    """[Q] float32 negative log likelihood of the labels."""
    logits_QV = logits_QV.astype(jnp.float32)
    return jax.nn.logsumexp(logits_QV, axis=-1) - jnp.take_along_axis(logits_QV, label_Q[:, None], axis=-1)[:, 0]


def divergence(student_QV: Array, teacher_QV: Array, temperature: float) -> Array:
    """[Q] float32 KL(teacher || student) at a temperature T, times T^2.

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
    temperature: float = 1.0,
    chunk: int = 1024,
) -> dict[str, Array]:
    """Sums of the token terms over the supervised positions.

    Args:
        hidden_BQD: hidden states at the supervised positions.
        label_BQ, valid_BQ: their labels, and which places hold one.
        head: final norm and output head.
        teacher: hidden states [B, Q, D] of a frozen model at the same targets, and its head; None = no "kl".
        temperature: of the KL.
        chunk: positions whose logits exist at once.

    Returns:
        float32 scalars "ce" (and "kl") summed, "correct" (arg-max hits) and "count" of valid positions. Invalid
        positions add exactly 0, to the value and to the gradient, whatever stands there.
    """
    total = label_BQ.size
    chunk = min(chunk, total)
    padded = -(-total // chunk) * chunk

    def cut(values: Array) -> Array:
        flat = values.reshape(total, *values.shape[2:])
        flat = jnp.pad(flat, [(0, padded - total)] + [(0, 0)] * (flat.ndim - 1))
        return flat.reshape(padded // chunk, chunk, *flat.shape[1:])

    def clean(hidden: Array, valid: Array) -> Array:
        # Before the head, so that a NaN in a padded place cannot reach the gradient through 0 * NaN.
        return jnp.where(valid[:, None], hidden, 0)[None]

    def body(sums: dict[str, Array], part: tuple[Array, ...]) -> tuple[dict[str, Array], None]:
        hidden, label, valid, *teacher_hidden = part
        logits = head(clean(hidden, valid))[0]
        terms = {"ce": cross_entropy(logits, label), "correct": jnp.argmax(logits, axis=-1) == label}
        if teacher is not None:
            terms["kl"] = divergence(logits, teacher[1](clean(teacher_hidden[0], valid))[0], temperature)
        terms["count"] = jnp.ones_like(terms["ce"])
        return {n: sums[n] + jnp.sum(jnp.where(valid, terms[n], 0.0)) for n in sums}, None

    parts = [cut(hidden_BQD), cut(label_BQ), cut(valid_BQ)]
    names = ["ce", "correct", "count"]
    if teacher is not None:
        parts.append(cut(jax.lax.stop_gradient(teacher[0])))
        names.append("kl")
    zero = {name: jnp.zeros((), jnp.float32) for name in names}
    return jax.lax.scan(jax.checkpoint(body), zero, tuple(parts))[0]


def contrastive(image_BE: Array, text_BE: Array, same_BB: Array, log_scale: Array, bias: Array) -> Array:
    """SigLIP's pairwise sigmoid loss (arXiv 2303.15343, algorithm 1), a float32 scalar.

    Args:
        image_BE, text_BE: embeddings; normalised here.
        same_BB: bool, whether image i goes with text j. More than one a row may: pictures with equal captions are
            pairs too, since on a data set of few captions they would otherwise be false negatives.
        log_scale, bias: learned scalars.
    """

    def unit(x: Array) -> Array:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)

    logits = jnp.exp(log_scale) * (unit(image_BE) @ unit(text_BE).T) + bias
    return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(jnp.where(same_BB, logits, -logits)), axis=-1))
