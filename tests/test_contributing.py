"""The worked example of CONTRIBUTING.md is a method like any other."""

import re
import sys

import jax
import numpy as np
import pytest
import tiny_model as tiny
from small_run import ROOT

from tokzip_jax import compress, encoder_site, flops, listing, vlm
from tokzip_jax.compress import registry
from tokzip_jax.config import MethodConfig


def test_one_file_and_one_line_add_a_compressor(tmp_path, monkeypatch):
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Adding a compressor")[1].split("\n## ")[0]
    code, line = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    name = line.strip().strip('",')
    assert line == f'    "{name}",\n' and '    "select",' in (ROOT / "tokzip_jax/compress/registry.py").read_text()
    assert f"`tokzip_jax/compress/{name}.py`" in section
    file = tmp_path / f"{name}.py"
    file.write_text(code)
    # The file lies where its package looks, and its line stands in the list.
    monkeypatch.setattr(compress, "__path__", [*compress.__path__, str(tmp_path)])
    entries, file_of = listing.entries("tokzip_jax.compress", (*registry.FILES, name))
    del sys.modules[f"tokzip_jax.compress.{name}"]
    assert set(entries) - set(compress.ENCODER) == {name}
    monkeypatch.setitem(compress.ENCODER, name, entries[name])
    monkeypatch.setitem(registry.FILE_OF, name, file_of[name])

    method = MethodConfig(encoder=name, tokens=5, options={"order": 1})
    encoder_site.check("x", tiny.MODEL, method)
    wrong = {
        "options.order = 0.5 must be at least 1.0": MethodConfig(encoder=name, tokens=5, options={"order": 0.5}),
        "17 tokens asked of 16 patches": MethodConfig(encoder=name, tokens=17),
    }
    for message, bad in wrong.items():
        with pytest.raises(ValueError, match=message):
            encoder_site.check("x", tiny.MODEL, bad)
    assert flops.ledger(tiny.MODEL, method, text_tokens=4).visual_tokens == vlm.visual_slots(tiny.MODEL, method) == 5
    assert f"| [{name}](tokzip_jax/compress/{name}.py) | similarity | patches |" in compress.table()

    encode = jax.jit(vlm.encode, static_argnums=(0, 3))
    images, key = tiny.images(2), jax.random.key(0)
    found, _ = encode(tiny.MODEL, tiny.params(), images, method, key)
    both, _ = encode(tiny.MODEL, tiny.params(), images, MethodConfig(), key)
    # The norms are of features in front of the projector.
    features, _ = jax.jit(
        lambda p, x: encoder_site.run(tiny.MODEL, p, x, MethodConfig(), key, project=lambda tokens, cls: tokens)[:2]
    )(tiny.params()["vit"], images[:, 0])
    norms = np.abs(np.asarray(features.tokens_BMD)).sum(axis=2)
    expected = np.sort(np.argsort(-norms, axis=1)[:, :5], axis=1)
    np.testing.assert_array_equal(found.position_BM, expected)
    tiny.close(found.tokens_BMD, np.take_along_axis(np.asarray(both.tokens_BMD), expected[:, :, None], axis=1))


def test_a_name_stands_in_one_file(tmp_path, monkeypatch):
    (tmp_path / "again.py").write_text("ENTRIES = {'random': None}\n")
    monkeypatch.setattr(compress, "__path__", [*compress.__path__, str(tmp_path)])
    with pytest.raises(ValueError, match=r"'random' stands in tokzip_jax/compress/select\.py and in .*/again\.py; it"):
        listing.entries("tokzip_jax.compress", (*registry.FILES, "again"))
    del sys.modules["tokzip_jax.compress.again"]
