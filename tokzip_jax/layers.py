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


class Einsum(nn.Module):
    """`einsum(equation, x, w)` with an optional bias over the weight's output axes.

    `fan_in` axes of `shape` are the ones contracted with x; they come first and set the initial scale.
    """

    equation: str
    shape: tuple[int, ...]
    fan_in: int = 1
    bias: bool = False
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Apply to x in x's dtype."""
        inputs = tuple(range(self.fan_in))
        outputs = tuple(range(self.fan_in, len(self.shape)))
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=inputs, out_axis=outputs)
        y = jnp.einsum(self.equation, x, self.param("w", init, self.shape, self.param_dtype).astype(x.dtype))
        if self.bias:
            b = self.param("b", nn.initializers.zeros, self.shape[self.fan_in :], self.param_dtype).astype(x.dtype)
            # A head-major output [B, N, T, H] has its length between the bias's axes.
            b = b[:, None] if "NT" in self.equation.split("->")[1] else b
            y = y + b.reshape((1,) * (y.ndim - b.ndim) + b.shape)
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
    def __call__(self, x_BTD: Array, mix: Mix) -> tuple[Array, Any]:
        """[B, T, D] -> ([B, T, D], what `mix` returned beside the mixed heads)."""

        def project(name: str, heads: int) -> Array:
            shape = (self.width, heads, self.head_dim)
            return Einsum("BTD,DNH->BNTH", shape, bias=self.bias, param_dtype=self.param_dtype, name=name)(x_BTD)

        mixed, aux = mix(project("q", self.heads), project("k", self.kv_heads), project("v", self.kv_heads))
        shape = (self.heads, self.head_dim, self.width)
        out = Einsum("BNTH,NHD->BTD", shape, fan_in=2, bias=self.bias, param_dtype=self.param_dtype, name="o")(mixed)
        return out, aux


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

        def dense(name: str, shape: tuple[int, int], equation: str) -> Einsum:
            return Einsum(equation, shape, bias=True, param_dtype=self.param_dtype, name=name)

        hidden = ACTIVATIONS[self.activation](dense("up", (self.width, self.hidden), "BTD,DF->BTF")(x_BTD))
        return dense("down", (self.hidden, self.width), "BTF,FD->BTD")(hidden)


class SwiGlu(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases (arXiv 2002.05202)."""

    width: int
    hidden: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        """[B, T, D] -> [B, T, D]."""

        def dense(name: str, shape: tuple[int, int], equation: str) -> Einsum:
            return Einsum(equation, shape, param_dtype=self.param_dtype, name=name)

        gate = dense("gate", (self.width, self.hidden), "BTD,DF->BTF")(x_BTD)
        up = dense("up", (self.width, self.hidden), "BTD,DF->BTF")(x_BTD)
        return dense("down", (self.hidden, self.width), "BTF,FD->BTD")(jax.nn.silu(gate) * up)


def init(module: nn.Module, key: Array, *args: Any) -> Params:
    """The parameters of a module as a plain dict."""
    return module.init(key, *args)["params"]


def apply(module: nn.Module, params: Params, *args: Any) -> Any:
    """Run a module on a plain dict of parameters."""
    return module.apply({"params": params}, *args)


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
