"""The ledger of whole pipelines against XLA's own count, and what decoding and low-rank deltas cost by hand.

The analysis counts the body of a loop once: layers are single blocks here, as for decoding.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from tokzip_jax import compress, flops, generate, layout, llm, lora, stack, vit, vlm, voco
from tokzip_jax.config import LlmConfig, LoraConfig, MethodConfig, ModelConfig, RowConfig, RunConfig, VitConfig
from tokzip_jax.evals import runner, scoring
from tokzip_jax.masks import TABLES
from tokzip_jax.projectors import PROJECTORS
from tokzip_jax.projectors.base import Context

PLAIN = MethodConfig(voco_mask="visible")
# Heads as wide as real ones: softmax and norms, which the ledger leaves out, are small beside the products.
WIDE = ModelConfig(
    vit=VitConfig(image_size=64, patch_size=8, width=192, layers=3, heads=3, mlp_dim=768),
    llm=LlmConfig(
        vocab_size=512, width=256, layers=2, heads=4, kv_heads=2, head_dim=64, mlp_dim=768, max_positions=256
    ),
    attention="einsum",  # blocks are gone through in a loop, whose body XLA counts once
)
TEXT = 40


def unrolled_shapes(deltas=None):
    """Shapes of parameters, their layers as single blocks, and of a batch of one picture and one question."""

    def make(key):
        params = vlm.init(WIDE, "mlp2x_gelu", key)
        if deltas is not None:
            params = lora.attach(lora.add(deltas, params, key), deltas)
        apart = {name: {**params[name], "layers": stack.unstack(params[name]["layers"])} for name in ("vit", "llm")}
        return params | apart

    ids = jax.ShapeDtypeStruct((1, 2 + TEXT), jnp.int32)
    batch = {"ids": ids, "thread": ids, "sample": ids, "supervised": jax.ShapeDtypeStruct(ids.shape, bool)}
    batch["images"] = jax.ShapeDtypeStruct((1, 1, 64, 64, 3), jnp.float32)
    return jax.eval_shape(make, jax.random.key(0)), batch


def xla_flops(function, *shapes):
    return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]


def answered(squeeze, params, batch):
    """From a picture and a question to the logits of the answer's first token."""
    found, _ = vit.features(WIDE, params["vit"], batch["images"][:, 0], signals=("cls_attention_BP", "keys_BSH"))
    context = Context(cls_BD=found.cls_BD, key=jax.random.key(0))
    weights = params["projector"]["mlp2x_gelu"]
    visual = PROJECTORS["mlp2x_gelu"].apply(WIDE, PLAIN, weights, squeeze(found), context)
    slots = layout.expand(batch, visual.valid_BM[:, None], voco=0, voco_count=0)
    x = vlm.splice(WIDE, params, slots, visual.tokens_BMD)
    cache = llm.empty_cache(WIDE, 1, x.shape[1])
    table = jnp.asarray(TABLES["visible"])
    return generate.read(WIDE, params, x, slots.stream, table, cache=cache, offset=0).logits_BV


def test_ledger_of_a_whole_answer_within_five_percent_of_xla():
    """Tower, VisionZip, projector and prefill as one program, and the same without VisionZip."""

    def zipped(found):
        signals = found.signals["cls_attention_BP"], found.signals["keys_BSH"]
        return compress.visionzip(found.patches_BPD, found.cls_BD, *signals, dominant=12, contextual=4)

    def total(method):
        ours = flops.ledger(WIDE, method, text_tokens=TEXT, causal=False)
        return ours.vit_flops + ours.projector_flops + ours.prefill_flops

    shapes = unrolled_shapes()
    counted = xla_flops(functools.partial(answered, lambda found: compress.everything(found.patches_BPD)), *shapes)
    assert total(PLAIN) == pytest.approx(counted, rel=0.05)
    fewer = xla_flops(functools.partial(answered, zipped), *shapes)
    assert total(MethodConfig(encoder="visionzip", tokens=16)) == pytest.approx(fewer, rel=0.05)
    assert fewer < 0.8 * counted


