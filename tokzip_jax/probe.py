"""What VoCo tokens learned: where they look, in numbers, and which facts a linear read-out finds in their cache.

Pure functions of arrays; `vlm.voco_attention` and `voco.build` give the arrays of our models, any others will do.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tokzip_jax.types import Array
from tokzip_jax.voco import VocoCache

OVERLAPS = ("cosine", "intersection")
FEATURES = ("keys", "values", "both")
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)  # of the regularisation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Looks:
    """Where the VoCo tokens of pictures look; float32. Attention is taken over the patches alone, as shares of 1.

    Attributes:
        spent_LBk: what a token spends on the patches at all; the rest goes to the prefix and other VoCo tokens.
        entropy_LBk: in nats, from 0 (one patch) to log M (all M alike); e to its power is a number of patches.
        overlap_LBkk: how alike two tokens look, from 0 (nothing in common) to 1 (the same).
        object_LBk: share that falls on objects; None without a mask.
        area_B: share of the patches that objects cover: what a token that looks everywhere alike would have.
    """

    spent_LBk: Array
    entropy_LBk: Array
    overlap_LBkk: Array
    object_LBk: Array | None
    area_B: Array | None


def looks(attention_LBkM: Array, object_BM: Array | None = None, *, overlap: str = "cosine") -> Looks:
    """Numbers for the attention of VoCo tokens.

    Args:
        attention_LBkM: attention of each token over M patches, >= 0, in any scale, from `vlm.voco_attention`.
        object_BM: how much of a patch belongs to an object, 0 to 1 (`patch_shares`).
        overlap: "cosine" of two maps, or "intersection", the sum of the smaller of two shares (of histograms).

    Raises:
        ValueError: an unknown overlap, or a mask of other pictures or patches.
    """
    if overlap not in OVERLAPS:
        raise ValueError(f"overlap={overlap!r} is unknown; choose {' or '.join(map(repr, OVERLAPS))}")
    expected = (attention_LBkM.shape[1], attention_LBkM.shape[3])
    if object_BM is not None and object_BM.shape != expected:
        raise ValueError(f"the object mask has shape {object_BM.shape}, but the attention is of {expected}")
    attention = attention_LBkM.astype(jnp.float32)
    spent = jnp.sum(attention, axis=-1)
    share = attention / jnp.maximum(spent[..., None], jnp.finfo(jnp.float32).tiny)
    if overlap == "cosine":
        unit = share * jax.lax.rsqrt(jnp.maximum(jnp.sum(share * share, axis=-1, keepdims=True), 1e-30))
        common = jnp.einsum("LBkM,LBjM->LBkj", unit, unit)
    else:
        # One token against all others at a time, so that no [k, k, M] array exists.
        each = jnp.moveaxis(share, 2, 0)
        common = jnp.moveaxis(jax.lax.map(lambda one: jnp.sum(jnp.minimum(one[:, :, None], share), -1), each), 0, 2)
    return Looks(
        spent_LBk=spent,
        entropy_LBk=jnp.sum(jax.scipy.special.entr(share), axis=-1),
        overlap_LBkk=common,
        object_LBk=None if object_BM is None else jnp.einsum("LBkM,BM->LBk", share, object_BM.astype(jnp.float32)),
        area_B=None if object_BM is None else jnp.mean(object_BM.astype(jnp.float32), axis=-1),
    )


def patch_shares(mask_BHW: Array, grid: int) -> Array:
    """How much of each of the grid x grid patches of a square picture a mask covers: [B, P] float32, raster order.

    Raises:
        ValueError: sides that are no multiple of the grid.
    """
    rows, height, width = mask_BHW.shape
    if grid < 1 or height % grid or width % grid:
        raise ValueError(f"a mask of {height} x {width} pixels cannot be cut into {grid} x {grid} patches")
    tiles = mask_BHW.astype(jnp.float32).reshape(rows, grid, height // grid, grid, width // grid)
    return jnp.mean(tiles, axis=(2, 4)).reshape(rows, grid * grid)


def features(cache: VocoCache, which: str = "both") -> Array:
    """What a cache holds of each picture, layer by layer, as vectors: [L, B, F] float32.

    Args:
        cache: of one picture a row, all slots in use by all rows (the mask "voco").
        which: "keys", "values" or "both".

    Raises:
        ValueError: an unknown kind, or rows whose slots stand at different positions, to which their keys are rotated
            (not seen under jit): build the cache with positions="compact".
    """
    if which not in FEATURES:
        raise ValueError(f"features {which!r} are unknown; choose one of {', '.join(map(repr, FEATURES))}")
    if not isinstance(cache.position, jax.core.Tracer) and np.any(np.diff(np.asarray(cache.position), axis=0)):
        raise ValueError("the rows' slots stand at different positions; build the cache with positions='compact'")
    parts = {"keys": (cache.k,), "values": (cache.v,), "both": (cache.k, cache.v)}[which]
    flat = [jnp.moveaxis(part, 3, 2).reshape(*part.shape[:2], -1) for part in parts]
    return jnp.concatenate(flat, axis=-1).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Readout:
    """How well a fact is read from features, layer by layer, on pictures that the read-out was not fitted on.

    Attributes:
        accuracy_L: float32, fractions of 1.
        l2_L: the regularisation that was chosen for each layer.
        majority: accuracy of always giving the label that the fitted pictures have most often.
        chance: accuracy of guessing, one over the number of labels.
        tests: how many pictures the accuracies are taken on.
    """

    accuracy_L: Array
    l2_L: Array
    majority: float
    chance: float
    tests: int


def split(count: int, test_share: float = 0.25, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of pictures to fit on and to test on, drawn without order; pictures that are alike should be drawn once.

    Raises:
        ValueError: one of the two would be empty.
    """
    tests = round(count * test_share)
    if not 1 <= tests < count:
        raise ValueError(f"test_share={test_share} of {count} pictures are {tests} to test on, not some of them")
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[tests:]), np.sort(order[:tests])


