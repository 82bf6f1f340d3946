"""LoRA (arXiv 2106.09685): low-rank deltas beside frozen matrices, for every token or for some kinds of tokens.

A matrix W of the model is read as W + alpha/rank * A B with A [in, rank] and B [rank, out]. The factors lie in the tree
of parameters under a root of their own,

    llm/layers/0/attn/q/w            [L, D, N, H]
    lora/llm/layers/0/attn/q/a       [L, D, rank]
    lora/llm/layers/0/attn/q/b       [L, rank, N, H]

so that `train=("lora/.*",)` freezes everything else and sharding, decay and checkpoints are path patterns as ever. They
are float32 whatever `param_dtype` is. Nothing reads that root by itself: `attach` puts the factors beside their
weights, where `layers.Linear` finds them, and a model without them is the program that it was before.

Where `kinds` is set, deltas reach the tokens of those kinds only. Every other row is selected from the product with W
alone: as long as it sees no row that a delta changed it is the base model's bit for bit, operation by operation, and
in one compiled program whatever the deltas are. (A program compiled without any may fuse, and so round, otherwise: 1e-6
in float32 on a CPU.) Gated to VoCo and text tokens, the picture is read by the base model, and the same parameters
without deltas (`split`, `layers.without_deltas`) are a frozen teacher that costs no weights.

    python train.py --config=... --config.stages.voco.lora.rank=8 --config.stages.voco.lora.kinds="('voco','text')" \
        --config.stages.voco.train="('lora/.*','voco/.*')"

Of what LoRA implementations offer, dropout on the input of A and deltas of embedding tables are not here.
"""

import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokzip_jax import checkpoint
from tokzip_jax.config import LoraConfig
from tokzip_jax.paths import first_match, flatten, nest
from tokzip_jax.types import KINDS, Array, Params

INITS = ("official", "paper")
# Matrices that can have a delta (those that `layers.Linear` reads): their leading layer axes, and their input axes.
MATRICES: tuple[tuple[str, tuple[int, int]], ...] = (
    (r"(vit|llm)/layers/\d+/(attn/[qkv]|mlp/(gate|up|down))/w", (1, 1)),
    (r"(vit|llm)/layers/\d+/attn/o/w", (1, 2)),
    (r"projector/[^/]+/fc\d?/w", (0, 1)),
)
# The kinds of an ordinary row; a delta that reaches them all is one of the weight.
ORDINARY = frozenset({"prefix", "vision", "voco", "text"})


def check_config(key: str, cfg: LoraConfig) -> None:
    """Refuse what is wrong whatever the model is.

    Args:
        key: the dotted place in the config, for the message.
        cfg: the deltas.

    Raises:
        ValueError: one sentence with the key, its value and what is valid.
    """
    if cfg.rank < 0:
        raise ValueError(f"{key}.rank = {cfg.rank} must be >= 0 (0 = no deltas)")
    if not 0 < cfg.alpha < math.inf:
        raise ValueError(f"{key}.alpha = {cfg.alpha} must be above 0 and finite")
    if cfg.init not in INITS:
        raise ValueError(f"{key}.init = {cfg.init!r} is unknown; choose one of {', '.join(map(repr, INITS))}")
    if cfg.rank and not cfg.paths:
        raise ValueError(f"{key}.paths is empty; name at least one pattern of matrices, or set {key}.rank = 0")
    for kind in cfg.kinds:
        if kind not in KINDS[1:]:
            raise ValueError(f"{key}.kinds holds {kind!r}; choose of {', '.join(KINDS[1:])}, or () for all")
    for pattern in cfg.paths:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{key}.paths: {pattern!r} is no regular expression ({error})") from None


def matrices(cfg: LoraConfig, params: Params) -> dict[str, Any]:
    """The matrices that get a delta: {path: leaf}; {} for rank 0.

    Args:
        cfg: the deltas.
        params: the model's parameters or their `ShapeDtypeStruct`s.

    Raises:
        ValueError: a pattern without a matrix, a gate on what has no token kinds, or a rank above a matrix's.
    """
    if not cfg.rank:
        return {}
    flat = flatten(split(params)[0])
    possible = {path: leaf for path, leaf in flat.items() if any(re.fullmatch(p, path) for p, _ in MATRICES)}
    found = {}
    for pattern in cfg.paths:
        matched = {path: leaf for path, leaf in possible.items() if re.fullmatch(pattern, path)}
        if not matched:
            raise ValueError(
                f"lora.paths: pattern {pattern!r} matches no matrix that can have a delta; a pattern has to match a "
                f"whole path such as {next(p for p in possible if p.startswith('llm/'))!r}"
            )
        found |= matched
    for path, leaf in found.items():
        if cfg.kinds and not path.startswith("llm/"):
            raise ValueError(
                f"lora.kinds = {cfg.kinds} cannot hold for {path!r}, where there are patches and no kinds of tokens: "
                "name matrices of llm/ only, or set lora.kinds = ()"
            )
        lead, fan_in = first_match(MATRICES, path, name="LoRA")
        most = min(math.prod(leaf.shape[lead : lead + fan_in]), math.prod(leaf.shape[lead + fan_in :]))
        if cfg.rank > most:
            raise ValueError(f"lora.rank = {cfg.rank} must be at most {most}, the rank of {path!r} of {leaf.shape}")
    return found


