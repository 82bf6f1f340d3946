"""The vision-language model: pictures and text in, hidden states, logits or answers out.

image -> vit -> encoder-site compressor -> projector -> splice with text and VoCo tokens -> llm -> logits
"""

import dataclasses

import jax
import jax.numpy as jnp

from tokzip_jax import compress, decoder_site, encoder_site, layout, llm, tiling, vit, voco_start
from tokzip_jax.config import MethodConfig, ModelConfig
from tokzip_jax.layout import Layout
from tokzip_jax.masks import TABLES
from tokzip_jax.projectors import PROJECTORS, Context, weights_name
from tokzip_jax.types import PAD, VISION, VOCO, Array, Params, VisionFeatures, VisualTokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forward:
    """What one pass gives.

    Attributes:
        hidden_BTD: [B, T', D] hidden states before the final norm, one a slot.
        layout: what every slot is (behind the last cut, where the method has a decoder site).
        visual: the visual tokens after the projector, [B*I, M, ...]; I is 1 where tiles are stitched.
        summary_BD: the CLS token behind the vision tower's last norm, [B*I, D] (None unless asked for).
    """

    hidden_BTD: Array
    layout: Layout
    visual: VisualTokens
    summary_BD: Array | None


def init(cfg: ModelConfig, projector: str, key: Array) -> Params:
    """Fresh parameters of the whole model with one kind of projector."""
    keys = jax.random.split(key, 5)
    params = {
        "vit": vit.init(cfg.vit, keys[0], cfg.param_dtype),
        "projector": {weights_name(projector): PROJECTORS[projector].init(cfg, keys[1])},
        "llm": llm.init(cfg.llm, keys[2], cfg.param_dtype),
        # The official code's new vocabulary row is drawn like this too.
        "voco": {"table": 0.02 * jax.random.normal(keys[3], (cfg.voco_embeddings, cfg.llm.width), cfg.param_dtype)},
    }
    if cfg.voco_cells:
        shape = (cfg.voco_cells**2, cfg.llm.width, cfg.llm.width)
        params["voco"]["cells"] = {"w": jnp.zeros(shape, cfg.param_dtype)}
    if cfg.contrast_dim:
        image, text = jax.random.split(keys[4])
        dtype = cfg.param_dtype
        params["contrast"] = {
            "image": {"w": cfg.vit.width**-0.5 * jax.random.normal(image, (cfg.vit.width, cfg.contrast_dim), dtype)},
            "text": {"w": cfg.llm.width**-0.5 * jax.random.normal(text, (cfg.llm.width, cfg.contrast_dim), dtype)},
            # CLIP's initial temperature, 0.07 (arXiv 2103.00020, section 2.5).
            "scale": jnp.asarray(jnp.log(1 / 0.07), dtype),
        }
    if cfg.image_newline:
        draw = jax.random.normal(jax.random.fold_in(key, len(keys)), (cfg.llm.width,), cfg.param_dtype)
        params["image_newline"] = cfg.llm.width**-0.5 * draw
    return params


def visual_slots(cfg: ModelConfig, method: MethodConfig) -> int:
    """Visual tokens of one image, a tile for example, that enter the language model."""
    return PROJECTORS[method.projector].count(cfg, method, encoder_site.slots(cfg, method))


def row_images(cfg: ModelConfig, method: MethodConfig, images: int) -> tuple[int, int]:
    """What the language model sees as images in a row of `images`: how many, and the visual slots of one of them."""
    visual = visual_slots(cfg, method)
    if method.packing == "tiles":
        return images, visual
    return 1, tiling.slots(method.packing, images, visual, cfg.vit.grid)


