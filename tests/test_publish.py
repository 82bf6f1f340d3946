"""A published run: a workdir with its results and the parameters of chosen stages, from which the work goes on."""

import dataclasses
import json
import shutil
import tarfile

import jax
import numpy as np
import pytest
import small_run

from tokzip_jax import checkpoint, environment, publish, recipe, sharding, training
from tokzip_jax.config import OptimConfig
from tokzip_jax.metrics import MetricWriter
from tokzip_jax.paths import flatten
from tokzip_jax.workdir import Workdir

evaluate = small_run.load_file(small_run.ROOT / "eval.py")


@pytest.fixture(scope="module")
def run(one_device, tmp_path_factory):
    """(config, workdir) of a run of two short stages, measured."""
    folder = tmp_path_factory.mktemp("publish")
    cfg = small_run.tiny(small_run.build_data(folder))
    names = ("question-only prior", "lower", "upper")
    base = dataclasses.replace(cfg.stages["base"], steps=1, optim=OptimConfig())
    stages = {"base": base, "more": dataclasses.replace(base, init_from="base")}  # one program for both
    rows = {name: cfg.rows[name] for name in names}
    cfg = dataclasses.replace(
        cfg, stages=stages, rows=rows, eval=dataclasses.replace(cfg.eval, order=names, pictures=0, limit=4)
    )
    workdir = Workdir(folder / "run")
    workdir.open(cfg)
    workdir.append_json("environment.json", environment.describe(0))
    with jax.set_mesh(mesh := sharding.make_mesh(cfg.mesh)), MetricWriter(workdir.root) as writer:
        for name in stages:
            training.train_stage(cfg, name, mesh, workdir, writer)
    evaluate.run(workdir)
    return cfg, workdir


def test_the_work_goes_on_from_what_was_published(run, tmp_path):
    cfg, workdir = run
    # A training that was made for a table and not measured yet stays behind: it would count as done there.
    for name in ("lr0.1", "lr0.2", "lr0.3"):
        shutil.copytree(workdir.checkpoints("more"), workdir.checkpoints(f"more-{name}"), dirs_exist_ok=True)
    # Of two others one is asked for, and of one there is a row.
    row = json.loads((workdir.eval / "rows" / "upper.json").read_text())
    row["origin"]["row"]["stage"] = "more-lr0.3"
    (workdir.eval / "rows" / "upper more-lr0.3.json").write_text(json.dumps(row))
    names = publish.publish(workdir, tmp_path / "some" / "run.tar.gz", ["base", "more-lr0.2"])
    other = Workdir(tmp_path / "other")
    with tarfile.open(tmp_path / "some" / "run.tar.gz") as archive:
        archive.extractall(other.root, filter="data")
    assert names == sorted(path.relative_to(other.root).as_posix() for path in other.root.rglob("*") if path.is_file())
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["run.tar.gz"]
    [was], [told] = (json.loads((where.root / "environment.json").read_text()) for where in (workdir, other))
    assert told == {key: value for key, value in was.items() if key != "command"} and "command" in was
    kept = {path.parent.name for path in (other.root / "checkpoints").glob("*/FINAL.json")}
    assert kept == {"base", "more", "more-lr0.2", "more-lr0.3"}
    assert len(checkpoint.stored_paths(other.checkpoints("more-lr0.2"))) > 0
    # Both stages count as trained; one has parameters, the same ones, and nothing of its optimiser.
    assert [checkpoint.finished(other.checkpoints(name)) for name in cfg.stages] == [1, 1]
    first, second = (flatten(checkpoint.read_params(where.checkpoints("base"))) for where in (workdir, other))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert checkpoint.read_info(other.checkpoints("base")) == checkpoint.read_info(workdir.checkpoints("base"))
    assert len(checkpoint.stored_paths(other.checkpoints("base"))) == len(first)
    assert not any("opt_state" in path.read_text(errors="replace") for path in other.root.rglob("_METADATA"))
    with pytest.raises(FileNotFoundError, match="trained to its end, but its parameters are not there"):
        checkpoint.read_params(other.checkpoints("more"))
    # The table is there, and comes out the same when it is measured again.
    kept = json.loads((workdir.eval / "summary.json").read_text())
    assert json.loads((other.eval / "summary.json").read_text()) == kept
    (other.eval / "summary.json").unlink()
    evaluate.run(other, again=True)
    assert json.loads((other.eval / "summary.json").read_text()) == kept


def test_the_published_base_model_is_that_of_the_study(tmp_path):
    """`docs/results/scenes/base.tar.gz`: a workdir that `configs/scenes.py` goes on in, its base model trained."""
    with tarfile.open(small_run.ROOT / "docs" / "results" / "scenes" / "base.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    workdir, cfg = Workdir(tmp_path), small_run.load_file(small_run.ROOT / "configs" / "scenes.py").run_config()
    workdir.open(cfg)  # refuses another config
    assert [checkpoint.finished(workdir.checkpoints(name)) for name in ("clip", "base")] == [600, 7000]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"clip", "base"}
    shapes = recipe.shapes(cfg, "mlp2x_gelu", cfg.stages["base"].lora)
    assert checkpoint.absent(workdir.checkpoints("base"), shapes) == []
    assert workdir.load_tokenizer(cfg.data).get_vocab_size() <= cfg.model.llm.vocab_size


def test_what_is_refused(run, tmp_path):
    _, workdir = run
    for where, output, stages, words in (
        (workdir, "run.zip", [], "must end in .tar.gz"),
        (workdir, "run.tar.gz", ["voco"], "stage 'voco' has no finished checkpoint in"),
        (Workdir(tmp_path / "none"), "run.tar.gz", [], "no run in"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            publish.publish(where, tmp_path / output, stages)
    assert list(tmp_path.iterdir()) == []


def test_command_line(run, tmp_path, capsys):
    _, workdir = run
    publish.main([f"--workdir={workdir.root}", f"--output={tmp_path / 'run.tar.gz'}"])
    assert capsys.readouterr().out.endswith(f" MB, in {tmp_path / 'run.tar.gz'}\n")
    with tarfile.open(tmp_path / "run.tar.gz") as archive:
        assert "checkpoints/base/FINAL.json" in archive.getnames() and "eval/summary.json" in archive.getnames()
        assert not any("state" in name for name in archive.getnames())
    with pytest.raises(SystemExit, match="error: stage 'voco' has no finished checkpoint"):
        publish.main([f"--workdir={workdir.root}", f"--output={tmp_path / 'run.tar.gz'}", "--stages=base,voco"])
