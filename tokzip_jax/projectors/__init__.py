"""What stands between the vision tower and the language model: plain projectors and projectors that compress.

`PROJECTORS` names them all. Each is a function from parameters and the `VisualTokens` of the encoder site to
`VisualTokens` of the language model's width, with what a config, a sharding table and a ledger need to know about it.
"""

import dataclasses

from tokzip_jax import listing
from tokzip_jax.config import MethodConfig, ModelConfig
from tokzip_jax.projectors import plain
from tokzip_jax.projectors.base import Context, Projector
from tokzip_jax.require import require

__all__ = [
    "FILES",
    "FILE_OF",
    "KEEPS_PLACES",
    "OPTIONS",
    "PROJECTORS",
    "Context",
    "Projector",
    "check",
    "settings",
    "weights_name",
]

# A new projector is one more line here.
FILES = (
    "plain",
    "pooled",
    "unshuffle",
    "ldp",
    "qformer",
    "llamavid",
    "mqt",
)
PROJECTORS: dict[str, Projector]
FILE_OF: dict[str, str]  # name -> the file that it stands in
PROJECTORS, FILE_OF = listing.entries("tokzip_jax.projectors", FILES)
KEEPS_PLACES = tuple(plain.ENTRIES)  # one token in, one token out: what an encoder site chose can still be seen
# Fields of `MethodConfig` that some projector reads, and their defaults.
_READ = {name for entry in PROJECTORS.values() for name in entry.options}
OPTIONS = {field.name: field.default for field in dataclasses.fields(MethodConfig) if field.name in _READ}


def weights_name(projector: str) -> str:
    """The name under which the parameters of a projector stand."""
    return PROJECTORS[projector].weights or projector


def settings(name: str, grid: int, queries: int = 0) -> list[dict[str, int]]:
    """Every value of the option that sets how many tokens a projector makes, by the option's name.

    Factors that divide the grid come first: others leave patches out. Empty where there is no such option.

    Args:
        name: of `PROJECTORS`.
        grid: patches along a side of the picture.
        queries: that are trained, of which the first ones may be used.
    """
    sides = sorted(range(1, grid + 1), key=lambda side: (grid % side > 0, side))
    values = {"pool_grid": sides, "content_grid": sides, "factor": sides, "level": range(grid.bit_length())}
    values["queries"] = range(1, queries + 1)
    option = next((option for option in values if option in PROJECTORS[name].options), "")
    return [{option: value} for value in values.get(option, ())]


def check(key: str, model: ModelConfig, method: MethodConfig) -> None:
    """Refuse a projector's settings before anything is compiled; `key` is the method's dotted place in the config.

    Raises:
        ValueError: an encoder site that breaks the grid a projector needs, an option that it does not read, or a value
            out of range, as one sentence with the key.
    """
    name, entry = method.projector, PROJECTORS[method.projector]
    require(
        not entry.grid or method.encoder == "none",
        f"{key}.encoder = {method.encoder!r} breaks the grid that {name} works on; it must be 'none'",
    )
    for option, default in OPTIONS.items():
        value = getattr(method, option)
        require(
            option in entry.options or value == default,
            f"{key}.{option} = {value!r} is nothing that the projector {name!r} reads; leave it at {default!r}",
        )
    entry.check(key, model, method)
