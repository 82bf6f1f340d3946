"""Metrics and environment: lines after a kill, delayed fetch, progress, what is said about the machine."""

import io
import json
import math
import subprocess

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from tokzip_jax import environment, metrics


def write(root, stage, steps, **more):
    with metrics.MetricWriter(root) as writer:
        for step in steps:
            writer.write(stage, step, {"loss": 1.0 / step, **more})


def steps_of(root, stage):
    return [entry["step"] for entry in metrics.read_metrics(root) if entry["stage"] == stage]


def test_lines_hold_stage_step_and_values(tmp_path):
    write(tmp_path, "base", [1, 2], tokens=7)
    assert metrics.read_metrics(tmp_path) == [
        {"stage": "base", "step": 1, "loss": 1.0, "tokens": 7.0},
        {"stage": "base", "step": 2, "loss": 0.5, "tokens": 7.0},
    ]
    assert metrics.read_metrics(tmp_path / "nowhere") == []


def test_resuming_forgets_later_steps_of_this_stage_only(tmp_path):
    write(tmp_path, "base", [1, 2, 3, 4])
    write(tmp_path, "voco", [1, 2, 3])
    with metrics.MetricWriter(tmp_path) as writer:
        writer.rewind("voco", 2)
        writer.write("voco", 3, {"loss": 9.0})
    assert steps_of(tmp_path, "base") == [1, 2, 3, 4]
    assert steps_of(tmp_path, "voco") == [1, 2, 3]
    assert metrics.read_metrics(tmp_path)[-1]["loss"] == 9.0


def test_a_torn_last_line_is_dropped(tmp_path):
    write(tmp_path, "base", [1, 2])
    with (tmp_path / metrics.NAME).open("a") as file:
        file.write('{"stage": "base", "ste')
    assert steps_of(tmp_path, "base") == [1, 2]
    write(tmp_path, "base", [3])
    assert steps_of(tmp_path, "base") == [1, 2, 3]
    for line in (tmp_path / metrics.NAME).read_text().splitlines():
        json.loads(line)


def test_lines_are_on_disk_at_once(tmp_path):
    with metrics.MetricWriter(tmp_path) as writer:
        writer.write("base", 1, {"loss": 1.0})
        assert steps_of(tmp_path, "base") == [1]


def test_not_finite_values_stay_json(tmp_path):
    write(tmp_path, "base", [1], ce=math.nan, kl=math.inf)
    (line,) = (tmp_path / metrics.NAME).read_text().splitlines()
    entry = json.loads(line, parse_constant=pytest.fail)
    assert entry["ce"] == "nan"
    assert entry["kl"] == "inf"


def test_tensorboard_gets_the_values_and_the_resumed_step(tmp_path):
    write(tmp_path, "base", [1, 2])
    with metrics.MetricWriter(tmp_path) as writer:
        writer.rewind("base", 1)
        writer.write("base", 2, {"loss": 5.0})
    scalars, starts = [], []
    for path in sorted((tmp_path / "tensorboard" / "base").iterdir()):
        data = path.read_bytes()
        while data:  # a record: length (8), its checksum (4), payload, checksum (4)
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            starts += [event.step] if event.HasField("session_log") else []
    assert sorted(scalars) == [(1, "loss", 1.0), (2, "loss", 0.5), (2, "loss", 5.0)]
    assert starts == [2]


def test_metrics_arrive_one_step_late_and_in_order():
    seen = []
    pending = metrics.Pending(lambda step, values: seen.append((step, values)))
    pending.flush()
    for step in (1, 2, 3):
        pending.push(step, {"loss": jnp.float32(step)})
        assert [number for number, _ in seen] == list(range(1, step))
    pending.flush()
    pending.flush()
    assert seen == [(n, {"loss": float(n)}) for n in (1, 2, 3)]
    assert type(seen[0][1]["loss"]) is float


def test_a_refused_step_is_not_handed_out_twice():
    def arrived(step, values):
        raise ArithmeticError(step)

    pending = metrics.Pending(arrived)
    pending.push(1, {"loss": jnp.float32(1)})
    with pytest.raises(ArithmeticError):
        pending.flush()
    pending.flush()


def test_progress_shows_loss_rate_and_total(monkeypatch):
    clock = iter([10.0, 12.0, 16.0, 17.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    shown = io.StringIO()
    with metrics.Progress("base", 4, 8, file=shown) as progress:
        progress.update(5, {"loss": 3.0, "tokens": 100.0})
        assert progress.rates() == {}
        progress.update(6, {"loss": 2.0, "tokens": 60.0})
        progress.update(7, {"loss": 1.5, "tokens": 60.0})
        assert progress.rates() == {"tokens_per_second": 20.0, "steps_per_second": 2 / 6}
        assert progress.rates() == {}
        progress.update(8, {"loss": 1.25, "tokens": 30.0})
    last = shown.getvalue().split("\r")[-1]
    assert last.startswith("base: 100%")
    assert "8/8" in last
    assert "loss=1.2500" in last
    assert "tokens/s=30" in last


def test_environment_is_json_and_complete():
    entry = json.loads(json.dumps(environment.describe(7)))
    assert entry["seed"] == 7
    assert entry["platform"] == jax.default_backend()
    assert entry["devices"] == jax.device_count()
    assert entry["device_kind"]
    assert entry["processes"] == 1
    assert entry["versions"]["jax"] == jax.__version__
    assert "absent" not in entry["versions"].values()
    assert set(entry["flags"]) == {"XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS"}


def test_commit_and_dirty_flag(tmp_path, monkeypatch):
    def git(*arguments):
        names = ("-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *names, *arguments], cwd=tmp_path, check=True, capture_output=True)

    module = tmp_path / "environment.py"
    module.write_text("1")
    monkeypatch.setattr(environment, "__file__", str(module))
    nothing = {"commit": None, "dirty": None}
    assert environment.commit() == nothing
    git("init", "-q")
    assert environment.commit() == nothing  # an untracked file: somebody else's checkout
    git("add", "environment.py")
    git("commit", "-qm", "x")
    assert len(environment.commit()["commit"]) == 40
    assert environment.commit()["dirty"] is False
    module.write_text("2")
    assert environment.commit()["dirty"] is True


def test_another_platform_is_refused():
    environment.require_platform("")
    environment.require_platform("cpu")
    with pytest.raises(ValueError, match=r"platform = 'tpu', but JAX found 8 x cpu \('cpu'\); install JAX for TPU"):
        environment.require_platform("tpu")
    with pytest.raises(ValueError, match=r"platform = 'accelerator', .*install JAX for a TPU or GPU"):
        environment.require_platform("accelerator")


def test_compile_cache_fills_a_directory(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        environment.setup_compile_cache(str(tmp_path / "cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.jit(lambda x: jnp.sin(x) * 3 + 41)(jnp.ones(5)).block_until_ready()
        assert list((tmp_path / "cache").iterdir())
        environment.setup_compile_cache("")
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
        environment.setup_compile_cache(before or "")
