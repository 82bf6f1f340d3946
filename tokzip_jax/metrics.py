"""Metrics of a run: JSON lines, TensorBoard, a progress bar; the host never waits for the step it just started."""

import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import jax
import tensorboardX
import tqdm

from tokzip_jax import locks

NAME = "metrics.jsonl"


def say(text: str) -> None:
    """Print a line, on process 0 only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def read_metrics(root: str | pathlib.Path) -> list[dict[str, Any]]:
    """The entries of a workdir's `metrics.jsonl`, in file order; a torn last line (a killed run) is left out."""
    path = pathlib.Path(root) / NAME
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    # What follows the last newline was never finished.
    return [json.loads(line) for line in lines[:-1]]


class MetricWriter:
    """Writes one object a line to `metrics.jsonl` and the same to TensorBoard, from process 0 only.

    Every line is on disk when `write` returns, so a killed run loses nothing that it had written. Other processes may
    write to the same workdir, about other stages.
    """

    def __init__(self, root: str | pathlib.Path) -> None:
        """Open the files under a workdir; use as a context manager."""
        self._root = pathlib.Path(root)
        self._active = jax.process_index() == 0
        self._boards: dict[str, tensorboardX.SummaryWriter] = {}
        if self._active:
            self._root.mkdir(parents=True, exist_ok=True)
            self._keep(lambda _: True)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def rewind(self, stage: str, step: int) -> None:
        """Go back to a step before training on from it: forget the lines of this stage's later steps."""
        if not self._active:
            return
        self._keep(lambda entry: entry["stage"] != stage or entry["step"] <= step)
        if stage in self._boards:
            self._boards.pop(stage).close()
        self._boards[stage] = self._board(stage, purge_step=step + 1)

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Add one entry; a value that is not finite becomes a string, since JSON has no NaN."""
        if not self._active:
            return
        values = {name: float(value) for name, value in metrics.items()}
        plain = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        with locks.hold(self._root, NAME), (self._root / NAME).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"stage": stage, "step": step, **plain}) + "\n")
        if stage not in self._boards:
            self._boards[stage] = self._board(stage)
        for name, value in values.items():
            self._boards[stage].add_scalar(name, value, step)

    def close(self) -> None:
        """Close all files."""
        for board in self._boards.values():
            board.close()
        self._boards.clear()

    def _board(self, stage: str, purge_step: int | None = None) -> tensorboardX.SummaryWriter:
        # One directory a stage: TensorBoard can only forget the later steps of a whole directory.
        # The suffix keeps two starts within a second from overwriting each other.
        where, suffix = str(self._root / "tensorboard" / stage), f".{time.time_ns()}"
        return tensorboardX.SummaryWriter(where, purge_step=purge_step, filename_suffix=suffix)

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Leave out the lines that are not wanted, and a torn last one."""
        path = self._root / NAME
        with locks.hold(self._root, NAME):
            entries = [entry for entry in read_metrics(self._root) if wanted(entry)]
            beside = path.with_name(f"{NAME}.partial")
            beside.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
            beside.replace(path)


class Pending:
    """Hands out the metrics of step n-1 once step n is dispatched, so that the device always has work."""

    def __init__(self, arrived: Callable[[int, dict[str, float]], None]) -> None:
        """`arrived(step, metrics)` is called with floats, one call a step, in order."""
        self._arrived = arrived
        self._waiting: tuple[int, Mapping[str, jax.Array]] | None = None

    def push(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Take the metrics (device scalars) of a step that was dispatched; hand out the ones before."""
        self.flush()
        for value in metrics.values():
            value.copy_to_host_async()
        self._waiting = (step, metrics)

    def flush(self) -> None:
        """Wait for what is still pending and hand it out."""
        if self._waiting is None:
            return
        (step, metrics), self._waiting = self._waiting, None
        self._arrived(step, {name: float(value) for name, value in jax.device_get(dict(metrics)).items()})


class Progress:
    """A progress bar with loss, tokens a second and time left, on process 0."""

    def __init__(self, stage: str, done: int, steps: int, *, file: TextIO | None = None) -> None:
        """Start at `done` of `steps`; `file` defaults to stderr."""
        file = sys.stderr if file is None else file
        self._step = done
        self._last: float | None = None
        self._seconds = self._tokens = 0.0
        self._steps = 0
        self._bar = tqdm.tqdm(
            desc=stage,
            initial=done,
            total=steps,
            unit="step",
            file=file,
            disable=jax.process_index() != 0,
            dynamic_ncols=True,
            # In a log file every refresh is a line of its own.
            mininterval=0.2 if file.isatty() else 30,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step has arrived with its "loss" and "tokens"."""
        now = time.perf_counter()
        if self._last is not None:  # the first step holds the compilation
            self._seconds += now - self._last
            self._tokens += metrics["tokens"]
            self._steps += 1
        self._last = now
        shown = {"loss": f"{metrics['loss']:.4f}"}
        if self._seconds > 0:
            shown["tokens/s"] = f"{self._tokens / self._seconds:.0f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._step)
        self._step = step

    def rates(self) -> dict[str, float]:
        """Tokens and steps a second since the last call; empty where nothing was timed yet."""
        if self._seconds == 0:
            return {}
        rates = {
            "tokens_per_second": self._tokens / self._seconds,
            "steps_per_second": self._steps / self._seconds,
        }
        self._seconds = self._tokens = 0.0
        self._steps = 0
        return rates
