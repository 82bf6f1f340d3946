"""Sharding: every parameter has a rule, moments follow, init is sharded and equal, what cannot work is said."""

import functools
import math
import os
import socket
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from jax.sharding import PartitionSpec as P

from tokzip_jax import optim, sharding, vlm
from tokzip_jax.config import LlmConfig, MeshConfig, ModelConfig, OptimConfig, VitConfig
from tokzip_jax.paths import flatten
from tokzip_jax.step import nest

VIT = VitConfig(image_size=16, patch_size=8, width=16, layers=3, heads=4, mlp_dim=32)
LLM = LlmConfig(vocab_size=64, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp_dim=32)
MODEL = ModelConfig(vit=VIT, llm=LLM, contrast_dim=8, voco_cells=2)


def init_params(key):
    """A few parameters of the real tree; all of it would compile for ten seconds a mesh."""
    shapes = {
        "llm/layers/0/attn/q/w": (2, 16, 4, 4),
        "llm/layers/0/mlp/up/w": (2, 16, 32),
        "llm/layers/0/norm1/scale": (2, 16),
        "llm/embed/table": (64, 16),
        "vit/layers/0/attn/q/b": (2, 4, 4),
        "voco/table": (1, 16),
    }
    start = jax.random.uniform(key)
    return nest({path: start + jnp.arange(math.prod(s), dtype=jnp.float32).reshape(s) for path, s in shapes.items()})


def init_state(key):
    params = init_params(key)
    tx = optim.make_optimizer(OptimConfig(), 0.0, params, ("llm/.*", "voco/.*"))
    return {"params": params, "opt_state": tx.init(params), "step": jnp.int32(0)}


@functools.cache
def mesh_of(data, model):
    return sharding.make_mesh(MeshConfig(data=data, model=model))


def test_rules_by_hand():
    mesh = mesh_of(4, 2)
    shapes = flatten(jax.eval_shape(functools.partial(vlm.init, MODEL, "mlp2x_gelu"), jax.random.key(0)))
    found = {path: sharding.spec_for(mesh, path, leaf.shape) for path, leaf in shapes.items()}
    assert found["vit/layers/0/attn/q/w"] == P(None, "data", "model", None)
    assert found["vit/layers/1/attn/o/w"] == P(None, "model", None, "data")
    assert found["llm/layers/0/attn/k/w"] == P(None, "data", "model", None)
    assert found["llm/layers/0/mlp/gate/w"] == P(None, "data", "model")
    assert found["llm/layers/0/mlp/down/w"] == P(None, "model", "data")
    assert found["llm/layers/0/norm1/scale"] == found["vit/post_norm/bias"] == found["contrast/scale"] == P()
    assert found["llm/embed/table"] == P("model", "data")
    assert found["llm/head/w"] == P("data", "model")
    assert found["voco/cells/w"] == P(None, "data", "model")
    assert found["vit/patch/kernel"] == P(None, None, None, "data")
    for path, spec in found.items():
        assert "/layers/" not in path or not spec or spec[0] is None  # the layer axis is never split


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear", "avgpool_linear"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_covered(projector, tied):
    model = ModelConfig(vit=VIT, llm=LlmConfig(**{**vars(LLM), "tied_head": tied}), contrast_dim=8, voco_cells=2)
    params = jax.eval_shape(functools.partial(vlm.init, model, projector), jax.random.key(0))
    for leaf in jax.tree.leaves(sharding.param_shardings(mesh_of(2, 4), params)):
        assert isinstance(leaf, jax.sharding.NamedSharding)


def test_the_full_size_model_is_split_evenly():
    model = ModelConfig(contrast_dim=512)
    params = jax.eval_shape(functools.partial(vlm.init, model, "mlp2x_gelu"), jax.random.key(0))
    mesh = mesh_of(4, 2)
    part = sum(
        np.prod(where.shard_shape(leaf.shape))
        for leaf, where in zip(
            jax.tree.leaves(params), jax.tree.leaves(sharding.param_shardings(mesh, params)), strict=True
        )
    )
    whole = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert part / whole < 1.01 / 8


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (2, 4)])
def test_sharded_init_is_the_plain_init_in_pieces(shape):
    mesh = mesh_of(*shape)
    state = sharding.sharded_init(init_state, mesh, jax.random.key(0))
    plain = init_state(jax.random.key(0))
    values, expected = flatten(plain), flatten(sharding.state_shardings(mesh, plain))
    for path, leaf in flatten(state).items():
        np.testing.assert_allclose(leaf, values[path], rtol=1e-6, atol=1e-7, err_msg=path)
        assert leaf.sharding.is_equivalent_to(expected[path], leaf.ndim), path
    w = state["params"]["llm"]["layers"]["0"]["mlp"]["up"]["w"]
    assert w.addressable_shards[0].data.size == w.size // 8
    abstract = flatten(sharding.abstract_like(mesh, plain))
    assert abstract["params/llm/embed/table"].sharding.spec == P("model", "data")


def test_adam_moments_are_split_like_their_parameters():
    mesh = mesh_of(4, 2)
    state = sharding.sharded_init(init_state, mesh, jax.random.key(0))
    params = flatten(state["params"])
    seen = 0
    for path, leaf in flatten(state["opt_state"]).items():
        name = next((path[path.index(f"{m}/") + 3 :] for m in ("mu", "nu") if f"/{m}/" in path), None)
        if name:
            assert leaf.sharding.is_equivalent_to(params[name].sharding, leaf.ndim), path
            seen += 1
    trained = [path for path in params if path.startswith(("llm/", "voco/"))]
    assert seen == 2 * len(trained)


