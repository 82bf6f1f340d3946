"""Layers stacked along a leading axis, and the ways to run a part of them.

A stack is stored as groups `{"0": ..., "1": ...}`, split where a config always cuts, because slicing a stack under jit
copies the weights. A run of layers that covers a group scans it as it is; one that covers a part of a group indexes
the full group by layer number inside the loop. For decoding, `unstack` makes a tuple of single layers once, since a
scan would copy each layer's weights at every step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tokzip_jax.types import Array, Params

Body = Callable[[Any, Params, Any], tuple[Any, Any]]

POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def sizes(groups: Params) -> list[int]:
    """How many layers each group holds."""
    return [jax.tree.leaves(groups[str(i)])[0].shape[0] for i in range(len(groups))]


def init(init_block: Callable[[Array], Params], key: Array, layers: int, cuts: Sequence[int] = ()) -> Params:
    """Stacked parameters of `layers` blocks, split before every layer number in `cuts`."""
    keys = jax.random.split(key, layers)
    edges = [0, *cuts, layers]
    return {str(i): jax.vmap(init_block)(keys[lo:hi]) for i, (lo, hi) in enumerate(zip(edges, edges[1:], strict=False))}


def join(groups: Params) -> Params:
    """One stack out of its groups."""
    parts = [groups[str(i)] for i in range(len(groups))]
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def split(stacked: Params, cuts: Sequence[int]) -> Params:
    """Groups out of one stack; the inverse of `join`."""
    layers = jax.tree.leaves(stacked)[0].shape[0]
    edges = [0, *cuts, layers]
    return {
        str(i): jax.tree.map(lambda leaf, lo=lo, hi=hi: leaf[lo:hi], stacked)
        for i, (lo, hi) in enumerate(zip(edges, edges[1:], strict=False))
    }


def unstack(groups: Params) -> tuple[Params, ...]:
    """A tuple with one parameter dict a layer, for loops that run the layers many times (decoding)."""
    stacked = join(groups)
    layers = jax.tree.leaves(stacked)[0].shape[0]
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(layers))


def run(
    body: Body,
    carry: Any,
    layers: Params | tuple[Params, ...],
    lo: int,
    hi: int,
    *,
    inputs: Any = None,
    remat: str = "none",
) -> tuple[Any, Any]:
    """Run layers lo .. hi-1 of a stack.

    Args:
        body: (carry, parameters of one layer, inputs of that layer) -> (carry, output).
        carry: what flows from layer to layer.
        layers: groups, or a tuple from `unstack` (then the loop is unrolled).
        lo, hi: static layer numbers.
        inputs: pytree with a leading layer axis of length hi - lo (for a tuple: a tuple of hi - lo pytrees), or None.
        remat: "none", "full" (save only the carry) or "dots" (save the results of weight products too).

    Returns:
        The carry, and the outputs stacked over the layers that ran (for a tuple: a tuple).
    """
    if remat != "none":
        body = jax.checkpoint(body, policy=POLICIES[remat], prevent_cse=False)
    if isinstance(layers, tuple):
        outputs = []
        for i in range(lo, hi):
            carry, output = body(carry, layers[i], None if inputs is None else inputs[i - lo])
            outputs.append(output)
        return carry, tuple(outputs)
    outputs, start = [], 0
    for i, count in enumerate(sizes(layers)):
        first, last = max(lo, start), min(hi, start + count)
        if first < last:
            part = jax.tree.map(lambda leaf, a=first - lo, b=last - lo: leaf[a:b], inputs)
            carry, output = _scan(body, carry, layers[str(i)], first - start, last - start, count, part)
            outputs.append(output)
        start += count
    if not outputs:
        return carry, None
    return carry, outputs[0] if len(outputs) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)


def _scan(body: Body, carry: Any, group: Params, lo: int, hi: int, count: int, inputs: Any) -> tuple[Any, Any]:
    if (lo, hi) == (0, count):
        return jax.lax.scan(lambda c, x: body(c, x[0], x[1]), carry, (group, inputs))

    def indexed(c: Any, x: tuple[Array, Any]) -> tuple[Any, Any]:
        layer = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, x[0], keepdims=False), group)
        return body(c, layer, x[1])

    return jax.lax.scan(indexed, carry, (jnp.arange(lo, hi), inputs))
