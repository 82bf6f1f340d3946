"""The pieces with weights that both towers are made of; the only place that calls `self.param`.

Flax Linen inside a block, plain JAX around it: parameters are nested dicts of arrays at their full logical shape
(heads are axes of their own, so that sharding can name them), weights are stored [in, out].
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokzip_jax.types import Array, Params

# What `Attention` is given to mix tokens with: (q, k, v) head-major -> (mixed [B, N, T, H], anything).
Mix = Callable[[Array, Array, Array], tuple[Array, Any]]
# What `lora.attach` puts among the parameters: the factors beside a weight, the gate into a block.
ATTACHED = ("lora_a", "lora_b", "lora_kinds")


class Linear(nn.Module):
    """The last `fan_in` axes of x times the first `fan_in` axes of a weight, with an optional bias over the others.

    Not `einsum`: it contracts (N, H) as (H, N) and for some orders of the output swaps its operands, and then XLA
    transposes the weight at every call. On a CPU that was a third of the time of a pass over 64 tokens.

    Parameters that hold a low-rank delta (`lora.attach`) add it, to the rows that the gate lets through. The others are
    selected from the product without it, so that they are the undisturbed layer's bit for bit.
    """

    shape: tuple[int, ...]
    fan_in: int = 1
    bias: bool = False
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, gate: Array | None = None) -> Array:
        """[..., *shape[:fan_in]] -> [..., *shape[fan_in:]], in x's dtype; `gate` is bool [...], None = all rows."""
        inputs = tuple(range(self.fan_in))
        outputs = tuple(range(self.fan_in, len(self.shape)))
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=inputs, out_axis=outputs)
        y = jnp.tensordot(x, self.param("w", init, self.shape, self.param_dtype).astype(x.dtype), self.fan_in)
        if self.has_variable("params", "lora_a"):
            a, b = (self.get_variable("params", name).astype(x.dtype) for name in ("lora_a", "lora_b"))
            changed = y + jnp.tensordot(jnp.tensordot(x, a, self.fan_in), b, 1)
            outer = x.shape[: x.ndim - self.fan_in]
            y = changed if gate is None else jnp.where(gate.reshape(outer + (1,) * len(outputs)), changed, y)
        if self.bias:
            b = self.param("b", nn.initializers.zeros, self.shape[self.fan_in :], self.param_dtype).astype(x.dtype)
            y = y + b.reshape((1,) * (x.ndim - self.fan_in) + b.shape)
        return y


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis; statistics in float32."""

    eps: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (_along_last(scale, x) * wide + _along_last(bias, x)).astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis (arXiv 1910.07467); statistics in float32."""

    eps: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (_along_last(scale, x) * wide).astype(x.dtype)


def _along_last(vector: Array, x: Array) -> Array:
    return vector.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))


class Attention(nn.Module):
    """Projections around whatever `mix` does with the heads."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: Array, mix: Mix, gate_BT: Array | None = None) -> tuple[Array, Any]:
        """[B, T, D] -> ([B, T, D], what `mix` returned beside the mixed heads); the gate is that of `Linear`."""

        def project(name: str, heads: int) -> Array:
            shape = (self.width, heads, self.head_dim)
            x_BTNH = Linear(shape, bias=self.bias, param_dtype=self.param_dtype, name=name)(x_BTD, gate_BT)
            return x_BTNH.swapaxes(1, 2)

        mixed, aux = mix(project("q", self.heads), project("k", self.kv_heads), project("v", self.kv_heads))
        shape = (self.heads, self.head_dim, self.width)
        out = Linear(shape, fan_in=2, bias=self.bias, param_dtype=self.param_dtype, name="o")
        return out(mixed.swapaxes(1, 2), gate_BT), aux


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """The exact (erf) GELU."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


class Mlp(nn.Module):
    """Two linear layers with biases and an activation between them."""

    width: int
    hidden: int
    activation: str
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        """[B, T, D] -> [B, T, D]."""

        def dense(name: str, shape: tuple[int, int]) -> Linear:
            return Linear(shape, bias=True, param_dtype=self.param_dtype, name=name)

        hidden_BTF = ACTIVATIONS[self.activation](dense("up", (self.width, self.hidden))(x_BTD))
        return dense("down", (self.hidden, self.width))(hidden_BTF)


class SwiGlu(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases (arXiv 2002.05202)."""

    width: int
    hidden: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: Array, gate_BT: Array | None = None) -> Array:
        """[B, T, D] -> [B, T, D]; `gate_BT` is that of `Linear`."""

        def dense(name: str, shape: tuple[int, int], x: Array) -> Array:
            return Linear(shape, param_dtype=self.param_dtype, name=name)(x, gate_BT)

        gate_BTF = dense("gate", (self.width, self.hidden), x_BTD)
        up_BTF = dense("up", (self.width, self.hidden), x_BTD)
        return dense("down", (self.hidden, self.width), jax.nn.silu(gate_BTF) * up_BTF)


def init(module: nn.Module, key: Array, *args: Any) -> Params:
    """The parameters of a module as a plain dict."""
    return module.init(key, *args)["params"]


def apply(module: nn.Module, params: Params, *args: Any) -> Any:
    """Run a module on a plain dict of parameters."""
    return module.apply({"params": params}, *args)


def delta_gate(block: Params, kind_BT: Array) -> Array | None:
    """Which tokens the low-rank deltas of a block reach, [B, T] bool; None = all of them, or there are none."""
    return block["lora_kinds"][kind_BT] if "lora_kinds" in block else None


def without_deltas(params: Any) -> Any:
    """Parameters (a model's, a stack's, a block's) as they are with no low-rank delta attached; nothing is copied."""
    if isinstance(params, tuple):
        return tuple(without_deltas(block) for block in params)
    if not isinstance(params, dict):
        return params
    return {name: without_deltas(part) for name, part in params.items() if name not in ATTACHED}


def rope_angles(position_BT: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosine and sine of the rotary angles, [B, T, H/2] float32 (arXiv 2104.09864)."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = position_BT[..., None].astype(jnp.float32) * frequency[None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BNTH: Array, angles: tuple[Array, Array]) -> Array:
    """Rotate heads by their angles, in float32; half-split pairing (i, i + H/2) as in LLaMA's Hugging Face form."""
    cos, sin = (part[:, None] for part in angles)
    first, second = jnp.split(x_BNTH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BNTH.dtype)
