"""One small model and the rows that the tests of the core share; what is compiled here is compiled once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tokzip_jax import generate, llm, stack, vlm
from tokzip_jax.config import LlmConfig, MethodConfig, ModelConfig, VitConfig
from tokzip_jax.paths import map_with_path
from tokzip_jax.types import IMAGE_ID, VOCO_ID

VIT = VitConfig(image_size=32, patch_size=8, width=16, layers=3, heads=2, mlp_dim=32)
LLM = LlmConfig(
    vocab_size=32, width=16, layers=3, heads=4, kv_heads=2, head_dim=4, mlp_dim=32, max_positions=128, rope_theta=100.0
)
MODEL = ModelConfig(vit=VIT, llm=LLM, voco_embeddings=8, contrast_dim=8)
# Eight VoCo slots, of which `voco_count` are used: every k from 0 to 8 is the same program.
METHOD = MethodConfig(voco=8, voco_mask="voco")
BOS, EOS = 1, 2
PICTURE = [BOS, IMAGE_ID, VOCO_ID]


@functools.cache
def params(seed=0):
    """Parameters drawn by NumPy (no compile), with attention that is far from flat: what should matter has to show."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path.endswith("scale"):
            return rng.uniform(0.5, 1.5, leaf.shape)
        sharp = 2.0 if "attn/q" in path or "attn/k" in path else 1.0
        # All matrices of this model have inputs of about its width.
        return sharp * rng.normal(size=leaf.shape) * (MODEL.llm.width**-0.5 if path.endswith("/w") else 0.5)

    shapes = jax.eval_shape(functools.partial(vlm.init, MODEL, "mlp2x_gelu"), jax.random.key(0))
    with jax.ensure_compile_time_eval():  # whoever asks first may be under jit
        return map_with_path(lambda path, leaf: jnp.asarray(draw(path, leaf), leaf.dtype), shapes)


def images(rows, count=1, seed=0):
    """[rows, count, 32, 32, 3] uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, (rows, count, 32, 32, 3)).astype(np.uint8)


def words(rng, count):
    """`count` text ids that are no special ones."""
    return rng.integers(3, LLM.vocab_size, count).tolist()


def batch(rows, length, *, left=False, count=1, seed=0):
    """A batch of rows, padded to `length` on either side.

    A row is a list of parts: ids, or (ids, {"thread": .., "sample": .., "supervised": ..}) for what is not the default
    (0, 1, False).
    """
    defaults = {"thread": 0, "sample": 1, "supervised": False}
    out = {"ids": np.zeros((len(rows), length), np.int32), "supervised": np.zeros((len(rows), length), bool)}
    out |= {name: np.zeros((len(rows), length), np.int32) for name in ("thread", "sample")}
    for number, row in enumerate(rows):
        parts = [part if isinstance(part, tuple) else (part, {}) for part in row]
        total = sum(len(ids) for ids, _ in parts)
        assert total <= length, f"row {number} holds {total} ids"
        at = length - total if left else 0
        for ids, marks in parts:
            place = slice(at, at + len(ids))
            out["ids"][number, place] = ids
            for name, value in (defaults | marks).items():
                out[name][number, place] = value
            at += len(ids)
    return {**out, "images": images(len(rows), count, seed)}


@functools.partial(jax.jit, static_argnames=("cfg", "method"))
def forward(params, batch, table, voco_count, *, cfg=MODEL, method=METHOD):
    """(logits of every slot, layout); the table and the VoCo count are arguments of one program."""
    out = vlm.forward(cfg, params, batch, method, table=table, voco_count=voco_count)
    return llm.logits(cfg, params["llm"], out.hidden_BTD), out.layout


def logits_of_text(logits, layout, row, **marks):
    """The logits [n, V] of a row's text slots, those with the given integers (thread=1, ...) only."""
    kind = np.asarray(layout.ids[row]) > 0
    for name, value in marks.items():
        kind &= np.asarray(getattr(layout.stream, name)[row]) == value
    return np.asarray(logits[row])[kind]


def close(found, expected, atol=2e-5):
    """Equal up to float32's rounding in another order of sums."""
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=atol, rtol=1e-5)


@functools.partial(jax.jit, static_argnames=("cfg", "method", "max_new", "temperature"))
def answer(params, batch, table, voco_count, eos_id, *, cfg=MODEL, method=METHOD, max_new=5, temperature=0.0, key=None):
    """One-pass prefill and decode: (tokens [B, max_new], how many [B])."""
    prompt = generate.prefill(cfg, params, batch, method, max_new=max_new, table=table, voco_count=voco_count)
    return continued(params, prompt, table, eos_id, cfg, max_new, temperature, key)


def continued(params, prompt, table, eos_id, cfg=MODEL, max_new=5, temperature=0.0, key=None):
    """Decode behind a prompt."""
    blocks = stack.unstack(params["llm"]["layers"])
    options = {"max_new": max_new, "eos_id": eos_id, "table": table, "temperature": temperature, "key": key}
    return generate.decode(cfg, params, blocks, prompt, **options)
