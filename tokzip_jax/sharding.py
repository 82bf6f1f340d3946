"""Where arrays live: a mesh of ("data", "model") devices and one table from parameter paths to partitions.

"data" splits the batch and, as FSDP, one large dimension of every matrix; "model" splits heads, the feed-forward width
and the vocabulary (tensor parallelism). Axes are Auto: XLA places everything between the constraints.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tokzip_jax.config import MeshConfig
from tokzip_jax.paths import first_match, map_with_path
from tokzip_jax.types import Array

AXES = ("data", "model")
# Where a parameter's path starts inside a larger state.
ROOTS = ("vit", "projector", "llm", "voco", "contrast", "lora", "image_newline")

# First full match wins. A row gives the mesh axis of every dimension; () = replicated. Stacked parameters have a layer
# axis in front, which is never split: the scan over layers would gather it again at every step.
# (A Q-Former's stack is one of groups of layers, the first of which reads the picture.)
_STACK = r"(vit|llm|projector/[^/]+)/layers/\d+/(\d+/)?"
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(.*/)?(pre_|post_)?norm\d?/(scale|bias)", ()),
    (_STACK + r"(attn|cross)/[qkv]/w", (None, "data", "model", None)),
    (_STACK + r"(attn|cross)/[qkv]/b", (None, "model", None)),
    (_STACK + r"(attn|cross)/o/w", (None, "model", None, "data")),
    (_STACK + r"(attn|cross)/o/b", ()),
    (_STACK + r"(text_)?mlp/(up|gate)/w", (None, "data", "model")),
    (_STACK + r"(text_)?mlp/(up|gate)/b", (None, "model")),
    (_STACK + r"(text_)?mlp/down/w", (None, "model", "data")),
    (_STACK + r"(text_)?mlp/down/b", ()),
    (r"vit/patch/kernel", (None, None, None, "data")),
    (r"vit/cls", ()),
    (r"vit/pos", (None, "data")),
    (r"projector/[^/]+/fc1/w", ("data", "model")),
    (r"projector/[^/]+/fc1/b", ("model",)),
    (r"projector/[^/]+/fc2/w", ("model", "data")),
    (r"projector/[^/]+/fc2/b", ()),
    (r"projector/[^/]+/fc/w", ("data", "model")),
    (r"projector/[^/]+/fc/b", ("model",)),
    (r"projector/[^/]+/(query|positions)/table", (None, "data")),
    (r"projector/[^/]+/words/table", ("model", "data")),
    (r"projector/[^/]+/attn/[qkv]/w", ("data", "model", None)),
    (r"projector/[^/]+/attn/[qkv]/b", ("model", None)),
    (r"projector/[^/]+/attn/o/w", ("model", None, "data")),
    (r"projector/[^/]+/attn/o/b", ()),
    (r"projector/[^/]+/(read|key|value)/w", ("data", "model")),
    (r"projector/[^/]+/(read|key|value)/b", ("model",)),
    (r"projector/[^/]+/(peg|block\d/depthwise)/kernel", (None, None, "data")),
    (r"projector/[^/]+/peg/b", ()),
    (r"projector/[^/]+/block\d/(squeeze|excite|point)/w", ("data", "model")),
    (r"projector/[^/]+/block\d/(squeeze|excite)/b", ("model",)),
    (r"llm/embed/table", ("model", "data")),
    (r"llm/head/w", ("data", "model")),
    (r"voco/table", (None, "data")),
    (r"voco/cells/w", (None, "data", "model")),
    (r"image_newline", ()),
    (r"contrast/(image|text)/w", ("data", None)),
    (r"contrast/scale", ()),
    # The factors of a delta: A is split like its matrix's inputs, B like its outputs, the rank never.
    (r"lora/" + _STACK + r"attn/[qkv]/a", (None, "data", None)),
    (r"lora/" + _STACK + r"attn/[qkv]/b", (None, None, "model", None)),
    (r"lora/" + _STACK + r"attn/o/a", (None, "model", None, None)),
    (r"lora/" + _STACK + r"attn/o/b", (None, None, "data")),
    (r"lora/" + _STACK + r"mlp/(up|gate)/a", (None, "data", None)),
    (r"lora/" + _STACK + r"mlp/(up|gate)/b", (None, None, "model")),
    (r"lora/" + _STACK + r"mlp/down/a", (None, "model", None)),
    (r"lora/" + _STACK + r"mlp/down/b", (None, None, "data")),
    (r"lora/projector/[^/]+/fc1?/a", ("data", None)),
    (r"lora/projector/[^/]+/fc1?/b", (None, "model")),
    (r"lora/projector/[^/]+/fc2/a", ("model", None)),
    (r"lora/projector/[^/]+/fc2/b", (None, "data")),
)


def initialize_distributed() -> None:
    """Join the other hosts of a cluster (Cloud TPU, Slurm, Kubernetes, Open MPI); does nothing on a single machine.

    Call it before anything else touches JAX. A cluster that JAX does not detect is described by the environment
    variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    if jax.distributed.is_initialized():
        return
    named = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    given = {name: int(value) for name, key in named.items() if (value := os.environ.get(key))}
    try:
        jax.distributed.initialize(**given)
    except ValueError as error:
        # JAX has no public question "is this a cluster?"; without an address there is none.
        if "coordinator_address" not in str(error):
            raise


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A ("data", "model") mesh over all devices.

    Args:
        cfg: sizes of the axes; -1 = the devices that are left (at most one of them).
        devices: default `jax.devices()`.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    data, model, count = cfg.data, cfg.model, len(devices)
    if -1 in (data, model):
        fixed = model if data == -1 else data
        if fixed < 1 or count % fixed:
            axis = "model" if data == -1 else "data"
            raise ValueError(f"mesh.{axis} = {fixed} must divide the number of devices, {count}")
        data, model = (count // fixed, model) if data == -1 else (data, count // fixed)
    if data < 1 or model < 1 or data * model != count:
        raise ValueError(f"mesh.data x mesh.model = {data} x {model} must be the number of devices, {count}")
    return jax.make_mesh((data, model), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def check_batch(mesh: Mesh, rows: int, key: str) -> None:
    """Refuse a batch that the data axis cannot split evenly; `key` names it, e.g. "stages.base.batch_size".

    Raises:
        ValueError: `rows` is no multiple of the data axis.
    """
    data = mesh.shape["data"]
    if rows % data:
        raise ValueError(f"{key} = {rows} rows must be a multiple of the mesh's data axis, {data}")


@functools.cache
def _say_once(message: str) -> None:
    logging.warning(message)


def spec_for(mesh: Mesh, path: str, shape: Sequence[int]) -> P:
    """The partition of one parameter.

    A dimension that its mesh axis does not divide stays whole on every device, which is logged once.

    Raises:
        ValueError: no rule covers the path, or the rule is for another number of dimensions.
    """
    axes = first_match(RULES, path, name="sharding")
    if axes and len(axes) != len(shape):
        raise ValueError(f"the sharding rule {axes} of {path!r} does not fit its shape {tuple(shape)}")
    spec = []
    for index, axis in enumerate(axes):
        if axis and shape[index] % mesh.shape[axis]:
            _say_once(
                f"{path}: dimension {index} of {tuple(shape)} does not divide by the {mesh.shape[axis]} devices of "
                f"mesh axis {axis!r}; it is replicated there"
            )
            axis = None
        spec.append(axis)
    return P(*spec)


def param_shardings(mesh: Mesh, abstract: Any) -> Any:
    """A `NamedSharding` for every parameter of a tree of arrays or `ShapeDtypeStruct`s; errors as in `spec_for`."""
    return map_with_path(lambda path, leaf: NamedSharding(mesh, spec_for(mesh, path, leaf.shape)), abstract)


def state_shardings(mesh: Mesh, abstract: Any) -> Any:
    """A `NamedSharding` for every leaf of a training state.

    What sits under a parameter's path (the parameter, its Adam moments, its accumulated gradient) is split like the
    parameter; everything else (counts, keys) is replicated. `jit(tx.init)` alone would leave the moments replicated.
    """

    def sharding(path: str, leaf: Any) -> NamedSharding:
        words = path.split("/")
        start = next((i for i, word in enumerate(words) if word in ROOTS), None)
        spec = P() if start is None else spec_for(mesh, "/".join(words[start:]), leaf.shape)
        return NamedSharding(mesh, spec)

    return map_with_path(sharding, abstract)


def abstract_like(mesh: Mesh, abstract: Any) -> Any:
    """`ShapeDtypeStruct`s with the shardings of `state_shardings`: what a checkpoint is restored into."""
    shardings = state_shardings(mesh, abstract)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), abstract, shardings
    )


