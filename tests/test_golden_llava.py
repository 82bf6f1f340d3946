"""LLaVA-1.5 against the official implementation's numbers: features, embeddings, logits, loss and greedy answers."""

import jax
import numpy as np
import official

from tokzip_jax import vit
from tokzip_jax.config import MethodConfig

GOLDEN = official.read("llava_rightpad")
PLAIN = MethodConfig()


def rows(*, left=False):
    return official.batch(
        GOLDEN["input_ids"], GOLDEN["attention_mask"], GOLDEN["labels"], GOLDEN["pixel_values"], left=left
    )


def score(batch):
    return official.score(official.LLAVA, official.llava_params(), batch, method=PLAIN)


def test_features_are_the_second_to_last_block_without_the_cls_token():
    images = np.transpose(GOLDEN["pixel_values"], (0, 2, 3, 1))
    features = jax.jit(lambda params, images: vit.features(official.LLAVA, params, images)[0].patches_BPD)
    found = features(official.llava_params()["vit"], images)
    np.testing.assert_allclose(found, GOLDEN["vision_features"], atol=1e-5)


def test_embeddings_logits_and_loss():
    out = score(rows())
    np.testing.assert_allclose(out["projected"][:, ::8], GOLDEN["projected_features"], atol=1e-5)
    np.testing.assert_allclose(out["x"][:, ::8], GOLDEN["inputs_embeds"], atol=1e-5)
    official.check_logits(out, GOLDEN, every=2)


def test_padding_on_the_left_changes_no_logit_and_no_loss():
    out = score(rows(left=True))
    for row, length in enumerate(GOLDEN["merged_attention_mask"].sum(axis=1)):
        ours = out["logits"][row, -length::2]
        np.testing.assert_allclose(ours, GOLDEN["logits"][row, : len(ours)], atol=1e-4)
    np.testing.assert_allclose(out["loss"], GOLDEN["loss"], atol=1e-5)


def test_greedy_answer_and_the_logits_of_each_step():
    official.check_greedy(GOLDEN["pixel_values"], GOLDEN, PLAIN)