def linear_readout(
    features_LBF: Array, labels_B: np.ndarray, train: np.ndarray, test: np.ndarray, *, l2: Sequence[float] = STRENGTHS
) -> Readout:
    """`linear_readouts` of one fact, whose labels are [B]."""
    return linear_readouts(features_LBF, np.asarray(labels_B)[:, None], train, test, l2=l2)[0]


def linear_readouts(
    features_LBF: Array, labels_BQ: np.ndarray, train: np.ndarray, test: np.ndarray, *, l2: Sequence[float] = STRENGTHS
) -> list[Readout]:
    """Ridge regression from features to one label of several, and how often its largest output is right, fact by fact.

    Features are standardised and labels are one-hot. The solution is closed: one singular value decomposition a layer
    gives it for every fact and regularisation, and the one that is best at leaving out each fitted picture in turn is
    taken for each fact (that too in closed form, residual / (1 - leverage); the strongest on a tie). The test pictures
    decide nothing.

    Args:
        features_LBF: of B pictures, see `features`.
        labels_BQ: integers 0 .. C - 1 of Q facts, each with a C of its own.
        train, test: indices of pictures, see `split`.
        l2: regularisations to choose from, per picture and for features of variance 1.

    Raises:
        ValueError: labels that are negative or of other pictures, or a fact that is the same in all pictures.
    """
    labels = np.asarray(labels_BQ)
    if labels.shape[:1] != features_LBF.shape[1:2] or labels.min() < 0:
        raise ValueError(
            f"labels must be integers >= 0, one for each of the {features_LBF.shape[1]} pictures; they are of "
            f"{len(labels)} pictures and begin at {labels.min()}"
        )
    for column in labels.T:
        if len(np.unique(column)) < 2:
            raise ValueError(f"all pictures have the label {column[0]}: there is nothing to read out")
    classes = labels.max(axis=0) + 1
    strongest_first = jnp.asarray(sorted(l2, reverse=True), jnp.float32)
    train_QN, test_QX = labels[train].T, labels[test].T
    accuracy_LQ, l2_LQ = _readout(
        features_LBF[:, train], features_LBF[:, test], train_QN, test_QX, strongest_first, int(classes.max())
    )
    found = []
    for fact in range(labels.shape[1]):
        most = np.argmax(np.bincount(train_QN[fact]))
        majority = float(np.mean(test_QX[fact] == most))
        found.append(Readout(accuracy_LQ[:, fact], l2_LQ[:, fact], majority, 1 / int(classes[fact]), len(test)))
    return found


def _one_layer(
    train_NF: Array, test_XF: Array, label_QN: Array, label_QX: Array, l2: Array, classes: int
) -> tuple[Array, Array]:
    mean, std = jnp.mean(train_NF, axis=0), jnp.std(train_NF, axis=0)
    # A feature that never changes says nothing, and has no scale to divide by.
    scale = jnp.where(std > 1e-6 * jnp.maximum(jnp.max(std), 1e-30), 1 / jnp.maximum(std, 1e-30), 0)
    rows = train_NF.shape[0]
    u, s, vt = jnp.linalg.svd((train_NF - mean) * scale, full_matrices=False)
    test_XR = (test_XF - mean) * scale @ vt.T

    def one_fact(label_N: Array, label_X: Array) -> tuple[Array, Array]:
        # A fact with fewer labels than `classes` has columns of zeros, and no output there is ever the largest: the
        # outputs of its own labels sum to 1.
        target = jax.nn.one_hot(label_N, classes)
        usual = jnp.mean(target, axis=0)
        spread = u.T @ (target - usual)

        def leave_one_out(strength: Array) -> Array:
            shrunk = s * s / (s * s + strength * rows)
            fit = u @ (shrunk[:, None] * spread)
            leverage = jnp.sum(u * u * shrunk, axis=1) + 1 / rows
            residual = (target - usual - fit) / jnp.maximum(1 - leverage, 1e-6)[:, None]
            return jnp.mean(jnp.argmax(target - residual, axis=1) == label_N)

        strength = l2[jnp.argmax(jax.vmap(leave_one_out)(l2))]
        guess = jnp.argmax(test_XR @ ((s / (s * s + strength * rows))[:, None] * spread) + usual, axis=1)
        return jnp.mean(guess == label_X, dtype=jnp.float32), strength

    return jax.vmap(one_fact)(label_QN, label_QX)


@functools.partial(jax.jit, static_argnums=5)
def _readout(
    train_LNF: Array, test_LXF: Array, label_QN: Array, label_QX: Array, l2: Array, classes: int
) -> tuple[Array, Array]:
    """[L, Q] accuracy on the test rows and chosen regularisation, one layer after the other."""
    return jax.lax.map(lambda layer: _one_layer(*layer, label_QN, label_QX, l2, classes), (train_LNF, test_LXF))
