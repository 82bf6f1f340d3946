"""A sweep: which rows it makes, what cannot be, that sharing looks and programs changes no answer, and resuming."""

import dataclasses
import json
import os
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run

from tokzip_jax import (
    agreement,
    config_io,
    second_turn,
    sharding,
    step,
    sweep,
    sweep_report,
    sweep_run,
    sweep_times,
    training,
)
from tokzip_jax.config import AutoConfig, MeshConfig, MethodConfig, OptimConfig
from tokzip_jax.data import sources
from tokzip_jax.evals import table
from tokzip_jax.evals.runner import Runner
from tokzip_jax.evals.shared import Memory, SharedRunner, language_model, reading, side_by_side
from tokzip_jax.evals.table import RowResult
from tokzip_jax.metrics import MetricWriter, read_metrics
from tokzip_jax.workdir import Workdir

evaluate = small_run.load_file(small_run.ROOT / "eval.py")
ASKED, BUDGETS = ("cls_attention", "cdpruner", "downsample", "fastv", "nested_pool"), (1, 3)


def config(data_dir):
    """The tiny recipe cut down to the stage that is read and one that gives the recipe of projectors."""
    cfg = small_run.tiny(data_dir)
    names = ("question-only prior", "lower", "upper")
    stages = {name: dataclasses.replace(cfg.stages[name], steps=1, optim=OptimConfig()) for name in ("base", "pooled")}
    return dataclasses.replace(
        cfg,
        stages=stages,
        rows={name: cfg.rows[name] for name in names},
        eval=dataclasses.replace(cfg.eval, order=names, pictures=2, limit=4),
        study=dataclasses.replace(cfg.study, seeds=(0, 1)),
    )


@pytest.fixture(scope="module")
def run(one_device, tmp_path_factory):
    """(config, workdir) of a run whose first stage was trained, and that was swept."""
    folder = tmp_path_factory.mktemp("sweep")
    cfg, workdir = config(small_run.build_data(folder)), Workdir(folder / "run")
    workdir.open(cfg)
    with jax.set_mesh(mesh := sharding.make_mesh(cfg.mesh)), MetricWriter(workdir.root) as writer:
        training.train_stage(cfg, "base", mesh, workdir, writer)
    times = workdir.eval / "methods" / "nested_pool" / "step_times.json"
    times.parent.mkdir(parents=True)
    times.write_text(json.dumps({"nested_pool": 0.5, "pooled": 1.0}))  # twice that is what the run's own stage takes
    evaluate.run(workdir, methods=ASKED, budgets=BUDGETS)
    return cfg, workdir


def test_rows_and_refusals_of_the_tiny_recipe(tmp_path):
    cfg = small_run.tiny(str(tmp_path))
    lines, refused = sweep.plan(cfg, ["visionzip", "downsample", "fastv", "pool_mlp", "mqt"], (4, 1, 9))
    assert [line.name for line in lines] == [
        *("visionzip 1", "visionzip 4", "visionzip 9"),
        *("downsample 1", "downsample 4", "downsample 9"),
        "fastv 8",
        *("pool_mlp 1", "pool_mlp 4", "mqt 1", "mqt 4", "mqt 9"),
    ]
    assert [(line.method, line.tokens) for line in refused] == [("pool_mlp", 9)]
    assert refused[0].reason == "9 tokens cannot be made of 4 x 4 patches, but 1, 4, 16"
    rows = {line.name: line for line in lines}
    # The run's own row of that method and budget.
    assert rows["visionzip 4"].row == cfg.rows["VisionZip 4"]
    assert rows["visionzip 9"].row.method.options == {"contextual": 2}
    assert rows["fastv 8"].row.method == MethodConfig(decoder="fastv", decoder_layers=(1,), decoder_keep=(8,))
    assert [line.name for line in lines if line.alone] == ["fastv 8"]
    assert {line.row.stage for line in lines} == {"base", "pool_mlp-1", "pool_mlp-4", "mqt-9"}
    stage, recipe = rows["mqt 4"].training, cfg.stages["pooled"]
    assert stage.method == MethodConfig(projector="mqt", draw_budget=True) and stage.init_from == "base"
    same = ("steps", "batch_size", "optim", "seed", "train")
    assert [getattr(stage, name) for name in same] == [getattr(recipe, name) for name in same]
    assert rows["mqt 4"].model.projector.queries == 9


