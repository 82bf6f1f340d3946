"""A study: which trainings it makes, what it chooses, what its table says, and that it goes on where it was."""

import dataclasses
import functools
import itertools
import json
import math

import jax
import numpy as np
import pytest
import small_run

from tokzip_jax import (
    config_check,
    learned_run,
    probe,
    recipe,
    scene_facts,
    sharding,
    step_times,
    study,
    training,
    vlm,
    voco,
)
from tokzip_jax.config import AutoConfig, DataConfig, MeshConfig, RowConfig, ScenesConfig, StudyConfig
from tokzip_jax.data import shapes
from tokzip_jax.evals.runner import MODEL_INPUTS, Runner
from tokzip_jax.metrics import read_metrics
from tokzip_jax.study import Study, Variant, with_variant
from tokzip_jax.workdir import Workdir

RATES, SEEDS = (1e-3, 3e-3), (0, 1)
STUDY = StudyConfig(stages=("voco", "pooled"), learning_rates=RATES, seeds=SEEDS, equal_time="voco", limit=4)
NAMES = ("question-only prior", "lower", "VoCo 1", "average pooling 1", "upper")
train = small_run.load_file(small_run.ROOT / "train.py")
evaluate = small_run.load_file(small_run.ROOT / "eval.py")


def config(data_dir, **study):
    """The tiny recipe as a study on a few drawn scenes."""
    cfg = small_run.tiny(data_dir, checkpoint_every=100)  # the last step's alone: that a run goes on is in test_resume
    data = DataConfig(
        name="scenes",
        data_dir=data_dir,
        vocab_size=320,
        text_length=160,
        caption_length=48,
        questions=2,
        describe="what is there?",
        scenes=ScenesConfig(difficulty="easy", train=16, validation=8, test=8, questions=4),
    )
    return dataclasses.replace(
        cfg,
        data=data,
        rows={name: cfg.rows[name] for name in NAMES},
        eval=dataclasses.replace(cfg.eval, order=NAMES, limit=6, pictures=0),
        study=dataclasses.replace(STUDY, **study),
    )


@pytest.fixture(scope="module")
def done(one_device, tmp_path_factory):
    """(config, workdir) of a study that was run to its end; the times of its steps are given."""
    folder = tmp_path_factory.mktemp("study")
    cfg, workdir = config(str(folder / "tfds")), Workdir(folder / "run")
    workdir.eval.mkdir(parents=True)
    (workdir.eval / "step_times.json").write_text(json.dumps({"voco": 0.5, "pooled": 0.25}))
    train.run(cfg, workdir)
    return cfg, workdir


def trained(workdir):
    """Stage -> the steps that were logged."""
    lines = itertools.groupby(read_metrics(workdir.root), lambda line: line["stage"])
    return {stage: [line["step"] for line in part] for stage, part in lines}


def test_variants_are_the_stage_but_for_rate_seed_and_length(tmp_path):
    cfg = config(str(tmp_path))
    variant = Variant("voco", 1e-3, 2)
    assert variant.name == "voco-lr0.001-seed2"
    assert dataclasses.replace(variant, steps=7).name == "voco-lr0.001-seed2-steps7"
    stage = cfg.stages["voco"]
    found = dataclasses.replace(variant, steps=7).config(stage)
    assert (found.optim.learning_rate, found.seed, found.steps) == (1e-3, 2, 7)
    back = dataclasses.replace(found, seed=0, steps=stage.steps, optim=stage.optim)
    assert back == dataclasses.replace(stage, drawn_as="voco")
    long = dataclasses.replace(stage, optim=dataclasses.replace(stage.optim, warmup_steps=4))
    assert dataclasses.replace(variant, steps=2).config(long).optim.warmup_steps == 2
    more = with_variant(cfg, variant, "validation", 3)
    assert more.rows["VoCo 1 voco-lr0.001-seed2 validation"].stage == variant.name
    assert (more.eval.split, more.eval.limit) == ("validation", 3) and set(cfg.rows) < set(more.rows)
    config_check.validate(with_variant(cfg, variant))


