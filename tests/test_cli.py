"""The two entries: what they refuse and how, what a run leaves behind, and that eval.py repeats its numbers."""

import contextlib
import dataclasses
import io
import json
import math
import sys
from pathlib import Path

import jax
import pytest
from small_run import ROOT, build_data, finish, load_file, one_stage, start, tiny

from tokzip_jax import config_io, entry, metrics, training
from tokzip_jax.checkpoint import Checkpointer, save_params
from tokzip_jax.config import MeshConfig, MethodConfig
from tokzip_jax.evals.runner import Runner
from tokzip_jax.workdir import Workdir

train, evaluate = load_file(ROOT / "train.py"), load_file(ROOT / "eval.py")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return build_data(tmp_path_factory.mktemp("data"))


def change(cfg, path, value):
    """The config with one field changed; path words between dots."""
    name, _, rest = path.partition(".")
    if isinstance(cfg, dict):
        return {**cfg, name: change(cfg[name], rest, value) if rest else value}
    return dataclasses.replace(cfg, **{name: change(getattr(cfg, name), rest, value) if rest else value})


def refused(cfg, root, monkeypatch):
    """The message with which a run is refused, before any stage is prepared or any file written."""

    def never(*_):
        raise AssertionError("this should have been refused before anything is compiled")

    monkeypatch.setattr(training, "train_stage", never)
    with pytest.raises((ValueError, FileNotFoundError, ModuleNotFoundError)) as error:
        train.run(cfg, Workdir(root))
    assert not root.exists()
    message = str(error.value)
    assert "\n" not in message
    return message


VISIONZIP = MethodConfig(encoder="visionzip", tokens=99, options={"contextual": 2})
BAD = [
    ("rows.VisionZip 4.method", VISIONZIP, ["rows.VisionZip 4.method", "tokens", "99", "17"]),
    ("stages.voco.method.voco", 0, ["stages.voco.method.voco = 0 with the VoCo mask 'voco'", "voco >= 1"]),
    ("stages.base.batch_size", 6, ["stages.base.batch_size = 6 rows must be a multiple", "data axis, 8"]),
    ("stages.base.optim.accumulate", 2, ["stages.base.batch_size / stages.base.optim.accumulate = 4", "data axis, 8"]),
    ("eval.batch_size", 12, ["eval.batch_size = 12 rows must be a multiple", "data axis, 8"]),
    ("mesh.model", 3, ["mesh.model = 3 must divide the number of devices, 8"]),
    ("mesh", MeshConfig(data=2, model=2), ["mesh.data x mesh.model = 2 x 2", "8"]),
    ("platform", "tpu", ["platform = 'tpu', but JAX found 8 x cpu", "--config.platform="]),
    ("platform", "accelerator", ["platform = 'accelerator', but JAX found 8 x cpu", "a TPU or GPU"]),
    ("stages.voco.train", ("llm/.*", "vocos/.*"), ["stages.voco.train: train pattern 'vocos/.*' matches no parameter"]),
    ("stages.voco.init_from", "no/such/place", ["stages.voco.init_from: no checkpoint at", "no/such/place"]),
    ("rows.lower.method.projector", "linear", ["rows.lower.method.projector = 'linear'", "'mlp2x_gelu'"]),
    ("data.name", "easy_vqq", ["data.name = 'easy_vqq' is unknown; choose one of clips, easy_vqa, llava_json"]),
    ("data.on_error", "raise", ["data.on_error", "skipped.jsonl"]),
]


@pytest.mark.parametrize(("path", "value", "words"), BAD, ids=[case[0] for case in BAD])
def test_what_cannot_work_is_one_sentence(path, value, words, data_dir, tmp_path, monkeypatch):
    message = refused(change(tiny(data_dir), path, value), tmp_path / "run", monkeypatch)
    for word in words:
        assert word in message


def test_a_checkpoint_of_another_model(data_dir, tmp_path, monkeypatch):
    save_params(tmp_path / "other", {"vit": {"cls": jax.numpy.ones(7)}})
    cfg = change(tiny(data_dir), "stages.voco.init_from", str(tmp_path / "other"))
    message = refused(cfg, tmp_path / "run", monkeypatch)
    assert message.startswith(f"stages.voco.init_from: checkpoint {tmp_path / 'other'} is of another model: ")
    assert "llm/embed/table is missing there" in message