def test_published_schedules_follow_the_depth():
    deep = small_run.load_file(small_run.ROOT / "configs" / "tiny.py").run_config()
    model = dataclasses.replace(deep.model, llm=dataclasses.replace(deep.model.llm, layers=32))
    names = ["fastv", "sparsevlm", "sparsevlm_v1", "pyramiddrop"]
    lines, _ = sweep.plan(dataclasses.replace(deep, model=model), names, (1,))
    found = {line.method: (line.row.method.decoder_layers, line.row.method.decoder_keep) for line in lines}
    assert found == {
        "fastv": ((2,), (8,)),
        "sparsevlm": ((3, 7, 16), (13, 10, 8)),
        "sparsevlm_v1": ((3, 7, 16, 20), (13, 11, 10, 8)),
        "pyramiddrop": ((8, 16, 24), (13, 10, 8)),
    }


def test_free_and_all_name_every_method():
    cfg = small_run.load_file(small_run.ROOT / "configs" / "tiny.py").run_config()
    free, every = sweep.named(cfg, ["free"]), sweep.named(cfg, ["all"])
    assert every[: len(free)] == free and set(every) - set(free) == set(sweep.PROJECTORS) - {"mlp2x_gelu"}
    assert set(free) == {*sweep.ENCODER, *sweep.VARIANTS, *sweep.DECODER} - {"none"}
    assert sweep.named(cfg, ["tome", "free", "tome"])[0] == "tome" and len(sweep.named(cfg, ["tome", "free"])) == len(
        free
    )


@pytest.mark.parametrize(
    ("asked", "budgets", "words"),
    [
        (("fastvee",), (1,), "--methods holds 'fastvee'; choose of 'all', 'free', 'random', "),
        (("mlp2x_gelu",), (1,), "--methods holds 'mlp2x_gelu'"),
        (("tome",), (0,), "give at least one each, budgets >= 1"),
        (("tome",), (), "give at least one each, budgets >= 1"),
        (("ldp",), (3,), "no method can meet its budget: ldp 3: 3 tokens cannot be made of 4 x 4 patches, but 4"),
    ],
)
def test_what_is_refused(asked, budgets, words, tmp_path):
    cfg = small_run.tiny(str(tmp_path))
    with pytest.raises(ValueError) as error:
        sweep.plan(cfg, asked, budgets)
    assert words in str(error.value)


@pytest.mark.parametrize("option", [{"steps": 3}, {"held_out": 2}, {"bf16": True}, {"second_turn": True}])
def test_options_of_sweeps_need_methods(option, tmp_path):
    with pytest.raises(ValueError, match=f"--{next(iter(option))} needs --methods, whose "):
        evaluate.run(Workdir(tmp_path), **option)


def test_rates_of_a_run_without_a_study_are_searched_where_a_split_can_choose(tmp_path):
    cfg = small_run.tiny(str(tmp_path))
    held = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, held_out=4))
    study = dataclasses.replace(cfg.study, learning_rates=(1e-4, 5e-4), equal_time="voco")
    studied = dataclasses.replace(cfg, study=study)
    for given, rates in ((cfg, ()), (held, (0.0015, 0.003, 0.006)), (studied, (1e-4, 5e-4))):
        found = sweep.run_config(given, sweep.plan(given, ["ldp"], (4,))[0])
        assert found.study.learning_rates == rates and found.study.equal_time == "pooled"


def test_a_projector_needs_a_recipe(tmp_path):
    cfg = small_run.tiny(str(tmp_path))
    alone = dataclasses.replace(cfg, stages={"base": cfg.stages["base"]})
    with pytest.raises(ValueError, match="no stage begins from 'base' with another projector or a VoCo mask"):
        sweep.plan(alone, ["ldp"], (4,))


