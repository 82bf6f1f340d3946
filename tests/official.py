"""The official implementations' tiny models: their weights as ours, and their rows of ids as ours."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from tokzip_jax import config as c
from tokzip_jax import generate, layers, llm, losses, stack, vlm
from tokzip_jax.convert.llava import from_llava
from tokzip_jax.masks import TABLES
from tokzip_jax.types import IMAGE_ID, PAD, VOCO_ID

DATA = pathlib.Path(__file__).parent / "data"
OFFICIAL_VOCO = 32000
NEW = 8  # tokens of the official greedy answers

LLAVA = c.ModelConfig(
    vit=c.VitConfig(image_size=48, patch_size=2, width=32, layers=4, heads=4, mlp_dim=64),
    llm=c.LlmConfig(vocab_size=64, width=48, layers=2, heads=4, kv_heads=4, head_dim=12, mlp_dim=96),
)
# The vocabulary is the official one, since its 32001 logits are all in the loss.
VOCO = c.ModelConfig(
    vit=c.VitConfig(image_size=16, patch_size=4, width=32, layers=3, heads=4, mlp_dim=64),
    llm=c.LlmConfig(vocab_size=32001, width=32, layers=2, heads=4, kv_heads=4, head_dim=8, mlp_dim=64),
)


def read(name):
    """The arrays of a file of tests/data."""
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


@functools.cache
def llava_params():
    """The tiny LLaVA."""
    return jax.tree.map(jnp.asarray, from_llava(read("llava_state_dict"), LLAVA)[0])


@functools.cache
def voco_params():
    """The tiny VoCo-LLaMA."""
    return jax.tree.map(jnp.asarray, from_llava(voco_state(), VOCO, row_32000="voco")[0])


def voco_state():
    """VoCo-LLaMA's state dict; its file holds rows 0 .. 63 and 32000 of the two tables, the others are zero."""
    state = read("voco_state_dict")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = np.zeros((32001, 32), np.float32)
        table[:64], table[OFFICIAL_VOCO] = state.pop(f"{name}@rows0_64"), state.pop(f"{name}@row32000")
        state[name] = table
    return state


def batch(ids, mask, labels, pixels, *, left=False):
    """Rows of official ids as ours, padded on one side.

    Their VoCo tokens stand one by one, ours are one placeholder. `labels` may be None; pixels are [B, 3, H, W].
    """
    labels = np.full_like(ids, -100) if labels is None else labels
    rows = []
    for row, real, label in zip(ids, mask, labels, strict=True):
        first = row != OFFICIAL_VOCO
        first[1:] |= row[:-1] != OFFICIAL_VOCO
        keep = real & first
        ours = np.where(row == -200, IMAGE_ID, np.where(row == OFFICIAL_VOCO, VOCO_ID, row))
        rows.append((ours[keep], label[keep] != -100))
    length = max(len(row) for row, _ in rows)

    def pad(values):
        missing = length - len(values)
        return np.pad(values, (missing, 0) if left else (0, missing))

    padded = np.stack([pad(row) for row, _ in rows]).astype(np.int32)
    return {
        "images": np.transpose(pixels, (0, 2, 3, 1))[:, None],
        "ids": padded,
        "thread": np.zeros_like(padded),
        "sample": np.stack([pad(np.ones(len(row), np.int32)) for row, _ in rows]),
        "supervised": np.stack([pad(supervised) for _, supervised in rows]),
    }


@functools.partial(jax.jit, static_argnames=("cfg", "method"))
def score(cfg, params, rows, method):
    """Embeddings, layout, visual tokens, hidden states behind the last norm, logits and the loss of whole rows."""
    out = vlm.forward(cfg, params, rows, method)
    flat = out.visual.tokens_BMD.reshape(rows["ids"].shape[0], -1, cfg.llm.width)
    read_BQ, label_BQ, valid_BQ = losses.targets(out.layout, rows["ids"].shape[1])

    def head(hidden):
        return llm.logits(cfg, params["llm"], hidden)

    picked = losses.pick(out.hidden_BTD, read_BQ)
    sums = losses.token_losses(picked, label_BQ, valid_BQ, head, chunk=5)
    norm = layers.apply(layers.RMSNorm(cfg.llm.norm_eps), params["llm"]["norm"], out.hidden_BTD)
    return {
        "x": vlm.splice(cfg, params, out.layout, flat),
        "slots": out.layout,
        "projected": out.visual.tokens_BMD,
        "hidden": norm,
        "logits": head(out.hidden_BTD),
        "loss": sums["ce"] / sums["count"],
    }


@functools.partial(jax.jit, static_argnames=("cfg", "method"))
def answer(cfg, params, rows, method):
    """The logits behind every prompt, and its greedy continuation."""
    prompt = generate.prefill(cfg, params, rows, method, max_new=NEW)
    blocks = stack.unstack(params["llm"]["layers"])
    table = jnp.asarray(TABLES[method.voco_mask])
    # Id -1 ends no row: the official run went on to its eighth token.
    tokens, _ = generate.decode(cfg, params, blocks, prompt, max_new=NEW, eos_id=-1, table=table)
    return prompt.logits_BV, tokens


def check_logits(out, golden, *, every=1):
    """Logits at real slots (of which the file holds every n-th) and the loss."""
    real = golden["merged_attention_mask"]
    np.testing.assert_array_equal(out["slots"].stream.kind != PAD, real)
    real = real[:, ::every, None]
    ours = np.where(real, out["logits"][:, ::every], 0)
    np.testing.assert_allclose(ours, np.where(real, golden["logits"], 0), atol=1e-4)
    np.testing.assert_allclose(out["loss"], golden["loss"], atol=1e-5)


def check_greedy(pixels, golden, method):
    """Row i is the prompt with the first i tokens of the official answer: eight different lengths in a batch."""
    told = golden["greedy_generated"]
    ids = np.tile(np.concatenate([golden["greedy_prompt_ids"], told]), (NEW, 1))
    real = np.arange(ids.shape[1]) < ids.shape[1] - NEW + np.arange(NEW)[:, None]
    rows = batch(ids, real, None, np.repeat(pixels[:1], NEW, axis=0))
    logits, tokens = answer(LLAVA, llava_params(), rows, method)
    np.testing.assert_allclose(logits, golden["greedy_step_logits"], atol=1e-4)
    for done in range(NEW):
        np.testing.assert_array_equal(tokens[done, : NEW - done], told[done:])
