"""The benchmarks of the compressors at toy shapes, and what they report. Nothing here measures speed."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokzip_jax import flops, vit
from tokzip_jax.bench import compress, decoder, timing
from tokzip_jax.bench.__main__ import main
from tokzip_jax.config import ModelConfig, VitConfig
from tokzip_jax.types import VisualTokens


def bench(capsys, *arguments):
    """The JSON line and the text of a benchmark."""
    main(arguments)
    *text, line = capsys.readouterr().out.strip().split("\n")
    return json.loads(line), "\n".join(text)


def test_compress(capsys, monkeypatch):
    cases = []

    def interleave(timed, **settings):
        cases.append(timed)
        return timing.interleave(timed, **settings)

    monkeypatch.setattr(compress, "interleave", interleave)
    methods = ("visionzip", "scope", "uniform + restore")
    options = ("--tiny", "--tokens", "8", "--batch", "2", "--layers=2", "--runs=2", "--repeats=3", "--clock=cpu")
    found, text = bench(capsys, "compress", "--methods", *methods, *options)
    assert found["settings"]["blocks run"] == 1 and "host calls" in text
    # The encoder takes one turn a round, each method three.
    (timed,) = cases
    assert [case.repeats for case in timed.values()] == [1, 3, 3, 3] and next(iter(timed)) == "encoder"
    (encoder,), rows = found["tables"]["encoder, batch 2"], found["tables"]["methods, batch 2"]
    assert [(row["method"], row["kind"], row["tokens"], row["target"]) for row in rows] == [
        ("visionzip", "one-shot", 8, 0.01),
        ("scope", "greedy", 8, 0.05),
        ("uniform + restore", "one-shot", 8, 0.01),
    ]
    for row, case in zip(rows, list(timed.values())[1:], strict=True):
        assert row["share of best"] == pytest.approx(row["ms min"] / encoder["ms min"])
        result = case.function()
        assert isinstance(result, VisualTokens) and result.tokens_BMD.shape == (2, 8, 16)
        # Tokens, validity, places, sizes, sources; a table of pointers may come with them.
        assert 0 <= row["result bytes"] - sum(leaf.nbytes for leaf in jax.tree.leaves(result)) <= 64
        assert row["extra bytes"] >= 0 and row["host calls"] == 0
    # SCOPE holds all pairs of patches.
    assert rows[1]["extra bytes"] >= 2 * 16 * 16 * 4 > rows[0]["extra bytes"]


@pytest.mark.parametrize("tokens", [192, 128, 64])
@pytest.mark.parametrize("name", compress.METHODS)
def test_every_method_gives_its_budget_at_full_shape(name, tokens):
    """Traced, not run: 576 patches of CLIP-L/14-336 to the published numbers of tokens."""
    x = jax.eval_shape(functools.partial(compress.inputs, ModelConfig(), 1))
    made = jax.eval_shape(functools.partial(compress.METHODS[name].function, n=tokens), x)
    assert made.tokens_BMD.shape == (1, tokens, 1024) and made.source_BP.shape == (1, 576)


def test_inputs_are_what_a_tower_gives():
    cfg = ModelConfig(vit=compress.TINY, dtype="bfloat16")
    x = jax.eval_shape(functools.partial(compress.inputs, cfg, 3))
    params = jax.eval_shape(functools.partial(vit.init, cfg.vit), jax.random.key(0))
    pixels = jax.ShapeDtypeStruct((3, 32, 32, 3), jnp.bfloat16)
    signals = vit.FEATURE_SIGNALS + vit.LAST_SIGNALS
    given, _ = jax.eval_shape(functools.partial(vit.features, cfg, signals=signals), params, pixels)
    assert (x.patches_BPD, x.cls_BD) == (given.patches_BPD, given.cls_BD)
    assert {name: getattr(x, name) for name in signals} == given.signals


def test_a_host_call_is_seen():
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)

    def calls(x):
        return jax.pure_callback(np.sin, shape, x)

    program = jax.jit(calls).lower(shape).compile()
    assert len(compress.TO_HOST.findall(program.as_text())) == 1


def test_decoder(capsys, monkeypatch):
    made = {}

    def interleave(cases, **settings):
        made.update({name: case.function() for name, case in cases.items()})
        return timing.interleave(cases, **settings)

    monkeypatch.setattr(decoder, "interleave", interleave)
    shape = ("--tiny", "--grid=4", "--text=5", "--batch=2", "--layers=4", "--runs=2", "--clock=cpu")
    found, _ = bench(capsys, "decoder", "--methods", "fastv", "sparsevlm", *shape)
    schedules, seconds, masked, causal = found["tables"].values()
    assert (
        [row["method"] for row in schedules] == [row["what"] for row in seconds] == [decoder.FULL, "fastv", "sparsevlm"]
    )
    assert [row["tokens at the end"] for row in schedules[:2]] == [16, 8]
    assert schedules[1]["mean of the layers"] == (16 + 8 + 8 + 8) / 4
    llm = dataclasses.replace(decoder.TINY, layers=4)
    for rows, pairs in ((masked, False), (causal, True)):
        full = flops.llm_flops(llm, 1 + 16 + 5, causal=pairs)
        half = flops.scheduled_flops(llm, [22, 14, 14, 14], causal=pairs)
        assert rows[0]["FLOP ratio"] == full / half and rows[0]["GFLOPs"] == 2 * half / 1e9
        assert rows[0]["FLOP / time"] == pytest.approx(full / half / rows[0]["time ratio"])
        assert [row["method"] for row in rows] == ["fastv", "sparsevlm"]
    # What was timed: logits, and keys and values of every layer for the tokens that it worked on.
    for row, (logits, caches) in zip(schedules, made.values(), strict=True):
        assert logits.shape == (2, 32) and bool(jnp.isfinite(logits).all())
        slots = [key.shape[2] for keys, _ in caches for key in keys]
        assert sum(slots) / len(slots) == 1 + row["mean of the layers"] + 5
    assert not np.allclose(made[decoder.FULL][0], made["fastv"][0])


def test_schedules_are_in_proportion():
    clip = VitConfig(image_size=48, patch_size=2)
    full = ModelConfig(vit=clip)  # 32 layers, 576 visual tokens
    found = {name: decoder.method(name, full) for name in decoder.DECODER}
    assert (found["fastv"].decoder_layers, found["fastv"].decoder_keep) == ((2,), (288,))
    assert (found["pyramiddrop"].decoder_layers, found["pyramiddrop"].decoder_keep) == ((8, 16, 24), (288, 144, 72))
    assert (found["sparsevlm"].decoder_layers, found["sparsevlm"].decoder_keep) == ((3, 7, 16), (300, 200, 110))
    assert found["sparsevlm_v1"].decoder_layers == (3, 7, 16, 20)
    assert found["sparsevlm_plus"].decoder_keep == (300, 200, 118)
    small = ModelConfig(vit=clip, llm=decoder.SMOLLM2_135M)
    for name in decoder.DECODER:
        method = decoder.method(name, small)
        assert len(flops.layer_tokens(small, method)) == 30  # a schedule that can be
    assert decoder.method("sparsevlm_plus", small).decoder_heads == 9


def test_what_cannot_be_is_one_sentence():
    with pytest.raises(SystemExit, match=r"error: scope: 17 tokens asked of 16 patches; it must be 1 \.\. 16"):
        main(["compress", "--tiny", "--methods", "scope", "--tokens", "17"])
    with pytest.raises(SystemExit, match="error: decoder_layers = "):
        main(["decoder", "--tiny", "--methods", "pyramiddrop", "--grid=4", "--layers=1"])
