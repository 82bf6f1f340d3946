"""What the tests of the entries share: a data set of a few pictures, the tiny recipe on it, and ways to start it."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from tokzip_jax.config import DataConfig
from tokzip_jax.data import easy_vqa

ROOT = Path(__file__).parent.parent
COLORS = {"red": (250, 0, 0), "blue": (0, 0, 250), "teal": (0, 128, 128)}
TRAIN, TEST, CORRUPT = 24, 6, 5


def load_file(path):
    """A Python file of the repository as a module, e.g. `train.py` or a config."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_data(folder):
    """Build a small easy_vqa under a folder: 24 training pictures, one of which cannot be decoded, and 6 test ones."""
    names = list(COLORS)

    def paths(ids):
        for number in ids:
            path = folder / f"{number}.png"
            pixels = np.full((16, 16, 3), COLORS[names[number % 3]], np.uint8)
            pixels[:, : number % 16] = 255
            Image.fromarray(pixels).save(path)
            if number == CORRUPT:
                path.write_bytes(path.read_bytes()[:50])
        return {number: str(folder / f"{number}.png") for number in ids}

    def triples(ids):
        asked = [("what color is the shape?", names[n % 3], n) for n in ids]
        asked += [("is there a red shape?", "yes" if n % 3 == 0 else "no", n) for n in ids]
        return tuple(zip(*asked))

    train, test = range(TRAIN), range(TRAIN, TRAIN + TEST)
    package = SimpleNamespace(
        get_train_questions=lambda: triples(train),
        get_test_questions=lambda: triples(test),
        get_train_image_paths=lambda: paths(train),
        get_test_image_paths=lambda: paths(test),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "easy_vqa", package)
        easy_vqa.build(DataConfig(data_dir=str(folder / "tfds")))
    return str(folder / "tfds")


def tiny(data_dir, **changes):
    """The tiny recipe on that data; programs are kept where the suite keeps its own."""
    cfg = load_file(ROOT / "configs" / "tiny.py").run_config()
    data = dataclasses.replace(cfg.data, data_dir=data_dir)
    cache = jax.config.jax_compilation_cache_dir or ""
    return dataclasses.replace(cfg, **{"data": data, "compile_cache": cache, **changes})


def one_stage(cfg, **changes):
    """The tiny recipe cut down to its first stage and the rows that need no other program than the upper bound's."""
    rows = {name: cfg.rows[name] for name in ("question-only prior", "lower", "upper")}
    return dataclasses.replace(
        cfg,
        stages={"base": dataclasses.replace(cfg.stages["base"], **changes)},
        rows=rows,
        eval=dataclasses.replace(cfg.eval, order=tuple(rows), pictures=0),
    )


def config_file(cfg, path):
    """Write a config file that gives just this config."""
    text = json.dumps(json.dumps(dataclasses.asdict(cfg)))
    path.write_text(
        "from tokzip_jax.config_io import from_json, to_config_dict\n"
        f"TEXT = {text}\n"
        "def get_config():\n"
        "    return to_config_dict(from_json(TEXT))\n"
    )
    return path


def start(arguments, *, code=None, devices=1, log=None, **env):
    """Run a command of the repository in a process of its own.

    `code` is Python text to run instead of a file; `log` is a file for standard error instead of a pipe.
    """
    python = [sys.executable, *(["-c", code] if code else [])]
    errors = contextlib.nullcontext(subprocess.PIPE) if log is None else log.open("w")
    with errors as stderr:
        return _popen(python, arguments, devices, stderr, env)


def _popen(python, arguments, devices, stderr, env):
    return subprocess.Popen(
        [*python, *map(str, arguments)],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # halves the time to compile
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
            **env,
        },
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def finish(process, timeout=400):
    """(exit code, standard output, standard error); a process that takes longer is ended."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    return process.returncode, out, err
