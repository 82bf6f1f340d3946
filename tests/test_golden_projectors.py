"""Projectors that compress against the official implementations' numbers, under the official names of their weights."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest

from tokzip_jax import config as c
from tokzip_jax.compress import everything
from tokzip_jax.compress.pool import stride_pool
from tokzip_jax.compress.unshuffle import pixel_unshuffle
from tokzip_jax.paths import flatten
from tokzip_jax.projectors import PROJECTORS, Context, ldp, llamavid, qformer
from tokzip_jax.step import nest

SIZES = c.ProjectorConfig(queries=8, width=32, layers=4, heads=4, mlp_dim=64, text_length=64)


def model(width, grid, outer, vocab=64):
    """A model config with just what a projector reads."""
    return c.ModelConfig(
        vit=c.VitConfig(image_size=grid, patch_size=1, width=width, heads=1),
        llm=c.LlmConfig(width=outer, vocab_size=vocab),
        projector=SIZES,
    )


def run(name, cfg, method, params, x_BPD, cls_BD=None, question=None):
    cls_BD = x_BPD[:, 0] if cls_BD is None else cls_BD
    context = Context(cls_BD=jnp.asarray(cls_BD), key=jax.random.key(0), question=question)
    entry = PROJECTORS[name]
    tokens = jax.jit(lambda p, x: entry.apply(cfg, method, p, everything(x), context))(params, jnp.asarray(x_BPD))
    assert tokens.tokens_BMD.shape[1] == entry.count(cfg, method, x_BPD.shape[1])
    return tokens


def load(shapes, state, names):
    """Official weights as ours, every one of them.

    `names` are (pattern of official names, our path), without "weight" and "bias"; instead of a path there may be a
    function of the match that gives the path and the place in a stack.
    """
    flat = flatten(shapes)
    found = {}
    for key, value in state.items():
        stem, _, kind = key.rpartition(".")
        hits = ((re.fullmatch(pattern, stem), path) for pattern, path in names)
        hit, path = next((hit, path) for hit, path in hits if hit)
        path, group = path(hit) if callable(path) else (path, None)
        leaf = {"weight": ("w", "scale", "kernel"), "bias": ("b", "bias")}[kind]
        path = next(p for p in (f"{path}/{name}" for name in leaf) if p in flat)
        shape = flat[path].shape if group is None else flat[path].shape[1:]
        # [out, in] -> [in, out]; a depthwise kernel is [D, 1, H, W] -> [H, W, D].
        value = value[:, 0].transpose(1, 2, 0) if path.endswith("kernel") else value.T.reshape(shape)
        found.setdefault(path, {})[group] = value
    stacked = {
        path: parts[None] if None in parts else np.stack([parts[group] for group in sorted(parts)])
        for path, parts in found.items()
    }
    assert set(stacked) == set(flat) and all(stacked[p].shape == flat[p].shape for p in flat)
    return nest({path: jnp.asarray(value) for path, value in stacked.items()})


def weights(golden):
    return {key.removeprefix("sd/"): value for key, value in golden.items() if key.startswith("sd/")}


def shapes_of(init, cfg):
    return jax.eval_shape(functools.partial(init, cfg), jax.random.key(0))


UNSHUFFLE = official.read("pixel_unshuffle")


@pytest.mark.parametrize("case", ["c0", "c2", "c3", "iota"])
@pytest.mark.parametrize("order", ["v1", "v2"])
def test_pixel_unshuffle(case, order):
    x = UNSHUFFLE[f"{case}/x"]
    factor = 2 if case == "iota" else round(1 / float(UNSHUFFLE[f"{case}/scale"]))
    flat = x.reshape(x.shape[0], -1, x.shape[3])
    found = pixel_unshuffle(flat, factor=factor, order=order, height=x.shape[1])
    expected = UNSHUFFLE[f"{case}/{order}"]
    np.testing.assert_array_equal(found.tokens_BMD, expected.reshape(x.shape[0], -1, expected.shape[3]))


def test_internvl_projector():
    cfg = model(8, 4, 24)
    names = [("0", "pre_norm"), ("1", "fc1"), ("3", "fc2")]
    state = {key.removeprefix("mlp1/sd/"): v for key, v in UNSHUFFLE.items() if key.startswith("mlp1/sd/")}
    params = load(shapes_of(PROJECTORS["pixel_unshuffle"].init, cfg), state, names)
    x = UNSHUFFLE["c0/x"].reshape(2, 16, 8)
    found = run("pixel_unshuffle", cfg, c.MethodConfig(projector="pixel_unshuffle"), params, x)
    np.testing.assert_allclose(found.tokens_BMD, UNSHUFFLE["mlp1/out"], atol=1e-5)


POOL = official.read("onevision_pool")


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("mode", ["average", "max", "bilinear"])
def test_onevision_pooling(case, mode):
    side, stride = POOL[f"p{case}/hw_stride"]
    found = stride_pool(POOL[f"p{case}/x"], factor=int(stride), mode=mode).tokens_BMD
    assert POOL[f"p{case}/x"].shape[1] == side**2
    np.testing.assert_allclose(found, POOL[f"p{case}/{mode}"], atol=5e-6 if mode == "bilinear" else 1e-6)


LDP = official.read("ldp")
LDP_BLOCK = [("block.0.0", "depthwise"), ("block.0.1", "norm1"), ("block.1.fc1", "squeeze"), ("block.1.fc2", "excite"),
             ("block.2.0", "point"), ("block.2.1", "norm2")]
LDP_NAMES = [(r"model\.mlp\.1", "fc1"), (r"model\.mlp\.3", "fc2")]
LDP_NAMES += [
    (rf"model\.mb_block\.{n}\.{re.escape(official_name)}", f"block{n}/{ours}")
    for n in (1, 2)
    for official_name, ours in LDP_BLOCK
]


def test_ldp():
    cfg = model(24, 8, 32)
    params = load(shapes_of(PROJECTORS["ldp"].init, cfg), weights(LDP), LDP_NAMES)
    found = run("ldp", cfg, c.MethodConfig(projector="ldp"), params, LDP["x"])
    np.testing.assert_allclose(found.tokens_BMD, LDP["out"], atol=1e-5)
    first = np.transpose(LDP["act/model.mb_block.1"], (0, 2, 3, 1))
    second = jax.jit(ldp.block, static_argnums=2)(params["block2"], first, 2)
    np.testing.assert_allclose(second, np.transpose(LDP["act/model.mb_block.2"], (0, 2, 3, 1)), atol=1e-5)


def test_ldpv2():
    golden = official.read("ldpv2")
    cfg = model(16, 16, 24)
    names = [(r"mlp\.mlp\.0", "fc1"), (r"mlp\.mlp\.2", "fc2"), (r"peg\.peg\.0", "peg")]
    params = load(shapes_of(PROJECTORS["ldpv2"].init, cfg), weights(golden), names)
    found = run("ldpv2", cfg, c.MethodConfig(projector="ldpv2", pool_grid=12), params, golden["x"])
    np.testing.assert_allclose(found.tokens_BMD, golden["out"], atol=1e-5)


# A layer of BERT's, with the Q-Former's own parts.
LAYER = {
    "attention": {"output.dense": "attn/o", "output.LayerNorm": "norm1"},
    "crossattention": {"output.dense": "cross/o", "output.LayerNorm": "norm2"},
    "intermediate_query": {"dense": "mlp/up"},
    "output_query": {"dense": "mlp/down", "LayerNorm": "norm3"},
    "intermediate": {"dense": "text_mlp/up"},
    "output": {"dense": "text_mlp/down", "LayerNorm": "norm4"},
}
for kind in ("attention", "crossattention"):
    short = LAYER[kind]["output.dense"].split("/")[0]
    # Transformers repeats "attention" where LAVIS says "self".
    for inner in ("attention", "self"):
        LAYER[kind] |= {f"{inner}.{part}": f"{short}/{part[0]}" for part in ("query", "key", "value")}


def layer_path(hit):
    """Our path and group of a tensor of layer n: groups of two layers are stacked."""
    number = int(hit[1])
    kind, _, rest = hit[2].partition(".")
    return f"layers/0/{number % 2}/{LAYER[kind][rest]}", number // 2


def test_qformer_of_blip2():
    golden = official.read("qformer")
    cfg = model(48, 4, 24)
    state = weights(golden)
    shapes = flatten(shapes_of(PROJECTORS["qformer"].init, cfg))
    shapes = nest({path: leaf for path, leaf in shapes.items() if "query/" not in path and "pre_norm" not in path})
    names = [("layernorm", "norm"), ("language_projection", "fc"), (r"encoder\.layer\.(\d)\.(.*)", layer_path)]
    params = load(shapes, state, names)
    params["query"] = {"table": jnp.asarray(golden["query_tokens"][0])}
    read = jax.jit(functools.partial(qformer.read, cfg))
    hidden, mask = golden["encoder_hidden"], golden["encoder_mask"].astype(bool)
    found = read(params, hidden)
    np.testing.assert_allclose(found, golden["last_hidden"], atol=1e-5)
    np.testing.assert_allclose(read(params, hidden, mask), golden["last_hidden_masked"], atol=1e-5)
    projected = found @ params["fc"]["w"] + params["fc"]["b"]
    np.testing.assert_allclose(projected, golden["language_projection_out"], atol=1e-5)
    # The entry: CLS in front, then the norm over the features, which is the identity's at normalised ones.
    params["pre_norm"] = {"scale": jnp.ones(48), "bias": jnp.zeros(48)}
    cfg = model(48, 1, 24)
    normal = hidden - hidden.mean(-1, keepdims=True)
    normal /= np.sqrt((normal**2).mean(-1, keepdims=True) + 1e-5)
    out = run("qformer", cfg, c.MethodConfig(projector="qformer"), params, hidden[:, 1:], hidden[:, 0])
    expected = read(params, normal) @ params["fc"]["w"] + params["fc"]["b"]
    np.testing.assert_allclose(out.tokens_BMD, expected, atol=2e-5)


VID = official.read("llamavid")
VID_NAMES = [
    (r"vlm_att_encoder\.bert\.embeddings\.LayerNorm", "norm"),
    (r"vlm_att_encoder\.bert\.encoder\.layer\.(\d)\.(.*)", layer_path),
    ("vlm_att_ln", "pre_norm"),
    ("vlm_att_projector", "read"),
    ("vlm_att_key_projector", "key"),
    ("vlm_att_val_projector", "value"),
    (r"mm_projector\.0", "fc1"),
    (r"mm_projector\.2", "fc2"),
]


def test_llamavid():
    """One picture, two prompts of different lengths."""
    cfg = model(24, 4, 40)
    state = weights(VID)
    embeddings = "vlm_att_encoder.bert.embeddings."
    tables = {
        "words": state.pop(f"{embeddings}word_embeddings.weight"),
        "positions": state.pop(f"{embeddings}position_embeddings.weight"),
        "query": state.pop("vlm_att_query")[0],
    }
    state.pop(f"{embeddings}position_ids")
    shapes = flatten(shapes_of(PROJECTORS["llamavid"].init, cfg))
    params = load(nest({p: leaf for p, leaf in shapes.items() if not p.endswith("table")}), state, VID_NAMES)
    params |= {name: {"table": jnp.asarray(table)} for name, table in tables.items()}
    question = jnp.asarray(VID["input_ids"]), jnp.asarray(VID["text_attention_mask"], bool)
    whole = np.repeat(VID["image_features_with_cls"][:1], 2, axis=0)
    np.testing.assert_array_equal(VID["img_None/vis_embed"], whole[:, 1:])
    asked = jax.jit(functools.partial(llamavid.text_queries, cfg))(params, whole, question)
    np.testing.assert_allclose(asked, VID["img_None/text_q"], atol=1e-5)
    for grid, name in ((0, "img_None"), (1, "img_mean")):
        method = c.MethodConfig(projector="llamavid", content_grid=grid)
        found = run("llamavid", cfg, method, params, whole[:, 1:], whole[:, 0], question)
        np.testing.assert_allclose(found.tokens_BMD, VID[f"{name}/out"], atol=1e-5)
