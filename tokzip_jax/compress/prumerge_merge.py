"""What the centres of PruMerge and PruMerge+ (`prumerge`) take in, and the books of who went where."""

import jax.numpy as jnp
from jax import lax

from tokzip_jax.compress import ops
from tokzip_jax.types import Array, VisualTokens


def take_in(
    patches_BPD: Array,
    attention_BP: Array,
    keys_BSD: Array,
    centre_BK: Array,
    valid_BK: Array,
    candidate_BC: Array | None,
    neighbours: int,
    merge: str,
    exists_BC: Array | None,
) -> VisualTokens:
    """The result for K chosen centres; `candidate_BC` [B, P] lists what can be taken in, centres first; None = all.

    `exists_BC` [B, P] says which entries of that list are patches; None = all.
    """
    x_BCD, weight_BC = patches_BPD.astype(jnp.float32), attention_BP.astype(jnp.float32)
    keys_BCH, place_BK = lax.stop_gradient(keys_BSD[:, 1:]), centre_BK
    if candidate_BC is not None:
        x_BCD, keys_BCH = ops.gather(x_BCD, candidate_BC), ops.gather(keys_BCH, candidate_BC)
        weight_BC = jnp.take_along_axis(weight_BC, candidate_BC, axis=1)
        place_BK = jnp.broadcast_to(jnp.arange(centre_BK.shape[1], dtype=jnp.int32)[None], centre_BK.shape)
    if exists_BC is not None:  # whatever stands in the padding, NaN among it, must not come near a sum
        x_BCD, weight_BC = jnp.where(exists_BC[:, :, None], x_BCD, 0.0), jnp.where(exists_BC, weight_BC, 0.0)
    near_BKC, likest_BC, is_centre_BC = _near(keys_BCH, place_BK, valid_BK, neighbours, merge, exists_BC)
    share_BKC = jnp.where(near_BKC, weight_BC[:, None], 0.0)
    taken_BKD = jnp.einsum("BKC,BCD->BKD", share_BKC, x_BCD, precision=ops.EXACT)
    tokens, valid, position = ops.gather(x_BCD, place_BK), valid_BK, jnp.where(valid_BK, centre_BK, -1)
    if merge == "paper":
        own = jnp.take_along_axis(weight_BC, place_BK, axis=1)[:, :, None]
        total = own + jnp.sum(share_BKC, axis=2, keepdims=True)
        tokens = (own * tokens + taken_BKD) / jnp.where(total == 0, 1.0, total)
    else:
        tokens += taken_BKD
    tokens = jnp.where(valid_BK[:, :, None], tokens, 0.0)
    if merge == "official":
        other_BC = jnp.where(is_centre_BC, 0.0, weight_BC)
        further_BD = jnp.einsum("BC,BCD->BD", other_BC, x_BCD, precision=ops.EXACT)
        tokens = jnp.concatenate([tokens, further_BD[:, None]], axis=1)
        position = jnp.pad(position, ((0, 0), (0, 1)), constant_values=-1)
        valid = jnp.pad(valid, ((0, 0), (0, 1)), constant_values=True)
        likest_BC = jnp.where(likest_BC < 0, centre_BK.shape[1], likest_BC)
    if exists_BC is not None:
        likest_BC = jnp.where(exists_BC, likest_BC, -1)
        valid &= jnp.any(exists_BC, axis=1, keepdims=True)  # nor has a picture without patches a further token
        if candidate_BC is not None:  # what does not exist is out of range and written nowhere
            candidate_BC = jnp.where(exists_BC, candidate_BC, patches_BPD.shape[1])
    source_BP = _source(likest_BC, centre_BK, valid_BK, candidate_BC)
    member_BMP = source_BP[:, None] == jnp.arange(position.shape[1])[None, :, None]
    return VisualTokens(
        tokens_BMD=tokens.astype(patches_BPD.dtype),
        valid_BM=valid,
        position_BM=position,
        size_BM=jnp.sum(member_BMP, axis=2, dtype=jnp.int32),
        source_BP=source_BP,
    )


def _near(
    keys_BCH: Array, place_BK: Array, valid_BK: Array, neighbours: int, merge: str, exists_BC: Array | None
) -> tuple[Array, Array, Array]:
    """What each centre takes in [B, K, C], the likest centre that took each in or -1 [B, C], and who is one [B, C]."""
    candidates = keys_BCH.shape[1]
    own_BKC = place_BK[:, :, None] == jnp.arange(candidates)[None, None]
    is_centre_BC = jnp.any(own_BKC & valid_BK[:, :, None], axis=1)
    barred_BKC = own_BKC | is_centre_BC[:, None] if merge == "paper" else own_BKC
    if exists_BC is not None:
        barred_BKC |= ~exists_BC[:, None]
    similarity = jnp.where(barred_BKC, -jnp.inf, ops.cosine(ops.gather(keys_BCH, place_BK), keys_BCH))
    near_BKC = ops.top_mask(similarity.reshape(-1, candidates), neighbours).reshape(similarity.shape)
    near_BKC &= ~barred_BKC & valid_BK[:, :, None]
    likest_BC = jnp.argmax(jnp.where(near_BKC, similarity, -jnp.inf), axis=1).astype(jnp.int32)
    return near_BKC, jnp.where(jnp.any(near_BKC, axis=1), likest_BC, -1), is_centre_BC


def _source(likest_BC: Array, centre_BK: Array, valid_BK: Array, candidate_BC: Array | None) -> Array:
    """The slot of each patch [B, P]: a centre's own (first) one, for others as their candidate went, else -1."""
    batch, patches = likest_BC.shape
    if candidate_BC is not None:
        nowhere = jnp.full((batch, patches), -1, jnp.int32)
        likest_BC = nowhere.at[jnp.arange(batch)[:, None], candidate_BC].set(likest_BC)
    own_BKP = (centre_BK[:, :, None] == jnp.arange(patches)[None, None]) & valid_BK[:, :, None]
    return jnp.where(jnp.any(own_BKP, axis=1), jnp.argmax(own_BKP, axis=1).astype(jnp.int32), likest_BC)