def test_a_rate_is_chosen_by_rows_that_read_as_their_stage_does(tmp_path):
    cfg = config(str(tmp_path))
    scenes = dataclasses.replace(cfg.data.scenes, frames=3)
    data = dataclasses.replace(cfg.data, name="clips", images=3, scenes=scenes)
    row, auto = cfg.rows["VoCo 1"], AutoConfig(ladder=(1,))
    orders = {"true": "true", "shuffled": "shuffled", "middle": "middle", "usual": ""}
    rows = {name: dataclasses.replace(row, frame_order=order) for name, order in orders.items()}
    whole = RowConfig(stage="voco")  # under another mask than the stage trains with
    rows = {**cfg.rows, **rows, "auto": dataclasses.replace(row, auto=auto), "whole": whole}
    cfg = dataclasses.replace(cfg, data=data, rows=rows)
    assert config_check.deciding(cfg, "voco") == ["VoCo 1", "true", "usual"]
    middle = dataclasses.replace(cfg.stages["voco"], frame_order="middle")
    cfg = dataclasses.replace(cfg, stages={**cfg.stages, "voco": middle})
    assert config_check.deciding(cfg, "voco") == ["middle"]
    config_check.validate(cfg)
    rows["whole"] = dataclasses.replace(whole, frame_order="middle")
    assert config_check.deciding(cfg, "voco") == ["middle"]
    del rows["middle"]
    assert config_check.deciding(cfg, "voco") == ["whole"]
    del rows["whole"]
    with pytest.raises(ValueError, match=r"'voco', which no row .* reads in its order of frames: nothing can choose"):
        config_check.validate(cfg)


def test_rate_seed_and_length_are_data_of_one_program(tmp_path):
    """So that a study compiles each of its stages once: the lowered texts are the same."""
    cfg = config(str(tmp_path))
    mesh = sharding.make_mesh(MeshConfig())
    shapes = {"images": ((8, 1, 64, 64, 3), "uint8"), "captions": ((8, 48), "int32")}
    shapes |= {name: ((8, 160), "int32") for name in ("ids", "thread", "sample")} | {"supervised": ((8, 160), "bool")}
    batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    texts, keys, programs = [], [], []
    for variant in (Variant("pooled", 1e-3, 0), Variant("pooled", 2e-3, 0, 9), Variant("pooled", 1e-3, 1)):
        stage = recipe.prepare(with_variant(cfg, variant), variant.name, mesh, Workdir(tmp_path))
        given = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stage.given(0))
        with jax.set_mesh(mesh):
            texts.append(stage.run_step.lower(stage.abstract, batch, None, given).as_text())
        keys.append(stage.given(0)["key"].tolist())
        programs.append(stage.run_step)
    assert texts[0] == texts[1] == texts[2] and programs[0] is programs[1] is programs[2]
    cold = dataclasses.replace(cfg.stages["pooled"], optim=dataclasses.replace(cfg.stages["pooled"].optim, b2=0.5))
    other = dataclasses.replace(cfg, stages={**cfg.stages, "pooled": cold})
    assert recipe.prepare(other, "pooled", mesh, Workdir(tmp_path)).run_step is not programs[0]
    # One seed draws the same whatever the rate and length, and what the stage itself draws; another one does not.
    assert keys[0] == keys[1] == recipe.prepare(cfg, "pooled", mesh, Workdir(tmp_path)).given(0)["key"].tolist()
    assert keys[2] != keys[0]


