"""Tables of methods, made of the files that define them."""

import importlib
from collections.abc import Sequence
from typing import Any


def entries(package: str, files: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The `ENTRIES` of some files of a package, in their order; and by name the file that each stands in.

    Args:
        package: its dotted name.
        files: names of its modules.

    Raises:
        ValueError: two files define the same name.
    """
    found: dict[str, Any] = {}
    file_of: dict[str, str] = {}
    for file in files:
        module = f"{package}.{file}"
        path = f"{module.replace('.', '/')}.py"
        for name, entry in importlib.import_module(module).ENTRIES.items():
            if name in found:
                raise ValueError(f"{name!r} stands in {file_of[name]} and in {path}; it must stand in one of them")
            found[name], file_of[name] = entry, path
    return found, file_of
