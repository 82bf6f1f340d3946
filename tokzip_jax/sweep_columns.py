"""What a sweep measures besides accuracy, row by row: kept in the workdir, and done once by whichever process comes."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from tokzip_jax import config_io
from tokzip_jax.config import RowConfig
from tokzip_jax.workdir import Workdir, write_atomically


def measured(
    workdir: Workdir,
    path: pathlib.Path,
    rows: Mapping[str, RowConfig],
    measure: Callable[[str], dict[str, Any]],
    *,
    again: bool = False,
    missing: bool = True,
) -> dict[str, dict[str, Any]]:
    """What `measure` says of every row, by name.

    Args:
        workdir: that processes share.
        path: the JSON file where it is kept, beside the row that it was measured of.
        rows: what each name stands for; a row that has changed is measured again.
        measure: measure(name) -> values by name, which JSON can hold.
        again: also measure what the file holds.
        missing: measure what it does not hold; False: what there is.
    """
    if not missing:
        kept = {name: values for name, values in _read(path).items() if name in rows}
        return {name: _columns(values) for name, values in kept.items() if values["row"] == _row(rows[name])}
    found = {}
    pieces = {f"{path.stem} {name}": name for name in rows}
    for piece in workdir.in_turn(pieces):
        name = pieces[piece]
        row = _row(rows[name])
        kept = _read(path).get(name)
        if again or kept is None or kept["row"] != row:
            kept = {**measure(name), "row": row}
            with workdir.hold(path.stem):
                if jax.process_index() == 0:
                    write_atomically(path, json.dumps(_read(path) | {name: kept}, indent=2) + "\n")
        found[name] = _columns(kept)
    return {name: found[name] for name in rows}


def _row(row: RowConfig) -> dict[str, Any]:
    """As JSON holds it."""
    found: dict[str, Any] = json.loads(config_io.to_json(row))
    return found


def _columns(kept: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kept.items() if key != "row"}


def _read(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
