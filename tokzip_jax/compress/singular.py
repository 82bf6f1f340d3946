"""Singular values of many small matrices, by products of rows alone.

LAPACK's, as JAX calls it on a CPU, waits on a thread of the pool that it hands its own work to: two programs at once on
two cores wait for one another for ever. Householder reflections and one-sided Jacobi rotations (Hestenes, 1958) need
products and sums alone and run on any device. They are exact to 1e-6 of the largest value, where the eigenvalues of
a matrix times its transpose lose half of the digits. That decides: a rank counts all values above 1e-7 times a side.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from tokzip_jax.compress import ops
from tokzip_jax.types import Array

SWEEPS = 12  # over all pairs of rows: after six to nine little changes, and a fixed number keeps pictures independent


@functools.partial(jax.jit, static_argnames="sweeps")
def singular_values(x_BRV: Array, *, sweeps: int = SWEEPS) -> Array:
    """[B, min(R, V)] float32, the largest first; gradients do not flow.

    Args:
        x_BRV: [B, R, V] matrices, finite.
        sweeps: how often every pair of rows (or of columns, of which there are fewer) is made orthogonal.
    """
    x = lax.stop_gradient(x_BRV).astype(jnp.float32)
    x = x if x.shape[1] <= x.shape[2] else jnp.swapaxes(x, 1, 2)
    count = x.shape[1]
    if count == 0:
        return jnp.zeros((x.shape[0], 0), jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True, initial=0.0)
    scale = jnp.where(largest > 0, largest, 1.0)  # squares stay far from the ends of float32
    x = x / scale
    x = _triangle(x) if count < x.shape[2] else x
    # As in a tournament everybody meets everybody once: the first row stays where it is, the others go round.
    x = jnp.pad(x, ((0, 0), (0, count % 2), (0, 0)))
    half = x.shape[1] // 2

    def meet(_: Array, pairs: tuple[Array, Array]) -> tuple[Array, Array]:
        upper, lower = _orthogonal(*pairs)
        if half == 1:
            return upper, lower
        return (
            jnp.concatenate([upper[:, :1], lower[:, :1], upper[:, 1:-1]], axis=1),
            jnp.concatenate([lower[:, 1:], upper[:, -1:]], axis=1),
        )

    pairs = lax.fori_loop(0, sweeps * (2 * half - 1), meet, (x[:, :half], x[:, half:]))
    values_BR = jnp.linalg.norm(jnp.concatenate(pairs, axis=1), axis=2) * scale[:, :, 0]
    return -jnp.sort(-values_BR, axis=1)[:, :count]


def _triangle(x_BRV: Array) -> Array:
    """[B, R, R] with the same singular values, R < V: the rows turned together by Householder's reflections, so that
    row i has nothing behind its column i."""
    column_V = jnp.arange(x_BRV.shape[2])

    def reflect(i: Array, x_BRV: Array) -> Array:
        row_BV = jnp.where(column_V >= i, lax.dynamic_index_in_dim(x_BRV, i, axis=1, keepdims=False), 0.0)
        first_B1 = lax.dynamic_slice_in_dim(row_BV, i, 1, axis=1)
        length_B1 = jnp.linalg.norm(row_BV, axis=1, keepdims=True)
        mirror_BV = row_BV + jnp.where(column_V == i, jnp.where(first_B1 < 0, -length_B1, length_B1), 0.0)
        square_B1 = jnp.sum(mirror_BV * mirror_BV, axis=1, keepdims=True)
        share_BV = 2 * mirror_BV / jnp.where(square_B1 > 0, square_B1, 1.0)
        along_BR = jnp.einsum("BRV,BV->BR", x_BRV, share_BV, precision=ops.EXACT)
        return x_BRV - along_BR[:, :, None] * mirror_BV[:, None, :]

    return lax.fori_loop(0, x_BRV.shape[1], reflect, x_BRV)[:, :, : x_BRV.shape[1]]


def _orthogonal(upper: Array, lower: Array) -> tuple[Array, Array]:
    """Each pair of rows, rotated in the plane of both so that they are orthogonal."""
    product = jnp.sum(upper * lower, axis=2, keepdims=True)
    apart = jnp.sum((lower - upper) * (lower + upper), axis=2, keepdims=True)
    cotangent = apart / (2 * jnp.where(product == 0, 1.0, product))  # of twice the angle
    tangent = jnp.where(cotangent < 0, -1.0, 1.0) / (jnp.abs(cotangent) + jnp.sqrt(1 + cotangent * cotangent))
    tangent = jnp.where(product == 0, 0.0, tangent)
    cosine = lax.rsqrt(1 + tangent * tangent)
    sine = cosine * tangent
    return cosine * upper - sine * lower, sine * upper + cosine * lower
