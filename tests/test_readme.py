"""README's code runs as it stands there; the blocks about other people's models are in `test_foreign_models.py`."""

import re

import jax.numpy as jnp
import numpy as np
import readme
import tiny_model as tiny

from tokzip_jax.config import MethodConfig


def test_two_stage_inference(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (code,) = readme.blocks("**Two-stage inference.**", "Positions are")
    questions = np.random.default_rng(0).integers(3, 32, (32, 4)).astype(np.int32)
    questions[1] = questions[0]
    names = readme.run(
        code,
        model=tiny.MODEL,
        params=tiny.params(),
        batch=tiny.batch([[tiny.PICTURE]], 3),
        method=MethodConfig(voco=1, voco_mask="voco"),
        questions=jnp.asarray(questions),
    )
    assert (tmp_path / "cat.safetensors").exists()
    assert names["tokens"].shape == (32, 16) and names["lengths"].shape == (32,)
    # One picture: equal questions have equal answers.
    np.testing.assert_array_equal(names["tokens"][0], names["tokens"][1])
    assert len(np.unique(names["tokens"], axis=0)) > 1


def test_every_block_is_executed_by_some_test():
    text = readme.README.read_text(encoding="utf-8")
    found = len(re.findall(r"^```python$", text, flags=re.MULTILINE))
    tested = readme.blocks("**Two-stage inference.**", "Positions are") + readme.blocks("## In your own model")
    assert found == len(tested) == 4
