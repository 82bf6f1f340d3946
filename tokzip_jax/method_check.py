"""Checks of one method: against the model, the data of a run, and the stage whose parameters it reads."""

import math

from tokzip_jax import attention, decoder_site, encoder_site, layout, masks, projectors, tiling, vlm, voco_start
from tokzip_jax.config import MethodConfig, ModelConfig, RowConfig, RunConfig
from tokzip_jax.projectors import KEEPS_PLACES, PROJECTORS, weights_name
from tokzip_jax.require import one_of, require


def check(key: str, method: MethodConfig, model: ModelConfig) -> None:
    """Check one method against a model; `key` is its dotted place in the config, for the message."""
    one_of(f"{key}.projector", method.projector, sorted(PROJECTORS))
    one_of(f"{key}.voco_mask", method.voco_mask, sorted(masks.TABLES))
    encoder_site.check(key, model, method)
    projectors.check(key, model, method)
    limit = model.voco_embeddings if model.voco_embeddings > 1 else math.inf
    require(
        0 <= method.voco <= limit,
        f"{key}.voco = {method.voco} must lie between 0 and model.voco_embeddings = {model.voco_embeddings}"
        if limit < math.inf
        else f"{key}.voco = {method.voco} must be >= 0",
    )
    require(
        method.voco > 0 or method.voco_mask == "visible",
        f"{key}.voco = 0 with the VoCo mask {method.voco_mask!r} would hide every picture from the text; "
        "use voco >= 1, or voco_mask='visible'",
    )
    one_of(f"{key}.voco_start", method.voco_start, voco_start.STARTS)
    require(
        method.voco_start == "embedding"
        or (method.voco > 0 and method.projector in KEEPS_PLACES and method.packing == "tiles"),
        f"{key}.voco_start = {method.voco_start!r} needs VoCo tokens and visual tokens with a place in a whole "
        f"picture: {key}.voco = {method.voco} must be >= 1, {key}.projector = {method.projector!r} one of "
        f"{', '.join(map(repr, KEEPS_PLACES))}, and {key}.packing = {method.packing!r} must be 'tiles'",
    )
    require(
        method.voco_start != "cells" or model.voco_cells > 0,
        f"{key}.voco_start = 'cells' needs a matrix a cell: set model.voco_cells, the cells along a picture's side",
    )
    one_of(f"{key}.packing", method.packing, tiling.PACKINGS)
    stitched = method.packing != "tiles"
    require(
        method.packing not in tiling.UNPADDING or model.image_newline,
        f"{key}.packing = {method.packing!r} needs the learned newline: set model.image_newline = True",
    )
    require(
        method.packing != tiling.SHRINKING or method.encoder == "none",
        f"{key}.packing = {method.packing!r} resizes whole pictures, of which {key}.encoder = {method.encoder!r} "
        "leaves parts; use 'spatial_unpad', or encoder='none'",
    )
    require(
        not stitched or method.projector in KEEPS_PLACES,
        f"{key}.packing = {method.packing!r} needs tokens with a place in their tile, which {key}.projector = "
        f"{method.projector!r} does not keep; choose one of {', '.join(map(repr, KEEPS_PLACES))}",
    )
    require(
        not stitched or method.positions != "raster",
        f"{key}.positions = 'raster' is for whole pictures, not for {key}.packing = {method.packing!r}; use 'original'",
    )
    try:
        decoder_site.check(method, vlm.visual_slots(model, method), model.llm)
    except ValueError as error:
        raise ValueError(f"{key}.{error}") from None
    one_of(f"{key}.positions", method.positions, ("original", "compact", "raster"))
    require(
        method.positions != "compact" or method.voco_mask == "voco",
        f"{key}.positions = 'compact' needs {key}.voco_mask = 'voco', under which text sees VoCo tokens alone, not "
        f"{method.voco_mask!r}",
    )
    require(
        method.positions != "raster" or (method.voco_mask == "visible" and method.projector in KEEPS_PLACES),
        f"{key}.positions = 'raster' needs tokens with a place each, which text sees: {key}.voco_mask = "
        f"{method.voco_mask!r} must be 'visible', and {key}.projector = {method.projector!r} one of "
        f"{', '.join(map(repr, KEEPS_PLACES))}",
    )
    require(
        not method.attention_bias or (method.voco_mask == "visible" and method.decoder == "none"),
        f"{key}.attention_bias = True weighs visual tokens that text sees in all layers: {key}.voco_mask = "
        f"{method.voco_mask!r} must be 'visible', and {key}.decoder = {method.decoder!r} must be 'none'",
    )
    require(
        not method.attention_bias or model.attention in attention.BIASED,
        f"{key}.attention_bias = True cannot be with model.attention = {model.attention!r}, which takes no bias; use "
        f"{', '.join(map(repr, attention.BIASED))}",
    )