def test_ledger_of_voco_and_decoding_within_five_percent_of_xla():
    """Stage one over BOS, picture and VoCo tokens; stage two over a question; a token behind its answer's first."""
    method, table = MethodConfig(voco=4, voco_mask="voco"), jnp.asarray(TABLES["voco"])
    ours = flops.ledger(WIDE, method, text_tokens=TEXT, causal=False)
    params, batch = unrolled_shapes()
    blocks = params["llm"]["layers"]
    short = {name: jax.ShapeDtypeStruct((1, 3), leaf.dtype) for name, leaf in batch.items() if name != "images"}

    def stage_one(params, batch):
        x, slots, _, _ = vlm.embed(WIDE, params, batch, method, voco_count=4, key=jax.random.key(0))
        return llm.run_layers(WIDE, params["llm"]["layers"], x, slots.stream, table, keep=True)

    picture = xla_flops(stage_one, params, short | {"images": batch["images"]})
    assert ours.vit_flops + ours.projector_flops + ours.picture_flops == pytest.approx(picture, rel=0.05)

    integers, kept = jax.ShapeDtypeStruct((1, 4), jnp.int32), jax.ShapeDtypeStruct((2, 1, 2, 4, 64), jnp.float32)
    last = jax.ShapeDtypeStruct((1,), jnp.int32)
    cache = voco.VocoCache(kept, kept, integers, integers, integers, next_position=last, voco_mask="voco")
    ask = functools.partial(voco.ask, WIDE, max_new=2)
    question = params, cache, jax.ShapeDtypeStruct((1, TEXT), jnp.int32)
    assert ours.prefill_flops == pytest.approx(xla_flops(ask, *question), rel=0.05)

    # The body of the loop is one step, and XLA counts it once.
    prompt = jax.eval_shape(ask, *question)
    decode = functools.partial(generate.decode, WIDE, max_new=2, eos_id=2, table=table)
    assert ours.decode_flops == pytest.approx(xla_flops(decode, params, blocks, prompt), rel=0.05)


DELTAS = LoraConfig(rank=32, paths=(r"vit/layers/\d+/attn/[qkvo]/w", r"llm/layers/\d+/.*/w"))


def test_ledger_of_deltas_within_five_percent_of_xla():
    ours = flops.ledger(WIDE, PLAIN, text_tokens=TEXT, causal=False, deltas=DELTAS)
    squeeze = functools.partial(answered, lambda found: compress.everything(found.patches_BPD))
    counted = xla_flops(squeeze, *unrolled_shapes(DELTAS))
    assert ours.vit_flops + ours.projector_flops + ours.prefill_flops == pytest.approx(counted, rel=0.05)


def test_ledger_of_deltas_by_hand():
    plain = flops.ledger(WIDE, PLAIN, text_tokens=TEXT)
    ours = flops.ledger(WIDE, PLAIN, text_tokens=TEXT, deltas=DELTAS)
    vit_layer = 4 * 32 * (192 + 192)  # q, k, v, o; two of the three blocks run
    llm_layer = 32 * (2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 768))
    assert ours.vit_flops - plain.vit_flops == 2 * 2 * vit_layer * (64 + 1)
    assert ours.prefill_flops - plain.prefill_flops == 2 * 2 * llm_layer * (1 + 64 + TEXT)
    assert ours.decode_flops - plain.decode_flops == 2 * 2 * llm_layer
    # Behind a cut fewer tokens; in two stages each token once; merged or none: nothing.
    half = dataclasses.replace(PLAIN, decoder="fastv", decoder_layers=(1,), decoder_keep=(32,))
    added = [flops.ledger(WIDE, half, text_tokens=TEXT, deltas=cfg).prefill_flops for cfg in (DELTAS, LoraConfig())]
    assert added[0] - added[1] == 2 * llm_layer * (2 * (1 + TEXT) + 64 + 32)
    stages = [
        flops.ledger(WIDE, MethodConfig(voco=1, voco_mask="voco"), text_tokens=TEXT, deltas=cfg)
        for cfg in (DELTAS, LoraConfig())
    ]
    assert stages[0].picture_flops - stages[1].picture_flops == 2 * 2 * llm_layer * (1 + 64 + 1)
    assert stages[0].prefill_flops - stages[1].prefill_flops == 2 * 2 * llm_layer * TEXT
    with pytest.raises(ValueError, match="deltas of vit/ and llm/ only, not of 'projector/mlp2x_gelu/fc1/w'"):
        flops.ledger(WIDE, PLAIN, text_tokens=1, deltas=LoraConfig(rank=2, paths=(r"projector/.*",)))


