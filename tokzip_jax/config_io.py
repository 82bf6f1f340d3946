"""Between `RunConfig` and what people edit: ConfigDict, command line, JSON.

Everything here is driven by the dataclass fields, so a new field needs no new code.
"""

import ast
import dataclasses
import difflib
import json
import re
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from absl import app

from tokzip_jax.config import RunConfig
from tokzip_jax.options import Options

_SCALARS = (bool, int, float, str)


def to_config_dict(cfg: Any) -> ml_collections.ConfigDict:
    """The editable form of a config (any of its dataclasses); tuples stay tuples, None becomes a typed placeholder."""
    hints = typing.get_type_hints(type(cfg))
    out = ml_collections.ConfigDict()
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if dataclasses.is_dataclass(value):
            value = to_config_dict(value)
        elif isinstance(value, Mapping):
            entries = {k: to_config_dict(v) if dataclasses.is_dataclass(v) else v for k, v in value.items()}
            value = ml_collections.ConfigDict(entries)
        elif value is None:
            value = ml_collections.config_dict.placeholder(_without_none(hints[field.name]))
        out[field.name] = value
    return out


def from_config_dict(tree: ml_collections.ConfigDict | Mapping[str, Any], cls: type = RunConfig) -> Any:
    """Turn the editable form into frozen dataclasses; what it does not name keeps its default.

    Args:
        tree: ConfigDict or plain dict, e.g. after edits from the command line or out of `config.json`.
        cls: the dataclass to build.

    Raises:
        ValueError: a key that does not exist (with its closest valid names), or a value of the wrong type (with the
            full dotted key and the expected type).
    """
    return _build(cls, tree, "")


def parse_flags(argv: list[str]) -> list[str]:
    """A `flags_parser` for `absl.app.run`: an override below a group that does not exist ends in one sentence.

    Define the config flag with `lock_config=False, accept_new_attributes=True`; then `from_config_dict` refuses the
    other unknown keys.
    """
    try:
        return app.parse_flags_with_usage(argv)
    except KeyError as error:
        group, _, guess = str(error.args[0]).partition("\n")
        for argument in argv:
            override = re.match(r"--?\w+\.([\w.]+)", argument)
            if override and group.strip("'") in override[1].split("."):
                sys.exit(f"error: unknown config key {override[1]}: there is no {group}. {guess}")
        raise


def to_json(cfg: Any) -> str:
    """A config as indented JSON, the content of a workdir's `config.json`."""
    return json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"


def from_json(text: str, cls: type = RunConfig) -> Any:
    """The inverse of `to_json`; errors as in `from_config_dict`."""
    return from_config_dict(json.loads(text), cls)


def difference(old: Any, new: Any) -> list[str]:
    """What changed between two configs: one 'key: old -> new' for every differing leaf, sorted by key."""
    before, after = _flatten(dataclasses.asdict(old)), _flatten(dataclasses.asdict(new))
    absent = "(absent)"
    return [
        f"{key}: {before.get(key, absent)} -> {after.get(key, absent)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, absent) != after.get(key, absent)
    ]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    out = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out.update(_flatten(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = repr(value)
    return out


def _without_none(hint: Any) -> Any:
    """The type T of an annotation `T | None`, or the annotation itself."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _describe(hint: Any) -> str:
    inner = _without_none(hint)
    if inner is not hint:
        return f"{_describe(inner)} or None"
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        pairs = typing.get_origin(item) is tuple
        return f"a tuple of pairs of {typing.get_args(item)[0].__name__}" if pairs else f"a tuple of {item.__name__}"
    if dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict:
        return "a group of keys"
    return hint.__name__


def _build(cls: type, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, Mapping | ml_collections.ConfigDict):
        raise ValueError(f"config key {prefix[:-1]} = {tree!r} must be a group of keys")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=3, cutoff=0.5)
            guess = (
                f"; did you mean {' or '.join(prefix + name for name in near)}?" if near else "; it has no near match."
            )
            raise ValueError(f"unknown config key {prefix}{key}{guess} Valid keys there: {', '.join(hints)}")
    return cls(**{key: _value(hints[key], tree[key], f"{prefix}{key}") for key in tree})


def _value(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{key}.")
    if typing.get_origin(hint) is dict:
        if not isinstance(value, Mapping | ml_collections.ConfigDict):
            raise ValueError(f"config key {key} = {value!r} must be a group of keys")
        return {name: _value(typing.get_args(hint)[1], value[name], f"{key}.{name}") for name in value}
    if hint is Options:
        return _options(value, key)
    inner = _without_none(hint)
    if inner is not hint and (value is None or value == "None"):
        return None
    try:
        return _tuple(typing.get_args(inner)[0], value) if typing.get_origin(inner) is tuple else _scalar(inner, value)
    except (TypeError, ValueError, SyntaxError):
        found = type(value).__name__
        raise ValueError(f"config key {key} = {value!r} ({found}) must be {_describe(hint)}") from None


def _options(tree: Any, key: str) -> Options:
    """Options as they are: the method that they belong to knows their names and types, and is asked when checked."""
    if not isinstance(tree, Mapping | ml_collections.ConfigDict):
        raise ValueError(f"config key {key} = {tree!r} must be a group of keys")
    for name in tree:
        if type(tree[name]) not in _SCALARS:
            raise ValueError(f"config key {key}.{name} = {tree[name]!r} must be a number, a word, True or False")
    return Options({name: tree[name] for name in tree})


def _scalar(expected: type, value: Any) -> Any:
    """A bool, int, float or str; strings are parsed, an int is a float, a bool is not an int."""
    if expected not in _SCALARS:
        raise TypeError(f"config fields of type {expected} are not supported")
    if expected is bool and value in ("true", "True", "false", "False"):
        return value in ("true", "True")
    if expected in (int, float) and isinstance(value, str):
        return expected(value)
    if expected is float and type(value) is int:
        return float(value)
    return value if type(value) is expected else _refuse(value)


def _tuple(expected: type, value: Any) -> tuple:
    if isinstance(value, str):
        # On a command line `1,2` and `(1, 2)` mean the same; words need no quotes.
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = tuple(part.strip() for part in value.split(","))
        value = value if isinstance(value, tuple | list) else (value,)
    if not isinstance(value, tuple | list):
        _refuse(value)
    if typing.get_origin(expected) is tuple:
        return tuple(_pair(typing.get_args(expected), item) for item in value)
    return tuple(_scalar(expected, item) for item in value)


def _pair(expected: tuple[type, ...], value: Any) -> tuple:
    """A tuple of as many scalars as `expected` has types."""
    if not isinstance(value, tuple | list) or len(value) != len(expected):
        _refuse(value)
    return tuple(map(_scalar, expected, value))


def _refuse(value: Any) -> typing.NoReturn:
    raise TypeError(f"{value!r} has the wrong type")
