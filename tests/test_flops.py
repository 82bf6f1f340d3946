"""The ledger against XLA's own count, published figures and arithmetic by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from tokzip_jax import decoder_site, encoder_site, flops, layout, llm, stack, vit
from tokzip_jax.config import LlmConfig, MethodConfig, ModelConfig, VitConfig
from tokzip_jax.masks import TABLES

VICUNA_7B = ModelConfig(dtype="bfloat16")
PLAIN = MethodConfig(voco_mask="visible")
VOCO_1 = MethodConfig(voco=1, voco_mask="voco")
SMALL = LlmConfig(vocab_size=512, width=128, layers=2, heads=8, kv_heads=2, head_dim=16, mlp_dim=384)


def unrolled(cfg, new, past):
    """A plain decoder without a scan, whose body XLA would count once: (parameters, tokens, cache) -> logits."""
    wide = {
        "q": (cfg.width, cfg.heads, cfg.head_dim),
        "k": (cfg.width, cfg.kv_heads, cfg.head_dim),
        "v": (cfg.width, cfg.kv_heads, cfg.head_dim),
        "o": (cfg.heads, cfg.head_dim, cfg.width),
        "gate": (cfg.width, cfg.mlp_dim),
        "up": (cfg.width, cfg.mlp_dim),
        "down": (cfg.mlp_dim, cfg.width),
    }
    layer = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in wide.items()}
    cache = jax.ShapeDtypeStruct((2, past, cfg.kv_heads, cfg.head_dim), jnp.float32)
    shapes = (
        [layer] * cfg.layers,
        jax.ShapeDtypeStruct((cfg.width, cfg.vocab_size), jnp.float32),
        jax.ShapeDtypeStruct((new, cfg.width), jnp.float32),
        [cache] * cfg.layers,
    )

    def run(layers, head, x_TD, caches):
        for w, (past_k, past_v) in zip(layers, caches):
            q = jnp.einsum("td,dnh->tnh", x_TD, w["q"]).reshape(new, cfg.kv_heads, -1, cfg.head_dim)
            k = jnp.concatenate([past_k, jnp.einsum("td,dkh->tkh", x_TD, w["k"])])
            v = jnp.concatenate([past_v, jnp.einsum("td,dkh->tkh", x_TD, w["v"])])
            logits = jnp.einsum("tkgh,skh->kgts", q, k)
            seen = jnp.arange(new + past)[None, :] <= past + jnp.arange(new)[:, None]
            mixed = jnp.einsum("kgts,skh->tkgh", jax.nn.softmax(jnp.where(seen, logits, -1e30)), v)
            x_TD = x_TD + jnp.einsum("tnh,nhd->td", mixed.reshape(new, cfg.heads, cfg.head_dim), w["o"])
            x_TD = x_TD + (jax.nn.silu(x_TD @ w["gate"]) * (x_TD @ w["up"])) @ w["down"]
        return x_TD[-1] @ head

    return run, shapes


@pytest.mark.parametrize("new, past", [(48, 0), (16, 64)])
def test_llm_flops_within_five_percent_of_xla(new, past):
    run, shapes = unrolled(SMALL, new, past)
    counted = jax.jit(run).lower(*shapes).compile().cost_analysis()["flops"]
    assert flops.llm_flops(SMALL, new, past=past, causal=False) == pytest.approx(counted, rel=0.05)


def test_llm_flops_by_hand():
    cfg = LlmConfig(vocab_size=7, width=4, layers=3, heads=2, kv_heads=1, head_dim=2, mlp_dim=5)
    weights = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 5  # q, k and v, o, SwiGLU
    head = 2 * 4 * 7
    assert flops.llm_flops(cfg, 1) == 3 * (2 * weights + 4 * 4) + head
    assert flops.llm_flops(cfg, 2, past=3) == 3 * (4 * weights + 4 * 4 * (4 + 5)) + head
    assert flops.llm_flops(cfg, 2, past=3, causal=False) == 3 * (4 * weights + 4 * 4 * 2 * 5) + head
    assert flops.llm_flops(cfg, 2, past=3, head=0) == flops.llm_flops(cfg, 2, past=3) - head


def test_reading_in_two_parts_costs_what_reading_at_once_costs():
    both = flops.llm_flops(SMALL, 5, head=0) + flops.llm_flops(SMALL, 3, past=5)
    assert both == flops.llm_flops(SMALL, 8)


def test_vit_flops_of_clip_l():
    # The 23 blocks that LLaVA's feature layer needs, and all 24.
    assert flops.vit_flops(VitConfig()) == pytest.approx(365e9, rel=0.01)
    assert flops.vit_flops(VitConfig(feature_layer=-1)) == pytest.approx(381e9, rel=0.01)


TOWER = VitConfig(image_size=64, patch_size=8, width=128, layers=3, heads=4, mlp_dim=256)
INSIDE = {
    "none": MethodConfig(),
    "tome": MethodConfig(encoder="tome", tokens=30),
    "folder_block": MethodConfig(encoder="folder_block", tokens=9),
    "downsample": MethodConfig(encoder="downsample", tokens=16),
    "dart": MethodConfig(encoder="dart", tokens=16),
}


def test_tower_flops_block_by_block():
    """What every block of the tower sees, written out: two blocks before the features, of three; 65 tokens."""

    def block(seen, left):
        return 2 * seen * 128 * 4 * 128 + 4 * seen**2 * 128 + 2 * left * 128 * 2 * 256

    def patching(patches):
        return 2 * patches * 3 * 8 * 8 * 128

    model = ModelConfig(vit=TOWER)
    expected = {
        "none": patching(64) + 2 * block(65, 65),
        "tome": patching(64) + block(65, 48) + block(48, 31),
        "folder_block": patching(64) + block(65, 65) + block(65, 10),
        "downsample": patching(16) + 2 * block(17, 17),
        "dart": patching(64) + 3 * block(65, 65),  # it reads the last block
    }
    left = {"none": 64, "tome": 30, "folder_block": 9, "downsample": 16, "dart": 64}
    for name, method in INSIDE.items():
        ours = flops.ledger(model, method, text_tokens=4)
        assert (ours.vit_flops, ours.patches) == (expected[name], left[name])
        assert ours.encoder_tokens == ours.visual_tokens == (method.tokens or 64)


def test_tower_flops_within_five_percent_of_xla():
    """Where every block merges, each is a program of its own, and XLA counts them all.

    The tower is wide enough for what the ledger leaves out, resizing a picture, to be small beside it.
    """
    model = ModelConfig(vit=dataclasses.replace(TOWER, width=512, mlp_dim=2048))
    for name in ("tome", "downsample"):
        one = dataclasses.replace(model, vit=dataclasses.replace(model.vit, layers=2, feature_layer=-2))
        cfg = model if name == "tome" else one  # of a plain tower XLA counts one block
        run = functools.partial(_features, cfg, INSIDE[name])
        shapes = jax.eval_shape(functools.partial(vit.init, cfg.vit), jax.random.key(0))
        images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        counted = jax.jit(run).lower(shapes, images).cost_analysis()["flops"]
        assert flops.tower_flops(cfg, INSIDE[name]) == pytest.approx(counted, rel=0.05)


def _features(cfg, method, params, images):
    tokens, _, _ = encoder_site.run(cfg, params, images, method, jax.random.key(0), project=lambda tokens, cls: tokens)
    return tokens.tokens_BMD


def test_a_method_that_compares_projected_patches_projects_them_first():
    kept = MethodConfig(encoder="divprune", tokens=64)
    patches = dataclasses.replace(kept, options={"compare": "patches"})
    one = flops.projector_flops(VICUNA_7B, patches)
    assert one == 64 * 2 * (1024 * 4096 + 4096 * 4096)
    assert flops.projector_flops(VICUNA_7B, kept) == one + one * 576 // 64


def test_kv_bytes_of_published_tables():
    llm = VICUNA_7B.llm
    assert flops.kv_bytes_per_token(llm, "bfloat16") == 524_288
    assert flops.kv_bytes_per_token(llm, "float32") == 2 * 524_288
    assert flops.kv_bytes_per_token(dataclasses.replace(llm, kv_heads=8), "bfloat16") == 524_288 // 4
    # VoCo-LLaMA, table 7 (decimal MB): 302.4 for the whole picture, 0.525 for one token.
    assert flops.ledger(VICUNA_7B, PLAIN, text_tokens=64).kv_bytes / 1e6 == pytest.approx(302.4, rel=2e-3)
    assert flops.ledger(VICUNA_7B, VOCO_1, text_tokens=64).kv_bytes / 1e6 == pytest.approx(0.525, rel=2e-3)


def test_ledger_of_the_uncompressed_model():
    ours = flops.ledger(VICUNA_7B, PLAIN, text_tokens=64)
    assert (ours.patches, ours.encoder_tokens, ours.visual_tokens, ours.read_tokens) == (576, 576, 576, 576)
    assert ours.picture_flops is None
    assert ours.prefill_flops == flops.llm_flops(VICUNA_7B.llm, 1 + 576 + 64)
    assert ours.projector_flops == 576 * 2 * (1024 * 4096 + 4096 * 4096)
    assert ours.prompt_kv_bytes == (1 + 576 + 64) * 524_288


def test_ledger_of_voco_splits_into_two_stages():
    llm = VICUNA_7B.llm
    hidden = flops.ledger(VICUNA_7B, MethodConfig(voco=4, voco_mask="voco"), text_tokens=64)
    assert (hidden.visual_tokens, hidden.voco_tokens, hidden.read_tokens) == (576, 4, 4)
    assert hidden.picture_flops == flops.llm_flops(llm, 1 + 576 + 4, head=0)
    assert hidden.prefill_flops == flops.llm_flops(llm, 64, past=4)
    assert hidden.prompt_kv_bytes == (4 + 64) * 524_288
    # With the prefix visible it stays in the cache, but is no part of the picture.
    seen = flops.ledger(VICUNA_7B, MethodConfig(voco=4, voco_mask="prefix_visible"), text_tokens=64)
    assert seen.prefill_flops == flops.llm_flops(llm, 64, past=5)
    assert (seen.kv_bytes, seen.prompt_kv_bytes) == (hidden.kv_bytes, hidden.prompt_kv_bytes + 524_288)
    # Plain causal with VoCo tokens: one pass that reads everything.
    plain = flops.ledger(VICUNA_7B, MethodConfig(voco=4, voco_mask="visible"), text_tokens=64)
    assert (plain.read_tokens, plain.picture_flops) == (580, None)
    assert plain.prefill_flops == flops.llm_flops(llm, 1 + 580 + 64)


def test_ledger_of_questions_that_choose_is_the_mean_of_theirs():
    four = MethodConfig(voco=4, voco_mask="voco")
    counts = (1, 1, 2, 4)
    each = [flops.ledger(VICUNA_7B, dataclasses.replace(four, voco=k), text_tokens=9) for k in counts]
    ours = flops.ledger(VICUNA_7B, four, text_tokens=9, read_voco=sum(counts) / 4)
    for name in ("read_tokens", "kv_bytes", "prompt_kv_bytes", "prefill_flops"):
        assert getattr(ours, name) == pytest.approx(sum(getattr(one, name) for one in each) / 4, rel=1e-12)
    # The picture is compressed into all four, whatever is read.
    assert (ours.voco_tokens, ours.picture_flops) == (4, each[-1].picture_flops)
    with pytest.raises(ValueError, match="read_voco is for questions that read VoCo tokens alone"):
        flops.ledger(VICUNA_7B, PLAIN, text_tokens=9, read_voco=1.0)


def test_ledger_follows_the_sites():
    zipped = MethodConfig(encoder="visionzip", tokens=64, options={"contextual": 10}, voco_mask="visible")
    ours = flops.ledger(VICUNA_7B, zipped, text_tokens=64)
    assert (ours.patches, ours.encoder_tokens, ours.visual_tokens, ours.read_tokens) == (576, 64, 64, 64)
    assert ours.projector_flops * 9 == flops.ledger(VICUNA_7B, PLAIN, text_tokens=64).projector_flops
    pooled = MethodConfig(projector="avgpool_linear", pool_grid=1, voco_mask="visible")
    ours = flops.ledger(VICUNA_7B, pooled, text_tokens=64)
    assert (ours.encoder_tokens, ours.visual_tokens) == (576, 1)
    assert ours.projector_flops == 2 * 1024 * 4096 + 2 * 1024 * (24 * 24 + 24)  # and the means along either side
    ours = flops.ledger(VICUNA_7B, dataclasses.replace(pooled, pool_grid=4, pool_rows=2), text_tokens=64)
    assert (ours.visual_tokens, ours.read_tokens) == (8, 8)
    assert ours.projector_flops == 8 * 2 * 1024 * 4096 + 2 * 1024 * (2 * 24 * 24 + 2 * 4 * 24)
    both = dataclasses.replace(zipped, voco=2, voco_mask="voco")
    ours = flops.ledger(VICUNA_7B, both, text_tokens=64)
    assert (ours.visual_tokens, ours.read_tokens) == (64, 2)


def counted(method, cfg, *, images, text):
    """XLA's FLOPs of a decoder with cuts over one row, layers unrolled, without its head."""
    visual = cfg.vit.patches
    ids = jax.ShapeDtypeStruct((1, images + text), jnp.int32)
    batch = {"ids": ids, "thread": ids, "sample": ids, "supervised": jax.ShapeDtypeStruct(ids.shape, bool)}
    valid = jax.ShapeDtypeStruct((1, images, visual), bool)
    slots = jax.eval_shape(functools.partial(layout.expand, voco=0, voco_count=0), batch, valid)
    x = jax.ShapeDtypeStruct((*slots.ids.shape, cfg.llm.width), jnp.float32)
    blocks = jax.eval_shape(lambda: stack.unstack(llm.init(cfg.llm, jax.random.key(0))["layers"]))

    def run(blocks, x, slots):
        return decoder_site.run(
            cfg, blocks, x, slots, jnp.asarray(TABLES["visible"]), method, images=images, visual=visual
        )[0]

    return jax.jit(run).lower(blocks, x, slots).compile().cost_analysis()["flops"]