def constrain(x: Array, *axes: str | None) -> Array:
    """Pin the layout of an activation at a block border, one mesh axis (or None) a dimension.

    Without a mesh in context (`jax.set_mesh`) it returns `x`. An axis that does not divide its dimension (one
    picture on eight devices) is left to XLA.

    Raises:
        ValueError: more or fewer axes than dimensions.
    """
    if len(axes) != x.ndim:
        raise ValueError(f"constrain got {len(axes)} axes for an array of shape {x.shape}")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    fit = (
        axis if axis is None or size % mesh.shape[axis] == 0 else P.UNCONSTRAINED
        for axis, size in zip(axes, x.shape, strict=True)
    )
    return jax.lax.with_sharding_constraint(x, P(*fit))


def data_share(mesh: Mesh) -> tuple[int, int]:
    """Which share of every batch this process reads, and how many shares there are.

    Processes whose devices stand at the same places of the data axis (the model axis runs across them) need the same
    rows, so they are given the same share.

    Raises:
        ValueError: the mesh cuts processes into unequal shares.
    """
    places: dict[int, list[int]] = {}
    for place, devices in enumerate(mesh.devices.reshape(mesh.shape["data"], -1)):
        for process in {device.process_index for device in devices}:
            places.setdefault(process, []).append(place)
    shares = sorted(set(map(tuple, places.values())))
    if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) != mesh.shape["data"]:
        raise ValueError(
            f"mesh.data = {mesh.shape['data']} cannot be dealt out to {len(places)} processes in equal shares; choose "
            "mesh.data and mesh.model so that one of them is a multiple or a divisor of the devices of a process"
        )
    return shares.index(tuple(places[jax.process_index()])), len(shares)