def test_stages_from_which_nothing_begins_come_last_and_are_shared(tmp_path, monkeypatch):
    """Both at once, though neither is studied; what others begin from comes first of all."""
    cfg = config(str(tmp_path))
    once = {name: cfg.stages["voco"] for name in ("far", "further")}
    plain = dataclasses.replace(cfg.study, equal_time="")
    cfg = dataclasses.replace(cfg, stages={**cfg.stages, **once}, study=plain)
    trained = {"base"}
    monkeypatch.setattr(study, "finished", lambda directory: 1 if directory.rsplit("/", 1)[1] in trained else None)
    monkeypatch.setattr(study.Study, "_measure", lambda self, variant: None)
    monkeypatch.setattr(study.Study, "rate", lambda self, stage: RATES[1])
    monkeypatch.setattr(study.time, "sleep", None)
    mesh = sharding.make_mesh(cfg.mesh)
    one, other = (Study(cfg, Workdir(tmp_path / "run"), mesh).trainings() for _ in range(2))
    order = [next(one)[1]]
    while order[-1] not in once:
        trained.add(order[-1])
        order.append(next(one)[1])
    searched = [f"{stage}-lr{rate:g}-seed0" for stage in cfg.study.stages for rate in RATES]
    assert order[: len(searched)] == searched and order[-1] == "far" and next(other)[1] == "further"


def test_two_processes_share_the_trainings(tmp_path, monkeypatch):
    """What one has taken the other one leaves; it waits where it needs what the other one finds."""
    cfg, ready, waits = config(str(tmp_path)), set(), []
    monkeypatch.setattr(study, "finished", lambda directory: 1 if directory.rsplit("/", 1)[1] in ready else None)
    monkeypatch.setattr(study.Study, "_measure", lambda self, variant: None)
    monkeypatch.setattr(study.Study, "rate", lambda self, stage: RATES[1])
    mesh = sharding.make_mesh(cfg.mesh)
    one, other = (Study(cfg, Workdir(tmp_path / "run"), mesh).trainings() for _ in range(2))
    assert next(one)[1] == "base"

    def until_base_is_there(seconds):
        waits.append(seconds)
        ready.add("base")

    monkeypatch.setattr(study.time, "sleep", until_base_is_there)
    assert next(other)[1] == "voco-lr0.001-seed0" and waits == [study.POLL]
    taken = [next(one)[1]]
    for _ in range(2):  # one is much faster than the other
        ready.add(taken[-1])
        taken.append(next(one)[1])
    assert taken == ["voco-lr0.003-seed0", "pooled-lr0.001-seed0", "pooled-lr0.003-seed0"]
    ready.add(taken[-1])

    def until_the_other_is_ready(seconds):
        waits.append(seconds)
        ready.add("voco-lr0.001-seed0")

    monkeypatch.setattr(study.time, "sleep", until_the_other_is_ready)
    assert next(one)[1] == "voco-lr0.003-seed1" and len(waits) == 2  # a seed of the chosen rate
    assert next(other)[1] == "pooled-lr0.003-seed1"
    one.close()
    other.close()


def test_every_training_is_there_and_no_other(done):
    cfg, workdir = done
    record = json.loads((workdir.eval / "study.json").read_text())
    chosen = {stage: Study(cfg, workdir, sharding.make_mesh(cfg.mesh)).rate(stage) for stage in STUDY.stages}
    wanted = {("base", 6)}
    for stage in STUDY.stages:
        wanted |= {(Variant(stage, rate, 0).name, 4) for rate in RATES}
        wanted |= {(Variant(stage, chosen[stage], seed).name, 4) for seed in SEEDS}
    # Half the time a step: twice the steps.
    wanted |= {(Variant("pooled", chosen["pooled"], seed, 8).name, 8) for seed in SEEDS}
    assert {(name, lines[-1]) for name, lines in trained(workdir).items()} == wanted
    assert len(record["trainings"]) == len(wanted) - 1
    assert record["seconds_per_step"] == {"voco": 0.5, "pooled": 0.25}
    for stage in STUDY.stages:
        tried = {t["rate"]: t["validation"] for t in record["trainings"] if t["stage"] == stage and "validation" in t}
        assert set(tried) == set(RATES) and tried[chosen[stage]] == max(tried.values())


