"""A run that is killed and started again ends like one that was not: through the real train.py, bit for bit."""

import json
import os

import jax
import numpy as np
import pytest
from small_run import build_data, config_file, finish, one_stage, start, tiny

from tokzip_jax import metrics, recipe, sharding
from tokzip_jax.checkpoint import Checkpointer, finished
from tokzip_jax.config import MeshConfig
from tokzip_jax.paths import flatten
from tokzip_jax.workdir import Workdir

# Runs train.py and ends the process from outside of Python after so many steps or rows were written.
KILLED = """
import os, runpy, signal, sys
from tokzip_jax import metrics
from tokzip_jax.evals import runner

what, last = sys.argv[1].split(":")
calls = 0

def deadly(function):
    def counted(*arguments, **named):
        global calls
        function(*arguments, **named)
        calls += 1
        if calls == int(last):
            os.kill(os.getpid(), signal.SIGKILL)
    return counted

if what == "step":
    metrics.MetricWriter.write = deadly(metrics.MetricWriter.write)
else:
    runner.write_atomically = deadly(runner.write_atomically)
sys.argv = ["train.py", *sys.argv[2:]]
runpy.run_path("train.py", run_name="__main__")
"""


def table_of(text):
    lines = text.splitlines()
    return lines[next(n for n, line in enumerate(lines) if line.startswith("method")) : -1]


def final_state(cfg, root):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = recipe.prepare(cfg, "base", mesh, Workdir(root)).abstract
    with Checkpointer(Workdir(root).checkpoints("base")) as saved:
        return saved.restore(abstract)


def data_position(root):
    files = sorted((root / "checkpoints" / "base" / "6" / "data").rglob("*.json"))
    assert files
    return [path.read_text() for path in files]


@pytest.mark.slow
def test_killed_in_training_and_in_evaluation_and_started_again(tmp_path):
    cfg = one_stage(tiny(build_data(tmp_path), log_every=1, checkpoint_every=2), steps=6)
    config = config_file(cfg, tmp_path / "config.py")
    straight, broken = tmp_path / "straight", tmp_path / "broken"

    code, out, err = finish(start(["train.py", f"--config={config}", f"--workdir={straight}"]))
    assert code == 0, err
    code, _, err = finish(start(["step:5", f"--config={config}", f"--workdir={broken}"], code=KILLED))
    assert code == -9, err
    assert [line["step"] for line in metrics.read_metrics(broken)] == [1, 2, 3, 4, 5]
    kept = [int(path.name) for path in (broken / "checkpoints" / "base").iterdir() if path.name.isdigit()]
    assert kept and max(kept) < 5 and finished(str(broken / "checkpoints" / "base")) is None

    code, _, err = finish(start(["row:2", f"--config={config}", f"--workdir={broken}"], code=KILLED))
    assert code == -9, err
    assert f"{max(kept)}/6" in err  # it went on where it was
    assert finished(str(broken / "checkpoints" / "base")) == 6 and not (broken / "eval" / "summary.json").exists()
    rows = {path: os.stat(path).st_mtime_ns for path in (broken / "eval" / "rows").glob("*.json")}
    assert len(rows) == 2

    code, again, err = finish(start(["train.py", f"--config={config}", f"--workdir={broken}"]))
    assert code == 0, err
    assert {path: os.stat(path).st_mtime_ns for path in rows} == rows  # rows that were measured are not measured again
    assert table_of(again) == table_of(out)
    assert (broken / "eval" / "summary.json").read_text() == (straight / "eval" / "summary.json").read_text()
    assert len(json.loads((broken / "environment.json").read_text())) == 3

    losses = [
        [(line["step"], line["loss"], line["learning_rate"]) for line in metrics.read_metrics(root)]
        for root in (straight, broken)
    ]
    assert losses[0] == losses[1] and [step for step, *_ in losses[0]] == [1, 2, 3, 4, 5, 6]
    assert data_position(straight) == data_position(broken)
    (step_a, a), (step_b, b) = (final_state(cfg, root) for root in (straight, broken))
    assert step_a == step_b == 6
    assert any("/mu/" in path for path in flatten(a))
    for (path, left), right in zip(flatten(a).items(), flatten(b).values(), strict=True):
        np.testing.assert_array_equal(left, right, err_msg=path)