def test_every_method_has_a_row_at_some_budget():
    """At the default ones, on 64 patches; the reason is known where there is none."""
    cfg = small_run.load_file(small_run.ROOT / "configs" / "quickstart.py").run_config()
    lines, refused = sweep.plan(cfg, ["all"], sweep.BUDGETS)
    missing = set(sweep.named(cfg, ["all"])) - {line.method for line in lines}
    assert missing == {"linear"}
    assert {line.reason for line in refused if line.method == "linear"} == {
        f"{tokens} tokens cannot be made of 8 x 8 patches, but 64" for tokens in sweep.BUDGETS
    }
    rows = {line.name: line.row.method for line in lines}
    assert rows["visionzip_restore 16"].options == {"restore": 0.5}
    assert rows["tome 16"].options == {} and rows["tome 9"].options == {"inflect": -0.5}
    # Published for 576 patches: 32 neighbours, 16 crops, 13.5 tokens a rank.
    assert rows["prumerge 16"].options == {"neighbours": 4} and rows["holov 16"].options == {"crops": 2}
    assert rows["sparsevlm_v1 32"].decoder_scale == 1.5
    # Of few tokens some are chosen by how unlike the pivots they are.
    assert [rows[f"dart {tokens}"].options["pivots"] for tokens in (1, 4, 16)] == [1, 1, 4]


def test_the_runs_own_variants_are_not_taken_for_the_method(tmp_path):
    cfg = small_run.tiny(str(tmp_path))
    method = MethodConfig(encoder="cls_attention", tokens=4, options={"order": "lowest"})
    cfg = dataclasses.replace(cfg, rows={**cfg.rows, "lowest": dataclasses.replace(cfg.rows["upper"], method=method)})
    lines, _ = sweep.plan(cfg, ["cls_attention", "cls_attention_lowest"], (4,))
    assert [line.row.method.options for line in lines] == [{}, {"order": "lowest"}]


def test_pictures_are_held_out_of_the_trainings_alone(tmp_path):
    cfg = small_run.tiny(str(tmp_path))
    lines, _ = sweep.plan(cfg, ["ldp", "tome"], (4, 15), held_out=3)
    assert [line.data.held_out for line in lines] == [3, 0, 0] and lines[0].row.stage == "ldp-4-heldout3"
    assert len(sweep.run_config(cfg, lines[:1]).study.learning_rates) == 3
    for data in (dataclasses.replace(cfg.data, held_out=4), dataclasses.replace(cfg.data, name="scenes")):
        with pytest.raises(ValueError, match="--held_out=3 must be 0 for these data"):
            sweep.plan(dataclasses.replace(cfg, data=data), ["ldp"], (4,), held_out=3)


def test_trainings_of_another_length_are_all_of_it(tmp_path):
    cfg = small_run.tiny(str(tmp_path))
    own, _ = sweep.plan(cfg, ["ldp", "tome"], (4, 15))
    lines, _ = sweep.plan(cfg, ["ldp", "tome"], (4, 15), steps=7, held_out=3)
    assert lines[0].row.stage == "ldp-4-heldout3-for7" and lines[1:] == own[1:]
    stages = sweep.run_config(cfg, lines[:1]).stages
    # The stage that says how long a training takes is as long.
    assert [stages[name].steps for name in ("pooled", lines[0].row.stage)] == [7, 7]
    assert dataclasses.replace(lines[0].training, steps=own[0].training.steps) == own[0].training
    with pytest.raises(ValueError, match="--steps=-1 must be 0, for trainings as long as the run's own, or above"):
        sweep.plan(cfg, ["tome"], (15,), steps=-1)