def stitch(
    cfg: ModelConfig, params: Params, batch: dict[str, Array], method: MethodConfig, visual: VisualTokens
) -> VisualTokens:
    """The visual tokens [B*I, M] of tiles as those of one picture a row, see `tiling`.

    Raises:
        ValueError: batch or parameters have not what the packing needs.
    """
    unpad = method.packing in tiling.UNPADDING
    if "tiles" not in batch or (unpad and "image_newline" not in params):
        more = " and the parameter image_newline (set model.image_newline)" if unpad else ""
        raise ValueError(f"method.packing = {method.packing!r} needs batch['tiles'] (set data.tiles){more}")
    newline = params["image_newline"] if unpad else None
    if method.packing == tiling.SHRINKING:
        return tiling.shrink(visual, batch["tiles"], newline, side=cfg.vit.grid)
    merged = getattr(compress.options(method.encoder, method.options), "contextual", 0)
    return tiling.stitch(visual, batch["tiles"], newline, side=cfg.vit.grid, merged=merged)


def question(cfg: ModelConfig, batch: dict[str, Array], method: MethodConfig) -> tuple[Array, Array] | None:
    """The question of every row for a method that reads it (see `layout.question`); None for the others."""
    return layout.question(batch, cfg.projector.text_length) if reads_question(method) else None


def reads_question(method: MethodConfig) -> str:
    """Which part of a method reads the question, so that its tokens are good for one question only; "" = none."""
    if PROJECTORS[method.projector].question:
        return f"projector = {method.projector!r}"
    return f"encoder = {method.encoder!r}" if compress.ENCODER[method.encoder].question else ""


def encode(
    cfg: ModelConfig,
    params: Params,
    images: Array,
    method: MethodConfig,
    key: Array,
    *,
    summary: bool = False,
    text: tuple[Array, Array] | None = None,
    features: VisionFeatures | None = None,
) -> tuple[VisualTokens, Array | None]:
    """Pictures to projected visual tokens.

    Args:
        cfg, params: the model.
        images: [B, I, H, W, 3], uint8, or floats that are normalised already.
        method: encoder site and projector.
        key: for what is random (selection, a drawn budget); one key, which picture n of the flattened [B*I] uses
            folded with n, or B keys, of which picture i of a row uses the row's folded with i.
        summary: also return the CLS token behind the last norm.
        text: ids and validity [B, T] of each row's question, for a method that reads it (see `question`).
        features: of the flattened pictures, where the tower has looked at them already (`encoder_site.look`); there is
            no summary then, and of the pictures only the numbers B and I are read.

    Returns:
        Visual tokens [B*I, M, D_llm], and the summary [B*I, D_vit] or None.

    Raises:
        ValueError: no text for a method that reads the question.
    """
    projector, reader = PROJECTORS[method.projector], reads_question(method)
    if reader and text is None:
        raise ValueError(
            f"{reader} reads the question: give vlm.encode text=(ids, valid), such as vlm.question makes of a batch"
        )
    if key.ndim:
        numbers = jnp.arange(images.shape[1])
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        key = fold(key, numbers).reshape(-1)
    # Every picture of a row is read with the row's question.
    asked = tuple(jnp.repeat(part, images.shape[1], axis=0) for part in text) if reader else None
    weights = params["projector"][weights_name(method.projector)]

    def project(tokens: VisualTokens, cls_BD: Array) -> VisualTokens:
        context = Context(cls_BD=cls_BD, key=key, question=asked if projector.question else None)
        return projector.apply(cfg, method, weights, tokens, context)

    words = None if asked is None else (params["llm"]["embed"]["table"][asked[0]], asked[1])
    pooled = None
    if features is None:
        flat = images.reshape(-1, *images.shape[2:])
        features, pooled = encoder_site.look(cfg, params["vit"], flat, method, summary=summary)
    tokens = encoder_site.choose(cfg, features, method, key, project=project, question=words)
    return project(tokens, features.cls_BD), pooled


