"""How much a patch has to do with a question: the input of the selectors that read text.

The published methods differ in where they compare picture and text: CDPruner in CLIP's joint space (its text tower and
projections), MMTok in the language model's (projected patches and embedded words of the question). The functions here
only take cosines of what they are given: inside one model, the projected patches and the embeddings of the question.
"""

import jax
import jax.numpy as jnp

from tokzip_jax.compress import ops
from tokzip_jax.compress.greedy import check_shape
from tokzip_jax.types import Array


def question_similarity(projected_BPD: Array, question_BTD: Array) -> Array:
    """Cosine of every token of a question with every patch.

    Args:
        projected_BPD: [B, P, D] patches in the space of the text.
        question_BTD: [B, T, D] text tokens.

    Returns:
        [B, T, P] float32, 0 where one of both is a zero row; no gradient flows back.

    Raises:
        ValueError: shapes that do not fit.
    """
    batch, _, width = projected_BPD.shape
    check_shape("question_similarity", "question", question_BTD.shape, (batch, None, width))
    return ops.cosine(jax.lax.stop_gradient(question_BTD), jax.lax.stop_gradient(projected_BPD))


def question_relevance(projected_BPD: Array, question_BTD: Array, text_valid_BT: Array | None = None) -> Array:
    """Mean cosine of every patch with the tokens of a question (CDPruner's r before it is scaled).

    Args:
        projected_BPD, question_BTD: as in `question_similarity`.
        text_valid_BT: [B, T] bool, False for padding; None: all tokens count.

    Returns:
        [B, P] float32; 0 for a question without tokens.

    Raises:
        ValueError: shapes that do not fit.
    """
    similarity_BTP = question_similarity(projected_BPD, question_BTD)
    if text_valid_BT is None:
        text_valid_BT = jnp.ones(similarity_BTP.shape[:2], bool)
    check_shape("question_relevance", "text_valid", text_valid_BT.shape, similarity_BTP.shape[:2])
    total_BP = jnp.sum(jnp.where(text_valid_BT[:, :, None], similarity_BTP, 0.0), axis=1)
    return total_BP / jnp.maximum(jnp.sum(text_valid_BT, axis=1, keepdims=True), 1)
