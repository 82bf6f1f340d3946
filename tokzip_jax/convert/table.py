"""How a table of names turns somebody else's state dict into stacked arrays of ours, and back.

A rule says which source tensor is which of our parameters and how it is laid out there. `#` stands for the layer number
in the source's name; in ours it stands for nothing, because a layer becomes a row of a stacked array. What a table does
not name is an error, unless one of its `ignored` patterns does.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Shape = tuple[int, ...]

MOST = 12  # names of one kind of problem in a message


class Layout(NamedTuple):
    """How the source stores an array.

    Attributes:
        load: (source array, our shape) -> our array.
        save: our array -> source array.
    """

    load: Callable[[Any, Shape], Any]
    save: Callable[[Any], Any]


SAME = Layout(lambda x, shape: x, lambda x: x)
# [N*H] <-> [N, H]: the bias of a projection to heads.
FLAT = Layout(lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1))
# A PyTorch Linear, [out, in] <-> [in, ...out].
LINEAR = Layout(lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(x.shape[0], -1).T)
# The same where the inputs are several axes, [out, N*H] <-> [N, H, out].
LINEAR_HEADS = Layout(lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(-1, x.shape[-1]).T)
# A PyTorch Conv2d, OIHW <-> HWIO.
CONV = Layout(lambda x, shape: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))


class Rule(NamedTuple):
    """One line of a table.

    Attributes:
        key: the source's name; `#` is the layer number.
        path: our slash path, without a group number below `layers`.
        layout: how the source stores it.
        more_rows: the source's first axis may be longer (new vocabulary); what is behind our last row is left out.
    """

    key: str
    path: str
    layout: Layout = SAME
    more_rows: bool = False

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches the source's names; the one group, if any, is the layer number."""
        return re.compile(re.escape(self.key).replace(r"\#", r"(\d+)"))


class Table(NamedTuple):
    """The names of one source format.

    Attributes:
        name: for messages.
        rules: what is read.
        ignored: regular expressions of source names that are known and not needed.
    """

    name: str
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()


class Source(NamedTuple):
    """Where one of our arrays comes from: the rule, and the source names by layer (None: the array has no layers)."""

    rule: Rule
    keys: dict[int | None, str]


def match(table: Table, keys: Iterable[str]) -> tuple[dict[str, Source], list[str]]:
    """Sort source names: {our path: where it comes from}, and the names that the table does not know."""
    rules = [(rule.pattern, rule) for rule in table.rules]
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in table.ignored) or r"(?!)")
    found, unknown = {}, []
    for key in keys:
        hits = ((rule, hit) for pattern, rule in rules if (hit := pattern.fullmatch(key)))
        rule, hit = next(hits, (None, None))
        if rule is not None:
            layer = int(hit[1]) if hit.groups() else None
            found.setdefault(rule.path, Source(rule, {})).keys[layer] = key
        elif not ignored.fullmatch(key):
            unknown.append(key)
    return found, unknown


def source_shape(rule: Rule, shape: Shape) -> Shape:
    """The shape that the source must have for an array (of one layer) of ours to have `shape`."""
    return jax.eval_shape(rule.layout.save, jax.ShapeDtypeStruct(shape, np.float32)).shape


def load(table: Table, state: Mapping[str, Any], wanted: Mapping[str, Any], *, dtype: Any) -> dict[str, np.ndarray]:
    """Read what is wanted out of a state dict, one source tensor at a time.

    Args:
        table: the names of its format.
        state: anything with `.shape` that `np.asarray` reads, by source name; see `files.read_safetensors`.
        wanted: {our path: anything with `.shape`}, layers stacked along the first axis.
        dtype: of the result.

    Returns:
        {our path: array}.

    Raises:
        ValueError: everything that is missing, superfluous or of another shape, in one message.
    """
    found, unknown = match(table, state)
    rules = {rule.path: rule for rule in table.rules}
    missing, wrong = [], []
    for path, leaf in wanted.items():
        rule = rules[path]
        layers = range(leaf.shape[0]) if "#" in rule.key else [None]
        keys = found[path].keys if path in found else {}
        missing += [_key(rule, layer) for layer in layers if layer not in keys]
        expected = source_shape(rule, leaf.shape if layers == [None] else leaf.shape[1:])
        for layer in layers:
            actual = tuple(state[keys[layer]].shape) if layer in keys else expected
            if not _fits(rule, actual, expected):
                wrong.append((keys[layer], f"{actual}, the config wants {expected}"))
        unknown += [key for layer, key in keys.items() if layer not in layers]
    unknown += [key for path in found if path not in wanted for key in found[path].keys.values()]
    _report(table, missing, unknown, wrong)
    return {path: _read(found[path], state, leaf.shape, dtype) for path, leaf in wanted.items()}


def save(table: Table, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `load`: {source name: array} of {our path: stacked array}; paths without a rule are left out."""
    out = {}
    for rule in table.rules:
        if rule.path not in arrays:
            continue
        array = np.asarray(arrays[rule.path])
        layers = range(array.shape[0]) if "#" in rule.key else [None]
        for layer in layers:
            part = array if layer is None else array[layer]
            out[_key(rule, layer)] = np.ascontiguousarray(rule.layout.save(part))
    return out


def _key(rule: Rule, layer: int | None) -> str:
    return rule.key if layer is None else rule.key.replace("#", str(layer))


def _fits(rule: Rule, actual: Shape, expected: Shape) -> bool:
    if rule.more_rows and len(actual) == len(expected):
        return actual[0] >= expected[0] and actual[1:] == expected[1:]
    return actual == expected


def _read(source: Source, state: Mapping[str, Any], shape: Shape, dtype: Any) -> np.ndarray:
    """One array of ours; layers are written to their places, so that no second copy of the stack is made."""
    rule, keys = source
    out = np.empty(shape, dtype)
    for layer, key in keys.items():
        place = out[...] if layer is None else out[layer]
        values = np.asarray(state[key])
        if rule.more_rows:
            values = values[: source_shape(rule, place.shape)[0]]
        place[...] = rule.layout.load(values, place.shape)
    return out


def _report(table: Table, missing: list[str], unknown: list[str], wrong: list[tuple[str, str]]) -> None:
    """Raise one ValueError for all problems, layers of one name on one line."""
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing: {_by_name((key, '') for key in missing)}")
    if unknown:
        parts.append(f"{len(unknown)} without a place: {_by_name((key, '') for key in unknown)}")
    if wrong:
        parts.append(f"{len(wrong)} of another shape: {_by_name(wrong)}")
    if parts:
        raise ValueError(f"the weights ({table.name}) do not fit the config: {'; '.join(parts)}")


def _by_name(items: Iterable[tuple[str, str]]) -> str:
    """'a.#.b (layers 0..3)' for the names of one tensor of several layers; at most MOST of them."""
    groups: dict[tuple[str, str], list[int]] = {}
    for key, note in items:
        name = re.sub(r"(?<=layers\.)\d+", "#", key)
        number = re.search(r"(?<=layers\.)\d+", key)
        groups.setdefault((name, note), []).append(int(number[0]) if number else -1)
    lines = []
    for (name, note), layers in list(groups.items())[:MOST]:
        span = f" (layers {min(layers)}..{max(layers)})" if min(layers) != max(layers) else ""
        name = name.replace("#", str(layers[0])) if not span else name
        lines.append(f"{name}{span}{' is ' + note if note else ''}")
    more = f" and {len(groups) - MOST} other names" if len(groups) > MOST else ""
    return ", ".join(lines) + more