def same_projector(key: str, row: RowConfig, cfg: RunConfig) -> None:
    """A row has to run on the parameters that its stage trains, and on no more queries than it trains."""
    method, trained = row.method, cfg.stages[row.stage].method
    require(
        weights_name(method.projector) == weights_name(trained.projector),
        f"{key}.method.projector = {method.projector!r} is not what stage {row.stage!r} trains; it must "
        f"be {trained.projector!r}, or {key}.stage another stage",
    )
    require(
        method.voco == 0
        or method.voco_start == trained.voco_start == "embedding"
        or (method.voco_start, method.voco) == (trained.voco_start, trained.voco),
        f"{key}.method has voco = {method.voco} and voco_start = {method.voco_start!r}, but stage {row.stage!r} trains "
        f"voco = {trained.voco} and {trained.voco_start!r}: what tokens start from, and from which parts, must agree",
    )
    require(not method.draw_budget, f"{key}.method.draw_budget = True is for training; a row needs a fixed budget")
    schedule, every = cfg.stages[row.stage].progressive, cfg.model.projector.queries
    most = max(schedule.budgets) if schedule.site == "projector" else trained.queries or every
    require(
        method.projector != "mqt" or (method.queries or cfg.model.projector.queries) <= most,
        f"{key}.method.queries = {method.queries} (0 = all) is more than stage {row.stage!r} trains; it must lie "
        f"between 1 and {most}",
    )


def fits(key: str, method: MethodConfig, cfg: RunConfig) -> None:
    """Check one method against the data of a run: questions a row, and the language model's position ids."""
    reader = vlm.reads_question(method)
    require(
        not reader or cfg.data.questions == 1,
        f"{key}.{reader} reads the question, and a picture has one set of tokens in a row: data.questions = "
        f"{cfg.data.questions} must be 1",
    )
    require(
        method.decoder == "none" or cfg.data.questions == 1,
        f"data.questions = {cfg.data.questions} must be 1 for {key}.decoder = {method.decoder!r}, which chooses tokens "
        "by the one question of a row",
    )
    require(
        method.packing == "tiles" or bool(cfg.data.tiles),
        f"{key}.packing = {method.packing!r} puts tiles of a picture together, but data.tiles = () cuts none",
    )
    images, visual = vlm.row_images(cfg.model, method, cfg.data.images)
    # Under compact positions visual tokens take no ids, but each picture has to fit by itself; under raster positions
    # those that are not there take theirs too.
    whole = cfg.model.vit.patches if method.positions == "raster" else visual
    seen, alone = (1, visual + method.voco) if method.positions == "compact" else (max(visual, whole), 0)
    length = layout.slots(cfg.data.text_length, images=images, visual=seen, voco=method.voco)
    length = max(length, alone)
    require(
        length <= cfg.model.llm.max_positions,
        f"model.llm.max_positions = {cfg.model.llm.max_positions} is too small for {key}: data.text_length = "
        f"{cfg.data.text_length} with {images} x ({visual} visual + {method.voco} VoCo) tokens needs {length}",
    )
