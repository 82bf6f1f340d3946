"""Structs that pass between the parts of the library, and the letters that name array axes.

Axis letters, fixed once and used in names, docstrings and einsum strings alike:

    B batch   I images of a row   P patches   M kept visual tokens   k VoCo tokens
    T query   S key               N heads     K key/value heads      H head dimension
    D width   F feed-forward      V vocabulary                       L layers   Q supervised positions
"""

import dataclasses
from typing import Any

import jax

Array = jax.Array
Params = dict[str, Any]

# Placeholders in a row of token ids. Negative, so that they can never clash with a vocabulary.
IMAGE_ID = -200  # becomes the visual tokens of the row's next image
VOCO_ID = -201  # becomes the VoCo tokens of the image before it

# What a token is. `masks.py` turns these into visibility.
PAD, PREFIX, VISION, VOCO, TEXT, TEACHER = range(6)  # TEACHER: text once more, read off the picture itself
KINDS = ("pad", "prefix", "vision", "voco", "text", "teacher")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisualTokens:
    """The one thing that every compressor returns.

    Attributes:
        tokens_BMD: [B, M, D] the tokens that are passed on.
        valid_BM: [B, M] bool; False marks a static slot that this picture did not fill.
        position_BM: [B, M] int32, raster index (0 .. P-1) of the place a token stands for; -1 for a
            token without a place (the CLS token).
        size_BM: [B, M] int32, how many patches the token speaks for (0 for CLS).
        source_BP: [B, P] int32, for every patch the slot it went to, or -1 when it was dropped.
    """

    tokens_BMD: Array
    valid_BM: Array
    position_BM: Array
    size_BM: Array
    source_BP: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisionFeatures:
    """What the vision tower hands to an encoder-site compressor.

    Attributes:
        patches_BPD: [B, P, D] features of the feature layer (LLaVA: output of the second-to-last block).
        cls_BD: [B, D] the CLS token of the same layer.
        signals: the named arrays that were asked for:
            "cls_attention_BP" [B, P] float32, softmax attention of the CLS row over the patches in the
                feature layer's block, summed over heads (the CLS column is dropped, not renormalised);
            "keys_BSH" [B, 1+P, H] key projection of that block with bias, unscaled, mean over heads;
            "last_queries_BSD" / "last_keys_BSD" [B, 1+P, D] raw projections of the last block;
            where tokens merged inside the tower, "position_BM", "size_BM", "source_BP" as in `VisualTokens`.
    """

    patches_BPD: Array
    cls_BD: Array
    signals: dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenStream:
    """The integers that describe every token of a row; all [B, T] int32.

    Attributes:
        kind: PAD, PREFIX, VISION, VOCO, TEXT or TEACHER.
        segment: which image (1, 2, ...) a token belongs to; 0 = none.
        thread: which of several independent questions a token belongs to; 0 = shared by all of them.
        sample: which packed sample a token belongs to; 0 = padding, samples count from 1.
        position: the rotary position id.
        order: rank in causal order (array order of the whole sequence, cache included).
        size: how many patches a token speaks for, where attention weighs keys by it (`MethodConfig.attention_bias`);
            0 for text. None where it does not.
    """

    kind: Array
    segment: Array
    thread: Array
    sample: Array
    position: Array
    order: Array
    size: Array | None = None