def splice(
    cfg: ModelConfig, params: Params, slots: Layout, visual_BVD: Array, start_BIkD: Array | None = None
) -> Array:
    """Embeddings of all slots [B, T', D]: text by id, vision from [B, I*M, D], VoCo from its table; padding is 0.

    `start_BIkD` is added to the VoCo tokens of the row's pictures (see `voco_start`).
    """
    dtype = jnp.dtype(cfg.dtype)
    text = params["llm"]["embed"]["table"].astype(dtype)[slots.ids]
    index = jnp.maximum(slots.visual, 0)[:, :, None]
    vision = jnp.take_along_axis(visual_BVD.astype(dtype), index, axis=1)
    kind = slots.stream.kind[:, :, None]
    x = jnp.where(kind == VISION, vision, text)
    if "voco" in params:
        table = params["voco"]["table"].astype(dtype)
        # One row: all VoCo tokens share it (official). Several: each has its own.
        first = table[jnp.clip(slots.voco, 0, table.shape[0] - 1)]
        if start_BIkD is not None:
            rows, _, count, width = start_BIkD.shape
            index = jnp.maximum((slots.stream.segment - 1) * count + slots.voco, 0)[:, :, None]
            first += jnp.take_along_axis(start_BIkD.reshape(rows, -1, width).astype(dtype), index, axis=1)
        x = jnp.where(kind == VOCO, first, x)
    return jnp.where(kind == PAD, 0, x)


def drop_tokens(visual: VisualTokens, share: float, key: Array) -> VisualTokens:
    """Make a random part of the visual tokens of some pictures invalid, for training.

    A model that has only ever seen all tokens of a picture is thrown off by their number before it misses what they
    said (yes/no answers first). One that has met every number can be asked what a selection keeps.

    Args:
        visual: [B, M] tokens.
        share: of the pictures that lose tokens. Such a picture keeps each token with a probability u^2, u uniform on
            [0, 1], so that few tokens are met as often as many; at least one is kept.
        key: of this step.
    """
    which, rate, draw = jax.random.split(key, 3)
    rows, slots = visual.valid_BM.shape
    keep_rate = jnp.where(jax.random.uniform(which, (rows, 1)) < share, jax.random.uniform(rate, (rows, 1)) ** 2, 1.0)
    lot = jnp.where(visual.valid_BM, jax.random.uniform(draw, (rows, slots)), 2.0)
    kept = (lot < keep_rate) | (lot == jnp.min(lot, axis=1, keepdims=True))
    return dataclasses.replace(visual, valid_BM=visual.valid_BM & kept)


def embed(
    cfg: ModelConfig,
    params: Params,
    batch: dict[str, Array],
    method: MethodConfig,
    *,
    voco_count: Array | int,
    key: Array,
    summary: bool = False,
    token_dropout: float = 0.0,
    visual: VisualTokens | None = None,
) -> tuple[Array, Layout, VisualTokens, Array | None]:
    """Everything before the language model's first layer: (embeddings [B, T', D], layout, visual tokens, summary).

    With `visual`, visual tokens [B*I, M, D] that are there already, no picture is read and there is no summary.

    Raises:
        ValueError: VoCo slots, but parameters of a model that never had VoCo tokens (a converted LLaVA); a packing
            without what it needs in batch and parameters.
    """
    if method.voco and "voco" not in params:
        raise ValueError(
            f"method.voco = {method.voco}, but the parameters hold no voco/table: "
            "load them into those of `vlm.init`, or set method.voco = 0"
        )
    pooled = None
    if visual is None:
        text = question(cfg, batch, method)
        visual, pooled = encode(cfg, params, batch["images"], method, key, summary=summary, text=text)
    rows = batch["ids"].shape[0]
    images = visual.valid_BM.shape[0] // rows
    if token_dropout:
        visual = drop_tokens(visual, token_dropout, jax.random.fold_in(key, 1))
    if method.packing != "tiles":
        visual = stitch(cfg, params, batch, method, visual)
        batch, images = tiling.one_placeholder(batch), 1
    slots = layout.expand(batch, visual.valid_BM.reshape(rows, images, -1), voco=method.voco, voco_count=voco_count)
    if method.positions == "compact":
        slots = dataclasses.replace(slots, stream=layout.compact_positions(slots.stream))
    if method.positions == "raster":
        place = visual.position_BM.reshape(rows, -1)
        slots = dataclasses.replace(slots, stream=layout.raster_positions(slots, place, cfg.vit.patches))
    if method.attention_bias:
        size = jnp.take_along_axis(visual.size_BM.reshape(rows, -1), jnp.maximum(slots.visual, 0), axis=1)
        stream = dataclasses.replace(slots.stream, size=jnp.where(slots.visual >= 0, size, 0))
        slots = dataclasses.replace(slots, stream=stream)
    start = None
    if method.voco and method.voco_start != "embedding":
        if method.voco_start == "pooled":
            start = voco_start.pooled(visual, method.voco, grid=cfg.vit.grid)
        else:
            start = voco_start.from_cells(visual, method.voco, params["voco"]["cells"]["w"], grid=cfg.vit.grid)
        start = start.reshape(rows, images, method.voco, -1)
    flat = visual.tokens_BMD.reshape(rows, -1, cfg.llm.width)
    return splice(cfg, params, slots, flat, start), slots, visual, pooled


