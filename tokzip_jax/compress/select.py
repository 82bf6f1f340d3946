"""Selection that looks at nothing: the baselines that every clever rule has to beat."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokzip_jax.compress import ops
from tokzip_jax.compress.entry import Ask, Encoder, NoOptions, Selecting, Tower
from tokzip_jax.compress.greedy import check_shape, fill
from tokzip_jax.types import Array, VisionFeatures, VisualTokens


def check_tokens(name: str, patches: int, tokens: int) -> None:
    """Refuse a number of tokens that `patches` patches cannot give.

    Raises:
        ValueError: names the number and its range.
    """
    if not 1 <= tokens <= patches:
        raise ValueError(f"{name}: {tokens} tokens asked of {patches} patches; it must be 1 .. {patches}")


@functools.partial(jax.jit, static_argnames="tokens")
def random(patches_BPD: Array, *, tokens: int, key: Array, valid_BP: Array | None = None) -> VisualTokens:
    """Keep a random set of patches, in raster order, drawn without replacement.

    The choice depends on the key and on the row's number alone, never on what the picture or its neighbours show.

    Args:
        patches_BPD: [B, P, D].
        tokens: how many to keep, 1 .. P.
        key: one JAX random key, folded with the row's number; or B keys, used as they are, for a choice that must not
            depend on where in the batch a picture stands.
        valid_BP: [B, P] bool, see `greedy`; None: all.

    Returns:
        `VisualTokens` with M = tokens.

    Raises:
        ValueError: tokens out of range, a number of keys that is neither one nor B, or a mask of another shape.
    """
    batch, patches, _ = patches_BPD.shape
    check_tokens("random", patches, tokens)
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    one = key.ndim == (0 if typed else 1)
    if not one and key.shape[0] != batch:
        raise ValueError(f"random: {key.shape[0]} keys for {batch} pictures; give one key or {batch}")
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch)) if one else key
    score_BP = jax.vmap(lambda row_key: jax.random.uniform(row_key, (patches,)))(keys)
    return best("random", patches_BPD, score_BP, valid_BP, tokens)


def grid_places(rows: int, columns: int, tokens: int) -> np.ndarray:
    """Raster indices [tokens], ascending, spread over a grid of patches: a whole number of lines at even distances, and
    on each, at even distances, equally many places or one more. A square number on a square grid is a smaller grid.
    """
    lines = round(math.sqrt(tokens * rows / columns))
    lines = min(max(lines, -(-tokens // columns), 1), rows, tokens)
    counts = np.full(lines, tokens // lines)
    counts[ops.evenly_spaced(lines, tokens % lines)] += 1
    heights = ops.evenly_spaced(rows, lines)
    return np.concatenate([y * columns + ops.evenly_spaced(columns, count) for y, count in zip(heights, counts)])


@functools.partial(jax.jit, static_argnames=("tokens", "grid"))
def uniform(
    patches_BPD: Array, *, tokens: int, grid: tuple[int, int] | None = None, valid_BP: Array | None = None
) -> VisualTokens:
    """Keep patches at even distances, in raster order.

    Args:
        patches_BPD: [B, P, D].
        tokens: how many to keep, 1 .. P.
        grid: rows and columns of patches, whose product is P; see `grid_places`. None: patches are taken as one line,
            and kept is the middle of each of `tokens` equal parts of it.
        valid_BP: [B, P] bool, see `greedy`: the line is of the valid patches; None: all.

    Returns:
        `VisualTokens` with M = tokens.

    Raises:
        ValueError: tokens out of range, a grid of other than P patches or beside a mask, or a mask of another shape.
    """
    batch, patches, _ = patches_BPD.shape
    check_tokens("uniform", patches, tokens)
    if grid is not None and valid_BP is not None:
        raise ValueError("uniform: give grid or valid, not both: valid patches need not make a grid")
    if grid is not None and math.prod(grid) != patches:
        raise ValueError(f"uniform: a grid of {grid[0]} x {grid[1]} is not one of {patches} patches")
    if valid_BP is None:
        chosen = np.zeros(patches, bool)
        chosen[grid_places(*(grid or (1, patches)), tokens)] = True
        return ops.keep(patches_BPD, jnp.broadcast_to(chosen[None], (batch, patches)), tokens)
    check_shape("uniform", "valid", valid_BP.shape, (batch, patches))
    count_B1 = jnp.sum(valid_BP, axis=1, keepdims=True, dtype=jnp.int32)
    middle_BM = (2 * jnp.arange(tokens) + 1) * count_B1 // (2 * tokens)  # as `ops.evenly_spaced`
    hit_BP = jnp.any(ops.rank(valid_BP)[:, :, None] == middle_BM[:, None], axis=2) | (count_B1 <= tokens)
    return fill(patches_BPD, hit_BP & valid_BP, tokens)


def best(method: str, patches_BPD: Array, score_BP: Array, valid_BP: Array | None, tokens: int) -> VisualTokens:
    """The valid patches of highest score, in raster order; slots that they cannot fill stay empty.

    Args:
        method: for the message.
        patches_BPD, score_BP: [B, P, D] and [B, P].
        valid_BP: [B, P] bool; None: all.
        tokens: 1 .. P.

    Raises:
        ValueError: a mask of another shape.
    """
    if valid_BP is None:
        return ops.keep(patches_BPD, ops.top_mask(score_BP, tokens), tokens)
    check_shape(method, "valid", valid_BP.shape, patches_BPD.shape[:2])
    chosen_BP = ops.top_mask(jnp.where(valid_BP, score_BP, -jnp.inf), tokens)
    return fill(patches_BPD, chosen_BP & valid_BP, tokens)


@jax.jit
def everything(patches_BPD: Array) -> VisualTokens:
    """No compression: all patches [B, P, D], each at its own place."""
    batch, patches, _ = patches_BPD.shape
    index_BP = jnp.broadcast_to(jnp.arange(patches, dtype=jnp.int32)[None], (batch, patches))
    return VisualTokens(
        tokens_BMD=patches_BPD,
        valid_BM=jnp.ones((batch, patches), bool),
        position_BM=index_BP,
        size_BM=jnp.ones((batch, patches), jnp.int32),
        source_BP=index_BP,
    )


def selection_budget(name: str) -> Callable[[Tower, int, Any], None]:
    """The budget check of a method that keeps 1 .. P patches, whatever its options."""
    return lambda tower, tokens, options: check_tokens(name, tower.patches, tokens)


def _random(features: VisionFeatures, ask: Ask) -> VisualTokens:
    if ask.key is None:
        raise ValueError("random: key is None; random selection needs a JAX random key")
    return random(features.patches_BPD, tokens=ask.tokens, key=ask.key)


def _uniform(features: VisionFeatures, ask: Ask) -> VisualTokens:
    return uniform(features.patches_BPD, tokens=ask.tokens, grid=(ask.tower.rows, ask.tower.columns))


def _everything(features: VisionFeatures, ask: Ask) -> VisualTokens:
    return everything(features.patches_BPD)


def _everything_budget(tower: Tower, tokens: int, options: NoOptions) -> None:
    if tokens not in (0, tower.patches):
        raise ValueError(
            f"none: {tokens} tokens asked, but all {tower.patches} patches pass; tokens must be 0 or {tower.patches}"
        )


ENTRIES = {
    "none": Encoder(function=_everything, budget=_everything_budget, count="all patches"),
    "random": Encoder(function=_random, budget=selection_budget("random"), options=Selecting, source="baseline"),
    "uniform": Encoder(function=_uniform, budget=selection_budget("uniform"), options=Selecting, source="baseline"),
}
