"""Weights to measure with: of the right shapes, made quickly, with values that keep activations in a normal range."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokzip_jax.paths import map_with_path


def random_weights(abstract: Any, seed: int = 0) -> Any:
    """Arrays for a tree of shapes: norms' scales are 1, everything else is normal with deviation 0.02.

    Speed depends on shapes; but zeros, subnormal numbers or infinities can be faster or slower than what a model holds.
    """
    rng = np.random.default_rng(seed)

    def make(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path.endswith("scale"):
            return jnp.ones(leaf.shape, leaf.dtype)
        return jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32), leaf.dtype)

    return map_with_path(make, abstract)
