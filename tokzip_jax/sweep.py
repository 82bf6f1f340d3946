"""Every method at every budget: the rows of a sweep, made from a run's config, and what cannot be with the reason.

Training-free methods are read with the parameters of the stage that the row `eval.upper` reads. A projector is trained
from that stage's checkpoint, the vision tower frozen, as the run trains its own compressors (`template`).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from tokzip_jax import compress, method_check, vlm
from tokzip_jax.compress import ENCODER
from tokzip_jax.compress.decoder import DECODER
from tokzip_jax.config import (
    LossConfig,
    MethodConfig,
    ModelConfig,
    ProgressiveConfig,
    ProjectorConfig,
    RowConfig,
    RunConfig,
    StageConfig,
)
from tokzip_jax.data import sources
from tokzip_jax.projectors import OPTIONS, PROJECTORS

# Encoder-site methods with options, and what else they change: another name in the table.
RESTORED = {"positions": "raster", "attention_bias": True}
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "cls_attention_lowest": ("cls_attention", {"order": "lowest"}, {}),
    **{f"{n}_restore": (n, {"restore": 0.5}, RESTORED) for n in ("visionzip", "vispruner", "divprune", "holov")},
}
CONTEXTUAL = 10 / 64  # VisionZip's published share of merged tokens
# Where cuts are published, as a share of the layers: FastV 2 of 32, SparseVLM 2, 6, 15, PyramidDrop 8, 16, 24.
CUTS = {
    "fastv": (2 / 32,),
    "fastv_paper": (2 / 32,),
    "pyramiddrop": (8 / 32, 16 / 32, 24 / 32),
    "sparsevlm": (2 / 32, 6 / 32, 15 / 32),
    "sparsevlm_v1": (2 / 32, 6 / 32, 15 / 32),
    "sparsevlm_plus": (2 / 32, 6 / 32, 15 / 32),
}
# Which pooling a projector stands for: `avgpool_linear` is the average in front of a linear layer already.
POOLS = {"pool_linear": ("max",), "pool_mlp": ("average", "bilinear"), "mlp_pool": ("bilinear",)}
RANDOM_SEEDS = 3
BUDGETS = (1, 4, 9, 16)


@dataclasses.dataclass(frozen=True)
class Line:
    """One row of a sweep.

    Attributes:
        method: its name.
        row: how it is measured.
        model: the run's model, for a projector with sizes of its own another one.
        alone: it needs one question a row.
        training: the stage that has to be trained for it; None = none.
    """

    method: str
    row: RowConfig
    model: ModelConfig
    alone: bool = False
    training: StageConfig | None = None

    @property
    def tokens(self) -> int:
        """Visual tokens of a picture: that enter the language model, or that a decoder site leaves."""
        method = self.row.method
        return method.decoder_keep[-1] if method.decoder_keep else vlm.visual_slots(self.model, method)

    @property
    def name(self) -> str:
        """What the row is called."""
        return f"{self.method} {self.tokens}"


@dataclasses.dataclass(frozen=True)
class Refused:
    """A budget that a method cannot meet, and why, in a sentence."""

    method: str
    tokens: int
    reason: str


def upper_method(cfg: RunConfig) -> MethodConfig:
    """The projector, with its options, of the row that counts as 100 %."""
    method = cfg.rows[cfg.eval.upper].method
    return MethodConfig(projector=method.projector, **{name: getattr(method, name) for name in OPTIONS})


def free_names() -> list[str]:
    """Methods that need no training."""
    return [*(name for name in ENCODER if name != "none"), *VARIANTS, *DECODER]


def trained_names(cfg: RunConfig) -> list[str]:
    """Projectors that a run would have to train; its own one is the upper bound."""
    return [name for name in PROJECTORS if name != upper_method(cfg).projector]


def named(cfg: RunConfig, asked: Sequence[str]) -> list[str]:
    """Names of methods: "free", "all", or some of them as they are, each once.

    Raises:
        ValueError: a name that is no method.
    """
    free, every = free_names(), [*free_names(), *trained_names(cfg)]
    names: list[str] = []
    for name in asked:
        if name not in ("free", "all", *every):
            raise ValueError(f"--methods holds {name!r}; choose of 'all', 'free', {', '.join(map(repr, every))}")
        names += {"free": free, "all": every}.get(name, [name])
    return list(dict.fromkeys(names))


def plan(cfg: RunConfig, asked: Sequence[str], budgets: Sequence[int]) -> tuple[list[Line], list[Refused]]:
    """The rows of a sweep, method by method, and the budgets that cannot be.

    Args:
        cfg: of the run.
        asked: see `named`.
        budgets: visual tokens of a picture. Decoder-site methods keep half of all tokens, whatever is asked.

    Raises:
        ValueError: an unknown name, a budget below 1, or no stage that a projector's recipe could be taken from.
    """
    names = named(cfg, asked)
    if not names or not budgets or min(budgets) < 1:
        raise ValueError(f"--methods={','.join(asked)} and --budgets={budgets}: give at least one each, budgets >= 1")
    if not cfg.rows:
        raise ValueError("the config has no rows: eval.upper says which stage's parameters the methods are read with")
    budgets = sorted(set(budgets))
    lines: list[Line] = []
    refused: list[Refused] = []
    for name in names:
        half = max(1, cfg.model.vit.patches // 2)
        for tokens in [half] if name in DECODER else budgets:
            try:
                lines.append(_line(cfg, name, tokens, budgets))
            except ValueError as error:
                # The place in the config and the method itself say its name; here it stands in front already.
                reason = str(error).removeprefix(f"{name}: ").removeprefix(f"{name}: ")
                refused.append(Refused(name, tokens, reason))
    return lines, refused


def _line(cfg: RunConfig, name: str, tokens: int, budgets: Sequence[int]) -> Line:
    if name in PROJECTORS:
        line = _projector(cfg, name, tokens, budgets)
    else:
        make = _decoder if name in DECODER else _encoder
        method = make(cfg, name, tokens)
        seeds = RANDOM_SEEDS if name == "random" else 1
        alone = method.decoder != "none" or bool(vlm.reads_question(method))
        line = Line(name, RowConfig(stage=cfg.rows[cfg.eval.upper].stage, method=method, seeds=seeds), cfg.model, alone)
    method_check.check(name, line.row.method, line.model)
    method_check.fits(name, line.row.method, run_config(cfg, [line]))
    return line


def run_config(cfg: RunConfig, lines: Sequence[Line]) -> RunConfig:
    """The run's config with the rows of lines that agree on model and questions a row, and with what trains for them.

    Of the run's stages only that of the upper bound is left, which is finished: where it came from does not matter.
    """
    first, origin = lines[0], cfg.rows[cfg.eval.upper].stage
    stages = {origin: dataclasses.replace(cfg.stages[origin], init_from="")}
    trained = {line.row.stage: line.training for line in lines if line.training}
    if trained:
        # Not the study's own `equal_time`: a stage with VoCo tokens, twice as long, would double the work of a sweep.
        name = template(cfg)
        stages[name] = cfg.stages[name]  # for its steps and the time of one
        study = dataclasses.replace(cfg.study, stages=tuple(trained), learning_rates=_rates(cfg), equal_time=name)
    else:
        study = dataclasses.replace(cfg.study, stages=(), equal_time="")
    return dataclasses.replace(
        cfg,
        model=first.model,
        data=dataclasses.replace(cfg.data, questions=1) if first.alone else cfg.data,
        stages=stages | trained,
        rows={line.name: line.row for line in lines},
        study=study,
    )


def _rates(cfg: RunConfig) -> tuple[float, ...]:
    """The study's learning rates; of a run without a study the recipe's, half and double of it.

    Where no split could choose among them, the recipe's alone.
    """
    peak = cfg.stages[template(cfg)].optim.learning_rate
    return cfg.study.learning_rates or ((peak / 2, peak, peak * 2) if sources.has_validation(cfg.data) else ())


def _encoder(cfg: RunConfig, name: str, tokens: int) -> MethodConfig:
    """Options are those of the run's row with this method, scaled to the budget, where there is one."""
    known, options, changes = VARIANTS.get(name, (name, {}, {}))
    own = [row.method for row in cfg.rows.values() if row.stage and row.method.encoder == known]
    own = sorted((method for method in own if name not in VARIANTS), key=lambda method: abs(method.tokens - tokens))
    if own:
        options = compress.scaled(known, own[0].options, own[0].tokens, tokens)
    elif "contextual" in {field.name for field in dataclasses.fields(ENCODER[known].options)}:
        options = {**options, "contextual": round(CONTEXTUAL * tokens)}
    elif known.startswith("prumerge"):
        most = max(1, cfg.model.vit.patches - tokens)
        options = {"neighbours": min(compress.options(known, {}).neighbours, most)}
    elif known == "dart":
        options = {"pivots": min(compress.options(known, {}).pivots, tokens)}
    return dataclasses.replace(upper_method(cfg), encoder=known, tokens=tokens, options=options, **changes)