def test_the_table_is_the_mean_of_the_trainings(done):
    _, workdir = done
    record = json.loads((workdir.eval / "study.json").read_text())["trainings"]
    summary = {row["method"]: row for row in json.loads((workdir.eval / "summary.json").read_text())}
    assert list(summary) == list(NAMES)
    for name, stage, seconds in (("VoCo 1", "voco", 2.0), ("average pooling 1", "pooled", 1.0)):
        tested = [t for t in record if t["stage"] == stage and "test" in t]
        scores = [t["test"][name] for t in tested if t["steps"] == 4]
        row = summary[name]
        assert len(scores) == row["seeds"] == 2 and row["train_seconds"] == seconds
        assert row["accuracy"] == pytest.approx(sum(scores) / 2) and row["learning_rate"] == tested[0]["rate"]
        assert row["spread"] == pytest.approx(abs(scores[0] - scores[1]) / 2)
        equal = scores if stage == "voco" else [t["test"][name] for t in tested if t["steps"] == 8]
        assert row["accuracy_equal_time"] == pytest.approx(math.fsum(equal) / 2)
    assert summary["upper"]["learning_rate"] is None and summary["upper"]["train_seconds"] is None
    table = (workdir.eval / "table.txt").read_text()
    assert "equal time %" in table and "train s" in table


def test_a_finished_study_trains_nothing_and_says_the_same(done, monkeypatch, capsys):
    cfg, workdir = done
    before = {path: path.read_bytes() for path in workdir.eval.rglob("*.json")}
    monkeypatch.setattr(training, "train_stage", None)
    train.run(cfg, workdir)
    table = (workdir.eval / "table.txt").read_text()
    assert table in capsys.readouterr().out
    assert {path: path.read_bytes() for path in workdir.eval.rglob("*.json")} == before
    assert table in evaluate.run(workdir)
    one = evaluate.run(workdir, rows=("VoCo 1",))
    assert "VoCo 1" in one and "average pooling 1" not in one


