"""Slash paths of nested trees, and tables of path patterns: one each for sharding, freezing and weight decay."""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def slash_path(keys: tuple[Any, ...]) -> str:
    """A JAX key path as words between slashes, e.g. "llm/layers/0/attn/q/w"."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def map_with_path(function: Callable[[str, Any], T], tree: Any) -> Any:
    """The tree of `function(path, leaf)`."""
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: function(slash_path(keys), leaf), tree)


def flatten(tree: Any) -> dict[str, Any]:
    """{path: leaf}, in tree order."""
    return {slash_path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """{"slash/separated/path": leaf} as a nested dict."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def first_match(table: Sequence[tuple[str, T]], path: str, *, name: str) -> T:
    """The value of the first pattern of a table that matches a whole path.

    Args:
        table: (regular expression, value) pairs.
        path: a slash path.
        name: what the table decides, for the message.

    Raises:
        ValueError: no pattern covers the path.
    """
    for pattern, value in table:
        if re.fullmatch(pattern, path):
            return value
    raise ValueError(f"no {name} rule covers {path!r}; add a pattern for it to the table ({len(table)} patterns)")