def init(cfg: LoraConfig, params: Params, key: Array) -> Params:
    """Fresh factors, B zero, so that the model starts unchanged; errors as in `matrices`.

    A is drawn for its path, whichever other matrices are chosen. `init="official"`: uniform on +-1/sqrt(in), which is
    the Kaiming initialisation of the released code (microsoft/LoRA). `init="paper"`: Gaussian (section 4.1, which names
    no deviation), of deviation 1/rank as in PEFT.

    Args:
        cfg: the deltas.
        params: the model's parameters or their `ShapeDtypeStruct`s.
        key: PRNG key.

    Returns:
        What stands under "lora/".
    """
    fresh = {}
    for path, leaf in matrices(cfg, params).items():
        lead, fan_in = first_match(MATRICES, path, name="LoRA")
        layers, inputs, outputs = leaf.shape[:lead], leaf.shape[lead : lead + fan_in], leaf.shape[lead + fan_in :]
        drawn, shape = jax.random.fold_in(key, zlib.crc32(path.encode())), (*layers, *inputs, cfg.rank)
        if cfg.init == "official":
            bound = math.prod(inputs) ** -0.5
            a = jax.random.uniform(drawn, shape, jnp.float32, -bound, bound)
        else:
            a = jax.random.normal(drawn, shape, jnp.float32) / cfg.rank
        stem = path.removesuffix("/w")
        fresh |= {f"{stem}/a": a, f"{stem}/b": jnp.zeros((*layers, cfg.rank, *outputs), jnp.float32)}
    return nest(fresh)


def add(cfg: LoraConfig, params: Params, key: Array) -> Params:
    """Parameters with fresh factors under "lora"; for rank 0 as they are."""
    return {**params, "lora": init(cfg, params, key)} if cfg.rank else params


def split(params: Params) -> tuple[Params, Params]:
    """The base model, and what stands under "lora" ({} if there is nothing)."""
    return {name: part for name, part in params.items() if name != "lora"}, params.get("lora", {})


def attach(params: Params, cfg: LoraConfig) -> Params:
    """Parameters as the model runs them: every factor beside its weight, alpha / rank in B, and the gate in the blocks.

    Everything that takes a model's parameters (`vlm.forward`, `generate`, `voco`, `step.score_step`) takes these.
    Parameters without factors come back as they are. Nothing is copied; gradients go through it.

    Raises:
        ValueError: factors of another rank than the config's.
    """
    base, deltas = split(params)
    if not deltas:
        return params
    _check_rank(deltas, cfg)
    flat = flatten(base)
    for path, leaf in flatten(deltas).items():
        stem, name = path.rsplit("/", 1)
        flat[f"{stem}/lora_{name}"] = leaf * (cfg.alpha / cfg.rank) if name == "b" else leaf
    if cfg.kinds:
        gate = np.isin(np.array(KINDS), cfg.kinds)
        for group, block in base["llm"]["layers"].items():
            layers = jax.tree.leaves(block)[0].shape[0]
            flat[f"llm/layers/{group}/lora_kinds"] = jnp.broadcast_to(gate, (layers, len(KINDS)))
    return nest(flat)


def _check_rank(deltas: Params, cfg: LoraConfig) -> None:
    for path, leaf in flatten(deltas).items():
        if path.endswith("/a") and leaf.shape[-1] != cfg.rank:
            raise ValueError(
                f"lora.rank = {cfg.rank}, but the parameters hold lora/{path} of rank {leaf.shape[-1]}: give the "
                "LoraConfig that they were made with"
            )


def _shift(base: Params, deltas: Params, cfg: LoraConfig, sign: float) -> Params:
    """W + sign * alpha/rank * A B for every matrix with factors, in float32 and back to W's dtype."""
    _check_rank(deltas, cfg)
    closed = ORDINARY - set(cfg.kinds)
    if cfg.kinds and closed:
        raise ValueError(
            f"lora.kinds = {cfg.kinds} cannot be merged: the weights would change for "
            f"{', '.join(sorted(closed))} tokens too; save the parameters with their deltas instead"
        )
    flat, factors = flatten(base), flatten(deltas)
    for path in (p.removesuffix("/a") for p in factors if p.endswith("/a")):
        w = flat[f"{path}/w"]
        lead, _ = first_match(MATRICES, f"{path}/w", name="LoRA")

        def product(a: Array, b: Array) -> Array:
            return jnp.tensordot(a, b, 1, precision="highest")

        for _ in range(lead):
            product = jax.vmap(product)
        delta = product(factors[f"{path}/a"], factors[f"{path}/b"])
        flat[f"{path}/w"] = (w.astype(jnp.float32) + sign * cfg.alpha / cfg.rank * delta).astype(w.dtype)
    return nest(flat)


def merge(params: Params, cfg: LoraConfig) -> Params:
    """The deltas added into the weights: parameters of the plain model, of the same shapes and dtypes.

    Raises:
        ValueError: deltas that reach some kinds of tokens only, which no weight can say; or of another rank.
    """
    base, deltas = split(params)
    return _shift(base, deltas, cfg, 1.0) if deltas else base


def unmerge(merged: Params, deltas: Params, cfg: LoraConfig) -> Params:
    """The inverse of `merge`, up to rounding; `deltas` is the second part of `split`."""
    return {**_shift(merged, deltas, cfg, -1.0), "lora": deltas}


def export(path: str, params: Params, cfg: LoraConfig, *, info: Mapping[str, Any] | None = None) -> None:
    """Write merged parameters, which any `init_from`, `eval.py --checkpoint` or `checkpoint.load_params` reads.

    Args:
        path: where they go; what stood there is replaced.
        params: with factors, e.g. `load_params(workdir.checkpoints(stage), recipe.shapes(run, projector, cfg))`.
        cfg: the stage's `lora`.
        info: JSON kept with them.

    Raises:
        ValueError: as in `merge`.
    """
    checkpoint.save_params(path, merge(params, cfg), info=info)