SCHEDULED = ModelConfig(
    vit=VitConfig(image_size=96, patch_size=8, width=16, layers=2, heads=2, mlp_dim=32),
    llm=dataclasses.replace(SMALL, width=256, layers=4, head_dim=32, mlp_dim=768),
    attention="einsum",  # blocks are gone through in a loop, whose body XLA counts once
)
FASTV = MethodConfig(decoder="fastv", decoder_layers=(2,), decoder_keep=(36,))


def test_scheduled_flops_within_five_percent_of_xla():
    tokens = flops.layer_tokens(SCHEDULED, FASTV)
    assert tokens == (144, 144, 36, 36)
    new = [count + 8 for count in tokens]
    ours = flops.scheduled_flops(SCHEDULED.llm, new, head=0, causal=False)
    assert ours == pytest.approx(counted(FASTV, SCHEDULED, images=1, text=8), rel=0.05)
    # The count is of this schedule: without the cut it would be far off.
    assert flops.scheduled_flops(SCHEDULED.llm, [152] * 4, head=0, causal=False) > 1.4 * ours


def test_pyramiddrop_reads_the_next_layer_without_running_it():
    """One row of scores costs that layer's queries and keys, not its feed-forward."""
    method = dataclasses.replace(FASTV, decoder="pyramiddrop")
    llm_cfg = SCHEDULED.llm
    ours = flops.scheduled_flops(llm_cfg, [152, 152, 44, 44], head=0, causal=False)
    ours += 2 * 152 * llm_cfg.width * (llm_cfg.heads + llm_cfg.kv_heads) * llm_cfg.head_dim
    assert ours == pytest.approx(counted(method, SCHEDULED, images=1, text=8), rel=0.05)


