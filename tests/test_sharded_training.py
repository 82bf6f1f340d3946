"""Training on eight devices is training on one: loss, gradients, moments, first values, checkpoints between meshes."""

import dataclasses
import functools
import json
import socket
import time
import zlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small_run import ROOT, build_data, config_file, finish, load_file, one_stage, start, tiny

from tokzip_jax import metrics, recipe, sharding, step, vlm
from tokzip_jax.checkpoint import Checkpointer
from tokzip_jax.config import (
    LlmConfig,
    LossConfig,
    MeshConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    StageConfig,
    VitConfig,
)
from tokzip_jax.paths import flatten
from tokzip_jax.types import IMAGE_ID, VOCO_ID
from tokzip_jax.workdir import Workdir

# On a model axis of 2 all heads divide; on one of 4 the vision tower's and the key heads do not.
MODEL = ModelConfig(
    vit=VitConfig(image_size=16, patch_size=8, width=16, layers=2, heads=2, mlp_dim=32),
    llm=LlmConfig(vocab_size=64, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=32, max_positions=64),
    contrast_dim=8,
)
STAGE = StageConfig(
    batch_size=16,
    train=("projector/.*", "llm/.*", "voco/.*", "contrast/.*"),
    method=MethodConfig(voco=2, voco_mask="voco"),
    loss=LossConfig(contrast=0.1, chunk=8),
    optim=OptimConfig(accumulate=2),
)
TARGETS = 6
MESHES = [(8, 1), (4, 2), (2, 4)]
CFG = dataclasses.replace(load_file(ROOT / "configs" / "tiny.py").run_config(), model=MODEL, stages={"base": STAGE})
CFG = dataclasses.replace(CFG, data=dataclasses.replace(CFG.data, targets=TARGETS))


@functools.cache
def mesh_of(data, model):
    return sharding.make_mesh(MeshConfig(data=data, model=model))


