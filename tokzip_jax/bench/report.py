"""What a benchmark found: settings and tables, as text and as JSON."""

import dataclasses
import os
import pathlib
import time
from typing import Any

import jax

from tokzip_jax import environment


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of one benchmark, all of it JSON.

    Attributes:
        name: of the benchmark.
        settings: shapes, dtypes and runs.
        tables: {title: rows}; a row is {column: text or number}, and all rows of a table have the same columns.
        sentences: what a reader should know beside the numbers.
    """

    name: str
    settings: dict[str, Any]
    tables: dict[str, list[dict[str, Any]]]
    sentences: list[str] = dataclasses.field(default_factory=list)

    def asdict(self) -> dict[str, Any]:
        """Everything, with what it ran on."""
        return {**dataclasses.asdict(self), "ran_on": ran_on()}

    def text(self) -> str:
        """Readable: settings, tables, sentences."""
        facts = {**self.settings, **ran_on()}
        lines = [self.name, *(f"  {key}: {_cell(value)}" for key, value in facts.items())]
        for title, rows in self.tables.items():
            lines += ["", title, *_aligned(rows)]
        return "\n".join([*lines, *([""] if self.sentences else []), *self.sentences])


def ran_on() -> dict[str, Any]:
    """Devices, versions, time, and how busy the machine is: a load above the number of cores spoils what is timed."""
    device = jax.devices()[0]
    versions = environment.versions()
    return {
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load average over one minute": round(os.getloadavg()[0], 1),
        "versions": {name: versions[name] for name in ("python", "jax", "jaxlib", "flax", "numpy")},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _processor() -> str:
    """The processor's name, which JAX does not tell ("cpu"); "unknown" where there is no /proc."""
    facts = pathlib.Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(inner)}" for key, inner in value.items())
    return str(value)


def _aligned(rows: list[dict[str, Any]]) -> list[str]:
    """Columns as wide as their widest cell; text to the left, numbers to the right."""
    header = list(rows[0])
    cells = [header, *([_cell(row[name]) for name in header] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    left = [isinstance(rows[0][name], str) for name in header]
    return [
        "  " + "  ".join(c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(line, widths, left)).rstrip()
        for line in cells
    ]
