"""Every config file: it validates, says how to run it, and what it promises is there."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import ROOT, load_file

from tokzip_jax import config_io, environment, layout, recipe, sharding, study, vlm
from tokzip_jax.config import MeshConfig
from tokzip_jax.config_check import validate
from tokzip_jax.paths import flatten
from tokzip_jax.step import partition
from tokzip_jax.workdir import Workdir

FILES = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
ARGUMENTS = {
    "clips": ("elsewhere",),
    "clips_pictures": ("elsewhere/run",),
    "scenes_best": ("elsewhere/run",),
    "scenes_starts": ("elsewhere/run",),
    "voco_llava15_7b": ("1", "2", "8"),
    "visionzip_tune_llava15_7b": ("192", "128", "64"),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_validates_and_says_how_to_run_it(path):
    module = load_file(path)
    assert re.search(rf"python train\.py --config=configs/{path.name} --workdir=", module.__doc__)
    assert re.search(r"\bCPU cores?\b|^Hardware: ", module.__doc__, re.MULTILINE)
    assert re.search(r"\bExpect\b|^Published|\bPublished:|numbers mean nothing", module.__doc__, re.MULTILINE)
    for arguments in [(), *((argument,) for argument in ARGUMENTS.get(path.stem, ()))]:
        cfg = config_io.from_config_dict(module.get_config(*arguments))
        validate(cfg)
        assert cfg == config_io.from_json(config_io.to_json(cfg))


def test_quickstart_has_every_row():
    cfg = load_file(ROOT / "configs" / "quickstart.py").run_config()
    methods = {name: row.method for name, row in cfg.rows.items() if row.stage}
    assert [name for name, row in cfg.rows.items() if not row.stage] == ["question-only prior"]

    def rows(**wanted):
        return {name for name, method in methods.items() if all(getattr(method, k) == v for k, v in wanted.items())}

    trained = {name for name, row in cfg.rows.items() if row.stage and cfg.stages[row.stage].method.voco_mask == "voco"}
    for count in (1, 4):
        assert len(rows(voco=count, voco_mask="voco", encoder="none") & trained) == 1
    assert len(rows(projector="avgpool_linear", pool_grid=1)) == 1
    visionzip, random = rows(encoder="visionzip"), rows(encoder="random")
    assert len(visionzip) == 3
    assert sorted(methods[name].tokens for name in visionzip) == sorted(methods[name].tokens for name in random)
    # The bounds are one model, read with and without VoCo tokens; the upper one again after VoCo training.
    base = cfg.rows[cfg.eval.upper].stage
    plain = rows(voco=0, encoder="none", projector="mlp2x_gelu")
    assert cfg.eval.upper in plain and cfg.rows[cfg.eval.lower].stage == base
    assert methods[cfg.eval.lower].voco_mask == "voco" and methods[cfg.eval.lower].voco > 0
    official = cfg.rows["upper_official"]
    assert official.stage == base and official.method.voco > 0 and official.method.voco_mask == "visible"
    assert len(plain & trained) == 1
    assert set(cfg.eval.order) == set(cfg.rows)
    # Half of the steps of stage one leave the VoCo tokens out; before or beside it CLS is in a loss.
    counts = cfg.stages[base].voco_counts
    assert counts.count(0) * 2 == len(counts)
    learned = [cfg.stages[base], *(stage for name, stage in cfg.stages.items() if name == cfg.stages[base].init_from)]
    assert any(stage.loss.contrast > 0 for stage in learned)


def full_size(name, argument):
    """A 7B config, its only stage and the name of it; the checkpoint that it starts from is not looked at."""
    cfg = load_file(ROOT / "configs" / f"{name}.py").run_config(int(argument))
    (stage,) = cfg.stages
    return cfg, cfg.stages[stage], stage


@pytest.mark.parametrize(
    ("name", "argument", "shape"),
    [("voco_llava15_7b", "1", (4, 2)), ("visionzip_tune_llava15_7b", "64", (8, 1))],
)
def test_full_size_step_is_traced_on_eight_devices(name, argument, shape, tmp_path):
    """State, shardings and step of the 7B recipes, without a byte of memory for them."""
    cfg, stage, stage_name = full_size(name, argument)
    mesh = sharding.make_mesh(MeshConfig(data=shape[0], model=shape[1]))
    ready = recipe.prepare(cfg, stage_name, mesh, Workdir(tmp_path))
    params, moments = flatten(ready.abstract.params), flatten(ready.abstract.opt_state)
    assert 6.9e9 < sum(leaf.size for leaf in params.values()) < 7.2e9

    def held(leaves):
        return sum(4 * np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves) / 4

    trained = flatten(partition(ready.abstract.params, stage.train)[0])
    assert held(params.values()) < 1.01 * sum(leaf.size for leaf in params.values()) / 8
    assert held(moments.values()) < 2.02 * sum(leaf.size for leaf in trained.values()) / 8
    for path, leaf in trained.items():
        for moment in ("mu", "nu"):
            (found,) = (value for key, value in moments.items() if key.endswith(f"/{moment}/{path}"))
            assert found.sharding == leaf.sharding and found.shape == leaf.shape, path
    batch = abstract_batch(cfg, stage, mesh)
    given = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), ready.given(0))
    with jax.set_mesh(mesh):
        state, metrics = jax.eval_shape(ready.run_step, ready.abstract, batch, None, given)
    assert jax.tree.map(lambda leaf: leaf.shape, state) == jax.tree.map(lambda leaf: leaf.shape, ready.abstract)
    assert {"loss", "ce", "grad_norm", "learning_rate"} <= set(metrics)
    visual = vlm.visual_slots(cfg.model, stage.method)
    assert layout.slots(cfg.data.text_length, images=1, visual=visual, voco=stage.method.voco) == 2048


def abstract_batch(cfg, stage, mesh):
    rows, text, size = stage.batch_size, cfg.data.text_length, cfg.model.vit.image_size
    where = jax.NamedSharding(mesh, jax.P("data"))
    shapes = {
        "images": ((rows, 1, size, size, 3), jnp.uint8),
        **{name: ((rows, text), jnp.int32) for name in ("ids", "thread", "sample")},
        "supervised": ((rows, text), bool),
        "captions": ((rows, cfg.data.caption_length), jnp.int32),
    }
    return {name: jax.ShapeDtypeStruct(*shape, sharding=where) for name, shape in shapes.items()}


def test_published_schedules():
    cfg, stage, _ = full_size("voco_llava15_7b", "1")
    assert stage.steps == 10396 and stage.optim.warmup_steps == 312 and stage.batch_size == 128
    assert stage.train == ("projector/.*", "llm/.*", "voco/.*") and stage.optim.learning_rate == 2e-5
    assert cfg.model.voco_embeddings == 1 and cfg.data.name == "llava_json" and stage.method.voco_mask == "voco"
    for budget, contextual in {192: 30, 128: 20, 64: 10}.items():
        _, stage, _ = full_size("visionzip_tune_llava15_7b", budget)
        assert (stage.method.tokens, stage.method.options) == (budget, {"contextual": contextual})
        assert stage.train == ("projector/.*",) and stage.steps == 520
    with pytest.raises(ValueError, match="budget of 65 tokens is none of the paper's: 192, 128, 64"):
        full_size("visionzip_tune_llava15_7b", 65)


def test_clips_go_on_from_the_pictures():
    """The same model and words; each compressor from the picture model of the same tokens and grid."""
    clips, pictures, scenes = (
        load_file(ROOT / "configs" / f"{name}.py").run_config(*given)
        for name, given in (("clips", ("d",)), ("clips_pictures", ("d/scenes",)), ("scenes", ()))
    )
    assert clips.model == pictures.model == dataclasses.replace(scenes.model, voco_cells=clips.model.voco_cells)
    assert clips.data.tokenizer == pictures.data.tokenizer == "d/scenes/tokenizer.json"
    base = "d/scenes/checkpoints/base"
    assert {clips.stages[name].init_from for name in ("uncompressed", "middle")} == {base}
    assert pictures.stages["base"].init_from == base and "base" in scenes.stages
    made = {
        f"d/clips_pictures/checkpoints/{variant.name}": pictures.stages[stage]
        for stage in pictures.study.stages
        for variant in study.Study(pictures, None, None).searched(stage)
    }
    compared = {name: stage for name, stage in clips.stages.items() if name not in ("uncompressed", "middle")}
    assert len(compared) == 6 and len(clips.study.seeds) == 3
    for name, stage in compared.items():
        origin = made[stage.init_from]
        assert dataclasses.replace(stage.method, positions=origin.method.positions) == origin.method, name
    # As many tokens a frame either way, each read in both orders, after as many steps.
    for count in (1, 2, 8):
        found = set()
        for name, stage in ((f"VoCo {count} + cells", f"voco{count}"), (f"average pooling {count}", f"pooled{count}")):
            read, shuffled = clips.rows[name], clips.rows[f"{name}, shuffled"]
            assert read.method == shuffled.method == clips.stages[stage].method
            assert read.stage == shuffled.stage == stage
            assert (read.frame_order, shuffled.frame_order) == ("", "shuffled")
            found.add(read.method.voco or vlm.visual_slots(clips.model, read.method))
        assert found == {count}
    assert len({(stage.steps, stage.batch_size, stage.optim) for stage in clips.stages.values()}) == 1


def test_full_size_configs_refuse_a_cpu_and_a_missing_checkpoint():
    for name in ("voco_llava15_7b", "visionzip_tune_llava15_7b"):
        cfg, _, stage = full_size(name, ARGUMENTS[name][0])
        with pytest.raises(ValueError, match=r"platform = 'accelerator', but JAX found 8 x cpu .*--config\.platform="):
            environment.require_platform(cfg.platform)
        environment.require_platform(dataclasses.replace(cfg, platform="").platform)
        with pytest.raises(FileNotFoundError, match=rf"stages\.{stage}\.init_from: no checkpoint at .*checkpoints/"):
            recipe.check(cfg)
