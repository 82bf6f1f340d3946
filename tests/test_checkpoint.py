"""Checkpoints: resume, data position, kill -9, foreign checkpoints, parameters alone."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokzip_jax.checkpoint import Checkpointer, absent, finished, load_params, read_info, save_params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    params: dict
    opt_state: object


TX = optax.partition({"train": optax.adamw(1e-3), "freeze": optax.set_to_zero()}, {"vit": "freeze", "llm": "train"})


def make_state(step=0, width=4):
    params = {"vit": {"w": jnp.full((2, width), 1.0 + step)}, "llm": {"w": jnp.full((width, 3), 2.0 + step)}}
    return State(jnp.int32(step), params, TX.init(params))


def make_data():
    return iter(grain.MapDataset.range(50).seed(3).shuffle().repeat().batch(2).to_iter_dataset())


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_resume_gives_state_and_next_batch_and_keeps_two(tmp_path):
    data = make_data()
    with Checkpointer(tmp_path, info={"model": {"width": 4}}) as checkpoints:
        assert checkpoints.latest is None
        for step in range(1, 8):
            next(data)
            if step % 2 == 0:
                checkpoints.save(step, make_state(step), data)
        following = [next(data) for _ in range(3)]  # while the last save may still be running
    assert sorted(child.name for child in tmp_path.iterdir() if child.name.isdigit()) == ["4", "6"]
    again = make_data()
    with Checkpointer(tmp_path) as checkpoints:
        step, state = checkpoints.restore(jax.eval_shape(make_state), again)
    assert step == checkpoints.latest == 6
    assert_same(state, make_state(6))
    next(again)  # batch 7 was read after the save at 6
    assert_same([next(again) for _ in range(3)], following)
    assert read_info(tmp_path) == {"model": {"width": 4}}


def test_the_last_step_is_marked(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(3, make_state(3))
        assert finished(tmp_path) is None
        checkpoints.finish(3)
    assert finished(tmp_path) == 3
    assert finished(tmp_path / "nothing") is None


def test_a_checkpoint_of_another_model_is_one_sentence(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, make_state())
    with Checkpointer(tmp_path) as checkpoints:
        wider = jax.eval_shape(lambda: make_state(width=5))
        with pytest.raises(ValueError, match=r"/1 is of another model: ") as error:
            checkpoints.restore(wider)
    assert "params/vit/w is (2, 4) there, (2, 5) here" in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_additional_leaves_are_named(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(2), "b": jnp.ones(3)})
        checkpoints.finish(1)
        with pytest.raises(ValueError, match=r"c is missing there, \(4,\) here; b is \(3,\) there, missing here"):
            checkpoints.restore({"a": jnp.ones(2), "c": jnp.ones(4)})


def test_nothing_there_is_one_sentence(tmp_path):
    run = tmp_path / "run"
    with Checkpointer(run) as new, pytest.raises(FileNotFoundError, match=r"in .*run; train first"):
        new.restore(jax.eval_shape(make_state))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*run: .*complete step"):
        load_params(run, {})
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere: there is no such directory"):
        load_params(tmp_path / "nowhere", {})


def test_parameters_alone(tmp_path):
    params = make_state(1).params
    save_params(tmp_path / "converted", params, info={"source": "x"})
    save_params(tmp_path / "converted", make_state(2).params, info={"source": "y"})  # replaces
    assert read_info(tmp_path / "converted") == {"source": "y"}
    abstract = jax.eval_shape(lambda: make_state().params)
    assert_same(load_params(tmp_path / "converted", abstract), make_state(2).params)
    with pytest.raises(ValueError, match=r"of another model: vit/w is \(2, 4\) there, \(2, 9\) here"):
        load_params(tmp_path / "converted", {"vit": {"w": jnp.ones((2, 9))}})


def test_parameters_out_of_a_training(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1))
        checkpoints.save(2, make_state(2))
    assert_same(load_params(tmp_path, {"llm": make_state().params["llm"]}), {"llm": make_state(2).params["llm"]})
    assert_same(load_params(tmp_path / "1", make_state().params), make_state(1).params)
    wanted = {**make_state().params, "projector": {"fc": jnp.full(3, 7.0)}}
    assert absent(tmp_path, wanted, ("projector/.*",)) == ["projector/fc"]
    with pytest.raises(ValueError, match=r"projector/fc is missing there, \(3,\) here"):
        absent(tmp_path, wanted, ("llm/.*",))
    with pytest.raises(ValueError, match=r"projector/fc is missing there, \(3,\) here"):
        load_params(tmp_path, wanted)


SAVER = """
import sys
import jax.numpy as jnp
from tokzip_jax.checkpoint import Checkpointer
with Checkpointer(sys.argv[1]) as checkpoints:
    start = 0 if checkpoints.latest is None else checkpoints.restore({"x": jnp.zeros((64, 64))})[0]
    for step in range(start + 1, 10**6):
        checkpoints.save(step, {"x": jnp.full((64, 64), float(step))})
        print(step, flush=True)
"""


@pytest.mark.slow
def test_kill_leaves_the_checkpoint_before_usable(tmp_path):
    root = Path(__file__).parent.parent
    done = 0
    for delay in (0.05, 0.22):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SAVER), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        with process:
            started = [int(process.stdout.readline()) for _ in range(4)]
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        assert started[0] > done  # it went on where it was
        with Checkpointer(tmp_path) as checkpoints:
            step, state = checkpoints.restore({"x": jnp.zeros((64, 64))})
        # A save begins only when the one before it is complete, so at most the last one is lost.
        assert step >= started[-1] - 1
        np.testing.assert_array_equal(state["x"], np.full((64, 64), step))
        done = step


def test_an_unfinished_step_is_ignored(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1))
    torn = tmp_path / "2.orbax-checkpoint-tmp" / "state"
    torn.mkdir(parents=True)
    (torn / "_METADATA").write_text(json.dumps({}))
    (tmp_path / "0").mkdir()  # a step that was being deleted
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.restore(jax.eval_shape(make_state))[0] == 1
    (tmp_path / "7").mkdir()
    assert_same(load_params(tmp_path, make_state().params), make_state(1).params)
