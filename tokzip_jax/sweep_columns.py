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
) -> dict[str, dict[str, Any]]:
    """What `measure` says of every row, by name.

    Args:
        workdir: that processes share.
        path: the JSON file where it is kept, beside the row that it was measured of.
        rows: what each name stands for; a row that has changed is measured again.
        measure: measure(name) -> values by name, which JSON can hold.
        again: also measure what the file holds.
    """
    found = {}
    pieces = {f"{path.stem} {name}": name for name in rows}
    for piece in workdir.in_turn(pieces):
        name = pieces[piece]
        row = json.loads(config_io.to_json(rows[name]))
        kept = _read(path).get(name)
        if again or kept is None or kept["row"] != row:
            kept = {**measure(name), "row": row}
            with workdir.hold(path.stem):
                if jax.process_index() == 0:
                    write_atomically(path, json.dumps(_read(path) | {name: kept}, indent=2) + "\n")
        found[name] = {key: value for key, value in kept.items() if key != "row"}
    return {name: found[name] for name in rows}


def _read(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