def test_what_does_not_divide_is_replicated_and_said_once(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", said.append)
    sharding._say_once.cache_clear()
    path = "llm/layers/0/attn/k/w"
    for _ in range(2):
        assert sharding.spec_for(mesh_of(2, 4), path, (2, 16, 2, 4)) == P(None, "data", None, None)
    assert len(said) == 1
    assert "llm/layers/0/attn/k/w: dimension 2 of (2, 16, 2, 4) does not divide by the 4 devices" in said[0]


def test_an_uncovered_path_or_another_rank_is_an_error():
    with pytest.raises(ValueError, match="no sharding rule covers 'llm/gate'"):
        sharding.param_shardings(mesh_of(8, 1), {"llm": {"gate": jnp.ones(2)}})
    with pytest.raises(ValueError, match=r"'llm/head/w' does not fit its shape \(2,\)"):
        sharding.spec_for(mesh_of(8, 1), "llm/head/w", (2,))


def test_meshes():
    mesh = sharding.make_mesh(MeshConfig())
    assert dict(mesh.shape) == {"data": 8, "model": 1}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert dict(sharding.make_mesh(MeshConfig(data=2, model=-1)).shape) == {"data": 2, "model": 4}
    with pytest.raises(ValueError, match=r"mesh\.model = 3 must divide the number of devices, 8"):
        sharding.make_mesh(MeshConfig(model=3))
    with pytest.raises(ValueError, match=r"mesh\.data x mesh\.model = 2 x 2 must be the number of devices, 8"):
        sharding.make_mesh(MeshConfig(data=2, model=2))
    with pytest.raises(ValueError, match=r"stages\.base\.batch_size = 6 rows must be a multiple of .* axis, 4"):
        sharding.check_batch(mesh_of(4, 2), 6, "stages.base.batch_size")


def test_batches_are_split_over_the_data_axis():
    mesh = mesh_of(4, 2)
    batch = {"ids": np.arange(24, dtype=np.int32).reshape(8, 3), "example": np.arange(8, dtype=np.int32)}
    out = sharding.shard_batch(mesh, batch)
    for name, rows in batch.items():
        np.testing.assert_array_equal(out[name], rows)
        assert out[name].sharding.spec == P("data")
        assert {shard.data.shape[0] for shard in out[name].addressable_shards} == {2}
    with pytest.raises(ValueError, match=r"batch\['ids'\] = 6 rows must be a multiple"):
        sharding.shard_batch(mesh, {"ids": np.zeros((6, 2), np.int32)})


def laid_out(processes):
    """A stand-in for a mesh: the process of each device, [data, model]."""
    devices = np.array([[types.SimpleNamespace(process_index=p) for p in row] for row in processes])
    return types.SimpleNamespace(devices=devices, shape={"data": len(processes), "model": len(processes[0])})


@pytest.mark.parametrize(
    ("processes", "process", "share"),
    [
        ([[0], [0], [1], [1]], 1, (1, 2)),  # each process has rows of its own
        ([[0, 0], [1, 1]], 0, (0, 2)),
        ([[0, 1], [2, 3]], 1, (0, 2)),  # the model axis runs across 0 and 1: the same rows
        ([[0, 1], [2, 3]], 2, (1, 2)),
        ([[0, 1]], 1, (0, 1)),
    ],
)
def test_processes_that_hold_the_same_rows_read_the_same_share(monkeypatch, processes, process, share):
    monkeypatch.setattr(jax, "process_index", lambda: process)
    assert sharding.data_share(laid_out(processes)) == share


def test_unequal_shares_are_refused():
    with pytest.raises(ValueError, match=r"mesh\.data = 3 cannot be dealt out to 2 processes"):
        sharding.data_share(laid_out([[0], [0], [1]]))


def test_place_replicates_or_splits():
    mesh = mesh_of(4, 2)
    assert sharding.place(mesh, np.int32(3)).sharding.is_fully_replicated
    split = sharding.place(mesh, {"x": np.arange(8.0, dtype=np.float32)}, "data")["x"]
    assert split.sharding.spec == P("data")
    np.testing.assert_array_equal(split, np.arange(8.0))


def test_constrain():
    x = jnp.ones((8, 4, 2))
    assert sharding.constrain(x, "data", None, None) is x
    with pytest.raises(ValueError, match=r"constrain got 1 axes for an array of shape \(8, 4, 2\)"):
        sharding.constrain(x, "data")
    mesh = mesh_of(4, 2)
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x: sharding.constrain(x * 2, "data", None, "model"))(x)
        assert out.sharding.is_equivalent_to(jax.NamedSharding(mesh, P("data", None, "model")), 3)
        odd = jnp.ones((3, 4, 2))  # eagerly, since jit would pad it without a word
        np.testing.assert_array_equal(sharding.constrain(odd, "data", None, None), odd)


PROCESS = """
import sys
import jax, numpy as np
from tokzip_jax.config import MeshConfig
from tokzip_jax import sharding
jax.config.update("jax_num_cpu_devices", 2)
sharding.initialize_distributed()
sharding.initialize_distributed()
mesh = sharding.make_mesh(MeshConfig())
index = jax.process_index()
rows = np.arange(2, dtype=np.int32) + 2 * index
batch = sharding.shard_batch(mesh, {"x": rows})["x"]
print(jax.process_count(), batch.shape[0], int(jax.jit(lambda x: x.sum())(batch)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_processes_join_where_there_are_several(count):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESS)],
            env=env | ({**several, "JAX_PROCESS_ID": str(n)} if count > 1 else {}),
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(count)
    ]
    total = 2 * count
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert out.splitlines()[-1].split() == [str(count), str(total), str(total * (total - 1) // 2)]
