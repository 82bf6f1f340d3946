"""Training with LoRA: deltas alone move, on any mesh; rows are measured with them; mistakes are one sentence."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tokzip_jax import checkpoint, config_check, lora, optim, recipe, sharding, step, vlm
from tokzip_jax.config import (
    DataConfig,
    LlmConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RowConfig,
    RunConfig,
    StageConfig,
    VitConfig,
)
from tokzip_jax.evals.runner import Runner
from tokzip_jax.paths import first_match, flatten
from tokzip_jax.types import IMAGE_ID, VOCO_ID
from tokzip_jax.workdir import Workdir

MODEL = ModelConfig(
    vit=VitConfig(image_size=16, patch_size=8, width=16, layers=2, heads=2, mlp_dim=32),
    llm=LlmConfig(vocab_size=64, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=32, max_positions=64),
)
TUNED = StageConfig(
    init_from="somewhere/else",
    steps=2,
    batch_size=8,
    train=("lora/.*",),
    method=MethodConfig(voco=2, voco_mask="voco"),
    lora=LoraConfig(rank=2, paths=(r"llm/layers/\d+/(attn/[qkvo]|mlp/(up|down))/w",), kinds=("voco", "text")),
    loss=LossConfig(kl=0.5, chunk=8),
    optim=OptimConfig(learning_rate=1e-2),
)
RUN = RunConfig(model=MODEL, stages={"tuned": TUNED}, data=DataConfig(vocab_size=64, text_length=12, targets=6))


def train_batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 64, (8, 12), np.int32)
    ids[:, :3] = (1, IMAGE_ID, VOCO_ID)
    return {
        "images": rng.integers(0, 256, (8, 1, 16, 16, 3), np.uint8),
        "ids": ids,
        "thread": np.broadcast_to(np.where(np.arange(12) < 3, 0, 1), ids.shape).astype(np.int32),
        "sample": np.ones_like(ids),
        "supervised": np.broadcast_to(np.arange(12) > 7, ids.shape),
        "captions": np.ones((8, 2), np.int32),
    }


def two_steps(run, shape, folder):
    """The states before and after two steps (on the host), the metrics of both, and the device's last state."""
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = sharding.make_mesh(MeshConfig(data=shape[0], model=shape[1]), devices)
    with jax.set_mesh(mesh):
        stage = recipe.prepare(run, "tuned", mesh, Workdir(folder))
        assert stage.teacher is None
        state = stage.begin()
        before, metrics = jax.device_get(state), []
        for number in range(2):
            placed = sharding.shard_batch(mesh, train_batch())
            given = sharding.place(mesh, {**stage.given(number), "counts": np.int32(2)})
            state, numbers = stage.run_step(state, placed, None, given)
            metrics.append(jax.device_get(numbers))
    return before, jax.device_get(state), metrics, state


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A converted model without VoCo tokens and deltas, and two steps from it on one device and on eight."""
    folder = tmp_path_factory.mktemp("lora")
    params = jax.jit(lambda key: vlm.init(MODEL, "mlp2x_gelu", key))(jax.random.key(1))
    del params["voco"]
    checkpoint.save_params(str(folder / "base"), params)
    run = dataclasses.replace(
        RUN, stages={"tuned": dataclasses.replace(TUNED, init_from=str(folder / "base"))}
    )
    recipe.check(run)
    return run, folder, params, two_steps(run, (1, 1), folder), two_steps(run, (4, 2), folder)


def test_training_moves_the_deltas_alone(trained):
    _, _, params, (before, after, metrics, _), _ = trained
    old, new = flatten(before.params), flatten(after.params)
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(old[path], leaf, err_msg=path)
    for path, leaf in new.items():
        assert np.array_equal(leaf, old[path]) != path.startswith("lora/"), path
        assert not path.startswith("lora/") or not path.endswith("/b") or not np.any(old[path]), path
    # A stands still as long as B is zero: gradients of both are what they should be.
    moments = {path: leaf for path, leaf in flatten(after.opt_state).items() if "/mu/" in path}
    assert len(moments) == sum(path.startswith("lora/") for path in new) == 12
    assert all(np.any(leaf) for leaf in moments.values())
    # At the beginning the student is the base model under VoCo's mask; the teacher sees the picture.
    assert metrics[0]["kl"] > 0 and metrics[1]["loss"] < metrics[0]["loss"]


def test_eight_devices_train_as_one(trained):
    _, _, _, (_, one, metrics, _), (_, eight, others, state) = trained
    for found, expected in zip(others, metrics):
        for name in ("loss", "ce", "kl", "grad_norm"):
            np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, err_msg=name)
    for path, leaf in flatten(one.params["lora"]).items():
        apart = np.linalg.norm(flatten(eight.params["lora"])[path] - leaf)
        assert apart < 1e-2 * np.linalg.norm(leaf), path
    found = flatten(state.params["lora"])
    for path, spec in {
        "attn/q/a": P(None, "data", None),
        "attn/q/b": P(None, None, "model", None),
        "attn/o/a": P(None, "model", None, None),
        "attn/o/b": P(None, None, "data"),
        "mlp/down/a": P(None, "model", None),
        "mlp/up/b": P(None, None, "model"),
    }.items():
        leaf = found[f"llm/layers/0/{path}"]
        assert leaf.sharding.is_equivalent_to(jax.NamedSharding(leaf.sharding.mesh, spec), leaf.ndim), path


def test_every_possible_delta_has_a_rule():
    mesh = sharding.make_mesh(MeshConfig(data=2, model=4))
    for projector in ("mlp2x_gelu", "linear"):
        cfg = RunConfig(model=MODEL)
        params = recipe.shapes(cfg, projector, LoraConfig(rank=2, paths=(".*",)))
        assert len(flatten(params["lora"])) == 2 * (2 * 6 + 7 + (2 if projector == "mlp2x_gelu" else 1))
        sharding.param_shardings(mesh, params)
        for path in flatten(params):
            if path.startswith("lora/"):
                assert first_match(optim.DECAY, path, name="decay"), path


def test_rows_are_measured_with_the_deltas_of_their_stage(trained, tmp_path):
    run, folder, params, (_, after, _, _), _ = trained
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    workdir, row = Workdir(tmp_path), RowConfig(stage="tuned", method=TUNED.method)
    with checkpoint.Checkpointer(workdir.checkpoints("tuned")) as saved:
        saved.save(2, after)
        saved.finish(2)
    with jax.set_mesh(mesh):
        found = flatten(Runner(run, workdir, mesh, None, []).load(row))
        for path, leaf in flatten(lora.attach(after.params, TUNED.lora)).items():
            np.testing.assert_array_equal(found[path], leaf, err_msg=path)
        assert not [path for path in found if path.startswith("lora/")]
        base = flatten(Runner(run, workdir, mesh, None, [], str(folder / "base")).load(row))
        assert base.keys() == flatten(params).keys()
        # Parameters of a training with deltas, read by a run that knows none of them.
        stages = {"tuned": dataclasses.replace(TUNED, lora=LoraConfig())}
        deaf = Runner(dataclasses.replace(run, stages=stages), workdir, mesh, None, [], workdir.checkpoints("tuned"))
        with pytest.raises(ValueError, match=r"holds LoRA deltas of other matrices \(lora/llm/.* is there only\)"):
            deaf.load(row)
    # What was trained is also where a stage goes on from: its own deltas, none of them fresh.
    stages = {"tuned": dataclasses.replace(TUNED, init_from=workdir.checkpoints("tuned"))}
    with jax.set_mesh(mesh):
        more = recipe.prepare(dataclasses.replace(run, stages=stages), "tuned", mesh, workdir)
        begun = flatten(more.begin().params)
    assert more.teacher is not None and "lora" in more.teacher
    for path, leaf in flatten(after.params).items():
        np.testing.assert_array_equal(begun[path], leaf, err_msg=path)


def test_full_size_count():
    """Rank 8 on the query and value projections of Vicuna 7B: 32 x 2 x 2 x 8 x 4096 trained numbers."""
    shapes = recipe.shapes(RunConfig(), "mlp2x_gelu", LoraConfig(rank=8))
    trained, frozen = step.partition(shapes, ("lora/.*",))
    count, rest = (sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (trained, frozen))
    assert count == 4_194_304 and 6.9e9 < rest < 7.2e9
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.float32.dtype}


FROM_NOTHING = dataclasses.replace(TUNED, init_from="", loss=LossConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": -1}, "stages.tuned.lora.rank = -1 must be >= 0 (0 = no deltas)"),
        ({"alpha": 0.0}, "stages.tuned.lora.alpha = 0.0 must be above 0 and finite"),
        ({"init": "zero"}, "stages.tuned.lora.init = 'zero' is unknown; choose one of 'official', 'paper'"),
        ({"paths": ()}, "stages.tuned.lora.paths is empty; name at least one pattern"),
        ({"paths": ("llm/(",)}, "stages.tuned.lora.paths: 'llm/(' is no regular expression"),
        ({"kinds": ("pad",)}, "stages.tuned.lora.kinds holds 'pad'; choose of prefix, vision, voco, text"),
        ({"paths": ("llm/norm/scale",)}, "stages.tuned.lora.paths: pattern 'llm/norm/scale' matches no matrix"),
        ({"paths": ("q",)}, "a pattern has to match a whole path such as 'llm/layers/0/attn/k/w'"),
        ({"paths": (".*/q/w",)}, "stages.tuned.lora.kinds = ('voco', 'text') cannot hold for 'vit/layers/0/attn/q/w'"),
        ({"rank": 17}, "stages.tuned.lora.rank = 17 must be at most 16, the rank of 'llm/layers/0/"),
    ],
)
def test_mistakes_are_one_sentence(changes, message):
    stage = dataclasses.replace(FROM_NOTHING, lora=dataclasses.replace(TUNED.lora, **changes))
    run = dataclasses.replace(RUN, stages={"tuned": stage})
    with pytest.raises(ValueError, match=re.escape(message)):
        config_check.validate(run)
        recipe.check(run)


def test_gated_deltas_need_no_anchor():
    """Under KL alone: a twin that deltas do not reach is frozen; one that they reach trains."""
    loss = LossConfig(ce=0.0, kl=1.0, teacher="self")
    stage = dataclasses.replace(FROM_NOTHING, loss=loss)
    recipe.check(dataclasses.replace(RUN, stages={"tuned": stage}))
    for kinds in ((), ("voco", "text", "teacher")):
        moving = dataclasses.replace(stage, lora=dataclasses.replace(stage.lora, kinds=kinds))
        with pytest.raises(ValueError, match="has no anchor, for the teacher trains as well"):
            recipe.check(dataclasses.replace(RUN, stages={"tuned": moving}))


def test_a_stage_keeps_the_deltas_of_its_origin():
    first, second = FROM_NOTHING, dataclasses.replace(FROM_NOTHING, init_from="tuned")
    config_check.validate(dataclasses.replace(RUN, stages={"tuned": first, "more": second}))
    second = dataclasses.replace(second, lora=dataclasses.replace(first.lora, alpha=2.0))
    with pytest.raises(ValueError, match=r"stages\.more\.lora must be stages\.tuned\.lora, the deltas in the check"):
        config_check.validate(dataclasses.replace(RUN, stages={"tuned": first, "more": second}))