def shard_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, Array]:
    """This process's share of a batch as global arrays, split over the data axis.

    Args:
        mesh: the mesh.
        batch: arrays [rows of this process, ...], see `data_share`.

    Raises:
        ValueError: the rows of all shares do not divide by the data axis.
    """
    _, shares = data_share(mesh)
    where, arrays = NamedSharding(mesh, P("data")), {}
    for name, rows in batch.items():
        total = rows.shape[0] * shares
        check_batch(mesh, total, f"batch[{name!r}]")
        arrays[name] = jax.make_array_from_process_local_data(where, rows, (total, *rows.shape[1:]))
    return arrays


def place(mesh: Mesh, tree: Any, *axes: str | None) -> Any:
    """Host arrays that are the same in every process as global arrays, split over `axes` (none: replicated)."""
    where = NamedSharding(mesh, P(*axes))
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(where, leaf, leaf.shape), tree)


def wait_for_all(name: str) -> None:
    """Wait until every process has come here, e.g. to a file that one of them writes; `name` says what for."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def sharded_init(init: Callable[[Array], Any], mesh: Mesh, key: Array) -> Any:
    """Run an initialiser so that every device only ever makes its own part.

    Args:
        init: key -> parameters or a whole training state.
        mesh: the mesh.
        key: PRNG key.

    Returns:
        The tree of `init`, placed as `state_shardings` says, with the values of `init(key)`.
    """
    shardings = state_shardings(mesh, jax.eval_shape(init, key))
    return jax.jit(init, out_shardings=shardings)(key)


def replicated(mesh: Mesh, tree: Any) -> Any:
    """The same arrays whole on every device, so that each process can read them."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(tree)
