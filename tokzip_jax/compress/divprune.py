"""DivPrune (arXiv 2503.02175, CVPR 2025): keep patches that lie far from one another.

Max-min diversity by greedy choice: first the patch whose nearest neighbour is farthest away, then always the one
farthest from its nearest chosen patch. Distance is 1 - cosine. No attention and no text is read.

The released code compares the tokens behind the projector; pass those as `features_BPH` to do the same. It turns a
ratio r into round(r P) tokens, and among duplicates it may choose a patch twice; here every choice is a new patch.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tokzip_jax.compress import ops
from tokzip_jax.compress.entry import COMPARE, PROJECTED, Ask, Encoder, Selecting, compared, option
from tokzip_jax.compress.greedy import check_shape, everywhere, fill, greedy, row
from tokzip_jax.compress.select import check_tokens, selection_budget
from tokzip_jax.types import Array, VisionFeatures, VisualTokens


def farthest(features_BPH: Array, valid_BP: Array, tokens: int) -> tuple[Array, Array]:
    """The greedy choice: [B, tokens] int32 in its order, and the chosen patches [B, P] bool.

    One product of all pairs, then O(P) a choice: only the distance to the nearest chosen patch is kept up to date.
    """
    features_BPH = jax.lax.stop_gradient(features_BPH)
    distance_BPP = 1.0 - ops.cosine(features_BPH, features_BPH)
    patches = distance_BPP.shape[1]
    not_another = jnp.eye(patches, dtype=bool)[None] | ~valid_BP[:, None, :]
    nearest_BP = jnp.min(jnp.where(not_another, jnp.inf, distance_BPP), axis=2)

    def update(state: tuple[Array, Array], pick_B: Array, number: Array) -> tuple[Array, Array]:
        least_BP = jnp.minimum(state[1], row(distance_BPP, pick_B))
        return least_BP, least_BP

    # What the next choice looks at, and the distance to the chosen ones: the same but before the first choice.
    start = (nearest_BP, jnp.full_like(nearest_BP, jnp.inf))
    return greedy(tokens, valid_BP, start, lambda state: state[0], update)


@functools.partial(jax.jit, static_argnames="tokens")
def divprune(
    patches_BPD: Array, *, tokens: int, features_BPH: Array | None = None, valid_BP: Array | None = None
) -> VisualTokens:
    """Keep `tokens` patches of greatest mutual distance.

    Args:
        patches_BPD: [B, P, D] what is kept.
        tokens: how many, 1 .. P.
        features_BPH: [B, P, H] what is compared; None: the patches. A zero row is at distance 1 from everything.
        valid_BP: [B, P] bool, see `greedy`; None: all.

    Returns:
        `VisualTokens` with M = tokens in raster order, as the released code sorts them. Of equal distances the lower
        index wins, as there.

    Raises:
        ValueError: a budget out of range, or shapes that do not fit.
    """
    batch, patches, _ = patches_BPD.shape
    check_tokens("divprune", patches, tokens)
    features_BPH = patches_BPD if features_BPH is None else features_BPH
    check_shape("divprune", "features", features_BPH.shape, (batch, patches, None))
    valid_BP = everywhere(patches_BPD, valid_BP)
    check_shape("divprune", "valid", valid_BP.shape, (batch, patches))
    _, chosen_BP = farthest(features_BPH, valid_BP, tokens)
    return fill(patches_BPD, chosen_BP & valid_BP, tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Selecting):
    """What is compared: "projected" (as released) or the "patches" themselves."""

    compare: str = option("projected", choices=COMPARE)


def _apply(features: VisionFeatures, ask: Ask) -> VisualTokens:
    return divprune(features.patches_BPD, tokens=ask.tokens, features_BPH=compared(features, ask.options))


ENTRIES = {
    "divprune": Encoder(
        function=_apply,
        budget=selection_budget("divprune"),
        options=Options,
        signals=lambda options: (PROJECTED,) if options.compare == "projected" else (),
        classes=("similarity",),
        reads="projected patches",
        source="arXiv 2503.02175",
    )
}