def test_a_missing_data_set(data_dir, tmp_path, monkeypatch):
    cfg = change(tiny(data_dir), "data.data_dir", str(tmp_path / "nothing"))
    with monkeypatch.context() as hidden:
        hidden.setitem(sys.modules, "easy_vqa", None)
        message = refused(cfg, tmp_path / "run", monkeypatch)
    assert "pip install easy-vqa" in message and "data.data_dir" in message
    cfg = change(change(cfg, "data.name", "llava_json"), "data.tokenizer", "some/tokenizer.json")
    message = refused(cfg, tmp_path / "run", monkeypatch)
    assert f"{tmp_path / 'nothing' / 'llava.json'} does not exist" in message and "data.data_dir" in message


def test_only_what_we_say_ourselves_goes_without_its_traceback():
    for function, argument in ((json.loads, "{"), (Path.read_text, Path("no/file"))):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            function(argument)
        assert not entry._said_by_us(error.value)
    with pytest.raises(FileNotFoundError) as error:
        Workdir(Path("no/run")).read_config()
    assert entry._said_by_us(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train.py", "--config=configs/tiny.py", "--config.stages.base.optim.learning_rat=1"],
            "error: unknown config key stages.base.optim.learning_rat; did you mean stages.base.optim.learning_rate",
        ),
        (["eval.py"], "error: no run in "),
    ],
)
def test_a_mistake_ends_in_one_sentence_and_exit_code_one(arguments, message, tmp_path):
    code, out, err = finish(start([*arguments, f"--workdir={tmp_path / 'run'}"]))
    assert code == 1 and not out
    assert err.strip().splitlines()[-1].startswith(message)
    assert "Traceback" not in err and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(data_dir, tmp_path):
    cfg = tiny(data_dir, log_every=100, checkpoint_every=1, rows={})
    cfg = one_stage(dataclasses.replace(cfg, rows=tiny(data_dir).rows), steps=6)
    optim = dataclasses.replace(cfg.stages["base"].optim, learning_rate=1e30, warmup_steps=2)
    cfg = change(cfg, "stages.base.optim", optim)
    with pytest.raises(entry.NotFinite, match=r"stage 'base', step \d: (loss|grad_norm) is (nan|inf)") as error:
        train.run(cfg, Workdir(tmp_path))
    last = metrics.read_metrics(tmp_path)[-1]  # written although it was not its turn
    values = [float(last[name]) for name in ("loss", "grad_norm")]
    assert not all(map(math.isfinite, values)) and f"step {last['step']}:" in str(error.value)
    with Checkpointer(Workdir(tmp_path).checkpoints("base")) as saved:
        assert saved.latest == last["step"] - 1
    assert f"the last good checkpoint is step {saved.latest}" in str(error.value)
    assert not (tmp_path / "eval").exists()


@pytest.fixture(scope="module")
def tiny_run(data_dir, tmp_path_factory):
    """The tiny recipe run to its end on eight devices: (config, workdir, what it printed)."""
    # Steps enough for an answer to be right now and then.
    cfg = change(tiny(data_dir, checkpoint_every=30), "stages.base.steps", 60)
    workdir = Workdir(tmp_path_factory.mktemp("tiny") / "run")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train.run(cfg, workdir)
    return cfg, workdir, printed.getvalue()


def summary(workdir):
    return json.loads((workdir.eval / "summary.json").read_text())


@pytest.mark.slow
def test_what_a_run_leaves_behind(tiny_run):
    cfg, workdir, printed = tiny_run
    assert printed.startswith("devices: 8 x cpu (cpu)\n")
    assert "not in base and made fresh: projector/avgpool_linear/fc/b, projector/avgpool_linear/fc/w\n" in printed
    assert [row["method"] for row in summary(workdir)] == list(cfg.eval.order)
    assert next(row["accuracy"] for row in summary(workdir) if row["method"] == cfg.eval.upper) > 0
    for name in ("table.md", "table.txt"):
        assert (workdir.eval / name).read_text()
    assert (workdir.eval / "table.txt").read_text() in printed
    for name in ("retention.png", "kept_tokens.png"):
        assert (workdir.figures / name).stat().st_size > 1000
    assert workdir.read_config() == cfg
    (environment,) = json.loads((workdir.root / "environment.json").read_text())
    assert environment["devices"] == 8 and environment["seed"] == 0
    seen = [(line["stage"], line["step"]) for line in metrics.read_metrics(workdir.root)]
    assert seen == [(n, s) for n in ("base", "pooled", "voco") for s in range(1, cfg.stages[n].steps + 1)]
    assert all((workdir.root / "tensorboard" / name).is_dir() for name in cfg.stages)