def test_ledger_of_a_decoder_site():
    """FastV at layer 2 of 32 with half the tokens (average 306), and PyramidDrop's schedule, by hand."""
    llm_cfg = VICUNA_7B.llm
    half = dataclasses.replace(PLAIN, decoder="fastv", decoder_layers=(2,), decoder_keep=(288,))
    ours = flops.ledger(VICUNA_7B, half, text_tokens=64)
    assert ours.layer_tokens == (576,) * 2 + (288,) * 30 and ours.mean_tokens == 306
    assert (ours.visual_tokens, ours.read_tokens) == (576, 576)
    two, thirty = (dataclasses.replace(llm_cfg, layers=count) for count in (2, 30))
    expected = flops.llm_flops(two, 1 + 576 + 64, head=0) + flops.llm_flops(thirty, 1 + 288 + 64)
    assert ours.prefill_flops == expected
    per_layer = 524_288 // 32
    assert ours.kv_bytes == (2 * 576 + 30 * 288) * per_layer
    assert ours.prompt_kv_bytes == ours.kv_bytes + 65 * 524_288
    pyramid = dataclasses.replace(PLAIN, decoder="pyramiddrop", decoder_layers=(8, 16, 24), decoder_keep=(288, 144, 72))
    assert flops.ledger(VICUNA_7B, pyramid, text_tokens=64).mean_tokens == (576 + 288 + 144 + 72) / 4
    # SparseVLM's merged tokens are there too: 206.5 tokens a layer for its "192".
    sparse = dataclasses.replace(PLAIN, decoder="sparsevlm", decoder_layers=(3, 7, 16), decoder_keep=(300, 200, 110))
    assert flops.ledger(VICUNA_7B, sparse, text_tokens=64).mean_tokens == pytest.approx(206.5, abs=0.05)


def test_ledger_refuses_what_costs_nothing():
    with pytest.raises(ValueError, match="text_tokens=0 must be >= 1"):
        flops.ledger(VICUNA_7B, PLAIN, text_tokens=0)
    with pytest.raises(ValueError, match="knows no projector 'resampler'; it knows mlp2x_gelu"):
        flops.projector_flops(VICUNA_7B, MethodConfig(projector="resampler"))


def test_table_7_needs_three_text_lengths():
    llm = VICUNA_7B.llm
    lengths = [setting.text_tokens(llm) for setting in flops.VOCO_TABLE_7]
    for setting, length in zip(flops.VOCO_TABLE_7, lengths):
        assert setting.flops(llm, length) == pytest.approx(setting.printed, rel=1e-4)
    assert [round(length) for length in lengths] == [154, 90, 39]
    at_64 = [setting.flops(llm, 64) / 1e12 for setting in flops.VOCO_TABLE_7]
    assert at_64 == pytest.approx([8.40, 0.85, 0.83], abs=0.005)
    # A model whose picture alone costs more than the printed figure has no such length.
    assert flops.VOCO_TABLE_7[0].text_tokens(dataclasses.replace(llm, layers=64)) is None