def test_table_and_files(run):
    _, workdir = run
    folder = workdir.eval / "methods"
    summary = {row["method"]: row for row in json.loads((folder / "summary.json").read_text())}
    assert list(summary) == [
        *("question-only prior", "lower", "upper", "downsample 1", "cls_attention 1", "cls_attention 3"),
        *("cdpruner 1", "cdpruner 3", "fastv 8", "nested_pool 1"),
    ]
    refused = json.loads((folder / "refused.json").read_text())
    assert [(line["method"], line["tokens"]) for line in refused] == [("downsample", 3), ("nested_pool", 3)]
    for name, row in summary.items():
        assert (row["prefill_ms"] is None) == (name in ("question-only prior", "lower"))
    assert summary["cls_attention 1"]["prefill_ms"] == summary["downsample 1"]["prefill_ms"]
    trained = summary["nested_pool 1"]
    assert trained["seeds"] == 2 and trained["learning_rate"] == 1e-3 and trained["note"].startswith("one training")
    assert trained["train_seconds"] == 0.5 and trained["accuracy_equal_time"] is not None
    steps = {line["stage"]: line["step"] for line in read_metrics(workdir.root)}
    once, twice = ([f"nested_pool-lr0.001-seed{seed}{longer}" for seed in (0, 1)] for longer in ("", "-steps2"))
    assert steps == {"base": 1, **dict.fromkeys(once, 1), **dict.fromkeys(twice, 2)}
    assert (
        summary["fastv 8"]["visual_tokens"] == 16
        and summary["fastv 8"]["prefill_flops"] < summary["upper"]["prefill_flops"]
    )
    assert [summary[name]["layer_tokens"] for name in ("upper", "fastv 8", "cdpruner 3")] == [16, (16 + 8) / 2, 3]
    # CDPruner has all patches projected before it chooses, downsampling looks at a smaller picture.
    pictures = [summary[name]["picture_flops"] for name in ("downsample 1", "cls_attention 3", "upper", "cdpruner 3")]
    assert pictures == sorted(set(pictures))
    assert summary["fastv 8"]["decode_flops"] < summary["upper"]["decode_flops"]
    text = (folder / "table.txt").read_text()
    assert "prefill ms" in text and "| cdpruner 3 |" in (folder / "table.md").read_text()
    assert all((workdir.figures / f"{name}.png").stat().st_size > 1000 for name in ("methods", "methods_kept"))


def test_a_second_call_measures_nothing(run, monkeypatch):
    _, workdir = run
    before = {path: path.read_bytes() for path in workdir.eval.rglob("*.json")}
    for name in ("measure", "score"):
        monkeypatch.setattr(SharedRunner, name, None)
    monkeypatch.setattr(training, "train_stage", None)
    monkeypatch.setattr(sweep_times, "interleave", None)
    text = evaluate.run(workdir, methods=ASKED, budgets=BUDGETS)
    assert {path: path.read_bytes() for path in workdir.eval.rglob("*.json")} == before
    assert (workdir.eval / "methods" / "table.txt").read_text().strip() in text
    assert "downsample 3: 3 tokens are no smaller square grid" in text
    assert "the time of stage 'pooled'; VoCo's rows were not" in text
    # A part of it: what was written of the others stays, and so do their refusals.
    evaluate.run(workdir, methods=("fastv", "cls_attention"), budgets=(1,))
    assert {path: path.read_bytes() for path in workdir.eval.rglob("*.json")} == before


def test_a_piece_of_a_sweep_renews_what_it_shares_with_others(run, monkeypatch):
    """Rows of earlier pieces: their times where they share a program, and their panels in the figure."""
    _, workdir = run
    path, drawn = workdir.eval / "methods" / "prefill.json", []
    before = path.read_text()
    kept = json.loads(before)
    path.write_text(json.dumps({**kept, "programs": kept["programs"] | {"1 tokens": 123.0, "3 tokens": 321.0}}))
    monkeypatch.setattr(sweep_report.plots, "kept_tokens_figure", lambda *given: drawn.append(given))
    evaluate.run(workdir, methods=("downsample",), budgets=(1,))
    table_of = {row["method"]: row for row in json.loads((workdir.eval / "methods" / "summary.json").read_text())}
    path.write_text(before)
    found = {name: table_of[name]["prefill_ms"] for name in ("downsample 1", "cls_attention 1", "cls_attention 3")}
    assert found == {"downsample 1": 123.0, "cls_attention 1": 123.0, "cls_attention 3": 321.0}
    [(pictures, panels, to)] = drawn
    assert to.name == "methods_kept.png" and pictures.shape == (2, 64, 64, 3)
    assert [[panel.title for panel in column] for column in panels] == [["downsample", "cls_attention", "cdpruner"]] * 2