def test_what_the_voco_tokens_of_the_first_seed_learned(done):
    """`eval.py --learned`: without a question in the row, what the model does with one."""
    cfg, workdir = done
    text = evaluate.run(workdir, learned=("VoCo 1",))
    found = json.loads((workdir.eval / "learned" / "VoCo 1.json").read_text())
    mesh = sharding.make_mesh(cfg.mesh)
    runner = Runner.create(Study(cfg, workdir, mesh).first(), workdir, mesh)
    row = runner.cfg.rows["VoCo 1"]
    assert (found["stage"], found["split"], found["pictures"]) == (row.stage, "test", 6)
    assert row.stage.endswith("-seed0")

    @functools.partial(jax.jit, out_shardings=jax.sharding.PartitionSpec())
    def look(params, batch):
        cache = voco.build(cfg.model, params, batch, row.method, positions="compact")
        visual, _ = vlm.encode(cfg.model, params, batch["images"], row.method, jax.random.key(0))
        attention = vlm.voco_attention(cfg.model, params, batch, row.method)
        return attention, probe.features(cache, "both"), visual.tokens_BMD.mean(axis=1)[None]

    params, parts = runner.load(row), []
    scenes = [scene_facts.things(example["facts"]) for example in runner.examples]
    with jax.set_mesh(mesh):
        for batch in runner.batches():
            first = (batch["example"] >= 0) & (batch["question"][:, 0] == 0)
            given = sharding.place(mesh, {name: batch[name] for name in MODEL_INPUTS if name in batch}, "data")
            parts.append([np.asarray(x)[:, first] for x in look(params, given)])
        seen = learned_run._see(runner, row, scenes)
    attention, both, mean = (np.concatenate(x, axis=1) for x in zip(*parts))
    np.testing.assert_allclose(found["looks"]["spent"], attention.sum(axis=3).mean(axis=1), rtol=1e-4)
    share = attention / attention.sum(axis=3, keepdims=True)
    area = probe.patch_shares(np.stack([shapes.cover(scene, 64) for scene in scenes]), 4)
    on_things = np.einsum("LBkM,BM->Lk", share, area) / 6
    np.testing.assert_allclose(found["looks"]["object_share"], on_things, rtol=1e-4)
    assert found["looks"]["object_area"] == pytest.approx(float(np.mean(area)), rel=1e-5)
    np.testing.assert_allclose(seen.features["both"], both, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(seen.features["mean patch"], mean, rtol=1e-3, atol=1e-4)
    # The untrained tokens are others.
    untrained = found["untrained"]
    assert untrained["row"] == "lower" and untrained["looks"]["spent"] != found["looks"]["spent"]
    for fact in found["facts"].values():
        layers = [(kind, len(accuracy)) for kind, accuracy in fact["accuracy"].items()]
        assert layers == [("keys", 2), ("values", 2), ("both", 2), ("mean patch", 1), ("both, untrained", 2)]
        assert 0 <= fact["majority"] <= 1 and fact["tests"] in (1, 2)
    assert found["facts"] and all(f"\n{fact} " in text for fact in found["facts"])
    assert f"VoCo 1 (stage {row.stage})" in text and "parameters of the row 'lower'" in text
    assert (workdir.figures / "learned_VoCo 1.png").stat().st_size > 1000


def test_a_training_that_is_missing_is_made_again(done):
    cfg, workdir = done
    study = Study(cfg, workdir, sharding.make_mesh(cfg.mesh))
    assert list(study.trainings()) == []
    gone = study.repeated("pooled")[1]
    marker = next(path for path in (workdir.root / "checkpoints" / gone.name).iterdir() if path.is_file())
    text = marker.read_text()
    marker.unlink()
    asked = study.trainings()
    assert next(asked)[1] == gone.name
    with pytest.raises(RuntimeError, match=f"'{gone.name}' must be finished before the next one"):
        next(asked)
    asked = study.trainings()
    assert next(asked)[1] == gone.name
    marker.write_text(text)
    assert list(asked) == []


def test_a_rate_that_diverges_is_left_out(done, tmp_path):
    """Its loss is NaN in the first step; the other one is chosen, and the same command does not try again."""
    cfg, workdir = done
    for name in ("checkpoints/base", "tokenizer.json", "eval/step_times.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(workdir.root / name)
    study = dataclasses.replace(STUDY, stages=("pooled",), learning_rates=(1e30, 1e-3), seeds=(0,), equal_time="")
    cfg = dataclasses.replace(cfg, study=study)
    cfg = dataclasses.replace(cfg, rows={name: cfg.rows[name] for name in cfg.rows if cfg.rows[name].stage != "voco"})
    cfg = dataclasses.replace(cfg, stages={name: cfg.stages[name] for name in ("base", "pooled")})
    cfg = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, order=()))
    train.run(cfg, Workdir(tmp_path))
    found = Study(cfg, Workdir(tmp_path), sharding.make_mesh(cfg.mesh))
    assert found.diverged() == ["pooled-lr1e+30-seed0"] and found.rate("pooled") == 1e-3
    assert list(found.trainings()) == []
    record = json.loads((tmp_path / "eval" / "study.json").read_text())["trainings"]
    assert [(entry["rate"], entry.get("diverged", False)) for entry in record] == [(1e30, True), (1e-3, False)]
    (tmp_path / "eval" / "diverged.json").write_text(json.dumps(["pooled-lr1e+30-seed0", "pooled-lr0.001-seed0"]))
    with pytest.raises(ValueError, match="'pooled' diverged at every rate"):
        found.rate("pooled")
    assert not found.give_up("base")