def forward(
    cfg: ModelConfig,
    params: Params,
    batch: dict[str, Array],
    method: MethodConfig,
    *,
    table: Array | None = None,
    voco_count: Array | int | None = None,
    key: Array | None = None,
    summary: bool = False,
    token_dropout: float = 0.0,
    visual: VisualTokens | None = None,
) -> Forward:
    """One pass over whole rows, for training and scoring.

    Args:
        cfg, params: the model.
        batch: "images", "ids", "thread", "sample", "supervised" (see `data.pipeline`).
        method: what becomes of the pictures.
        table: who sees whom; None = `masks.TABLES[method.voco_mask]`.
        voco_count: VoCo tokens in use, a scalar or [B]; None = all `method.voco` slots.
        key: for random selection, one or one a row (see `encode`); None = `method.seed`. Token dropout takes one.
        summary: also return the CLS summary.
        token_dropout: share of the pictures that lose a random part of their tokens, see `drop_tokens`.
        visual: what `encode` gave for the pictures, which are not read then; slots that are not valid may be added, so
            that methods with few tokens share a program.
    """
    key = jax.random.key(method.seed) if key is None else key
    table = jnp.asarray(TABLES[method.voco_mask]) if table is None else table
    count = method.voco if voco_count is None else voco_count
    x, slots, visual, pooled = embed(
        cfg,
        params,
        batch,
        method,
        voco_count=count,
        key=key,
        summary=summary,
        token_dropout=token_dropout,
        visual=visual,
    )
    sizes = {"images": visual.valid_BM.shape[0] // x.shape[0], "visual": visual.valid_BM.shape[1]}
    hidden, slots, _ = decoder_site.run(cfg, params["llm"]["layers"], x, slots, table, method, **sizes)
    return Forward(hidden_BTD=hidden, layout=slots, visual=visual, summary_BD=pooled)


def voco_attention(
    cfg: ModelConfig,
    params: Params,
    batch: dict[str, Array],
    method: MethodConfig,
    *,
    visual: VisualTokens | None = None,
) -> Array:
    """Where each VoCo token of a row's first image looks: [L, B, k, M] float32, mean over heads.

    M are the visual tokens of that image; what a VoCo token spends on the prefix and on other VoCo tokens is left out.
    With `visual`, what `encode` gave for the pictures, no picture is read.
    """
    key = jax.random.key(method.seed)
    x, slots, visual, _ = embed(cfg, params, batch, method, voco_count=method.voco, key=key, visual=visual)
    kind, segment = slots.stream.kind, slots.stream.segment
    first = jnp.argsort(~((kind == VOCO) & (segment == 1)), axis=1, stable=True)[:, : method.voco]
    patches = jnp.argsort(~((kind == VISION) & (segment == 1)), axis=1, stable=True)[:, : visual.valid_BM.shape[1]]
    table = jnp.asarray(TABLES[method.voco_mask])
    _, out = llm.run_layers(cfg, params["llm"]["layers"], x, slots.stream, table, rows=first)
    return jnp.take_along_axis(jnp.mean(out["scores"], axis=2), patches[None, :, None, :], axis=3)