def test_what_was_measured_besides_stays_in_the_table(run):
    cfg, workdir = run
    folder = workdir.eval / "methods"
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    [line], _ = sweep.plan(cfg, ["downsample"], (1,))
    row = json.loads(config_io.to_json(line.row))
    (folder / "bf16.json").write_text(json.dumps({line.name: {"bf16_agreement": 0.25, "row": row}}))
    found = []
    for seed in (0, 1):  # as kept, and of another row
        (folder / "second_turn.json").write_text(
            json.dumps({line.name: {"kept": 0.5, "again": None, "row": {**row, "seeds": row["seeds"] + seed}}})
        )
        evaluate.run(workdir, methods=("downsample",), budgets=(1,))
        table_of = {row["method"]: row for row in json.loads((folder / "summary.json").read_text())}
        found.append([table_of[line.name][name] for name in ("bf16_agreement", "second_kept")])
    for path in folder.glob("*.*"):
        path.unlink()
    for path, text in before.items():
        path.write_bytes(text)
    assert found == [[0.25, 0.5], [0.25, None]]


def test_the_runs_own_voco_rows_stand_beside_the_others(run, tmp_path):
    """Out of its table, with the time of a question read from the cache; one that picks its number has none."""
    cfg, workdir = run
    voco = {"VoCo 2": cfg.rows["lower"], "k=auto": cfg.rows["lower"]}
    voco["VoCo 2"] = dataclasses.replace(voco["VoCo 2"], method=dataclasses.replace(voco["VoCo 2"].method, voco=2))
    voco["k=auto"] = dataclasses.replace(voco["k=auto"], auto=AutoConfig(ladder=(1,), threshold=0.1))
    cfg = dataclasses.replace(cfg, rows={**cfg.rows, **voco})
    other = Workdir(tmp_path)
    for name in ("checkpoints", "tokenizer.json", "eval/rows", "eval/methods/rows"):
        (other.root / name).parent.mkdir(parents=True, exist_ok=True)
        (other.root / name).symlink_to(workdir.root / name)
    numbers = {"visual_tokens": 2, "accuracy_by_type": {}, "accuracy_not_yes_no": None, "prefill_flops": 7.0}
    numbers |= {"accuracy_equal_time": 0.5, "spread_equal_time": 0.0}
    rows = [RowResult(method=name, accuracy=0.75, **numbers) for name in ("lower", "VoCo 2", "k=auto")]
    table.write(rows, other.eval)
    lines, _ = sweep.plan(cfg, ["cls_attention"], (3,))
    with jax.set_mesh(mesh := sharding.make_mesh(cfg.mesh)):
        work = sweep_run.Sweep.create(cfg, other, mesh, lines)
        [found] = work.rows()
    assert [row.method for row in found] == [
        *("question-only prior", "lower", "k=auto", "upper", "VoCo 2", "cls_attention 3")
    ]
    times = {row.method: row.prefill_ms for row in found}
    assert times["lower"] is None and times["k=auto"] is None and times["VoCo 2"] > 0
    kept = json.loads((other.eval / "methods" / "prefill.json").read_text())
    programs = {"VoCo 2": "2 VoCo tokens, voco", "cls_attention 3": "3 tokens", "upper": "16 tokens"}
    assert kept["rows"] == programs and set(kept["programs"]) == set(programs.values())
    assert kept["programs"]["2 VoCo tokens, voco"] == times["VoCo 2"]
    assert found[4].accuracy == 0.75 and found[4].accuracy_equal_time is None


def test_rows_of_one_question_are_no_longer_than_they_need(run):
    """Trained without padding; what equal time is measured by has the run's rows, and reading has room for more."""
    cfg, workdir = run
    lines, _ = sweep.plan(cfg, ["llamavid", "ldp"], (4,))
    work = sweep_run.Sweep.create(cfg, workdir, sharding.make_mesh(cfg.mesh), lines)
    alone, other = work.lines
    tokenizer, longest = workdir.load_tokenizer(cfg.data), 0
    for split in ("train", "test"):
        source = sources.load(cfg.data, split)
        for text in map(source.text, range(len(source))):
            for asked in zip(text["questions"], text["answers"]):
                longest = max(longest, 4 + sum(len(tokenizer.encode(part).ids) for part in asked))
    assert alone.data.text_length == longest < cfg.data.text_length == other.data.text_length
    study = work.study([alone])
    assert study.cfg.data.text_length == longest and study.cfg.data.questions == 1
    assert study.timed_in["pooled"].data == cfg.data
    assert work._note(alone) == "trained with one question a row, where others have 2.0"


