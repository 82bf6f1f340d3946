"""Who sees whom: the only place that turns a token's integers into visibility.

A token carries kind, segment, thread, sample, position and order (`types.TokenStream`). Query i sees key j when

    order_j <= order_i                         causal, by place in the array, never by position id
    and sample_j == sample_i                   packed samples do not mix
    and thread_j in (0, thread_i)              independent questions do not mix, all of them see what is shared
    and TABLE[kind_i, kind_j] allows it        one small table a mode, below

A table entry is NEVER, ALWAYS or OWN. OWN: the key belongs to no image, or to the query's own image.

Drawn for one image of two patches, prefix p, vision v, VoCo c, text t (x = sees):

    "visible"  p v v c t t     "voco"   p v v c t t     "prefix_visible"  p v v c t t
          p    x . . . . .        p     x . . . . .               p       x . . . . .
          v    x x . . . .        v     x x . . . .               v       x x . . . .
          v    x x x . . .        v     x x x . . .               v       x x x . . .
          c    x x x x . .        c     x x x x . .               c       x x x x . .
          t    x x x x x .        t     . . . x x .               t       x . . x x .
          t    x x x x x x        t     . . . x x x               t       x . . x x x

Two frames in one row under "voco": each frame's vision and VoCo tokens see their own frame, text sees both VoCo groups

               p v c v c t
          p    x . . . . .
          v    x x . . . .
          c    x x x . . .
          v    x . . x . .
          c    x . . x x .
          t    . . x . x x

Two questions (threads 1 and 2) about one image share the VoCo token and nothing else

               c t1 t1 t2 t2
          c    x .  .  .  .
          t1   x x  .  .  .
          t1   x x  x  .  .
          t2   x .  .  x  .
          t2   x .  .  x  x

One text twice (`onepass`): T is its copy that reads the picture and no VoCo token. It has the order of what it copies;
under "voco" and, but for the prefix column of t, under "prefix_visible"

               p v c t t T T
          p    x . . . . . .
          v    x x . . . . .
          c    x x x . . . .
          t    . . x x . . .
          t    . . x x x . .
          T    x x . . . x .
          T    x x . . . x x

"voco" is the official layout of VoCo-LLaMA (arXiv 2406.12275, its mask as released): text loses BOS and everything
else before the VoCo tokens. A row without an image holds text only, and is plain causal in every mode.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tokzip_jax.types import KINDS, PAD, PREFIX, TEACHER, TEXT, VISION, VOCO, Array, TokenStream

NEVER, ALWAYS, OWN = range(3)


def _table(rows: dict[int, dict[int, int]]) -> np.ndarray:
    table = np.full((len(KINDS), len(KINDS)), NEVER, np.int32)
    for query, keys in rows.items():
        for key, relation in keys.items():
            table[query, key] = relation
    return table


_ISOLATED = {
    PREFIX: {PREFIX: OWN, VISION: OWN},
    VISION: {PREFIX: OWN, VISION: OWN},
    VOCO: {PREFIX: OWN, VISION: OWN, VOCO: OWN},
}
_REAL = (PREFIX, VISION, VOCO, TEXT)
# In every mode: what an uncompressed model's text sees. Nobody else sees it.
_TEACHER = {TEACHER: {PREFIX: ALWAYS, VISION: ALWAYS, TEACHER: ALWAYS}}

# Text belongs to no image, so OWN lets it see the shared prefix but no separator that stands behind an image and
# has read its vision tokens: that would be a way around the VoCo tokens.
TABLES = {
    "visible": _table({query: dict.fromkeys(_REAL, ALWAYS) for query in _REAL} | _TEACHER),
    "voco": _table({**_ISOLATED, TEXT: {VOCO: ALWAYS, TEXT: ALWAYS}, **_TEACHER}),
    "prefix_visible": _table({**_ISOLATED, TEXT: {PREFIX: OWN, VOCO: ALWAYS, TEXT: ALWAYS}, **_TEACHER}),
}


def rule(query: TokenStream, key: TokenStream, table: Array | np.ndarray) -> Array:
    """Visibility for integers of any mutually broadcastable shapes (scalars, [T, 1] against [1, S], ...)."""
    relation = jnp.asarray(table)[query.kind, key.kind]
    own = (key.segment == 0) | (key.segment == query.segment)
    return (
        ((relation == ALWAYS) | ((relation == OWN) & own))
        & (key.order <= query.order)
        & (key.sample == query.sample)
        & ((key.thread == 0) | (key.thread == query.thread))
        & (key.kind != PAD)
    )


def visibility(query: TokenStream, key: TokenStream, table: Array | np.ndarray) -> Array:
    """The boolean attention mask [B, T, S] of queries [B, T] over keys [B, S]; True = sees."""
    rows = jax.tree.map(lambda leaf: leaf[:, :, None], query)
    columns = jax.tree.map(lambda leaf: leaf[:, None, :], key)
    return rule(rows, columns, table)


def predecessors(kind: Array, thread: Array, sample: Array) -> tuple[Array, Array]:
    """Position ids and the token before each one, along its own thread.

    The chain of a token is what is shared (thread 0) plus its own thread, inside its own sample, padding left out;
    so every question continues from the shared part as if it were the only one.

    Args:
        kind, thread, sample: [B, T] int32.

    Returns:
        position [B, T] int32, how many tokens of its chain stand before it (0 for padding), and
        previous [B, T] int32, the array index of the nearest of them (-1 when there is none).
    """
    index = jnp.arange(kind.shape[1], dtype=jnp.int32)
    chain = (
        (index[None, None, :] < index[None, :, None])
        & (sample[:, None, :] == sample[:, :, None])
        & ((thread[:, None, :] == 0) | (thread[:, None, :] == thread[:, :, None]))
        & (kind[:, None, :] != PAD)
        & (kind[:, :, None] != PAD)
    )
    position = jnp.sum(chain, axis=-1, dtype=jnp.int32)
    previous = jnp.max(jnp.where(chain, index[None, None, :], -1), axis=-1)
    return position, previous
