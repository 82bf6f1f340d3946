"""Singular values without LAPACK, against NumPy's in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokzip_jax.compress.singular import singular_values
from tokzip_jax.compress.sparsevlm import attention_rank

SHAPES = [(1, 1), (1, 6), (2, 2), (2, 5), (5, 2), (5, 5), (6, 16), (16, 7), (9, 40)]


def matrices(rows, columns):
    """Full rank, a third of it, equal rows, nothing, nothing but one row, and values that fall by 1e-8."""
    rng = np.random.default_rng(rows * 100 + columns)
    rank = max(1, min(rows, columns) // 3)
    low = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns))
    alike = np.repeat(rng.random((1, columns)), rows, axis=0)
    single = np.zeros((rows, columns))
    single[-1] = 1e-20 * rng.random(columns)
    side = max(rows, columns)
    turned, other = (np.linalg.qr(rng.normal(size=(side, side)))[0] for _ in range(2))
    falling = turned[:rows] * 10.0 ** (-8 * np.arange(side) / side) @ other[:, :columns]
    all_of_them = [rng.normal(size=(rows, columns)), low, alike, 0 * alike, single, falling]
    return np.stack(all_of_them).astype(np.float32)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_they_are_those_of_double_precision(rows, columns):
    x = matrices(rows, columns)
    found = np.asarray(singular_values(x))
    wanted = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    assert found.shape == wanted.shape and found.dtype == np.float32
    assert (np.diff(found, axis=1) <= 0).all()
    assert (np.abs(found - wanted) <= 2e-6 * wanted[:, :1]).all()


@pytest.mark.parametrize(("rows", "columns"), [(24, 64), (65, 300)])
def test_ranks_are_numpys(rows, columns):
    x = matrices(rows, columns)[:4]
    everything = np.ones((len(x), rows), bool), np.ones((len(x), columns), bool)
    found = np.asarray(attention_rank(jnp.asarray(x), *everything))
    np.testing.assert_array_equal(found, [np.linalg.matrix_rank(one) for one in x])
    assert found.tolist() == [rows, rows // 3, 1, 0]


def test_pictures_do_not_depend_on_one_another():
    x = jnp.asarray(matrices(6, 16))
    alone = np.concatenate([singular_values(one[None]) for one in x])
    np.testing.assert_array_equal(singular_values(x), alone)


def test_no_program_calls_lapack():
    """Whose calls block the threads that they wait for where two programs run at once."""
    shapes = [jax.ShapeDtypeStruct(*shape) for shape in (((2, 5, 9), jnp.float32), ((2, 5), bool), ((2, 9), bool))]
    program = jax.jit(attention_rank).lower(*shapes).compile().as_text()
    assert "lapack" not in program
    assert "lapack" in jax.jit(lambda x: jnp.linalg.svd(x, compute_uv=False)).lower(shapes[0]).compile().as_text()