def opened(run, name, memory=None):
    """(line, runner, parameters) of a row of the sweep."""
    cfg, workdir = run
    method, _, tokens = name.partition(" ")
    [line] = sweep.plan(cfg, [method], (int(tokens),))[0]
    mesh = sharding.make_mesh(cfg.mesh)
    runner = SharedRunner.create(sweep.run_config(cfg, [line]), workdir, mesh)
    runner = dataclasses.replace(runner, memory=memory or Memory(("cls_attention_BP",)))
    return line, runner, runner.load(line.row)


@pytest.mark.parametrize("name", ["random 3", "downsample 4", "cdpruner 3", "fastv 8"])
def test_shared_looks_and_programs_change_no_answer(run, name):
    """The logits of every answer against those of the whole model run on every row."""
    line, runner, params = opened(run, name)
    model, method, memory = runner.cfg.model, line.row.method, runner.memory
    with jax.set_mesh(runner.mesh):
        batch = runner.rows()[0]
        assert batch["ids"].shape[1] < runner.cfg.data.text_length
        visual = runner.encode(params, method, batch, jax.random.key(5))
        assert np.all(np.sum(visual.valid_BM, axis=1) == (16 if name == "fastv 8" else line.tokens))
        assert visual.valid_BM.shape[1] == 16
        inputs = {key: batch[key] for key in ("ids", "thread", "sample", "supervised")}
        options = {"questions": batch["question"].shape[1], "max_targets": 8}

        def whole(params, inputs, images, example):
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), example)
            return step.answers(model, method, params, {**inputs, "images": images}, key=keys, **options)

        def shared(params, inputs, visual):
            return step.answers(model, reading(method), params, inputs, visual=visual, **options)

        images = memory.images[np.maximum(batch["example"], 0)]
        expected = jax.jit(whole)(params, inputs, images, batch["example"])
        found = jax.jit(shared)(language_model(params), inputs, jax.device_get(visual))
    real = batch["question"] >= 0
    assert np.any(real)
    np.testing.assert_allclose(np.asarray(found[1])[real], np.asarray(expected[1])[real], rtol=1e-4, atol=1e-4)


def test_rows_are_measured_side_by_side_on_one_cpu_device(monkeypatch):
    """Two wait for one another, under the mesh of the caller; results stand in order; the first error ends it."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    both, begun = threading.Barrier(2, timeout=60), []

    def meet(number):
        both.wait()
        return number, jax.sharding.get_mesh() == mesh

    assert side_by_side(mesh, meet, range(4)) == [(number, True) for number in range(4)]

    def fail(number):
        begun.append(number)
        if number == 0:
            raise ValueError("row 0")
        time.sleep(0.01)

    with pytest.raises(ValueError, match="row 0"):
        side_by_side(mesh, fail, range(100))
    assert len(begun) < 100
    several = sharding.make_mesh(MeshConfig(), jax.devices()[:2])
    threads = side_by_side(several, lambda _: threading.current_thread(), range(2))
    assert threads == [threading.current_thread()] * 2


def test_parameters_of_one_stage_are_loaded_once(run, monkeypatch):
    line, runner, params = opened(run, "random 3")
    loaded = []
    monkeypatch.setattr(Runner, "load", lambda self, row: loaded.append(row.stage) or params)
    other = dataclasses.replace(line.row, stage="other")
    for row in (line.row, line.row, other, line.row):
        runner.load(row)
    assert loaded == ["other", line.row.stage]


def test_every_question_counts_once_by_its_type(run, monkeypatch):
    line, runner, params = opened(run, "random 3")

    def encode(self, params, method, batch, key):
        return SimpleNamespace(valid_BM=jnp.arange(3) <= batch["example"][:, None] % 2)  # one slot is filled, or two

    monkeypatch.setattr(SharedRunner, "encode", encode)
    monkeypatch.setattr(SharedRunner, "read", lambda self, params, method, batch, visual: batch["question"] % 2 == 0)
    score, _ = runner.score(params, line.row.method, 0)
    numbers = [number for number, text in enumerate(runner.examples) for _ in text["types"]]
    assert score.filled == np.mean([1 + number % 2 for number in numbers]) and len(set(numbers)) == 4
    note = f"{score.filled:.4g} of 3 slots are filled on average"
    assert runner.measure(line.name, line.row).note == note
    kinds = [(kind, number % 2 == 0) for text in runner.examples for number, kind in enumerate(text["types"])]
    assert len(kinds) == 8 and score.accuracy == np.mean([right for _, right in kinds])
    for name in {kind for kind, _ in kinds}:
        assert score.by_type[name] == np.mean([right for kind, right in kinds if kind == name])


def test_second_turns_keep_the_first_choice(run, monkeypatch):
    """Of the second of two questions: CDPruner's tokens are those for the first one, and not those for itself."""
    memory = Memory()
    line, runner, _ = opened(run, "cdpruner 3", memory)
    runner.rows()
    # No two patches are alike, as those of a plain ground are: between them rounding would choose.
    memory.images = np.random.default_rng(0).integers(0, 256, memory.images.shape, np.uint8)
    seen = {}

    def spy(self, params, method, batch, visual, *, turns=False):
        assert turns
        for row in np.flatnonzero(batch["example"] >= 0):
            seen[batch["question"].shape[1], int(batch["example"][row]), int(batch["question"][row, 0])] = np.asarray(
                visual.tokens_BMD[row]
            )
        return batch["question"] == self.cfg.data.questions - 1

    monkeypatch.setattr(SharedRunner, "read", spy)
    with jax.set_mesh(runner.mesh):
        found = second_turn.measure(runner, line)
    # The spy calls the second question right in rows of two, and the first one in rows of one.
    assert found == {"kept": 1.0, "again": 0.0, "questions": 4}
    for example in range(4):
        np.testing.assert_allclose(seen[2, example, 0], seen[1, example, 0], rtol=1e-5, atol=1e-6)
        assert (1, example, 1) in seen