def test_step_times_are_measured_once(done, tmp_path, monkeypatch):
    """In a workdir that shares the study's checkpoints, but not its times; no program is traced while it is timed."""
    cfg, workdir = done
    timed = step_times.TimedStage.steps

    def forgotten(self, turn):
        recipe._program.cache_clear()  # as where there are more stages than it holds
        with monkeypatch.context() as changed:
            changed.setattr(recipe.step, "train_step", None)
            return timed(self, turn)

    monkeypatch.setattr(step_times.TimedStage, "steps", forgotten)
    (tmp_path / "checkpoints").symlink_to(workdir.root / "checkpoints")
    (tmp_path / "tokenizer.json").symlink_to(workdir.tokenizer)
    mesh = sharding.make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        study = Study(dataclasses.replace(cfg, study=StudyConfig(stages=("pooled",))), Workdir(tmp_path), mesh)
        found = study.step_times()
    assert set(found) == {"pooled"} and all(seconds > 0 for seconds in found.values())
    assert study.step_times() == found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": ("voco", "pool")}, "study.stages entry = 'pool' is unknown; choose one of 'base'"),
        ({"stages": ("base",)}, "study.stages holds 'base', of which there will be several trainings"),
        ({"stages": ("voco", "voco")}, "study.stages = ('voco', 'voco') holds an entry twice"),
        ({"seeds": ()}, "study.seeds is empty"),
        ({"seeds": (0, -1)}, "study.seeds entry = -1 must be >= 0"),
        ({"learning_rates": (1e-3, 0.0)}, "study.learning_rates entry = 0.0 must be above 0"),
        ({"equal_time": "vocos"}, "study.equal_time = 'vocos' is unknown; choose one of '', "),
        ({"equal_time": "base"}, "study.equal_time = 'base' would be timed and not trained, but a stage begins"),
        ({"stages": ()}, "study.equal_time = 'voco' is unknown; choose one of ''"),
        ({"limit": -1}, "study.limit = -1 must be >= 0"),
        ({"split": "test"}, "study.split = 'test' would choose learning rates on what eval.split measures"),
    ],
)
def test_studies_that_cannot_be(changes, words, tmp_path):
    with pytest.raises(ValueError) as error:
        config_check.validate(config(str(tmp_path), **changes))
    assert words in str(error.value)


def test_a_stage_may_say_how_long_alone(tmp_path, monkeypatch):
    """One that nothing reads or begins from is timed with the others and never trained; one that a row reads is not."""
    cfg = config(str(tmp_path), stages=("pooled",), learning_rates=(), equal_time="spare")
    cfg = dataclasses.replace(cfg, stages={**cfg.stages, "spare": cfg.stages["voco"]})
    config_check.validate(cfg)
    rows = {**cfg.rows, "spare": dataclasses.replace(cfg.rows["VoCo 1"], stage="spare")}
    with pytest.raises(ValueError, match=r"study\.equal_time = 'spare' would be timed and not trained, but"):
        config_check.validate(dataclasses.replace(cfg, rows=rows))
    # Everything is trained but what says "spare", and the trainings of equal length.
    monkeypatch.setattr(study, "finished", lambda path: None if "spare" in path or "-steps" in path else 1)
    asked = []
    monkeypatch.setattr(
        step_times, "measure", lambda stages, *_: asked.extend(stages) or {"pooled": 1.0, "spare": 3.0}
    )
    made, steps = Study(cfg, Workdir(tmp_path), sharding.make_mesh(cfg.mesh)), 3 * cfg.stages["voco"].steps
    _, name = next(made.trainings())
    assert name == f"pooled-lr{cfg.stages['pooled'].optim.learning_rate:g}-seed0-steps{steps}"
    assert asked == ["pooled", "spare"]


def test_nothing_waits_for_a_choice_of_one_rate(tmp_path, monkeypatch):
    """With one learning rate all seeds are shared out at once; with two the first seed's trainings come first."""
    monkeypatch.setattr(study, "finished", lambda path: 1)
    monkeypatch.setattr(Study, "rate", lambda self, stage: study.rates(self.cfg, stage)[0])
    asked = []
    monkeypatch.setattr(Study, "_all", lambda self, variants: iter(asked.append([v.seed for v in variants]) or ()))
    for tried in ((), RATES):
        cfg = config(str(tmp_path), learning_rates=tried, equal_time="")
        assert list(Study(cfg, Workdir(tmp_path), sharding.make_mesh(cfg.mesh)).trainings()) == []
    assert asked == [[], [0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 1]]


def test_a_stage_needs_a_row_to_be_judged_by(tmp_path):
    cfg = config(str(tmp_path))
    auto = dataclasses.replace(cfg.rows["VoCo 1"], auto=AutoConfig(ladder=(1,)))
    with pytest.raises(ValueError, match=r"study\.stages holds 'voco', which no row with a fixed number"):
        config_check.validate(dataclasses.replace(cfg, rows={**cfg.rows, "VoCo 1": auto}))
