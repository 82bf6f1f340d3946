"""Pictures with padding: what every method that takes `valid_BP` owes, against the same method on the patches alone."""

import jax
import jax.numpy as jnp
import numpy as np

LAYOUTS = ("end", "scattered")


def masks(sizes, patches, layout, seed=0):
    """One row for each size, with so many True: the first ones, or anywhere."""
    rng = np.random.default_rng(seed)
    valid = np.arange(patches)[None] < np.array(sizes)[:, None]
    return valid if layout == "end" else np.array([rng.permutation(row) for row in valid])


def _alone(x, row, index, patches):
    """One picture, its patches `index`; an array with one more row than patches has a CLS row first."""
    if x is None or x.ndim < 2 or x.shape[1] not in (patches, patches + 1):
        return None if x is None else x[row : row + 1]
    first = x.shape[1] - patches
    return x[row : row + 1][:, np.concatenate([np.arange(first), first + index])]


def _painted(x, valid, value):
    """The same pictures with `value` in the padding."""
    patches = valid.shape[1]
    if x is None or x.ndim < 2 or x.shape[1] not in (patches, patches + 1):
        return x
    real = np.pad(valid, ((0, 0), (x.shape[1] - patches, 0)), constant_values=True)
    return np.where(real.reshape(real.shape + (1,) * (x.ndim - 2)), x, np.asarray(value, x.dtype))


def assert_row(found, row, alone, index, *, last=0, atol=1e-5):
    """A row of padded pictures is the result for its patches `index` alone, whose slots may be fewer.

    Slots that are missing are empty and stand at the end, but before the `last` ones.
    """
    slots, fewer = found.size_BM.shape[1], alone.size_BM.shape[1]
    slot = np.concatenate([np.arange(fewer - last), np.arange(slots - last, slots)])
    position, source = np.asarray(alone.position_BM[0]), np.asarray(alone.source_BP[0])
    expected = {
        "valid_BM": (False, slots, slot, alone.valid_BM[0]),
        "position_BM": (-1, slots, slot, np.where(position < 0, -1, index[position])),
        "size_BM": (0, slots, slot, alone.size_BM[0]),
        "source_BP": (-1, found.source_BP.shape[1], index, np.where(source < 0, -1, slot[source])),
    }
    for name, (empty, length, where, values) in expected.items():
        wanted = np.full(length, empty)
        wanted[where] = values
        np.testing.assert_array_equal(getattr(found, name)[row], wanted, err_msg=name)
    tokens = np.zeros(found.tokens_BMD.shape[1:], np.float32)
    tokens[slot] = alone.tokens_BMD[0]
    np.testing.assert_allclose(found.tokens_BMD[row], tokens, atol=atol)


def assert_as_alone(run, inputs, valid, alone=None, last=0):
    """Each picture is what `run` makes of its patches alone; `alone(n)` runs a budget that n patches can fill."""
    found = run(*inputs, valid_BP=valid)
    for row, real in enumerate(valid):
        index = np.flatnonzero(real)
        picture = [_alone(x, row, index, valid.shape[1]) for x in inputs]
        small = run if alone is None else alone(len(index))
        assert_row(found, row, small(*picture), index, last=last)


def assert_padding_counts_nowhere(run, inputs, valid):
    """Whatever stands in the padding, whoever stands beside, compiled or not: the same, and no gradient to padding."""
    plain = jax.tree.map(np.asarray, run(*inputs, valid_BP=valid))
    assert np.all(plain.source_BP[~valid] == -1)
    for row, real in enumerate(valid):
        placed = plain.position_BM[row][plain.valid_BM[row] & (plain.position_BM[row] >= 0)]
        assert real[placed].all()
    for value in (50.0, -50.0, np.nan):
        painted = [_painted(x, valid, value) for x in inputs]
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(run(*painted, valid_BP=valid)), strict=True):
            np.testing.assert_array_equal(a, b)
    turned = run(*(None if x is None else x[::-1] for x in inputs), valid_BP=valid[::-1])
    with jax.disable_jit():
        eager = run(*(None if x is None else jnp.asarray(x) for x in inputs), valid_BP=jnp.asarray(valid))
    for other in (jax.tree.map(lambda x: x[::-1], turned), eager):
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, atol=1e-6)
    loss = jax.jit(jax.grad(lambda x: jnp.sum(run(x, *painted[1:], valid_BP=valid).tokens_BMD ** 2)))
    by_patches = np.asarray(loss(painted[0]))
    assert np.all(by_patches[~valid] == 0) and np.isfinite(by_patches).all() and np.any(by_patches)
