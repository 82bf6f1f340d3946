"""Encoder-site compressors: pure functions of arrays, and one table of them.

The functions in the files beside this one know no model, no Flax and no config, and work on arrays of anybody's forward
pass. `ENCODER` gives those of the encoder site one signature (`entry.Encoder`), so that a config can name them.
"""

from tokzip_jax.compress.cdpruner import cdpruner
from tokzip_jax.compress.cls_attention import cls_attention
from tokzip_jax.compress.dart import dart
from tokzip_jax.compress.divprune import divprune
from tokzip_jax.compress.downsample import downsample, resize_positions
from tokzip_jax.compress.folder import folder
from tokzip_jax.compress.holov import holov
from tokzip_jax.compress.mmtok import mmtok
from tokzip_jax.compress.pool import average_pool, nested_pool, nested_pool_by_picture, stride_pool
from tokzip_jax.compress.prumerge import prumerge, prumerge_plus
from tokzip_jax.compress.registry import (
    ENCODER,
    Ask,
    Encoder,
    NoOptions,
    Selecting,
    Tower,
    apply,
    check,
    option,
    options,
    scaled,
    table,
)
from tokzip_jax.compress.relevance import question_relevance, question_similarity
from tokzip_jax.compress.restore import restore, restore_bias
from tokzip_jax.compress.scope import scope
from tokzip_jax.compress.select import everything, random, uniform
from tokzip_jax.compress.tome import tome
from tokzip_jax.compress.unshuffle import pixel_unshuffle
from tokzip_jax.compress.visionzip import visionzip
from tokzip_jax.compress.visionzip_merged import visionzip_merged
from tokzip_jax.compress.vispruner import vispruner

__all__ = [
    "ENCODER",
    "Ask",
    "Encoder",
    "NoOptions",
    "Selecting",
    "Tower",
    "apply",
    "average_pool",
    "cdpruner",
    "check",
    "cls_attention",
    "dart",
    "divprune",
    "downsample",
    "everything",
    "folder",
    "holov",
    "mmtok",
    "nested_pool",
    "nested_pool_by_picture",
    "option",
    "options",
    "pixel_unshuffle",
    "prumerge",
    "prumerge_plus",
    "question_relevance",
    "question_similarity",
    "random",
    "resize_positions",
    "restore",
    "restore_bias",
    "scaled",
    "scope",
    "stride_pool",
    "table",
    "tome",
    "uniform",
    "visionzip",
    "visionzip_merged",
    "vispruner",
]