def _decoder(cfg: RunConfig, name: str, tokens: int) -> MethodConfig:
    """The published schedule on this depth: each cut keeps the same share of what arrives, the last one `tokens`."""
    llm, patches = cfg.model.llm, cfg.model.vit.patches
    layers = tuple(dict.fromkeys(min(max(1, round(llm.layers * cut)), llm.layers - 1) for cut in CUTS[name]))
    share = (tokens / patches) ** (1 / len(layers))
    keep = tuple(round(patches * share ** (number + 1)) for number in range(len(layers)))
    heads = {"decoder_heads": min(MethodConfig().decoder_heads, llm.heads)} if name == "sparsevlm_plus" else {}
    return dataclasses.replace(upper_method(cfg), decoder=name, decoder_layers=layers, decoder_keep=keep, **heads)


def template(cfg: RunConfig) -> str:
    """The name of the run's stage whose recipe the trained methods take: one that begins where the upper bound was
    read, with a projector of its own or with VoCo tokens that text sees alone.

    Raises:
        ValueError: there is none.
    """
    origin, own = cfg.rows[cfg.eval.upper].stage, upper_method(cfg).projector
    stages = {name: stage.method for name, stage in sorted(cfg.stages.items()) if stage.init_from == origin}
    for fits in (lambda m: m.projector != own, lambda m: m.voco_mask != "visible"):
        for name, method in stages.items():
            if fits(method):
                return name
    raise ValueError(
        f"no stage begins from {origin!r} with another projector or a VoCo mask, so that there is no recipe to train "
        "projectors by; add such a stage, or ask for --methods=free"
    )


