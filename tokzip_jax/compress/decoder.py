"""The table of decoder-site methods: `DECODER`, name -> `Decoder`, made of the `ENTRIES` of the files listed here."""

from typing import NamedTuple

from tokzip_jax import listing
from tokzip_jax.compress.decoder_entry import Decoder

DEPTH = 32  # layers of the models that schedules are published for
# A new method is one more line here.
FILES = (
    "fastv",
    "pyramiddrop",
    "sparsevlm",
)
DECODER: dict[str, Decoder]
FILE_OF: dict[str, str]  # name -> the file that it stands in
DECODER, FILE_OF = listing.entries("tokzip_jax.compress", FILES)


def cuts(name: str, depth: int) -> dict[int, int]:
    """The published schedule of a method in proportion to `depth` layers: first layer with fewer tokens -> how many of
    576; of cuts that fall together the last one."""
    return {min(max(1, round(depth * layer / DEPTH)), depth - 1): count for layer, count in DECODER[name].published}


class Step(NamedTuple):
    """One cut, before layer `layer`: of a picture's `before` token slots `keep` stay, `merged` may be added, `after`
    go on."""

    layer: int
    keep: int
    before: int
    merged: int
    after: int


def steps(name: str, visual: int, layers: tuple[int, ...], keep: tuple[int, ...], *, depth: int) -> tuple[Step, ...]:
    """A checked schedule.

    Args:
        name: of `DECODER`.
        visual: token slots of a picture that enter the first layer.
        layers: the cuts, each the number of the first layer that sees fewer tokens.
        keep: tokens of a picture that stay at each cut, merged ones not counted.
        depth: layers of the model.

    Raises:
        ValueError: an unknown name or an impossible schedule, as one sentence naming `decoder`, `decoder_layers` or
            `decoder_keep`.
    """
    if name not in DECODER:
        raise ValueError(f"decoder = {name!r} is unknown; choose one of {', '.join(map(repr, ('none', *DECODER)))}")
    if not layers or len(layers) != len(keep):
        raise ValueError(
            f"decoder_keep = {keep} must name one number of tokens for each layer of decoder_layers = {layers}, and "
            "there must be at least one"
        )
    if any(not 1 <= layer < depth for layer in layers) or any(b <= a for a, b in zip(layers, layers[1:], strict=False)):
        raise ValueError(f"decoder_layers = {layers} must increase strictly and lie between 1 and {depth - 1}")
    found, slots = [], visual
    for layer, kept in zip(layers, keep, strict=True):
        if not 1 <= kept <= slots:
            raise ValueError(
                f"decoder_keep = {keep} asks for {kept} tokens at layer {layer}, where {slots} arrive; it must lie "
                f"between 1 and {slots}"
            )
        merged = DECODER[name].merged(slots, kept)
        # Merged tokens come of deleted ones, so that there are never more than arrived.
        after = min(slots, kept + merged)
        found.append(Step(layer, kept, slots, merged, after))
        slots = after
    return tuple(found)
