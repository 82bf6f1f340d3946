"""What a method of a sweep is set to at a budget: published settings, in proportion to the model, or the run's own."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tokzip_jax import compress, method_check, vlm
from tokzip_jax.compress import ENCODER
from tokzip_jax.compress.decoder import cuts
from tokzip_jax.config import MethodConfig, ModelConfig, ProjectorConfig, RunConfig
from tokzip_jax.projectors import OPTIONS, PROJECTORS, settings

# Encoder-site methods with options, and what else they change: another name in the table.
RESTORED = {"positions": "raster", "attention_bias": True}
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "cls_attention_lowest": ("cls_attention", {"order": "lowest"}, {}),
    **{f"{n}_restore": (n, {"restore": 0.5}, RESTORED) for n in ("visionzip", "vispruner", "divprune", "holov")},
}
# Which pooling a projector stands for: `avgpool_linear` is the average in front of a linear layer already.
POOLS = {"pool_linear": ("max",), "pool_mlp": ("average", "bilinear"), "mlp_pool": ("bilinear",)}


def upper_method(cfg: RunConfig) -> MethodConfig:
    """The projector, with its options, of the row that counts as 100 %."""
    method = cfg.rows[cfg.eval.upper].method
    return MethodConfig(projector=method.projector, **{name: getattr(method, name) for name in OPTIONS})


def encoder(cfg: RunConfig, name: str, tokens: int) -> MethodConfig:
    """An encoder-site method at a budget.

    Its options are those of the run's row with this method whose budget is nearest, scaled. Where there is none they
    are the published ones; numbers that are published for so many patches keep their proportion to this tower's.
    """
    known, options, changes = VARIANTS.get(name, (name, {}, {}))
    own = [row.method for row in cfg.rows.values() if row.stage and row.method.encoder == known]
    own = sorted((method for method in own if name == _named(method)), key=lambda method: abs(method.tokens - tokens))
    if own:
        options = compress.scaled(known, own[0].options, own[0].tokens, tokens)
    else:
        options = {**_published(cfg.model, known, tokens), **options}
        if options.get("restore"):
            options.pop("contextual", None)  # RESTORE makes its own tokens of what is dropped
    made = dataclasses.replace(upper_method(cfg), encoder=known, tokens=tokens, options=options, **changes)
    return _possible_schedule(cfg.model, made) if known == "tome" and not own else made


def _named(method: MethodConfig) -> str:
    """What a sweep calls a method: a variant's name where it has that variant's options."""
    for name, (known, options, _) in VARIANTS.items():
        if method.encoder == known and options.items() <= method.options.items():
            return name
    return method.encoder


def _published(model: ModelConfig, known: str, tokens: int) -> dict[str, Any]:
    """Options that are not the method's defaults, since those are for another number of patches or tokens."""
    patches, options = model.vit.patches, {}
    for field in dataclasses.fields(ENCODER[known].options):
        if of := field.metadata["patches"]:
            options[field.name] = max(1, round(field.default * patches / of))
        if share := field.metadata["share"]:
            options[field.name] = round(share * tokens)
    if known == "dart":
        # Of few tokens a quarter: were all of them pivots, nothing would be chosen by how unlike them it is.
        options["pivots"] = min(compress.options(known, {}).pivots, max(1, tokens // 4))
    if "neighbours" in options:
        options["neighbours"] = min(options["neighbours"], max(1, patches - tokens))
    return options


def _possible_schedule(model: ModelConfig, method: MethodConfig) -> MethodConfig:
    """ToMe's constant schedule, or the least falling one with which every block merges no more than half."""
    for inflect in (0.0, -0.25, -0.5, -0.75, -1.0):
        tried = dataclasses.replace(method, options={"inflect": inflect} if inflect else {})
        try:
            method_check.check("tome", tried, model)
        except ValueError:
            continue
        return tried
    return method


def decoder(cfg: RunConfig, name: str, tokens: int) -> MethodConfig:
    """A decoder-site method: its published cuts on this depth, of which each leaves the same share of what arrives and
    the last one `tokens`."""
    llm, patches = cfg.model.llm, cfg.model.vit.patches
    layers = tuple(cuts(name, llm.layers))
    share = (tokens / patches) ** (1 / len(layers))
    keep = tuple(round(patches * share ** (number + 1)) for number in range(len(layers)))
    default, more = MethodConfig(), {}
    if name == "sparsevlm_plus":
        more = {"decoder_heads": min(default.decoder_heads, llm.heads)}
    elif name == "sparsevlm_v1":
        more = {"decoder_scale": default.decoder_scale * patches / 576}  # tokens a rank, of 576
    elif name == "sparsevlm_paper":
        more = {"decoder_scale": 1 - share}  # of the tokens beyond the rank as many go as elsewhere of all
    return dataclasses.replace(upper_method(cfg), decoder=name, decoder_layers=layers, decoder_keep=keep, **more)


def _sizes(model: ModelConfig) -> ProjectorConfig:
    """Sizes of learned queries: the config's, or those of its towers where it has BLIP-2's and its tower is smaller."""
    size, vit = model.projector, model.vit
    if size != ProjectorConfig() or vit.width >= size.width:
        return size
    return dataclasses.replace(
        size, width=vit.width, layers=2, heads=vit.heads, mlp_dim=vit.mlp_dim, cross_every=1, text_length=32
    )


def _candidates(name: str, model: ModelConfig, tokens: int, most: int) -> Iterator[tuple[dict[str, Any], dict]]:
    """Options of a projector, and sizes in `model.projector`, that might give some number of tokens."""
    grid, queries = model.vit.grid, tokens
    if name == "mqt":
        yield {"queries": tokens}, {"queries": math.ceil(math.sqrt(most)) ** 2}
    elif name in ("qformer", "instructblip"):
        yield {}, {"queries": queries}
    elif name == "pixel_unshuffle":
        # Factors that divide the grid come first: others leave patches out.
        yield from (({}, {"unshuffle": side}) for side in sorted(range(1, grid + 1), key=lambda side: grid % side > 0))
    else:
        pools = [{"pool": pool} for pool in POOLS[name]] if "pool" in PROJECTORS[name].options else [{}]
        for pool, own in itertools.product(pools, settings(name, grid) or [{}]):
            yield {**own, **pool}, {}


class Projector(NamedTuple):
    """A projector at a budget.

    Attributes:
        method: as it is read.
        model: with the sizes that it needs.
        trained: as it is trained; it may draw budgets.
        suffix: of its training's name.
    """

    method: MethodConfig
    model: ModelConfig
    trained: MethodConfig
    suffix: str


def projector(given: ModelConfig, name: str, tokens: int, budgets: Sequence[int]) -> Projector:
    """The first settings of a projector that give `tokens`; one training for all budgets where the method draws them.

    Raises:
        ValueError: none does.
    """
    sizes, counts, wrong = _sizes(given), set(), ""
    for options, changes in _candidates(name, given, tokens, max(budgets)):
        model = dataclasses.replace(given, projector=dataclasses.replace(sizes, **changes))
        method = MethodConfig(projector=name, **options)
        try:
            method_check.check(name, method, model)
        except ValueError as error:
            wrong = str(error)
            continue
        made = vlm.visual_slots(model, method) - (name == "llamavid")  # its context token comes on top
        counts.add(made)
        if made != tokens:
            continue
        if "draw_budget" not in PROJECTORS[name].options:
            return Projector(method, model, method, f"-{tokens}")
        most = changes.get("queries", "")
        return Projector(method, model, MethodConfig(projector=name, draw_budget=True), f"-{most}" if most else "")
    if not counts:
        raise ValueError(wrong)
    known = ", ".join(map(str, sorted(counts)))
    raise ValueError(f"{tokens} tokens cannot be made of {given.vit.grid} x {given.vit.grid} patches, but {known}")