def _training(cfg: RunConfig, method: MethodConfig) -> StageConfig:
    """Same steps, batch and optimiser as the template; cross entropy; projector and language model train."""
    recipe = cfg.stages[template(cfg)]
    return dataclasses.replace(
        recipe,
        train=("projector/.*", "llm/.*"),
        method=method,
        voco_counts=(),
        token_dropout=0.0,
        loss=LossConfig(chunk=recipe.loss.chunk),
        progressive=ProgressiveConfig(),
    )


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
    grid = model.vit.grid
    # Factors that divide the grid come first: others leave patches out.
    sides = sorted(range(1, grid + 1), key=lambda side: (grid % side > 0, side))
    options, queries = PROJECTORS[name].options, tokens
    if name == "mqt":
        yield {"queries": tokens}, {"queries": math.ceil(math.sqrt(most)) ** 2}
    elif name in ("qformer", "instructblip"):
        yield {}, {"queries": queries}
    elif name == "pixel_unshuffle":
        yield from (({}, {"unshuffle": side}) for side in sides)
    elif "pool" in options:
        for pool, factor in itertools.product(POOLS[name], sides):
            yield {"factor": factor, "pool": pool}, {}
    elif "level" in options:
        yield from (({"level": level}, {}) for level in range(grid.bit_length()))
    elif key := next((key for key in ("pool_grid", "content_grid") if key in options), ""):
        yield from (({key: side}, {}) for side in sides)
    else:
        yield {}, {}


def _projector(cfg: RunConfig, name: str, tokens: int, budgets: Sequence[int]) -> Line:
    """The first settings that give `tokens`; one training for all budgets where the method draws them."""
    sizes, counts, wrong = _sizes(cfg.model), set(), ""
    for options, changes in _candidates(name, cfg.model, tokens, max(budgets)):
        model = dataclasses.replace(cfg.model, projector=dataclasses.replace(sizes, **changes))
        method = MethodConfig(projector=name, **options)
        try:
            method_check.check(name, method, model)
        except ValueError as error:
            wrong = str(error)
            continue
        given = vlm.visual_slots(model, method) - (name == "llamavid")  # its context token comes on top
        counts.add(given)
        if given != tokens:
            continue
        drawn = "draw_budget" in PROJECTORS[name].options
        trained, suffix = method, f"-{tokens}"
        if drawn:
            most = changes.get("queries", "")
            trained, suffix = MethodConfig(projector=name, draw_budget=True), f"-{most}" if most else ""
        row = RowConfig(stage=name + suffix, method=method)
        return Line(name, row, model, PROJECTORS[name].question, _training(cfg, trained))
    if not counts:
        raise ValueError(wrong)
    known = ", ".join(map(str, sorted(counts)))
    raise ValueError(
        f"{tokens} tokens cannot be made of {cfg.model.vit.grid} x {cfg.model.vit.grid} patches, but {known}"
    )