@functools.cache
def batch():
    """16 rows of different lengths, two questions each."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 64, (16, 14), np.int32)
    ids[:, :3] = (1, IMAGE_ID, VOCO_ID)
    place = np.arange(14)
    real = place < rng.integers(9, 15, (16, 1))
    thread = np.where(place < 3, 0, np.where(place < 8, 1, 2)).astype(np.int32) * real
    return {
        "images": rng.integers(0, 256, (16, 1, 16, 16, 3), np.uint8),
        "ids": (ids * real).astype(np.int32),
        "thread": thread.astype(np.int32),
        "sample": real.astype(np.int32),
        "supervised": real & np.isin(place, (6, 7, 8, 11, 12)),
        "captions": rng.integers(1, 5, (16, 2)).astype(np.int32),
    }


def init(key):
    return vlm.init(MODEL, STAGE.method.projector, key)


@functools.cache
def params():
    return jax.jit(init)(jax.random.key(3))


@functools.cache
def gradients():
    """The jitted function that all meshes share; arguments say where it runs."""
    return jax.jit(
        lambda params, batch: step.gradients(
            MODEL,
            STAGE,
            params,
            batch,
            teacher=None,
            voco_count=jnp.int32(2),
            key=jax.random.key(0),
            max_targets=TARGETS,
        )
    )


@functools.cache
def on_one_device():
    return jax.device_get(gradients()(params(), batch()))


@pytest.mark.parametrize("shape", MESHES)
def test_loss_and_gradients_are_those_of_one_device(shape):
    mesh = mesh_of(*shape)
    placed = jax.device_put(params(), sharding.param_shardings(mesh, params()))
    with jax.set_mesh(mesh):
        grads, metrics = gradients()(placed, sharding.shard_batch(mesh, batch()))
    expected, numbers = on_one_device()
    assert numbers["tokens"] > 40 and numbers["contrast"] > 0
    for name, value in numbers.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    found = flatten(grads)
    assert "vit/cls" not in found and "llm/embed/table" in found
    for path, value in flatten(expected).items():
        np.testing.assert_allclose(found[path], value, rtol=1e-4, atol=1e-5, err_msg=path)


def test_first_values_moments_and_a_checkpoint_on_another_mesh(tmp_path):
    mesh, workdir = mesh_of(4, 2), Workdir(tmp_path)
    with jax.set_mesh(mesh):
        stage = recipe.prepare(CFG, "base", mesh, workdir)
        state = stage.begin()
        key = jax.random.split(jax.random.fold_in(jax.random.key(CFG.seed), zlib.crc32(b"base")))[0]
        plain = flatten(jax.jit(init)(key))
        for path, leaf in flatten(state.params).items():
            np.testing.assert_allclose(leaf, plain[path], rtol=1e-6, atol=1e-7, err_msg=path)
        placed = sharding.shard_batch(mesh, batch())
        state, _ = stage.run_step(state, placed, None, sharding.place(mesh, {**stage.given(0), "counts": np.int32(2)}))
    assert int(state.step) == 1
    weights, seen = flatten(state.params), 0
    for path, leaf in flatten(state.opt_state).items():
        for moment in ("/mu/", "/nu/"):
            if moment in path:
                weight = weights[path.split(moment)[1]]
                assert leaf.sharding.is_equivalent_to(weight.sharding, leaf.ndim) and np.any(leaf), path
                seen += 1
    assert seen == 2 * len(flatten(step.partition(state.params, STAGE.train)[0]))
    table = state.params["llm"]["embed"]["table"]
    assert table.sharding.spec == P("model", "data") and table.addressable_shards[0].data.size == table.size // 8
    with Checkpointer(tmp_path / "saved") as saved:
        saved.save(1, state)
    other = mesh_of(2, 4)
    wanted = recipe.prepare(CFG, "base", other, workdir).abstract
    with Checkpointer(tmp_path / "saved") as saved:
        _, restored = saved.restore(wanted)
    target = flatten(wanted)
    for (path, leaf), value in zip(flatten(restored).items(), flatten(state).values(), strict=True):
        np.testing.assert_array_equal(leaf, value, err_msg=path)
        assert leaf.sharding.is_equivalent_to(target[path].sharding, leaf.ndim), path


def devices_of(processes):
    """A mesh as `data_share` sees it: one process number a device."""
    devices = np.array([[SimpleNamespace(process_index=p) for p in row] for row in processes], object)
    return SimpleNamespace(devices=devices, shape={"data": len(processes), "model": len(processes[0])})


@pytest.mark.parametrize(
    ("processes", "shares"),
    [
        ([[0], [0], [1], [1]], [(0, 2), (1, 2)]),  # a process holds two places of the data axis
        ([[0, 0], [1, 1]], [(0, 2), (1, 2)]),  # the model axis lies inside of a process
        ([[0, 1], [2, 3]], [(0, 2), (0, 2), (1, 2), (1, 2)]),  # it runs across two: both need the same rows
        ([[0, 0, 1, 1]], [(0, 1), (0, 1)]),
        ([[0], [1], [0], [1]], [(0, 2), (1, 2)]),
    ],
)
def test_processes_at_one_place_of_the_data_axis_read_the_same_rows(processes, shares, monkeypatch):
    for process, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert sharding.data_share(devices_of(processes)) == share


def test_unequal_shares_are_refused():
    with pytest.raises(ValueError, match=r"mesh\.data = 3 cannot be dealt out to 2 processes"):
        sharding.data_share(devices_of([[0, 0], [0, 1], [1, 1]]))


def run_both(command, folder):
    """Run a command in two processes of two devices each: [(exit code, standard output, log)].

    Gloo, which carries collectives between CPUs, waits half a minute for a process that is still compiling. Where one
    has to wait longer (a busy machine) both are ended, and the next try finds the program in the compilation cache.
    """
    for _ in range(4):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        logs = [folder / f"{number}.log" for number in range(2)]
        processes = [
            start(["-u", *command], devices=2, log=log, **several, JAX_PROCESS_ID=str(number))
            for number, log in enumerate(logs)
        ]
        late = False
        while not late and any(process.poll() is None for process in processes):
            time.sleep(0.5)
            late = any("Gloo context initialization failed: DEADLINE" in log.read_text() for log in logs)
        if not late:
            return [(*finish(process)[:2], log.read_text()) for process, log in zip(processes, logs, strict=True)]
        for process in processes:
            process.kill()
            process.communicate()
    raise AssertionError("one process always compiled half a minute longer than the other")


@pytest.mark.slow
def test_two_processes_train_and_measure_like_one(tmp_path):
    # No cache of programs, which one process might write while the other one reads it.
    cfg = one_stage(tiny(build_data(tmp_path), log_every=1, checkpoint_every=1, compile_cache=""), steps=2)
    config = config_file(dataclasses.replace(cfg, mesh=MeshConfig(data=2, model=2)), tmp_path / "config.py")

    def command(name):
        return ["train.py", f"--config={config}", f"--workdir={tmp_path / name}"]

    results = run_both(command("two"), tmp_path)
    for code, _, err in results:
        assert code == 0, err
    # Only one of them speaks (Gloo itself prints a line in each).
    assert "upper" in results[0][1] and "upper" not in results[1][1] and "devices" not in results[1][1]
    code, _, err = finish(start(command("one"), devices=4))
    assert code == 0, err
    one, two = (metrics.read_metrics(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2]
    for left, right in zip(one, two, strict=True):
        for name in ("loss", "ce", "contrast", "grad_norm", "tokens"):
            np.testing.assert_allclose(left[name], right[name], rtol=2e-5, err_msg=name)
    tables = [json.loads((tmp_path / name / "eval" / "summary.json").read_text()) for name in ("one", "two")]
    assert tables[0] == tables[1]
    environment = json.loads((tmp_path / "two" / "environment.json").read_text())[-1]
    assert environment["processes"] == 2 and environment["devices"] == 4
