"""LLaVA-1.6 against the official implementation's numbers: stitched and un-padded tiles, newlines, logits and loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import official

from tokzip_jax.config import MethodConfig
from tokzip_jax.convert.llava import from_llava
from tokzip_jax.types import PAD

GOLDEN = official.read("llava_next")
CFG = dataclasses.replace(official.LLAVA, image_newline=True)
SHOWN = 32  # of the embeddings and logits the file holds every so manieth


def params():
    own = {name.removeprefix("sd/"): leaf for name, leaf in GOLDEN.items() if name.startswith("sd/")}
    params, extra = from_llava({**official.read("llava_state_dict"), **own}, CFG)
    assert not extra  # the newline has its place
    np.testing.assert_array_equal(params["image_newline"], own["model.image_newline"])
    return jax.tree.map(jnp.asarray, params)


def rows():
    tiles = np.zeros((2, 5, 3, 48, 48), np.float32)
    tiles[0], tiles[1, :3] = GOLDEN["tiles_0"], GOLDEN["tiles_1"]
    batch = official.batch(GOLDEN["input_ids"], GOLDEN["attention_mask"], GOLDEN["labels"], tiles[:, 0])
    facts = np.concatenate([GOLDEN["grid_wh"], GOLDEN["image_sizes_wh"]], axis=1)
    return {**batch, "images": tiles.transpose(0, 1, 3, 4, 2), "tiles": facts}


def test_embeddings_logits_and_loss():
    out = official.score(CFG, params(), rows(), method=MethodConfig(packing="spatial_unpad"))
    real = np.asarray(out["slots"].stream.kind != PAD)
    for row, mask in enumerate(GOLDEN["merged_attention_mask"]):
        assert real[row].sum() == mask.sum()
        shown = np.arange(0, mask.sum(), SHOWN)
        expected = GOLDEN["inputs_embeds"][row, : len(shown)]
        np.testing.assert_allclose(out["x"][row][real[row]][shown], expected, atol=1e-5)
        logits = out["logits"][row][real[row]]
        np.testing.assert_allclose(logits[shown], GOLDEN["logits"][row, : len(shown)], atol=1e-4)
        np.testing.assert_allclose(logits[-8:], GOLDEN["last_logits"][row], atol=1e-4)
    np.testing.assert_allclose(out["loss"], GOLDEN["loss"], atol=1e-5)
