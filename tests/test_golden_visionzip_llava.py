"""LLaVA-1.5 with VisionZip (54 dominant and 10 contextual tokens), end to end, against the official numbers."""

import jax
import numpy as np
import official

from tokzip_jax import compress, encoder_site, vit
from tokzip_jax.config import MethodConfig

GOLDEN = official.read("visionzip_llava")
PIXELS = official.read("llava_rightpad")["pixel_values"]
METHOD = MethodConfig(encoder="visionzip", tokens=64, options={"contextual": 10})


def test_tokens_that_are_kept_and_merged():
    entry, ask = compress.ENCODER["visionzip"], encoder_site.ask(official.LLAVA, METHOD)

    @jax.jit
    def compressed(params, images):
        found, _ = vit.features(official.LLAVA, params, images, signals=entry.signals)
        return entry.function(found, ask)

    found = compressed(official.llava_params()["vit"], np.transpose(PIXELS, (0, 2, 3, 1)))
    # The official indices count CLS as 0 and come best first; ours stand in raster order, CLS as -1.
    np.testing.assert_array_equal(found.position_BM[:, :54], np.sort(GOLDEN["keep_idx"], axis=1) - 1)
    np.testing.assert_allclose(found.tokens_BMD, GOLDEN["compressed_tokens"], atol=1e-5)


def test_logits_and_loss():
    rows = official.batch(GOLDEN["input_ids"], GOLDEN["attention_mask"], GOLDEN["labels"], PIXELS)
    out = official.score(official.LLAVA, official.llava_params(), rows, method=METHOD)
    np.testing.assert_allclose(out["projected"], GOLDEN["projected"], atol=1e-5)
    official.check_logits(out, GOLDEN)


def test_greedy_answer_and_the_logits_of_each_step():
    official.check_greedy(PIXELS, GOLDEN, METHOD)