@pytest.mark.slow
def test_eval_repeats_the_table(tiny_run, monkeypatch):
    cfg, workdir, printed = tiny_run
    before = summary(workdir)
    measured = []
    original = Runner.measure

    def measure(self, name, row):
        measured.append(name)
        return original(self, name, row)

    monkeypatch.setattr(Runner, "measure", measure)
    assert printed.endswith(evaluate.run(workdir) + "\n")
    some = evaluate.run(workdir, rows=("VoCo 1", "lower"))
    assert [line.split("  ")[0] for line in some.splitlines()[2:4]] == ["lower", "VoCo 1"]
    assert not measured
    again = evaluate.run(workdir, rows=("upper",), again=True)
    assert sorted(measured) == ["lower", "upper"]
    assert again.splitlines()[2].split() in [line.split() for line in printed.splitlines()]
    assert summary(workdir) == before
    # On another mesh, which train.py would refuse for this workdir.
    other = change(cfg, "mesh", MeshConfig(data=4, model=2))
    assert printed.endswith(evaluate.run(workdir, other) + "\n")
    with pytest.raises(ValueError, match=r"belongs to a run with another config \(mesh\.data: -1 -> 4"):
        train.run(other, workdir)
    with pytest.raises(ValueError, match=r"another config \(stages\.base\.steps: 60 -> 7\): give the config"):
        train.run(change(cfg, "stages.base.steps", 7), workdir)


@pytest.mark.slow
def test_eval_of_parameters_from_elsewhere(tiny_run, tmp_path, monkeypatch):
    cfg, workdir, _ = tiny_run
    params = Runner.create(cfg, workdir, train.entry.start(cfg)).load(cfg.rows["upper"])
    path = str(tmp_path / "converted")
    save_params(path, {name: params[name] for name in ("vit", "projector", "llm", "voco")})
    there = Workdir(tmp_path / "there")
    text = evaluate.run(there, cfg, checkpoint=path, rows=("upper", "lower"))
    # A run's own results are not touched, wherever those of a checkpoint go.
    [folder] = (there.eval / "checkpoints").iterdir()
    assert folder.name.startswith("converted-") and sorted(there.eval.iterdir()) == [folder.parent]
    assert sorted(row.stem for row in (folder / "rows").iterdir()) == ["lower", "upper"]
    lines = (workdir.eval / "table.txt").read_text().splitlines()
    assert [line.split() for line in text.splitlines()[2:4]] == [lines[n].split() for n in (3, 8)]
    with pytest.raises(ValueError, match=r"of another model: projector/avgpool_linear/fc/b is missing there"):
        evaluate.run(there, cfg, checkpoint=path, rows=("average pooling 1",))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*/nowhere: there is no such directory"):
        evaluate.run(there, cfg, checkpoint=str(tmp_path / "nowhere"), rows=("upper",))


def test_what_eval_refuses(data_dir, tmp_path):
    workdir, cfg = Workdir(tmp_path / "run"), tiny(data_dir)
    for wanted in (None, cfg):
        with pytest.raises(FileNotFoundError, match=r"no run in .*/run: config\.json is missing; train first"):
            evaluate.run(workdir, wanted)
    with pytest.raises(ValueError, match="--checkpoint needs --config"):
        evaluate.run(workdir, checkpoint="somewhere")
    assert not workdir.root.exists()
    workdir.open(cfg)
    with pytest.raises(ValueError, match=r"there is no row 'uper'; choose of 'question-only prior', 'lower'"):
        evaluate.run(workdir, rows=("uper",))
    with pytest.raises(FileNotFoundError, match=r"stage 'base' has no finished checkpoint in .*: run train\.py"):
        evaluate.run(workdir)
    bare = dataclasses.replace(cfg, rows={}, eval=dataclasses.replace(cfg.eval, order=()))
    (tmp_path / "run" / "config.json").write_text(config_io.to_json(bare))
    with pytest.raises(ValueError, match="the config has no rows to measure"):
        evaluate.run(workdir)
