"""How long a fresh process takes: to import the package, and to the first training step with and without a cache."""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter

from tokzip_jax.bench.report import Report
from tokzip_jax.bench.timing import Case, interleave, ratio, rows_of

TARGET = 3.0  # seconds, import tokzip_jax
MODULES = ("jax", "tokzip_jax", "tokzip_jax.voco", "tokzip_jax.report")
# "cpu" is what the processes computed, all threads together; a busy machine lengthens it less than the wall's time.
CLOCKS = {"wall": time.perf_counter, "cpu": lambda: os.times().children_user + os.times().children_system}
ROOT = pathlib.Path(__file__).resolve().parents[2]


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `import`."""
    parser.add_argument("--modules", nargs="+", default=MODULES, help="imported in processes of their own")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: time of all threads")


def run_import(args: argparse.Namespace) -> Report:
    """Seconds of whole processes that import one module, and where the time goes."""

    def process(*code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *code], check=True, capture_output=True, text=True, cwd=ROOT)

    cases = {
        f"import {name}": Case(lambda name=name: process("-c", f"import {name}").returncode) for name in args.modules
    }
    cases = {"nothing": Case(lambda: process("-c", "").returncode), **cases}
    seconds = interleave(cases, runs=args.runs, clock=CLOCKS[args.clock])
    tables = {f"seconds of a whole process (target of tokzip_jax: under {TARGET:g})": rows_of(seconds)}
    for name in args.modules:
        own = slowest(process("-X", "importtime", "-c", f"import {name}").stderr)
        tables[f"import {name}, seconds by package"] = [{"package": p, "seconds": s} for p, s in own]
    return Report("import", {"clock": args.clock, "runs": {"measured": args.runs, "warm-up": 1}}, tables)


def slowest(importtime: str, count: int = 6) -> list[tuple[str, float]]:
    """The packages in which `python -X importtime` spent most, in seconds, modules of one package added up."""
    total: Counter[str] = Counter()
    for own, module in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", importtime):
        total[module.split(".")[0]] += int(own)
    return [(package, microseconds / 1e6) for package, microseconds in total.most_common(count)]


def add_startup_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `startup`."""
    parser.add_argument("--config", default="configs/tiny.py", help="config file of the training")
    parser.add_argument("--data_dir", default="", help="where the data set is; '' = TFDS's own default")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: time of all threads")


def run_startup(args: argparse.Namespace) -> Report:
    """Seconds to the first step of `train.py`, with an empty compilation cache and with the one that this left."""
    seconds: dict[str, list[float]] = {"first start (empty cache)": [], "second start": []}
    entries, clock = [], CLOCKS[args.clock]
    for _ in range(args.runs):
        with tempfile.TemporaryDirectory() as folder:
            cache = pathlib.Path(folder) / "compiled"
            for name, values in seconds.items():
                start = clock()
                first_step(args, pathlib.Path(folder) / name.split()[0], cache)
                values.append(clock() - start)
            entries.append(sum(1 for path in cache.rglob("*") if path.is_file()))
    return Report(
        "startup",
        {"config": args.config, "clock": args.clock, "runs": args.runs, "files in the cache": entries},
        {
            "seconds of a whole process to the first step's metrics": rows_of(seconds),
            "ratio": [ratio(seconds, *seconds)],
        },
    )


def first_step(args: argparse.Namespace, workdir: pathlib.Path, cache: pathlib.Path) -> None:
    """Start a training, and end it once it has written the metrics of its first step.

    Raises:
        RuntimeError: the training ended before, with what it said last.
    """
    command = [sys.executable, "train.py", f"--config={args.config}", f"--workdir={workdir}", "--config.log_every=1"]
    command += [f"--config.compile_cache={cache}", *([f"--config.data.data_dir={args.data_dir}"] * bool(args.data_dir))]
    said = workdir.with_suffix(".log")
    with said.open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            while not has_step(workdir / "metrics.jsonl"):
                if process.poll() is not None:
                    raise RuntimeError(f"{' '.join(command)} ended before its first step: {said.read_text()[-500:]}")
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()


def has_step(path: pathlib.Path) -> bool:
    """Whether a metrics file holds a whole line with a step."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return any(line.endswith("\n") and "step" in json.loads(line) for line in lines)