def test_decode_flops_by_hand():
    llm_cfg = WIDE.llm
    layer = dataclasses.replace(llm_cfg, layers=1)
    head = 2 * 256 * 512
    plain = flops.ledger(WIDE, PLAIN, text_tokens=TEXT)
    assert plain.decode_flops == flops.llm_flops(llm_cfg, 1, past=1 + 64 + TEXT)
    # Every layer reads what it kept.
    half = dataclasses.replace(PLAIN, decoder="fastv", decoder_layers=(1,), decoder_keep=(32,))
    by_layer = [flops.llm_flops(layer, 1, past=1 + count + TEXT, head=0) for count in (64, 32)]
    assert flops.ledger(WIDE, half, text_tokens=TEXT).decode_flops == sum(by_layer) + head
    # VoCo's tokens in place of the picture, with the prefix where it is seen.
    for mask, past in (("voco", 1), ("prefix_visible", 2)):
        one = flops.ledger(WIDE, MethodConfig(voco=1, voco_mask=mask), text_tokens=TEXT)
        assert one.decode_flops == flops.llm_flops(llm_cfg, 1, past=past + TEXT)


KV = 2 * 2 * 2 * 64 * 4  # bytes of a token: keys and values, two layers, two heads of 64 float32


def test_ledger_of_several_pictures_by_hand():
    """Every picture costs a look of the tower, and its tokens are in the prompt and in the cache."""
    llm_cfg = WIDE.llm
    one, five = (flops.ledger(WIDE, PLAIN, text_tokens=TEXT, images=images) for images in (1, 5))
    assert (five.visual_tokens, five.read_tokens, five.mean_tokens) == (5 * 64, 5 * 64, 5 * 64)
    assert five.kv_bytes == 5 * 64 * KV and five.prompt_kv_bytes == (1 + 5 * 64 + TEXT) * KV
    assert five.prefill_flops == flops.llm_flops(llm_cfg, 1 + 5 * 64 + TEXT)
    assert five.decode_flops == flops.llm_flops(llm_cfg, 1, past=1 + 5 * 64 + TEXT)
    assert (five.patches, five.vit_flops, five.projector_flops) == (5 * 64, 5 * one.vit_flops, 5 * one.projector_flops)
    # VoCo: each picture is compressed by itself, behind the prefix, and text reads the VoCo tokens of all.
    voco_2 = MethodConfig(voco=2, voco_mask="voco")
    five = flops.ledger(WIDE, voco_2, text_tokens=TEXT, images=5)
    assert (five.voco_tokens, five.read_tokens, five.kv_bytes) == (10, 10, 10 * KV)
    assert five.picture_flops == 5 * flops.llm_flops(llm_cfg, 1 + 64 + 2, head=0)
    assert five.prefill_flops == flops.llm_flops(llm_cfg, TEXT, past=10)
    assert flops.ledger(WIDE, voco_2, text_tokens=TEXT, images=5, read_voco=1.5).read_tokens == 7.5
    # FastV has its budget for each picture.
    half = dataclasses.replace(PLAIN, decoder="fastv", decoder_layers=(1,), decoder_keep=(32,))
    five = flops.ledger(WIDE, half, text_tokens=TEXT, images=5)
    layer = dataclasses.replace(llm_cfg, layers=1)
    by_layer = [flops.llm_flops(layer, 1 + 5 * count + TEXT, head=0) for count in (64, 32)]
    assert five.layer_tokens == (5 * 64, 5 * 32)
    assert five.prefill_flops == sum(by_layer) + 2 * 256 * 512
    assert five.kv_bytes == (5 * 64 + 5 * 32) * KV / 2
    # Deltas run on every token.
    deltas = [flops.ledger(WIDE, voco_2, text_tokens=TEXT, images=5, deltas=cfg) for cfg in (DELTAS, LoraConfig())]
    llm_layer = 32 * (2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 768))
    assert deltas[0].picture_flops - deltas[1].picture_flops == 5 * 2 * 2 * llm_layer * (1 + 64 + 2)
    with pytest.raises(ValueError, match="images=0 must be >= 1"):
        flops.ledger(WIDE, PLAIN, text_tokens=TEXT, images=0)