def test_bfloat16_keeps_nearly_the_same_places(run, monkeypatch, tmp_path):
    """All of them where chance chooses; most where scores do; all again where the other model is no other."""
    cfg, workdir = run
    lines, _ = sweep.plan(cfg, ["random", "cls_attention", "cdpruner", "fastv"], (3,))
    lines += sweep.plan(cfg, ["visionzip"], (1,))[0]  # the CLS token, which stands at no place
    with jax.set_mesh(mesh := sharding.make_mesh(cfg.mesh)):
        work = sweep_run.Sweep.create(cfg, workdir, mesh, lines)
        found = agreement.measure_all(work, tmp_path)
        values = {name: columns["bf16_agreement"] for name, columns in found.items()}
        assert values.pop("visionzip 1") is None
        assert set(values) == {"random 3", "cls_attention 3", "cdpruner 3"} and values["random 3"] == 1
        assert all(0.5 < value <= 1 for value in values.values())
        line = next(line for line in lines if line.method == "cdpruner")
        runner = work.runner(line)
        assert agreement.measure(line, runner, runner) == 1
        other = dataclasses.replace(line.row.method, options={"compare": "patches"})
        read = SharedRunner.encode

        def changed(self, params, method, batch, key):
            return read(self, params, other if self is not runner else method, batch, key)

        monkeypatch.setattr(SharedRunner, "encode", changed)
        assert agreement.measure(line, runner, dataclasses.replace(runner)) < 1
    monkeypatch.setattr(agreement, "measure", None)
    for missing in (True, False):
        assert agreement.measure_all(work, tmp_path, missing=missing) == found


def test_second_turns_of_every_line_are_kept(run, monkeypatch, tmp_path):
    cfg, workdir = run
    lines, _ = sweep.plan(cfg, ["cls_attention", "nested_pool"], (1,))
    work = sweep_run.Sweep.create(cfg, workdir, sharding.make_mesh(cfg.mesh), lines)
    read = []
    numbers = {"kept": 0.5, "again": None, "questions": 4}
    monkeypatch.setattr(second_turn, "measure", lambda runner, line: read.append(line.row.stage) or numbers)
    columns = {"second_kept": 0.5, "second_again": None}
    assert second_turn.measure_all(work, tmp_path, missing=False) == {}
    for _ in range(2):
        assert second_turn.measure_all(work, tmp_path) == dict.fromkeys(("cls_attention 1", "nested_pool 1"), columns)
    assert read == ["base", "nested_pool-lr0.001-seed0"]
    work.base.examples[:] = [{**example, "questions": example["questions"][:1]} for example in work.base.examples]
    with pytest.raises(ValueError, match="--second_turn needs pictures with two questions"):
        second_turn.check(work.base)