NEXT = dataclasses.replace(PLAIN, packing="spatial_unpad")


def test_ledger_of_stitched_tiles_by_hand():
    """A picture of 20 x 8 on 2 x 2 tiles of 8 x 8 patches: 16 x 6.4, so 6 rows of 16 patches and a newline each."""
    assert flops.stitched_tokens(WIDE, NEXT, (2, 2, 20, 8)) == 64 + 6 * (16 + 1)
    # Of 4 x 10 selected tokens all may be real; of 4 x 40 no more than there are patches, and four CLS tokens.
    for tokens, kept in ((10, 4 * 10), (40, 6 * 16 + 4)):
        few = dataclasses.replace(NEXT, encoder="visionzip", tokens=tokens)
        assert flops.stitched_tokens(WIDE, few, (2, 2, 20, 8)) == tokens + kept + 6
        whole = dataclasses.replace(few, packing="spatial")
        assert flops.stitched_tokens(WIDE, whole, (2, 2, 20, 8)) == 5 * tokens
    ours = flops.ledger(WIDE, NEXT, text_tokens=TEXT, images=5, stitched=166)
    assert (ours.visual_tokens, ours.read_tokens, ours.kv_bytes) == (166, 166, 166 * KV)
    assert ours.layer_tokens == (166, 166) and ours.patches == 5 * 64
    assert ours.prefill_flops == flops.llm_flops(WIDE.llm, 1 + 166 + TEXT)
    assert ours.vit_flops == 5 * flops.ledger(WIDE, PLAIN, text_tokens=TEXT).vit_flops
    # One picture for the language model: VoCo tokens once.
    once = dataclasses.replace(NEXT, voco=2, voco_mask="voco")
    ours = flops.ledger(WIDE, once, text_tokens=TEXT, images=5, stitched=166)
    assert (ours.voco_tokens, ours.read_tokens) == (2, 2)
    assert ours.picture_flops == flops.llm_flops(WIDE.llm, 1 + 166 + 2, head=0)


def test_table_has_the_totals_of_all_pictures(monkeypatch):
    """Frames of a clip; and tiles, where the mean weighs pictures by their questions: 3 x 5 and 1 x 3 tiles."""
    score = scoring.Score(accuracy=0.5, by_type={}, not_yes_no=0.5, questions=1)
    monkeypatch.setattr(runner.Runner, "load", lambda self, row: {})
    monkeypatch.setattr(runner.Runner, "score", lambda self, *_: (score, None))
    monkeypatch.setattr(runner.Runner, "question_tokens", TEXT)

    def measured(method, *examples, order=""):
        run = runner.Runner(RunConfig(model=WIDE), None, None, None, list(examples))
        return run.measure("row", RowConfig(method=method, frame_order=order))

    clip = {"types": ["order"], "frames": 6}
    found = measured(PLAIN, clip, clip)
    assert (found.visual_tokens, found.kv_bytes) == (6 * 64, 6 * 64 * KV)
    assert found.prefill_flops == flops.llm_flops(WIDE.llm, 1 + 6 * 64 + TEXT)
    voco_2 = MethodConfig(voco=2, voco_mask="voco")
    found = measured(voco_2, clip)
    assert (found.visual_tokens, found.kv_bytes) == (12, 12 * KV)
    assert found.prefill_flops == flops.llm_flops(WIDE.llm, TEXT, past=12)
    # A row may read clips (of 6 frames) in an order of its own.
    assert [measured(PLAIN, clip, order=order).visual_tokens for order in ("middle", "shuffled")] == [64, 6 * 64]
    # An example that says nothing is one picture.
    assert measured(PLAIN, {"types": ["shape"]}).visual_tokens == 64

    wide = {"types": ["open"] * 3, "frames": 5, "tiles": (2, 2, 20, 8)}
    tall = {"types": ["open"], "frames": 3, "tiles": (1, 2, 8, 16)}
    found = measured(PLAIN, wide, tall)
    assert found.visual_tokens == (3 * 5 + 3) / 4 * 64 and found.kv_bytes == (3 * 5 + 3) / 4 * 64 * KV
    # Stitched: 64 + 6 * 17 of the wide one; all of the tall one's 64 + 16 * 9.
    assert measured(NEXT, wide, tall).visual_tokens == (3 * 166 + 208) / 4
